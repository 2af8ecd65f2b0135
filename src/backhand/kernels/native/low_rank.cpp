// Products with the factors of an adapter, whose rank is small beside all else: the formulas of ops/low_rank.py.
//     shrink   H = V F          (rows, rank)
//     expand   Y += s H Fᵀ      (rows, n)
//     gather   += Vᵀ H          (n, rank), or its transpose
// F (n, rank) lies as it is, as lora_B does, or transposed, as lora_A does. V and Y are large and are read (and
// written) once; a sum is rounded once, when it is whole, and does not depend on the number of threads.
#include "low_rank.h"

namespace {

// Of the large operand, so much is at work at a time: a block of rows, whose sums and operands stay near the processor.
constexpr int64_t SHRUNK_ROWS = 24, SHRUNK_RANKS = 64, EXPANDED_ROWS = 24, GATHERED_ROWS = 48, GATHERED_COLUMNS = 64;
// Threads divide the columns of a gathered product in these.
constexpr int64_t FEWEST_COLUMNS = 32;

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

template <class Op, class T>
int shrink(Matrix<const T> v, const Factor<T>& factor, Matrix<T> h, int64_t rows, int64_t n, int64_t rank) {
  typedef typename Op::Sum C;
  typedef typename Op::Element E;
  typedef typename Op::Unit U;
  constexpr int64_t DEPTH = LONGEST_SUM;
  const int64_t width = rounded_up(rank, lanes<C>), units = units_of<Op>(n);
  Arena arena(static_cast<size_t>(units * width) * sizeof(U) + 64);
  U* packed = arena.take<U>(units * width);
  if (!arena.there()) return 1;
  if (factor.transposed) {
    turn<Op>(factor.stored, rank, n, packed, width);
  } else {
    interleave<Op>(factor.stored.data, factor.stored.row, n, rank, packed, width);
  }
  parallel(rows, grain_of(n * width), [=](int64_t begin, int64_t end) {
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
        for (int64_t y = 0; y < count; ++y) {
          const C* from = sums + y * SHRUNK_RANKS;
          T* to = h.at(i + y, r);
          along<C>(
              std::min(wide, rank - r), [=](int64_t j) { store(to + j, load<C>(from + j)); },
              [=](int64_t j, int64_t some) { store_some<C>(to + j, load<C>(from + j), some); });
        }
      }
  });
  return 0;
}

template <class Op, class T>
int expand(Matrix<T> y, Matrix<const T> h, const Factor<T>& factor, int64_t rows, int64_t n, int64_t rank,
           double scaling) {
  typedef typename Op::Sum C;
  typedef typename Op::Element E;
  typedef typename Op::Unit U;
  const int64_t width = rounded_up(n, lanes<C>), units = units_of<Op>(rank);
  Arena arena(static_cast<size_t>(units * width) * sizeof(U) + static_cast<size_t>(rows * units) * sizeof(U) + 192);
  U* packed = arena.take<U>(units * width);
  E* copy = reinterpret_cast<E*>(arena.take<U>(rows * units));
  if (!arena.there()) return 1;
  if (factor.transposed) {
    interleave<Op>(factor.stored.data, factor.stored.row, rank, n, packed, width);
  } else {
    turn<Op>(factor.stored, n, rank, packed, width);
  }
  const auto left = rows_as_units<Op>(h, rows, rank, copy);
  const Vector<C> s = all<C>(static_cast<C>(MUTATED("low_rank: scaling of y forgotten", scaling, 1)));
  const int64_t whole = n / lanes<C> * lanes<C>;
  parallel(rows, grain_of(n * rank), [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += EXPANDED_ROWS) {
      const int64_t count = std::min(EXPANDED_ROWS, end - i);
      const Rows<U> some{left.from(i), left.row};
      T* first = y.at(i);
      const int64_t row = y.row;
      finished_product<Op>(count, whole, units, some, packed, width, [=](int64_t line, int64_t j, Vector<C> sum) {
        T* place = first + line * row + j;
        store(place, fma(sum, s, MUTATED("low_rank: y overwritten", load<C>(place), Vector<C>{})));
      });
      finished_product<Op>(count, width - whole, units, some, packed + whole, width,
                           [=](int64_t line, int64_t, Vector<C> sum) {
                             T* place = first + line * row + whole;
                             const Vector<C> before = load_some<C>(place, n - whole);
                             const Vector<C> by = MUTATED("low_rank: sign of the tail", s, -s);
                             store_some<C>(place, fma(sum, by, before), n - whole);
                           });
    }
  });
  return 0;
}

// One of several results that stand side by side: the columns first … first + rank - 1 of H belong to it.
template <class O>
struct Part {
  Matrix<O> out;
  int64_t first, rank;
};

// O: of the results, that of the storage or the wide one.
template <class Op, class T, class O>
int gather(Matrix<const T> v, Matrix<const T> h, const Part<O>* parts, int64_t part_count, bool transposed,
           int64_t rows, int64_t n) {
  typedef typename Op::Sum C;
  typedef typename Op::Unit U;
  constexpr int64_t STEP = 16;
  const int64_t rank = parts[part_count - 1].first + parts[part_count - 1].rank;
  const int64_t width = rounded_up(n, FEWEST_COLUMNS), units = units_of<Op>(rows);
  // A square of sums may begin in the last row.
  const int64_t high = rank + STEP;
  Arena arena(static_cast<size_t>(units * rank) * sizeof(U) + static_cast<size_t>(high * width) * sizeof(C) + 192);
  U* left = arena.take<U>(units * rank);
  C* sums = arena.take<C>(high * width);
  if (!arena.there()) return 1;
  interleave<Op>(h.data, h.row, rows, rank, left, rank);
  parallel(width / FEWEST_COLUMNS, grain_of(rows * rank * FEWEST_COLUMNS), [=](int64_t begin, int64_t end) {
    alignas(64) U right[GATHERED_ROWS / Op::PACK * GATHERED_COLUMNS];
    const int64_t first = begin * FEWEST_COLUMNS, last = end * FEWEST_COLUMNS;
    for (int64_t t = 0; t == 0 || t < rows; t += GATHERED_ROWS) {
      const int64_t count = std::min(GATHERED_ROWS, rows - t);
      for (int64_t j = first; j < last; j += GATHERED_COLUMNS) {
        const int64_t wide = std::min(GATHERED_COLUMNS, last - j);
        interleave<Op>(v.at(t, j), v.row, count, std::min(wide, n - j), right, GATHERED_COLUMNS);
        product_of_part<Op>(rank, wide, units_of<Op>(count), Interleaved<U>{left + t / Op::PACK * rank, rank}, right,
                            GATHERED_COLUMNS, sums + j, width,
                            MUTATED("low_rank: first rows of a gradient lost", t > 0, false));
      }
    }
    for (const Part<O>* part = parts; part < parts + part_count; ++part) {
      const C* of_part = sums + MUTATED("low_rank: every gradient the first", part->first, int64_t{0}) * width;
      if (!transposed) {
        const int64_t columns = std::min(last, n) - first;
        add_turned(of_part + first, width, columns, part->rank, C(1), part->out.at(first), part->out.row);
        continue;
      }
      for (int64_t r = 0; r < part->rank; ++r)
        for (int64_t j = first; j < std::min(last, n); j += lanes<C>)
          add_some<C>(part->out.at(r, j), load<C>(of_part + r * width + j), n - j);
    }
  });
  return 0;
}

template <class T, class O>
int gather_parts(Matrix<const T> v, Matrix<const T> h, int64_t count, void* const* outs, const int64_t* out_rows,
                 const int64_t* ranks, bool transposed, int64_t rows, int64_t n) {
  Arena arena(static_cast<size_t>(count) * sizeof(Part<O>) + 64);
  Part<O>* parts = arena.take<Part<O>>(count);
  if (!arena.there()) return 1;
  int64_t first = 0;
  for (int64_t i = 0; i < count; first += ranks[i++])
    parts[i] = {{static_cast<O*>(outs[i]), out_rows[i]}, first, ranks[i]};
  return gather<Operands<T>, T, O>(v, h, parts, count, transposed, rows, n);
}

}  // namespace

// h (rows, rank) = v F, v (rows, n); the factor F is (n, rank), or stored as its transpose. Rows of each are
// so many numbers apart. Returns 1 when there is no memory, else 0, as do the others.
BACKHAND_EXPORT int backhand_low_rank_shrink(int dtype, const void* v, int64_t v_row, const void* factor,
                                             int64_t factor_row, int transposed, void* h, int64_t h_row, int64_t rows,
                                             int64_t n, int64_t rank) {
  BY_DTYPE(dtype, T, {
    return shrink<Operands<T>, T>({static_cast<const T*>(v), v_row},
                                  {{static_cast<const T*>(factor), factor_row}, transposed != 0},
                                  {static_cast<T*>(h), h_row}, rows, n, rank);
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

// += vᵀ h, with v (rows, n) and h (rows, Σ ranks), in `count` parts side by side: outs[i] is
// (n, ranks[i]), or (ranks[i], n) if transposed; float (double for double) if `wide`, else of the storage dtype.
BACKHAND_EXPORT int backhand_low_rank_gather(int dtype, const void* v, int64_t v_row, const void* h, int64_t h_row,
                                             int64_t count, void* const* outs, const int64_t* out_rows,
                                             const int64_t* ranks, int transposed, int wide, int64_t rows, int64_t n) {
  BY_DTYPE(dtype, T, {
    const Matrix<const T> large{static_cast<const T*>(v), v_row}, small{static_cast<const T*>(h), h_row};
    const auto run = wide ? gather_parts<T, Wide<T>> : gather_parts<T, T>;
    return run(large, small, count, outs, out_rows, ranks, transposed != 0, rows, n);
  });
}
