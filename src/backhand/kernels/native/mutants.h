// Wrong versions of the loops, for the test that shows they are noticed; in any other build only the right ones exist.
//
//     along = MUTATED("rms_norm: projection missing", sum / n, 0)
#pragma once

#include "common.h"

#ifdef BACKHAND_MUTANTS
extern uint32_t backhand_mutant;

namespace {
constexpr uint32_t name_hash(const char* name) {
  uint32_t hash = 2166136261u;
  for (; *name; ++name) hash = (hash ^ static_cast<uint8_t>(*name)) * 16777619u;
  return hash;
}
}  // namespace

#define MUTATED(name, right, wrong) (backhand_mutant == name_hash(name) ? (wrong) : (right))
#else
#define MUTATED(name, right, wrong) (right)
#endif
