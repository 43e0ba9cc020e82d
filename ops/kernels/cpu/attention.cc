// Cuts the slots of each row into parts, shares them out among threads, and joins what they give.
//
// The parts depend on a row's own positions alone, so neither the threads nor the other rows of the
// batch change a bit of its result.

#include "attention.h"

#include <math.h>
#include <string.h>

#include <algorithm>

#include "scratch.h"
#include "workers.h"

namespace lissom {
namespace {

constexpr int64_t kMostParts = 16;         // of a row
constexpr int64_t kBytesAlone = 64 << 10;  // below this a second thread costs more than it saves

thread_local Scratch scratch;

// From the first slot that a query of the row sees to the last.
Range seen_slots(const Attention& a, int64_t row) {
  const int32_t* q = a.q_positions + row * a.queries;
  const int32_t* k = a.k_positions + row * a.keys;
  const auto seen = [&](int64_t s) {
    for (int64_t t = 0; t < a.queries; ++t)
      if (a.sees(q[t], k[s])) return true;
    return false;
  };
  Range slots = {0, a.keys};
  while (slots.begin < slots.end && !seen(slots.begin)) ++slots.begin;
  while (slots.end > slots.begin && !seen(slots.end - 1)) --slots.end;
  return slots;
}

// A part has a whole number of blocks, but for the last.
int64_t part_slots(Range slots) {
  const int64_t blocks = (slots.end - slots.begin + kSlots - 1) / kSlots;
  return (blocks + kMostParts - 1) / kMostParts * kSlots;
}

int64_t parts_of(Range slots) {
  if (slots.begin == slots.end) return 1;
  return (slots.end - slots.begin + part_slots(slots) - 1) / part_slots(slots);
}

int64_t most_parts(const Attention& a) {
  return std::clamp<int64_t>((a.keys + kSlots - 1) / kSlots, 1, kMostParts);
}

int64_t number_bytes_of(const Attention& a) {
  return a.stored == Stored::kFloat32 ? 4 : a.stored == Stored::kBf16 ? 2 : 1;
}

float q_at(const Attention& a, int64_t i) {
  return a.q_bf16 ? from_bf16(static_cast<const uint16_t*>(a.q)[i])
                  : static_cast<const float*>(a.q)[i];
}

// The place of query t of head n among the rows of scores.
int64_t score_row(const Attention& a, int64_t t, int64_t n) {
  return (n / a.group() * a.queries + t) * a.group() + n % a.group();
}

void scale_queries(const Attention& a, int64_t row, float* to) {
  for (int64_t t = 0; t < a.queries; ++t)
    for (int64_t n = 0; n < a.heads; ++n)
      for (int64_t h = 0; h < a.width; ++h)
        to[(row * a.rows() + score_row(a, t, n)) * a.width + h] =
            a.scale * q_at(a, ((row * a.queries + t) * a.heads + n) * a.width + h);
}

// Writes the result of one query and head from what `count` parts say of it, `stride` apart.
void join(const Attention& a, int64_t row, int64_t t, int64_t n, const Partial& parts,
          int64_t count) {
  const int64_t at = score_row(a, t, n), rows = a.rows();
  float peak = kMasked / 2, total = 0, factors[kMostParts];
  for (int64_t i = 0; i < count; ++i) peak = std::max(peak, parts.peaks[i * rows + at]);
  if (a.sinks != nullptr) peak = std::max(peak, a.sinks[n]);
  for (int64_t i = 0; i < count; ++i) {
    factors[i] = expf(parts.peaks[i * rows + at] - peak);
    total += factors[i] * parts.totals[i * rows + at];
  }
  if (a.sinks != nullptr) total += expf(a.sinks[n] - peak);
  const float share = total == 0 ? 1 : 1 / total;
  const int64_t to = ((row * a.queries + t) * a.heads + n) * a.width;
  for (int64_t h = 0; h < a.width; ++h) {
    float sum = 0;
    for (int64_t i = 0; i < count; ++i)
      sum += factors[i] * parts.sums[(i * rows + at) * a.width + h];
    if (a.q_bf16) {
      static_cast<uint16_t*>(a.y)[to + h] = to_bf16(sum * share);
    } else {
      static_cast<float*>(a.y)[to + h] = sum * share;
    }
  }
}

}  // namespace

bool attend_all(const Kernels& kernels, Attention a, Workers& workers) {
  if (a.batch * a.queries * a.heads * a.width == 0) return true;
  const int64_t rows = a.rows(), most = most_parts(a), parts = a.batch * most;
  const int64_t q_bytes = aligned(a.batch * rows * a.width * 4);
  const int64_t number_bytes = aligned(parts * rows * 4);
  const int64_t range_bytes = aligned(a.batch * sizeof(Range));
  uint8_t* memory = scratch.reserve(q_bytes + 3 * number_bytes + range_bytes +
                                    parts * rows * (a.width + kSlots) * 4);
  if (memory == nullptr) return false;
  float* const scaled_q = reinterpret_cast<float*>(memory);
  float* const peaks = reinterpret_cast<float*>(memory += q_bytes);
  float* const totals = reinterpret_cast<float*>(memory += number_bytes);
  float* const scales = reinterpret_cast<float*>(memory += number_bytes);
  Range* const seen = reinterpret_cast<Range*>(memory += number_bytes);
  float* const weights = reinterpret_cast<float*>(memory += range_bytes);
  float* const sums = weights + parts * rows * kSlots;
  const auto partial = [&](int64_t i) {
    const int64_t first = i * rows;
    return Partial{peaks + first, totals + first, sums + first * a.width,
                   weights + first * kSlots, scales + first};
  };

  a.scaled_q = scaled_q;
  int64_t bytes = 0;
  for (int64_t row = 0; row < a.batch; ++row) {
    scale_queries(a, row, scaled_q);
    seen[row] = seen_slots(a, row);
    bytes += (seen[row].end - seen[row].begin) * a.kv_heads * a.width * 2 * number_bytes_of(a);
  }
  const int64_t threads = bytes < kBytesAlone ? 1 : workers.count();
  workers.run(parts, threads, [&](int64_t i) {
    const Range all = seen[i / most];
    const int64_t begin = all.begin + i % most * part_slots(all);
    const Range slots = {begin, std::min(all.end, begin + part_slots(all))};
    if (i % most < parts_of(all)) kernels.attend(a, i / most, slots, partial(i));
  });
  workers.run(a.batch, threads, [&](int64_t row) {
    for (int64_t t = 0; t < a.queries; ++t)
      for (int64_t n = 0; n < a.heads; ++n)
        join(a, row, t, n, partial(row * most), parts_of(seen[row]));
  });
  return true;
}

}  // namespace lissom
