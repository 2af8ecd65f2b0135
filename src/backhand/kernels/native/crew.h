// Threads that go through a sequence of phases together, without going to sleep between them.
//
// A token's forward has hundreds of short phases, each of which needs all of the one before. A region of threads for each
// would put threads to sleep and wake them hundreds of times, which costs more than the work. Here every thread enters
// once and runs the same sequence; of each phase the tasks are taken one by one by whoever is there, and nobody goes on
// before all of them are done. One thread alone does everything, another one that comes late finds phases done and goes
// through: so that it is no matter whether, when and how many threads really come.
//
// A task's results may depend on its number alone, and what lies between phases is the same for every thread and writes
// nothing that others see.
#pragma once

#include <atomic>
#include <new>

#include "common.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(_WIN32)
extern "C" __declspec(dllimport) int SwitchToThread();
#else
#include <sched.h>
#endif

namespace {

// To another thread or program that has work: C's, since nothing else here calls a C++ library.
inline void give_way() {
#if defined(_WIN32)
  SwitchToThread();
#else
  sched_yield();
#endif
}

struct alignas(64) Phase {
  std::atomic<int64_t> taken{0}, done{0};
};

// One thread's way through the phases; all of a crew have the same `phases`, which begin with zeros.
class Worker {
 public:
  explicit Worker(Phase* phases) : next_(phases) {}

  // task(i) for i in [0, count), once each; everything that any of them wrote is there when this returns.
  template <class Task>
  void phase(int64_t count, const Task& task) {
    Phase& phase = *next_++;
    for (;;) {
      const int64_t i = phase.taken.fetch_add(1, std::memory_order_relaxed);
      if (i >= count) break;
      task(i);
      phase.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; phase.done.load(std::memory_order_acquire) < count; ++spins) {
      if (spins < MOST_SPINS) relax();
      else give_way();  // another program has the other thread's core
    }
  }

 private:
  static constexpr int MOST_SPINS = 2000;

  static void relax() {
#if defined(__SSE2__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  Phase* next_;
};

}  // namespace
