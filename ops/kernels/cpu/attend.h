// Attention of a few queries over the keys and values of a cache, where they lie.
//
// Included after drive.h, in the same anonymous namespace. Keys are read once, and values once, from
// the first slot that a query sees to the last, all heads of a slot together: in the order in which
// they lie, or the hardware's prefetchers would lose the track. Scores are kept for kSlots alone and
// the softmax is kept up online: sums of values are scaled down when a larger score turns up
// (Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867). All arithmetic is in float32.
// Up to four queries that read the same head share each load.

#include "attention.h"

namespace lissom {
namespace {

constexpr int kWindow = 8;      // slots that all heads read before the next ones
constexpr int kMostQueries = 4;  // that share a load
constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23

// exp(x) for x <= 0, to 2 units in the last place; below -87 it is 0. Plain arithmetic without
// branches, for compilers to vectorize. After Cephes' expf.
LISSOM_INLINE inline float exp_of_negative(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * 1.44269504f + kRoundToInteger;
  const float n = shifted - kRoundToInteger;
  const float f = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * f + 1.3981999507e-3f;
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = y * f * f + f + 1.0f;
  uint32_t power, bits;
  memcpy(&power, &shifted, 4);
  memcpy(&bits, &y, 4);
  bits += power << 23;  // what lies above the integer in `shifted` is shifted out
  memcpy(&y, &bits, 4);
  return x < -87.0f ? 0.0f : y;
}

struct Floats {
  using Number = float;
  template <class V>
  static inline typename V::Float load(const float* p) { return V::load_float(p); }
  static inline float widen(float x) { return x; }
};

struct Halves {
  using Number = uint16_t;
  template <class V>
  static inline typename V::Float load(const uint16_t* p) { return V::load_bf16(p); }
  static inline float widen(uint16_t x) { return from_bf16(x); }
};

struct Codes {
  using Number = int8_t;
  template <class V>
  static inline typename V::Float load(const int8_t* p) { return V::load_int8(p); }
  static inline float widen(int8_t x) { return x; }
};

// scores[R][kSlots]: R queries, `width` apart, by `slots` keys, `stride` apart.
template <class V, class From, int R>
void score(const float* q, const typename From::Number* k, int64_t stride, int64_t width,
           int64_t slots, float* scores) {
  using Float = typename V::Float;
  const int64_t whole = width / V::kLanes * V::kLanes;
  for (int64_t s = 0; s < slots; ++s, k += stride) {
    Float sum[R];
    each<R>([&](int r) LISSOM_INLINE { sum[r] = V::set_float(0); });
    for (int64_t h = 0; h < whole; h += V::kLanes) {
      const Float key = From::template load<V>(k + h);
      __builtin_prefetch(reinterpret_cast<const uint8_t*>(k + h) + kAhead);
      each<R>([&](int r) LISSOM_INLINE {
        sum[r] = V::fma(V::load_float(q + r * width + h), key, sum[r]);
      });
    }
    each<R>([&](int r) LISSOM_INLINE {
      float total = V::sum(sum[r]);
      for (int64_t h = whole; h < width; ++h) total += q[r * width + h] * From::widen(k[h]);
      scores[r * kSlots + s] = total;
    });
  }
}

// Adds `slots` values, each times its weight, to R sums, `width` apart, that are scaled first.
template <class V, class From, int R, int N>
void blend_some(const float* weights, const float* scales, const typename From::Number* v,
                int64_t stride, int64_t width, int64_t slots, float* sums) {
  using Float = typename V::Float;
  Float total[R * N];
  each<R * N>([&](int i) LISSOM_INLINE {
    const float* from = sums + i / N * width + i % N * V::kLanes;
    total[i] = V::multiply(V::load_float(from), V::set_float(scales[i / N]));
  });
  for (int64_t s = 0; s < slots; ++s, v += stride) {
    Float value[N];
    each<N>([&](int n) LISSOM_INLINE {
      value[n] = From::template load<V>(v + n * V::kLanes);
      __builtin_prefetch(reinterpret_cast<const uint8_t*>(v + n * V::kLanes) + kAhead);
    });
    each<R>([&](int r) LISSOM_INLINE {
      const Float weight = V::set_float(weights[r * kSlots + s]);
      each<N>([&](int n) LISSOM_INLINE {
        total[r * N + n] = V::fma(weight, value[n], total[r * N + n]);
      });
    });
  }
  each<R * N>([&](int i) LISSOM_INLINE {
    V::store_float(sums + i / N * width + i % N * V::kLanes, total[i]);
  });
}

template <class V, class From, int R>
void blend(const float* weights, const float* scales, const typename From::Number* v,
           int64_t stride, int64_t width, int64_t slots, float* sums) {
  constexpr int N = V::kLanes < 16 ? 2 : 4;  // R * N sums stay in registers
  int64_t h = 0;
  for (; h + N * V::kLanes <= width; h += N * V::kLanes)
    blend_some<V, From, R, N>(weights, scales, v + h, stride, width, slots, sums + h);
  for (; h + V::kLanes <= width; h += V::kLanes)
    blend_some<V, From, R, 1>(weights, scales, v + h, stride, width, slots, sums + h);
  for (; h < width; ++h) {
    for (int r = 0; r < R; ++r) {
      float total = sums[r * width + h] * scales[r];
      for (int64_t s = 0; s < slots; ++s)
        total += weights[r * kSlots + s] * From::widen(v[s * stride + h]);
      sums[r * width + h] = total;
    }
  }
}

constexpr int kLanes = 16;  // independent results, so that compilers vectorize and none waits

inline float largest(const float* scores, float top) {
  float tops[kLanes];
  for (int i = 0; i < kLanes; ++i) tops[i] = top;
  for (int s = 0; s < kSlots; s += kLanes)
    for (int i = 0; i < kLanes; ++i) tops[i] = scores[s + i] > tops[i] ? scores[s + i] : tops[i];
  for (int i = 0; i < kLanes; ++i) top = tops[i] > top ? tops[i] : top;
  return top;
}

inline float sum_of(const float* weights) {
  float sums[kLanes] = {};
  for (int s = 0; s < kSlots; s += kLanes)
    for (int i = 0; i < kLanes; ++i) sums[i] += weights[s + i];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

// Turns the scores of a query into weights, with what it has seen before in `peak` and `total`.
// Returns what its sum of values is to be scaled by.
inline float soften(const Attention& a, int32_t q_position, const int32_t* k_positions, int slots,
                    float* scores, float* peak, float* total) {
  if (a.softcap > 0) {
    for (int s = 0; s < slots; ++s) {
      const float x = scores[s] / a.softcap;
      const float e = exp_of_negative(x < 0 ? 2 * x : -2 * x);
      const float size = a.softcap * ((1 - e) / (1 + e));
      scores[s] = x < 0 ? -size : size;
    }
  }
  for (int s = 0; s < slots; ++s)
    scores[s] = a.sees(q_position, k_positions[s]) ? scores[s] : kMasked;
  for (int s = slots; s < kSlots; ++s) scores[s] = kMasked;
  const float top = largest(scores, *peak), scale = exp_of_negative(*peak - top);
  for (int s = 0; s < kSlots; ++s) scores[s] = exp_of_negative(scores[s] - top);
  *peak = top;
  *total = *total * scale + sum_of(scores);
  return scale;
}

// Multiplies the numbers of R queries for some slots, `stride` scales apart, by the slots' scales.
template <int R>
void rescale(const uint16_t* scales, int64_t stride, int64_t slots, float* numbers) {
  for (int64_t s = 0; s < slots; ++s, scales += stride) {
    const float scale = from_f16(*scales);
    for (int r = 0; r < R; ++r) numbers[r * kSlots + s] *= scale;
  }
}

// Scores (`values` false) or sums of values of some queries of one head over the slots of a window,
// which begins at slot `at` of its block.
template <class V, class From, int R>
void read_window(const Attention& a, bool values, int64_t row, int64_t head, int64_t first,
                 Range window, int64_t at, Partial out) {
  using Number = typename From::Number;
  const int64_t stride = a.kv_heads * a.width;
  const int64_t from = (row * a.keys + window.begin) * stride + head * a.width;
  const int64_t count = window.end - window.begin;
  const int64_t scale = (row * a.keys + window.begin) * a.kv_heads + head;
  float* weights = out.weights + first * kSlots + at;
  if (values) {
    if (a.v_scales != nullptr) rescale<R>(a.v_scales + scale, a.kv_heads, count, weights);
    blend<V, From, R>(weights, out.scales + first, static_cast<const Number*>(a.v) + from, stride,
                      a.width, count, out.sums + first * a.width);
  } else {
    score<V, From, R>(a.scaled_q + (row * a.rows() + first) * a.width,
                      static_cast<const Number*>(a.k) + from, stride, a.width, count, weights);
    if (a.k_scales != nullptr) rescale<R>(a.k_scales + scale, a.kv_heads, count, weights);
  }
}

template <class V, class From>
void read_block(const Attention& a, bool values, int64_t row, Range block, Partial out) {
  using Read = void (*)(const Attention&, bool, int64_t, int64_t, int64_t, Range, int64_t, Partial);
  static constexpr Read reads[kMostQueries] = {read_window<V, From, 1>, read_window<V, From, 2>,
                                               read_window<V, From, 3>, read_window<V, From, 4>};
  const int64_t queries = a.group() * a.queries;
  for (Range window = {block.begin, block.begin}; window.end < block.end;
       window.begin = window.end) {
    window.end = block.end - window.begin < kWindow ? block.end : window.begin + kWindow;
    for (int64_t first = 0; first < a.rows();) {
      const int64_t head = first / queries, left = (head + 1) * queries - first;
      const int64_t count = left < kMostQueries ? left : kMostQueries;
      reads[count - 1](a, values, row, head, first, window, window.begin - block.begin, out);
      first += count;
    }
    if (values && window.begin == block.begin)
      for (int64_t i = 0; i < a.rows(); ++i) out.scales[i] = 1;
  }
}

template <class V, class From>
void attend_slots(const Attention& a, int64_t row, Range slots, Partial out) {
  for (Range block = {slots.begin, slots.begin}; block.end < slots.end; block.begin = block.end) {
    block.end = slots.end - block.begin < kSlots ? slots.end : block.begin + kSlots;
    read_block<V, From>(a, false, row, block, out);
    for (int64_t i = 0; i < a.rows(); ++i) {
      const int64_t query = i % (a.group() * a.queries) / a.group();
      out.scales[i] = soften(a, a.q_positions[row * a.queries + query],
                             a.k_positions + row * a.keys + block.begin,
                             static_cast<int>(block.end - block.begin), out.weights + i * kSlots,
                             out.peaks + i, out.totals + i);
    }
    read_block<V, From>(a, true, row, block, out);
  }
}

template <class V>
void attend(const Attention& a, int64_t row, Range slots, Partial out) {
  for (int64_t i = 0; i < a.rows(); ++i) {
    out.peaks[i] = kMasked / 2;  // above what is masked, so that its weight is exactly zero
    out.totals[i] = 0;
  }
  memset(out.sums, 0, a.rows() * a.width * sizeof(float));
  switch (a.stored) {
    case Stored::kFloat32: return attend_slots<V, Floats>(a, row, slots, out);
    case Stored::kBf16: return attend_slots<V, Halves>(a, row, slots, out);
    case Stored::kInt8: return attend_slots<V, Codes>(a, row, slots, out);
  }
}

}  // namespace
}  // namespace lissom
