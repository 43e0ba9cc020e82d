// What XLA calls (lissom_product), and what Python asks before it does.

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <thread>

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

ffi::Error check(const Weights& w, ffi::AnyBuffer x, ffi::AnyBuffer values, ffi::AnyBuffer scales,
                 ffi::AnyBuffer zeros, ffi::Result<ffi::AnyBuffer> y) {
  const auto refuse = [](const char* what) { return ffi::Error::InvalidArgument(what); };
  const int64_t rows = w.inputs > 0 ? x.element_count() / w.inputs : 0;
  const bool plain = w.format == kBf16 || w.format == kF16;
  const size_t scale_count = plain ? 0 : w.tiles() * w.groups * kTile;
  if (w.format < 0 || w.format >= kFormats || w.inputs < 1 || w.outputs < 0 || w.groups < 1)
    return refuse("lissom: no such format or shape");
  if (w.groups > 1 && (w.inputs % w.groups || w.group() % 16))
    return refuse("lissom: groups must be multiples of 16 inputs");
  for (const ffi::DataType type : {x.element_type(), y->element_type()})
    if (type != ffi::F32 && type != ffi::BF16) return refuse("lissom: x and y are f32 or bf16");
  if (x.element_count() != static_cast<size_t>(rows * w.inputs) ||
      y->element_count() != static_cast<size_t>(rows * w.outputs))
    return refuse("lissom: x or y does not have the shape of the weight");
  if (values.size_bytes() != static_cast<size_t>(w.tiles() * w.tile_bytes()))
    return refuse("lissom: the packed values have a wrong size");
  if (scales.element_count() != scale_count ||
      (scale_count && scales.element_type() != ffi::F32 && scales.element_type() != ffi::BF16))
    return refuse("lissom: the scales have a wrong size or type");
  if (zeros.size_bytes() != 0 && (w.format > kInt4 || zeros.size_bytes() != scale_count))
    return refuse("lissom: the zero points have a wrong size");
  return ffi::Error::Success();
}

ffi::Error product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer values,
                   ffi::AnyBuffer scales, ffi::AnyBuffer zeros, ffi::Result<ffi::AnyBuffer> y,
                   int64_t format, int64_t groups, int64_t inputs, int64_t instruction_set,
                   int64_t outputs, int64_t quantize, int64_t threads) {
  Call call;
  Weights& w = call.weights;
  w.format = static_cast<Format>(format);
  w.inputs = inputs;
  w.outputs = outputs;
  w.groups = groups;
  if (ffi::Error error = check(w, x, values, scales, zeros, y); error.failure()) return error;
  w.values = static_cast<const uint8_t*>(values.untyped_data());
  w.scales = scales.untyped_data();
  w.scales_are_f32 = scales.element_type() == ffi::F32;
  w.zeros = zeros.size_bytes() ? static_cast<const uint8_t*>(zeros.untyped_data()) : nullptr;
  const int chosen = instruction_set < 0 ? selected : static_cast<int>(instruction_set);
  if (chosen >= instruction_set_count() || !instruction_sets()[chosen]->supported())
    return ffi::Error::InvalidArgument("lissom: this machine lacks that instruction set");
  call.kernels = instruction_sets()[chosen];
  call.x = x.untyped_data();
  call.x_bf16 = x.element_type() == ffi::BF16;
  call.rows = static_cast<int64_t>(x.element_count()) / inputs;
  call.quantize = quantize != 0 && w.format <= kNf4;
  call.out = {y->untyped_data(), y->element_type() == ffi::BF16};
  PoolScheduler scheduler(&pool);
  Workers workers(&scheduler, threads > 0 ? threads : std::max<int64_t>(1, pool.num_threads()));
  if (!multiply(call, workers))
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "lissom: no memory for the activations");
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lissom

#define LISSOM_EXPORT extern "C" __attribute__((visibility("default")))

LISSOM_EXPORT XLA_FFI_Error* lissom_product(XLA_FFI_CallFrame* frame) {
  using xla::ffi::AnyBuffer;
  static auto* const handler = xla::ffi::Ffi::Bind()
                                   .Ctx<xla::ffi::ThreadPool>()
                                   .Arg<AnyBuffer>()
                                   .Arg<AnyBuffer>()
                                   .Arg<AnyBuffer>()
                                   .Arg<AnyBuffer>()
                                   .Ret<AnyBuffer>()
                                   .Attr<int64_t>("format")
                                   .Attr<int64_t>("groups")
                                   .Attr<int64_t>("inputs")
                                   .Attr<int64_t>("instruction_set")
                                   .Attr<int64_t>("outputs")
                                   .Attr<int64_t>("quantize")
                                   .Attr<int64_t>("threads")
                                   .To(lissom::product)
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

// Whether the environment says LISSOM_NATIVE=0.
LISSOM_EXPORT int lissom_disabled() {
  const char* value = getenv("LISSOM_NATIVE");
  return value != nullptr && strcmp(value, "0") == 0;
}
