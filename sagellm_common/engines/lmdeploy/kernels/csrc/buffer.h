// Memory for weights and scratch: aligned to a cache line, from huge pages where the system has them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdlib>
#include <new>

namespace sage {

template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t count) { reserve(count); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  // At least `count` elements; what was there is lost when it has to grow. Throws std::bad_alloc.
  void reserve(size_t count) {
    if (count <= count_) return;
    std::free(data_);
    data_ = nullptr;
    count_ = 0;
    constexpr size_t huge = size_t{2} << 20;
    const size_t alignment = count * sizeof(T) >= huge ? huge : 64;
    const size_t bytes = (count * sizeof(T) + alignment - 1) / alignment * alignment;
    data_ = static_cast<T*>(std::aligned_alloc(alignment, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
    if (alignment == huge) madvise(data_, bytes, MADV_HUGEPAGE);
    count_ = count;
  }

  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

}  // namespace sage
