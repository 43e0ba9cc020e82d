// What a product needs to know: the packed weight, the rows it meets, and where results go.
//
// The packed layout. Outputs are cut into tiles of 32, the last one filled up with zeros, and a
// tile is one contiguous stretch that a thread reads from its first byte to its last, so the
// hardware's prefetchers see a few long streams. Within a tile inputs come in steps:
//
//   int8        4 inputs a step   [32 outputs][4 inputs] bytes
//   int4, nf4, e2m1
//               4 inputs a step   [16 outputs][4 inputs] bytes: output o low, o + 16 high
//   bf16        2 inputs a step   [32 outputs][2 inputs]: 2 products a lane of vdpbf16ps
//   f16, fp8    1 input a step    [32 outputs]
//   2:4         4 inputs a step   int8 [32 outputs][2], int4 [16 outputs][2], bf16 [32 outputs][2]:
//               of each four inputs the two that are kept, in order
//
// The places of 2:4 lie beside the values as [tile][step][16] bytes: 4 bits an output, of which bit
// i says that input i is kept; output o low, o + 16 high.
//
// Inputs are filled up with zeros to whole steps. Codes are unsigned, int8 ones with 128 added, so
// that a mask or a shift widens them. Scales (and zero points) lie beside them as [tile][group][32].

#ifndef LISSOM_TYPES_H_
#define LISSOM_TYPES_H_

#include <stdint.h>

namespace lissom {

constexpr int kTile = 32;        // outputs
constexpr int kRowChunk = 64;    // rows that meet a tile's weights before the next tile's turn
constexpr int kMaxRows = 8;      // rows that any instruction set keeps in registers

enum ScaleType { kBf16Scales, kF16Scales, kF32Scales };

enum Format {
  kInt8, kInt4, kNf4, kBf16, kF16, kFp8, kInt8Of4, kInt4Of4, kBf16Of4, kE2m1, kFormats
};

struct Weights {
  Format format;
  const uint8_t* values;
  const uint8_t* places;  // of 2:4, else null
  const void* scales;     // null for bf16 and f16 values
  ScaleType scale_type;
  const uint8_t* zeros;  // null for a symmetric format
  int64_t inputs, outputs, groups;

  bool sparse() const { return format >= kInt8Of4 && format <= kBf16Of4; }
  bool scaled() const { return format != kBf16 && format != kF16 && format != kBf16Of4; }
  bool integer() const {
    return format <= kNf4 || format == kInt8Of4 || format == kInt4Of4 || format == kE2m1;
  }
  int64_t step() const { return integer() || sparse() ? 4 : format == kBf16 ? 2 : 1; }
  int64_t padded_inputs() const { return (inputs + step() - 1) / step() * step(); }
  int64_t tiles() const { return (outputs + kTile - 1) / kTile; }
  int64_t group() const { return groups > 1 ? inputs / groups : padded_inputs(); }

  int64_t tile_bytes() const {
    static constexpr int64_t bits[kFormats] = {8, 4, 4, 16, 16, 8, 4, 2, 8, 4};  // an input
    return padded_inputs() * kTile * bits[format] / 8;
  }
  int64_t places_bytes() const { return sparse() ? padded_inputs() * kTile / 8 : 0; }  // of a tile

  int64_t scale_count() const { return scaled() ? tiles() * groups * kTile : 0; }

  // One of several weights of this form that lie one after the other in memory.
  Weights expert(int64_t e) const {
    Weights w = *this;
    w.values += e * tiles() * tile_bytes();
    if (places != nullptr) w.places += e * tiles() * places_bytes();
    const int64_t scale_bytes = scale_count() * (scale_type == kF32Scales ? 4 : 2);
    if (scales != nullptr) w.scales = static_cast<const uint8_t*>(scales) + e * scale_bytes;
    if (zeros != nullptr) w.zeros += e * scale_count();
    return w;
  }

  // Activations that share a scale: at most 128, and never across two groups of the weight.
  int64_t block() const {
    if (groups == 1 || group() % 128 == 0) return 128;
    return group() % 64 == 0 ? 64 : group() % 32 == 0 ? 32 : 16;
  }

  int64_t blocks() const { return (padded_inputs() + block() - 1) / block(); }
};

// The left side, row by row, with padded_inputs() numbers a row. Either `codes`, or `floats`, or
// `halves` is set. x = codes * scales, and sums are those of the codes of a block. The four codes of
// a step lie in the order 0, 2, 1, 3: two for a vector's even bytes, then two for its odd ones.
struct Rows {
  int64_t count;
  const int16_t* codes;
  const float* scales;
  const int32_t* sums;
  const float* floats;
  const uint16_t* halves;  // bf16
};

struct Output {
  void* y;  // [rows, outputs]
  bool bf16;
};

struct Range {
  int64_t begin, end;
};

struct Attention;  // see attention.h
struct Partial;
struct Bounds;
struct Task;

// One instruction set. Null where it has no such kernel.
struct Kernels {
  const char* name;
  bool (*supported)();
  void (*quantize)(const Weights&, const float* x, int64_t rows, int16_t* codes, float* scales,
                   int32_t* sums);
  void (*integer)(const Weights&, const Rows&, Output, Range rows, Range tiles);
  void (*floating)(const Weights&, const Rows&, Output, Range rows, Range tiles);
  void (*half)(const Weights&, const Rows&, Output, Range rows, Range tiles);  // bf16 by bf16
  void (*attend)(const Attention&, int64_t row, Range slots, Partial);
  void (*prefill)(const Attention&, const Bounds* spans, Task, float* memory);
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvxVnni, kAvx512, kAvx512Bf16;
#endif

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  __builtin_memcpy(&x, &wide, 4);
  return x;
}

inline float from_f16(uint16_t bits) {
  // The exponent of a float16 is 112 below that of the float32 with the same bits of it.
  const uint32_t wide = static_cast<uint32_t>(bits & 0x7fff) << 13;
  const uint32_t power = 0x77800000;  // 2^112
  float x, factor;
  __builtin_memcpy(&x, &wide, 4);
  __builtin_memcpy(&factor, &power, 4);
  x *= factor;
  return bits & 0x8000 ? -x : x;
}

// Rounds to nearest, half to even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace lissom

#endif  // LISSOM_TYPES_H_
