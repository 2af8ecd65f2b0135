// Shared by the passes of attention: the problem, and rows of heads in the layout of the products; see attention.cpp.
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
  const double* sinks;  // per head, an additional term of the softmax's sum, whose key has no value; or null
  bool causal = true;   // false if a query also sees the keys after it, as far as the window reaches before it
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
      // For segments that continue it: the parent's tokens, then its own.
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
  List<int64_t> tokens_, ends_, reach_;  // the paths of all segments; each segment's end of its path, and its tokens
  int64_t longest_ = 0;
};

// Keys are padded to a multiple of this with zeros.
constexpr int64_t KEYS = 32;
constexpr int64_t LONG = 2048, MOST_QUERIES = 64;

// Queries per block: fewer if the scores of a block with all its keys would not stay in the cache.
inline int64_t block_of(int64_t keys) { return keys <= LONG ? MOST_QUERIES : 32; }

// Keys that the forward, and the backward with ℓ, take at a time, so that all that is computed of a block with a piece
// stays in the second-level cache. Pieces begin at multiples of these numbers.
constexpr int64_t KEYS_A_PIECE = 1024, KEYS_A_BACKWARD_PIECE = 256;

// Keys per partial sum, which is then added to the sum of the previous ones.
constexpr int64_t KEYS_A_SUM = 128;

// The keys low … high - 1 that the queries first … first + count - 1 (positions) may see; both are multiples of `KEYS`.
// For causal_products.h, the block's first query sees the keys up to `diagonal`, and each query one more than the one
// before. In both directions the diagonal is after all keys, so that no product leaves anything out.
struct Range {
  int64_t low, high, diagonal;
};
constexpr int64_t AFTER_ALL_KEYS = int64_t{1} << 40;
inline Range seen(const Shape& shape, int64_t keys, int64_t first, int64_t count) {
  const int64_t low = std::max<int64_t>(0, first - shape.window + 1) / KEYS * KEYS;
  if (shape.causal) return {low, rounded_up(first + count, KEYS), first - low};
  const int64_t high = rounded_up(std::min(keys, first + count - 1 + shape.window), KEYS);
  return {low, high, AFTER_ALL_KEYS};
}

// The end of the keys that a query at this position sees.
inline int64_t seen_end(const Shape& shape, int64_t keys, int64_t position) {
  return shape.causal ? position + 1 : std::min(keys, position + shape.window);
}

// Rows of a head are as far apart as tokens, mostly on different pages, which the processor does not prefetch. Each row
// is prefetched into the second-level cache this many rows before it is read.
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
      // One cache line at a time: for so few bytes a function call costs more than the copy.
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

// Convert rows (count, columns) to units along the row index, in `spare`, unless they have that layout already.
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
