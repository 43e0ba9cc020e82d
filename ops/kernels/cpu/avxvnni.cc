// AVX-VNNI: the dot products of words for processors without AVX-512.

#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include <utility>

#include "target.h"
#include "types.h"

LISSOM_TARGET_BEGIN("avxvnni,avx2,fma,f16c")

#define LISSOM_VNNI 1
#include "avx2.h"
#include "drive.h"

#include "attend.h"
#include "prefill.h"

namespace lissom {
namespace {

bool supported() {
  unsigned a, b, c, d;  // older compilers do not know the feature by name
  const bool vnni = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
  return vnni && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

}  // namespace

extern const Kernels kAvxVnni = {"avx_vnni", supported, quantize, integer<Avx2>, floating<Avx2>,
                                 nullptr, attend<Avx2>, prefill<Avx2>};

}  // namespace lissom

LISSOM_TARGET_END

#endif  // __x86_64__
