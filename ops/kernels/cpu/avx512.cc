// AVX-512 with VNNI: 32 products of words an instruction.

#if defined(__x86_64__)

#include <immintrin.h>
#include <math.h>
#include <string.h>

#include <utility>

#include "target.h"
#include "types.h"

LISSOM_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")

#include "avx512.h"
#include "drive.h"

#include "attend.h"
#include "prefill.h"

namespace lissom {
namespace {

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

}  // namespace

extern const Kernels kAvx512 = {"avx512_vnni", supported, quantize, integer<Avx512>,
                                floating<Avx512>, nullptr, attend<Avx512>, prefill<Avx512>};

}  // namespace lissom

LISSOM_TARGET_END

#endif  // __x86_64__
