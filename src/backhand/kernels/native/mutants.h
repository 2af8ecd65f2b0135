// Wrong versions of the kernels, for the test that shows they are noticed; other builds contain only the right ones.
//
//     along = MUTATED("rms_norm: projection missing", sum / n, 0)
#pragma once

#include "vectors.h"

#ifdef BACKHAND_MUTANTS
extern uint32_t backhand_mutant;

namespace {
constexpr uint32_t name_hash(const char* name) {
  uint32_t hash = 2166136261u;
  for (; *name; ++name) hash = (hash ^ static_cast<uint8_t>(*name)) * 16777619u;
  return hash;
}

// Add the lanes of `terms` to the first lane of the sum, one after another.
template <class V>
inline V one_by_one(V sum, V terms) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(terms[0]); ++i) sum[0] += terms[i];
  return sum;
}
}  // namespace

#define MUTATED(name, right, wrong) (backhand_mutant == name_hash(name) ? (wrong) : (right))
#else
#define MUTATED(name, right, wrong) (right)
#endif
