// RMSNorm forward: the formulas of ops/rms_norm.py, with one read of a row for the sum and one for the result.
#pragma once

#include "dtypes.h"
#include "mutants.h"
#include "vectors.h"

namespace {

// Rows in two levels: row r is row r % inner of the outer row r / inner. A view of heads has them, a matrix inner = 1.
struct Strides {
  int64_t inner_count, outer, inner;
  int64_t operator()(int64_t row) const { return row / inner_count * outer + row % inner_count * inner; }
};

// The fewest numbers per task: for less, waking a thread costs more than it brings.
constexpr int64_t NORM_GRAIN = 16384;

inline int64_t rows_a_piece(int64_t n) { return 1 + NORM_GRAIN / (n > 0 ? n : 1); }

// Σ term(i) over n numbers; term(i, count) computes a partial register, with zeros after it.
template <class C, class Whole, class Part>
inline C total(int64_t n, const Whole& whole, const Part& part) {
  constexpr int W = lanes<C>;
  const int64_t stretch = MUTATED("rms_norm: naive sum", 32 * 4 * W, n);
  Compensated<Vector<C>> sum;
  int64_t i = 0;
  do {
    Vector<C> sums[4] = {};
    const int64_t last = i + stretch < n ? i + stretch : n;
    for (; i + 4 * W <= last; i += 4 * W)
      for (int k = 0; k < 4; ++k) {
        const int into = MUTATED("rms_norm: naive sum", k, 0);
        sums[into] = whole(i + k * W, sums[into]);
      }
    for (; i + W <= last; i += W) sums[0] = whole(i, sums[0]);
    if (i < last) {
      sums[1] = part(i, last - i, sums[1]);
      i = last;
    }
    sum.add((sums[0] + sums[1]) + (sums[2] + sums[3]));
  } while (i < n);
  return sum_of<C>(sum.sum);
}

template <class T>
void rms_norm_forward(const T* x, Strides x_rows, const T* weight, T* y, Wide<T>* factor, bool given, int64_t rows, int64_t n,
             double eps, double offset) {
  typedef Wide<T> C;
  parallel(rows, rows_a_piece(n), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* in = x + x_rows(row);
      T* out = y + row * n;
      if (!given) {
        const C squares = total<C>(
            n,
            [=](int64_t i, Vector<C> sum) {
              fetch_ahead(in + i);
              const Vector<C> v = load<C>(in + i);
              return fma(v, v, sum);
            },
            [=](int64_t i, int64_t count, Vector<C> sum) {
              const Vector<C> v = load_some<C>(in + i, count);
              return fma(v, v, sum);
            });
        const C mean = squares / static_cast<C>(n);
        factor[row] = 1 / static_cast<C>(__builtin_sqrt(mean + MUTATED("rms_norm: eps forgotten", C(eps), C(0))));
      }
      const Vector<C> rho = all<C>(factor[row]);
      const C c = MUTATED("rms_norm: offset forgotten in forward", C(offset), C(0));
      along<C>(
          n, [=](int64_t i) { store(out + i, load<C>(in + i) * rho * (load<C>(weight + i) + c)); },
          [=](int64_t i, int64_t count) {
            store_some<C>(out + i, load_some<C>(in + i, count) * rho * (load_some<C>(weight + i, count) + c), count);
          });
    }
  });
}

}  // namespace
