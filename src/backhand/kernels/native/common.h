// Shared by every file of the library: exported names, threads, and bfloat16.
//
// Plain C interface, no headers of Python or torch. Everything here is in an anonymous namespace: each file has its own
// copy, compiled for the instruction set of its shared object.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>

#if defined(_WIN32)
#define BACKHAND_EXPORT extern "C" __declspec(dllexport)
#else
#define BACKHAND_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// torch's own threads. The pointer is passed when the library is loaded (kernels/builds.py); without it every kernel
// runs on the calling thread.
typedef void (*BackhandRange)(int64_t begin, int64_t end, void* context);
typedef int32_t (*BackhandParallelFor)(int64_t begin, int64_t end, int64_t grain, BackhandRange range, void* context);
extern BackhandParallelFor backhand_parallel_for;

namespace {

// Call body(begin, end) on pieces of [0, count), in parallel if there are threads. Only the last piece may be shorter
// than `grain`.
template <class Body>
inline void parallel(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (backhand_parallel_for == nullptr || count <= grain) {
    body(int64_t{0}, count);
    return;
  }
  backhand_parallel_for(
      0, count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Run tasks in parallel; each free thread takes the next one.
template <class Body>
inline void by_turns(int64_t tasks, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel(tasks < 1024 ? tasks : 1024, 1, [&](int64_t, int64_t) { body(next); });
}

typedef uint16_t bfloat16;  // its bits

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float widened(float value) { return value; }
inline float widened(bfloat16 value) { return float_of(static_cast<uint32_t>(value) << 16); }

// Round to nearest, ties to even. A NaN with a payload in its low half only would become an infinity: callers that may
// meet one test for it.
inline bfloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  return static_cast<bfloat16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline void put(float* place, float value) { *place = value; }
inline void put(bfloat16* place, float value) { *place = to_bfloat16(value); }

}  // namespace
