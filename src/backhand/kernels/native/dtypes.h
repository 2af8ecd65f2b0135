// The storage types of loops over tensors, by number: as kernels/library.py gives them.
#pragma once

#include "common.h"

enum : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT64 = 2 };

// The block, with `name` standing for the type of that number. A test's build may have float or double alone, and ends
// the process for another one.
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
