// The kernels of gated units, forward (glu.h) and backward: the formulas of ops/glu.py.
#include "glu.h"

namespace {

template <int activation, class T>
void backward(const T* d_y, int64_t d_y_row, const T* gate, int64_t gate_row, const T* up, int64_t up_row, T* d_gate,
              int64_t d_gate_row, T* d_up, int64_t d_up_row, T* y, int64_t y_row, int64_t rows, int64_t n) {
  typedef Wide<T> C;
  parallel(rows, 1 + GLU_GRAIN / (n > 0 ? n : 1), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *g = d_y + row * d_y_row, *a = gate + row * gate_row, *u = up + row * up_row;
      T *out_gate = d_gate + row * d_gate_row, *out_up = d_up + row * d_up_row;
      T* out = y == nullptr ? nullptr : y + row * y_row;
      along<C>(
          n,
          [=](int64_t i) {
            fetch_ahead(g + i);
            fetch_ahead(a + i);
            fetch_ahead(u + i);
            const Activated<C> phi = activated<activation, T, C>(load<C>(a + i));
            const Vector<C> upstream = load<C>(g + i), by = load<C>(u + i);
            store(out_up + i, upstream * MUTATED("glu: activation forgotten", phi.value, load<C>(a + i)));
            store(out_gate + i, upstream * phi.slope * MUTATED("glu: up forgotten", by, all<C>(1)));
            if (out != nullptr)
              store(out + i, phi.value * MUTATED("glu: upstream in the recomputed output", by, upstream));
          },
          [=](int64_t i, int64_t count) {
            const Activated<C> phi = activated<activation, T, C>(load_some<C>(a + i, count));
            const Vector<C> upstream = load_some<C>(g + i, count), by = load_some<C>(u + i, count);
            store_some<C>(out_up + i, upstream * phi.value, count);
            store_some<C>(out_gate + i, upstream * phi.slope * MUTATED("glu: tail swapped", by, phi.value), count);
            if (out != nullptr)
              store_some<C>(
                  out + i, MUTATED("glu: tail of the recomputed output without activation", phi.value, all<C>(1)) * by,
                  count);
          });
    }
  });
}

}  // namespace

// y = φ(gate) ⊙ up; each tensor is (rows, n) with its row stride in numbers.
BACKHAND_EXPORT void backhand_glu_forward(int dtype, int activation, const void* gate, int64_t gate_row,
                                          const void* up, int64_t up_row, void* y, int64_t y_row, int64_t rows,
                                          int64_t n) {
  BY_DTYPE(dtype, T, {
    const auto run = activation == SILU ? glu_forward<SILU, T> : glu_forward<GELU_TANH, T>;
    run(static_cast<const T*>(gate), gate_row, static_cast<const T*>(up), up_row, static_cast<T*>(y), y_row, rows, n);
  });
}

// Compute the gradients of gate and up. If `y` is not null, y itself is written to it; it may be d_y.
BACKHAND_EXPORT void backhand_glu_backward(int dtype, int activation, const void* d_y, int64_t d_y_row,
                                           const void* gate, int64_t gate_row, const void* up, int64_t up_row,
                                           void* d_gate, int64_t d_gate_row, void* d_up, int64_t d_up_row,
                                           void* y, int64_t y_row, int64_t rows, int64_t n) {
  BY_DTYPE(dtype, T, {
    const auto run = activation == SILU ? backward<SILU, T> : backward<GELU_TANH, T>;
    run(static_cast<const T*>(d_y), d_y_row, static_cast<const T*>(gate), gate_row, static_cast<const T*>(up), up_row,
        static_cast<T*>(d_gate), d_gate_row, static_cast<T*>(d_up), d_up_row, static_cast<T*>(y), y_row, rows, n);
  });
}
