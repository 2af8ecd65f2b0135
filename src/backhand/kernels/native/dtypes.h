// The storage types of loops over tensors, by number: as kernels/library.py gives them.
#pragma once

#include "common.h"

enum : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT64 = 2 };

// The block, with `name` standing for the type of that number.
#define BY_DTYPE(dtype, name, ...)   \
  do {                               \
    if ((dtype) == BFLOAT16) {       \
      typedef bfloat16 name;         \
      __VA_ARGS__                    \
    } else if ((dtype) == FLOAT32) { \
      typedef float name;            \
      __VA_ARGS__                    \
    } else {                         \
      typedef double name;           \
      __VA_ARGS__                    \
    }                                \
  } while (0)
