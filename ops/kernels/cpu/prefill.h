// Attention of many queries, all scores of which are gone before the next block of keys is read.
//
// Included after attend.h, in the same anonymous namespace. A task is some queries with all heads that
// read one key/value head: its rows of scores. Rows lie in the lanes of vectors, three vectors of them
// are a strip, and for each block of keys a strip goes through three steps in the nearest cache:
//
//   scores   [keys][strip]   each number of a key, broadcast, meets the strip's queries [width][strip]
//   soften                   scores become weights; largest score and sum of each row are kept up online
//   blend    [width][strip]  each number of a value, broadcast, meets the strip's weights
//
// So no maximum or sum goes across the lanes of a vector, and the two products keep 12 sums (24 with
// AVX-512) in registers for 7 (11) loads a step. Scores are in units of log 2 and start at -1e30.
// Keys and values are copied block by block, as they may be bf16 or int8, and as the distance of
// two keys of a head is often a power of two, which few lines of a cache can hold.

#include "attention.h"

namespace lissom {
namespace {

constexpr int kRowsAhead = 8;  // keys that are on their way from memory
constexpr float kLn2 = 0.693147181f;

template <class V>
struct Strip {
  static constexpr int kAcross = 3, kRows = kAcross * V::kLanes;
  static constexpr int kDeep = V::kLanes < 16 ? 4 : 8;  // keys, or numbers of a value, of a step
  // Floats from one panel of values to the next: no power of two, or all would meet in few lines.
  static constexpr int kPanel = kBlockKeys * kDeep + kSpan;
};

// What a worker holds of a task, in `memory` of prefill_floats(width).
template <class V>
struct Work {
  static constexpr int kRows = Strip<V>::kRows, kDeep = Strip<V>::kDeep;
  const Attention& a;
  const Bounds* spans;  // of the row's keys
  Task task;
  float *q, *out;        // [strip][width][kRows]
  float *peaks, *totals;  // [rows]
  int32_t *positions, *segments;
  float *keys, *values;  // [kBlockKeys][width], and [width / kDeep] panels of [kBlockKeys][kDeep]
  float *scores;         // [kBlockKeys][kRows]
  float *one;            // a value, as it is widened

  Work(const Attention& attention, const Bounds* all, Task at, float* memory)
      : a(attention), spans(all + at.row * ((attention.keys + kSpan - 1) / kSpan)), task(at) {
    q = memory;
    out = q + kMostRows * a.width;
    keys = out + kMostRows * whole_width();
    values = keys + kBlockKeys * a.width;
    scores = values + whole_width() / kDeep * Strip<V>::kPanel;
    peaks = scores + kBlockKeys * kRows;
    totals = peaks + kMostRows;
    positions = reinterpret_cast<int32_t*>(totals + kMostRows);
    segments = positions + kMostRows;
    one = reinterpret_cast<float*>(segments + kMostRows);
  }

  int64_t whole_width() const { return (a.width + kDeep - 1) / kDeep * kDeep; }
  int64_t rows() const { return (task.end - task.begin) * a.group(); }
  int64_t strips() const { return (rows() + kRows - 1) / kRows; }
  // Rows that fill up the last strip repeat the last one.
  int64_t real(int64_t row) const { return row < rows() ? row : rows() - 1; }
  int64_t query(int64_t row) const { return task.begin + real(row) / a.group(); }
  int64_t head(int64_t row) const { return task.head * a.group() + real(row) % a.group(); }
  // The place of the first number of a row in q and in y.
  int64_t place(int64_t row) const {
    return ((task.row * a.queries + query(row)) * a.heads + head(row)) * a.width;
  }
};

template <class V>
void take_queries(const Work<V>& w) {
  const Attention& a = w.a;
  const float factor = a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2E;
  for (int64_t row = 0; row < w.strips() * w.kRows; ++row) {
    float* to = w.q + row / w.kRows * w.kRows * a.width + row % w.kRows;
    const int64_t from = w.place(row);
    if (a.q_bf16) {
      const uint16_t* q = static_cast<const uint16_t*>(a.q) + from;
      for (int64_t h = 0; h < a.width; ++h) to[h * w.kRows] = factor * from_bf16(q[h]);
    } else {
      const float* q = static_cast<const float*>(a.q) + from;
      for (int64_t h = 0; h < a.width; ++h) to[h * w.kRows] = factor * q[h];
    }
    const int64_t query = w.task.row * a.queries + w.query(row);
    w.positions[row] = a.q_positions[query];
    w.segments[row] = a.q_segments == nullptr ? 0 : a.q_segments[query];
    w.peaks[row] = kMasked / 2;  // above what is masked, so that its weight is exactly zero
    w.totals[row] = 0;
  }
  memset(w.out, 0, w.strips() * w.kRows * w.whole_width() * sizeof(float));
}

// Widens `count` numbers, times `scale`.
template <class V, class From>
LISSOM_INLINE inline void widen(const typename From::Number* from, int64_t count, float scale,
                                float* to) {
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes)
    V::store_float(to + i, V::multiply(V::set_float(scale), From::template load<V>(from + i)));
  for (; i < count; ++i) to[i] = scale * From::widen(from[i]);
}

// Copies keys and values of the block's head; fills up to a whole number of spans with zeros.
template <class V, class From>
void take_keys(const Work<V>& w, Range block) {
  using Number = typename From::Number;
  const Attention& a = w.a;
  constexpr int kDeep = Strip<V>::kDeep;
  const int64_t filled = (block.end - block.begin + kSpan - 1) / kSpan * kSpan;
  for (int64_t s = 0; s < filled; ++s) {
    if (block.begin + s >= block.end) {
      memset(w.keys + s * a.width, 0, a.width * sizeof(float));
      memset(w.one, 0, w.whole_width() * sizeof(float));
    } else {
      const int64_t at = (w.task.row * a.keys + block.begin + s) * a.kv_heads + w.task.head;
      const int64_t ahead = (at + kRowsAhead * a.kv_heads) * a.width;
      for (int64_t h = 0; h < a.width; h += 64 / sizeof(Number)) {
        __builtin_prefetch(static_cast<const Number*>(a.k) + ahead + h);
        __builtin_prefetch(static_cast<const Number*>(a.v) + ahead + h);
      }
      const float k_scale = a.k_scales == nullptr ? 1.0f : from_f16(a.k_scales[at]);
      const float v_scale = a.v_scales == nullptr ? 1.0f : from_f16(a.v_scales[at]);
      widen<V, From>(static_cast<const Number*>(a.k) + at * a.width, a.width, k_scale,
                     w.keys + s * a.width);
      widen<V, From>(static_cast<const Number*>(a.v) + at * a.width, a.width, v_scale, w.one);
    }
    for (int64_t h = 0; h < a.width; h += kDeep)
      memcpy(w.values + h / kDeep * Strip<V>::kPanel + s * kDeep, w.one + h, kDeep * sizeof(float));
  }
}

// scores[keys][kRows] of keys[keys][width] and a strip of queries.
template <class V>
void score_strip(const float* q, const float* keys, int64_t width, int64_t count, float* scores) {
  using Float = typename V::Float;
  constexpr int A = Strip<V>::kAcross, D = Strip<V>::kDeep, L = V::kLanes;
  for (int64_t s = 0; s < count; s += D, keys += D * width, scores += D * A * L) {
    Float sum[D * A];
    each<D * A>([&](int i) LISSOM_INLINE { sum[i] = V::set_float(0); });
    const float* column = q;
    for (int64_t h = 0; h < width; ++h, column += A * L) {
      Float row[A];
      each<A>([&](int i) LISSOM_INLINE { row[i] = V::load_float(column + i * L); });
      each<D>([&](int d) LISSOM_INLINE {
        const Float number = V::set_float(keys[d * width + h]);
        each<A>([&](int i) LISSOM_INLINE {
          sum[d * A + i] = V::fma(number, row[i], sum[d * A + i]);
        });
      });
    }
    each<D * A>([&](int i) LISSOM_INLINE { V::store_float(scores + i * L, sum[i]); });
  }
}

// Adds the panels of values, each number times its key's weight, to out[width][kRows], which is scaled
// first.
template <class V>
void blend_strip(const float* weights, const float* values, const float* scales, Range keys,
                 int64_t panels, float* out) {
  using Float = typename V::Float;
  constexpr int A = Strip<V>::kAcross, D = Strip<V>::kDeep, L = V::kLanes;
  for (int64_t p = 0; p < panels; ++p, out += D * A * L, values += Strip<V>::kPanel) {
    Float sum[D * A];
    each<D * A>([&](int i) LISSOM_INLINE {
      sum[i] = V::multiply(V::load_float(out + i * L), V::load_float(scales + i % A * L));
    });
    const float* weight = weights + keys.begin * A * L;
    const float* const last = values + keys.end * D;
    for (const float* value = values + keys.begin * D; value < last; value += D, weight += A * L) {
      Float row[A];
      each<A>([&](int i) LISSOM_INLINE { row[i] = V::load_float(weight + i * L); });
      each<D>([&](int d) LISSOM_INLINE {
        const Float number = V::set_float(value[d]);
        each<A>([&](int i) LISSOM_INLINE {
          sum[d * A + i] = V::fma(number, row[i], sum[d * A + i]);
        });
      });
    }
    each<D * A>([&](int i) LISSOM_INLINE { V::store_float(out + i * L, sum[i]); });
  }
}

// Turns scores into weights; `scales` become what the rows' sums of values are to be scaled by.
template <class V>
void soften_strip(float* scores, int64_t count, float* peaks, float* totals, float* scales) {
  using Float = typename V::Float;
  constexpr int A = Strip<V>::kAcross, L = V::kLanes;
  Float top[A], sum[A];
  each<A>([&](int i) LISSOM_INLINE { top[i] = V::load_float(peaks + i * L); });
  for (int64_t s = 0; s < count; ++s)
    each<A>([&](int i) LISSOM_INLINE {
      top[i] = V::largest(V::load_float(scores + (s * A + i) * L), top[i]);
    });
  each<A>([&](int i) LISSOM_INLINE {
    const Float scale = exp2_of_negative<V>(V::subtract(V::load_float(peaks + i * L), top[i]));
    sum[i] = V::multiply(V::load_float(totals + i * L), scale);
    V::store_float(scales + i * L, scale);
    V::store_float(peaks + i * L, top[i]);
  });
  for (int64_t s = 0; s < count; ++s)
    each<A>([&](int i) LISSOM_INLINE {
      float* const at = scores + (s * A + i) * L;
      const Float weight = exp2_of_negative<V>(V::subtract(V::load_float(at), top[i]));
      sum[i] = V::add(sum[i], weight);
      V::store_float(at, weight);
    });
  each<A>([&](int i) LISSOM_INLINE { V::store_float(totals + i * L, sum[i]); });
}

template <class V>
void cap_strip(float* scores, int64_t count, float softcap) {
  const typename V::Float cap = V::set_float(softcap * kLog2E);
  for (int64_t i = 0; i < count * Strip<V>::kRows; i += V::kLanes)
    V::store_float(scores + i, V::multiply(cap, tanh_of<V>(V::load_float(scores + i))));
}

// Hides the keys of a span from the rows of a strip that do not see them.
template <class V>
void mask_strip(const Work<V>& w, int64_t strip, Range keys, float* scores) {
  constexpr int R = Strip<V>::kRows;
  const Attention& a = w.a;
  const int32_t *positions = w.positions + strip * R, *segments = w.segments + strip * R;
  for (int64_t s = keys.begin; s < keys.end; ++s, scores += R) {
    const int64_t at = w.task.row * a.keys + s;
    const bool held = s < a.keys;
    const uint32_t position = held ? a.k_positions[at] : 0;
    const uint32_t reach = held ? a.reach(a.k_positions[at]) : 0;
    const int32_t segment = held && a.k_segments != nullptr ? a.k_segments[at] : 0;
    for (int r = 0; r < R; ++r) {
      const bool near = static_cast<uint32_t>(positions[r]) - position < reach;
      const bool same = segments[r] == segment;
      scores[r] = near & same ? scores[r] : kMasked;
    }
  }
}

enum class Seen { kNone, kSome, kAll };

// How much the queries see of the keys, as far as their bounds tell.
inline Seen seen(const Attention& a, const Bounds& q, const Bounds& k) {
  const int64_t oldest = static_cast<int64_t>(q.least) - a.window;
  if (k.least > q.most || (k.most <= oldest && k.least >= a.first) ||
      k.most_segment < q.least_segment || k.least_segment > q.most_segment)
    return Seen::kNone;
  const bool near = static_cast<int64_t>(q.most) - k.least < a.window ||
                    (k.most < a.first && static_cast<int64_t>(q.most) - k.least < kEverywhere);
  const bool same = q.least_segment == q.most_segment && k.least_segment == k.most_segment;
  return k.whole && k.most <= q.least && near && same ? Seen::kAll : Seen::kSome;
}

inline Bounds bounds(const int32_t* positions, const int32_t* segments, int64_t count) {
  Bounds all = {positions[0], positions[0], segments[0], segments[0], true};
  for (int64_t i = 1; i < count; ++i) {
    all.least = positions[i] < all.least ? positions[i] : all.least;
    all.most = positions[i] > all.most ? positions[i] : all.most;
    all.least_segment = segments[i] < all.least_segment ? segments[i] : all.least_segment;
    all.most_segment = segments[i] > all.most_segment ? segments[i] : all.most_segment;
  }
  return all;
}

// A strip meets the keys of a block, which has been taken.
template <class V>
void add_block(const Work<V>& w, int64_t strip, Range block) {
  constexpr int R = Strip<V>::kRows;
  const Attention& a = w.a;
  const Bounds q = bounds(w.positions + strip * R, w.segments + strip * R, R);
  const int64_t span = block.begin / kSpan, count = (block.end - block.begin + kSpan - 1) / kSpan;
  Seen found[kBlockKeys / kSpan];
  Range spans = {count, 0};  // from the first to the last that is seen
  for (int64_t i = 0; i < count; ++i) {
    found[i] = seen(a, q, w.spans[span + i]);
    if (found[i] == Seen::kNone) continue;
    if (spans.begin > i) spans.begin = i;
    spans.end = i + 1;
  }
  if (spans.begin >= spans.end) return;
  const Range keys = {spans.begin * kSpan, spans.end * kSpan};
  const int64_t length = keys.end - keys.begin;
  float *const scores = w.scores + keys.begin * R, scales[R];
  score_strip<V>(w.q + strip * R * a.width, w.keys + keys.begin * a.width, a.width, length, scores);
  if (a.softcap > 0) cap_strip<V>(scores, length, a.softcap);
  for (int64_t i = spans.begin; i < spans.end; ++i) {
    const int64_t first = block.begin + i * kSpan;
    if (found[i] != Seen::kAll) mask_strip(w, strip, {first, first + kSpan}, w.scores + i * kSpan * R);
  }
  soften_strip<V>(scores, length, w.peaks + strip * R, w.totals + strip * R, scales);
  blend_strip<V>(w.scores, w.values, scales, keys, w.whole_width() / Strip<V>::kDeep,
                 w.out + strip * R * w.whole_width());
}

template <class V, class From>
void add_keys(const Work<V>& w) {
  const Attention& a = w.a;
  const Bounds q = bounds(w.positions, w.segments, w.rows());
  for (Range block = {0, 0}; block.begin < a.keys; block.begin += kBlockKeys) {
    block.end = block.begin + kBlockKeys < a.keys ? block.begin + kBlockKeys : a.keys;
    bool any = false;
    for (int64_t i = block.begin / kSpan; i * kSpan < block.end; ++i)
      any = any || seen(a, q, w.spans[i]) != Seen::kNone;
    if (!any) continue;
    take_keys<V, From>(w, block);
    for (int64_t strip = 0; strip < w.strips(); ++strip) add_block(w, strip, block);
  }
}

// Counts the sink of a row, and writes the row's result.
template <class V>
void finish(const Work<V>& w, int64_t row) {
  const Attention& a = w.a;
  const int64_t head = w.head(row), query = w.query(row);
  float peak = w.peaks[row], total = w.totals[row], share = 1;
  if (a.sinks != nullptr) {
    const float sink = a.sinks[head] * kLog2E, top = peak < sink ? sink : peak;
    share = exp2f(peak - top);
    total = total * share + exp2f(sink - top);
    peak = top;
  }
  a.logs[(w.task.row * a.heads + head) * a.queries + query] =
      total == 0 ? kMasked / 2 : (peak + log2f(total)) * kLn2;
  share = total == 0 ? 1 : share / total;
  const float* from = w.out + row / w.kRows * w.kRows * w.whole_width() + row % w.kRows;
  const int64_t to = w.place(row);
  if (a.q_bf16) {
    uint16_t* y = static_cast<uint16_t*>(a.y) + to;
    for (int64_t h = 0; h < a.width; ++h) y[h] = to_bf16(from[h * w.kRows] * share);
  } else {
    float* y = static_cast<float*>(a.y) + to;
    for (int64_t h = 0; h < a.width; ++h) y[h] = from[h * w.kRows] * share;
  }
}

template <class V>
void prefill(const Attention& a, const Bounds* spans, Task task, float* memory) {
  const Work<V> w(a, spans, task, memory);
  take_queries(w);
  switch (a.stored) {
    case Stored::kFloat32: add_keys<V, Floats>(w); break;
    case Stored::kBf16: add_keys<V, Halves>(w); break;
    case Stored::kInt8: add_keys<V, Codes>(w); break;
  }
  for (int64_t row = 0; row < w.rows(); ++row) finish(w, row);
}

}  // namespace
}  // namespace lissom
