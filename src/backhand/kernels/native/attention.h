// What attention's passes share: its problem, and rows of heads as the products take them; see attention.cpp.
#pragma once

#include <algorithm>

#include "arena.h"
#include "causal_products.h"
#include "heads.h"
#include "segments.h"

namespace {

struct Shape {
  Segments segments;
  int64_t heads, kv_heads, head_dim, window;
  double scaling;
  const double* sinks;  // of each head one more term of the softmax's sum, whose key has no value; or null
  int64_t group() const { return heads / kv_heads; }
  int64_t width() const { return rounded_up(head_dim, SIDE); }
};

// One segment: queries at positions before … before + length - 1; key j is the token earlier[j], or start + j - before.
struct Document {
  int64_t start, length, before;
  const int64_t* earlier;
  int64_t keys() const { return before + length; }
  int64_t token(int64_t key) const { return key < before ? earlier[key] : start + key - before; }
};

// Every segment with the tokens before it.
class Documents {
 public:
  explicit Documents(const Segments& segments)
      : segments_(segments), ends_(segments.count, 0), reach_(segments.count, 0) {
    for (int64_t i = 0; i < segments.count; ++i) {
      const int64_t parent = segments.parent(i), length = segments.length(i);
      const int64_t before = parent < 0 ? 0 : reach_[parent];
      longest_ = std::max(longest_, before + length);
      reach_[i] = before + length;
      if (!segments.continued(i)) continue;
      // The parent's tokens, then its own, for those that continue it.
      for (int64_t j = 0; j < before; ++j) tokens_.push_back(tokens_[ends_[parent] - before + j]);
      for (int64_t j = 0; j < length; ++j) tokens_.push_back(segments.start(i) + j);
      ends_[i] = tokens_.size();
    }
  }
  Document operator[](int64_t i) const {
    const int64_t parent = segments_.parent(i), start = segments_.start(i), length = segments_.length(i);
    if (parent < 0) return {start, length, 0, nullptr};
    return {start, length, reach_[parent], tokens_.data() + ends_[parent] - reach_[parent]};
  }
  int64_t longest() const { return longest_; }

 private:
  Segments segments_;
  List<int64_t> tokens_, ends_, reach_;  // paths behind one another; of each segment the end of its path, and its tokens
  int64_t longest_ = 0;
};

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
