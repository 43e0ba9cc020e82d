// All instruction sets that this build has, the best first.

#ifndef LISSOM_INSTRUCTION_SETS_H_
#define LISSOM_INSTRUCTION_SETS_H_

#include "types.h"

namespace lissom {

inline const Kernels* const* instruction_sets() {
  static const Kernels* const all[] = {
#if defined(__x86_64__)
      &kAvx512Bf16, &kAvx512, &kAvxVnni, &kAvx2,
#endif
      &kPortable};
  return all;
}

inline int instruction_set_count() {
#if defined(__x86_64__)
  return 5;
#else
  return 1;
#endif
}

}  // namespace lissom

#endif  // LISSOM_INSTRUCTION_SETS_H_
