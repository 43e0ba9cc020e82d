// Plain C++ on vectors of the compiler's own: any architecture, and NEON where there is NEON.

#include <math.h>
#include <string.h>

#include <utility>

#include "types.h"

namespace lissom {
namespace {

struct Portable {
  static constexpr int kLanes = 4, kVectors = 8, kRows = 2;
  static constexpr bool kWaits = false;
  typedef uint8_t Bytes __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));
  typedef float Float __attribute__((vector_size(16)));
  typedef uint32_t Unsigned __attribute__((vector_size(16)));

  static inline Bytes load(const uint8_t* p) {
    Bytes c;
    memcpy(&c, p, sizeof(c));
    return c;
  }
  static inline Bytes low(Bytes c) { return c & 15; }
  static inline Bytes high(Bytes c) { return c >> 4; }
  __attribute__((noinline)) static Bytes lookup(const uint8_t* table, Bytes c) {
    for (int i = 0; i < 16; ++i) c[i] = table[c[i]];
    return c;
  }
  static inline Bytes flip(Bytes c, uint8_t bits) { return c ^ bits; }
  static inline Bytes load_pairs(const uint8_t* p) {
    Bytes c = {};
    for (int i = 0; i < kLanes; ++i) memcpy(reinterpret_cast<uint8_t*>(&c) + 4 * i, p + 2 * i, 2);
    return c;
  }
  // Of each lane its first byte counts.
  static inline Bytes places(const uint8_t* p, int n) {
    Bytes c = {};
    for (int i = 0; i < kLanes; ++i) c[4 * i] = p[n % 4 * kLanes + i] >> n / 4 * 4;
    return c;
  }
  __attribute__((noinline)) static Bytes put(Bytes pairs, Bytes places, const uint32_t* table) {
    Bytes c = {};
    for (int i = 0; i < 16; ++i) {
      const uint32_t byte = table[places[i & 12] & 7] >> 8 * (i & 3) & 255;
      if (byte < 4) c[i] = pairs[(i & 12) + byte];
    }
    return c;
  }

  static inline Int set_int(int32_t x) { return Int{} + x; }
  static inline Int add(Int a, Int b) { return a + b; }
  static inline Bytes even_words(Bytes c) { return as_bytes(as_int(c) & 0x00ff00ff); }
  static inline Bytes odd_words(Bytes c) { return as_bytes(as_int(c) >> 8 & 0x00ff00ff); }
  // Of two halves of words.
  static inline Bytes even_words(Bytes low, Bytes high) {
    return as_bytes(as_int(even_words(low)) | (as_int(high) & 0x00ff00ff) << 8);
  }
  static inline Bytes odd_words(Bytes low, Bytes high) {
    return as_bytes(as_int(odd_words(low)) | (as_int(odd_words(high)) << 8));
  }
  static inline Bytes high_words(Bytes c) { return as_bytes(as_int(c) >> 4 & 0x000f000f); }
  static inline Int dot(Int sum, Bytes c, int32_t x) {
    const Int words = as_int(c);
    return sum + (words & 0xffff) * static_cast<int16_t>(x) + (words >> 16) * (x >> 16);
  }
  static inline Int load_zeros(const uint8_t* p) {
    Int x = {};
    for (int i = 0; i < kLanes; ++i) x[i] = p[i];
    return x;
  }
  static inline Int subtract_product(Int sum, Int zero, int32_t x) { return sum - zero * x; }
  static inline Float to_float(Int x) { return __builtin_convertvector(x, Float); }

  static inline Float set_float(float x) { return Float{} + x; }
  static inline Float add(Float a, Float b) { return a + b; }
  static inline Float negate(Float a) { return -a; }
  static inline Float multiply(Float a, Float b) { return a * b; }
  static inline Float fma(Float a, Float b, Float c) { return a * b + c; }
  static inline Float subtract(Float a, Float b) { return a - b; }
  static inline Float divide(Float a, Float b) { return a / b; }
  static inline Float largest(Float a, Float b) {
    for (int i = 0; i < kLanes; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
  }
  static inline Float smallest(Float a, Float b) {
    for (int i = 0; i < kLanes; ++i) a[i] = a[i] < b[i] ? a[i] : b[i];
    return a;
  }
  static inline Float times_power(Float a, Float n) {
    Unsigned bits, power;
    memcpy(&bits, &a, sizeof(a));
    memcpy(&power, &n, sizeof(n));
    bits += power << 23;
    memcpy(&a, &bits, sizeof(a));
    return a;
  }
  static inline Float load_float(const float* p) {
    Float x;
    memcpy(&x, p, sizeof(x));
    return x;
  }
  static inline void store_float(float* p, Float x) { memcpy(p, &x, sizeof(x)); }

  static inline float sum(Float x) { return (x[0] + x[2]) + (x[1] + x[3]); }

  static inline Float load_int8(const int8_t* p) {
    Float x = {};
    for (int i = 0; i < kLanes; ++i) x[i] = p[i];
    return x;
  }
  static inline Float load_bf16(const uint16_t* p) {
    Float x = {};
    for (int i = 0; i < kLanes; ++i) x[i] = from_bf16(p[i]);
    return x;
  }
  static inline Float even_bf16(Bytes c) {
    Int lanes;
    memcpy(&lanes, &c, sizeof(c));
    lanes = as_int(as_unsigned(lanes) << 16);
    Float x;
    memcpy(&x, &lanes, sizeof(x));
    return x;
  }
  static inline Float odd_bf16(Bytes c) {
    Int lanes;
    memcpy(&lanes, &c, sizeof(c));
    lanes &= static_cast<int32_t>(0xffff0000);
    Float x;
    memcpy(&x, &lanes, sizeof(x));
    return x;
  }
  // Out of line: inlined into every unrolled loop they would take minutes to compile.
  __attribute__((noinline)) static Float load_f16(const uint8_t* p) {
    Float x = {};
    for (int i = 0; i < kLanes; ++i) x[i] = small_float(p[2 * i] | p[2 * i + 1] << 8, 5, 10);
    return x;
  }
  __attribute__((noinline)) static Float load_fp8(const uint8_t* p) {
    Float x = {};
    for (int i = 0; i < kLanes; ++i) x[i] = small_float(p[i], 4, 3);
    return x;
  }
  static inline Float byte_to_float(Bytes c, int i) {
    Int lanes;
    memcpy(&lanes, &c, sizeof(c));
    return to_float(lanes >> (8 * i) & 255);
  }
  __attribute__((noinline)) static Float lookup_float(const float* table, Bytes c, int shift) {
    Int lanes;
    memcpy(&lanes, &c, sizeof(c));
    Float x = {};
    for (int i = 0; i < kLanes; ++i) x[i] = table[lanes[i] >> shift & 15];
    return x;
  }

 private:
  static inline Unsigned as_unsigned(Int x) {
    Unsigned y;
    memcpy(&y, &x, sizeof(y));
    return y;
  }
  static inline Int as_int(Bytes x) {
    Int y;
    memcpy(&y, &x, sizeof(y));
    return y;
  }
  static inline Bytes as_bytes(Int x) {
    Bytes y;
    memcpy(&y, &x, sizeof(y));
    return y;
  }
  static inline Int as_int(Unsigned x) {
    Int y;
    memcpy(&y, &x, sizeof(y));
    return y;
  }

  // Any finite IEEE-like number of few bits; fp8_e4m3fn has no infinity, and f16's is kept.
  static inline float small_float(uint32_t bits, int exponent_bits, int mantissa_bits) {
    const uint32_t top = (1u << exponent_bits) - 1, bias = top >> 1;
    const uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
    const uint32_t exponent = bits >> mantissa_bits & top;
    const bool negative = bits >> (exponent_bits + mantissa_bits) & 1;
    uint32_t wide = (exponent + 127 - bias) << 23 | mantissa << (23 - mantissa_bits);
    if (exponent_bits == 5 && exponent == top) wide |= 0x7f800000;
    float x;
    memcpy(&x, &wide, 4);
    if (exponent == 0) {
      const uint32_t unit = (128 - bias - mantissa_bits) << 23;  // of the subnormal numbers
      memcpy(&x, &unit, 4);
      x *= static_cast<float>(mantissa);
    }
    return negative ? -x : x;
  }
};

}  // namespace
}  // namespace lissom

#include "drive.h"

#include "attend.h"
#include "prefill.h"

namespace lissom {
namespace {

bool supported() { return true; }

}  // namespace

extern const Kernels kPortable = {"portable", supported, quantize, integer<Portable>,
                                  floating<Portable>, nullptr, attend<Portable>, prefill<Portable>};

}  // namespace lissom
