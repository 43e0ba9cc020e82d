#include "self_test.h"

#include <limits.h>
#include <math.h>
#include <string.h>

#include <vector>

#include "attention.h"
#include "product_call.h"

namespace lissom {
namespace {

constexpr double kNf4Exact[16] = {
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0};
// Relative to the sum of the terms' sizes: float32 sums of some hundred terms.
constexpr double kRounding = 1e-5, kBf16Rounding = 1.0 / 256;
// The words that stand for NF4's values in the integer product are off by so much times the scale,
// which is at most 2 here.
constexpr double kNf4Rounding = 0.001 * 2;

struct Random {
  uint32_t state;
  uint32_t next() { return (state = state * 1664525u + 1013904223u) >> 8; }
};

double ieee(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int top = (1 << exponent_bits) - 1, bias = top >> 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & top;
  const int mantissa = static_cast<int>(bits & ((1u << mantissa_bits) - 1));
  const double size = exponent == 0 ? ldexp(mantissa, 1 - bias - mantissa_bits)
                                    : ldexp(mantissa + (1 << mantissa_bits),
                                            exponent - bias - mantissa_bits);
  return bits >> (exponent_bits + mantissa_bits) & 1 ? -size : size;
}

// The number that the packed weight holds for input i and output o.
double weight_at(const Weights& w, int64_t i, int64_t o) {
  const int64_t lane = o % kTile, step = w.step();
  const uint8_t* tile = w.values + o / kTile * w.tile_bytes();
  const int64_t group = w.groups == 1 ? 0 : i / w.group();
  const int64_t at = (o / kTile * w.groups + group) * kTile + lane;
  const double zero = w.zeros ? w.zeros[at] : w.format == kInt8 ? 128 : 8;
  int64_t in_step = i % step, stored = step;
  if (w.sparse()) {
    const uint8_t both = w.places[o / kTile * w.places_bytes() + i / step * 16 + lane % 16];
    const int places = lane < 16 ? both & 15 : both >> 4;
    if (!(places >> in_step & 1)) return 0;
    in_step = __builtin_popcount(places & ((1 << in_step) - 1));
    stored = 2;
  }
  const int64_t place = (i / step * kTile + lane) * stored + in_step;
  uint16_t two = 0;
  if (w.format == kBf16 || w.format == kF16 || w.format == kBf16Of4)
    memcpy(&two, tile + 2 * place, 2);
  if (w.format == kBf16 || w.format == kBf16Of4) return from_bf16(two);
  if (w.format == kF16) return ieee(two, 5, 10);
  uint16_t half = 0;
  if (w.scale_type != kF32Scales) half = static_cast<const uint16_t*>(w.scales)[at];
  const double scale = w.scale_type == kF32Scales   ? static_cast<const float*>(w.scales)[at]
                       : w.scale_type == kF16Scales ? ieee(half, 5, 10)
                                                    : from_bf16(half);
  if (w.format == kInt8) return scale * (tile[place] - zero);
  if (w.format == kFp8) return scale * ieee(tile[place], 4, 3);
  if (w.format == kInt8Of4) return scale * static_cast<int8_t>(tile[place]);
  const uint8_t both = tile[(i / 4 * 16 + lane % 16) * stored + in_step];
  const int code = lane < 16 ? both & 15 : both >> 4;
  if (w.format == kInt4Of4) return scale * (code < 8 ? code : code - 16);
  if (w.format == kE2m1) return scale * ieee(code, 2, 1);
  return scale * (w.format == kNf4 ? kNf4Exact[code] : code - zero);
}

struct Case {
  Weights w = {};
  std::vector<uint8_t> values, places, zeros;
  std::vector<uint16_t> scales;
  std::vector<float> x;
};

Case make(Format format, bool with_zeros, Shape shape) {
  Case c;
  c.w.format = format;
  c.w.inputs = shape.inputs;
  c.w.outputs = shape.outputs;
  c.w.groups = shape.groups;
  Random random = {static_cast<uint32_t>(format + shape.inputs)};
  c.values.resize(c.w.tiles() * c.w.tile_bytes());
  for (size_t i = 0; i < c.values.size(); ++i) {
    c.values[i] = static_cast<uint8_t>(random.next());
    if (format == kFp8) c.values[i] &= 0xf7;               // no NaN
    if (!c.w.scaled() && i % 2) c.values[i] = (c.values[i] & 0x80) | 0x3c;
  }
  static constexpr uint8_t pairs[6] = {3, 5, 6, 9, 10, 12};
  c.places.resize(c.w.tiles() * c.w.places_bytes());
  for (uint8_t& places : c.places)
    places = static_cast<uint8_t>(pairs[random.next() % 6] | pairs[random.next() % 6] << 4);
  c.scales.resize(c.w.tiles() * c.w.groups * kTile);
  // From 0.5 to 2, in each of the two half precisions by turns.
  c.w.scale_type = (format + shape.inputs / 2) % 2 ? kF16Scales : kBf16Scales;
  const uint32_t first = c.w.scale_type == kF16Scales ? 0x3800 : 0x3f00;
  const uint32_t count = c.w.scale_type == kF16Scales ? 0x800 : 0x100;
  for (uint16_t& scale : c.scales) scale = static_cast<uint16_t>(first + random.next() % count);
  c.zeros.resize(c.scales.size());
  const uint32_t zeros = format == kInt8 ? 256 : 16;
  for (uint8_t& zero : c.zeros) zero = static_cast<uint8_t>(random.next() % zeros);
  // Small integers: they are rounded without error, and bf16 holds them too.
  c.x.resize(shape.rows * shape.inputs);
  for (size_t i = 0; i < c.x.size(); ++i) {
    c.x[i] = static_cast<float>(static_cast<int>(random.next() % 255) - 127);
  }
  c.w.values = c.values.data();
  c.w.places = c.places.empty() ? nullptr : c.places.data();
  c.w.scales = c.w.scaled() ? c.scales.data() : nullptr;
  c.w.zeros = with_zeros ? c.zeros.data() : nullptr;
  return c;
}

bool near(const Case& c, Shape shape, const std::vector<float>& y, double relative,
          double absolute) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    for (int64_t o = 0; o < shape.outputs; ++o) {
      double sum = 0, bound = 1e-30;
      for (int64_t i = 0; i < shape.inputs; ++i) {
        const double term = c.x[r * shape.inputs + i] * weight_at(c.w, i, o);
        sum += term;
        bound += relative * fabs(term) + absolute * fabs(c.x[r * shape.inputs + i]);
      }
      if (!(fabs(y[r * shape.outputs + o] - sum) <= bound)) return false;
    }
  }
  return true;
}

bool run(const Kernels& kernels, const Case& c, Shape shape, bool quantize, bool bf16) {
  std::vector<float> y(shape.rows * shape.outputs);
  std::vector<uint16_t> x16(c.x.size()), y16(y.size());
  for (size_t i = 0; i < x16.size(); ++i) x16[i] = to_bf16(c.x[i]);
  const void* x = bf16 ? static_cast<const void*>(x16.data()) : c.x.data();
  void* out = bf16 ? static_cast<void*>(y16.data()) : y.data();
  const Product product = {c.w, {out, bf16}};
  const Call call = {&kernels, &product, 1, x, bf16, shape.rows, quantize, nullptr, 1};
  Workers alone(nullptr, 1);
  if (!multiply(call, alone)) return false;
  if (bf16) for (size_t i = 0; i < y.size(); ++i) y[i] = from_bf16(y16[i]);
  return near(c, shape, y, bf16 ? kBf16Rounding : kRounding,
              quantize && c.w.format == kNf4 ? kNf4Rounding : 0);
}

// int8 and int4 weights, of different widths, in one call: each as it is alone.
bool joint_run(const Kernels& kernels, Shape shape) {
  const Shape wide = {shape.rows, shape.inputs, shape.outputs + 70, shape.groups};
  const Case first = make(kInt8, false, shape), second = make(kInt4, true, wide);
  std::vector<float> y(shape.rows * shape.outputs), z(wide.rows * wide.outputs);
  const Product products[] = {{first.w, {y.data(), false}}, {second.w, {z.data(), false}}};
  const Call call = {&kernels, products, 2, first.x.data(), false, shape.rows, true, nullptr, 1};
  Workers alone(nullptr, 1);
  if (!multiply(call, alone)) return false;
  Case other = second;
  other.x = first.x;
  return near(first, shape, y, kRounding, 0) && near(other, wide, z, kRounding, 0);
}

template <class T>
void append(std::vector<T>* to, const std::vector<T>& from) {
  to->insert(to->end(), from.begin(), from.end());
}

// Four experts, of which the second has no rows and the last one lacks some: each group as it is
// alone, and zeros in the row that belongs to none.
bool grouped_run(const Kernels& kernels, Format format, Shape shape) {
  const bool zeros = format <= kInt4;
  const int32_t sizes[] = {2, 0, 1, static_cast<int32_t>(shape.rows)};
  std::vector<Case> alone;
  Case all = make(format, zeros, shape);
  const int64_t rows = 4 + shape.rows, inputs = shape.inputs, outputs = shape.outputs;
  all.values.clear(), all.places.clear(), all.scales.clear(), all.zeros.clear(), all.x.clear();
  Random random = {99};
  for (const int32_t size : sizes) {
    Case c = make(format, zeros, {size, inputs, outputs, shape.groups});
    for (uint16_t& scale : c.scales) scale ^= random.next() & 7;
    for (float& x : c.x) x = static_cast<float>(static_cast<int>(random.next() % 255) - 127);
    append(&all.values, c.values), append(&all.places, c.places);
    append(&all.scales, c.scales), append(&all.zeros, c.zeros), append(&all.x, c.x);
    alone.push_back(std::move(c));
  }
  all.x.resize(rows * inputs, 1.0f);
  all.w.values = all.values.data();
  all.w.places = all.places.empty() ? nullptr : all.places.data();
  all.w.scales = all.w.scaled() ? all.scales.data() : nullptr;
  all.w.zeros = zeros ? all.zeros.data() : nullptr;
  std::vector<float> y(rows * outputs, NAN);
  const bool quantize = all.w.integer();
  const Product product = {all.w, {y.data(), false}};
  const Call call = {&kernels, &product, 1, all.x.data(), false, rows, quantize, sizes, 4};
  Workers one(nullptr, 1);
  if (!multiply(call, one)) return false;
  const float* at = y.data();
  for (size_t e = 0; e < alone.size(); ++e) {
    const std::vector<float> part(at, at + sizes[e] * outputs);
    if (!near(alone[e], {sizes[e], inputs, outputs, shape.groups}, part, kRounding,
              quantize && format == kNf4 ? kNf4Rounding * 2 : 0))
      return false;
    at += sizes[e] * outputs;
  }
  for (; at < y.data() + y.size(); ++at)
    if (*at != 0) return false;
  return true;
}

std::vector<float> draw(int64_t count, uint32_t seed) {
  Random random = {seed};
  std::vector<float> x(count);
  for (float& value : x) value = from_bf16(to_bf16((random.next() % 2001 - 1000.0f) / 1000));
  return x;
}

const void* pointer(const std::vector<float>& x) { return x.data(); }

// Codes of each run of `width` numbers with a scale that is a power of two, and what they stand for.
void code(int64_t width, std::vector<float>* x, std::vector<int8_t>* codes,
          std::vector<uint16_t>* scales) {
  for (size_t i = 0; i < x->size(); ++i) {
    const uint16_t exponent = static_cast<uint16_t>(7 + i / width % 3);  // of 2^-8 to 2^-6
    const float scale = from_f16(static_cast<uint16_t>(exponent << 10));
    (*scales)[i / width] = static_cast<uint16_t>(exponent << 10);
    (*codes)[i] = static_cast<int8_t>(lrintf((*x)[i] * 64));
    (*x)[i] = (*codes)[i] * scale;
  }
}

// Attention with a cap, sinks and a window, and by the kernel for many queries with segments too, against
// its definition in double.
bool attends(const Kernels& kernels, AttentionShape s, Stored stored, bool late, bool many) {
  const bool bf16 = stored == Stored::kBf16, coded = stored == Stored::kInt8;
  const std::vector<float> q = draw(s.batch * s.queries * s.heads * s.width, 1);
  std::vector<float> k = draw(s.batch * s.keys * s.kv_heads * s.width, 2);
  std::vector<float> v = draw(s.batch * s.keys * s.kv_heads * s.width, 3);
  const std::vector<float> sinks = draw(s.heads, 4);
  std::vector<uint16_t> q16(q.size()), k16(k.size()), v16(v.size()), y16(q.size());
  for (size_t i = 0; i < q.size(); ++i) q16[i] = to_bf16(q[i]);
  for (size_t i = 0; i < k.size(); ++i) k16[i] = to_bf16(k[i]), v16[i] = to_bf16(v[i]);
  std::vector<int8_t> k8(k.size()), v8(v.size());
  std::vector<uint16_t> k_scales(s.batch * s.keys * s.kv_heads), v_scales(k_scales.size());
  if (coded) {
    code(s.width, &k, &k8, &k_scales);
    code(s.width, &v, &v8, &v_scales);
  }
  std::vector<int32_t> q_positions(s.batch * s.queries), k_positions(s.batch * s.keys);
  const int64_t last = late ? s.keys - 1 : s.keys / 2;
  for (size_t i = 0; i < q_positions.size(); ++i)
    q_positions[i] = static_cast<int32_t>(last - i % s.queries);
  for (size_t i = 0; i < k_positions.size(); ++i)
    k_positions[i] = static_cast<int32_t>(i % s.keys);
  std::vector<float> y(q.size());
  Attention a = {};
  a.q = bf16 ? static_cast<const void*>(q16.data()) : q.data();
  a.k = coded ? static_cast<const void*>(k8.data()) : bf16 ? k16.data() : pointer(k);
  a.v = coded ? static_cast<const void*>(v8.data()) : bf16 ? v16.data() : pointer(v);
  if (coded) a.k_scales = k_scales.data(), a.v_scales = v_scales.data();
  a.y = bf16 ? static_cast<void*>(y16.data()) : y.data();
  a.q_bf16 = bf16, a.stored = stored;
  a.q_positions = q_positions.data(), a.k_positions = k_positions.data(), a.sinks = sinks.data();
  a.batch = s.batch, a.queries = s.queries, a.keys = s.keys, a.heads = s.heads;
  a.kv_heads = s.kv_heads, a.width = s.width;
  a.scale = 0.5f, a.softcap = late ? 2 : 0, a.window = late ? 100 : kEverywhere;
  a.first = late ? 3 : INT_MIN;
  std::vector<int32_t> q_segments(q_positions.size()), k_segments(k_positions.size());
  std::vector<float> logs(s.batch * s.heads * s.queries);
  if (many) {
    for (size_t i = 0; i < q_segments.size(); ++i) q_segments[i] = q_positions[i] / 70;
    for (size_t i = 0; i < k_segments.size(); ++i) k_segments[i] = k_positions[i] / 70;
    a.q_segments = q_segments.data(), a.k_segments = k_segments.data(), a.logs = logs.data();
  }
  Workers alone(nullptr, 1);
  if (!(many ? prefill_all(kernels, a, alone) : attend_all(kernels, a, alone))) return false;
  for (int64_t i = 0; i < s.batch * s.queries * s.heads; ++i) {
    const int64_t n = i % s.heads, row = i / s.heads / s.queries, head = n / a.group();
    double total = exp(sinks[n]);
    std::vector<double> sums(s.width);
    for (int64_t key = 0; key < s.keys; ++key) {
      const int64_t place = row * s.keys + key;
      if (!a.sees(q_positions[i / s.heads], k_positions[place])) continue;
      if (many && q_segments[i / s.heads] != k_segments[place]) continue;
      const int64_t at = (place * s.kv_heads + head) * s.width;
      double score = 0;
      for (int64_t h = 0; h < s.width; ++h) score += a.scale * q[i * s.width + h] * k[at + h];
      if (a.softcap > 0) score = a.softcap * tanh(score / a.softcap);
      total += exp(score);
      for (int64_t h = 0; h < s.width; ++h) sums[h] += exp(score) * v[at + h];
    }
    const double log_found = logs[(row * s.heads + n) * s.queries + i / s.heads % s.queries];
    if (many && !(fabs(log_found - log(total)) <= kRounding)) return false;
    for (int64_t h = 0; h < s.width; ++h) {
      const double found = bf16 ? from_bf16(y16[i * s.width + h]) : y[i * s.width + h];
      if (!(fabs(found - sums[h] / total) <= (bf16 ? kBf16Rounding : kRounding))) return false;
    }
  }
  return true;
}

}  // namespace

const char* self_test(const Kernels& kernels, Shape shape) {
  static const char* const names[kFormats] = {
      "int8", "int4", "nf4", "bf16", "f16", "fp8", "2:4 int8", "2:4 int4", "2:4 bf16",
      "e2m1"};
  for (int format = 0; format < kFormats; ++format) {
    for (const bool zeros : {false, true}) {
      if (zeros && format > kInt4) continue;
      const Case c = make(static_cast<Format>(format), zeros, shape);
      for (const bool quantize : {false, true}) {
        if (quantize && !c.w.integer()) continue;
        for (const bool bf16 : {false, true})
          if (!run(kernels, c, shape, quantize, bf16)) return names[format];
      }
    }
  }
  for (const Format format : {kInt8, kNf4, kBf16, kFp8, kInt4Of4})
    if (!grouped_run(kernels, format, shape)) return "groups of rows";
  if (!joint_run(kernels, shape)) return "several products in one call";
  return nullptr;
}

const char* attention_test(const Kernels& kernels, AttentionShape shape) {
  for (const bool late : {false, true}) {
    for (const bool many : {false, true}) {
      if (!attends(kernels, shape, Stored::kFloat32, late, many)) return "f32 attention";
      if (!attends(kernels, shape, Stored::kBf16, late, many)) return "bf16 attention";
      if (!attends(kernels, shape, Stored::kInt8, late, many)) return "int8 attention";
    }
  }
  return nullptr;
}

const char* self_test(const Kernels& kernels) {
  if (const char* wrong = attention_test(kernels, {2, 3, 150, 6, 2, 40})) return wrong;
  for (const Shape shape : {Shape{3, 96, 40, 3}, Shape{1, 70, 5, 1}}) {
    if (const char* wrong = self_test(kernels, shape)) return wrong;
  }
  return nullptr;
}

}  // namespace lissom
