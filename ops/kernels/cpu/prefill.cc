// Cuts many queries into tasks, finds what each span of keys has in common, and shares the tasks out.
//
// The blocks of keys that a query meets, and the order of all sums, depend on the keys alone, so
// neither the threads nor the size of a task change a bit of the result.

#include <limits.h>

#include <algorithm>
#include <atomic>

#include "attention.h"
#include "scratch.h"
#include "workers.h"

namespace lissom {
namespace {

constexpr int64_t kTasksPerThread = 4;  // at least, as those of the last queries take longest
constexpr int64_t kMostShares = 1 << 14;  // that threads claim one by one
constexpr int64_t kWide = 128;            // numbers of a head; beyond, half the rows fill the cache
constexpr int64_t kProductsAlone = 1 << 18;

thread_local Scratch shared, own;

Bounds bounds_of(const Attention& a, int64_t row, int64_t begin) {
  Bounds all = {INT_MAX, INT_MIN, INT_MAX, INT_MIN, true};
  const int64_t end = std::min<int64_t>(begin + kSpan, a.keys);
  all.whole = end == begin + kSpan;
  for (int64_t s = begin; s < end; ++s) {
    const int32_t position = a.k_positions[row * a.keys + s];
    const int32_t segment = a.k_segments == nullptr ? 0 : a.k_segments[row * a.keys + s];
    all.least = std::min(all.least, position);
    all.least_segment = std::min(all.least_segment, segment);
    all.most_segment = std::max(all.most_segment, segment);
    if (position == INT_MAX) {
      all.whole = false;
    } else {
      all.most = std::max(all.most, position);
    }
  }
  return all;
}

// How many queries a task has: as many as fill the near caches, or fewer, so that all threads have
// tasks.
int64_t queries_of_task(const Attention& a, int64_t threads) {
  int64_t rows = a.width > kWide ? kMostRows / 2 : kMostRows;
  const auto queries = [&] { return std::max<int64_t>(1, rows / a.group()); };
  const auto tasks = [&] {
    return a.batch * a.kv_heads * ((a.queries + queries() - 1) / queries());
  };
  while (rows > kMostStrip && tasks() < kTasksPerThread * threads) rows -= kMostStrip;
  return queries();
}

}  // namespace

bool prefill_all(const Kernels& kernels, const Attention& a, Workers& workers) {
  if (a.batch * a.queries * a.heads * a.width == 0) return true;
  const int64_t spans = (a.keys + kSpan - 1) / kSpan;
  auto* const all = reinterpret_cast<Bounds*>(
      shared.reserve(std::max<int64_t>(1, a.batch * spans) * sizeof(Bounds)));
  if (all == nullptr) return false;
  for (int64_t row = 0; row < a.batch; ++row)
    for (int64_t i = 0; i < spans; ++i) all[row * spans + i] = bounds_of(a, row, i * kSpan);

  const bool few = a.batch * a.queries * a.heads * a.width * a.keys < kProductsAlone;
  const int64_t threads = few ? 1 : workers.count();
  const int64_t queries = queries_of_task(a, threads);
  const int64_t of_head = (a.queries + queries - 1) / queries, heads = a.batch * a.kv_heads;
  const int64_t tasks = of_head * heads, shares = std::min(tasks, kMostShares);
  std::atomic<bool> lacking{false};
  workers.run(shares, threads, [&](int64_t share) {
    float* const memory = reinterpret_cast<float*>(own.reserve(prefill_floats(a.width) * 4));
    if (memory == nullptr) {
      lacking = true;
      return;
    }
    for (int64_t i = share; i < tasks; i += shares) {
      // The last queries, which see most, come first.
      const int64_t begin = (of_head - 1 - i / heads) * queries, head = i % heads;
      kernels.prefill(a, all, {head / a.kv_heads, head % a.kv_heads, begin,
                               std::min(begin + queries, a.queries)}, memory);
    }
  });
  return !lacking;
}

}  // namespace lissom
