// The library itself: which build it is, what the processor can do, and torch's threads.
#include "common.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

BackhandParallelFor backhand_parallel_for = nullptr;

// A pointer to torch_parallel_for of libtorch_cpu, or null for one thread.
BACKHAND_EXPORT void backhand_set_parallel_for(void* function) {
  backhand_parallel_for = reinterpret_cast<BackhandParallelFor>(function);
}

// The name of the instruction set that this shared object was compiled for.
BACKHAND_EXPORT const char* backhand_instruction_set() { return BACKHAND_ISA; }

#if defined(__x86_64__)
// Linux grants AMX's registers on request, once for the whole process.
static bool may_use_tiles() {
#if defined(__linux__)
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

// Bits of the builds that the processor, and the system's saving of registers, allow: 0 avx2, 1 avx512, 2 avx512bf16, 3
// amx; on ARM, 0 neon_bf16.
BACKHAND_EXPORT uint32_t backhand_processor() {
  uint32_t found = 0;
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  const bool saves = c & bit_OSXSAVE, fma = c & bit_FMA, half = c & bit_F16C, avx = c & bit_AVX;
  if (!saves || !avx) return 0;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  const bool saves_256 = (low & 0x6) == 0x6, saves_512 = (low & 0xe6) == 0xe6;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
  const unsigned wanted = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL | bit_AVX512CD;
  if (saves_256 && fma && half && (b & bit_AVX2)) found |= 1;
  if ((found & 1) && saves_512 && (b & wanted) == wanted) found |= 2;
  const bool tiles = (d & (1u << 22)) && (d & (1u << 24)) && (low & 0x60000) == 0x60000;
  if ((found & 2) && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5))) found |= 4;
  if ((found & 4) && tiles && may_use_tiles()) found |= 8;
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long BF16 = 1ul << 14;  // Linux's HWCAP2_BF16
  if (getauxval(AT_HWCAP2) & BF16) found |= 1;
#elif defined(__aarch64__) && defined(__APPLE__)
  int there = 0;
  size_t bytes = sizeof there;
  if (sysctlbyname("hw.optional.arm.FEAT_BF16", &there, &bytes, nullptr, 0) == 0 && there) found |= 1;
#endif
  return found;
}

// Write count numbers `begin`, begin + 1, … to out on all threads, to test whether kernels run and on which threads.
BACKHAND_EXPORT void backhand_count(int64_t* out, int64_t count, int64_t begin, int64_t grain) {
  parallel(count, grain, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) out[i] = begin + i;
  });
}
