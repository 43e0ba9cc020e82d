// AVX-512: two vectors of 16 cover a tile, and 8 rows keep 16 sums in registers, so a load of weights
// feeds 16 dot products. Included within the targets of avx512.cc and avx512_bf16.cc.

namespace lissom {
namespace {

struct Avx512 {
  static constexpr int kLanes = 16, kVectors = 2, kRows = 8;
  static constexpr bool kWaits = true;
  using Bytes = __m512i;
  using Int = __m512i;
  using Float = __m512;

  static inline Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static inline Bytes low(Bytes c) { return _mm512_and_si512(c, _mm512_set1_epi8(15)); }
  static inline Bytes high(Bytes c) { return low(_mm512_srli_epi16(c, 4)); }
  static inline Bytes lookup(const uint8_t* table, Bytes c) {
    const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), c);
  }
  static inline Bytes flip(Bytes c, int bits) {
    return _mm512_xor_si512(c, _mm512_set1_epi8(static_cast<char>(bits)));
  }
  static inline Bytes load_pairs(const uint8_t* p) { return _mm512_cvtepu16_epi32(half(p)); }
  static inline Bytes places(const uint8_t* p, int n) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_srli_epi32(_mm512_cvtepu8_epi32(all), 4 * n);
  }
  static inline Bytes put(Bytes pairs, Bytes places, const uint32_t* table) {
    const __m512i bytes = _mm512_permutexvar_epi32(places, _mm512_broadcast_i64x4(half(table)));
    const __m512i lanes = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    return _mm512_shuffle_epi8(pairs, _mm512_or_si512(bytes, lanes));
  }

  static inline Int set_int(int32_t x) { return _mm512_set1_epi32(x); }
  static inline Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
  static inline Bytes even_words(Bytes c) { return _mm512_and_si512(c, _mm512_set1_epi16(255)); }
  static inline Bytes odd_words(Bytes c) { return _mm512_srli_epi16(c, 8); }
  // Of two halves of words.
  static inline Bytes even_words(Bytes low, Bytes high) {
    return _mm512_or_si512(even_words(low), _mm512_slli_epi16(high, 8));
  }
  static inline Bytes odd_words(Bytes low, Bytes high) {
    return _mm512_or_si512(odd_words(low), _mm512_andnot_si512(_mm512_set1_epi16(255), high));
  }
  static inline Bytes high_words(Bytes c) { return _mm512_srli_epi16(c, 4); }
  static inline Int dot(Int sum, Bytes c, int32_t x) {
    return _mm512_dpwssd_epi32(sum, c, _mm512_set1_epi32(x));
  }
  static inline Int load_zeros(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Int subtract_product(Int sum, Int zero, int32_t x) {
    return _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero, _mm512_set1_epi32(x)));
  }
  static inline Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }

  static inline Float set_float(float x) { return _mm512_set1_ps(x); }
  static inline Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static inline Float negate(Float a) { return _mm512_sub_ps(_mm512_setzero_ps(), a); }
  static inline Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static inline Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Float subtract(Float a, Float b) { return _mm512_sub_ps(a, b); }
  static inline Float divide(Float a, Float b) { return _mm512_div_ps(a, b); }
  static inline Float largest(Float a, Float b) { return _mm512_max_ps(a, b); }
  static inline Float smallest(Float a, Float b) { return _mm512_min_ps(a, b); }
  static inline Float times_power(Float a, Float n) {
    const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(n), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), power));
  }
  static inline Float load_float(const float* p) { return _mm512_loadu_ps(p); }
  static inline void store_float(float* p, Float x) { _mm512_storeu_ps(p, x); }

  static inline float sum(Float x) { return _mm512_reduce_add_ps(x); }

  static inline Float load_int8(const int8_t* p) {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
  }
  static inline Float load_bf16(const uint16_t* p) {
    return even_bf16(_mm512_cvtepu16_epi32(half(p)));
  }
  static inline Float even_bf16(Bytes x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
  static inline Float odd_bf16(Bytes x) {
    return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-65536)));
  }
  static inline Float load_f16(const uint8_t* p) { return _mm512_cvtph_ps(half(p)); }
  static inline Float load_fp8(const uint8_t* p) {
    // As float16 with the exponent's bias off by 8; the conversion knows subnormal numbers.
    const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(x, 7), 15);
    const __m256i rest = _mm256_srli_epi16(_mm256_slli_epi16(x, 9), 2);
    return multiply(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)), set_float(256));
  }
  static inline Float byte_to_float(Bytes x, int i) {
    const __m512i c = _mm512_and_si512(_mm512_srli_epi32(x, 8 * i), _mm512_set1_epi32(255));
    return _mm512_cvtepi32_ps(c);
  }
  static inline Float lookup_float(const float* table, Bytes x, int shift) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(x, shift), _mm512_loadu_ps(table));
  }

 private:
  static inline __m256i half(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
};

}  // namespace
}  // namespace lissom
