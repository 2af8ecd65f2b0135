// Products with the factors of an adapter, whose rank is small beside all else: the formulas of ops/low_rank.py.
//     shrink   H = s V F        (rows, rank)
//     expand   Y += s H Fᵀ      (rows, n)
//     gather   s Vᵀ H           (n, rank), or its transpose
// F (n, rank) lies as it is, as lora_B does, or transposed, as lora_A does. V and Y are large and are read (and written)
// once; a sum is rounded once, when it is whole, and does not depend on the number of threads.
#include <algorithm>

#include "arena.h"
#include "dtypes.h"
#include "low_rank_tiles.h"
#include "mutants.h"

namespace {

// Multiplications that are worth a thread of their own; tiles do them several times as fast.
template <class Op>
inline int64_t grain_of(int64_t multiplications) {
  return 1 + (int64_t{1} << (by_tiles<Op> ? 20 : 18)) / std::max<int64_t>(multiplications, 1);
}

// Of the large operand, so much is at work at a time: a block of rows, whose sums and operands stay near the processor.
constexpr int64_t SHRUNK_ROWS = 24, SHRUNK_RANKS = 64, EXPANDED_ROWS = 24, EXPANDED_COLUMNS = 64;
constexpr int64_t GATHERED_ROWS = 128, GATHERED_COLUMNS = 64, WIDE = 4096;
// Threads divide the columns of a gathered product in these, and the rows of the others by tiles.
constexpr int64_t FEWEST_COLUMNS = 32;

// body(first row, last row) on parts of all rows, side by side where threads are.
template <class Op, class Body>
inline void by_rows(int64_t rows, int64_t multiplications, const Body& body) {
  constexpr int64_t STEP = by_tiles<Op> ? TILE : 1;
  parallel((rows + STEP - 1) / STEP, grain_of<Op>(multiplications * STEP), [=](int64_t begin, int64_t end) {
    const TilesOf<Op> tiles;
    body(begin * STEP, std::min(rows, end * STEP));
  });
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

// The first n elements of a row, zeros behind them up to `room`.
template <class Op, class T>
inline void copy_row(const T* from, int64_t n, typename Op::Element* to, int64_t room) {
  typedef typename Op::Element E;
  if constexpr (sizeof(E) == sizeof(T)) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(E));
  } else {
    for (int64_t j = 0; j < n; ++j) to[j] = widened(from[j]);
  }
  for (int64_t j = n; j < room; ++j) to[j] = E(0);
}

// Rows of n elements as units: where they lie, if they can be read as that, else a copy.
template <class Op, class T>
inline Rows<typename Op::Unit> rows_as_units(Matrix<const T> x, int64_t rows, int64_t n, typename Op::Element* copy) {
  typedef typename Op::Unit U;
  if constexpr (sizeof(typename Op::Element) == sizeof(T)) {
    const bool whole = reinterpret_cast<uintptr_t>(x.data) % sizeof(U) == 0 && x.row % Op::PACK == 0;
    if (whole && n % Op::PACK == 0) return {reinterpret_cast<const U*>(x.data), x.row / Op::PACK};
  }
  const int64_t units = units_of<Op>(n), room = units * Op::PACK;
  for (int64_t i = 0; i < rows; ++i) copy_row<Op>(x.at(i), n, copy + i * room, room);
  return {reinterpret_cast<const U*>(copy), units};
}

// (rows, columns) as units along the columns' number: (units, to_row ≥ rows), zeros behind the rows.
template <class Op, class T>
inline void turn(Matrix<const T> x, int64_t rows, int64_t columns, typename Op::Unit* to, int64_t to_row) {
  typedef typename Op::Element E;
  typedef typename Op::Unit U;
  constexpr int64_t STEP = 16, LENGTH = STEP * Op::PACK;
  alignas(64) E square[STEP * LENGTH];
  alignas(64) U turned[STEP * STEP];
  const int64_t units = units_of<Op>(columns);
  for (int64_t i = 0; i < to_row; i += STEP)
    for (int64_t k = 0; k < units; k += STEP) {
      const int64_t there = std::min(LENGTH, columns - k * Op::PACK);
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
      transpose(reinterpret_cast<const U*>(square), STEP, STEP, STEP, turned, STEP);
      const int64_t width = std::min(STEP, to_row - i), last = std::min(STEP, units - k);
      for (int64_t y = 0; y < last; ++y) {
        U* place = to + (k + y) * to_row + i;
        if (width == STEP) {
          std::memcpy(place, turned + y * STEP, STEP * sizeof(U));
        } else {
          std::copy(turned + y * STEP, turned + y * STEP + width, place);
        }
      }
    }
}

// A factor as units along n, (rounded up to whole tiles, width), zeros behind n and the rank; null without memory.
template <class Op, class T>
inline typename Op::Unit* units_along_n(const Factor<T>& factor, int64_t n, int64_t rank, int64_t width, Arena& arena) {
  typedef typename Op::Unit U;
  const int64_t units = units_of<Op>(n), room = rounded_up(units, by_tiles<Op> ? SIDE : 1);
  U* packed = arena.there() ? arena.take<U>(room * width) : nullptr;
  if (packed == nullptr) return nullptr;
  if (factor.transposed) {
    turn<Op>(factor.stored, rank, n, packed, width);
  } else {
    interleave<Op>(factor.stored.data, factor.stored.row, n, rank, packed, width);
  }
  std::fill(packed + units * width, packed + room * width, U(0));
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

template <class Op, class T>
int shrink(Matrix<const T> v, const Factor<T>& factor, Matrix<T> h, int64_t rows, int64_t n, int64_t rank,
           double scaling) {
  typedef typename Op::Sum C;
  const int64_t width = rounded_up(rank, lanes<C>);
  Arena arena(bytes_of_units<Op>(n, width));
  const auto* packed = units_along_n<Op>(factor, n, rank, width, arena);
  if (packed == nullptr) return 1;
  const C s = static_cast<C>(MUTATED("low_rank: scaling of h forgotten", scaling, 1));
  by_rows<Op>(rows, n * width, [=](int64_t begin, int64_t end) {
    shrink_rows<Op>(v, packed, width, h, begin, end, n, rank, s);
  });
  return 0;
}

// Rows begin … end - 1 of y += s h Fᵀ, with Fᵀ as units (rank / PACK, width).
template <class Op, class T>
inline void expand_rows(Matrix<T> y, Rows<typename Op::Unit> left, const typename Op::Unit* packed, int64_t width,
                        int64_t begin, int64_t end, int64_t n, int64_t rank, Vector<typename Op::Sum> s) {
  typedef typename Op::Sum C;
  const int64_t whole = n / lanes<C> * lanes<C>;
  const auto add = [=](T* place, Vector<C> sum) {
    store(place, fma(sum, s, MUTATED("low_rank: y overwritten", load<C>(place), Vector<C>{})));
  };
  const auto add_last = [=](T* place, Vector<C> sum) {
    const Vector<C> by = MUTATED("low_rank: sign of the tail", s, -s);
    store_some<C>(place, fma(sum, by, load_some<C>(place, n - whole)), n - whole);
  };
  if constexpr (by_tiles<Op>) {
    alignas(64) C sums[TILE * EXPANDED_COLUMNS];
    for (int64_t i = begin; i < end; i += TILE)
      for (int64_t j = 0; j < n; j += EXPANDED_COLUMNS) {
        expand_tiles(left.row / TILE, left.from(i), packed + j, width, sums);
        const int64_t full = std::min(EXPANDED_COLUMNS, whole - j);
        for (int64_t line = 0; line < std::min(TILE, end - i); ++line) {
          T* place = y.at(i + line, j);
          // The same place 16 rows on.
          __builtin_prefetch(place + TILE * y.row, 1);
          __builtin_prefetch(place + TILE * y.row + TILE_LENGTH, 1);
          const C* sum = sums + line * EXPANDED_COLUMNS;
          for (int64_t x = 0; x < full; x += lanes<C>) add(place + x, load<C>(sum + x));
          if (full < EXPANDED_COLUMNS && j + full < n) add_last(place + full, load<C>(sum + full));
        }
      }
  } else {
    const int64_t units = units_of<Op>(rank);
    for (int64_t i = begin; i < end; i += EXPANDED_ROWS) {
      const int64_t count = std::min(EXPANDED_ROWS, end - i);
      const Rows<typename Op::Unit> some{left.from(i), left.row};
      finished_product<Op>(count, whole, units, some, packed, width, [=](int64_t line, int64_t j, Vector<C> sum) {
        add(y.at(i + line, j), sum);
      });
      finished_product<Op>(count, width - whole, units, some, packed + whole, width,
                           [=](int64_t line, int64_t, Vector<C> sum) { add_last(y.at(i + line, whole), sum); });
    }
  }
}

template <class Op, class T>
int expand(Matrix<T> y, Matrix<const T> h, const Factor<T>& factor, int64_t rows, int64_t n, int64_t rank,
           double scaling) {
  typedef typename Op::Sum C;
  typedef typename Op::Element E;
  typedef typename Op::Unit U;
  const int64_t units = units_of<Op>(rank), room = rounded_up(units, by_tiles<Op> ? TILE : 1);
  const int64_t width = rounded_up(n, by_tiles<Op> ? EXPANDED_COLUMNS : lanes<C>);
  const int64_t copied = rounded_up(rows, TILE) * room;
  Arena arena(static_cast<size_t>(room * width + copied) * sizeof(U) + 192);
  U *packed = arena.take<U>(room * width), *copy = arena.take<U>(copied);
  if (!arena.there()) return 1;
  if (factor.transposed) {
    interleave<Op>(factor.stored.data, factor.stored.row, rank, n, packed, width);
  } else {
    turn<Op>(factor.stored, n, rank, packed, width);
  }
  std::fill(packed + units * width, packed + room * width, U(0));
  Rows<U> left{copy, room};
  if constexpr (by_tiles<Op>) {
    // Of each 16 rows one tile behind another.
    for (int64_t i = 0; i < rows; i += TILE)
      for (int64_t k = 0; k < room; k += TILE)
        copy_tile(h.at(i, k * Op::PACK), h.row, std::min(TILE, rows - i),
                  std::min(TILE_LENGTH, rank - k * Op::PACK), reinterpret_cast<E*>(copy + i * room + k * TILE));
  } else {
    left = rows_as_units<Op>(h, rows, rank, reinterpret_cast<E*>(copy));
  }
  const Vector<C> s = all<C>(static_cast<C>(MUTATED("low_rank: scaling of y forgotten", scaling, 1)));
  by_rows<Op>(rows, n * rank, [=](int64_t begin, int64_t end) {
    expand_rows<Op>(y, left, packed, width, begin, end, n, rank, s);
  });
  return 0;
}

// s · value, added to what stands at `to` or not, count ≤ a register of it.
template <class C, class O>
inline void put_some(O* to, Vector<C> value, int64_t count, bool add) {
  if (count >= lanes<C>) {
    store(to, add ? load<C>(to) + value : value);
  } else {
    store_some<C>(to, add ? load_some<C>(to, count) + value : value, count);
  }
}

// One of several results that stand side by side: the columns first … first + rank - 1 of H belong to it.
template <class O>
struct Part {
  Matrix<O> out;
  int64_t first, rank;
};

// Hᵀ as the left operand of a gathered product: units along the rows, of one rank after another or, for tiles, turned.
template <class Op>
struct Left {
  const typename Op::Unit* data;
  int64_t row, rank;
  int64_t high() const { return rounded_up(rank, TILE); }
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
    const int64_t high = rounded_up(rank, TILE), room = rounded_up(units, TILE);
    U *by_place = arena.take<U>(room * high), *turned = arena.take<U>(room * high);
    interleave<Op>(h.data, h.row, rows, rank, by_place, high);
    std::fill(by_place + units * high, by_place + room * high, U(0));
    transpose(by_place, high, room, high, turned, room);
    return {turned, room, rank};
  } else {
    U* by_place = arena.take<U>(units * rank);
    interleave<Op>(h.data, h.row, rows, rank, by_place, rank);
    return {by_place, rank, rank};
  }
}

// Columns j … of sums (rank, width) = or += Hᵀ V over the rows t … t + count - 1, at most a block of each.
template <class Op, class T>
inline void gather_block(Matrix<const T> v, const Left<Op>& left, int64_t t, int64_t count, int64_t j, int64_t wide,
                         int64_t n, typename Op::Unit* right, typename Op::Sum* sums, int64_t width, bool add) {
  typedef typename Op::Unit U;
  const int64_t units = units_of<Op>(count);
  if constexpr (by_tiles<Op>) {
    interleave_block(v.at(t, j), v.row, count, std::min(wide, n - j), right);
    const int64_t room = rounded_up(units, TILE);
    std::fill(right + units * GATHERED_COLUMNS, right + room * GATHERED_COLUMNS, U(0));
    for (int64_t r = 0; r < left.rank; r += TILE)
      gather_tiles(room / TILE, left.data + r * left.row + t / Op::PACK, left.row, right, sums + r * width + j,
                   width, wide > FEWEST_COLUMNS, add);
  } else {
    interleave<Op>(v.at(t, j), v.row, count, std::min(wide, n - j), right, GATHERED_COLUMNS);
    product_of_part<Op>(left.rank, wide, units, Interleaved<U>{left.data + t / Op::PACK * left.row, left.row}, right,
                        GATHERED_COLUMNS, sums + j, width, add);
  }
}

// Columns first … last - 1 of the sums into the result that they belong to; O is its type, narrow or wide.
template <class C, class O>
inline void put_columns(const Part<O>& part, const C* of_part, int64_t width, int64_t first, int64_t last, int64_t n,
                        C s, bool transposed, bool add) {
  constexpr int64_t STEP = 16;
  if (transposed) {
    for (int64_t r = 0; r < part.rank; ++r)
      for (int64_t j = first; j < std::min(last, n); j += lanes<C>)
        put_some<C>(part.out.at(r, j), load<C>(of_part + r * width + j) * s, n - j, add);
    return;
  }
  alignas(64) C square[STEP * STEP];
  for (int64_t j = first; j < std::min(last, n); j += STEP)
    for (int64_t r = 0; r < part.rank; r += STEP) {
      transpose(of_part + r * width + j, width, STEP, STEP, square, STEP);
      for (int64_t x = 0; x < std::min(STEP, n - j); ++x)
        for (int64_t c = 0; c < std::min(STEP, part.rank - r); c += lanes<C>)
          put_some<C>(part.out.at(j + x, r + c), load<C>(square + x * STEP + c) * s, part.rank - r - c,
                      MUTATED("low_rank: gradient not added", add, false));
    }
}

template <class Op, class T, class O>
int gather(Matrix<const T> v, Matrix<const T> h, const Part<O>* parts, int64_t part_count, bool transposed,
           int64_t rows, int64_t n, double scaling, bool add) {
  typedef typename Op::Sum C;
  typedef typename Op::Unit U;
  const int64_t rank = parts[part_count - 1].first + parts[part_count - 1].rank;
  const int64_t width = rounded_up(n, FEWEST_COLUMNS);
  // A square of sums may begin in the last row.
  const int64_t high = rounded_up(rank, TILE) + TILE;
  Arena arena(bytes_of_left<Op>(rows, rank) + static_cast<size_t>(high * width) * sizeof(C) + 192);
  if (!arena.there()) return 1;
  const Left<Op> left = left_of<Op>(h, rows, rank, arena);
  C* sums = arena.take<C>(high * width);
  const C s = static_cast<C>(MUTATED("low_rank: scaling of a gradient forgotten", scaling, 1));
  parallel(width / FEWEST_COLUMNS, grain_of<Op>(rows * rank * FEWEST_COLUMNS), [=](int64_t begin, int64_t end) {
    const TilesOf<Op> tiles;
    alignas(64) U right[GATHERED_ROWS / Op::PACK * GATHERED_COLUMNS];
    const int64_t first = begin * FEWEST_COLUMNS, last = end * FEWEST_COLUMNS;
    for (int64_t t = 0; t == 0 || t < rows; t += GATHERED_ROWS)
      for (int64_t j = first; j < last; j += GATHERED_COLUMNS)
        gather_block<Op>(v, left, t, std::min(GATHERED_ROWS, rows - t), j, std::min(GATHERED_COLUMNS, last - j), n,
                         right, sums, width, MUTATED("low_rank: first rows of a gradient lost", t > 0, false));
    for (const Part<O>* part = parts; part < parts + part_count; ++part)
      put_columns(*part, sums + MUTATED("low_rank: every gradient the first", part->first, int64_t{0}) * width, width,
                  first, last, n, s, transposed, add);
  });
  return 0;
}

// Both products that a gradient of the large size goes into, in one pass over it: d_h = s V F and `out` += s Vᵀ H, with
// F and `out` (n, rank). Blocks of rows are read for the first and are still near the processor for the second. Parts of
// the rows, whose number does not depend on that of the threads, have sums of their own, added in their order.
template <class Op, class T, class O>
int shrink_and_gather(Matrix<const T> v, Matrix<const T> h, const Factor<T>& factor, Matrix<T> d_h, Matrix<O> out,
                      int64_t rows, int64_t n, int64_t rank, double scaling) {
  typedef typename Op::Sum C;
  typedef typename Op::Unit U;
  constexpr int64_t PART_ROWS = 256, MOST_PARTS = 8, STEP = TILE_LENGTH;
  const int64_t parts = std::max<int64_t>(1, std::min(MOST_PARTS, (rows + PART_ROWS - 1) / PART_ROWS));
  const int64_t steps = (rows + STEP - 1) / STEP, block = n <= WIDE ? GATHERED_ROWS : GATHERED_ROWS / 2;
  const int64_t width = rounded_up(n, FEWEST_COLUMNS), high = rounded_up(rank, TILE);
  const int64_t shrunk_width = rounded_up(rank, lanes<C>);
  Arena arena(bytes_of_units<Op>(n, shrunk_width) + bytes_of_left<Op>(rows, rank) +
              static_cast<size_t>((parts * high + TILE) * width) * sizeof(C) + 192);
  const U* packed = units_along_n<Op>(factor, n, rank, shrunk_width, arena);
  if (packed == nullptr) return 1;
  const Left<Op> left = left_of<Op>(h, rows, rank, arena);
  C* sums = arena.take<C>((parts * high + TILE) * width);
  const C s = static_cast<C>(scaling);
  parallel(parts, grain_of<Op>(2 * rows / parts * n * rank), [=](int64_t begin, int64_t end) {
    const TilesOf<Op> tiles;
    alignas(64) U right[GATHERED_ROWS / Op::PACK * GATHERED_COLUMNS];
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = steps * part / parts * STEP, last = std::min(rows, steps * (part + 1) / parts * STEP);
      C* own = sums + part * high * width;
      for (int64_t t = first; t == first || t < last; t += block) {
        const int64_t count = std::min(block, last - t);
        shrink_rows<Op>(v, packed, shrunk_width, d_h, t, t + count, n, rank,
                        MUTATED("low_rank: scaling of h forgotten in one pass", s, C(1)));
        for (int64_t j = 0; j < width; j += GATHERED_COLUMNS)
          gather_block<Op>(v, left, t, count, j, std::min(GATHERED_COLUMNS, width - j), n, right, own, width,
                           MUTATED("low_rank: first rows of a part lost", t > first, false));
      }
    }
  });
  parallel(width / FEWEST_COLUMNS, grain_of<Op>(parts * rank * FEWEST_COLUMNS), [=](int64_t begin, int64_t end) {
    const int64_t first = begin * FEWEST_COLUMNS, last = end * FEWEST_COLUMNS;
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t r = 0; r < rank; ++r)
        for (int64_t j = first; j < last; j += lanes<C>) {
          C* place = sums + r * width + j;
          store(place, load<C>(place) + MUTATED("low_rank: first part of the rows only",
                                                load<C>(place + part * high * width), Vector<C>{}));
        }
    put_columns(Part<O>{out, 0, rank}, sums, width, first, last, n, s, false, true);
  });
  return 0;
}

template <class T, class O>
int gather_parts(Matrix<const T> v, Matrix<const T> h, int64_t count, void* const* outs, const int64_t* out_rows,
                 const int64_t* ranks, bool transposed, int64_t rows, int64_t n, double scaling, bool add) {
  Arena arena(static_cast<size_t>(count) * sizeof(Part<O>) + 64);
  Part<O>* parts = arena.take<Part<O>>(count);
  if (!arena.there()) return 1;
  int64_t first = 0;
  for (int64_t i = 0; i < count; first += ranks[i++])
    parts[i] = {{static_cast<O*>(outs[i]), out_rows[i]}, first, ranks[i]};
  return gather<Operands<T>, T, O>(v, h, parts, count, transposed, rows, n, scaling, add);
}

}  // namespace

// h (rows, rank) = scaling · v F, v (rows, n); the factor F is (n, rank), or stored as its transpose. Rows of each are
// so many numbers apart. Returns 1 when there is no memory, else 0, as do the others.
BACKHAND_EXPORT int backhand_low_rank_shrink(int dtype, const void* v, int64_t v_row, const void* factor,
                                             int64_t factor_row, int transposed, void* h, int64_t h_row, int64_t rows,
                                             int64_t n, int64_t rank, double scaling) {
  BY_DTYPE(dtype, T, {
    return shrink<Operands<T>, T>({static_cast<const T*>(v), v_row},
                                  {{static_cast<const T*>(factor), factor_row}, transposed != 0},
                                  {static_cast<T*>(h), h_row}, rows, n, rank, scaling);
  });
}

// y (rows, n) += scaling · h Fᵀ, with h (rows, rank) and the factor as above.
BACKHAND_EXPORT int backhand_low_rank_expand(int dtype, void* y, int64_t y_row, const void* h, int64_t h_row,
                                             const void* factor, int64_t factor_row, int transposed, int64_t rows,
                                             int64_t n, int64_t rank, double scaling) {
  BY_DTYPE(dtype, T, {
    return expand<Operands<T>, T>({static_cast<T*>(y), y_row}, {static_cast<const T*>(h), h_row},
                                  {{static_cast<const T*>(factor), factor_row}, transposed != 0}, rows, n, rank,
                                  scaling);
  });
}

// = or += scaling · vᵀ h, with v (rows, n) and h (rows, Σ ranks), in `count` parts side by side: outs[i] is
// (n, ranks[i]), or (ranks[i], n) if transposed; float (double for double) if `wide`, else of the storage dtype.
BACKHAND_EXPORT int backhand_low_rank_gather(int dtype, const void* v, int64_t v_row, const void* h, int64_t h_row,
                                             int64_t count, void* const* outs, const int64_t* out_rows,
                                             const int64_t* ranks, int transposed, int wide, int add, int64_t rows,
                                             int64_t n, double scaling) {
  BY_DTYPE(dtype, T, {
    const Matrix<const T> large{static_cast<const T*>(v), v_row}, small{static_cast<const T*>(h), h_row};
    const auto run = wide ? gather_parts<T, Wide<T>> : gather_parts<T, T>;
    return run(large, small, count, outs, out_rows, ranks, transposed != 0, rows, n, scaling, add != 0);
  });
}

// d_h (rows, rank) = scaling · v F and out (n, rank) += scaling · vᵀ h, with v (rows, n), h (rows, rank) and F (n, rank);
// `out` is float (double for double) if `wide`, else of the storage dtype.
BACKHAND_EXPORT int backhand_low_rank_shrink_and_gather(int dtype, const void* v, int64_t v_row, const void* h,
                                                        int64_t h_row, const void* factor, int64_t factor_row,
                                                        void* d_h, int64_t d_h_row, void* out, int64_t out_row,
                                                        int wide, int64_t rows, int64_t n, int64_t rank,
                                                        double scaling) {
  BY_DTYPE(dtype, T, {
    const Matrix<const T> large{static_cast<const T*>(v), v_row}, small{static_cast<const T*>(h), h_row};
    const Factor<T> f{{static_cast<const T*>(factor), factor_row}, false};
    const Matrix<T> shrunk{static_cast<T*>(d_h), d_h_row};
    const Matrix<Wide<T>> as_wide{static_cast<Wide<T>*>(out), out_row};
    const Matrix<T> as_stored{static_cast<T*>(out), out_row};
    return wide ? shrink_and_gather<Operands<T>, T>(large, small, f, shrunk, as_wide, rows, n, rank, scaling)
                : shrink_and_gather<Operands<T>, T>(large, small, f, shrunk, as_stored, rows, n, rank, scaling);
  });
}
