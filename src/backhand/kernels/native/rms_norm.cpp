// RMSNorm's kernels, forward (rms_norm.h) and backward: the formulas of ops/rms_norm.py.
#include "rms_norm.h"

namespace {

// d_x = ρ (g - x (g · x) ρ² / n) (+ residual), g = (c + w) ⊙ d_y.
template <class T>
void backward(const T* d_y, Strides d_y_rows, const T* x, Strides x_rows, const T* weight, const Wide<T>* factor,
              const T* residual, T* d_x, int64_t rows, int64_t n, double offset) {
  typedef Wide<T> C;
  const C c = MUTATED("rms_norm: offset forgotten in backward", C(offset), C(0));
  parallel(rows, rows_a_piece(n), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *up = d_y + d_y_rows(row), *in = x + x_rows(row), *more = residual ? residual + row * n : nullptr;
      T* out = d_x + row * n;
      const C dot = total<C>(
          n,
          [=](int64_t i, Vector<C> sum) {
            fetch_ahead(up + i);
            fetch_ahead(in + i);
            if (more) fetch_ahead(more + i);
            return fma(load<C>(up + i) * (load<C>(weight + i) + c), load<C>(in + i), sum);
          },
          [=](int64_t i, int64_t count, Vector<C> sum) {
            const Vector<C> g = load_some<C>(up + i, count) * (load_some<C>(weight + i, count) + c);
            return fma(g, load_some<C>(in + i, count), sum);
          });
      const C one = factor[row];
      const C projected = MUTATED("rms_norm: projection missing", dot * one * one / static_cast<C>(n), C(0));
      const Vector<C> rho = all<C>(one), share = all<C>(-MUTATED("rms_norm: sum for mean", projected, projected * n));
      const auto result = [=](Vector<C> g, Vector<C> v) { return fma(v, share, g) * rho; };
      along<C>(
          n,
          [=](int64_t i) {
            Vector<C> d = result(load<C>(up + i) * (load<C>(weight + i) + c), load<C>(in + i));
            if (more) d += MUTATED("rms_norm: residual forgotten", load<C>(more + i), Vector<C>{});
            store(out + i, d);
          },
          [=](int64_t i, int64_t count) {
            const Vector<C> g = load_some<C>(up + i, count) * (load_some<C>(weight + i, count) + c);
            Vector<C> d = result(g, load_some<C>(in + i, count));
            if (more) d += load_some<C>(more + i, count);
            store_some<C>(out + i, d, count);
          });
    }
  });
}

// d_weight = Σ_rows d_y ⊙ x ρ, column by column, so that the order of the sum does not depend on threads.
template <class T>
void weight_gradient(const T* d_y, Strides d_y_rows, const T* x, Strides x_rows, const Wide<T>* factor, T* d_weight,
                     int64_t rows, int64_t n) {
  typedef Wide<T> C;
  constexpr int W = lanes<C>;
  const int64_t rows_a_sum = MUTATED("rms_norm: naive sum of rows", int64_t{32}, rows);
  parallel((n + W - 1) / W, 4, [=](int64_t begin, int64_t end) {
    for (int64_t column = begin * W; column < end * W && column < n; column += W) {
      const int64_t count = n - column < W ? n - column : W;
      Compensated<Vector<C>> sum;
      for (int64_t first = 0; first < rows; first += rows_a_sum) {
        const int64_t last = first + rows_a_sum < rows ? first + rows_a_sum : rows;
        Vector<C> part = {};
        for (int64_t row = first; row < last; ++row) {
          const C rho = MUTATED("rms_norm: x not normalised", factor[row], C(1));
          const T *up = d_y + d_y_rows(row) + column, *in = x + x_rows(row) + column;
          const Vector<C> g = count == W ? load<C>(up) : load_some<C>(up, count);
          part = fma(g * rho, count == W ? load<C>(in) : load_some<C>(in, count), part);
        }
        sum.add(part);
      }
      store_some<C>(d_weight + column, sum.sum, count);
    }
  });
}

}  // namespace

// y (rows, n), contiguous, from x, whose rows are described by `Strides`; `given` uses the given factors.
BACKHAND_EXPORT void backhand_rms_norm_forward(int dtype, const void* x, int64_t inner_count, int64_t x_outer,
                                               int64_t x_inner, const void* weight, void* y, void* factor, int given,
                                               int64_t rows, int64_t n, double eps, double offset) {
  BY_DTYPE(dtype, T, {
    rms_norm_forward(static_cast<const T*>(x), Strides{inner_count, x_outer, x_inner}, static_cast<const T*>(weight),
            static_cast<T*>(y), static_cast<Wide<T>*>(factor), given != 0, rows, n, eps, offset);
  });
}

// d_x (rows, n), contiguous, with `residual` (rows, n) added, or null; it may be d_y itself.
BACKHAND_EXPORT void backhand_rms_norm_backward(int dtype, const void* d_y, int64_t inner_count, int64_t d_y_outer,
                                                int64_t d_y_inner, const void* x, int64_t x_outer, int64_t x_inner,
                                                const void* weight, const void* factor, const void* residual,
                                                void* d_x, int64_t rows, int64_t n, double offset) {
  BY_DTYPE(dtype, T, {
    backward(static_cast<const T*>(d_y), Strides{inner_count, d_y_outer, d_y_inner}, static_cast<const T*>(x),
             Strides{inner_count, x_outer, x_inner}, static_cast<const T*>(weight),
             static_cast<const Wide<T>*>(factor), static_cast<const T*>(residual), static_cast<T*>(d_x), rows, n,
             offset);
  });
}

BACKHAND_EXPORT void backhand_rms_norm_weight_gradient(int dtype, const void* d_y, int64_t inner_count,
                                                       int64_t d_y_outer, int64_t d_y_inner, const void* x,
                                                       int64_t x_outer, int64_t x_inner, const void* factor,
                                                       void* d_weight, int64_t rows, int64_t n) {
  BY_DTYPE(dtype, T, {
    weight_gradient(static_cast<const T*>(d_y), Strides{inner_count, d_y_outer, d_y_inner}, static_cast<const T*>(x),
                    Strides{inner_count, x_outer, x_inner}, static_cast<const Wide<T>*>(factor),
                    static_cast<T*>(d_weight), rows, n);
  });
}
