// The two products, written once over a vector type V that each instruction set defines.
//
// A file that includes this has set its target by a pragma before, and is compiled into its own
// anonymous namespace: nothing here may be shared between instruction sets. No function of the
// standard C++ library belongs here, for the linker could keep this file's copy for all.
//
//   integer  activations in int16 by blocks of 16 to 128, exact sums in int32, scales in float. The
//            zero point enters once a block: sum (c - z) x = sum c x - z sum x.
//   floating activations as they are, weights widened in registers: as exact as float32 is.
//
// Why 16 bits: a trained model's activations have outliers. Rounded to int8, the other numbers of an
// outlier's block lose most of theirs, and the model up to 1 % of its perplexity. 16 bits lose
// nothing that can be measured. They cost twice the arithmetic where there is a dot product of bytes
// (VNNI), and none where there is not, as codes have to be widened there in any case; the bytes that
// are read for a weight, which decide how fast one row is, stay the same.
//
// How: a vector of codes has the four inputs of a step in each lane of 32 bits. Its even bytes
// (inputs 0 and 2), then its odd ones (1 and 3) are widened to words, and V::dot adds the products
// of a lane's two words with two activations to the lane's sum.
//
// Rows are handled up to V::kRows at a time; they share the loading and widening of the weights.

#include <string.h>

#include "formats.h"
#include "types.h"

namespace lissom {
namespace {

constexpr int kAhead = 4096;  // bytes: hides memory latency, and reaches over the ends of pages

inline int32_t load_two(const int16_t* x) {
  int32_t two;
  memcpy(&two, x, 4);
  return two;
}

template <class V>
inline typename V::Float load_scales(const Weights& w, int64_t at) {
  if (w.scale_type == kF32Scales) return V::load_float(static_cast<const float*>(w.scales) + at);
  const uint16_t* const halves = static_cast<const uint16_t*>(w.scales) + at;
  if (w.scale_type == kBf16Scales) return V::load_bf16(halves);
  return V::load_f16(reinterpret_cast<const uint8_t*>(halves));
}

// Adds the products of one step to the sums of R rows: sum[kChains][R][N].
template <class V, class Codes, int R, int kChains>
LISSOM_INLINE inline void integer_step(const uint8_t* p, const uint8_t* places, const int16_t* x,
                                       int64_t row_stride, typename V::Int* sum) {
  constexpr int N = V::kVectors;
  each<N / 2>([&](int n) LISSOM_INLINE {
    typename V::Bytes even[2], odd[2];
    Codes::load(p, places, n, even, odd);
    each<R>([&](int r) LISSOM_INLINE {
      const int32_t two = load_two(x + r * row_stride), last_two = load_two(x + r * row_stride + 2);
      each<2>([&](int v) LISSOM_INLINE {
        const int first = r * N + n + v * N / 2, second = (kChains - 1) * R * N + first;
        sum[first] = V::dot(sum[first], even[v], two);
        sum[second] = V::dot(sum[second], odd[v], last_two);
      });
    });
  });
}

// y[R][kTile]: rows `row` to `row + R` of the product with one tile.
template <class V, class Codes, bool kZeros, int R>
void integer_tile(const Weights& w, const Rows& x, int64_t row, int64_t tile, float* y) {
  using Int = typename V::Int;
  using Float = typename V::Float;
  constexpr int N = V::kVectors;
  // One row alone would wait for its own sums: odd words have sums of their own.
  constexpr int kChains = R == 1 && V::kWaits ? 2 : 1;
  const int64_t padded = w.padded_inputs(), block = w.block(), blocks = w.blocks();
  const int64_t group = w.group();
  const uint8_t* p = w.values + tile * w.tile_bytes();
  const uint8_t* places = w.places + tile * w.places_bytes();
  const int16_t* codes = x.codes + row * padded;
  const float* x_scales = x.scales + row * blocks;
  const int32_t* x_sums = x.sums + row * blocks;
  each<R * N>([&](int i) LISSOM_INLINE { V::store_float(y + i * V::kLanes, V::set_float(0)); });
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * block, end = begin + block < padded ? begin + block : padded;
    Int sum[kChains * R * N];
    each<kChains * R * N>([&](int i) LISSOM_INLINE { sum[i] = V::set_int(0); });
    const int16_t* const last = codes + end;
    for (const int16_t* four = codes + begin; four < last; four += 4) {
      __builtin_prefetch(p + kAhead);
      if (Codes::kStepBytes > 64) __builtin_prefetch(p + kAhead + 64);
      if (Codes::kSparse) __builtin_prefetch(places + kAhead);
      integer_step<V, Codes, R, kChains>(p, places, four, padded, sum);
      p += Codes::kStepBytes;
      if (Codes::kSparse) places += kPlacesBytes;
    }
    const int64_t at = (tile * w.groups + (w.groups == 1 ? 0 : begin / group)) * kTile;
    each<R>([&](int r) LISSOM_INLINE {
      Int* const s = sum + r * N;
      if (kChains == 2) each<N>([&](int n) LISSOM_INLINE { s[n] = V::add(s[n], s[R * N + n]); });
      Codes::settle(s);
      const int32_t x_sum = x_sums[r * blocks + b];
      const Float factor = V::set_float(x_scales[r * blocks + b] * Codes::kUnit);
      each<N>([&](int n) LISSOM_INLINE {
        Int centred = V::add(s[n], V::set_int(-Codes::kZero * x_sum));
        if (kZeros) {
          const Int zero = V::load_zeros(w.zeros + at + n * V::kLanes);
          centred = V::subtract_product(s[n], zero, x_sum);
        }
        const Float scale = load_scales<V>(w, at + n * V::kLanes);
        float* const total = y + r * kTile + n * V::kLanes;
        const Float scaled = V::multiply(V::to_float(centred), factor);
        V::store_float(total, V::fma(scaled, scale, V::load_float(total)));
      });
    });
  }
}

template <class V, class Values, bool kZeros, int R>
void floating_tile(const Weights& w, const Rows& x, int64_t row, int64_t tile, float* y) {
  using Float = typename V::Float;
  constexpr int N = V::kVectors, kInputs = Values::kInputs;
  constexpr int kChains = R == 1 ? 4 : 1;
  constexpr int kUnroll = kChains > kInputs ? kChains / kInputs : 1;
  const int64_t padded = w.padded_inputs(), group = w.group();
  const uint8_t* p = w.values + tile * w.tile_bytes();
  const uint8_t* places = w.places + tile * w.places_bytes();
  const float* in = x.floats + row * padded;
  each<R * N>([&](int i) LISSOM_INLINE { V::store_float(y + i * V::kLanes, V::set_float(0)); });
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t at = (tile * w.groups + g) * kTile;
    const float* const last = x.floats + row * padded + (g + 1) * group;
    Float zero[N], sum[kChains * R * N];
    each<N>([&](int n) LISSOM_INLINE {
      zero[n] = V::set_float(0);
      if (kZeros) zero[n] = V::to_float(V::load_zeros(w.zeros + at + n * V::kLanes));
    });
    each<kChains * R * N>([&](int i) LISSOM_INLINE { sum[i] = V::set_float(0); });
    const auto step = [&](int u) LISSOM_INLINE {
      __builtin_prefetch(p + kAhead);
      if (Values::kStepBytes > 64) __builtin_prefetch(p + kAhead + 64);
      if (Values::kSparse) __builtin_prefetch(places + kAhead);
      each<kInputs>([&](int k) LISSOM_INLINE {
        const int chain = (u * kInputs + k) % kChains;
        Float v[N];
        each<N>([&](int n) LISSOM_INLINE {
          v[n] = Values::get(p, places, k, n, kZeros);
          if (kZeros) v[n] = V::add(v[n], V::negate(zero[n]));
        });
        each<R>([&](int r) LISSOM_INLINE {
          const Float input = V::set_float(in[r * padded + k]);
          each<N>([&](int n) LISSOM_INLINE {
            const int i = (chain * R + r) * N + n;
            sum[i] = V::fma(v[n], input, sum[i]);
          });
        });
      });
      p += Values::kStepBytes;
      if (Values::kSparse) places += kPlacesBytes;
      in += kInputs;
    };
    while (in + kUnroll * kInputs <= last) each<kUnroll>(step);
    while (in < last) step(0);
    each<N>([&](int n) LISSOM_INLINE {
      Float scale = V::set_float(1);
      if (Values::kScaled) scale = load_scales<V>(w, at + n * V::kLanes);
      each<R>([&](int r) LISSOM_INLINE {
        Float s = sum[r * N + n];
        each<kChains - 1>([&](int c) LISSOM_INLINE {
          s = V::add(s, sum[((c + 1) * R + r) * N + n]);
        });
        float* const total = y + r * kTile + n * V::kLanes;
        V::store_float(total, V::fma(s, scale, V::load_float(total)));
      });
    });
  }
}

}  // namespace
}  // namespace lissom
