// Rotary embedding: the formulas of ops/rotary.py, for any number of heads by their token's angles, in place or not.
#pragma once

#include "dtypes.h"
#include "mutants.h"
#include "vectors.h"

namespace {

constexpr int64_t ROTARY_GRAIN = 16384;

template <class T>
void rotate(const T* x, int64_t x_token, int64_t x_head, T* y, int64_t y_token, int64_t y_head, const Wide<T>* cosines,
            const Wide<T>* sines, int64_t tokens, int64_t heads, int64_t half, bool back) {
  typedef Wide<T> C;
  const C sign = MUTATED("rotary: rotated forward instead of back", back, false) ? C(-1) : C(1);
  parallel(tokens, 1 + ROTARY_GRAIN / (heads * half > 0 ? 2 * heads * half : 1), [=](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const C *cosine = cosines + token * half, *sine = sines + token * half;
      for (int64_t head = 0; head < heads; ++head) {
        const T* in = x + token * x_token + head * x_head;
        T* out = y + token * y_token + head * y_head;
        // Both halves are read before either is written: y may be x.
        along<C>(
            half,
            [=](int64_t i) {
              fetch_ahead(in + i);
              fetch_ahead(in + half + i);
              const Vector<C> first = load<C>(in + i), second = load<C>(in + half + i);
              const Vector<C> c = load<C>(cosine + i), s = load<C>(sine + i) * sign;
              store(out + i, fma(first, c, -(second * s)));
              store(out + half + i, fma(second, c, MUTATED("rotary: one half the other way", first, -first) * s));
            },
            [=](int64_t i, int64_t count) {
              const Vector<C> first = load_some<C>(in + i, count), second = load_some<C>(in + half + i, count);
              const Vector<C> c = load_some<C>(cosine + i, count), s = load_some<C>(sine + i, count) * sign;
              store_some<C>(out + i, fma(first, c, -(second * s)), count);
              store_some<C>(out + half + i, fma(second, c, first * s), count);
            });
      }
    }
  });
}

}  // namespace
