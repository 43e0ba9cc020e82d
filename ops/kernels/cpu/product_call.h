// One product as its caller describes it.

#ifndef LISSOM_PRODUCT_CALL_H_
#define LISSOM_PRODUCT_CALL_H_

#include "types.h"
#include "workers.h"

namespace lissom {

struct Call {
  const Kernels* kernels;
  Weights weights;
  const void* x;  // [rows, inputs]
  bool x_bf16;
  int64_t rows;
  bool quantize;  // the activations
  Output out;
};

// Returns false if there is no memory for the activations.
bool multiply(const Call& call, Workers& workers);

}  // namespace lissom

#endif  // LISSOM_PRODUCT_CALL_H_
