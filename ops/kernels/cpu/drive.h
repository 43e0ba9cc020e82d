// Walks rows and tiles, picks the template for a format, and writes results out.
//
// Included after product.h, in the same anonymous namespace.

#include "product.h"

namespace lissom {
namespace {

// One function a number of rows, 1 to V::kRows.
using Tile = void (*)(const Weights&, const Rows&, int64_t row, int64_t tile, float* y);

struct Tiles {
  Tile rows[kMaxRows];
};

template <class V, class Codes, bool kZeros>
constexpr Tiles integer_tiles() {
  return {{integer_tile<V, Codes, kZeros, 1>, integer_tile<V, Codes, kZeros, 2>,
           integer_tile<V, Codes, kZeros, V::kRows < 3 ? 1 : 3>,
           integer_tile<V, Codes, kZeros, V::kRows < 4 ? 1 : 4>,
           integer_tile<V, Codes, kZeros, V::kRows < 5 ? 1 : 5>,
           integer_tile<V, Codes, kZeros, V::kRows < 6 ? 1 : 6>,
           integer_tile<V, Codes, kZeros, V::kRows < 7 ? 1 : 7>,
           integer_tile<V, Codes, kZeros, V::kRows < 8 ? 1 : 8>}};
}

template <class V, class Values, bool kZeros>
constexpr Tiles floating_tiles() {
  return {{floating_tile<V, Values, kZeros, 1>, floating_tile<V, Values, kZeros, 2>,
           floating_tile<V, Values, kZeros, V::kRows < 3 ? 1 : 3>,
           floating_tile<V, Values, kZeros, V::kRows < 4 ? 1 : 4>,
           floating_tile<V, Values, kZeros, V::kRows < 5 ? 1 : 5>,
           floating_tile<V, Values, kZeros, V::kRows < 6 ? 1 : 6>,
           floating_tile<V, Values, kZeros, V::kRows < 7 ? 1 : 7>,
           floating_tile<V, Values, kZeros, V::kRows < 8 ? 1 : 8>}};
}

inline void write_tile(const float* from, int64_t rows, int64_t row, int64_t tile,
                       const Weights& w, Output out) {
  const int64_t first = tile * kTile;
  const int64_t width = w.outputs - first < kTile ? w.outputs - first : kTile;
  for (int64_t r = 0; r < rows; ++r, from += kTile) {
    const int64_t at = (row + r) * w.outputs + first;
    if (out.bf16) {
      uint16_t* y = static_cast<uint16_t*>(out.y) + at;
      for (int64_t o = 0; o < width; ++o) y[o] = to_bf16(from[o]);
    } else {
      memcpy(static_cast<float*>(out.y) + at, from, width * sizeof(float));
    }
  }
}

// A chunk of rows stays in the nearest caches while all tiles pass by.
inline void walk(const Tiles& tiles, int most, const Weights& w, const Rows& x, Output out,
                 Range rows, Range range) {
  alignas(64) float y[kMaxRows * kTile];
  for (int64_t begin = rows.begin; begin < rows.end; begin += kRowChunk) {
    const int64_t end = begin + kRowChunk < rows.end ? begin + kRowChunk : rows.end;
    for (int64_t tile = range.begin; tile < range.end; ++tile) {
      for (int64_t row = begin; row < end;) {
        const int64_t count = end - row < most ? end - row : most;
        tiles.rows[count - 1](w, x, row, tile, y);
        write_tile(y, count, row, tile, w, out);
        row += count;
      }
    }
  }
}

template <class V>
void integer(const Weights& w, const Rows& x, Output out, Range rows, Range range) {
  static constexpr Tiles int8 = integer_tiles<V, Int8Codes<V>, false>();
  static constexpr Tiles int8_zeros = integer_tiles<V, Int8Codes<V>, true>();
  static constexpr Tiles int4 = integer_tiles<V, Int4Codes<V>, false>();
  static constexpr Tiles int4_zeros = integer_tiles<V, Int4Codes<V>, true>();
  static constexpr Tiles nf4 = integer_tiles<V, Nf4Codes<V>, false>();
  static constexpr Tiles e2m1 = integer_tiles<V, E2m1Codes<V>, false>();
  static constexpr Tiles int8_of4 = integer_tiles<V, Int8Of4Codes<V>, false>();
  static constexpr Tiles int4_of4 = integer_tiles<V, Int4Of4Codes<V>, false>();
  const bool zeros = w.zeros != nullptr;
  const Tiles& tiles = w.format == kInt8      ? (zeros ? int8_zeros : int8)
                       : w.format == kInt4    ? (zeros ? int4_zeros : int4)
                       : w.format == kInt8Of4 ? int8_of4
                       : w.format == kInt4Of4 ? int4_of4
                       : w.format == kE2m1    ? e2m1
                                              : nf4;
  walk(tiles, V::kRows, w, x, out, rows, range);
}

template <class V>
void floating(const Weights& w, const Rows& x, Output out, Range rows, Range range) {
  static constexpr Tiles plain[kFormats] = {
      floating_tiles<V, Int8Values<V>, false>(), floating_tiles<V, Int4Values<V>, false>(),
      floating_tiles<V, Nf4Values<V>, false>(),  floating_tiles<V, Bf16Values<V>, false>(),
      floating_tiles<V, F16Values<V>, false>(),  floating_tiles<V, Fp8Values<V>, false>(),
      floating_tiles<V, Of4Values<V, Int8Of4Codes<V>>, false>(),
      floating_tiles<V, Of4Values<V, Int4Of4Codes<V>>, false>(),
      floating_tiles<V, Bf16Of4Values<V>, false>(), floating_tiles<V, E2m1Values<V>, false>()};
  static constexpr Tiles with_zeros[2] = {floating_tiles<V, Int8Values<V>, true>(),
                                          floating_tiles<V, Int4Values<V>, true>()};
  walk(w.zeros ? with_zeros[w.format] : plain[w.format], V::kRows, w, x, out, rows, range);
}

constexpr int kCodeBits = 14;  // the largest code of a block has so many

// Rounds a block to code = rint(x / scale), half to even. The scale is a power of two, so that a
// bfloat16 number which is not below 1/64 of its block's largest one keeps all its bits; codes reach
// from -2^14 to 2^14, and errors 2^-14 of the largest. A block that holds NaN or infinity gets that
// as its scale, so the result is not finite either. `codes` have the order of Rows.
inline void quantize_block(const float* x, int64_t size, int16_t* codes, float* scale,
                           int32_t* sum) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer at the bottom
  constexpr uint32_t kInfinity = 0x7f800000, kLeast = 64u << 23;  // numbers below 2^-63 are zero
  uint32_t top = 0;
  for (int64_t i = 0; i < size; ++i) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    top = bits > top ? bits : top;
  }
  uint32_t exponent = top & kInfinity;
  if (exponent < kLeast) exponent = kLeast;
  const uint32_t scale_bits = top < kInfinity ? exponent - ((kCodeBits - 1) << 23) : top;
  const uint32_t inverse_bits = top < kInfinity ? (254u << 23) - scale_bits : 0;
  float inverse;
  memcpy(&inverse, &inverse_bits, 4);
  memcpy(scale, &scale_bits, 4);
  const auto round = [&](int64_t i) LISSOM_INLINE {
    const float shifted = x[i] * inverse + kRound;
    int32_t bits;
    memcpy(&bits, &shifted, 4);
    return bits - 0x4b400000;
  };
  int32_t total = 0;
  int64_t i = 0;
  for (; i + 4 <= size; i += 4) {
    const int32_t four[4] = {round(i), round(i + 2), round(i + 1), round(i + 3)};
    for (int k = 0; k < 4; ++k) {
      codes[i + k] = static_cast<int16_t>(four[k]);
      total += static_cast<int16_t>(four[k]);
    }
  }
  if (i < size) memset(codes + i, 0, 4 * sizeof(*codes));
  for (; i < size; ++i) {
    static constexpr int kPlace[4] = {0, 2, 1, 3};
    const int16_t code = static_cast<int16_t>(round(i));
    codes[i / 4 * 4 + kPlace[i % 4]] = code;
    total += code;
  }
  *sum = total;
}

// x has w.inputs numbers a row; what it lacks to whole steps becomes zero.
inline void quantize(const Weights& w, const float* x, int64_t rows, int16_t* codes, float* scales,
                     int32_t* sums) {
  const int64_t padded = w.padded_inputs(), block = w.block(), blocks = w.blocks();
  for (int64_t r = 0; r < rows; ++r, x += w.inputs, codes += padded) {
    for (int64_t b = 0; b < blocks; ++b, ++scales, ++sums) {
      const int64_t begin = b * block, left = w.inputs - begin;
      quantize_block(x + begin, left < block ? left : block, codes + begin, scales, sums);
    }
  }
}

}  // namespace
}  // namespace lissom
