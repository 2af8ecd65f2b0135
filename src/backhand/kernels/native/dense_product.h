// One product with all that is added to it, y (m, n) = r + x W + b + Σ s h Fᵀ, which packs W one panel at a time. If an
// h is x Aᵀ of the same x, it is computed at the same time.
//
// A panel of W has as many columns as stay in the second-level cache. It is converted to units along K (panels.h),
// which AMX multiplies without rearranging, and is multiplied by 32 rows of x at a time. The products with an adapter's
// factors continue the same sums, like further positions of K, and each element is rounded once. The sum along K has
// one order, whatever the number of rows and threads and the beginning of a panel.
#pragma once

#include <cmath>

#include "panels.h"

namespace {

// The bytes of a panel of W in the second-level cache, and its positions of K. Longer sums wait in memory, for this
// many rows at a time.
constexpr int64_t PANEL_BYTES = 11 << 17, LONGEST_PART = 1536, WAITING_ROWS = 1024;
// The same for a stored W. Unpacking costs more than a second pass saves, so that it serves more rows. With many
// threads it serves no more rows. Panels whose columns must be whole blocks are larger.
constexpr int64_t PANEL_BYTES_OF_BLOCKS = 12 << 17, WAITING_ROWS_OF_BLOCKS = 4096;
// Results of at least this size are written past the caches.
constexpr int64_t FEWEST_BYTES_PAST = 2 << 20;
// The fewest multiplications that justify another thread.
constexpr int64_t FEWEST_MULTIPLICATIONS = 1 << 21;

// s h Fᵀ of one layer, which is added to the columns first … first + n - 1. F is (n, rank), or stored as its transpose.
// If A (rank, k) is given, h = x Aᵀ is computed and written, and rounded to the storage type.
template <class T>
struct Term {
  int64_t first, n, rank;
  Factor<T> factor;
  Matrix<T> h;
  Matrix<const T> lora_A;
  double scaling;
};

template <class T>
struct DenseProduct {
  Matrix<const T> x;
  RightOperand<T> w;
  Matrix<T> y;
  const T* residual;  // (m, n), or null
  int64_t residual_row;
  const T* bias;  // (n), or null
  const Term<T>* terms;
  int64_t term_count, m, n, k;

  // The number of columns of all h that are computed here.
  int64_t down_ranks() const {
    int64_t ranks = 0;
    for (const Term<T>* term = terms; term < terms + term_count; ++term) ranks += term->lora_A.data ? term->rank : 0;
    return ranks;
  }
};

// s h is exact in the units' type if s is a power of two; otherwise the rounding error is a second summand.
template <class Op>
inline int64_t summands_of(double scaling) {
  int exponent;
  return Op::PACK == 1 || std::fabs(std::frexp(scaling, &exponent)) == 0.5 ? 1 : 2;
}
template <class Op, class T>
inline int64_t steps_of(const Term<T>& term) {
  return rounded_up(summands_of<Op>(term.scaling) * units_of<Op>(term.rank), STEP_UNITS) / STEP_UNITS;
}

// How a thread's share is divided.
template <class Op>
struct Cut {
  int64_t part, parts;    // positions of K at a time, in elements, and the number of such parts
  int64_t columns, edge;  // of a panel; panels end at multiples of `edge`
  int64_t rows;           // whose sums wait in memory at a time
  int64_t term_steps, down_ranks;

  template <class T>
  Cut(const RightOperand<T>& w, int64_t m, int64_t n, int64_t k, int64_t steps, int64_t ranks, int64_t threads)
      : edge(w.column_edge()), term_steps(steps), down_ranks(rounded_up(ranks, BLOCK)) {
    const int64_t step = w.k_edge(STEP_UNITS * Op::PACK);
    parts = std::max<int64_t>(1, (k + LONGEST_PART - 1) / LONGEST_PART);
    part = std::max(step, rounded_up((k + parts - 1) / parts, step));
    const int64_t bytes = edge > BLOCK ? PANEL_BYTES_OF_BLOCKS : PANEL_BYTES;
    const int64_t most = bytes / (part / Op::PACK * static_cast<int64_t>(sizeof(typename Op::Unit)));
    const int64_t widest = std::max(edge, most / edge * edge), panels = std::max<int64_t>(1, (n + widest - 1) / widest);
    columns = rounded_up((n + panels - 1) / panels, edge);
    const int64_t of_blocks = std::max(WAITING_ROWS, WAITING_ROWS_OF_BLOCKS / std::max<int64_t>(1, threads / 2));
    const int64_t waiting = w.stored() ? of_blocks : WAITING_ROWS;
    rows = rounded_up(parts == 1 && ranks == 0 ? m : std::min(m, waiting), BLOCK);
  }
  // The end of the panel that begins at this column.
  int64_t panel_end(int64_t column) const { return (column + columns) / edge * edge; }
  int64_t right_units() const { return columns * (part / Op::PACK); }
  int64_t term_units() const { return columns * term_steps * STEP_UNITS; }
  size_t bytes() const {
    const int64_t units = right_units() + term_units() + BLOCK * (part / Op::PACK + term_steps * STEP_UNITS) +
                          down_ranks * (part / Op::PACK);
    const int64_t waiting = (parts == 1 ? 0 : rows * columns) + rows * down_ranks;
    return static_cast<size_t>(units) * sizeof(typename Op::Unit) +
           static_cast<size_t>(waiting) * sizeof(typename Op::Sum) + 8 * 64;
  }
};

// Pieces of a workspace that the caller owns, each on its own cache line.
struct Workspace {
  char* next;
  template <class U>
  U* take(int64_t count) {
    next += (64 - reinterpret_cast<uintptr_t>(next) % 64) % 64;
    U* piece = reinterpret_cast<U*>(next);
    next += static_cast<size_t>(count) * sizeof(U);
    return piece;
  }
};

// Store two registers, `past` the caches if `to` is a whole cache line.
template <class T, class V>
inline void store_two(T* to, V low, V high, bool past) {
  (void)past;
  store(to, low);
  store(to + sizeof(V) / sizeof(Wide<T>), high);
}
#if defined(__AVX512BF16__)
inline void store_two(bfloat16* to, Vector<float> low, Vector<float> high, bool past) {
  const __m512i values = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  if (past) {
    // Not by the intrinsic, since Clang merges both stores into one that goes to the caches.
    __asm__ volatile("vmovntdq %1, %0" : "=m"(*reinterpret_cast<__m512i*>(to)) : "v"(values));
  } else {
    _mm512_storeu_si512(to, values);
  }
}
inline void end_of_stores() { _mm_sfence(); }
#else
inline void end_of_stores() {}
#endif

// Write sums (32, 32) to y with the residual and the bias, rounded once.
template <class T>
struct Epilogue {
  const Wide<T>* sums = nullptr;
  T* y = nullptr;
  const T *residual = nullptr, *bias = nullptr;
  int64_t y_row = 0, residual_row = 0, rows = 0, columns = 0, done = 0;
  bool past = false;

  __attribute__((always_inline)) void one_row() {
    typedef Wide<T> C;
    const C* from = sums + done * BLOCK;
    T* to = y + done * y_row;
    const T* around = residual == nullptr ? nullptr : residual + done * residual_row;
    if (columns == BLOCK) {
      for (int64_t j = 0; j < BLOCK; j += 2 * lanes<C>) {
        Vector<C> low = load<C>(from + j), high = load<C>(from + j + lanes<C>);
        if (bias != nullptr) {
          low += MUTATED("dense_product: bias lost", load<C>(bias + j), Vector<C>{});
          high += load<C>(bias + j + lanes<C>);
        }
        if (around != nullptr) {
          low += MUTATED("dense_product: residual lost", load<C>(around + j), Vector<C>{});
          high += load<C>(around + j + lanes<C>);
        }
        store_two(to + j, low, high, past);
      }
      ++done;
      return;
    }
    along<C>(
        columns,
        [=](int64_t j) {
          Vector<C> value = load<C>(from + j);
          if (bias != nullptr) value += load<C>(bias + j);
          if (around != nullptr) value += load<C>(around + j);
          store(to + j, value);
        },
        [=](int64_t j, int64_t count) {
          Vector<C> value = load_some<C>(from + j, count);
          if (bias != nullptr) value += load_some<C>(bias + j, count);
          if (around != nullptr) value += load_some<C>(around + j, count);
          store_some<C>(to + j, MUTATED("dense_product: sign of the tail", value, -value), count);
        });
    ++done;
  }
  void all_rows() {
    while (done < rows) one_row();
  }
};

// The next rows of x, of which one cache line is prefetched per step.
struct Prefetch {
  const char* place = nullptr;
  int64_t row_bytes = 0, rows = 0;

  void ask(int64_t step) const {
    for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(place + i * row_bytes + step * LINE, 0, 2);
  }
};

// sums (32, 32) = or += left right, continued along the terms' steps. Meanwhile other sums are written, and other rows
// prefetched. A step's units of the left operand are stored row by row, those of the right one position by position.
// This function and the one that writes a row are inlined into their caller, or what the rows share would go through
// memory at each step.
template <class Op, class T>
__attribute__((always_inline))
inline void block(int64_t steps, const typename Op::Unit* left, const typename Op::Unit* right, int64_t term_steps,
                  const typename Op::Unit* term_left, const typename Op::Unit* term_right, typename Op::Sum* sums,
                  bool add, Epilogue<T>& epilogue, const Prefetch& prefetch) {
  typedef typename Op::Unit U;
  constexpr int64_t STEP = STEP_UNITS * BLOCK;
#if defined(__AMX_BF16__)
  if constexpr (by_tiles<Op>) {
    constexpr int64_t ROW_BYTES = BLOCK * 4, HALF = TILE * BLOCK;
    if (add) {
      LOAD_TILE(0, sums, ROW_BYTES);
      LOAD_TILE(1, sums + TILE, ROW_BYTES);
      LOAD_TILE(2, sums + HALF, ROW_BYTES);
      LOAD_TILE(3, sums + HALF + TILE, ROW_BYTES);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const auto step = [](const U* a, const U* b) {
      LOAD_TILE(4, a, 64);
      LOAD_TILE(6, b, ROW_BYTES);
      _tile_dpbf16ps(0, 4, 6);
      LOAD_TILE(7, b + TILE, ROW_BYTES);
      _tile_dpbf16ps(1, 4, 7);
      LOAD_TILE(5, a + STEP / 2, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    };
    for (int64_t s = 0; s < steps; ++s, left += STEP, right += STEP) {
      step(left, right);
      prefetch.ask(s);
      if (epilogue.done < epilogue.rows) epilogue.one_row();
      if (epilogue.done < epilogue.rows) epilogue.one_row();
    }
    for (int64_t s = 0; s < term_steps; ++s, term_left += STEP, term_right += STEP) step(term_left, term_right);
    epilogue.all_rows();
    _tile_stored(0, sums, ROW_BYTES);
    _tile_stored(1, sums + TILE, ROW_BYTES);
    _tile_stored(2, sums + HALF, ROW_BYTES);
    _tile_stored(3, sums + HALF + TILE, ROW_BYTES);
    __asm__ volatile("" ::: "memory");
    return;
  }
#endif
  (void)prefetch;  // the processor prefetches by itself
  epilogue.all_rows();
  const auto along_steps = [=](int64_t count, const U* a, const U* b, bool onto) {
    for (int64_t s = 0; s < count; ++s, a += STEP, b += STEP, onto = true)
      product<Op>(BLOCK, BLOCK, STEP_UNITS, a, STEP_UNITS, b, BLOCK, sums, BLOCK, onto);
  };
  if (steps == 0 && !add) std::fill(sums, sums + BLOCK * BLOCK, typename Op::Sum(0));
  along_steps(steps, left, right, add);
  along_steps(term_steps, term_left, term_right, MUTATED("dense_product: terms alone", true, false));
}

// Pack rows i … i + count - 1 of x at the positions k0 … k0 + length - 1, one step after another.
template <class Op, class T>
inline void pack_rows(const DenseProduct<T>& p, int64_t i, int64_t count, int64_t k0, int64_t length,
                      typename Op::Unit* to) {
  typedef typename Op::Element E;
  constexpr int64_t LENGTH = STEP_UNITS * Op::PACK;
  for (int64_t y = 0; y < BLOCK; ++y) {
    const T* from = y < count ? p.x.at(i + y, k0) : nullptr;
    E* place = reinterpret_cast<E*>(to + y * STEP_UNITS);
    int64_t k = 0;
    if constexpr (sizeof(E) == sizeof(T))
      for (; y < count && k + LENGTH <= length; k += LENGTH, place += LENGTH * BLOCK)
        std::memcpy(place, from + k, LENGTH * sizeof(E));
    for (; k < length; k += LENGTH, place += LENGTH * BLOCK)
      copy_row<Op>(from + (y < count ? k : 0), y < count ? std::min(LENGTH, length - k) : 0, place, LENGTH);
  }
}

// Pack s h of the terms in the same way, after x. The sums in `made`, (32, 32) per 32 ranks, are the h that are
// computed here; `out` is true if this thread writes them.
template <class Op, class T>
inline void pack_term_rows(const DenseProduct<T>& p, int64_t i, int64_t count, const typename Op::Sum* made, bool out,
                           typename Op::Unit* to, int64_t steps) {
  typedef typename Op::Unit U;
  typedef typename Op::Element E;
  typedef typename Op::Sum C;
  constexpr int64_t LENGTH = STEP_UNITS * Op::PACK, W = lanes<C>;
  std::fill(to, to + steps * STEP_UNITS * BLOCK, U(0));
  T rounded[W];
  int64_t column = 0;
  for (const Term<T>* term = p.terms; term < p.terms + p.term_count; ++term) {
    const C s = static_cast<C>(MUTATED("dense_product: scaling forgotten", term->scaling, 1.0));
    const bool two = summands_of<Op>(term->scaling) == 2, make = term->lora_A.data != nullptr;
    const auto place = [=](int64_t y, int64_t k) {
      return reinterpret_cast<E*>(to + (k / LENGTH * BLOCK + y) * STEP_UNITS) + k % LENGTH;
    };
    const int64_t second = units_of<Op>(term->rank) * Op::PACK;
    for (int64_t y = 0; y < count; ++y) {
      T* h = term->h.at(i + y);
      for (int64_t r = 0; r < term->rank; ++r) {
        const int64_t at = MUTATED("dense_product: every h the first", column, int64_t{0}) + r;
        const C* sums = made + (at / BLOCK * BLOCK + y) * BLOCK + at % BLOCK;
        if (r + W <= term->rank && at % BLOCK + W <= BLOCK && r % W == 0 && (!two || second % W == 0)) {
          if (make && out) store(h + r, load<C>(sums));
          if (make) store(rounded, load<C>(sums));
          const Vector<C> value = load<C>(make ? rounded : h + r) * s;
          store(place(y, r), value);
          if (two) store(place(y, second + r), value - load<C>(place(y, r)));
          r += W - 1;
          continue;
        }
        if (make) put(rounded, *sums);
        if (make && out) h[r] = *rounded;
        const C value = s * widened(make ? *rounded : h[r]);
        put(place(y, r), value);
        if (two) put(place(y, second + r), value - widened(*place(y, r)));
      }
    }
    column += make ? term->rank : 0;
    to += steps_of<Op>(*term) * STEP_UNITS * BLOCK;
  }
}

// Pack the positions k0 … k0 + length - 1 of all stacked A: (units, 32) per 32 ranks.
template <class Op, class T>
inline void pack_down(const DenseProduct<T>& p, int64_t k0, int64_t length, int64_t ranks, typename Op::Unit* to,
                         int64_t block_units) {
  typedef typename Op::Unit U;
  typedef typename Op::Element E;
  constexpr int64_t LENGTH = STEP_UNITS * Op::PACK;
  alignas(64) E rows[BLOCK * LENGTH];
  for (int64_t from = 0; from < ranks; from += BLOCK, to += block_units)
    for (int64_t k = 0; k < length; k += LENGTH) {
      std::fill(rows, rows + BLOCK * LENGTH, E(0));
      int64_t before = 0;
      for (const Term<T>* term = p.terms; term < p.terms + p.term_count; ++term) {
        if (term->lora_A.data == nullptr) continue;
        for (int64_t r = std::max<int64_t>(0, from - before); r < std::min(term->rank, from + BLOCK - before); ++r)
          copy_row<Op>(term->lora_A.at(r, k0 + k), std::min(LENGTH, length - k), rows + (before + r - from) * LENGTH,
                       LENGTH);
        before += term->rank;
      }
      transpose(reinterpret_cast<const U*>(rows), STEP_UNITS, BLOCK, STEP_UNITS, to + k / Op::PACK * BLOCK, BLOCK);
    }
}

// Pack the factors for the block of columns from j on: (steps · 16 units, 32) of the terms that overlap it.
template <class Op, class T>
inline void pack_factors(const DenseProduct<T>& p, int64_t j, int64_t all_steps, typename Op::Unit* to,
                         int64_t& first_step, int64_t& steps) {
  typedef typename Op::Unit U;
  typedef typename Op::Element E;
  first_step = steps = 0;
  int64_t before = 0;
  std::fill(to, to + all_steps * STEP_UNITS * BLOCK, U(0));  // also for terms between two that overlap it
  for (const Term<T>* term = p.terms; term < p.terms + p.term_count; ++term) {
    const int64_t own = steps_of<Op>(*term), units = units_of<Op>(term->rank);
    const int64_t begin = std::max(j, term->first), end = std::min(j + BLOCK, term->first + term->n);
    if (begin < end) {
      if (steps == 0) first_step = before;
      U* place = to + (before - first_step) * STEP_UNITS * BLOCK;
      const Matrix<const T>& stored = term->factor.stored;
      const int64_t offset = begin - j, count = end - begin, row = begin - term->first;
      for (int64_t summand = 0; summand < summands_of<Op>(term->scaling); ++summand, place += units * BLOCK) {
        if (count == BLOCK && !term->factor.transposed) {
          turn<Op>(Matrix<const T>{stored.at(row), stored.row}, BLOCK, term->rank, place, BLOCK);
        } else if (count == BLOCK) {
          interleave<Op>(stored.at(0, row), stored.row, term->rank, BLOCK, place, BLOCK);
        } else {
          for (int64_t x = 0; x < count; ++x)
            for (int64_t r = 0; r < term->rank; ++r) {
              const T value = term->factor.transposed ? *stored.at(r, row + x) : *stored.at(row + x, r);
              E* units_there = reinterpret_cast<E*>(place + r / Op::PACK * BLOCK + offset + x);
              put(units_there + r % Op::PACK, widened(value));
            }
        }
      }
      steps = before + own - first_step;
    }
    before += own;
  }
}

// Compute the rows row_begin … row_end - 1 and the columns column_begin … column_end - 1.
template <class Op, class T>
void dense_part(const DenseProduct<T>& p, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
                const Cut<Op>& cut, char* workspace) {
  typedef typename Op::Unit U;
  typedef typename Op::Sum C;
  Workspace pieces{workspace};
  U *right = pieces.take<U>(cut.right_units()), *term_right = pieces.take<U>(cut.term_units());
  const int64_t of_terms = cut.term_steps * STEP_UNITS * BLOCK;
  U *left = pieces.take<U>(BLOCK * (cut.part / Op::PACK)), *term_left = pieces.take<U>(of_terms);
  C* waiting = pieces.take<C>(cut.parts == 1 ? 0 : cut.rows * cut.columns);
  const int64_t down_blocks = cut.down_ranks / BLOCK;
  U* down_right = pieces.take<U>(cut.down_ranks * (cut.part / Op::PACK));
  C* made = pieces.take<C>(cut.rows * cut.down_ranks);  // x Aᵀ of the current rows, for every panel
  alignas(64) C sums[BLOCK * BLOCK];
  const TilesOf<Op> tiles;
  // If y is written past the caches, which would not hold it anyway, it is not read before.
  const int64_t line_bytes = p.y.row * static_cast<int64_t>(sizeof(T));
  const bool past = p.m * p.n * static_cast<int64_t>(sizeof(T)) >= FEWEST_BYTES_PAST && line_bytes % LINE == 0 &&
                    reinterpret_cast<uintptr_t>(p.y.data) % LINE == 0;
  struct Reach {
    int64_t first_step, steps;
  } reach[PANEL_BYTES_OF_BLOCKS / (STEP_UNITS * 4 * BLOCK)];

  for (int64_t top = row_begin; top < row_end; top += cut.rows)
    for (int64_t j = column_begin; j < column_end; j = cut.panel_end(j)) {
      const int64_t bottom = std::min(row_end, top + cut.rows), columns = std::min(cut.panel_end(j), column_end) - j;
      const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
      for (int64_t q = 0; q < blocks; ++q)
        pack_factors<Op>(p, j + q * BLOCK, cut.term_steps, term_right + q * of_terms, reach[q].first_step, reach[q].steps);
      for (int64_t k0 = 0; k0 == 0 || k0 < p.k; k0 += cut.part) {
        const int64_t length = std::min(cut.part, p.k - k0), steps = (units_of<Op>(length) + STEP_UNITS - 1) / STEP_UNITS;
        const bool add = MUTATED("dense_product: first part of a sum lost", k0 > 0, false), last = k0 + cut.part >= p.k;
        const int64_t block_units = steps * STEP_UNITS * BLOCK;
        pack_panel<Op>(p.w, k0, length, j, columns, right, block_units);
        const bool make = down_blocks > 0 && j == column_begin;
        if (make) pack_down<Op>(p, k0, length, cut.down_ranks, down_right, block_units);
        Epilogue<T> epilogue;
        for (int64_t i = top; i < bottom; i += BLOCK) {
          const int64_t count = std::min(BLOCK, bottom - i);
          pack_rows<Op>(p, i, count, k0, length, left);
          C* of_rows = made + (i - top) * cut.down_ranks;
          for (int64_t q = 0; make && q < down_blocks; ++q)
            block<Op, T>(steps, left, down_right + q * block_units, 0, nullptr, nullptr,
                         of_rows + q * BLOCK * BLOCK, add, epilogue, Prefetch());
          if (last && cut.term_steps > 0)
            pack_term_rows<Op>(p, i, count, of_rows, j == 0, term_left, cut.term_steps);
          const int64_t next = std::max<int64_t>(0, std::min(BLOCK, bottom - i - BLOCK)), at_once = (next + blocks - 1) / blocks;
          for (int64_t q = 0; q < blocks; ++q) {
            C* place = cut.parts == 1 ? sums : waiting + ((i - top) / BLOCK * blocks + q) * BLOCK * BLOCK;
            const Reach terms = last ? reach[q] : Reach{0, 0};
            Prefetch prefetch;
            prefetch.rows = std::min(at_once, next - q * at_once);
            prefetch.row_bytes = p.x.row * static_cast<int64_t>(sizeof(T));
            if (prefetch.rows > 0) prefetch.place = reinterpret_cast<const char*>(p.x.at(i + BLOCK + q * at_once, k0));
            block<Op, T>(steps, left, right + q * block_units, terms.steps,
                         term_left + terms.first_step * STEP_UNITS * BLOCK, term_right + q * of_terms, place, add, epilogue,
                         prefetch);
            if (!last) continue;
            const int64_t column = j + q * BLOCK;
            epilogue = Epilogue<T>();
            epilogue.sums = place;
            epilogue.y = p.y.at(i, column);
            epilogue.y_row = p.y.row;
            if (p.residual != nullptr) epilogue.residual = p.residual + i * p.residual_row + column;
            epilogue.residual_row = p.residual_row;
            if (p.bias != nullptr) epilogue.bias = p.bias + column;
            epilogue.rows = count;
            epilogue.past = past;
            epilogue.columns = std::min(BLOCK, columns - q * BLOCK);
          }
        }
        epilogue.all_rows();
      }
    }
  end_of_stores();
}

}  // namespace
