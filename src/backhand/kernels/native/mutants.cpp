// Which wrong version is in force; in the test's build alone.
#include "mutants.h"

#ifdef BACKHAND_MUTANTS
uint32_t backhand_mutant = 0;

// By its name in the sources; an empty one, or one that is not there, leaves every loop right.
BACKHAND_EXPORT void backhand_set_mutant(const char* name) { backhand_mutant = *name ? name_hash(name) : 0; }
#endif
