/* The same bits as metis_fold_portable.c, four doubles at a time (AVX2 and F16C, never FMA).
 *
 * Law: a vector lane does what the portable line does, operation for operation; the tail of a
 * range, and every dtype that is missing here, goes to the portable kernel. What is missing is
 * missing because the compiler's own vector code for it is as fast as memory.
 */
#include "metis_impl.h"

#include <immintrin.h>
#include <string.h>

static inline __m128i load_128(const uint8_t *values) {
  return _mm_loadu_si128((const __m128i *)(const void *)values);
}

static inline __m256d float64_4(const uint8_t *values) {
  return _mm256_loadu_pd((const double *)(const void *)values);
}

static inline __m256d float32_4(const uint8_t *values) {
  return _mm256_cvtps_pd(_mm_loadu_ps((const float *)(const void *)values));
}

static inline __m256d int32_4(const uint8_t *values) {
  return _mm256_cvtepi32_pd(load_128(values));
}

static inline __m128i load_64(const uint8_t *values) {
  return _mm_loadl_epi64((const __m128i *)(const void *)values);
}

static inline __m256d float16_4(const uint8_t *values) {
  return _mm256_cvtps_pd(_mm_cvtph_ps(load_64(values)));
}

static inline __m256d bfloat16_4(const uint8_t *values) {
  const __m128i upper = _mm_slli_epi32(_mm_cvtepu16_epi32(load_64(values)), 16);
  return _mm256_cvtps_pd(_mm_castsi128_ps(upper));
}

/* Eight sums, one cache line, stay in registers while all updates pass over them; sixteen were half
 * as fast from memory. The processor's own prefetcher stops at each page and follows few streams;
 * asking `AHEAD_BYTES` ahead makes up for that. An address past the end is never read through. */
enum { AHEAD_BYTES = 1024 };

static inline void prefetch(const void *at) {
  _mm_prefetch((const char *)((uintptr_t)at + AHEAD_BYTES), _MM_HINT_T0);
}

static inline __m256d add_product(__m256d sums, __m256d values, __m256d weight) {
  return _mm256_add_pd(sums, _mm256_mul_pd(values, weight));
}

#define FOLD(name, dtype, item_bytes)                                                              \
  static void fold_##name(double *restrict sums, const uint8_t *const *values,                     \
                          const double *weights, size_t updates, size_t start, size_t end) {       \
    size_t i = start;                                                                              \
    for (; end - i >= 8; i += 8) {                                                                 \
      __m256d a = _mm256_loadu_pd(sums + i);                                                       \
      __m256d b = _mm256_loadu_pd(sums + i + 4);                                                   \
      prefetch(sums + i);                                                                          \
      for (size_t k = 0; k < updates; k++) {                                                       \
        const uint8_t *const at = values[k] + i * (item_bytes);                                    \
        const __m256d weight = _mm256_broadcast_sd(weights + k);                                   \
        prefetch(at);                                                                              \
        a = add_product(a, name##_4(at), weight);                                                  \
        b = add_product(b, name##_4(at + 4 * (item_bytes)), weight);                               \
      }                                                                                            \
      _mm256_storeu_pd(sums + i, a);                                                               \
      _mm256_storeu_pd(sums + i + 4, b);                                                           \
    }                                                                                              \
    metis_portable.fold[dtype](sums, values, weights, updates, i, end);                            \
  }

FOLD(float16, METIS_FLOAT16, 2)
FOLD(bfloat16, METIS_BFLOAT16, 2)
FOLD(float32, METIS_FLOAT32, 4)
FOLD(float64, METIS_FLOAT64, 8)
FOLD(int32, METIS_INT32, 4)

/* ---- double to 16 bits ----------------------------------------------------------------------- */

/* To float32 by rounding to odd: what falls off leaves its mark in the last bit that is kept. With
 * at least two bits more than the format it is rounded to next, no tie can be made or missed, so
 * rounding twice is rounding once. Holds where the float32 is not subnormal. */
static inline __m128 to_odd_float32(__m256d values) {
  const __m256i nan = _mm256_set1_epi64x(0x7FF8000000000000);
  const __m256i lost = _mm256_set1_epi64x(0x1FFFFFFF);
  const __m256i last = _mm256_set1_epi64x(0x20000000);
  const __m256d unordered = _mm256_cmp_pd(values, values, _CMP_UNORD_Q);
  values = _mm256_blendv_pd(values, _mm256_castsi256_pd(nan), unordered);
  const __m256i bits = _mm256_castpd_si256(values);
  const __m256i exact = _mm256_cmpeq_epi64(_mm256_and_si256(bits, lost), _mm256_setzero_si256());
  const __m256i kept = _mm256_andnot_si256(lost, bits);
  const __m256i odd = _mm256_or_si256(kept, _mm256_andnot_si256(exact, last));
  return _mm256_cvtpd_ps(_mm256_castsi256_pd(odd));
}

static void round_float16(uint8_t *restrict out, const double *restrict sums, size_t count,
                          double divisor) {
  const __m256d divisors = _mm256_set1_pd(divisor);
  size_t i = 0;
  for (; count - i >= 4; i += 4) {
    /* A subnormal float32 is far below half of the smallest float16: zero either way. */
    const __m128 odd = to_odd_float32(_mm256_div_pd(_mm256_loadu_pd(sums + i), divisors));
    const __m128i halves = _mm_cvtps_ph(odd, _MM_FROUND_TO_NEAREST_INT);
    memcpy(out + i * 2, &halves, 8);
  }
  metis_portable.round[METIS_FLOAT16](out + i * 2, sums + i, count - i, divisor);
}

static void round_bfloat16(uint8_t *restrict out, const double *restrict sums, size_t count,
                           double divisor) {
  const __m256d divisors = _mm256_set1_pd(divisor);
  const __m256d sign = _mm256_set1_pd(-0.0);
  const __m256d smallest_normal = _mm256_set1_pd(0x1p-126);
  size_t i = 0;
  for (; count - i >= 4; i += 4) {
    const __m256d quotients = _mm256_div_pd(_mm256_loadu_pd(sums + i), divisors);
    const __m256d magnitudes = _mm256_andnot_pd(sign, quotients);
    const __m256d tiny = _mm256_cmp_pd(magnitudes, smallest_normal, _CMP_LT_OQ);
    const __m256d zero = _mm256_cmp_pd(magnitudes, _mm256_setzero_pd(), _CMP_EQ_OQ);
    if (_mm256_movemask_pd(_mm256_andnot_pd(zero, tiny))) {
      metis_portable.round[METIS_BFLOAT16](out + i * 2, sums + i, 4, divisor);
      continue;
    }
    const __m128i bits = _mm_castps_si128(to_odd_float32(quotients));
    const __m128i even = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
    const __m128i carried = _mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7FFF)), even);
    const __m128i halves = _mm_packus_epi32(_mm_srli_epi32(carried, 16), _mm_setzero_si128());
    memcpy(out + i * 2, &halves, 8);
  }
  metis_portable.round[METIS_BFLOAT16](out + i * 2, sums + i, count - i, divisor);
}

/* ---- the table ------------------------------------------------------------------------------- */

const metis_kernels metis_avx2 = {
    .name = "avx2",
    .fold = {[METIS_FLOAT16] = fold_float16,
             [METIS_BFLOAT16] = fold_bfloat16,
             [METIS_FLOAT32] = fold_float32,
             [METIS_FLOAT64] = fold_float64,
             [METIS_INT32] = fold_int32},
    .round = {[METIS_FLOAT16] = round_float16, [METIS_BFLOAT16] = round_bfloat16},
    .crc32c = metis_crc32c_sse42,
    .add_packed = metis_add_packed_avx2,
    .unpack = metis_unpack_avx2,
    .pack = metis_pack_portable,
    .keystream = metis_keystream_aesni,
};
