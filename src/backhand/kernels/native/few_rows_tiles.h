// Few rows of x, up to 64, times a frozen matrix by AMX's tiles, y = r + x Wᵀ + b + Σ s h Fᵀ. W is read once in place:
// a tile is 16 rows of W in memory, and x is transposed instead. Positions of K, the factors and what is added have the
// order of dense_product.h, so that a row has the same bits as among many rows.
#pragma once

#include "few_rows.h"
#include "low_rank_tiles.h"

#if defined(__AMX_BF16__)

namespace {

// Rows of x per pass over W, with one tile of sums per 16 rows.
constexpr int64_t MOST_TILED_ROWS = 4 * TILE;

inline int64_t tile_steps(int64_t columns) { return (columns + TILE_LENGTH - 1) / TILE_LENGTH; }
inline int64_t tile_blocks(int64_t rows) { return (rows + TILE - 1) / TILE; }

// Convert rows (count, columns) of x in groups of 16: per 32 columns one tile (16 pairs of columns, 16 rows), padded
// with zeros.
inline void turn_rows(const bfloat16* x, int64_t x_row, int64_t rows, int64_t columns, uint32_t* to) {
  alignas(64) bfloat16 tile[TILE * TILE_LENGTH];
  for (int64_t first = 0; first < rows; first += TILE)
    for (int64_t k = 0; k < columns; k += TILE_LENGTH, to += TILE * TILE) {
      copy_tile(x + first * x_row + k, x_row, rows - first < TILE ? rows - first : TILE,
                columns - k < TILE_LENGTH ? columns - k : TILE_LENGTH, tile);
      transpose_square(reinterpret_cast<const uint32_t*>(tile), TILE, to, TILE);
    }
}

// s h Fᵀ of the outputs first … first + outputs - 1, F (outputs, rank): s h transposed, and its rounding error unless s
// is a power of two.
struct TiledTerm {
  int64_t first, outputs, rank;
  const bfloat16* factor;
  double scaling;
  const uint32_t* turned;

  // Only an exponent: the mantissa is zero.
  bool two() const {
    uint64_t bits;
    std::memcpy(&bits, &scaling, 8);
    return bits << 12 != 0;
  }
  int64_t padded() const { return (rank + 1) / 2 * 2; }
  int64_t columns() const { return (two() ? 2 : 1) * padded(); }

  // One row of s h in the layout of `turn_rows`, `columns` numbers.
  void scale(const bfloat16* h, bfloat16* to) const {
    constexpr int64_t W = lanes<float>;
    std::memset(to, 0, static_cast<size_t>(columns()) * sizeof(bfloat16));
    for (int64_t r = 0; r < rank; r += W) {
      const int64_t count = rank - r < W ? rank - r : W;
      const Vector<float> value = load_some<float>(h + r, count) * static_cast<float>(scaling);
      store_some<float>(to + r, value, count);
      if (two()) store_some<float>(to + padded() + r, value - load_some<float>(to + r, count), count);
    }
  }
  // The positions k … k + 31 of 16 outputs from `output` on, zeros for outputs of other terms.
  void factor_tile(int64_t output, int64_t k, bfloat16* tile) const {
    const auto line = [=](const bfloat16* row, int64_t from) {  // its numbers at the positions from … from + rank - 1
      const int64_t low = from > k ? from - k : 0, high = from + rank - k < TILE_LENGTH ? from + rank - k : TILE_LENGTH;
      if (low >= high) return _mm512_setzero_si512();
      const uint64_t mask = (uint64_t{1} << high) - (uint64_t{1} << low);
      return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(mask), row + k - from);
    };
    for (int64_t y = 0; y < TILE; ++y) {
      const int64_t own = output + y - first;
      __m512i numbers = _mm512_setzero_si512();
      if (own >= 0 && own < outputs) {
        numbers = line(factor + own * rank, 0);
        if (two()) numbers = _mm512_or_si512(numbers, line(factor + own * rank, padded()));
      }
      _mm512_store_si512(tile + y * TILE_LENGTH, numbers);
    }
  }
};

struct TiledRows {
  FewRows<bfloat16> p;
  const uint32_t* turned;  // all of x
  const TiledTerm* terms;
  int64_t term_count, before;  // outputs of a term's group before those of this matrix

  // Groups of 16 outputs, from begin to end.
  void operator()(int64_t begin, int64_t end) const {
    for (int64_t first = 0; first < p.rows; first += MOST_TILED_ROWS) {
      switch (tile_blocks(p.rows - first)) {
        case 1: some_rows<1>(begin, end, first); break;
        case 2: some_rows<2>(begin, end, first); break;
        case 3: some_rows<3>(begin, end, first); break;
        default: some_rows<4>(begin, end, first);
      }
    }
  }

  template <int BLOCKS>
  static inline void step(const void* left, int64_t left_bytes, const uint32_t* right, int64_t apart) {
    LOAD_TILE(4, left, left_bytes);
    LOAD_TILE(5, right, 64);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (BLOCKS > 1) {
      LOAD_TILE(6, right + apart, 64);
      _tile_dpbf16ps(1, 4, 6);
    }
    if constexpr (BLOCKS > 2) {
      LOAD_TILE(5, right + 2 * apart, 64);
      _tile_dpbf16ps(2, 4, 5);
    }
    if constexpr (BLOCKS > 3) {
      LOAD_TILE(6, right + 3 * apart, 64);
      _tile_dpbf16ps(3, 4, 6);
    }
  }

  template <int BLOCKS>
  void some_rows(int64_t begin, int64_t end, int64_t first_row) const {
    alignas(64) bfloat16 room[TILE * PIECE];
    alignas(64) float sums[BLOCKS][TILE * TILE];
    const int64_t steps = tile_steps(p.columns), apart = steps * TILE * TILE, line = p.weight_row;
    const uint32_t* x = turned + first_row / TILE * apart;
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * TILE, count = p.outputs - first < TILE ? p.outputs - first : TILE;
      const bool lies = p.kind == nullptr && p.row_ids == nullptr && count == TILE && p.columns % TILE_LENGTH == 0;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      if (lies) {
        const uint8_t* w = p.row_of(first);
        for (int64_t s = 0; s < steps; ++s) {
          // The same positions of the next 16 rows.
          if (group + 1 < end)
            for (int64_t y = 0; y < TILE; ++y) __builtin_prefetch(w + (TILE + y) * line + s * 64, 0, 2);
          step<BLOCKS>(w + s * 64, line, x + s * TILE * TILE, apart);
        }
      } else {
        for (int64_t start = 0; start < p.columns; start += PIECE) {
          const int64_t length = p.columns - start < PIECE ? p.columns - start : PIECE;
          const int64_t row = rounded_up(length, TILE_LENGTH);
          for (int64_t y = 0; y < TILE; ++y) unpack(first + y, y < count ? length : 0, start, row, room + y * row);
          for (int64_t k = 0; k < row; k += TILE_LENGTH)
            step<BLOCKS>(room + k, row * 2, x + (start + k) / TILE_LENGTH * TILE * TILE, apart);
        }
      }
      for (const TiledTerm* term = terms; term < terms + term_count; ++term) {
        if (before + first + count <= term->first || before + first >= term->first + term->outputs) continue;
        const int64_t term_steps = tile_steps(term->columns());
        const uint32_t* h = term->turned + first_row / TILE * term_steps * TILE * TILE;
        for (int64_t s = 0; s < term_steps; ++s) {
          term->factor_tile(before + first, s * TILE_LENGTH, room);
          step<BLOCKS>(room, 64, h + s * TILE * TILE, term_steps * TILE * TILE);
        }
      }
      _tile_stored(0, sums[0], 64);
      if constexpr (BLOCKS > 1) _tile_stored(1, sums[1], 64);
      if constexpr (BLOCKS > 2) _tile_stored(2, sums[2], 64);
      if constexpr (BLOCKS > 3) _tile_stored(3, sums[3], 64);
      __asm__ volatile("" ::: "memory");
      for (int64_t b = 0; b < BLOCKS; ++b) write(sums[b], first, count, first_row + b * TILE);
    }
  }

  // The same for a factor A whose h a training pass computes separately: four sums alternate, as in `shrink_tile`.
  void by_turns(int64_t begin, int64_t end) const {
    alignas(64) bfloat16 room[TILE * TILE_LENGTH];
    alignas(64) float parts[4 * TILE * TILE];
    const int64_t steps = tile_steps(p.columns);
    for (int64_t group = begin; group < end; ++group)
      for (int64_t row = 0; row < p.rows; row += TILE) {
        const int64_t first = group * TILE, count = p.outputs - first < TILE ? p.outputs - first : TILE;
        const uint32_t* x = turned + row / TILE * steps * TILE * TILE;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t s = 0; s < steps; ++s) {
          const int64_t k = s * TILE_LENGTH, left = p.columns - k;
          copy_tile(reinterpret_cast<const bfloat16*>(p.row_of(first)) + k, p.weight_row / 2, count,
                    left < TILE_LENGTH ? left : TILE_LENGTH, room);
          LOAD_TILE(4, room, 64);
          LOAD_TILE(5, x + s * TILE * TILE, 64);
          switch (s % 4) {
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
        __asm__ volatile("" ::: "memory");
        for (int64_t i = 0; i < TILE * TILE; i += TILE) {
          const Vector<float> even = load<float>(parts + i) + load<float>(parts + 2 * TILE * TILE + i);
          const Vector<float> odd = load<float>(parts + TILE * TILE + i) + load<float>(parts + 3 * TILE * TILE + i);
          store(parts + i, even + odd);
        }
        write(parts, first, count, row);
      }
  }

  // `length` numbers of an output from `start` on, with zeros up to `row`.
  void unpack(int64_t output, int64_t length, int64_t start, int64_t row, bfloat16* to) const {
    if (length > 0 && p.kind != nullptr) {
      const uint8_t* blocks = p.row_of(output) + start / p.kind->values * p.kind->bytes;
      for (int64_t at = 0; at < length / p.kind->values * p.kind->bytes; at += LINE) fetch_ahead(blocks + at);
      expand(*p.kind, blocks, length, to);
    } else if (length > 0) {
      const bfloat16* numbers = reinterpret_cast<const bfloat16*>(p.row_of(output)) + start;
      std::memcpy(to, numbers, static_cast<size_t>(length) * sizeof(bfloat16));
    }
    std::memset(to + length, 0, static_cast<size_t>(row - length) * sizeof(bfloat16));
  }

  // Write sums (16 outputs, 16 rows of x) with what is added to them, each rounded once.
  void write(float* sums, int64_t first, int64_t count, int64_t row) const {
    alignas(64) float by_row[TILE * TILE];
    transpose_square(reinterpret_cast<const uint32_t*>(sums), TILE, reinterpret_cast<uint32_t*>(by_row), TILE);
    for (int64_t i = 0; i < TILE && row + i < p.rows; ++i) {
      Vector<float> value = load<float>(by_row + i * TILE);
      const bfloat16* around = p.residual == nullptr ? nullptr : p.residual + (row + i) * p.residual_row + first;
      bfloat16* to = p.y + (row + i) * p.y_row + first;
      if (count == TILE) {
        if (p.bias != nullptr) value += load<float>(p.bias + first);
        if (around != nullptr) value += load<float>(around);
        store(to, value);
      } else {
        if (p.bias != nullptr) value += load_some<float>(p.bias + first, count);
        if (around != nullptr) value += load_some<float>(around, count);
        store_some<float>(to, value, count);
      }
    }
  }
};

}  // namespace

#endif
