// The storage types of kernels over tensors, by the numbers in kernels/library.py.
#pragma once

#include "common.h"

enum : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT64 = 2 };

// Run the block with `name` as the type of that number. A test's build may support only float or double, and ends the
// process for another type.
#ifdef BACKHAND_ONE_DTYPE
#define BY_DTYPE(dtype, name, ...)                                      \
  do {                                                                  \
    typedef BACKHAND_ONE_DTYPE name;                                    \
    if ((dtype) != (sizeof(name) == 8 ? FLOAT64 : FLOAT32)) __builtin_trap(); \
    __VA_ARGS__                                                         \
  } while (0)
#else
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
#endif
