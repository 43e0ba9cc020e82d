// AVX2 with FMA: every x86-64 server and desktop of the last ten years.

#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include <utility>

#include "target.h"
#include "types.h"

LISSOM_TARGET_BEGIN("avx2,fma,f16c")

#define LISSOM_VNNI 0
#include "avx2.h"
#include "drive.h"

#include "attend.h"
#include "prefill.h"

namespace lissom {
namespace {

bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}

}  // namespace

extern const Kernels kAvx2 = {"avx2", supported, quantize, integer<Avx2>, floating<Avx2>, nullptr,
                              attend<Avx2>, prefill<Avx2>};

}  // namespace lissom

LISSOM_TARGET_END

#endif  // __x86_64__
