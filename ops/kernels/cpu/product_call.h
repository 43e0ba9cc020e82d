// The products of some rows with one weight or several, as their caller describes them. Each weight
// may be one of several experts; then the rows are in consecutive groups, and each group meets its
// own expert. Experts without rows are not read.

#ifndef LISSOM_PRODUCT_CALL_H_
#define LISSOM_PRODUCT_CALL_H_

#include "types.h"
#include "workers.h"

namespace lissom {

constexpr int kMostProducts = 8;  // of one call

struct Product {
  Weights weights;
  Output out;
};

struct Call {
  const Kernels* kernels;
  const Product* products;  // `alike`
  int64_t count;
  const void* x;  // [rows, inputs]
  bool x_bf16;
  int64_t rows;
  bool quantize;  // the activations, to int16
  const int32_t* group_sizes;  // rows of each expert, or null: one weight, for all rows
  int64_t experts;             // 1 without groups
};

// Whether rows are laid out for one weight as they are for the other.
inline bool alike(const Weights& a, const Weights& b, bool quantize) {
  return a.inputs == b.inputs && a.step() == b.step() && (!quantize || a.block() == b.block());
}

// Returns false if there is no memory for the activations.
bool multiply(const Call& call, Workers& workers);

}  // namespace lissom

#endif  // LISSOM_PRODUCT_CALL_H_
