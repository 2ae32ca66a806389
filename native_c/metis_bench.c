/* The limits that the fold is measured against, in plain C for the compiler to vectorise. */
#include "metis_bench.h"

#include "metis_impl.h"

#include <string.h>

static inline __attribute__((always_inline)) void add_pass(double *restrict sums,
                                                           const uint8_t *restrict values,
                                                           size_t count) {
  for (size_t i = 0; i < count; i++) {
    float value;
    memcpy(&value, values + i * sizeof value, sizeof value);
    sums[i] += (double)value;
  }
}

#if defined(METIS_HAVE_AVX2)
/* The same loop for the wider registers: the kernel must not win by a handicap of its limit. */
__attribute__((target("avx2"))) static void add_pass_avx2(double *sums, const uint8_t *values,
                                                          size_t count) {
  add_pass(sums, values, count);
}
#endif

metis_status metis_bench_add_pass(metis_accumulator *self, const void *values, size_t bytes) {
  if (self == NULL || values == NULL || bytes % sizeof(float) != 0 ||
      bytes / sizeof(float) != self->count) {
    return metis_refuse("a bench pass of %zu bytes does not match its accumulator", bytes);
  }
#if defined(METIS_HAVE_AVX2)
  if (self->kernels == &metis_avx2) {
    add_pass_avx2(self->sums, values, self->count);
    return METIS_OK;
  }
#endif
  add_pass(self->sums, values, self->count);
  return METIS_OK;
}

metis_status metis_bench_scan(const void *values, size_t bytes, uint64_t *checksum) {
  if (values == NULL || checksum == NULL || bytes % sizeof(uint64_t) != 0) {
    return metis_refuse("a bench scan of %zu bytes, allowed: a multiple of 8", bytes);
  }
  const char *from = values;
  uint64_t sum = 0;
  for (size_t i = 0; i < bytes; i += sizeof(uint64_t)) {
    uint64_t word;
    memcpy(&word, from + i, sizeof word);
    sum += word;
  }
  *checksum = sum;
  return METIS_OK;
}

static inline __attribute__((always_inline)) void limb_pass(uint64_t *restrict sums,
                                                            const uint64_t *restrict limbs,
                                                            size_t count) {
  for (size_t i = 0; i < count; i++) {
    sums[i] += limbs[i];
  }
}

#if defined(METIS_HAVE_AVX2)
__attribute__((target("avx2"))) static void limb_pass_avx2(uint64_t *sums, const uint64_t *limbs,
                                                           size_t count) {
  limb_pass(sums, limbs, count);
}
#endif

metis_status metis_bench_limb_pass(uint64_t *sums, const uint64_t *limbs, size_t count) {
  if (sums == NULL || limbs == NULL) {
    return metis_refuse("a bench pass over %zu limbs of nothing", count);
  }
#if defined(METIS_HAVE_AVX2)
  if (metis_pick_kernels() == &metis_avx2) {
    limb_pass_avx2(sums, limbs, count);
    return METIS_OK;
  }
#endif
  limb_pass(sums, limbs, count);
  return METIS_OK;
}
