// Tensors of tokens and heads, and their rows, for kernels that compute one head at a time.
#pragma once

#include "vectors.h"

namespace {

// Heads: token t, head h begins at data + t · token + h · head.
template <class T>
struct Heads {
  T* data;
  int64_t token, head;
  T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

template <class C, class T>
inline void write_row(const C* from, T* to, int64_t n) {
  along<C>(
      n, [=](int64_t i) { store(to + i, load<C>(from + i)); },
      [=](int64_t i, int64_t count) { store_some<C>(to + i, load_some<C>(from + i, count), count); });
}

template <class C>
inline Bits<C> counted_from(int64_t first) {
  Bits<C> numbers;
  for (int i = 0; i < lanes<C>; ++i) numbers[i] = static_cast<decltype(numbers[0] + 0)>(first + i);
  return numbers;
}

}  // namespace
