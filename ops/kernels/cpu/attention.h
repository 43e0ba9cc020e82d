// Attention of a few queries a row over a cache: what it is given, and what its parts give.

#ifndef LISSOM_ATTENTION_H_
#define LISSOM_ATTENTION_H_

#include <stdint.h>

#include "types.h"

namespace lissom {

constexpr int kSlots = 64;        // whose scores are held at a time
constexpr float kMasked = -1e30f;  // far below any score, and finite

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
  const float* sinks;          // [heads], or null
  int64_t batch, queries, keys, heads, kv_heads, width;
  float scale, softcap;  // 0: no cap
  uint32_t window;       // 2^31: none
  void* y;               // as q

  // q * scale as [batch, kv_heads, queries, group, width]; made by `attend_all`.
  const float* scaled_q;

  int64_t group() const { return heads / kv_heads; }
  int64_t rows() const { return heads * queries; }  // of scores, of one row of the batch
  // A key after the query is at a distance of 2^31 or more, as unsigned numbers wrap around.
  bool sees(int32_t q_position, int32_t k_position) const {
    return static_cast<uint32_t>(q_position) - static_cast<uint32_t>(k_position) < window;
  }
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

class Workers;

// Returns false if there is no memory for what the parts give.
bool attend_all(const Kernels& kernels, Attention a, Workers& workers);

}  // namespace lissom

#endif  // LISSOM_ATTENTION_H_
