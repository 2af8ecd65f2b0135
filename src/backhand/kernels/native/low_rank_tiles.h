// AMX's part of the products with an adapter's factors: tiles of 16 rows by 16 columns, along 32 bfloat16 at a time.
//
// The large operand is read in place if a tile is whole, so that it is read once. A sum depends on its row and column
// only, not on where the tile begins.
#pragma once

#include <type_traits>

#include "products.h"

namespace {

constexpr int64_t TILE = 16, TILE_LENGTH = 32;

struct NoTiles {
  NoTiles() {}  // no configuration
};
// The tile configuration that a thread holds while it multiplies these units.
template <class Op>
using TilesOf = typename std::conditional<by_tiles<Op>, Tiles, NoTiles>::type;

#if defined(__AMX_BF16__)
// Copy up to 16 rows of up to 32 numbers to a tile, with zeros after them.
inline void copy_tile(const bfloat16* from, int64_t row, int64_t count, int64_t n, bfloat16* tile) {
  const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
  for (int64_t y = 0; y < TILE; ++y) {
    const __m512i line = _mm512_maskz_loadu_epi16(y < count ? mask : 0, y < count ? from + y * row : from);
    _mm512_store_si512(tile + y * TILE_LENGTH, line);
  }
}

// sums (16, 16) = v F of up to 16 rows of v (count, n), with F as units (n / 2, width) padded with zeros to a whole
// tile. Four tiles alternate along n, since each waits for its own sum.
inline void shrink_tile(const bfloat16* v, int64_t row, int64_t count, int64_t n, const uint32_t* units, int64_t width,
                        float* sums) {
  alignas(64) bfloat16 edge[TILE * TILE_LENGTH];
  alignas(64) float parts[4 * TILE * TILE];
  const int64_t bytes = row * 2, unit_bytes = width * 4, step = TILE * width;
  const int64_t steps = rounded_up(n, TILE_LENGTH) / TILE_LENGTH, whole = count == TILE ? n / TILE_LENGTH : 0;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t k = 0;
  for (; k + 4 <= whole; k += 4, v += 4 * TILE_LENGTH, units += 4 * step) {
    // The rows of the next tile, which the processor does not prefetch if there are many.
    for (int64_t y = TILE; y < 2 * TILE; ++y)
      for (int64_t x = 0; x < 4; ++x) __builtin_prefetch(v + y * row + x * TILE_LENGTH, 0, 2);
    LOAD_TILE(4, v, bytes);
    LOAD_TILE(5, units, unit_bytes);
    _tile_dpbf16ps(0, 4, 5);
    LOAD_TILE(6, v + TILE_LENGTH, bytes);
    LOAD_TILE(7, units + step, unit_bytes);
    _tile_dpbf16ps(1, 6, 7);
    LOAD_TILE(4, v + 2 * TILE_LENGTH, bytes);
    LOAD_TILE(5, units + 2 * step, unit_bytes);
    _tile_dpbf16ps(2, 4, 5);
    LOAD_TILE(6, v + 3 * TILE_LENGTH, bytes);
    LOAD_TILE(7, units + 3 * step, unit_bytes);
    _tile_dpbf16ps(3, 6, 7);
  }
  for (; k < steps; ++k, v += TILE_LENGTH, units += step) {
    if (k < whole) {
      LOAD_TILE(4, v, bytes);
    } else {
      const int64_t left = n - k * TILE_LENGTH;
      copy_tile(v, row, count, left < TILE_LENGTH ? left : TILE_LENGTH, edge);
      LOAD_TILE(4, edge, 64);
    }
    LOAD_TILE(5, units, unit_bytes);
    switch (k % 4) {
      case 0: _tile_dpbf16ps(0, 4, 5); break;
      case 1: _tile_dpbf16ps(1, 4, 5); break;
      case 2: _tile_dpbf16ps(2, 4, 5); break;
      default: _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, parts, 64);
  _tile_stored(1, parts + TILE * TILE, 64);
  _tile_stored(2, parts + 2 * TILE * TILE, 64);
  _tile_stored(3, parts + 3 * TILE * TILE, 64);
  for (int64_t i = 0; i < TILE * TILE; i += TILE) {
    const Vector<float> even = load<float>(parts + i) + load<float>(parts + 2 * TILE * TILE + i);
    const Vector<float> odd = load<float>(parts + TILE * TILE + i) + load<float>(parts + 3 * TILE * TILE + i);
    store(sums + i, even + odd);
  }
}

// sums (16, 64) = h Fᵀ of 16 rows, with h as `steps` consecutive tiles and Fᵀ as units (16 · steps, width).
inline void up_projection_tiles(int64_t steps, const uint32_t* h, const uint32_t* units, int64_t width, float* sums) {
  const int64_t unit_bytes = width * 4;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < steps; ++k, h += TILE * TILE, units += TILE * width) {
    LOAD_TILE(4, h, 64);
    LOAD_TILE(5, units, unit_bytes);
    LOAD_TILE(6, units + TILE, unit_bytes);
    LOAD_TILE(7, units + 2 * TILE, unit_bytes);
    _tile_dpbf16ps(0, 4, 5);
    LOAD_TILE(5, units + 3 * TILE, unit_bytes);
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, sums, 256);
  _tile_stored(1, sums + TILE, 256);
  _tile_stored(2, sums + 2 * TILE, 256);
  _tile_stored(3, sums + 3 * TILE, 256);
}

// `interleave` of up to 64 columns, which prefetches the next ones, `next` numbers later: the processor does not
// prefetch so few lines of a row.
inline void interleave_block(const bfloat16* v, int64_t row, int64_t count, int64_t columns, int64_t next,
                             uint32_t* units) {
  constexpr int64_t COLUMNS = 2 * TILE_LENGTH;
  const int64_t pairs = columns % TILE_LENGTH == 0 ? count / 2 : 0;
  for (int64_t i = 0; i < pairs; ++i, v += 2 * row, units += COLUMNS) {
    const bfloat16* odd = v + row;
    for (int64_t x = next; x < next + COLUMNS; x += TILE_LENGTH) {
      __builtin_prefetch(v + x);
      __builtin_prefetch(odd + x);
    }
    for (int64_t x = 0; x < columns; x += TILE_LENGTH) interleave_two(v + x, odd + x, units + x);
  }
  interleave<Pairs>(v, row, count - 2 * pairs, columns, units, COLUMNS);
}

// sums (16, 64), or its left half, = or += 16 rows of hᵀ, as units `row` apart, by units (16 · steps, 64).
inline void gather_tiles(int64_t steps, const uint32_t* h, int64_t row, const uint32_t* units, float* sums,
                         int64_t sums_row, bool all, bool add) {
  const int64_t bytes = row * 4, sum_bytes = sums_row * 4;
  if (add) {
    LOAD_TILE(0, sums, sum_bytes);
    LOAD_TILE(1, sums + TILE, sum_bytes);
    if (all) {
      LOAD_TILE(2, sums + 2 * TILE, sum_bytes);
      LOAD_TILE(3, sums + 3 * TILE, sum_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < steps; ++k, h += TILE, units += TILE * 64) {
    LOAD_TILE(4, h, bytes);
    LOAD_TILE(5, units, 256);
    LOAD_TILE(6, units + TILE, 256);
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 6);
    if (all) {
      LOAD_TILE(7, units + 2 * TILE, 256);
      LOAD_TILE(5, units + 3 * TILE, 256);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  _tile_stored(0, sums, sum_bytes);
  _tile_stored(1, sums + TILE, sum_bytes);
  if (all) {
    _tile_stored(2, sums + 2 * TILE, sum_bytes);
    _tile_stored(3, sums + 3 * TILE, sum_bytes);
  }
}
#endif

}  // namespace
