/* Private to the library and its tests: what a kernel is.
 *
 * Law: the portable kernels are the specification. Another kernel gives the same bits at every
 * length and alignment, or it is wrong. Kernels trust their arguments: metis_accumulator.c and its
 * neighbours have checked them. They run with the standard floating-point environment.
 */
#ifndef METIS_IMPL_H
#define METIS_IMPL_H

#include "metis.h"

#include <float.h>
#include <stdbool.h>

#if FLT_EVAL_METHOD != 0
#error "a double must be rounded to double after every operation"
#endif
_Static_assert(sizeof(size_t) == 8, "bounds such as METIS_CAPACITY_MAX assume 64 bits");

#define METIS_DTYPES (METIS_BOOL + 1)

/* For each i from `start` to below `end`, and each update k in order:
 * sums[i] += (double)values[k][i] * weights[k]. Each values[k] is packed values of one dtype. */
typedef void metis_fold_fn(double *restrict sums, const uint8_t *const *values,
                           const double *weights, size_t updates, size_t start, size_t end);

/* out[i] = sums[i] / divisor, rounded as metis.h says. */
typedef void metis_round_fn(uint8_t *restrict out, const double *restrict sums, size_t count,
                            double divisor);

/* The index of the first NaN or infinity, else `count`. */
typedef size_t metis_scan_fn(const uint8_t *values, size_t count);

typedef uint32_t metis_crc32c_fn(uint32_t crc, const uint8_t *data, size_t bytes);

/* Where a set has no kernel for a dtype (NULL), the portable one is meant. */
typedef struct {
  const char *name;
  metis_fold_fn *fold[METIS_DTYPES];
  metis_round_fn *round[METIS_DTYPES];
  metis_scan_fn *scan[METIS_DTYPES];
  metis_crc32c_fn *crc32c;
} metis_kernels;

extern const metis_kernels metis_portable; /* has them all */
#if defined(METIS_HAVE_AVX2)
extern const metis_kernels metis_avx2;
bool metis_cpu_has_avx2(void); /* and all else that metis_avx2 uses */
metis_crc32c_fn metis_crc32c_sse42;
#endif
metis_crc32c_fn metis_crc32c_portable;

static inline metis_fold_fn *metis_fold_of(const metis_kernels *set, metis_dtype dtype) {
  return set->fold[dtype] != NULL ? set->fold[dtype] : metis_portable.fold[dtype];
}

static inline metis_round_fn *metis_round_of(const metis_kernels *set, metis_dtype dtype) {
  return set->round[dtype] != NULL ? set->round[dtype] : metis_portable.round[dtype];
}

static inline metis_scan_fn *metis_scan_of(const metis_kernels *set, metis_dtype dtype) {
  return set->scan[dtype] != NULL ? set->scan[dtype] : metis_portable.scan[dtype];
}

/* The fastest kernels of this machine, or those that METIS_KERNEL forces: once per process. */
const metis_kernels *metis_pick_kernels(void);

size_t metis_item_bytes(metis_dtype dtype); /* 0: no such dtype */

/* Sets metis_error_text and returns METIS_ERR_ARGUMENT. */
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
metis_status metis_refuse(const char *format, ...);

struct metis_accumulator {
  const metis_kernels *kernels;
  size_t capacity;
  size_t count; /* of the range begun; sums beyond it were never written */
  double *sums; /* aligned to a cache line */
};

#endif
