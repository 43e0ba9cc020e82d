// Attention: what it is given, and what its parts give. Few queries a row over a cache go through
// attend.h and attention.cc, many through prefill.h and prefill.cc.

#ifndef LISSOM_ATTENTION_H_
#define LISSOM_ATTENTION_H_

#include <stdint.h>

#include "types.h"

namespace lissom {

constexpr int kSlots = 64;        // whose scores are held at a time
constexpr float kMasked = -1e30f;  // far below any score, and finite
constexpr uint32_t kEverywhere = 1u << 31;  // a window that hides nothing

enum class Stored { kFloat32, kBf16, kInt8 };

struct Attention {
  const void* q;  // [batch, queries, heads, width]
  const void* k;  // [batch, keys, kv_heads, width]
  const void* v;
  bool q_bf16;               // or float32
  Stored stored;             // what k and v are
  const uint16_t* k_scales;  // float16 [batch, keys, kv_heads] of int8, or null
  const uint16_t* v_scales;
  const int32_t* q_positions;  // [batch, queries]
  const int32_t* k_positions;  // [batch, keys]
  const int32_t* q_segments;   // as the positions, or null; of many queries alone
  const int32_t* k_segments;
  const float* sinks;          // [heads], or null
  int64_t batch, queries, keys, heads, kv_heads, width;
  float scale, softcap;  // 0: no cap
  uint32_t window;       // 2^31: none
  int32_t first;         // positions below it are seen from beyond the window too; INT_MIN: none
  void* y;               // as q
  float* logs;           // of the sums of exponentials, [batch, heads, queries]; of many queries alone

  // q * scale as [batch, kv_heads, queries, group, width]; made by `attend_all`.
  const float* scaled_q;

  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return heads * queries; }  // of scores, of one row of the batch
  // A key after the query is at a distance of 2^31 or more, as unsigned numbers wrap around.
  bool sees(int32_t q_position, int32_t k_position) const {
    return static_cast<uint32_t>(q_position) - static_cast<uint32_t>(k_position) < reach(k_position);
  }
  // How many positions from a key's own on may hold queries that see it.
  uint32_t reach(int32_t k_position) const { return k_position < first ? kEverywhere : window; }
};

// For each row of scores: the largest score, the sum of exp(score - largest), and that of the values
// times exp(score - largest); and room for the scores of a block.
struct Partial {
  float* peaks;
  float* totals;
  float* sums;     // [rows, width]
  float* weights;  // [rows, kSlots]
  float* scales;
};

constexpr int kSpan = 16;                  // neighbouring keys that have bounds of their own
constexpr int kBlockKeys = 128;            // that are held at a time, a whole number of spans
constexpr int kMostStrip = 48;             // rows of scores side by side, on any instruction set
constexpr int kMostRows = 10 * kMostStrip;  // of one task
constexpr int kMostDeep = 8;               // numbers of a value that meet a strip at a time

// What the positions and segments of some queries, or of the keys of a span, have in common. A key
// at the last of all positions is none.
struct Bounds {
  int32_t least, most;  // positions
  int32_t least_segment, most_segment;
  bool whole;  // whether no place is empty
};

// The queries `begin` to `end` of a row with all heads that read one key/value head.
struct Task {
  int64_t row, head, begin, end;
};

// The floats that a worker needs for a task.
inline int64_t prefill_floats(int64_t width) {
  const int64_t whole = (width + kMostDeep - 1) / kMostDeep * kMostDeep;
  const int64_t queries = 2 * kMostRows * whole + 4 * kMostRows;
  const int64_t keys = (2 * kBlockKeys + kSpan) * whole;
  return queries + keys + kBlockKeys * kMostStrip + whole;
}

class Workers;

// Both return false if there is no memory for what the parts give.
bool attend_all(const Kernels& kernels, Attention a, Workers& workers);
bool prefill_all(const Kernels& kernels, const Attention& a, Workers& workers);

}  // namespace lissom

#endif  // LISSOM_ATTENTION_H_
