// malloc for a process whose memory another one shall see: LD_PRELOAD, one shared file, mapped at the same place in both.
//
// Blocks are powers of two, and what is freed goes to a list of its size. No program should live with it for long.
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { HEAD = 64, SIZES = 48 };

typedef struct Block {
  struct Block* next;  // of those that are free
  uint64_t size;       // its power of two
} Block;

static char *next, *end;
static Block* free_blocks[SIZES];
static int lock;

static void begin(void) {
  const char *path = getenv("BACKHAND_ARENA"), *place = getenv("BACKHAND_ARENA_PLACE");
  const int file = path && place ? open(path, O_RDWR | O_CLOEXEC) : -1;
  if (file < 0) _exit(70);
  const off_t bytes = lseek(file, 0, SEEK_END);
  char* wanted = (char*)strtoull(place, NULL, 16);
  next = mmap(wanted, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE | MAP_FIXED_NOREPLACE, file, 0);
  if (next != wanted) _exit(71);
  end = next + bytes;
}

// A program that this one starts has memory of its own.
__attribute__((constructor)) static void alone(void) { unsetenv("LD_PRELOAD"); }

static Block* block_of(void* place) { return ((Block**)place)[-1]; }

static void* aligned(size_t alignment, size_t bytes) {
  uint64_t size = 7;
  const size_t needed = bytes + HEAD + (alignment > HEAD ? alignment : 0);
  if (needed < bytes || needed >> (SIZES - 1)) {
    errno = ENOMEM;
    return NULL;
  }
  while (((size_t)1 << size) < needed) ++size;
  while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE)) {
  }
  if (!next) begin();
  Block* block = free_blocks[size];
  if (block) {
    free_blocks[size] = block->next;
  } else if ((size_t)(end - next) >= (size_t)1 << size) {
    block = (Block*)next;
    next += (size_t)1 << size;
    block->size = size;
  }
  __atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
  if (!block) {
    errno = ENOMEM;
    return NULL;
  }
  char* place = (char*)block + HEAD;
  if (alignment > HEAD) place = (char*)(((uintptr_t)place + alignment - 1) & ~(uintptr_t)(alignment - 1));
  ((Block**)place)[-1] = block;
  return place;
}

void* malloc(size_t bytes) { return aligned(HEAD, bytes); }
void* memalign(size_t alignment, size_t bytes) { return aligned(alignment, bytes); }
void* aligned_alloc(size_t alignment, size_t bytes) { return aligned(alignment, bytes); }
void* valloc(size_t bytes) { return aligned(4096, bytes); }

int posix_memalign(void** place, size_t alignment, size_t bytes) {
  *place = aligned(alignment, bytes);
  return *place ? 0 : ENOMEM;
}

void free(void* place) {
  if (!place) return;
  Block* block = block_of(place);
  while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE)) {
  }
  block->next = free_blocks[block->size];
  free_blocks[block->size] = block;
  __atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
}

size_t malloc_usable_size(void* place) {
  return place ? (size_t)((char*)block_of(place) + ((size_t)1 << block_of(place)->size) - (char*)place) : 0;
}

void* calloc(size_t count, size_t bytes) {
  size_t all;
  if (__builtin_mul_overflow(count, bytes, &all)) return NULL;
  void* place = malloc(all);
  return place ? memset(place, 0, all) : NULL;
}

void* realloc(void* place, size_t bytes) {
  const size_t there = malloc_usable_size(place);
  if (place && bytes <= there) return place;
  void* moved = malloc(bytes);
  if (moved && place) memcpy(moved, place, there), free(place);
  return moved;
}

void* reallocarray(void* place, size_t count, size_t bytes) {
  size_t all;
  return __builtin_mul_overflow(count, bytes, &all) ? NULL : realloc(place, all);
}
