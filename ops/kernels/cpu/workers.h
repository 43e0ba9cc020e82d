// Shares the parts of one product out among the threads of XLA's pool.
//
// A decode step has hundreds of products of a few microseconds each, and waking a sleeping thread
// costs more than that. So a worker that has run out of parts stays for a moment, and looks for the
// next product's. The caller takes parts too and never waits for a worker to begin: one that comes
// late finds nothing left. There is one team for all; a second caller at the same time works alone.

#ifndef LISSOM_WORKERS_H_
#define LISSOM_WORKERS_H_

#include <stdint.h>

#include <type_traits>

namespace lissom {

// Hands a function to another thread.
class Scheduler {
 public:
  virtual void schedule(void (*work)()) = 0;

 protected:
  ~Scheduler() = default;
};

class Workers {
 public:
  // `threads` counts the caller; with one, or without a scheduler, nothing else runs.
  Workers(Scheduler* scheduler, int64_t threads) : scheduler_(scheduler), threads_(threads) {}

  int64_t count() const { return scheduler_ == nullptr ? 1 : threads_; }

  // Calls fn(i) for every i below `parts`, on at most `threads` threads.
  template <class F>
  void run(int64_t parts, int64_t threads, F&& fn) {
    const auto call = [](void* f, int64_t i) { (*static_cast<std::remove_reference_t<F>*>(f))(i); };
    if (threads <= 1 || count() <= 1 || parts <= 1 || !share(parts, call, &fn)) {
      for (int64_t i = 0; i < parts; ++i) fn(i);
    }
  }

  template <class F>
  void run(int64_t parts, F&& fn) {
    run(parts, count(), fn);
  }

 private:
  bool share(int64_t parts, void (*call)(void*, int64_t), void* fn);

  Scheduler* scheduler_;
  int64_t threads_;
};

}  // namespace lissom

#endif  // LISSOM_WORKERS_H_
