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
constexpr float kLog2E = 1.44269504f;

// 2^x for x <= 0, to 2 units in the last place; below -127 it is 0. The polynomial has the least
// relative error of its degree on [-1/2, 1/2] (1e-7), and gives exactly 1 at 0.
template <class V>
LISSOM_INLINE inline typename V::Float exp2_of_negative(typename V::Float x) {
  using Float = typename V::Float;
  const Float round = V::set_float(kRoundToInteger);
  x = V::largest(V::set_float(-127.0f), x);
  const Float shifted = V::add(x, round);
  const Float f = V::subtract(x, V::subtract(shifted, round));
  Float y = V::set_float(1.326472731307149e-3f);
  y = V::fma(y, f, V::set_float(9.671512991189957e-3f));
  y = V::fma(y, f, V::set_float(5.550733581185341e-2f));
  y = V::fma(y, f, V::set_float(2.402224242687225e-1f));
  y = V::fma(y, f, V::set_float(6.931470036506653e-1f));
  // At -127 this is exactly 1, whose exponent becomes that of zero.
  return V::times_power(V::fma(y, f, V::set_float(1.0f)), shifted);
}

// To a few units in the last place. The quotient of polynomials is that of Eigen's ptanh.
template <class V>
LISSOM_INLINE inline typename V::Float tanh_of(typename V::Float x) {
  using Float = typename V::Float;
  x = V::largest(V::set_float(-7.90531110763549805f), x);
  x = V::smallest(V::set_float(7.90531110763549805f), x);
  const Float square = V::multiply(x, x);
  Float over = V::set_float(-2.76076847742355e-16f), under = V::set_float(1.19825839466702e-06f);
  for (const float next : {2.00018790482477e-13f, -8.60467152213735e-11f, 5.12229709037114e-08f,
                           1.48572235717979e-05f, 6.37261928875436e-04f, 4.89352455891786e-03f})
    over = V::fma(over, square, V::set_float(next));
  for (const float next : {1.18534705686654e-04f, 2.26843463243900e-03f, 4.89352518554385e-03f})
    under = V::fma(under, square, V::set_float(next));
  return V::divide(V::multiply(x, over), under);
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

template <class V>
LISSOM_INLINE inline typename V::Float exp_of_negative(typename V::Float x) {
  return exp2_of_negative<V>(V::multiply(x, V::set_float(kLog2E)));
}

// Hides the slots that a query does not see, and what lacks to kSlots.
inline void hide(const Attention& a, int32_t q_position, const int32_t* k_positions, int slots,
                 float* scores) {
  const uint32_t position = q_position, window = a.window;
  const int32_t first = a.first;
  for (int s = 0; s < slots; ++s) {
    const uint32_t reach = k_positions[s] < first ? kEverywhere : window;
    const bool seen = position - static_cast<uint32_t>(k_positions[s]) < reach;
    scores[s] = seen ? scores[s] : kMasked;
  }
  for (int s = slots; s < kSlots; ++s) scores[s] = kMasked;
}

// The largest of scores and `top`.
template <class V>
inline float largest(const float* scores, float top) {
  constexpr int L = V::kLanes;
  typename V::Float tops = V::set_float(top);
  for (int s = 0; s < kSlots; s += L) tops = V::largest(V::load_float(scores + s), tops);
  float lanes[L];
  V::store_float(lanes, tops);
  for (int i = 0; i < L; ++i) top = lanes[i] > top ? lanes[i] : top;
  return top;
}

// Turns the scores of a query into weights, with what it has seen before in `peak` and `total`.
// Returns what its sum of values is to be scaled by.
template <class V>
inline float soften(float* scores, float* peak, float* total) {
  using Float = typename V::Float;
  constexpr int L = V::kLanes;
  const float top = largest<V>(scores, *peak);
  const Float scale = exp_of_negative<V>(V::set_float(*peak - top));
  Float sum = V::set_float(0);
  for (int s = 0; s < kSlots; s += L) {
    const Float below = V::subtract(V::load_float(scores + s), V::set_float(top));
    const Float weight = exp_of_negative<V>(below);
    sum = V::add(sum, weight);
    V::store_float(scores + s, weight);
  }
  float factor[L];
  V::store_float(factor, scale);
  *peak = top;
  *total = *total * factor[0] + V::sum(sum);
  return factor[0];
}

template <class V>
inline void cap(float softcap, float* scores) {
  for (int s = 0; s < kSlots; s += V::kLanes) {
    const auto x = V::divide(V::load_float(scores + s), V::set_float(softcap));
    V::store_float(scores + s, V::multiply(V::set_float(softcap), tanh_of<V>(x)));
  }
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
      float* const scores = out.weights + i * kSlots;
      if (a.softcap > 0) cap<V>(a.softcap, scores);
      hide(a, a.q_positions[row * a.queries + query], a.k_positions + row * a.keys + block.begin,
           static_cast<int>(block.end - block.begin), scores);
      out.scales[i] = soften<V>(scores, out.peaks + i, out.totals + i);
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
