// Shared by the kernels of an adapter's factors: operands in the layout of `products.h`, and gradients in place.
#pragma once

#include <algorithm>

#include "arena.h"
#include "dtypes.h"
#include "low_rank_tiles.h"
#include "mutants.h"

namespace {

// The block of the large operand that is computed at a time, so that its sums and operands stay in the cache.
constexpr int64_t SHRUNK_ROWS = 24, SHRUNK_RANKS = 64, GATHERED_COLUMNS = 64;
template <class Op>
constexpr int64_t GATHERED_ROWS = by_tiles<Op> ? 128 : 48;
// Threads divide a gathered product by these columns, and the others by tiles of rows.
constexpr int64_t FEWEST_COLUMNS = 32;

// The fewest multiplications that justify another thread; AMX computes them several times as fast.
template <class Op>
inline int64_t grain_of(int64_t multiplications) {
  return 1 + (int64_t{1} << (by_tiles<Op> ? 20 : 18)) / std::max<int64_t>(multiplications, 1);
}

template <class T>
struct Matrix {
  T* data;
  int64_t row;
  T* at(int64_t i, int64_t j = 0) const { return data + i * row + j; }
};

// A factor, (n, rank), or stored as (rank, n).
template <class T>
struct Factor {
  Matrix<const T> stored;
  bool transposed;
};

template <class Op>
inline int64_t units_of(int64_t elements) {
  return (elements + Op::PACK - 1) / Op::PACK;
}

// Copy the first n elements of a row, with zeros up to `padded`.
template <class Op, class T>
inline void copy_row(const T* from, int64_t n, typename Op::Element* to, int64_t padded) {
  typedef typename Op::Element E;
  if constexpr (sizeof(E) == sizeof(T)) {
    if (n > 0) std::memcpy(to, from, static_cast<size_t>(n) * sizeof(E));
  } else {
    for (int64_t j = 0; j < n; ++j) to[j] = widened(from[j]);
  }
  for (int64_t j = n; j < padded; ++j) to[j] = E(0);
}

// Rows of n elements as units: in place if possible, else a copy.
template <class Op, class T>
inline Rows<typename Op::Unit> rows_as_units(Matrix<const T> x, int64_t rows, int64_t n, typename Op::Element* copy) {
  typedef typename Op::Unit U;
  if constexpr (sizeof(typename Op::Element) == sizeof(T)) {
    const bool whole = reinterpret_cast<uintptr_t>(x.data) % sizeof(U) == 0 && x.row % Op::PACK == 0;
    if (whole && n % Op::PACK == 0) return {reinterpret_cast<const U*>(x.data), x.row / Op::PACK};
  }
  const int64_t units = units_of<Op>(n), padded = units * Op::PACK;
  for (int64_t i = 0; i < rows; ++i) copy_row<Op>(x.at(i), n, copy + i * padded, padded);
  return {reinterpret_cast<const U*>(copy), units};
}

// Add the first `count` numbers of a register, or all of it, to `to`.
template <class C, class O>
inline void add_some(O* to, Vector<C> value, int64_t count) {
  if (count >= lanes<C>) {
    store(to, MUTATED("low_rank: gradient not added", load<C>(to), Vector<C>{}) + value);
  } else {
    store_some<C>(to, load_some<C>(to, count) + MUTATED("low_rank: sign of a gradient's tail", value, -value), count);
  }
}

// Add s · sumsᵀ, (columns, rank); sums is (rank, columns) with rows and columns rounded up to multiples of 16.
template <class C, class O>
inline void add_turned(const C* sums, int64_t width, int64_t columns, int64_t rank, C s, O* out, int64_t out_row) {
  constexpr int64_t STEP = 16;
  alignas(64) C square[STEP * STEP];
  for (int64_t j = 0; j < columns; j += STEP)
    for (int64_t r = 0; r < rank; r += STEP) {
      transpose(sums + r * width + j, width, STEP, STEP, square, STEP);
      for (int64_t x = 0; x < std::min(STEP, columns - j); ++x)
        for (int64_t c = 0; c < std::min(STEP, rank - r); c += lanes<C>)
          add_some<C>(out + (j + x) * out_row + r + c, load<C>(square + x * STEP + c) * s, rank - r - c);
    }
}

// Call body(first row, last row) on parts of all rows, in parallel if there are threads.
template <class Op, class Body>
inline void by_rows(int64_t rows, int64_t multiplications, const Body& body) {
  constexpr int64_t STEP = by_tiles<Op> ? TILE : 1;
  parallel((rows + STEP - 1) / STEP, grain_of<Op>(multiplications * STEP), [=](int64_t begin, int64_t end) {
    const TilesOf<Op> tiles;
    body(begin * STEP, std::min(rows, end * STEP));
  });
}

// Convert (rows, columns) to units along the columns: (units, to_row ≥ rows), with zeros after the rows.
template <class Op, class T>
inline void turn(Matrix<const T> x, int64_t rows, int64_t columns, typename Op::Unit* to, int64_t to_row) {
  typedef typename Op::Element E;
  typedef typename Op::Unit U;
  constexpr int64_t STEP = 16, LENGTH = STEP * Op::PACK;
  alignas(64) E square[STEP * LENGTH];
  alignas(64) U transposed[STEP * STEP];
  const int64_t units = units_of<Op>(columns);
  for (int64_t i = 0; i < to_row; i += STEP)
    for (int64_t k = 0; k < units; k += STEP) {
      const int64_t there = std::min(LENGTH, columns - k * Op::PACK);
#if defined(__AVX512BF16__)
      // A whole square is transposed in registers.
      if constexpr (Op::PACK == 2)
        if (i + STEP <= rows && there == LENGTH && x.row % Op::PACK == 0) {
          transpose_square(reinterpret_cast<const U*>(x.at(i, k * Op::PACK)), x.row / Op::PACK, to + k * to_row + i,
                           to_row);
          continue;
        }
#endif
      for (int64_t y = 0; y < STEP; ++y) {
        const int64_t n = i + y < rows ? there : 0;
#if defined(__AVX512BF16__)
        if constexpr (Op::PACK == 2) {
          const __mmask32 mask = static_cast<__mmask32>((uint64_t{1} << n) - 1);
          const __m512i row = _mm512_maskz_loadu_epi16(mask, x.data + (n > 0 ? (i + y) * x.row + k * Op::PACK : 0));
          _mm512_store_si512(square + y * LENGTH, row);
          continue;
        }
#endif
        copy_row<Op>(x.data + (n > 0 ? (i + y) * x.row + k * Op::PACK : 0), n, square + y * LENGTH, LENGTH);
      }
      transpose(reinterpret_cast<const U*>(square), STEP, STEP, STEP, transposed, STEP);
      const int64_t width = std::min(STEP, to_row - i), last = std::min(STEP, units - k);
      for (int64_t y = 0; y < last; ++y) {
        U* place = to + (k + y) * to_row + i;
        if (width == STEP) {
          std::memcpy(place, transposed + y * STEP, STEP * sizeof(U));
        } else {
          std::copy(transposed + y * STEP, transposed + y * STEP + width, place);
        }
      }
    }
}

// Convert a factor to units along n, (rounded up to whole tiles, width), with zeros after n and the rank; null without
// memory.
template <class Op, class T>
inline typename Op::Unit* units_along_n(const Factor<T>& factor, int64_t n, int64_t rank, int64_t width, Arena& arena) {
  typedef typename Op::Unit U;
  const int64_t units = units_of<Op>(n), padded = rounded_up(units, by_tiles<Op> ? SIDE : 1);
  U* packed = arena.there() ? arena.take<U>(padded * width) : nullptr;
  if (packed == nullptr) return nullptr;
  if (factor.transposed) {
    turn<Op>(factor.stored, rank, n, packed, width);
  } else {
    interleave<Op>(factor.stored.data, factor.stored.row, n, rank, packed, width);
  }
  std::fill(packed + units * width, packed + padded * width, U(0));
  return packed;
}

template <class Op>
inline size_t bytes_of_units(int64_t n, int64_t width) {
  return static_cast<size_t>(rounded_up(units_of<Op>(n), SIDE) * width) * sizeof(typename Op::Unit) + 64;
}

// Rows begin … end - 1 of h = s v F.
template <class Op, class T>
inline void shrink_rows(Matrix<const T> v, const typename Op::Unit* packed, int64_t width, Matrix<T> h, int64_t begin,
                        int64_t end, int64_t n, int64_t rank, typename Op::Sum s) {
  typedef typename Op::Sum C;
  typedef typename Op::Element E;
  const auto write = [=](const C* from, int64_t i, int64_t r, int64_t count) {
    T* to = h.at(i, r);
    along<C>(
        count, [=](int64_t j) { store(to + j, load<C>(from + j) * s); },
        [=](int64_t j, int64_t some) { store_some<C>(to + j, load_some<C>(from + j, some) * s, some); });
  };
  if constexpr (by_tiles<Op>) {
    alignas(64) C sums[16 * 16];
    for (int64_t i = begin; i < end; i += 16)
      for (int64_t r = 0; r < rank; r += 16) {
        shrink_tile(v.at(i), v.row, std::min<int64_t>(16, end - i), n, packed + r, width, sums);
        for (int64_t y = 0; y < std::min<int64_t>(16, end - i); ++y)
          write(sums + y * 16, i + y, r, std::min<int64_t>(16, rank - r));
      }
  } else {
    constexpr int64_t DEPTH = LONGEST_SUM;
    const int64_t units = units_of<Op>(n);
    alignas(64) C sums[SHRUNK_ROWS * SHRUNK_RANKS];
    alignas(64) E copy[SHRUNK_ROWS * DEPTH * Op::PACK];
    for (int64_t i = begin; i < end; i += SHRUNK_ROWS)
      for (int64_t r = 0; r < width; r += SHRUNK_RANKS) {
        const int64_t count = std::min(SHRUNK_ROWS, end - i), wide = std::min(SHRUNK_RANKS, width - r);
        for (int64_t k = 0; k == 0 || k < units; k += DEPTH) {
          const int64_t elements = std::min(DEPTH * Op::PACK, n - k * Op::PACK);
          const auto left = rows_as_units<Op>(Matrix<const T>{v.at(i, k * Op::PACK), v.row}, count, elements, copy);
          product_of_part<Op>(count, wide, units_of<Op>(elements), left, packed + k * width + r, width, sums,
                              SHRUNK_RANKS, MUTATED("low_rank: first part of a sum lost", k > 0, false));
        }
        for (int64_t y = 0; y < count; ++y) write(sums + y * SHRUNK_RANKS, i + y, r, std::min(wide, rank - r));
      }
  }
}

// Hᵀ as the left operand of a gathered product: units along the rows, one rank after another, or transposed for tiles.
template <class Op>
struct Left {
  const typename Op::Unit* data;
  int64_t row, rank;
};

template <class Op>
inline size_t bytes_of_left(int64_t rows, int64_t rank) {
  const int64_t units = rounded_up(units_of<Op>(rows), SIDE);
  return 2 * (static_cast<size_t>(units * rounded_up(rank, TILE)) * sizeof(typename Op::Unit) + 64);
}

template <class Op, class T>
inline Left<Op> left_of(Matrix<const T> h, int64_t rows, int64_t rank, Arena& arena) {
  typedef typename Op::Unit U;
  const int64_t units = units_of<Op>(rows);
  if constexpr (by_tiles<Op>) {
    const int64_t high = rounded_up(rank, TILE), padded = rounded_up(units, TILE);
    U *by_place = arena.take<U>(padded * high), *transposed = arena.take<U>(padded * high);
    interleave<Op>(h.data, h.row, rows, rank, by_place, high);
    std::fill(by_place + units * high, by_place + padded * high, U(0));
    transpose(by_place, high, padded, high, transposed, padded);
    return {transposed, padded, rank};
  } else {
    U* by_place = arena.take<U>(units * rank);
    interleave<Op>(h.data, h.row, rows, rank, by_place, rank);
    return {by_place, rank, rank};
  }
}

// Parts of the rows, whose number does not depend on the number of threads. Each part has its own sums, which are added
// in order. Fewer than `FEWEST` parts would leave threads without work.
struct RowParts {
  static constexpr int64_t ROWS = 256, MOST = 8, FEWEST = 2, STEP = TILE_LENGTH;
  int64_t rows, count;
  explicit RowParts(int64_t all)
      : rows(all), count(std::max<int64_t>(1, std::min(MOST, (all + ROWS - 1) / ROWS))) {}
  int64_t begin(int64_t part) const { return std::min(rows, (rows + STEP - 1) / STEP * part / count * STEP); }
};

// Sums over rows, (rank, width), of one block of rows after another. If there are many blocks, the sums of the last few
// are kept separately and then added, compensated, to those of all before, so that many rows round no more than few.
template <class C>
struct BlockSums {
  static constexpr int64_t FEW = 16;
  C *all, *recent, *lost;

  // The numbers of all three sums if there are many blocks, else those of one.
  static int64_t numbers(int64_t one, int64_t rows, int64_t rows_a_block) {
    return rows > FEW * rows_a_block ? 3 * one : one;
  }
  BlockSums(C* memory, int64_t one, int64_t rows, int64_t rows_a_block) : all(memory), recent(memory), lost(nullptr) {
    if (rows <= FEW * rows_a_block) return;
    recent = memory + one;
    lost = recent + one;
  }
  // True if the sums of this block, counted from 0, are added to the recent ones.
  bool adds(int64_t block) const { return lost == nullptr ? block > 0 : block % FEW > 0; }
  // Call after the block, for the columns first … last - 1 of `rank` rows from number `offset` on.
  void end_block(int64_t block, bool is_last, int64_t offset, int64_t width, int64_t rank, int64_t first,
                 int64_t last) const {
    if (lost == nullptr || (block % FEW < FEW - 1 && !is_last)) return;
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t j = first; j < last; j += lanes<C>) {
        const int64_t place = offset + r * width + j;
        if (block < FEW) {
          store(all + place, load<C>(recent + place));
          store(lost + place, Vector<C>{});
        } else {
          add_compensated<C>(all + place, lost + place, load<C>(recent + place));
        }
      }
  }
};

// How many times `FEWEST_COLUMNS` columns justify another thread if `numbers` numbers of each are added.
inline int64_t grain_of_sums(int64_t numbers) {
  return 1 + (int64_t{1} << 14) / std::max<int64_t>(numbers * FEWEST_COLUMNS, 1);
}

// Add the columns first … last - 1 of all parts' sums to those of the first, each `apart` numbers after the one before.
template <class C>
inline void add_parts(C* sums, int64_t parts, int64_t apart, int64_t width, int64_t rank, int64_t first, int64_t last) {
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t r = 0; r < rank; ++r)
      for (int64_t j = first; j < last; j += lanes<C>) {
        C* place = sums + r * width + j;
        store(place, load<C>(place) +
                         MUTATED("low_rank_rows: first part only", load<C>(place + part * apart), Vector<C>{}));
      }
}

// Prefetch one of `shares` of up to `count` rows from `first` on, row by row. A block that is read in narrow columns
// next arrives sooner this way, since memory favours consecutive addresses.
template <class T>
inline void fetch_share(Matrix<const T> v, int64_t first, int64_t count, int64_t n, int64_t share, int64_t shares) {
  for (int64_t i = first + count * share / shares; i < first + count * (share + 1) / shares; ++i)
    for (int64_t j = 0; j < n; j += LINE / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(v.at(i, j), 0, 2);
}

// Columns j … of sums (rank, width) = or += Hᵀ V over the rows t … t + count - 1, at most one block; the next block
// begins `next` numbers later.
template <class Op, class T>
inline void gather_block(Matrix<const T> v, const Left<Op>& left, int64_t t, int64_t count, int64_t j, int64_t wide,
                         int64_t n, int64_t next, typename Op::Unit* right, typename Op::Sum* sums, int64_t width,
                         bool add) {
  typedef typename Op::Unit U;
  const int64_t units = units_of<Op>(count);
  if constexpr (by_tiles<Op>) {
    interleave_block(v.at(t, j), v.row, count, std::min(wide, n - j), next, right);
    const int64_t padded = rounded_up(units, TILE);
    std::fill(right + units * GATHERED_COLUMNS, right + padded * GATHERED_COLUMNS, U(0));
    for (int64_t r = 0; r < left.rank; r += TILE)
      gather_tiles(padded / TILE, left.data + r * left.row + t / Op::PACK, left.row, right, sums + r * width + j,
                   width, wide > FEWEST_COLUMNS, add);
  } else {
    interleave<Op>(v.at(t, j), v.row, count, std::min(wide, n - j), right, GATHERED_COLUMNS);
    product_of_part<Op>(left.rank, wide, units, Interleaved<U>{left.data + t / Op::PACK * left.row, left.row}, right,
                        GATHERED_COLUMNS, sums + j, width, add);
  }
}

}  // namespace
