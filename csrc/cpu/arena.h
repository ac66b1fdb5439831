// One thread's memory, carved into tiles.
#pragma once

#include <cstdlib>
#include <new>
#include <utility>

#include "core/config.h"

namespace flashx::FLASHX_ISA {

// Memory for one kernel object. The last buffer of a thread is kept for its next call, since getting a fresh one costs
// more than a short attention does. Contents are whatever was there: whoever takes memory writes it first.
class Arena {
 public:
  static constexpr size_t kAlign = 64;

  explicit Arena(size_t bytes) : buffer_(std::exchange(kept(), Buffer{})) {
    if (buffer_.size < bytes) buffer_ = Buffer(bytes);
    next_ = buffer_.data, left_ = buffer_.size;
  }
  ~Arena() { kept() = std::move(buffer_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // Uninitialised memory for `count` elements.
  template <typename T>
  T* take(int64_t count) {
    const size_t bytes = round_up(count * static_cast<int64_t>(sizeof(T)), kAlign);
    if (bytes > left_) throw std::bad_alloc();
    T* p = reinterpret_cast<T*>(next_);
    next_ += bytes, left_ -= bytes;
    return p;
  }

 private:
  struct Buffer {
    char* data = nullptr;
    size_t size = 0;

    Buffer() = default;
    explicit Buffer(size_t bytes)
        : data(static_cast<char*>(::operator new(bytes, std::align_val_t{kAlign}))), size(bytes) {}
    Buffer(Buffer&& other) noexcept : data(std::exchange(other.data, nullptr)), size(std::exchange(other.size, 0)) {}
    Buffer& operator=(Buffer&& other) noexcept {
      std::swap(data, other.data);
      std::swap(size, other.size);
      return *this;
    }
    ~Buffer() {
      if (data) ::operator delete(data, std::align_val_t{kAlign});
    }
  };

  static Buffer& kept() {
    thread_local Buffer buffer;
    return buffer;
  }

  Buffer buffer_;
  char* next_;
  size_t left_;
};

}  // namespace flashx::FLASHX_ISA
