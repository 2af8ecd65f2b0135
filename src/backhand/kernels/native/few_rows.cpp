// Few rows times a frozen matrix on all threads; see few_rows.h.
#include "arena.h"
#include "few_rows_tiles.h"

namespace {

constexpr int64_t GRAIN_VALUES = 1 << 16;

template <class T>
bool by_tiles_of_rows(const FewRows<T>&, int64_t) {
  return false;
}
#if defined(__AMX_BF16__)
// Rows of bfloat16; returns false if there is no memory to transpose them.
bool by_tiles_of_rows(const FewRows<bfloat16>& p, int64_t values) {
  const int64_t units = tile_blocks(p.rows) * tile_steps(p.columns) * TILE * TILE;
  Arena arena(static_cast<size_t>(units) * sizeof(uint32_t));
  if (!arena.there()) return false;
  uint32_t* turned = arena.take<uint32_t>(units);
  turn_rows(p.x, p.x_row, p.rows, p.columns, turned);
  const TiledRows product = {p, turned, nullptr, 0, 0};
  parallel((p.outputs + TILE - 1) / TILE, (GRAIN_VALUES + TILE * values - 1) / (TILE * values),
           [=](int64_t begin, int64_t end) {
             const Tiles tiles;
             product(begin, end);
           });
  return true;
}
#endif

}  // namespace

// y (rows, outputs) = residual + x Wᵀ + bias.
//
//   type          ggml's number of W's rows; -1 if they hold numbers of `dtype`
//   weight        its first stored row, of `stored_rows` rows with a stride of `weight_row` bytes
//   row_ids       the stored row of output 0, 1, …, int64, or null for stored order
//   x, y          rows of `columns` and `outputs` numbers, with strides of x_row and y_row numbers
//   bias          (outputs), or null
//   residual      (rows, outputs), with a stride of residual_row numbers, or null
//   tiles         true if AMX may be used: faster for a few rows, slower for a single row of a quantized W
//
// Returns 0; 1 for an unknown type, 2 for missing rows or columns. Nothing is written then.
BACKHAND_EXPORT int backhand_few_rows(int dtype, int type, const uint8_t* weight, int64_t weight_row,
                                      int64_t stored_rows, const int64_t* row_ids, int64_t outputs, int64_t columns,
                                      const void* x, int64_t x_row, int64_t rows, const void* bias,
                                      const void* residual, int64_t residual_row, void* y, int64_t y_row, int tiles) {
  const Kind* kind = type < 0 ? nullptr : kind_of(type);
  if (type >= 0 && kind == nullptr) return 1;
  if (rows < 0 || outputs < 0 || columns < 0) return 2;
  if (kind != nullptr && (columns % kind->values != 0 || columns / kind->values * kind->bytes > weight_row)) return 2;
  if (row_ids == nullptr && outputs > stored_rows) return 2;
  for (int64_t r = 0; row_ids != nullptr && r < outputs; ++r) {
    if (row_ids[r] < 0 || row_ids[r] >= stored_rows) return 2;
  }
  if (rows == 0 || outputs == 0) return 0;
  BY_DTYPE(dtype, T, {
    const FewRows<T> product = {kind, weight, weight_row, row_ids, outputs, columns, static_cast<const T*>(x), x_row,
                                rows, static_cast<const T*>(bias), static_cast<const T*>(residual), residual_row,
                                static_cast<T*>(y), y_row};
    if (tiles && by_tiles_of_rows(product, columns > 0 ? columns : 1)) return 0;
    const int64_t values = SIDE_BY_SIDE * (columns > 0 ? columns : 1);
    parallel((outputs + SIDE_BY_SIDE - 1) / SIDE_BY_SIDE, (GRAIN_VALUES + values - 1) / values, product);
  });
  return 0;
}
