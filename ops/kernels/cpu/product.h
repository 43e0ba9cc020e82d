// The two products, written once over a vector type V that each instruction set defines.
//
// A file that includes this has set its target by a pragma before, and is compiled into its own
// anonymous namespace: nothing here may be shared between instruction sets. No function of the
// standard C++ library belongs here, for the linker could keep this file's copy for all.
//
//   integer  activations in int8 by blocks of 16 to 64, sums in int32, scales in float. The zero
//            point enters once a block: sum (c - z) x = sum c x - z sum x.
//   floating activations as they are, weights widened in registers: as exact as float32 is.
//
// Rows are handled up to V::kRows at a time; each loads and unpacks the weights once.

#include <string.h>

#include <utility>  // types alone

#include "types.h"

#define LISSOM_INLINE __attribute__((always_inline))

namespace lissom {
namespace {

// Calls f(0) to f(N - 1). Written out by the front end, unlike an unrolled loop, so arrays that are
// indexed by it are registers from the start.
template <class F, int... I>
LISSOM_INLINE inline void each_of(F& f, std::integer_sequence<int, I...>) {
  (f(I), ...);
}

template <int N, class F>
LISSOM_INLINE inline void each(F f) {
  each_of(f, std::make_integer_sequence<int, N>{});
}

constexpr int kAhead = 4096;  // bytes: hides memory latency, and reaches over the ends of pages

constexpr float kNf4Values[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
// 128 + round(kNf4Unit * value). Of all units below 127 this one rounds with the least mean
// square error: 0.0017 of a group's largest weight, against 0.03 or so that NF4 itself costs.
constexpr float kNf4Unit = 112.03f;
constexpr uint8_t kNf4Bytes[16] = {16,  50,  69,  84,  96,  107, 118, 128,
                                   137, 146, 156, 166, 177, 191, 209, 240};
constexpr float kInt4Values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

inline int32_t load_four(const int8_t* x) {
  int32_t four;
  memcpy(&four, x, 4);
  return four;
}

// For the eight values that the lower three bits of 2:4 places can have, which tell apart all pairs:
// from which bytes of the kept two the bytes of a lane come, 0x80 for none. The lane holds `inputs`
// inputs of `width` bytes, from input `first` on.
struct Put {
  uint32_t bytes[8] = {};
  constexpr Put(int first, int inputs, int width) {
    for (int places = 0; places < 16; ++places) {
      if ((places & 1) + (places >> 1 & 1) + (places >> 2 & 1) + (places >> 3) != 2) continue;
      uint32_t all = 0;
      for (int byte = 0; byte < 4; ++byte) {
        const int input = first + byte / width;
        int rank = 0;
        for (int i = 0; i < input; ++i) rank += places >> i & 1;
        const bool kept = byte / width < inputs && (places >> input & 1);
        all |= static_cast<uint32_t>(kept ? rank * width + byte % width : 0x80) << 8 * byte;
      }
      bytes[places & 7] = all;
    }
    bytes[0] = bytes[7] = 0x80808080;
  }
};

constexpr Put kPutBytes(0, 4, 1), kPutFirst(0, 2, 2), kPutLast(2, 2, 2);

constexpr int kPlacesBytes = 16;  // of a step

// How a format's codes become the unsigned bytes of the integer product: kVectors of 4 inputs each.
template <class V>
struct Int8Codes {
  static constexpr bool kSparse = false;
  static constexpr int kStepBytes = 128;
  static constexpr int kZero = 128;
  static constexpr float kUnit = 1;
  static inline void load(const uint8_t* p, const uint8_t* places, typename V::Bytes* c) {
    each<V::kVectors>([&](int n) LISSOM_INLINE { c[n] = V::load(p + n * V::kLanes * 4); });
  }
  static inline typename V::Int dot(typename V::Int sum, typename V::Bytes c, int32_t x) {
    return V::dot(sum, c, x);
  }
};

template <class V>
struct Int4Codes {
  static constexpr bool kSparse = false;
  static constexpr int kStepBytes = 64;
  static constexpr int kZero = 8;
  static constexpr float kUnit = 1;
  static inline void load(const uint8_t* p, const uint8_t* places, typename V::Bytes* c) {
    each<V::kVectors / 2>([&](int n) LISSOM_INLINE {
      const typename V::Bytes both = V::load(p + n * V::kLanes * 4);
      c[n] = V::low(both);
      c[n + V::kVectors / 2] = V::high(both);
    });
  }
  static inline typename V::Int dot(typename V::Int sum, typename V::Bytes c, int32_t x) {
    return V::dot_nibbles(sum, c, x);
  }
};

template <class V>
struct Nf4Codes {
  static constexpr bool kSparse = false;
  static constexpr int kStepBytes = 64;
  static constexpr int kZero = 128;
  static constexpr float kUnit = 1 / kNf4Unit;
  static inline void load(const uint8_t* p, const uint8_t* places, typename V::Bytes* c) {
    Int4Codes<V>::load(p, places, c);
    each<V::kVectors>([&](int n) LISSOM_INLINE { c[n] = V::lookup(kNf4Bytes, c[n]); });
  }
  static inline typename V::Int dot(typename V::Int sum, typename V::Bytes c, int32_t x) {
    return V::dot(sum, c, x);
  }
};

// The kept two of four are signed; dropped ones become the code of zero as the others do.
template <class V>
struct Int8Of4Codes : Int8Codes<V> {
  static constexpr bool kSparse = true;
  static constexpr int kStepBytes = 64;
  static inline typename V::Bytes vector(const uint8_t* p, const uint8_t* places, int n) {
    const typename V::Bytes pairs = V::load_pairs(p + n * V::kLanes * 2);
    return V::flip(V::put(pairs, V::places(places, n), kPutBytes.bytes), 128);
  }
  static inline void load(const uint8_t* p, const uint8_t* places, typename V::Bytes* c) {
    each<V::kVectors>([&](int n) LISSOM_INLINE { c[n] = vector(p, places, n); });
  }
};

template <class V>
struct Int4Of4Codes : Int4Codes<V> {
  static constexpr bool kSparse = true;
  static constexpr int kStepBytes = 32;
  static inline typename V::Bytes vector(const uint8_t* p, const uint8_t* places, int n) {
    constexpr int kHalf = V::kVectors / 2;
    const bool high = n >= kHalf;
    const typename V::Bytes both = V::load_pairs(p + (n - high * kHalf) * V::kLanes * 2);
    const typename V::Bytes pairs = high ? V::high(both) : V::low(both);
    return V::flip(V::put(pairs, V::places(places, n), kPutBytes.bytes), 8);
  }
  static inline void load(const uint8_t* p, const uint8_t* places, typename V::Bytes* c) {
    each<V::kVectors>([&](int n) LISSOM_INLINE { c[n] = vector(p, places, n); });
  }
};

template <class V>
inline typename V::Float load_scales(const Weights& w, int64_t at) {
  if (w.scales_are_f32) return V::load_float(static_cast<const float*>(w.scales) + at);
  return V::load_bf16(static_cast<const uint16_t*>(w.scales) + at);
}

// y[R][kTile]: rows `row` to `row + R` of the product with one tile.
template <class V, class Codes, bool kZeros, int R>
void integer_tile(const Weights& w, const Rows& x, int64_t row, int64_t tile, float* y) {
  using Int = typename V::Int;
  using Float = typename V::Float;
  constexpr int N = V::kVectors;
  constexpr int kChains = R == 1 ? 2 : 1;  // one row alone would wait for its own sums
  const int64_t padded = w.padded_inputs(), block = w.block(), blocks = w.blocks();
  const int64_t group = w.group();
  const uint8_t* p = w.values + tile * w.tile_bytes();
  const uint8_t* places = w.places + tile * w.places_bytes();
  const int8_t* codes = x.codes + row * padded;
  const float* x_scales = x.scales + row * blocks;
  const int32_t* x_sums = x.sums + row * blocks;
  each<R * N>([&](int i) LISSOM_INLINE { V::store_float(y + i * V::kLanes, V::set_float(0)); });
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = b * block, end = begin + block < padded ? begin + block : padded;
    Int sum[kChains * R * N];
    each<kChains * R * N>([&](int i) LISSOM_INLINE {
      const bool first = !kZeros && i < R * N;
      sum[i] = V::set_int(first ? -Codes::kZero * x_sums[i / N * blocks + b] : 0);
    });
    const int8_t* four = codes + begin;
    const int8_t* const last = codes + end;
    const auto step = [&](int chain) LISSOM_INLINE {
      typename V::Bytes c[N];
      Codes::load(p, places, c);
      __builtin_prefetch(p + kAhead);
      if (Codes::kStepBytes > 64) __builtin_prefetch(p + kAhead + 64);
      if (Codes::kSparse) __builtin_prefetch(places + kAhead);
      each<R>([&](int r) LISSOM_INLINE {
        const int32_t inputs = load_four(four + r * padded);
        each<N>([&](int n) LISSOM_INLINE {
          const int i = (chain * R + r) * N + n;
          sum[i] = Codes::dot(sum[i], c[n], inputs);
        });
      });
      p += Codes::kStepBytes;
      if (Codes::kSparse) places += kPlacesBytes;
      four += 4;
    };
    if (kChains == 2) {
      while (four + 4 < last) {
        step(0);
        step(kChains - 1);
      }
    }
    while (four < last) step(0);
    const int64_t at = (tile * w.groups + (w.groups == 1 ? 0 : begin / group)) * kTile;
    each<N>([&](int n) LISSOM_INLINE {
      const Float scale = load_scales<V>(w, at + n * V::kLanes);
      Int zero = V::set_int(0);
      if (kZeros) zero = V::load_zeros(w.zeros + at + n * V::kLanes);
      each<R>([&](int r) LISSOM_INLINE {
        Int s = sum[r * N + n];
        if (kChains == 2) s = V::add(s, sum[((kChains - 1) * R + r) * N + n]);
        if (kZeros) s = V::subtract_product(s, zero, x_sums[r * blocks + b]);
        const Float factor = V::set_float(x_scales[r * blocks + b] * Codes::kUnit);
        float* const total = y + r * kTile + n * V::kLanes;
        const Float scaled = V::multiply(V::to_float(s), factor);
        V::store_float(total, V::fma(scaled, scale, V::load_float(total)));
      });
    });
  }
}

// How a format's values become floats: input i of a step, vector n of the tile.
template <class V>
struct Int8Values {
  static constexpr bool kSparse = false;
  static constexpr int kInputs = 4, kStepBytes = 128;
  static constexpr bool kScaled = true;
  static inline typename V::Float get(const uint8_t* p, const uint8_t*, int i, int n, bool zeros) {
    const typename V::Float c = V::byte_to_float(V::load(p + n * V::kLanes * 4), i);
    return zeros ? c : V::add(c, V::set_float(-128));
  }
};

template <class V>
struct NibbleValues {
  static constexpr bool kSparse = false;
  static constexpr int kInputs = 4, kStepBytes = 64;
  static constexpr bool kScaled = true;
  static inline typename V::Float look_up(const uint8_t* p, int i, int n, const float* table) {
    constexpr int kHalf = V::kVectors / 2;
    const int high = n >= kHalf;
    const typename V::Bytes both = V::load(p + (n - high * kHalf) * V::kLanes * 4);
    return V::lookup_float(table, both, 8 * i + 4 * high);
  }
};

template <class V>
struct Int4Values : NibbleValues<V> {
  static inline typename V::Float get(const uint8_t* p, const uint8_t*, int i, int n, bool zeros) {
    const typename V::Float c = NibbleValues<V>::look_up(p, i, n, kInt4Values);
    return zeros ? V::add(c, V::set_float(8)) : c;
  }
};

template <class V>
struct Nf4Values : NibbleValues<V> {
  static inline typename V::Float get(const uint8_t* p, const uint8_t*, int i, int n, bool) {
    return NibbleValues<V>::look_up(p, i, n, kNf4Values);
  }
};

template <class V>
struct Bf16Values {
  static constexpr bool kSparse = false;
  static constexpr int kInputs = 2, kStepBytes = 128;
  static constexpr bool kScaled = false;
  static inline typename V::Float get(const uint8_t* p, const uint8_t*, int i, int n, bool) {
    const typename V::Bytes both = V::load(p + n * V::kLanes * 4);
    return i ? V::odd_bf16(both) : V::even_bf16(both);
  }
};

template <class V>
struct F16Values {
  static constexpr bool kSparse = false;
  static constexpr int kInputs = 1, kStepBytes = 64;
  static constexpr bool kScaled = false;
  static inline typename V::Float get(const uint8_t* p, const uint8_t*, int, int n, bool) {
    return V::load_f16(p + n * V::kLanes * 2);
  }
};

template <class V>
struct Fp8Values {
  static constexpr bool kSparse = false;
  static constexpr int kInputs = 1, kStepBytes = 32;
  static constexpr bool kScaled = true;
  static inline typename V::Float get(const uint8_t* p, const uint8_t*, int, int n, bool) {
    return V::load_fp8(p + n * V::kLanes);
  }
};

template <class V, class Codes>
struct Of4Values {
  static constexpr bool kSparse = true;
  static constexpr int kInputs = 4, kStepBytes = Codes::kStepBytes;
  static constexpr bool kScaled = true;
  static inline typename V::Float get(const uint8_t* p, const uint8_t* places, int i, int n,
                                      bool) {
    const typename V::Float c = V::byte_to_float(Codes::vector(p, places, n), i);
    return V::add(c, V::set_float(-Codes::kZero));
  }
};

template <class V>
struct Bf16Of4Values {
  static constexpr bool kSparse = true;
  static constexpr int kInputs = 4, kStepBytes = 128;
  static constexpr bool kScaled = false;
  // Inputs 0 and 1, or 2 and 3.
  static inline typename V::Bytes two(const uint8_t* p, const uint8_t* places, int n, bool last) {
    const typename V::Bytes pairs = V::load(p + n * V::kLanes * 4);
    return V::put(pairs, V::places(places, n), last ? kPutLast.bytes : kPutFirst.bytes);
  }
  static inline typename V::Float get(const uint8_t* p, const uint8_t* places, int i, int n,
                                      bool) {
    const typename V::Bytes both = two(p, places, n, i >= 2);
    return i % 2 ? V::odd_bf16(both) : V::even_bf16(both);
  }
};

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
