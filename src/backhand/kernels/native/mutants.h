// Wrong versions of the loops, for the test that shows they are noticed; in any other build only the right ones exist.
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

// The terms' lanes onto the sum's first one, one behind the other.
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
