// Documents in segments: each segment continues its parent, and documents that begin alike share their first segments.
#pragma once

#include <cstdint>

namespace {

// Starts, lengths and parents (-1 for none) of the segments. A parent precedes the segments that continue it; between
// them there are only others that continue it, directly or not.
struct Segments {
  const int64_t* table;
  int64_t count;
  int64_t start(int64_t i) const { return table[i]; }
  int64_t length(int64_t i) const { return table[count + i]; }
  int64_t parent(int64_t i) const { return table[2 * count + i]; }
  bool continued(int64_t i) const { return i + 1 < count && parent(i + 1) == i; }
  // Tokens before the segment in its documents.
  int64_t before(int64_t i) const {
    int64_t tokens = 0;
    for (int64_t p = parent(i); p >= 0; p = parent(p)) tokens += length(p);
    return tokens;
  }
  // The end of the tree that begins with segment i.
  int64_t tree_end(int64_t i) const {
    for (++i; i < count && parent(i) >= 0;) ++i;
    return i;
  }
};

}  // namespace
