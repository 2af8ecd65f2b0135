// One chunk of the gated delta rule in the memory of one worker: the matrices of ops/gated_delta_rule.py by their names
// there, and the triangular system, which is solved by substitution without its inverse.
//
// Matrices are stored row by row. Columns are rounded up to whole registers with zeros, so that every product can use
// its operands directly: the left operand may be read transposed, and the right one is transposed first if necessary.
#pragma once

#include <algorithm>

#include "dtypes.h"
#include "heads.h"
#include "mutants.h"
#include "products.h"

namespace {

constexpr int64_t COLUMNS = 16;  // a multiple of every register's lanes
constexpr int64_t BLOCK = 16;    // rows of the triangle per block of the substitution

struct DeltaSizes {
  int64_t key_heads, group, key_width, value_width, chunk;
  int64_t keys() const { return rounded_up(key_width, COLUMNS); }
  int64_t values() const { return rounded_up(value_width, COLUMNS); }
  int64_t tokens() const { return rounded_up(chunk, COLUMNS); }
  int64_t state() const { return group * keys() * values(); }
};

// Pieces of given memory; starting from null, it only counts the memory that is needed.
template <class C>
class Pieces {
 public:
  explicit Pieces(C* base) : base_(base) {}
  C* take(int64_t count) {
    C* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += rounded_up(count, COLUMNS);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  C* base_;
  int64_t used_ = 0;
};

template <class C>
inline void multiply(int64_t m, int64_t n, int64_t depth, const C* a, int64_t a_row, const C* b, int64_t b_row, C* c,
                     int64_t c_row, bool add) {
  product<Plain<C>>(m, n, depth, a, a_row, b, b_row, c, c_row, add);
}

// The same with Aᵀ (depth, m) instead of A.
template <class C>
inline void multiply_turned(int64_t m, int64_t n, int64_t depth, const C* a, int64_t a_row, const C* b, int64_t b_row,
                            C* c, int64_t c_row, bool add) {
  product_of_part<Plain<C>>(m, n, depth, Interleaved<C>{a, a_row}, b, b_row, c, c_row, add);
}

template <class C>
inline C dot(const C* a, const C* b, int64_t n) {
  Vector<C> sum = {};
  for (int64_t j = 0; j < n; j += lanes<C>) sum = fma(load<C>(a + j), load<C>(b + j), sum);
  return sum_of<C>(sum);
}

// to = by · from (+ to), n whole registers.
template <class C>
inline void scaled(C by, const C* from, C* to, int64_t n, bool add = false) {
  const Vector<C> factor = all<C>(by);
  for (int64_t j = 0; j < n; j += lanes<C>) {
    const Vector<C> value = load<C>(from + j);
    store(to + j, add ? fma(factor, value, load<C>(to + j)) : factor * value);
  }
}

// Read n numbers, widened, with zeros up to `room`.
template <class C, class T>
inline void read_row(const T* from, C* to, int64_t n, int64_t room) {
  along<C>(
      n, [=](int64_t i) { store(to + i, load<C>(from + i)); },
      [=](int64_t i, int64_t count) { store(to + i, load_some<C>(from + i, count)); });
  for (int64_t j = rounded_up(n, lanes<C>); j < room; j += lanes<C>) store(to + j, Vector<C>{});
}

// eˣ of a decay, or 0 below 10⁻²⁹ (10⁻²⁴² in double): products with it would be subnormal, which takes processors a
// hundred times as long.
template <class C>
inline Vector<C> decayed(Vector<C> x) {
  const Vector<C> share = exponential<C>(x);
  return x < C(0.79) * Exponential<C>::LOWEST ? Vector<C>{} : share;
}

template <class C>
struct Chunk {
  int64_t n, keys, values, tokens;  // tokens: the columns of D etc., n rounded up
  C *qk, *k_turned, *similar;       // [Q; K] (2n, keys), Kᵀ (keys, tokens), [Q Kᵀ; K Kᵀ] (2n, tokens)
  C *pairs, *attended, *below;      // D, P, L (n, tokens)
  C *beta, *sum, *to_here, *to_end; // β, c, e^c, e^{c_n - c} (tokens)
  C *through;                       // [Q; K] S (2n, values)
  C *update;                        // U (n, values)
  C *sent;                          // Û (n, values)

  void lay_out(Pieces<C>& pieces, const DeltaSizes& sizes) {
    const int64_t most = sizes.chunk;
    keys = sizes.keys(), values = sizes.values(), tokens = sizes.tokens();
    qk = pieces.take(2 * most * keys), k_turned = pieces.take(keys * tokens), similar = pieces.take(2 * most * tokens);
    pairs = pieces.take(most * tokens), attended = pieces.take(most * tokens), below = pieces.take(most * tokens);
    beta = pieces.take(tokens), sum = pieces.take(tokens), to_here = pieces.take(tokens);
    to_end = pieces.take(tokens);
    through = pieces.take(2 * most * values), update = pieces.take(most * values), sent = pieces.take(most * values);
  }

  const C* q() const { return qk; }
  const C* k() const { return qk + n * keys; }
  C over() const { return to_here[n - 1]; }

  // Compute what all value heads of a key head share, for `count` tokens from `first` on.
  void read_keys(const DeltaSizes& sizes, Heads<const C> queries, Heads<const C> all_keys, int64_t head, int64_t first,
                 int64_t count) {
    n = count;
    tokens = rounded_up(n, COLUMNS);
    for (int64_t i = 0; i < n; ++i) {
      read_row(queries.at(first + i, head), qk + i * keys, sizes.key_width, keys);
      read_row(all_keys.at(first + i, head), qk + (n + i) * keys, sizes.key_width, keys);
    }
    turned(k(), n, keys, k_turned);
    multiply(2 * n, tokens, keys, qk, keys, k_turned, tokens, similar, tokens, false);
  }

  // Transpose (n, columns) to (columns, tokens), with zeros after the n columns.
  void turned(const C* from, int64_t rows, int64_t columns, C* to) const {
    if (rows < tokens) std::fill(to, to + columns * tokens, C(0));
    transpose(from, columns, rows, columns, to, tokens);
  }

  // Compute D, P, L and the other matrices that depend on the decays and rates of a value head.
  template <class T>
  void read_rates(Heads<const C> decays, Heads<const T> rates, int64_t head, int64_t first) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
      total += *decays.at(first + i, head);
      sum[i] = static_cast<C>(total);
      beta[i] = widened(*rates.at(first + i, head));
    }
    for (int64_t i = n; i < tokens; ++i) sum[i] = sum[n - 1], beta[i] = 0;
    const Vector<C> last = all<C>(sum[n - 1]);
    for (int64_t j = 0; j < tokens; j += lanes<C>) {
      store(to_here + j, decayed<C>(load<C>(sum + j)));
      store(to_end + j, decayed<C>(last - load<C>(sum + j)));
    }
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < tokens; j += lanes<C>) {
        const int64_t at = i * tokens + j;
        if (j > i) {
          for (C* matrix : {pairs, attended, below}) store(matrix + at, Vector<C>{});
          continue;
        }
        Vector<C> pair = decayed<C>(all<C>(sum[i]) - load<C>(sum + j)), under = pair;
        if (j + lanes<C> > i) {  // the diagonal crosses this register
          pair = before<C>(i + 1 - j) ? pair : Vector<C>{};
          under = before<C>(i - j) ? under : Vector<C>{};
        }
        store(pairs + at, pair);
        store(attended + at, pair * load<C>(similar + at));
        store(below + at, under * load<C>(similar + n * tokens + at));
      }
  }

  // A mask of the first `count` lanes.
  template <class Number>
  static Bits<Number> before(int64_t count) {
    return counted_from<Number>(0) < static_cast<decltype(Bits<Number>{}[0] + 0)>(count);
  }

  // Solve (I + L diag β) Y = R in place, and compute U = β ⊙ Y; or, with `back`, solve (I + L diag β)ᵀ with W instead
  // of R, dU instead of Y and dY instead of U.
  template <bool back>
  void substitute(C* y, C* u) const {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    for (int64_t number = 0; number < blocks; ++number) {
      const int64_t first = (back ? blocks - 1 - number : number) * BLOCK, last = std::min(first + BLOCK, n);
      C* place = y + first * values;
      const int64_t row = values;
      const auto subtract = [=](int64_t i, int64_t j, Vector<C> sum) {
        store(place + i * row + j, load<C>(place + i * row + j) - sum);
      };
      if constexpr (back) {
        if (last < n)
          finished_product<Plain<C>>(last - first, values, n - last,
                                     Interleaved<C>{below + last * tokens + first, tokens}, u + last * values, values,
                                     subtract);
      } else {
        if (first > 0)
          finished_product<Plain<C>>(last - first, values, first, Rows<C>{below + first * tokens, tokens}, u, values,
                                     subtract);
      }
      int64_t j = 0;
      for (; j + 4 * lanes<C> <= values; j += 4 * lanes<C>) solve_block<back, 4>(y, u, first, last, j);
      for (; j < values; j += lanes<C>) solve_block<back, 1>(y, u, first, last, j);
    }
  }

  template <bool back, int VECTORS>
  void solve_block(C* y, C* u, int64_t first, int64_t last, int64_t column) const {
    for (int64_t number = 0; number < last - first; ++number) {
      const int64_t i = back ? last - 1 - number : first + number;
      Vector<C> rest[VECTORS];
      for (int k = 0; k < VECTORS; ++k) rest[k] = load<C>(y + i * values + column + k * lanes<C>);
      for (int64_t other = 0; other < number; ++other) {
        const int64_t j = back ? last - 1 - other : first + other;
        const Vector<C> by = all<C>(-(back ? below[j * tokens + i] : below[i * tokens + j]));
        for (int k = 0; k < VECTORS; ++k) rest[k] = fma(by, load<C>(u + j * values + column + k * lanes<C>), rest[k]);
      }
      const Vector<C> rate = all<C>(beta[i]);
      for (int k = 0; k < VECTORS; ++k) {
        store(y + i * values + column + k * lanes<C>, rest[k]);
        store(u + i * values + column + k * lanes<C>, rest[k] * rate);
      }
    }
  }

  // Compute Y (n, values) and U from v and the state S before the chunk, null for zero; also [Q; K] S with `reading`,
  // else K S.
  template <class T>
  void solve(Heads<const T> v, int64_t head, int64_t first, int64_t width, const C* state, bool reading, C* missing) {
    for (int64_t i = 0; i < n; ++i) read_row(v.at(first + i, head), missing + i * values, width, values);
    if (state != nullptr) {
      const int64_t skipped = reading ? 0 : n;
      multiply(2 * n - skipped, values, keys, qk + skipped * keys, keys, state, values, through + skipped * values,
               values, false);
      for (int64_t i = 0; i < n; ++i)
        scaled(-MUTATED("gated_delta_rule: state not decayed", to_here[i], C(1)), through + (n + i) * values,
               missing + i * values, values, true);
    }
    substitute<false>(missing, update);
  }

  // Compute S' from S, which may be null for zero, or S' itself.
  void advance(const C* state, C* next) {
    for (int64_t i = 0; i < n; ++i)
      scaled(MUTATED("gated_delta_rule: updates not decayed", to_end[i], C(1)), update + i * values, sent + i * values,
             values);
    if (state != nullptr) scaled(over(), state, next, keys * values);
    multiply_turned(keys, values, n, k(), keys, sent, values, next, values, state != nullptr);
  }
};

}  // namespace
