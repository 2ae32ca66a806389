/* The handle, and every check on what a caller passes.
 *
 * Law: all of a call's arguments are checked before anything is read through or written to; sizes
 * are compared by division and subtraction, so that no product or sum of them can wrap.
 */
#include "metis_impl.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#if defined(__SSE2__)
#include <xmmintrin.h>
typedef unsigned fp_mode;
/* Round to nearest, no flush to zero, no trap. A numeric library in the same process may have set
 * another mode for the calling thread, and bits must not depend on that. */
static fp_mode fp_enter(void) {
  const fp_mode before = _mm_getcsr();
  _mm_setcsr(0x1F80);
  return before;
}
static void fp_leave(fp_mode before) { _mm_setcsr(before); }
#else
#include <fenv.h>
typedef fenv_t fp_mode;
static fp_mode fp_enter(void) {
  fp_mode before;
  fegetenv(&before);
  fesetenv(FE_DFL_ENV);
  return before;
}
static void fp_leave(fp_mode before) { fesetenv(&before); }
#endif

enum {
  CACHE_LINE_BYTES = 64,
  TILE_VALUES = 8192,  /* their sums stay in the cache while all updates pass over them */
  GROUP_UPDATES = 16,  /* at once: a processor reads few streams well */
};

size_t metis_item_bytes(metis_dtype dtype) {
  switch (dtype) {
  case METIS_INT8:
  case METIS_UINT8:
  case METIS_BOOL:
    return 1;
  case METIS_FLOAT16:
  case METIS_BFLOAT16:
  case METIS_INT16:
  case METIS_UINT16:
    return 2;
  case METIS_FLOAT32:
  case METIS_INT32:
  case METIS_UINT32:
    return 4;
  case METIS_FLOAT64:
  case METIS_INT64:
  case METIS_UINT64:
    return 8;
  }
  return 0;
}

/* `bytes` as a number of values of `dtype`. */
static metis_status count_values(size_t bytes, metis_dtype dtype, size_t *count) {
  const size_t item_bytes = metis_item_bytes(dtype);
  if (item_bytes == 0) {
    return metis_refuse("dtype %d is unknown, allowed: 0 to %d", (int)dtype, METIS_DTYPES - 1);
  }
  if (bytes % item_bytes != 0) {
    return metis_refuse("%zu bytes are not a whole number of values of %zu bytes", bytes,
                        item_bytes);
  }
  *count = bytes / item_bytes;
  return METIS_OK;
}

/* A buffer that is about to be absorbed: *count is how many values it holds. */
static metis_status check_range(const metis_accumulator *self, size_t bytes, metis_dtype dtype,
                                size_t offset, size_t *count) {
  const metis_status status = count_values(bytes, dtype, count);
  if (status != METIS_OK) {
    return status;
  }
  if (offset > self->count || *count > self->count - offset) {
    return metis_refuse("%zu values from offset %zu on do not fit a range of %zu values", *count,
                        offset, self->count);
  }
  return METIS_OK;
}

static metis_status refuse_null(const char *what) { return metis_refuse("%s is NULL", what); }

static metis_status refuse_handle(void) {
  return metis_refuse("the accumulator is NULL: not created, or closed");
}

metis_status metis_accumulator_create(size_t capacity, metis_accumulator **out) {
  if (out == NULL) {
    return refuse_null("out");
  }
  if (capacity == 0 || capacity > METIS_CAPACITY_MAX) {
    return metis_refuse("a capacity of %zu values is outside 1 to %zu", capacity,
                        METIS_CAPACITY_MAX);
  }
  const size_t bytes = capacity * sizeof(double);
  metis_accumulator *self = malloc(sizeof *self);
  double *sums = aligned_alloc(CACHE_LINE_BYTES, (bytes + CACHE_LINE_BYTES - 1) / CACHE_LINE_BYTES *
                                                     CACHE_LINE_BYTES);
  if (self == NULL || sums == NULL) {
    free(self);
    free(sums);
    metis_refuse("no memory for %zu bytes of sums", bytes);
    return METIS_ERR_MEMORY;
  }
  self->kernels = metis_pick_kernels();
  self->capacity = capacity;
  self->count = 0;
  self->sums = sums;
  *out = self;
  return METIS_OK;
}

void metis_accumulator_destroy(metis_accumulator *self) {
  if (self != NULL) {
    free(self->sums);
    free(self);
  }
}

metis_status metis_accumulator_begin(metis_accumulator *self, size_t count) {
  if (self == NULL) {
    return refuse_handle();
  }
  if (count > self->capacity) {
    return metis_refuse("a range of %zu values is above the capacity of %zu", count,
                        self->capacity);
  }
  self->count = count;
  memset(self->sums, 0, count * sizeof self->sums[0]);
  return METIS_OK;
}

static void fold_tiles(metis_accumulator *self, const void *const *values, const double *weights,
                       size_t updates, metis_dtype dtype, size_t offset, size_t count) {
  metis_fold_fn *const fold = metis_fold_of(self->kernels, dtype);
  const uint8_t *group[GROUP_UPDATES];
  const fp_mode before = fp_enter();
  for (size_t start = 0; start < count; start += TILE_VALUES) {
    const size_t end = count - start < TILE_VALUES ? count : start + TILE_VALUES;
    for (size_t first = 0; first < updates; first += GROUP_UPDATES) {
      const size_t size = updates - first < GROUP_UPDATES ? updates - first : GROUP_UPDATES;
      for (size_t k = 0; k < size; k++) {
        group[k] = values[first + k];
      }
      fold(self->sums + offset, group, weights + first, size, start, end);
    }
  }
  fp_leave(before);
}

metis_status metis_accumulator_absorb(metis_accumulator *self, const void *const values,
                                      size_t bytes, metis_dtype dtype, double weight,
                                      size_t offset) {
  return metis_accumulator_absorb_many(self, &values, &weight, 1, bytes, dtype, offset);
}

metis_status metis_accumulator_absorb_many(metis_accumulator *self, const void *const *values,
                                           const double *weights, size_t updates, size_t bytes,
                                           metis_dtype dtype, size_t offset) {
  if (self == NULL) {
    return refuse_handle();
  }
  if (values == NULL || weights == NULL) {
    return refuse_null(values == NULL ? "values" : "weights");
  }
  size_t count = 0;
  const metis_status status = check_range(self, bytes, dtype, offset, &count);
  if (status != METIS_OK) {
    return status;
  }
  for (size_t k = 0; k < updates; k++) {
    if (values[k] == NULL) {
      return metis_refuse("the values of update %zu are NULL", k);
    }
    if (!isfinite(weights[k])) {
      return metis_refuse("the weight of update %zu is %g, not finite", k, weights[k]);
    }
  }
  fold_tiles(self, values, weights, updates, dtype, offset, count);
  return METIS_OK;
}

metis_status metis_accumulator_finalise(const metis_accumulator *self, metis_dtype dtype,
                                        double divisor, void *out, size_t out_bytes) {
  if (self == NULL) {
    return refuse_handle();
  }
  if (out == NULL) {
    return refuse_null("out");
  }
  if (!isfinite(divisor) || divisor == 0.0) {
    return metis_refuse("a divisor of %g, allowed: finite and not zero", divisor);
  }
  size_t count = 0;
  const metis_status status = count_values(out_bytes, dtype, &count);
  if (status != METIS_OK) {
    return status;
  }
  if (count != self->count) {
    return metis_refuse("room for %zu values does not equal the range of %zu values", count,
                        self->count);
  }
  const fp_mode before = fp_enter();
  metis_round_of(self->kernels, dtype)(out, self->sums, count, divisor);
  fp_leave(before);
  return METIS_OK;
}

metis_status metis_first_non_finite(const void *values, size_t bytes, metis_dtype dtype,
                                    size_t *index) {
  if (values == NULL || index == NULL) {
    return refuse_null(values == NULL ? "values" : "index");
  }
  size_t count = 0;
  const metis_status status = count_values(bytes, dtype, &count);
  if (status == METIS_OK) {
    const size_t found = metis_scan_of(metis_pick_kernels(), dtype)(values, count);
    *index = found < count ? found : METIS_ALL_FINITE;
  }
  return status;
}

metis_status metis_crc32c(const void *data, size_t bytes, uint32_t *crc) {
  if (data == NULL || crc == NULL) {
    return refuse_null(data == NULL ? "data" : "crc");
  }
  *crc = metis_pick_kernels()->crc32c(*crc, data, bytes);
  return METIS_OK;
}
