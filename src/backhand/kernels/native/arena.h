// Working memory of a kernel.
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

// Consecutive numbers or structs of them: a std::vector that needs no C++ library at run time.
template <class T>
class List {
 public:
  List() = default;
  List(int64_t count, T value) {
    for (int64_t i = 0; i < count; ++i) push_back(value);
  }
  ~List() { std::free(data_); }
  List(const List&) = delete;
  List& operator=(const List&) = delete;
  T& operator[](int64_t i) const { return data_[i]; }
  T* data() const { return data_; }
  int64_t size() const { return size_; }
  void push_back(T value) {
    if (size_ == room_) {
      room_ = room_ * 2 + 64;
      data_ = static_cast<T*>(std::realloc(data_, static_cast<size_t>(room_) * sizeof(T)));
      if (data_ == nullptr) std::abort();  // a few numbers for each segment or token
    }
    data_[size_++] = value;
  }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0, room_ = 0;
};

}  // namespace
