// Attention and the rows of caches as XLA calls them: lissom_cache_attention for a few queries of a row,
// lissom_prefill_attention for many, lissom_write_rows.

#include <limits.h>
#include <string.h>

#include "attention.h"
#include "ffi.h"

namespace lissom {
namespace {

using Positions = ffi::Buffer<ffi::S32, 2>;
using Scales = ffi::Buffer<ffi::F16, 3>;  // of int8 codes; empty for floats
using Sinks = ffi::Buffer<ffi::F32, 1>;

bool same(ffi::AnyBuffer::Dimensions a, ffi::AnyBuffer::Dimensions b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

// Whether there is a scale for each head of each key of int8 codes, and none for floats.
bool fit(const Scales& scales, ffi::AnyBuffer k) {
  const auto shape = k.dimensions();
  if (k.element_type() != ffi::S8) return scales.element_count() == 0;
  return std::equal(shape.begin(), shape.begin() + 3, scales.dimensions().begin());
}

struct Arrays {
  ffi::AnyBuffer q, k, v;
  Scales k_scales, v_scales;
  Positions q_positions, k_positions;
  Sinks sinks;
};

struct Numbers {
  int64_t first;
  float scale, softcap;
  int64_t window;
};

// Checks the arrays, and fills in what both forms of attention need.
ffi::Error describe(const Arrays& arrays, Numbers numbers, ffi::AnyBuffer y, Attention* to) {
  const auto q_shape = arrays.q.dimensions(), k_shape = arrays.k.dimensions();
  if (q_shape.size() != 4 || k_shape.size() != 4 || !same(k_shape, arrays.v.dimensions()) ||
      !same(q_shape, y.dimensions()))
    return refuse("lissom: q and y are [B, T, N, H], k and v are [B, S, K, H]");
  Attention a = {};
  a.batch = q_shape[0], a.queries = q_shape[1], a.heads = q_shape[2], a.width = q_shape[3];
  a.keys = k_shape[1], a.kv_heads = k_shape[2];
  const auto q_positions = arrays.q_positions.dimensions();
  const auto k_positions = arrays.k_positions.dimensions();
  const size_t sinks = arrays.sinks.element_count();
  if (k_shape[0] != a.batch || k_shape[3] != a.width || a.kv_heads < 1 || a.heads % a.kv_heads ||
      q_positions[0] != a.batch || q_positions[1] != a.queries || k_positions[0] != a.batch ||
      k_positions[1] != a.keys || (sinks != 0 && sinks != static_cast<size_t>(a.heads)))
    return refuse("lissom: the queries, keys, positions or sinks do not fit each other");
  const auto stored = arrays.k.element_type();
  if (!is_float(arrays.q) || !(is_float(arrays.k) || stored == ffi::S8) ||
      arrays.v.element_type() != stored || y.element_type() != arrays.q.element_type())
    return refuse("lissom: q and y are f32 or bf16, k and v are f32, bf16 or s8, each of one type");
  if (!fit(arrays.k_scales, arrays.k) || !fit(arrays.v_scales, arrays.v))
    return refuse("lissom: scales are [B, S, K] for s8, and none for floats");
  a.q = arrays.q.untyped_data(), a.k = arrays.k.untyped_data(), a.v = arrays.v.untyped_data();
  a.q_bf16 = arrays.q.element_type() == ffi::BF16;
  a.stored = stored == ffi::S8     ? Stored::kInt8
             : stored == ffi::BF16 ? Stored::kBf16
                                   : Stored::kFloat32;
  if (a.stored == Stored::kInt8) {
    a.k_scales = static_cast<const uint16_t*>(arrays.k_scales.untyped_data());
    a.v_scales = static_cast<const uint16_t*>(arrays.v_scales.untyped_data());
  }
  a.q_positions = arrays.q_positions.typed_data();
  a.k_positions = arrays.k_positions.typed_data();
  a.sinks = sinks != 0 ? arrays.sinks.typed_data() : nullptr;
  a.scale = numbers.scale, a.softcap = numbers.softcap;
  a.window = numbers.window > 0
                 ? static_cast<uint32_t>(std::min<int64_t>(numbers.window, kEverywhere))
                 : kEverywhere;
  a.first = numbers.first > 0
                ? static_cast<int32_t>(std::min<int64_t>(numbers.first, INT_MAX))
                : INT_MIN;
  a.y = y.untyped_data();
  *to = a;
  return ffi::Error::Success();
}

ffi::Error cache_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                           ffi::AnyBuffer v, Scales k_scales, Scales v_scales,
                           Positions q_positions, Positions k_positions, Sinks sinks,
                           ffi::Result<ffi::AnyBuffer> y, int64_t first, int64_t instruction_set,
                           float scale, float softcap, int64_t threads, int64_t window) {
  Attention a;
  const Arrays arrays = {q, k, v, k_scales, v_scales, q_positions, k_positions, sinks};
  if (ffi::Error error = describe(arrays, {first, scale, softcap, window}, *y, &a); error.failure())
    return error;
  const Kernels* kernels = choose(instruction_set);
  if (kernels == nullptr) return lacking();
  PoolScheduler scheduler(&pool);
  Workers workers(&scheduler, thread_count(pool, threads));
  if (!attend_all(*kernels, a, workers))
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "lissom: no memory for the scores");
  return ffi::Error::Success();
}

// Whether there is a segment for each position, or none at all.
bool fit(const Positions& segments, const Positions& positions, bool any) {
  return any ? same(segments.dimensions(), positions.dimensions()) : segments.element_count() == 0;
}

ffi::Error prefill_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k,
                             ffi::AnyBuffer v, Scales k_scales, Scales v_scales,
                             Positions q_positions, Positions k_positions, Positions q_segments,
                             Positions k_segments, Sinks sinks, ffi::Result<ffi::AnyBuffer> y,
                             ffi::Result<ffi::Buffer<ffi::F32, 3>> logs, int64_t first,
                             int64_t instruction_set, float scale, float softcap, int64_t threads,
                             int64_t window) {
  Attention a;
  const Arrays arrays = {q, k, v, k_scales, v_scales, q_positions, k_positions, sinks};
  if (ffi::Error error = describe(arrays, {first, scale, softcap, window}, *y, &a); error.failure())
    return error;
  const bool segments = q_segments.element_count() + k_segments.element_count() > 0;
  if (!fit(q_segments, q_positions, segments) || !fit(k_segments, k_positions, segments))
    return refuse("lissom: segments are [B, T] and [B, S], or both are empty");
  if (segments) a.q_segments = q_segments.typed_data(), a.k_segments = k_segments.typed_data();
  const auto shape = logs->dimensions();
  if (shape[0] != a.batch || shape[1] != a.heads || shape[2] != a.queries)
    return refuse("lissom: the logarithms of the sums are [B, N, T]");
  if (a.group() > kMostRows) return refuse("lissom: too many query heads read one head");
  a.logs = logs->typed_data();
  const Kernels* kernels = choose(instruction_set);
  if (kernels == nullptr) return lacking();
  PoolScheduler scheduler(&pool);
  Workers workers(&scheduler, thread_count(pool, threads));
  if (!prefill_all(*kernels, a, workers))
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "lissom: no memory for the scores");
  return ffi::Error::Success();
}

// Puts new[b] into rows[b] from starts[b] on, along the second axis; y is rows itself, or a copy.
// What would reach over an end is moved to fit, as in XLA.
ffi::Error write_rows(ffi::AnyBuffer rows, ffi::AnyBuffer new_rows, ffi::Buffer<ffi::S32, 1> starts,
                      ffi::Result<ffi::AnyBuffer> y) {
  const auto shape = rows.dimensions(), part = new_rows.dimensions();
  if (shape.size() < 2 || part.size() != shape.size() || part[0] != shape[0] ||
      part[1] > shape[1] || !std::equal(shape.begin() + 2, shape.end(), part.begin() + 2) ||
      rows.element_type() != new_rows.element_type() ||
      starts.element_count() != static_cast<size_t>(shape[0]) || !same(shape, y->dimensions()) ||
      y->element_type() != rows.element_type())
    return refuse("lissom: the new rows or their places do not fit the rows");
  uint8_t* to = static_cast<uint8_t*>(y->untyped_data());
  const uint8_t* from = static_cast<const uint8_t*>(new_rows.untyped_data());
  if (to != rows.untyped_data()) memcpy(to, rows.untyped_data(), rows.size_bytes());
  if (new_rows.size_bytes() == 0) return ffi::Error::Success();
  const int64_t row_bytes = static_cast<int64_t>(rows.size_bytes()) / shape[0];
  const int64_t part_bytes = static_cast<int64_t>(new_rows.size_bytes()) / shape[0];
  for (int64_t b = 0; b < shape[0]; ++b) {
    const int64_t last = shape[1] - part[1];
    const int64_t start = std::min(std::max<int64_t>(starts.typed_data()[b], 0), last);
    memcpy(to + b * row_bytes + start * (row_bytes / shape[1]), from + b * part_bytes, part_bytes);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lissom

LISSOM_EXPORT XLA_FFI_Error* lissom_cache_attention(XLA_FFI_CallFrame* frame) {
  using xla::ffi::AnyBuffer;
  static auto* const handler = xla::ffi::Ffi::Bind()
                                   .Ctx<xla::ffi::ThreadPool>()
                                   .Arg<AnyBuffer>()
                                   .Arg<AnyBuffer>()
                                   .Arg<AnyBuffer>()
                                   .Arg<lissom::Scales>()
                                   .Arg<lissom::Scales>()
                                   .Arg<lissom::Positions>()
                                   .Arg<lissom::Positions>()
                                   .Arg<lissom::Sinks>()
                                   .Ret<AnyBuffer>()
                                   .Attr<int64_t>("first")
                                   .Attr<int64_t>("instruction_set")
                                   .Attr<float>("scale")
                                   .Attr<float>("softcap")
                                   .Attr<int64_t>("threads")
                                   .Attr<int64_t>("window")
                                   .To(lissom::cache_attention)
                                   .release();
  return handler->Call(frame);
}

LISSOM_EXPORT XLA_FFI_Error* lissom_prefill_attention(XLA_FFI_CallFrame* frame) {
  using xla::ffi::AnyBuffer;
  static auto* const handler = xla::ffi::Ffi::Bind()
                                   .Ctx<xla::ffi::ThreadPool>()
                                   .Arg<AnyBuffer>()
                                   .Arg<AnyBuffer>()
                                   .Arg<AnyBuffer>()
                                   .Arg<lissom::Scales>()
                                   .Arg<lissom::Scales>()
                                   .Arg<lissom::Positions>()
                                   .Arg<lissom::Positions>()
                                   .Arg<lissom::Positions>()
                                   .Arg<lissom::Positions>()
                                   .Arg<lissom::Sinks>()
                                   .Ret<AnyBuffer>()
                                   .Ret<xla::ffi::Buffer<xla::ffi::F32, 3>>()
                                   .Attr<int64_t>("first")
                                   .Attr<int64_t>("instruction_set")
                                   .Attr<float>("scale")
                                   .Attr<float>("softcap")
                                   .Attr<int64_t>("threads")
                                   .Attr<int64_t>("window")
                                   .To(lissom::prefill_attention)
                                   .release();
  return handler->Call(frame);
}

LISSOM_EXPORT XLA_FFI_Error* lissom_write_rows(XLA_FFI_CallFrame* frame) {
  using xla::ffi::AnyBuffer;
  static auto* const handler = xla::ffi::Ffi::Bind()
                                   .Arg<AnyBuffer>()
                                   .Arg<AnyBuffer>()
                                   .Arg<xla::ffi::Buffer<xla::ffi::S32, 1>>()
                                   .Ret<AnyBuffer>()
                                   .To(lissom::write_rows)
                                   .release();
  return handler->Call(frame);
}
