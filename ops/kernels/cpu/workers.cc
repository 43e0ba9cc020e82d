#include "workers.h"

#include <atomic>
#include <chrono>
#include <thread>

namespace lissom {
namespace {

constexpr auto kStay = std::chrono::microseconds(100);
constexpr int kSpinsPerLook = 64;      // between two looks at the clock
constexpr int kSpinsBeforeYield = 1 << 14;
constexpr int64_t kMostParts = 0xffff;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The product at hand, in one word so that a part is claimed together with what it is a part of:
// its number in the upper 32 bits, then the count of parts, then the next part to be claimed.
std::atomic<uint64_t> work{0};
std::atomic<int64_t> done{0};
std::atomic<int64_t> staying{0};
std::atomic_flag taken = ATOMIC_FLAG_INIT;
void (*call_)(void*, int64_t);
void* fn_;

// Claims and runs parts until there are none.
void help() {
  uint64_t now = work.load(std::memory_order_acquire);
  while (true) {
    const uint64_t next = now & 0xffff, parts = now >> 16 & 0xffff;
    if (next >= parts) return;
    if (!work.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) continue;
    // The caller waits for this part, so its function stays what it is.
    call_(fn_, static_cast<int64_t>(next));
    done.fetch_add(1, std::memory_order_release);
    now = work.load(std::memory_order_acquire);
  }
}

void stay() {
  auto last = std::chrono::steady_clock::now();
  uint64_t seen = 0;
  while (true) {
    for (int i = 0; i < kSpinsPerLook; ++i) {
      const uint64_t now = work.load(std::memory_order_acquire);
      if ((now & 0xffff) < (now >> 16 & 0xffff)) {
        help();
        break;
      }
      pause();
    }
    const uint64_t number = work.load(std::memory_order_relaxed) >> 32;
    const auto time = std::chrono::steady_clock::now();
    if (number != seen) {
      seen = number;
      last = time;
    } else if (time - last > kStay) {
      break;
    }
  }
  staying.fetch_sub(1, std::memory_order_release);
}

}  // namespace

bool Workers::share(int64_t parts, void (*call)(void*, int64_t), void* fn) {
  if (parts > kMostParts || taken.test_and_set(std::memory_order_acquire)) return false;
  call_ = call;
  fn_ = fn;
  done.store(0, std::memory_order_relaxed);
  const uint64_t number = (work.load(std::memory_order_relaxed) >> 32) + 1;
  work.store(number << 32 | static_cast<uint64_t>(parts) << 16, std::memory_order_release);
  while (staying.load(std::memory_order_acquire) < threads_ - 1) {
    staying.fetch_add(1, std::memory_order_relaxed);
    scheduler_->schedule(stay);
  }
  help();
  for (int spins = 0; done.load(std::memory_order_acquire) < parts; ++spins) {
    spins < kSpinsBeforeYield ? pause() : std::this_thread::yield();
  }
  taken.clear(std::memory_order_release);
  return true;
}

}  // namespace lissom
