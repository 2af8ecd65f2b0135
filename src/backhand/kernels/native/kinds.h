// The types of stored matrices, and the conversion of whole blocks to numbers. The table is in dequantize.cpp.
#pragma once

#include <algorithm>

#include "common.h"

struct Kind {
  int type;  // ggml's number
  int64_t values, bytes;  // of a block
  void (*to_float32)(const uint8_t* source, int64_t blocks, float* out);
  void (*to_bfloat16)(const uint8_t* source, int64_t blocks, bfloat16* out);
};

// Null for an unknown type.
const Kind* kind_of(int type);

namespace {

// Whole blocks as numbers of any storage type.
inline void expand(const Kind& kind, const uint8_t* source, int64_t values, float* out) {
  kind.to_float32(source, values / kind.values, out);
}
inline void expand(const Kind& kind, const uint8_t* source, int64_t values, bfloat16* out) {
  kind.to_bfloat16(source, values / kind.values, out);
}
inline void expand(const Kind& kind, const uint8_t* source, int64_t values, double* out) {
  constexpr int64_t AT_ONCE = 256;  // whole blocks of every type
  float narrow[AT_ONCE];
  for (int64_t i = 0; i < values; i += AT_ONCE) {
    const int64_t count = std::min(AT_ONCE, values - i);
    kind.to_float32(source + i / kind.values * kind.bytes, count / kind.values, narrow);
    for (int64_t j = 0; j < count; ++j) out[i + j] = narrow[j];
  }
}

}  // namespace
