// What attention's passes share: its problem, and rows of heads as the products take them; see attention.cpp.
#pragma once

#include <algorithm>

#include "causal_products.h"
#include "heads.h"

namespace {

struct Shape {
  const int64_t *starts, *lengths;  // of the documents; the shared prefix is none of them
  int64_t documents, shared, heads, kv_heads, head_dim, window;
  double scaling;
  const double* sinks;  // of each head one more term of the softmax's sum, whose key has no value; or null
  int64_t group() const { return heads / kv_heads; }
  int64_t width() const { return rounded_up(head_dim, SIDE); }
};

// One document: queries at positions before … before + length - 1; key j is token j, or start + j - before.
struct Document {
  int64_t start, length, before;
  int64_t keys() const { return before + length; }
  int64_t token(int64_t key) const { return key < before ? key : start + key - before; }
};

inline Document document(const Shape& shape, int64_t index) {
  if (index < 0) return {0, shape.shared, 0};
  return {shape.starts[index], shape.lengths[index], shape.shared};
}

// Keys are padded to a multiple of this with zeros.
constexpr int64_t KEYS = 32;
constexpr int64_t LONG = 2048;

// Queries of a block: fewer where a block's scores would not stay in the cache.
inline int64_t block_of(int64_t keys) { return keys <= LONG ? 64 : 32; }

// So many keys are added up before what they come to is added to what others have come to.
constexpr int64_t KEYS_A_SUM = 128;

// What the queries first … first + count - 1 (positions) may see: keys low … high - 1, both multiples of `KEYS`.
struct Range {
  int64_t low, high;
};
inline Range seen(const Shape& shape, int64_t first, int64_t count) {
  const int64_t low = std::max<int64_t>(0, first - shape.window + 1);
  return {low / KEYS * KEYS, rounded_up(first + count, KEYS)};
}

// Rows of a head lie as far apart as tokens, mostly in pages of their own, where the processor guesses nothing: each is
// asked for, into the second-level cache, so many rows before its turn.
constexpr int64_t ROWS_AHEAD = 4;

// count rows of one head, widened or kept, with zeros up to (padded, width).
template <class Op, class T>
inline void pack_rows(Heads<const T> x, int64_t head, const Document& doc, int64_t first, int64_t count, int64_t padded,
                      int64_t head_dim, int64_t width, typename Op::Element* rows) {
  typedef typename Op::Element E;
  constexpr int64_t STEP = LINE / sizeof(T);
  for (int64_t i = 0; i < count; ++i) {
    const T* from = x.at(doc.token(first + i), head);
    E* to = rows + i * width;
    if (i + ROWS_AHEAD < count) {
      const T* later = x.at(doc.token(first + i + ROWS_AHEAD), head);
      for (int64_t j = 0; j < head_dim; j += STEP) __builtin_prefetch(later + j, 0, 2);
    }
    if constexpr (sizeof(E) == sizeof(T)) {
      // A line at a time: for so few bytes a call of a function costs more than it copies.
      int64_t j = 0;
      for (; j + STEP <= head_dim; j += STEP) std::memcpy(to + j, from + j, LINE);
      if (j < head_dim) std::memcpy(to + j, from + j, static_cast<size_t>(head_dim - j) * sizeof(T));
    } else {
      for (int64_t j = 0; j < head_dim; ++j) to[j] = widened(from[j]);
    }
    std::fill(to + head_dim, to + width, E(0));
  }
  std::fill(rows + count * width, rows + padded * width, E(0));
}

// Rows (count, columns) as units along the rows' own number, where they are not that already: in `spare`.
template <class Op>
inline const typename Op::Unit* by_places(const typename Op::Element* rows, int64_t columns, int64_t count,
                                          typename Op::Unit* spare) {
  if constexpr (Op::PACK == 1) {
    return rows;
  } else {
    interleave<Op>(rows, columns, count, columns, spare, columns);
    return spare;
  }
}

}  // namespace
