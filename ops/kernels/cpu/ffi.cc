// Products as XLA calls them (lissom_product, lissom_grouped_product), and what Python asks before.

#include "ffi.h"

#include <stdlib.h>

#include "product_call.h"
#include "self_test.h"

namespace lissom {

int selected = 0;

namespace {

ScaleType scale_type(ffi::AnyBuffer scales) {
  if (scales.element_type() == ffi::F32) return kF32Scales;
  return scales.element_type() == ffi::F16 ? kF16Scales : kBf16Scales;
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

}  // namespace
}  // namespace lissom

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
