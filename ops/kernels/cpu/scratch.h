// Memory that a thread keeps from one call to the next.

#ifndef LISSOM_SCRATCH_H_
#define LISSOM_SCRATCH_H_

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

namespace lissom {

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

class Scratch {
 public:
  ~Scratch() { free(data_); }

  // Null if there is none. What was reserved before is lost.
  uint8_t* reserve(size_t bytes) {
    if (bytes > size_) {
      free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<uint8_t*>(aligned_alloc(64, size_));
      if (data_ == nullptr) size_ = 0;
    }
    return data_;
  }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace lissom

#endif  // LISSOM_SCRATCH_H_
