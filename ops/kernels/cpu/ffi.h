// What the functions that XLA calls have in common.

#ifndef LISSOM_FFI_H_
#define LISSOM_FFI_H_

#include <algorithm>

#include "instruction_sets.h"
#include "workers.h"
#include "xla/ffi/api/ffi.h"

#define LISSOM_EXPORT extern "C" __attribute__((visibility("default")))

namespace lissom {

namespace ffi = xla::ffi;

extern int selected;  // the instruction set that calls without an override use

class PoolScheduler final : public Scheduler {
 public:
  explicit PoolScheduler(ffi::ThreadPool* pool) : pool_(pool) {}
  void schedule(void (*work)()) override { pool_->Schedule([work] { work(); }); }

 private:
  ffi::ThreadPool* pool_;
};

inline ffi::Error refuse(const char* what) { return ffi::Error::InvalidArgument(what); }

inline bool is_float(ffi::AnyBuffer a) {
  return a.element_type() == ffi::F32 || a.element_type() == ffi::BF16;
}

inline const Kernels* choose(int64_t instruction_set) {
  const int64_t chosen = instruction_set < 0 ? selected : instruction_set;
  const bool usable =
      chosen < instruction_set_count() && instruction_sets()[chosen]->supported();
  return usable ? instruction_sets()[chosen] : nullptr;
}

inline ffi::Error lacking() { return refuse("lissom: this machine lacks that instruction set"); }

inline int64_t thread_count(const ffi::ThreadPool& pool, int64_t asked) {
  return asked > 0 ? asked : std::max<int64_t>(1, pool.num_threads());
}

}  // namespace lissom

#endif  // LISSOM_FFI_H_
