// Threads that go through a sequence of phases together without going to sleep between them.
//
// A token's forward has hundreds of short phases, each of which needs the results of the one before. One parallel
// region per phase would put threads to sleep and wake them hundreds of times, which costs more than the work. Here
// every thread enters once and runs the same sequence. The tasks of a phase are taken one by one, and no thread
// continues before all of them are done. A single thread does everything; a thread that arrives late finds phases done
// and passes through them. The result therefore does not depend on whether, when and how many threads arrive.
//
// A task's results may depend on its number only. Code between phases is the same for every thread and writes nothing
// that other threads see.
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

// Yield to another thread or program by C's functions, since nothing else here calls a C++ library.
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

// One thread's position in the phases. All threads of a crew share `phases`, which start as zeros.
class Worker {
 public:
  explicit Worker(Phase* phases) : next_(phases) {}

  // Run task(i) once for each i in [0, count); everything that any of them wrote is visible when this returns.
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
