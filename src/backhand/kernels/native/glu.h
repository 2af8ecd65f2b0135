// Gated units, forward: the formulas of ops/glu.py.
#pragma once

#include "activations.h"
#include "dtypes.h"

namespace {

constexpr int64_t GLU_GRAIN = 8192;

template <int activation, class T>
void glu_forward(const T* gate, int64_t gate_row, const T* up, int64_t up_row, T* y, int64_t y_row, int64_t rows,
             int64_t n) {
  typedef Wide<T> C;
  parallel(rows, 1 + GLU_GRAIN / (n > 0 ? n : 1), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T *a = gate + row * gate_row, *u = up + row * up_row;
      T* out = y + row * y_row;
      along<C>(
          n,
          [=](int64_t i) {
            fetch_ahead(a + i);
            fetch_ahead(u + i);
            const Vector<C> v = load<C>(a + i);
            store(out + i, divided<T, C>(v, 1 + power_of<activation, T, C>(v)) * load<C>(u + i));
          },
          [=](int64_t i, int64_t count) {
            const Vector<C> v = load_some<C>(a + i, count);
            const Vector<C> phi = divided<T, C>(v, 1 + power_of<activation, T, C>(v));
            store_some<C>(out + i, phi * load_some<C>(u + i, count), count);
          });
    }
  });
}

}  // namespace
