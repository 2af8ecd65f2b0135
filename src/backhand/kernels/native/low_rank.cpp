// Products with the factors of an adapter, whose rank is small: the formulas of ops/low_rank.py.
//     down_projection   H = V F          (rows, rank)
//     up_projection     Y += s H Fᵀ      (rows, n)
//     gather            += Hᵀ V          (rank, n)
// V of a gather may be given as a norm's input X, V = ρ X ⊙ (c + w): then += (ρ H)ᵀ X ⊙ (c + w), and V is never formed. F of
// a down-projection is stored as its transpose, (rank, n), like lora_A; that of an up-projection is stored so, or as
// (n, rank), like lora_B. V and Y are large and are read (and written) once. A sum is rounded once, when it is complete, and
// does not depend on the number of threads.
#include "low_rank.h"

namespace {

constexpr int64_t EXPANDED_ROWS = 24, EXPANDED_COLUMNS = 64;

template <class Op, class T>
int down_projection(Matrix<const T> v, Matrix<const T> factor, Matrix<T> h, int64_t rows, int64_t n, int64_t rank) {
  typedef typename Op::Sum C;
  const int64_t width = rounded_up(rank, lanes<C>);
  Arena arena(bytes_of_units<Op>(n, width));
  const auto* packed = units_along_n<Op>(Factor<T>{factor, true}, n, rank, width, arena);
  if (packed == nullptr) return 1;
  by_rows<Op>(rows, n * width, [=](int64_t begin, int64_t end) {
    shrink_rows<Op>(v, packed, width, h, begin, end, n, rank, C(1));
  });
  return 0;
}

// Rows begin … end - 1 of y += s h Fᵀ, with Fᵀ as units (rank / PACK, width).
template <class Op, class T>
inline void up_projection_rows(Matrix<T> y, Rows<typename Op::Unit> left, const typename Op::Unit* packed, int64_t width,
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
        up_projection_tiles(left.row / TILE, left.from(i), packed + j, width, sums);
        const int64_t full = std::min(EXPANDED_COLUMNS, whole - j);
        for (int64_t line = 0; line < std::min(TILE, end - i); ++line) {
          T* place = y.at(i + line, j);
          // The same place 16 rows later.
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
int up_projection(Matrix<T> y, Matrix<const T> h, const Factor<T>& factor, int64_t rows, int64_t n, int64_t rank,
           double scaling) {
  typedef typename Op::Sum C;
  typedef typename Op::Element E;
  typedef typename Op::Unit U;
  const int64_t units = units_of<Op>(rank), padded = rounded_up(units, by_tiles<Op> ? TILE : 1);
  const int64_t width = rounded_up(n, by_tiles<Op> ? EXPANDED_COLUMNS : lanes<C>);
  const int64_t copied = rounded_up(rows, TILE) * padded;
  Arena arena(static_cast<size_t>(padded * width + copied) * sizeof(U) + 192);
  U *packed = arena.take<U>(padded * width), *copy = arena.take<U>(copied);
  if (!arena.there()) return 1;
  if (factor.transposed) {
    interleave<Op>(factor.stored.data, factor.stored.row, rank, n, packed, width);
  } else {
    turn<Op>(factor.stored, n, rank, packed, width);
  }
  std::fill(packed + units * width, packed + padded * width, U(0));
  Rows<U> left{copy, padded};
  if constexpr (by_tiles<Op>) {
    // One tile per 16 rows, one after another.
    for (int64_t i = 0; i < rows; i += TILE)
      for (int64_t k = 0; k < padded; k += TILE)
        copy_tile(h.at(i, k * Op::PACK), h.row, std::min(TILE, rows - i),
                  std::min(TILE_LENGTH, rank - k * Op::PACK), reinterpret_cast<E*>(copy + i * padded + k * TILE));
  } else {
    left = rows_as_units<Op>(h, rows, rank, reinterpret_cast<E*>(copy));
  }
  const Vector<C> s = all<C>(static_cast<C>(MUTATED("low_rank: scaling of y forgotten", scaling, 1)));
  by_rows<Op>(rows, n * rank, [=](int64_t begin, int64_t end) {
    up_projection_rows<Op>(y, left, packed, width, begin, end, n, rank, s);
  });
  return 0;
}

// One of several results: the columns first … first + rank - 1 of H belong to it.
template <class O>
struct Part {
  Matrix<O> out;
  int64_t first, rank;
};

// The norm that turns X into V: a factor ρ per row, and c + w per column; or null and null.
template <class T>
struct Norm {
  const Wide<T>* factor;
  const T* weight;
  double offset;
};

// Multiply each row of H by its factor.
template <class T>
inline Matrix<const T> times_factors(Matrix<const T> h, const Wide<T>* factor, int64_t rows, int64_t rank, T* copy) {
  typedef Wide<T> C;
  for (int64_t i = 0; i < rows; ++i) {
    const Vector<C> rho = all<C>(MUTATED("low_rank: factor of a norm forgotten", factor[i], C(1)));
    const T* from = h.at(i);
    T* to = copy + i * rank;
    along<C>(
        rank, [=](int64_t r) { store(to + r, load<C>(from + r) * rho); },
        [=](int64_t r, int64_t count) { store_some<C>(to + r, load_some<C>(from + r, count) * rho, count); });
  }
  return {copy, rank};
}

// Multiply the columns first … last - 1 of sums (rank, width) by c + w.
template <class T>
inline void times_gain(const Norm<T>& norm, Wide<T>* sums, int64_t width, int64_t rank, int64_t first, int64_t last) {
  typedef Wide<T> C;
  const C c = MUTATED("low_rank: offset of a norm forgotten", C(norm.offset), C(0));
  for (int64_t j = first; j < last; j += lanes<C>) {
    const Vector<C> w = last - j < lanes<C> ? load_some<C>(norm.weight + j, last - j) : load<C>(norm.weight + j);
    const Vector<C> gain = MUTATED("low_rank: weight of a norm forgotten", w, Vector<C>{}) + c;
    for (int64_t r = 0; r < rank; ++r) store(sums + r * width + j, load<C>(sums + r * width + j) * gain);
  }
}

// By columns, each thread reads all rows. By parts of the rows, which are read in memory order and possibly by the
// thread that wrote them, each part has its own sums.
template <class Op, class T, class O>
int gather(Matrix<const T> v, Matrix<const T> h, const Part<O>* parts, int64_t part_count, bool by_parts, int64_t rows,
           int64_t n, const Norm<T>& norm) {
  typedef typename Op::Sum C;
  typedef typename Op::Unit U;
  const int64_t rank = parts[part_count - 1].first + parts[part_count - 1].rank;
  const int64_t width = rounded_up(n, FEWEST_COLUMNS), high = rounded_up(rank, TILE);
  const RowParts of_rows(rows);
  const int64_t several = by_parts && of_rows.count >= RowParts::FEWEST ? of_rows.count : 1;
  const int64_t count = MUTATED("low_rank: naive sum", several, 1);
  const int64_t step = MUTATED("low_rank: naive sum", GATHERED_ROWS<Op>, Op::PACK);
  const int64_t one = high * width, numbers = BlockSums<C>::numbers(count * one, rows / count, step);
  const int64_t copied = norm.factor == nullptr ? 0 : rows * rank;
  Arena arena(bytes_of_left<Op>(rows, rank) + static_cast<size_t>(numbers) * sizeof(C) +
              static_cast<size_t>(copied) * sizeof(T) + 256);
  if (!arena.there()) return 1;
  if (norm.factor != nullptr) h = times_factors(h, norm.factor, rows, rank, arena.take<T>(copied));
  const Left<Op> left = left_of<Op>(h, rows, rank, arena);
  C* sums = arena.take<C>(numbers);
  // Sum the rows begin … end - 1 in the columns first … last - 1.
  const auto add_up = [=](int64_t part, int64_t begin, int64_t end, int64_t first, int64_t last) {
    alignas(64) U right[GATHERED_ROWS<Op> / Op::PACK * GATHERED_COLUMNS];
    const BlockSums<C> own(sums + part * one, count * one, MUTATED("low_rank: naive sum", rows / count, 0), step);
    for (int64_t t = begin, number = 0; t == begin || t < end; t += step, ++number) {
      for (int64_t j = first; j < last; j += GATHERED_COLUMNS) {
        const bool at_end = j + GATHERED_COLUMNS >= last;
        if (by_tiles<Op> && count > 1) {
          const int64_t next = std::min(rows, t + step);
          fetch_share(v, next, std::min(step, rows - next), n, j / GATHERED_COLUMNS,
                      (width + GATHERED_COLUMNS - 1) / GATHERED_COLUMNS);
        }
        gather_block<Op>(v, left, t, std::min(step, end - t), j, std::min(GATHERED_COLUMNS, last - j), n,
                         at_end ? step * v.row + first - j : GATHERED_COLUMNS, right, own.recent, width,
                         MUTATED("low_rank: first rows of a gradient lost", own.adds(number), false));
      }
      own.end_block(number, t + step >= end, 0, width, rank, first, last);
    }
  };
  if (count > 1)
    parallel(count, grain_of<Op>(rows / count * rank * n), [=](int64_t begin, int64_t end) {
      const TilesOf<Op> tiles;
      for (int64_t part = begin; part < end; ++part)
        add_up(part, of_rows.begin(part), of_rows.begin(part + 1), 0, width);
    });
  const int64_t grain = count > 1 ? grain_of_sums(count * rank) : grain_of<Op>(rows * rank * FEWEST_COLUMNS);
  parallel(width / FEWEST_COLUMNS, grain, [=, &norm](int64_t begin, int64_t end) {
    const int64_t first = begin * FEWEST_COLUMNS, last = end * FEWEST_COLUMNS;
    if (count > 1) {
      add_parts(sums, count, one, width, rank, first, last);
    } else {
      const TilesOf<Op> tiles;
      add_up(0, 0, rows, first, last);
    }
    if (norm.factor != nullptr) times_gain(norm, sums, width, rank, first, std::min(last, n));
    for (const Part<O>* part = parts; part < parts + part_count; ++part) {
      const C* of_part = sums + MUTATED("low_rank: every gradient the first", part->first, int64_t{0}) * width;
      for (int64_t r = 0; r < part->rank; ++r)
        for (int64_t j = first; j < std::min(last, n); j += lanes<C>)
          add_some<C>(part->out.at(r, j), load<C>(of_part + r * width + j), n - j);
    }
  });
  return 0;
}

template <class T, class O>
int gather_parts(Matrix<const T> v, Matrix<const T> h, int64_t count, void* const* outs, const int64_t* out_rows,
                 const int64_t* ranks, bool by_parts, int64_t rows, int64_t n, const Norm<T>& norm) {
  Arena arena(static_cast<size_t>(count) * sizeof(Part<O>) + 64);
  Part<O>* parts = arena.take<Part<O>>(count);
  if (!arena.there()) return 1;
  int64_t first = 0;
  for (int64_t i = 0; i < count; first += ranks[i++])
    parts[i] = {{static_cast<O*>(outs[i]), out_rows[i]}, first, ranks[i]};
  return gather<Operands<T>, T, O>(v, h, parts, count, by_parts, rows, n, norm);
}

}  // namespace

// h (rows, rank) = v factorᵀ, v (rows, n), factor (rank, n). Row strides are in numbers. Like the other functions, it
// returns 1 if there is no memory, else 0.
BACKHAND_EXPORT int backhand_low_rank_down(int dtype, const void* v, int64_t v_row, const void* factor,
                                             int64_t factor_row, void* h, int64_t h_row, int64_t rows, int64_t n,
                                             int64_t rank) {
  BY_DTYPE(dtype, T, {
    return down_projection<Operands<T>, T>({static_cast<const T*>(v), v_row}, {static_cast<const T*>(factor), factor_row},
                                  {static_cast<T*>(h), h_row}, rows, n, rank);
  });
}

// y (rows, n) += scaling · h Fᵀ, h (rows, rank); the factor F is (n, rank), or stored as its transpose.
BACKHAND_EXPORT int backhand_low_rank_up(int dtype, void* y, int64_t y_row, const void* h, int64_t h_row,
                                             const void* factor, int64_t factor_row, int transposed, int64_t rows,
                                             int64_t n, int64_t rank, double scaling) {
  BY_DTYPE(dtype, T, {
    return up_projection<Operands<T>, T>({static_cast<T*>(y), y_row}, {static_cast<const T*>(h), h_row},
                                  {{static_cast<const T*>(factor), factor_row}, transposed != 0}, rows, n, rank,
                                  scaling);
  });
}

// += hᵀ v, with v (rows, n) and h (rows, Σ ranks), in `count` stacked parts: outs[i] is (ranks[i], n), in float (double
// for double) if `wide`, else in the storage type. If `factor` is not null, v is the input x of a norm with this factor
// (rows,) in the wide type, weight (n,) and offset. Tasks are parts of the rows if `by_parts` and there are several,
// else columns of v.
BACKHAND_EXPORT int backhand_low_rank_gather(int dtype, const void* v, int64_t v_row, const void* h, int64_t h_row,
                                             int64_t count, void* const* outs, const int64_t* out_rows,
                                             const int64_t* ranks, int wide, int by_parts, int64_t rows, int64_t n,
                                             const void* factor, const void* weight, double offset) {
  BY_DTYPE(dtype, T, {
    const Matrix<const T> large{static_cast<const T*>(v), v_row}, small{static_cast<const T*>(h), h_row};
    const auto run = wide ? gather_parts<T, Wide<T>> : gather_parts<T, T>;
    const Norm<T> norm{static_cast<const Wide<T>*>(factor), static_cast<const T*>(weight), offset};
    return run(large, small, count, outs, out_rows, ranks, by_parts != 0, rows, n, norm);
  });
}
