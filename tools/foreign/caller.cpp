// Opens a library of kernels and calls its functions for another process, whose memory it has mapped at the same place.
//
//     caller LIBRARY ARENA PLACE        requests on standard input, results on standard output, until the input ends
//
// For Linux and Windows, to be run where the library belongs, or under an emulator of that.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(_WIN32)
#include <fcntl.h>
#include <io.h>
#include <windows.h>
#else
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

struct Request {
  char name[56];
  uint64_t doubles;  // a bit for each value that is one
  int64_t values[64];
};

static void* opened(const char* path) {
#if defined(_WIN32)
  return reinterpret_cast<void*>(LoadLibraryA(path));
#else
  return dlopen(path, RTLD_NOW);
#endif
}

static void* function_of(void* library, const char* name) {
#if defined(_WIN32)
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
#else
  return dlsym(library, name);
#endif
}

static bool map_arena(const char* path, void* place) {
#if defined(_WIN32)
  const HANDLE file = CreateFileA(path, GENERIC_READ | GENERIC_WRITE, FILE_SHARE_READ | FILE_SHARE_WRITE, nullptr,
                                  OPEN_EXISTING, 0, nullptr);
  const HANDLE mapping = CreateFileMappingA(file, nullptr, PAGE_READWRITE, 0, 0, nullptr);
  return MapViewOfFileEx(mapping, FILE_MAP_ALL_ACCESS, 0, 0, 0, place) == place;
#else
  const int file = open(path, O_RDWR);
  const off_t bytes = lseek(file, 0, SEEK_END);
  return mmap(place, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED, file,
              0) == place;
#endif
}

#define EIGHT(v, i) v[i], v[i + 1], v[i + 2], v[i + 3], v[i + 4], v[i + 5], v[i + 6], v[i + 7]
#define ALL(v) EIGHT(v, 0), EIGHT(v, 8), EIGHT(v, 16), EIGHT(v, 24), EIGHT(v, 32), EIGHT(v, 40), EIGHT(v, 48), EIGHT(v, 56)
#define FOUR_TYPES int64_t, int64_t, int64_t, int64_t
#define SIXTEEN FOUR_TYPES, FOUR_TYPES, FOUR_TYPES, FOUR_TYPES

// More arguments than a function takes do no harm: they are where it does not look.
static int64_t call(void* function, const Request& request) {
#if defined(_WIN32)
  // Every value in its turn; a double's bits from the fifth on, which lie on the stack.
  typedef int64_t (*Function)(SIXTEEN, SIXTEEN, SIXTEEN, SIXTEEN);
  return reinterpret_cast<Function>(function)(ALL(request.values));
#else
  // Doubles have registers of their own, and do not count among the others.
  typedef int64_t (*Function)(SIXTEEN, SIXTEEN, SIXTEEN, SIXTEEN, double, double, double, double);
  int64_t values[64] = {};
  double doubles[4] = {};
  int integers = 0, found = 0;
  for (int i = 0; i < 64; ++i) {
    if (request.doubles >> i & 1) std::memcpy(&doubles[found++ & 3], &request.values[i], 8);
    else values[integers++] = request.values[i];
  }
  return reinterpret_cast<Function>(function)(ALL(values), doubles[0], doubles[1], doubles[2], doubles[3]);
#endif
}

int main(int count, char** arguments) {
  if (count != 4) return 2;
#if defined(_WIN32)
  _setmode(_fileno(stdin), _O_BINARY);
  _setmode(_fileno(stdout), _O_BINARY);
#endif
  void* library = opened(arguments[1]);
  if (library == nullptr) return std::fprintf(stderr, "cannot open %s\n", arguments[1]), 3;
  if (!map_arena(arguments[2], reinterpret_cast<void*>(std::strtoull(arguments[3], nullptr, 16))))
    return std::fprintf(stderr, "cannot map %s at %s\n", arguments[2], arguments[3]), 4;
  Request request;
  while (std::fread(&request, sizeof request, 1, stdin) == 1) {
    void* function = function_of(library, request.name);
    if (function == nullptr) return std::fprintf(stderr, "no function %s\n", request.name), 5;
    const int64_t result = call(function, request);
    if (std::fwrite(&result, sizeof result, 1, stdout) != 1 || std::fflush(stdout) != 0) return 6;
  }
  return 0;
}
