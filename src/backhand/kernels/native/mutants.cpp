// The wrong version that is in force, in the test's build only.
#include "mutants.h"

#ifdef BACKHAND_MUTANTS
uint32_t backhand_mutant = 0;

// Select a version by its name in the sources; an empty or unknown name leaves every kernel right.
BACKHAND_EXPORT void backhand_set_mutant(const char* name) { backhand_mutant = *name ? name_hash(name) : 0; }
#endif
