// Rotary embedding as a kernel; see rotary.h.
#include "rotary.h"

// Heads of 2 · half numbers, rotated by angles (tokens, half); with `back` by minus the angles.
BACKHAND_EXPORT void backhand_rotary(int dtype, const void* x, int64_t x_token, int64_t x_head, void* y,
                                     int64_t y_token, int64_t y_head, const void* cosines, const void* sines,
                                     int64_t tokens, int64_t heads, int64_t half, int back) {
  BY_DTYPE(dtype, T, {
    rotate(static_cast<const T*>(x), x_token, x_head, static_cast<T*>(y), y_token, y_head,
           static_cast<const Wide<T>*>(cosines), static_cast<const Wide<T>*>(sines), tokens, heads, half, back != 0);
  });
}
