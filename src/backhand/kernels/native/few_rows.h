// Few rows times a frozen matrix, y = r + x Wᵀ + b. Each row of W is read once, and a quantized row never leaves the
// cache. The product of a new token is bound by reading W; torch would unpack a whole piece first, or read no faster.
//
// Several rows of W are read in pieces and multiplied by every row of x while they are in the cache. Sums are in `Wide`
// of the storage type. A dense and a quantized W of the same numbers go through the same sums.
#pragma once

#include "block_dots.h"
#include "dtypes.h"
#include "kinds.h"
#include "mutants.h"
#include "products.h"

namespace {

constexpr int SIDE_BY_SIDE = 4;     // rows of W
constexpr int64_t MOST_ROWS = 8;    // of x, at a time

// Multiply and add `STEP` numbers at a time.
template <class T>
struct Dot {
  typedef Wide<T> C;
  static constexpr int64_t STEP = lanes<C>;
  static inline Vector<C> whole(const T* w, const T* x, Vector<C> sum) { return fma(load<C>(w), load<C>(x), sum); }
};

#if defined(BACKHAND_PAIRS)
template <>
struct Dot<bfloat16> {
  typedef float C;
  static constexpr int64_t STEP = 2 * lanes<float>;
  static inline Vector<float> whole(const bfloat16* w, const bfloat16* x, Vector<float> sum) {
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(w), (__m512bh)_mm512_loadu_si512(x));
#else
    return Pairs::multiply_add(vreinterpretq_u32_u16(vld1q_u16(w)), vreinterpretq_u32_u16(vld1q_u16(x)), sum);
#endif
  }
};
#endif

template <class T>
inline Vector<Wide<T>> some(const T* w, const T* x, int64_t count, Vector<Wide<T>> sum) {
  T few_w[Dot<T>::STEP] = {}, few_x[Dot<T>::STEP] = {};
  std::memcpy(few_w, w, static_cast<size_t>(count) * sizeof(T));
  std::memcpy(few_x, x, static_cast<size_t>(count) * sizeof(T));
  return Dot<T>::whole(few_w, few_x, sum);
}

// Registers of products per partial sum, which is then added to the sum.
constexpr int64_t LONGEST_DOT = 64;

// sums[r] += Σ w[r] x over `count` numbers, for `ROWS` rows of W and one of x. With `AHEAD`, W is prefetched from
// memory.
template <class T, int ROWS, bool AHEAD = false>
inline void multiply(const T* const* w, const T* x, int64_t count, Vector<Wide<T>>* sums) {
  constexpr int64_t STEP = Dot<T>::STEP;
  int64_t i = 0;
  do {
    Vector<Wide<T>> sum[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) sum[r] = MUTATED("few rows: naive sum", Vector<Wide<T>>{}, sums[r]);
    const int64_t last = count - i < LONGEST_DOT * STEP ? count : i + LONGEST_DOT * STEP;
    for (; i + STEP <= last; i += STEP)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        if (AHEAD) fetch_ahead(w[r] + i);
        sum[r] = MUTATED("few rows: naive sum", Dot<T>::whole(w[r] + i, x + i, sum[r]),
                       one_by_one(sum[r], Dot<T>::whole(w[r] + i, x + i, Vector<Wide<T>>{})));
      }
    if (i < last) {
      for (int r = 0; r < ROWS; ++r)
        sum[r] = MUTATED("few rows: tail forgotten", some(w[r] + i, x + i, last - i, sum[r]), sum[r]);
      i = last;
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) sums[r] = MUTATED("few rows: naive sum", sums[r], Vector<Wide<T>>{}) + sum[r];
  } while (i < count);
}

template <class T>
struct FewRows {
  const Kind* kind;  // of W's rows; null if they hold T
  const uint8_t* weight;
  int64_t weight_row;  // bytes
  const int64_t* row_ids;
  int64_t outputs, columns;
  const T* x;
  int64_t x_row, rows;
  const T *bias, *residual;
  int64_t residual_row;
  T* y;
  int64_t y_row;

  void operator()(int64_t begin, int64_t end) const {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * SIDE_BY_SIDE;
      for (int64_t row = 0; row < rows; row += MOST_ROWS) {
        const int64_t some = rows - row < MOST_ROWS ? rows - row : MOST_ROWS;
        if (outputs - first >= SIDE_BY_SIDE) {
          some_outputs<SIDE_BY_SIDE>(first, row, some);
        } else {
          for (int64_t output = first; output < outputs; ++output) some_outputs<1>(output, row, some);
        }
      }
    }
  }

  const uint8_t* row_of(int64_t output) const {
    return weight + (row_ids == nullptr ? output : row_ids[output]) * weight_row;
  }

  // Unpack one piece of rows at a time to memory.
  template <int ROWS>
  void sums_by_pieces(int64_t first, int64_t row, int64_t count_of_x, Vector<Wide<T>> (*sums)[ROWS]) const {
    alignas(64) T room[ROWS][PIECE];
    for (int64_t start = 0; start < columns; start += PIECE) {
      const int64_t count = columns - start < PIECE ? columns - start : PIECE;
      const T* w[ROWS];
      for (int r = 0; r < ROWS; ++r) {
        const uint8_t* row = row_of(first + r);
        if (kind == nullptr) {
          w[r] = reinterpret_cast<const T*>(row) + start;
          continue;
        }
        const uint8_t* blocks = row + start / kind->values * kind->bytes;
        for (int64_t line = 0; line < count / kind->values * kind->bytes; line += LINE) fetch_ahead(blocks + line);
        expand(*kind, blocks, count, room[r]);
        w[r] = room[r];
      }
      for (int64_t i = 0; i < count_of_x; ++i) {
        const T* part = x + (row + i) * x_row + start;
        if (row + i == 0 && kind == nullptr) multiply<T, ROWS, true>(w, part, count, sums[i]);
        else multiply<T, ROWS>(w, part, count, sums[i]);
      }
    }
  }

  template <int ROWS>
  void some_outputs(int64_t first, int64_t row, int64_t count_of_x) const {
    typedef Wide<T> C;
    Vector<C> sums[MOST_ROWS][ROWS] = {};
    bool added = false;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == sizeof(bfloat16)) {
      if (rows == 1 && kind != nullptr) {
        const uint8_t* w[ROWS];
        for (int r = 0; r < ROWS; ++r) w[r] = row_of(first + r);
        added = take_block_dots<ROWS>(kind->type, w, columns, x, sums[0]);
      }
    }
#endif
    if (!added) sums_by_pieces<ROWS>(first, row, count_of_x, sums);
    for (int64_t i = 0; i < count_of_x; ++i)
      for (int r = 0; r < ROWS; ++r) {
        C value = sum_of<C>(sums[i][r]);
        if (bias != nullptr) value += widened(MUTATED("few rows: bias of the first output", bias[first + r], bias[0]));
        if (residual != nullptr) {
          value += widened(residual[MUTATED("few rows: first residual", row + i, row) * residual_row + first + r]);
        }
        put(y + (row + i) * y_row + first + r, value);
      }
  }
};

}  // namespace
