// Small products and attention against the plainest arithmetic, from the packed bytes up.

#ifndef LISSOM_SELF_TEST_H_
#define LISSOM_SELF_TEST_H_

#include "types.h"

namespace lissom {

struct Shape {
  int64_t rows, inputs, outputs, groups;
};

struct AttentionShape {
  int64_t batch, queries, keys, heads, kv_heads, width;
};

// Every format, with float and with quantized activations, and attention over caches of both types.
// Null, or what went wrong in words.
const char* self_test(const Kernels& kernels);
const char* self_test(const Kernels& kernels, Shape shape);
const char* attention_test(const Kernels& kernels, AttentionShape shape);

}  // namespace lissom

#endif  // LISSOM_SELF_TEST_H_
