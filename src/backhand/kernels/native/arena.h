// Working memory of a loop.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace {

// Pieces of one allocation, each on a cache line of its own.
class Arena {
 public:
  explicit Arena(size_t bytes) : data_(static_cast<char*>(std::malloc(bytes + 64))), bytes_(bytes) {}
  ~Arena() { std::free(data_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  bool there() const { return data_ != nullptr; }
  void clear() { used_ = 0; }
  template <class T>
  T* take(int64_t count) {
    char* base = data_ + (64 - reinterpret_cast<uintptr_t>(data_) % 64) % 64;
    T* piece = reinterpret_cast<T*>(base + used_);
    used_ += static_cast<size_t>((count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64);
    return used_ <= bytes_ ? piece : nullptr;
  }

 private:
  char* data_;
  size_t bytes_, used_ = 0;
};

}  // namespace
