// AVX2, and the place where AVX-VNNI differs from it: the dot product of words.
//
// Four vectors of 8 cover a tile, and 16 registers hold two rows of sums. Included by avx2.cc and
// avxvnni.cc within their targets; LISSOM_VNNI says which of them it is.

namespace lissom {
namespace {

struct Avx2 {
  static constexpr int kLanes = 8, kVectors = 4, kRows = 2;
  static constexpr bool kWaits = LISSOM_VNNI;  // whether a dot product is slower than the loop
  using Bytes = __m256i;
  using Int = __m256i;
  using Float = __m256;

  static inline Bytes load(const uint8_t* p) { return whole(p); }
  static inline Bytes low(Bytes c) { return _mm256_and_si256(c, _mm256_set1_epi8(15)); }
  static inline Bytes high(Bytes c) { return low(_mm256_srli_epi16(c, 4)); }
  static inline Bytes lookup(const uint8_t* table, Bytes c) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(quarter(table)), c);
  }
  static inline Bytes flip(Bytes c, int bits) {
    return _mm256_xor_si256(c, _mm256_set1_epi8(static_cast<char>(bits)));
  }
  static inline Bytes load_pairs(const uint8_t* p) { return _mm256_cvtepu16_epi32(quarter(p)); }
  static inline Bytes places(const uint8_t* p, int n) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + n % 2 * 8));
    return _mm256_srli_epi32(_mm256_cvtepu8_epi32(eight), n / 2 * 4);
  }
  static inline Bytes put(Bytes pairs, Bytes places, const uint32_t* table) {
    const __m256i bytes = _mm256_permutevar8x32_epi32(whole(table), places);
    const __m256i lanes = _mm256_set_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0, 0x0c0c0c0c,
                                           0x08080808, 0x04040404, 0);
    return _mm256_shuffle_epi8(pairs, _mm256_or_si256(bytes, lanes));
  }

  static inline Int set_int(int32_t x) { return _mm256_set1_epi32(x); }
  static inline Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }

  static inline Bytes even_words(Bytes c) { return _mm256_and_si256(c, _mm256_set1_epi16(255)); }
  static inline Bytes odd_words(Bytes c) { return _mm256_srli_epi16(c, 8); }
  // Of two halves of words.
  static inline Bytes even_words(Bytes low, Bytes high) {
    return _mm256_or_si256(even_words(low), _mm256_slli_epi16(high, 8));
  }
  static inline Bytes odd_words(Bytes low, Bytes high) {
    return _mm256_or_si256(odd_words(low), _mm256_andnot_si256(_mm256_set1_epi16(255), high));
  }
  static inline Bytes high_words(Bytes c) { return _mm256_srli_epi16(c, 4); }
  static inline Int dot(Int sum, Bytes c, int32_t x) {
#if LISSOM_VNNI
    return _mm256_dpwssd_avx_epi32(sum, c, _mm256_set1_epi32(x));
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(c, _mm256_set1_epi32(x)));
#endif
  }

  static inline Int load_zeros(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static inline Int subtract_product(Int sum, Int zero, int32_t x) {
    return _mm256_sub_epi32(sum, _mm256_mullo_epi32(zero, _mm256_set1_epi32(x)));
  }
  static inline Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }

  static inline Float set_float(float x) { return _mm256_set1_ps(x); }
  static inline Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static inline Float negate(Float a) { return _mm256_sub_ps(_mm256_setzero_ps(), a); }
  static inline Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static inline Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  // Of NaN and a number the second, whichever it is. `times_power` multiplies a by 2^n, for an integer
  // n to which 1.5 * 2^23 was added.
  static inline Float subtract(Float a, Float b) { return _mm256_sub_ps(a, b); }
  static inline Float divide(Float a, Float b) { return _mm256_div_ps(a, b); }
  static inline Float largest(Float a, Float b) { return _mm256_max_ps(a, b); }
  static inline Float smallest(Float a, Float b) { return _mm256_min_ps(a, b); }
  static inline Float times_power(Float a, Float n) {
    const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(n), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), power));
  }
  static inline Float load_float(const float* p) { return _mm256_loadu_ps(p); }
  static inline void store_float(float* p, Float x) { _mm256_storeu_ps(p, x); }

  static inline float sum(Float x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static inline Float load_int8(const int8_t* p) {
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
  }
  static inline Float load_bf16(const uint16_t* p) {
    return even_bf16(_mm256_cvtepu16_epi32(quarter(p)));
  }
  static inline Float even_bf16(Bytes x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
  static inline Float odd_bf16(Bytes x) {
    return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(-65536)));
  }
  static inline Float load_f16(const uint8_t* p) { return _mm256_cvtph_ps(quarter(p)); }
  static inline Float load_fp8(const uint8_t* p) {
    // As float16 with the exponent's bias off by 8; the conversion knows subnormal numbers.
    const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i sign = _mm_slli_epi16(_mm_srli_epi16(x, 7), 15);
    const __m128i rest = _mm_srli_epi16(_mm_slli_epi16(x, 9), 2);
    return multiply(_mm256_cvtph_ps(_mm_or_si128(sign, rest)), set_float(256));
  }
  static inline Float byte_to_float(Bytes x, int i) {
    const __m256i c = _mm256_and_si256(_mm256_srli_epi32(x, 8 * i), _mm256_set1_epi32(255));
    return _mm256_cvtepi32_ps(c);
  }
  static inline Float lookup_float(const float* table, Bytes x, int shift) {
    const __m256i c = _mm256_srli_epi32(x, shift);
    const Float lower = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), c);
    const Float upper = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), c);
    return _mm256_blendv_ps(lower, upper, _mm256_castsi256_ps(_mm256_slli_epi32(c, 28)));
  }

 private:
  static inline __m256i whole(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static inline __m128i quarter(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
};

}  // namespace
}  // namespace lissom
