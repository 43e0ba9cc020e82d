// AVX512-BF16: dot products of bf16 pairs, for bf16 weights and bf16 activations.
//
// float32 activations do not come here. Split into two bf16 terms they would cost as many
// instructions as widened weights and FMA, and lose 8 bits of mantissa; see product.h.

#if defined(__x86_64__)

#include <immintrin.h>
#include <string.h>

#include <utility>

#include "attention.h"
#include "target.h"
#include "types.h"

LISSOM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c")

namespace lissom {
namespace {

inline __m512bh as_bf16(__m512i x) {
  __m512bh y;
  memcpy(&y, &x, sizeof(y));
  return y;
}

}  // namespace
}  // namespace lissom

#include "avx512.h"
#include "drive.h"

namespace lissom {
namespace {

// Of one vector of outputs and a step, how many pairs of inputs, and the pair at hand.
struct Dense {
  static constexpr bool kSparse = false;
  static constexpr int kPairs = 1;
  static inline __m512i get(const uint8_t* p, const uint8_t*, int n, int) {
    return _mm512_loadu_si512(p + 64 * n);
  }
};

struct TwoOfFour {
  static constexpr bool kSparse = true;
  static constexpr int kPairs = 2;
  static inline __m512i get(const uint8_t* p, const uint8_t* places, int n, int pair) {
    return Bf16Of4Values<Avx512>::two(p, places, n, pair);
  }
};

template <class Values, int R>
void half_tile(const Weights& w, const Rows& x, int64_t row, int64_t tile, float* y) {
  constexpr int kPairs = Values::kPairs;
  constexpr int kChains = R == 1 ? 2 : 1;
  const int64_t padded = w.padded_inputs();
  const uint8_t* p = w.values + tile * w.tile_bytes();
  const uint8_t* places = w.places + tile * w.places_bytes();
  const uint16_t* in = x.halves + row * padded;
  const uint16_t* const last = in + padded;
  __m512 sum[kChains * R * 2];
  each<kChains * R * 2>([&](int i) LISSOM_INLINE { sum[i] = _mm512_setzero_ps(); });
  const auto step = [&](int chain) LISSOM_INLINE {
    __builtin_prefetch(p + kAhead);
    __builtin_prefetch(p + kAhead + 64);
    if (Values::kSparse) __builtin_prefetch(places + kAhead);
    each<kPairs>([&](int pair) LISSOM_INLINE {
      const int c = (chain + pair) % kChains;
      const __m512bh left = as_bf16(Values::get(p, places, 0, pair));
      const __m512bh right = as_bf16(Values::get(p, places, 1, pair));
      each<R>([&](int r) LISSOM_INLINE {
        int32_t pair_of_inputs;
        memcpy(&pair_of_inputs, in + r * padded + 2 * pair, 4);
        const __m512bh two = as_bf16(_mm512_set1_epi32(pair_of_inputs));
        const int i = (c * R + r) * 2;
        sum[i] = _mm512_dpbf16_ps(sum[i], left, two);
        sum[i + 1] = _mm512_dpbf16_ps(sum[i + 1], right, two);
      });
    });
    p += 128;
    if (Values::kSparse) places += kPlacesBytes;
    in += 2 * kPairs;
  };
  while (in + 2 * kPairs < last) {
    step(0);
    step(kChains - 1);
  }
  if (in < last) step(0);
  each<R * 2>([&](int i) LISSOM_INLINE {
    const __m512 s = kChains == 2 ? _mm512_add_ps(sum[i], sum[(kChains - 1) * R * 2 + i]) : sum[i];
    _mm512_storeu_ps(y + i * 16, s);
  });
}

template <class Values>
constexpr Tiles half_tiles() {
  return {{half_tile<Values, 1>, half_tile<Values, 2>, half_tile<Values, 3>, half_tile<Values, 4>,
           half_tile<Values, 5>, half_tile<Values, 6>, half_tile<Values, 7>, half_tile<Values, 8>}};
}

void half(const Weights& w, const Rows& x, Output out, Range rows, Range range) {
  static constexpr Tiles dense = half_tiles<Dense>(), two_of_four = half_tiles<TwoOfFour>();
  walk(w.sparse() ? two_of_four : dense, 8, w, x, out, rows, range);
}

bool supported() {
  return __builtin_cpu_supports("avx512bf16") && kAvx512.supported();
}

void integer_512(const Weights& w, const Rows& x, Output out, Range rows, Range range) {
  kAvx512.integer(w, x, out, rows, range);
}

void floating_512(const Weights& w, const Rows& x, Output out, Range rows, Range range) {
  kAvx512.floating(w, x, out, rows, range);
}

void attend_512(const Attention& a, int64_t row, Range slots, Partial out) {
  kAvx512.attend(a, row, slots, out);
}

void prefill_512(const Attention& a, const Bounds* spans, Task task, float* memory) {
  kAvx512.prefill(a, spans, task, memory);
}

}  // namespace

extern const Kernels kAvx512Bf16 = {"avx512_bf16", supported, quantize, integer_512, floating_512,
                                    half, attend_512, prefill_512};

}  // namespace lissom

LISSOM_TARGET_END

#endif  // __x86_64__
