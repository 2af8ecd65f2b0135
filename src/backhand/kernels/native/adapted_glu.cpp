// Backward of a gated unit together with the factors before and after it: the formulas of ops/adapted_glu.py.
//
// Each of these passes alone is bound by memory: the gradients of a and u, and p recomputed for ∂L/∂A of the down
// projection, would be written and read again for the products with the factors. Here a few rows and columns at a time
// are computed and multiplied while they are in the cache, and p is never written.
//
// A task is a part of the rows. The number of parts does not depend on the number of threads. Each part has its own
// sums of all gradients of factors, which are added in the order of the parts.
#include "activations.h"
#include "low_rank.h"

namespace {

// The factor of gate or up: h, F = lora_B, and their gradients ∂L/∂h and ∂L/∂F (n, rank).
template <class T>
struct Side {
  Matrix<const T> h, factor;
  Matrix<T> d_h, gradient;
  int64_t rank;
  double scaling;
};

// The factor of the down projection: t = p Aᵀ, with ∂L/∂t given and ∂L/∂A (rank, n) computed.
template <class T>
struct DownFactor {
  Matrix<const T> d_t;
  Matrix<T> gradient;
  int64_t rank;
};

template <int activation, class C>
struct AdaptedGLU {
  typedef Plain<C> Op;
  // Rows and columns that are computed at a time.
  static constexpr int64_t ROWS = 48, COLUMNS = 64, SIDES = 2;

  // Rows of a block as the left operand. Their constant distance saves the compiler a register per row.
  struct Block {
    const C* data;
    const C* from(int64_t i) const { return data + i * COLUMNS; }
    C at(const C* first, int64_t i, int64_t k) const { return first[i * COLUMNS + k]; }
  };

  Matrix<const C> d_y, gate, up;
  Matrix<C> d_gate, d_up;
  const Side<C>* sides;
  DownFactor<C> down;
  int64_t rows, n;

  static int64_t across(int64_t rank) { return rounded_up(rank, lanes<C>); }
  int64_t width() const { return rounded_up(n, FEWEST_COLUMNS); }
  // Sums of one part: the gradients of gate's, up's and down's factors, (rounded up rank, width) each.
  static int64_t high(int64_t rank) { return rounded_up(rank, TILE); }
  int64_t sums_of_part() const { return (high(sides[0].rank) + high(sides[1].rank) + high(down.rank)) * width(); }

  // Compute a block of both gradients and of p, row by row, with zeros after n; prefetch the next block of columns.
  void make(int64_t t, int64_t count, int64_t j, int64_t wide, C* of_gate, C* of_up, C* p) const {
    const int64_t there = std::min(wide, n - j), left = rows - t - ROWS;
    // After the last columns, prefetch the first columns of the next rows.
    const bool on = j + COLUMNS < n;
    const int64_t to = on ? j + COLUMNS : 0;
    for (int64_t y = 0; y < count; ++y, of_gate += COLUMNS, of_up += COLUMNS, p += COLUMNS) {
      const C *g = d_y.at(t + y, j), *a = gate.at(t + y, j), *u = up.at(t + y, j);
      C *out_gate = d_gate.at(t + y, j), *out_up = d_up.at(t + y, j);
      const int64_t next = on ? t + y : t + ROWS + std::min(y, std::max<int64_t>(left - 1, 0));
      const C *g_next = d_y.at(next, to), *a_next = gate.at(next, to), *u_next = up.at(next, to);
      along<C>(
          there,
          [=](int64_t i) {
            if constexpr (REGISTER_BYTES == LINE) {
              ask(g_next + i);
              ask(a_next + i);
              ask(u_next + i);
            } else if (i * static_cast<int64_t>(sizeof(C)) % LINE == 0) {
              ask(g_next + i);
              ask(a_next + i);
              ask(u_next + i);
            }
            const Activated<C> phi = activated<activation, C, C>(load<C>(a + i));
            const Vector<C> upstream = load<C>(g + i), by = load<C>(u + i);
            const Vector<C> first = upstream * phi.slope * MUTATED("adapted_glu: up forgotten", by, all<C>(1));
            const Vector<C> second = upstream * MUTATED("adapted_glu: activation forgotten", phi.value, load<C>(a + i));
            store(out_gate + i, first);
            store(out_up + i, second);
            store(of_gate + i, first);
            store(of_up + i, second);
            store(p + i, phi.value * MUTATED("adapted_glu: upstream for up in p", by, upstream));
          },
          [=](int64_t i, int64_t some) {
            const Activated<C> phi = activated<activation, C, C>(load_some<C>(a + i, some));
            const Vector<C> upstream = load_some<C>(g + i, some), by = load_some<C>(u + i, some);
            const Vector<C> first = upstream * phi.slope * MUTATED("adapted_glu: tail swapped", by, phi.value);
            const Vector<C> second = upstream * phi.value;
            store_some<C>(out_gate + i, first, some);
            store_some<C>(out_up + i, second, some);
            store_some<C>(of_gate + i, first, some);
            store_some<C>(of_up + i, second, some);
            store_some<C>(p + i, phi.value * MUTATED("adapted_glu: tail of p without up", by, all<C>(1)), some);
          });
      for (int64_t i = there; i < wide; ++i) of_gate[i] = of_up[i] = p[i] = 0;
    }
  }

  static void ask(const C* place) { __builtin_prefetch(place, 0, 2); }

  // Compute the rows first … last - 1. `sums` are the part's; `factors` are those of gate and up with whole registers
  // per row.
  void part(int64_t first, int64_t last, const BlockSums<C>& sums, const Rows<C>* factors, C* added) const {
    alignas(64) C of_gate[ROWS * COLUMNS], of_up[ROWS * COLUMNS], p[ROWS * COLUMNS];
    const C* const made[SIDES] = {of_gate, of_up};
    for (int64_t t = first; t == first || t < last; t += ROWS) {
      const int64_t count = std::min(ROWS, last - t);
      const int64_t number = (t - first) / ROWS;
      const bool add = MUTATED("adapted_glu: first rows of a part lost", sums.adds(number), false);
      for (int64_t j = 0; j < n; j += COLUMNS) {
        const int64_t wide = std::min(COLUMNS, width() - j), there = std::min(wide, n - j);
        make(t, count, j, wide, of_gate, of_up, p);
        C *own = sums.recent + j, *of_h = added;
        for (int64_t s = 0; s < SIDES; ++s) {
          const Side<C>& side = sides[s];
          if (side.rank == 0) continue;
          product_of_part<Op>(side.rank, wide, count, Interleaved<C>{side.h.at(t), side.h.row}, made[s], COLUMNS, own,
                              width(), add);
          own += high(side.rank) * width();
          product_of_part<Op>(count, across(side.rank), there, Block{made[s]}, factors[s].from(j),
                              factors[s].row, of_h, across(side.rank),
                              MUTATED("adapted_glu: first columns of dh lost", j > 0, false));
          of_h += ROWS * across(side.rank);
        }
        if (down.rank > 0)
          product_of_part<Op>(down.rank, wide, count, Interleaved<C>{down.d_t.at(t), down.d_t.row}, p, COLUMNS,
                              own, width(), add);
      }
      int64_t offset = 0;
      for (const int64_t rank : {sides[0].rank, sides[1].rank, down.rank}) {
        sums.end_block(number, t + ROWS >= last, offset, width(), rank, 0, width());
        offset += high(rank) * width();
      }
      const C* of_h = added;
      for (int64_t s = 0; s < SIDES; ++s) {
        const Side<C>& side = sides[s];
        const Vector<C> by = all<C>(static_cast<C>(MUTATED("adapted_glu: scaling of dh forgotten", side.scaling, 1)));
        for (int64_t y = 0; y < count && side.rank > 0; ++y) {
          C* to = side.d_h.at(t + y);
          const C* from = of_h + y * across(side.rank);
          along<C>(
              side.rank, [=](int64_t r) { store(to + r, load<C>(from + r) * by); },
              [=](int64_t r, int64_t some) { store_some<C>(to + r, load<C>(from + r) * by, some); });
        }
        of_h += ROWS * across(side.rank);
      }
    }
  }

  // Add the columns first … last - 1 of the sums of all parts to the gradients.
  void add_up(C* sums, int64_t parts, int64_t first, int64_t last) const {
    const int64_t apart = sums_of_part(), there = std::min(last, n) - first;
    for (int64_t s = 0; s < SIDES; ++s) {
      const Side<C>& side = sides[s];
      add_parts(sums, parts, apart, width(), side.rank, first, last);
      const C by = static_cast<C>(MUTATED("adapted_glu: scaling of dB forgotten", side.scaling, 1));
      add_turned(sums + first, width(), there, side.rank, by, side.gradient.at(first), side.gradient.row);
      sums += high(side.rank) * width();
    }
    add_parts(sums, parts, apart, width(), down.rank, first, last);
    for (int64_t r = 0; r < down.rank; ++r)
      for (int64_t j = first; j < first + there; j += lanes<C>)
        add_some<C>(down.gradient.at(r, j), load<C>(sums + r * width() + j), n - j);
  }

  int run() const {
    if (rows <= 0 || n <= 0) return 0;
    const RowParts parts(rows);
    const int64_t added = ROWS * (across(sides[0].rank) + across(sides[1].rank));
    const int64_t one = parts.count * sums_of_part();
    // A square of the transposition may begin in the last row.
    const int64_t numbers = BlockSums<C>::numbers(one, rows / parts.count, ROWS) + TILE * width();
    size_t bytes = static_cast<size_t>(numbers + parts.count * added) * sizeof(C);
    for (int64_t s = 0; s < SIDES; ++s) bytes += static_cast<size_t>(n * across(sides[s].rank)) * sizeof(C) + 64;
    Arena arena(bytes + 256 + static_cast<size_t>(parts.count) * 64);
    if (!arena.there()) return 1;
    C* sums = arena.take<C>(numbers);
    C* of_h = arena.take<C>(parts.count * added);
    Rows<C> factors[SIDES];
    for (int64_t s = 0; s < SIDES; ++s) {
      const Side<C>& side = sides[s];
      const int64_t room = across(side.rank);
      factors[s] = {side.factor.data, side.factor.row};
      if (side.rank == room) continue;
      C* packed = arena.take<C>(n * room);
      interleave<Op>(side.factor.data, side.factor.row, n, side.rank, packed, room);
      factors[s] = {packed, room};
    }
    const Rows<C>* const with = factors;
    parallel(parts.count, 1, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        part(parts.begin(i), parts.begin(i + 1), {sums + i * sums_of_part(), one, rows / parts.count, ROWS}, with, of_h + i * added);
    });
    parallel(width() / FEWEST_COLUMNS, grain_of_sums(parts.count * (sides[0].rank + sides[1].rank + down.rank)),
             [=](int64_t begin, int64_t end) {
               add_up(sums, parts.count, begin * FEWEST_COLUMNS, end * FEWEST_COLUMNS);
             });
    return 0;
  }
};

template <class C>
Matrix<C> matrix_at(const int64_t*& numbers) {
  const Matrix<C> found{reinterpret_cast<C*>(numbers[0]), numbers[1]};
  numbers += 2;
  return found;
}

template <int activation, class C>
int adapted_glu(const int64_t* numbers, const double* scalings, int64_t rows, int64_t n) {
  const auto d_y = matrix_at<const C>(numbers), gate = matrix_at<const C>(numbers), up = matrix_at<const C>(numbers);
  const auto d_gate = matrix_at<C>(numbers), d_up = matrix_at<C>(numbers);
  Side<C> sides[2];
  for (int64_t s = 0; s < 2; ++s) {
    Side<C>& side = sides[s];
    side.h = matrix_at<const C>(numbers);
    side.factor = matrix_at<const C>(numbers);
    side.d_h = matrix_at<C>(numbers);
    side.gradient = matrix_at<C>(numbers);
    side.rank = *numbers++;
    side.scaling = scalings[s];
  }
  const auto d_t = matrix_at<const C>(numbers);
  const auto gradient = matrix_at<C>(numbers);
  const DownFactor<C> down{d_t, gradient, *numbers};
  return AdaptedGLU<activation, C>{d_y, gate, up, d_gate, d_up, sides, down, rows, n}.run();
}

}  // namespace

// For float and double. `numbers` holds pairs of an address and a row stride. First those of d_y, gate, up, d_gate and
// d_up (rows, n), the last two of which may be gate and up. Then, for gate's factor and for up's: those of h (rows,
// rank), B (n, rank), d_h and the gradient of B, and the rank; zeros if there is no factor. Then, for down's factor:
// those of d_t (rows, rank) and the gradient of A (rank, n), and the rank. Gradients of factors are added to. Returns 1
// if there is no memory or for another type, else 0.
BACKHAND_EXPORT int backhand_adapted_glu_backward(int dtype, int activation, const int64_t* numbers,
                                                  const double* scalings, int64_t rows, int64_t n) {
  const bool silu = activation == SILU;
  if (dtype == FLOAT32) return (silu ? adapted_glu<SILU, float> : adapted_glu<GELU_TANH, float>)(numbers, scalings, rows, n);
  if (dtype == FLOAT64)
    return (silu ? adapted_glu<SILU, double> : adapted_glu<GELU_TANH, double>)(numbers, scalings, rows, n);
  return 1;
}
