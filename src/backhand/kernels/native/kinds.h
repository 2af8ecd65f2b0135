// The types of stored matrices, and how a run of whole blocks of each becomes numbers. The table is in dequantize.cpp.
#pragma once

#include "common.h"

struct Kind {
  int type;  // ggml's number
  int64_t values, bytes;  // of a block
  void (*to_float32)(const uint8_t* source, int64_t blocks, float* out);
  void (*to_bfloat16)(const uint8_t* source, int64_t blocks, bfloat16* out);
};

// Null for a type that is not known.
const Kind* kind_of(int type);
