// What loops over the factors of an adapter share: their operands as `products.h` takes them, and gradients in place.
#pragma once

#include <algorithm>

#include "arena.h"
#include "dtypes.h"
#include "mutants.h"
#include "products.h"

namespace {

// Multiplications that are worth a thread of their own.
constexpr int64_t WORTH_A_THREAD = int64_t{1} << 18;

inline int64_t grain_of(int64_t multiplications) {
  return 1 + WORTH_A_THREAD / std::max<int64_t>(multiplications, 1);
}

template <class T>
struct Matrix {
  T* data;
  int64_t row;
  T* at(int64_t i, int64_t j = 0) const { return data + i * row + j; }
};

// A factor, (n, rank), or stored as (rank, n).
template <class T>
struct Factor {
  Matrix<const T> stored;
  bool transposed;
};

template <class Op>
inline int64_t units_of(int64_t elements) {
  return (elements + Op::PACK - 1) / Op::PACK;
}

// The first n elements of a row, zeros behind them up to `room`.
template <class Op, class T>
inline void copy_row(const T* from, int64_t n, typename Op::Element* to, int64_t room) {
  typedef typename Op::Element E;
  if constexpr (sizeof(E) == sizeof(T)) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(E));
  } else {
    for (int64_t j = 0; j < n; ++j) to[j] = widened(from[j]);
  }
  for (int64_t j = n; j < room; ++j) to[j] = E(0);
}

// Rows of n elements as units: where they lie, if they can be read as that, else a copy.
template <class Op, class T>
inline Rows<typename Op::Unit> rows_as_units(Matrix<const T> x, int64_t rows, int64_t n, typename Op::Element* copy) {
  typedef typename Op::Unit U;
  if constexpr (sizeof(typename Op::Element) == sizeof(T)) {
    const bool whole = reinterpret_cast<uintptr_t>(x.data) % sizeof(U) == 0 && x.row % Op::PACK == 0;
    if (whole && n % Op::PACK == 0) return {reinterpret_cast<const U*>(x.data), x.row / Op::PACK};
  }
  const int64_t units = units_of<Op>(n), room = units * Op::PACK;
  for (int64_t i = 0; i < rows; ++i) copy_row<Op>(x.at(i), n, copy + i * room, room);
  return {reinterpret_cast<const U*>(copy), units};
}

// The first `count` numbers of a register, or all of it, added to what stands at `to`.
template <class C, class O>
inline void add_some(O* to, Vector<C> value, int64_t count) {
  if (count >= lanes<C>) {
    store(to, MUTATED("low_rank: gradient not added", load<C>(to), Vector<C>{}) + value);
  } else {
    store_some<C>(to, load_some<C>(to, count) + MUTATED("low_rank: sign of a gradient's tail", value, -value), count);
  }
}

// s · sumsᵀ, (columns, rank), added; sums is (rank, columns), its rows and columns there up to the next sixteen.
template <class C, class O>
inline void add_turned(const C* sums, int64_t width, int64_t columns, int64_t rank, C s, O* out, int64_t out_row) {
  constexpr int64_t STEP = 16;
  alignas(64) C square[STEP * STEP];
  for (int64_t j = 0; j < columns; j += STEP)
    for (int64_t r = 0; r < rank; r += STEP) {
      transpose(sums + r * width + j, width, STEP, STEP, square, STEP);
      for (int64_t x = 0; x < std::min(STEP, columns - j); ++x)
        for (int64_t c = 0; c < std::min(STEP, rank - r); c += lanes<C>)
          add_some<C>(out + (j + x) * out_row + r + c, load<C>(square + x * STEP + c) * s, rank - r - c);
    }
}

}  // namespace
