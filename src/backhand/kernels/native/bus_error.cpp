// If a mapped file is cut short, or its disk fails, the next read of the missing page is a SIGBUS, in any kernel,
// library and thread. This table records which addresses belong to which file, and the handler ends the process with
// that file's message. It uses only the stack and the table.
#include "common.h"

#if defined(_WIN32)

// Windows has no such signal, and prevents a mapped file from being cut: nothing is watched.
BACKHAND_EXPORT int backhand_watch_mapping(const void*, int64_t, int, const char*, const char*) { return -1; }
BACKHAND_EXPORT void backhand_forget_mapping(int) {}

#else

#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>

namespace {

struct Mapping {
  std::atomic<uintptr_t> begin;  // 0: a free place
  uintptr_t end;
  int descriptor;
  const char *cut_short, *unreadable;  // complete messages
};

constexpr int kPlaces = 1024, kExitCode = 4;  // the code of an ArtifactError
Mapping mappings[kPlaces];
struct sigaction before;
bool installed = false;

// Not repeated after a write has failed, since the failure cannot be reported.
void say(const char* text) {
  size_t length = 0;
  while (text[length] != 0) ++length;
  while (length > 0) {
    const ssize_t written = write(2, text, length);
    if (written <= 0) return;
    text += written, length -= static_cast<size_t>(written);
  }
}

void on_bus_error(int number, siginfo_t* info, void* context) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(info->si_addr);
  for (const Mapping& mapping : mappings) {
    const uintptr_t begin = mapping.begin.load(std::memory_order_acquire);
    if (begin == 0 || address < begin || address >= mapping.end) continue;
    struct stat now;
    const bool shorter =
        fstat(mapping.descriptor, &now) == 0 && static_cast<uintptr_t>(now.st_size) < mapping.end - begin;
    say(shorter ? mapping.cut_short : mapping.unreadable);
    _exit(kExitCode);
  }
  // The address belongs to no watched file: the previous handler decides.
  if (before.sa_flags & SA_SIGINFO) {
    before.sa_sigaction(number, info, context);
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(number);
  } else {
    sigaction(number, &before, nullptr);  // and the access is repeated
  }
}

bool install() {
  if (installed) return true;
  struct sigaction wanted = {};
  wanted.sa_sigaction = on_bus_error;
  wanted.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigemptyset(&wanted.sa_mask);
  installed = sigaction(SIGBUS, &wanted, &before) == 0;
  return installed;
}

}  // namespace

// Watch the `length` bytes from `address`: a bus error there writes `cut_short` to standard error if the file of
// `descriptor` has become shorter, else `unreadable`, and ends the process with exit code 4.
//
// Both texts and the descriptor must last until `backhand_forget_mapping`. Returns the mapping's index, or -1 if the
// table is full or the system refuses the handler. Must be called by one thread at a time, and not by a handler.
BACKHAND_EXPORT int backhand_watch_mapping(const void* address, int64_t length, int descriptor, const char* cut_short,
                                           const char* unreadable) {
  if (!install()) return -1;
  for (int place = 0; place < kPlaces; ++place) {
    Mapping& mapping = mappings[place];
    if (mapping.begin.load(std::memory_order_relaxed) != 0) continue;
    mapping.end = reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(length);
    mapping.descriptor = descriptor, mapping.cut_short = cut_short, mapping.unreadable = unreadable;
    mapping.begin.store(reinterpret_cast<uintptr_t>(address), std::memory_order_release);
    return place;
  }
  return -1;
}

BACKHAND_EXPORT void backhand_forget_mapping(int place) {
  mappings[place].begin.store(0, std::memory_order_release);
}

#endif
