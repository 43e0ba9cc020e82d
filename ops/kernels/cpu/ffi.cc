// What XLA calls (lissom_product, lissom_grouped_product, lissom_cache_attention, lissom_write_rows), and
// what Python asks before it does.

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <thread>

#include "attention.h"
#include "instruction_sets.h"
#include "product_call.h"
#include "self_test.h"
#include "xla/ffi/api/ffi.h"

namespace lissom {
namespace {

namespace ffi = xla::ffi;

int selected = 0;  // the instruction set that products without an override use

class PoolScheduler final : public Scheduler {
 public:
  explicit PoolScheduler(ffi::ThreadPool* pool) : pool_(pool) {}
  void schedule(void (*work)()) override { pool_->Schedule([work] { work(); }); }

 private:
  ffi::ThreadPool* pool_;
};

ffi::Error refuse(const char* what) { return ffi::Error::InvalidArgument(what); }

bool is_float(ffi::AnyBuffer a) {
  return a.element_type() == ffi::F32 || a.element_type() == ffi::BF16;
}

ScaleType scale_type(ffi::AnyBuffer scales) {
  if (scales.element_type() == ffi::F32) return kF32Scales;
  return scales.element_type() == ffi::F16 ? kF16Scales : kBf16Scales;
}

const Kernels* choose(int64_t instruction_set) {
  const int64_t chosen = instruction_set < 0 ? selected : instruction_set;
  const bool usable =
      chosen < instruction_set_count() && instruction_sets()[chosen]->supported();
  return usable ? instruction_sets()[chosen] : nullptr;
}

ffi::Error lacking() { return refuse("lissom: this machine lacks that instruction set"); }

int64_t thread_count(const ffi::ThreadPool& pool, int64_t asked) {
  return asked > 0 ? asked : std::max<int64_t>(1, pool.num_threads());
}

ffi::Error check(const Weights& w, int64_t experts, ffi::AnyBuffer values, ffi::AnyBuffer places,
                 ffi::AnyBuffer scales, ffi::AnyBuffer zeros) {
  if (w.format < 0 || w.format >= kFormats || w.inputs < 1 || w.outputs < 0 || w.groups < 1)
    return refuse("lissom: no such format or shape");
  if (w.groups > 1 && (w.inputs % w.groups || w.group() % 16))
    return refuse("lissom: groups must be multiples of 16 inputs");
  const size_t scale_count = experts * w.scale_count();
  if (values.size_bytes() != static_cast<size_t>(experts * w.tiles() * w.tile_bytes()))
    return refuse("lissom: the packed values have a wrong size");
  if (places.size_bytes() != static_cast<size_t>(experts * w.tiles() * w.places_bytes()))
    return refuse("lissom: the places of 2:4 values have a wrong size");
  if (scales.element_count() != scale_count || (scale_count && !is_float(scales) && scales.element_type() != ffi::F16))
    return refuse("lissom: the scales have a wrong size or type");
  if (zeros.size_bytes() != 0 && (w.format > kInt4 || zeros.size_bytes() != scale_count))
    return refuse("lissom: the zero points have a wrong size");
  return ffi::Error::Success();
}

// Arguments: x, then values, places, scales and zeros of each weight. Results: one a weight.
ffi::Error multiply_all(ffi::ThreadPool pool, ffi::AnyBuffer x, const int32_t* group_sizes,
                        int64_t experts, ffi::RemainingArgs arrays, ffi::RemainingRets results,
                        ffi::Span<const int64_t> formats, ffi::Span<const int64_t> groups,
                        int64_t inputs, int64_t instruction_set, ffi::Span<const int64_t> outputs,
                        int64_t quantize, int64_t threads) {
  const size_t count = results.size();
  if (count < 1 || count > kMostProducts || arrays.size() != 4 * count ||
      formats.size() != count || groups.size() != count || outputs.size() != count)
    return refuse("lissom: too many products, or not four arrays for each");
  if (inputs < 1 || x.element_count() % inputs || !is_float(x))
    return refuse("lissom: x is f32 or bf16 and has the weight's inputs");
  Product products[kMostProducts];
  const int64_t rows = static_cast<int64_t>(x.element_count()) / inputs;
  for (size_t i = 0; i < count; ++i) {
    Weights& w = products[i].weights;
    const auto values = arrays.get<ffi::AnyBuffer>(4 * i);
    const auto places = arrays.get<ffi::AnyBuffer>(4 * i + 1);
    const auto scales = arrays.get<ffi::AnyBuffer>(4 * i + 2);
    const auto zeros = arrays.get<ffi::AnyBuffer>(4 * i + 3);
    auto y = results.get<ffi::AnyBuffer>(i);
    if (!values || !places || !scales || !zeros || !y) return refuse("lissom: arrays are buffers");
    w.format = static_cast<Format>(formats[i]);
    w.inputs = inputs;
    w.outputs = outputs[i];
    w.groups = groups[i];
    if (ffi::Error error = check(w, experts, *values, *places, *scales, *zeros); error.failure())
      return error;
    w.values = static_cast<const uint8_t*>(values->untyped_data());
    w.places = static_cast<const uint8_t*>(places->untyped_data());
    w.scales = scales->untyped_data();
    w.scale_type = scale_type(*scales);
    w.zeros = zeros->size_bytes() ? static_cast<const uint8_t*>(zeros->untyped_data()) : nullptr;
    const bool codes = quantize != 0 && w.integer();
    if ((quantize != 0) != codes || !alike(products[0].weights, w, codes))
      return refuse("lissom: the weights of one call need rows of one form");
    if ((*y)->element_count() != static_cast<size_t>(rows * w.outputs) || !is_float(**y))
      return refuse("lissom: y is f32 or bf16 and has the weight's outputs");
    products[i].out = {(*y)->untyped_data(), (*y)->element_type() == ffi::BF16};
  }
  Call call;
  call.kernels = choose(instruction_set);
  if (call.kernels == nullptr) return lacking();
  call.products = products;
  call.count = static_cast<int64_t>(count);
  call.x = x.untyped_data();
  call.x_bf16 = x.element_type() == ffi::BF16;
  call.rows = rows;
  call.quantize = quantize != 0;
  call.group_sizes = group_sizes;
  call.experts = experts;
  PoolScheduler scheduler(&pool);
  Workers workers(&scheduler, thread_count(pool, threads));
  if (!multiply(call, workers))
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "lissom: no memory for the activations");
  return ffi::Error::Success();
}

ffi::Error product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs arrays,
                   ffi::RemainingRets results, ffi::Span<const int64_t> formats,
                   ffi::Span<const int64_t> groups, int64_t inputs, int64_t instruction_set,
                   ffi::Span<const int64_t> outputs, int64_t quantize, int64_t threads) {
  return multiply_all(pool, x, nullptr, 1, arrays, results, formats, groups, inputs,
                      instruction_set, outputs, quantize, threads);
}

// Rows in consecutive groups, of which each meets its own expert: a leading axis of the weights.
ffi::Error grouped_product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::S32, 1> sizes,
                           ffi::RemainingArgs arrays, ffi::RemainingRets results,
                           ffi::Span<const int64_t> formats, ffi::Span<const int64_t> groups,
                           int64_t inputs, int64_t instruction_set,
                           ffi::Span<const int64_t> outputs, int64_t quantize, int64_t threads) {
  const int64_t experts = static_cast<int64_t>(sizes.element_count());
  return multiply_all(pool, x, sizes.typed_data(), experts, arrays, results, formats, groups,
                      inputs, instruction_set, outputs, quantize, threads);
}

bool same(ffi::AnyBuffer::Dimensions a, ffi::AnyBuffer::Dimensions b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end());
}

using Positions = ffi::Buffer<ffi::S32, 2>;

using Scales = ffi::Buffer<ffi::F16, 3>;  // of int8 codes; empty for floats

// Whether there is a scale for each head of each key of int8 codes, and none for floats.
bool fit(const Scales& scales, ffi::AnyBuffer k) {
  const auto shape = k.dimensions();
  if (k.element_type() != ffi::S8) return scales.element_count() == 0;
  return std::equal(shape.begin(), shape.begin() + 3, scales.dimensions().begin());
}

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     Scales k_scales, Scales v_scales, Positions q_positions,
                     Positions k_positions, ffi::Buffer<ffi::F32, 1> sinks,
                     ffi::Result<ffi::AnyBuffer> y, int64_t instruction_set, float scale,
                     float softcap, int64_t threads, int64_t window) {
  const auto q_shape = q.dimensions(), k_shape = k.dimensions();
  if (q_shape.size() != 4 || k_shape.size() != 4 || !same(k_shape, v.dimensions()) ||
      !same(q_shape, y->dimensions()))
    return refuse("lissom: q and y are [B, T, N, H], k and v are [B, S, K, H]");
  Attention a = {};
  a.batch = q_shape[0], a.queries = q_shape[1], a.heads = q_shape[2], a.width = q_shape[3];
  a.keys = k_shape[1], a.kv_heads = k_shape[2];
  if (k_shape[0] != a.batch || k_shape[3] != a.width || a.kv_heads < 1 || a.heads % a.kv_heads ||
      q_positions.dimensions()[0] != a.batch || q_positions.dimensions()[1] != a.queries ||
      k_positions.dimensions()[0] != a.batch || k_positions.dimensions()[1] != a.keys ||
      (sinks.element_count() != 0 && sinks.element_count() != static_cast<size_t>(a.heads)))
    return refuse("lissom: the queries, keys, positions or sinks do not fit each other");
  if (!is_float(q) || !(is_float(k) || k.element_type() == ffi::S8) ||
      v.element_type() != k.element_type() || y->element_type() != q.element_type())
    return refuse("lissom: q and y are f32 or bf16, k and v are f32, bf16 or s8, each of one type");
  if (!fit(k_scales, k) || !fit(v_scales, v))
    return refuse("lissom: scales are [B, S, K] for s8, and none for floats");
  a.q = q.untyped_data(), a.k = k.untyped_data(), a.v = v.untyped_data();
  a.q_bf16 = q.element_type() == ffi::BF16;
  a.stored = k.element_type() == ffi::S8     ? Stored::kInt8
             : k.element_type() == ffi::BF16 ? Stored::kBf16
                                             : Stored::kFloat32;
  if (a.stored == Stored::kInt8) {
    a.k_scales = static_cast<const uint16_t*>(k_scales.untyped_data());
    a.v_scales = static_cast<const uint16_t*>(v_scales.untyped_data());
  }
  a.q_positions = q_positions.typed_data(), a.k_positions = k_positions.typed_data();
  a.sinks = sinks.element_count() ? sinks.typed_data() : nullptr;
  a.scale = scale, a.softcap = softcap;
  a.window = window > 0 ? static_cast<uint32_t>(std::min<int64_t>(window, 1u << 31)) : 1u << 31;
  a.y = y->untyped_data();
  const Kernels* kernels = choose(instruction_set);
  if (kernels == nullptr) return lacking();
  PoolScheduler scheduler(&pool);
  Workers workers(&scheduler, thread_count(pool, threads));
  if (!attend_all(*kernels, a, workers))
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

#define LISSOM_EXPORT extern "C" __attribute__((visibility("default")))

LISSOM_EXPORT XLA_FFI_Error* lissom_product(XLA_FFI_CallFrame* frame) {
  using Numbers = xla::ffi::Span<const int64_t>;
  static auto* const handler = xla::ffi::Ffi::Bind()
                                   .Ctx<xla::ffi::ThreadPool>()
                                   .Arg<xla::ffi::AnyBuffer>()
                                   .RemainingArgs()
                                   .RemainingRets()
                                   .Attr<Numbers>("formats")
                                   .Attr<Numbers>("groups")
                                   .Attr<int64_t>("inputs")
                                   .Attr<int64_t>("instruction_set")
                                   .Attr<Numbers>("outputs")
                                   .Attr<int64_t>("quantize")
                                   .Attr<int64_t>("threads")
                                   .To(lissom::product)
                                   .release();
  return handler->Call(frame);
}

LISSOM_EXPORT XLA_FFI_Error* lissom_grouped_product(XLA_FFI_CallFrame* frame) {
  using Numbers = xla::ffi::Span<const int64_t>;
  static auto* const handler = xla::ffi::Ffi::Bind()
                                   .Ctx<xla::ffi::ThreadPool>()
                                   .Arg<xla::ffi::AnyBuffer>()
                                   .Arg<xla::ffi::Buffer<xla::ffi::S32, 1>>()
                                   .RemainingArgs()
                                   .RemainingRets()
                                   .Attr<Numbers>("formats")
                                   .Attr<Numbers>("groups")
                                   .Attr<int64_t>("inputs")
                                   .Attr<int64_t>("instruction_set")
                                   .Attr<Numbers>("outputs")
                                   .Attr<int64_t>("quantize")
                                   .Attr<int64_t>("threads")
                                   .To(lissom::grouped_product)
                                   .release();
  return handler->Call(frame);
}

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
                                   .Arg<xla::ffi::Buffer<xla::ffi::F32, 1>>()
                                   .Ret<AnyBuffer>()
                                   .Attr<int64_t>("instruction_set")
                                   .Attr<float>("scale")
                                   .Attr<float>("softcap")
                                   .Attr<int64_t>("threads")
                                   .Attr<int64_t>("window")
                                   .To(lissom::attention)
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

LISSOM_EXPORT int lissom_instruction_sets() { return lissom::instruction_set_count(); }

// The best comes first, the portable one last.
LISSOM_EXPORT const char* lissom_name(int i) { return lissom::instruction_sets()[i]->name; }

LISSOM_EXPORT int lissom_supported(int i) { return lissom::instruction_sets()[i]->supported(); }

// Null if all is well, or words for what the instruction set computed wrongly.
LISSOM_EXPORT const char* lissom_self_test(int i) {
  return lissom::self_test(*lissom::instruction_sets()[i]);
}

LISSOM_EXPORT void lissom_select(int i) { lissom::selected = i; }

// What the environment says of LISSOM_NATIVE: 0 for no native products, or an instruction set.
LISSOM_EXPORT const char* lissom_setting() {
  const char* value = getenv("LISSOM_NATIVE");
  return value == nullptr ? "" : value;
}
