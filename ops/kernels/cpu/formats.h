// How the codes and values of each format are read, written once over a vector type V.
//
// Included by product.h, within the target of the file that includes that, into its own anonymous
// namespace. Codes of the integer product become words; values of the floating one become floats.

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
// The 4-bit floats of mxfp4 and nvfp4 (e2m1) are whole halves: words are 12 + 2 * value, exactly.
constexpr float kE2m1Values[16] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6, 0, -0.5f, -1, -1.5f, -2, -3, -4, -6};
constexpr uint8_t kE2m1Words[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
constexpr float kInt4Values[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

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

template <class V>
struct E2m1Codes {
  static constexpr bool kSparse = false;
  static constexpr int kStepBytes = 64;
  static constexpr int kZero = 12;
  static constexpr float kUnit = 0.5f;
  static inline void load(const uint8_t* p, const uint8_t*, int n, typename V::Bytes* even,
                          typename V::Bytes* odd) {
    const typename V::Bytes both = V::load(p + n * V::kLanes * 4);
    const typename V::Bytes codes[2] = {V::low(both), V::high(both)};
    each<2>([&](int v) LISSOM_INLINE {
      const typename V::Bytes words = V::lookup(kE2m1Words, codes[v]);
      even[v] = V::even_words(words), odd[v] = V::odd_words(words);
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
struct E2m1Values : NibbleValues<V> {
  static inline typename V::Float get(const uint8_t* p, const uint8_t*, int i, int n, bool) {
    return NibbleValues<V>::look_up(p, i, n, kE2m1Values);
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

}  // namespace
}  // namespace lissom
