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
// Words for the integer product: 512 + round(kNf4Unit * value), at most 10 bits so that sums of a
// block fit into int32. Of all units below 511 this one rounds with the least mean square error:
// 0.00034 of a group's largest weight, against 0.03 or so that NF4 itself costs.
constexpr float kNf4Unit = 503.10f;
constexpr uint8_t kNf4Low[16] = {9, 162, 248, 57, 113, 163, 210, 0,
                                    40, 81, 124, 170, 222, 27, 108, 247};
constexpr uint8_t kNf4High[16] = {0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3, 3};
constexpr float kInt4Values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

inline int32_t load_two(const int16_t* x) {
  int32_t two;
  memcpy(&two, x, 4);
  return two;
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

// How a format's codes become the words of the integer product: `even` and `odd` words of two vectors
// at a time, so that each broadcast of activations serves both. Of the kVectors vectors of a step,
// load n has n and n + kVectors / 2.
template <class V>
struct Int8Codes {
  static constexpr bool kSparse = false;
  static constexpr int kStepBytes = 128;
  static constexpr int kZero = 128;
  static constexpr float kUnit = 1;
  static inline void load(const uint8_t* p, const uint8_t*, int n, typename V::Bytes* even,
                          typename V::Bytes* odd) {
    each<2>([&](int v) LISSOM_INLINE {
      const typename V::Bytes c = V::load(p + (n + v * V::kVectors / 2) * V::kLanes * 4);
      even[v] = V::even_words(c), odd[v] = V::odd_words(c);
    });
  }
  static inline void settle(typename V::Int*) {}
};

// Output o + 16 stands above output o. Left there it adds 16 times its own sum to that of output o,
// which `settle` takes away: two masks less for each load.
template <class V>
struct Int4Codes {
  static constexpr bool kSparse = false;
  static constexpr int kStepBytes = 64;
  static constexpr int kZero = 8;
  static constexpr float kUnit = 1;
  static inline void load(const uint8_t* p, const uint8_t*, int n, typename V::Bytes* even,
                          typename V::Bytes* odd) {
    const typename V::Bytes both = V::load(p + n * V::kLanes * 4);
    even[0] = V::even_words(both), odd[0] = V::odd_words(both);
    even[1] = V::high_words(even[0]), odd[1] = V::high_words(odd[0]);
  }
  static inline void settle(typename V::Int* sum) {
    constexpr int kHalf = V::kVectors / 2;
    each<kHalf>([&](int n) LISSOM_INLINE {
      sum[n] = V::subtract_product(sum[n], sum[n + kHalf], 16);
    });
  }
};

template <class V>
struct Nf4Codes {
  static constexpr bool kSparse = false;
  static constexpr int kStepBytes = 64;
  static constexpr int kZero = 512;
  static constexpr float kUnit = 1 / kNf4Unit;
  static inline void load(const uint8_t* p, const uint8_t*, int n, typename V::Bytes* even,
                          typename V::Bytes* odd) {
    const typename V::Bytes both = V::load(p + n * V::kLanes * 4);
    const typename V::Bytes codes[2] = {V::low(both), V::high(both)};
    each<2>([&](int v) LISSOM_INLINE {
      const typename V::Bytes low = V::lookup(kNf4Low, codes[v]);
      const typename V::Bytes high = V::lookup(kNf4High, codes[v]);
      even[v] = V::even_words(low, high), odd[v] = V::odd_words(low, high);
    });
  }
  static inline void settle(typename V::Int*) {}
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
  static inline void load(const uint8_t* p, const uint8_t* places, int n, typename V::Bytes* even,
                          typename V::Bytes* odd) {
    each<2>([&](int v) LISSOM_INLINE {
      const typename V::Bytes c = vector(p, places, n + v * V::kVectors / 2);
      even[v] = V::even_words(c), odd[v] = V::odd_words(c);
    });
  }
};

template <class V>
struct Int4Of4Codes : Int8Codes<V> {
  static constexpr bool kSparse = true;
  static constexpr int kStepBytes = 32;
  static constexpr int kZero = 8;
  static inline typename V::Bytes vector(const uint8_t* p, const uint8_t* places, int n) {
    constexpr int kHalf = V::kVectors / 2;
    const bool high = n >= kHalf;
    const typename V::Bytes both = V::load_pairs(p + (n - high * kHalf) * V::kLanes * 2);
    const typename V::Bytes pairs = high ? V::high(both) : V::low(both);
    return V::flip(V::put(pairs, V::places(places, n), kPutBytes.bytes), 8);
  }
  static inline void load(const uint8_t* p, const uint8_t* places, int n, typename V::Bytes* even,
                          typename V::Bytes* odd) {
    each<2>([&](int v) LISSOM_INLINE {
      const typename V::Bytes c = vector(p, places, n + v * V::kVectors / 2);
      even[v] = V::even_words(c), odd[v] = V::odd_words(c);
    });
  }
};

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
