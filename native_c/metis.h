/* metis: the streamed weighted sum behind every aggregation rule, and the checks on its input.
 *
 * An accumulator holds one float64 sum for each value of a range of a model. A caller begins a
 * range, absorbs the same range of each learner's update with that learner's weight, and finalises
 * the sums, divided, into the range of the new model. Memory is the sums, whatever the learners.
 *
 *   begin(count)        sum[i]           = +0.0                                  for i < count
 *   absorb              sum[offset + i] += (double)value[i] * weight             for each value
 *   finalise            out[i]           = round_to(dtype, sum[i] / divisor)     for i < count
 *
 * Bits: each product, sum and quotient is rounded to double, to nearest, ties to even; nothing is
 * fused. So the result has the same bits on every kernel, at every length and alignment, however
 * a range is cut, and whatever rounding or flush-to-zero mode the calling thread is in. It does
 * depend on the order of the absorbed updates: always use the same.
 *
 * Ownership: the caller owns every buffer that it passes; nothing is kept after a call returns. A
 * handle comes from metis_accumulator_create and goes back once to metis_accumulator_destroy.
 * Threads: one handle, one thread at a time; different handles, and all else, are independent.
 * Buffers: values in the host's byte order, at any alignment. Lengths are in bytes and must match.
 * Errors: a call that can fail returns a metis_status and then has written no output, changed no
 * sum; metis_error_text says what was found and what is allowed. NULL is refused, never followed.
 */
#ifndef METIS_H
#define METIS_H

#include <stddef.h>
#include <stdint.h>

typedef enum {
  METIS_OK = 0,
  METIS_ERR_ARGUMENT = 1, /* the caller's fault: a null pointer, a value outside its bounds */
  METIS_ERR_MEMORY = 2,   /* the allocator said no */
} metis_status;

typedef enum {
  METIS_FLOAT16 = 0,
  METIS_BFLOAT16 = 1, /* the upper half of a float32 */
  METIS_FLOAT32 = 2,
  METIS_FLOAT64 = 3,
  METIS_INT8 = 4,
  METIS_INT16 = 5,
  METIS_INT32 = 6,
  METIS_INT64 = 7, /* beyond 2^53 a value is rounded to double before it is weighted */
  METIS_UINT8 = 8,
  METIS_UINT16 = 9,
  METIS_UINT32 = 10,
  METIS_UINT64 = 11, /* as int64 */
  METIS_BOOL = 12,   /* one byte: 0 is 0.0, any other is 1.0 */
} metis_dtype;

#define METIS_CAPACITY_MAX ((size_t)1 << 32) /* values; 32 GiB of sums */

typedef struct metis_accumulator metis_accumulator;

/* 1 <= capacity <= METIS_CAPACITY_MAX values; *out is written on success only. */
metis_status metis_accumulator_create(size_t capacity, metis_accumulator **out);
void metis_accumulator_destroy(metis_accumulator *self); /* NULL is allowed */

/* Starts a range of `count` <= capacity values. A new accumulator has a range of none. */
metis_status metis_accumulator_begin(metis_accumulator *self, size_t count);

/* Adds `bytes` of values, times `weight`, to the sums from `offset` on. The weight is finite; the
 * values lie within the range. NaN and infinity among them go into the sums: see
 * metis_first_non_finite. */
metis_status metis_accumulator_absorb(metis_accumulator *self, const void *values, size_t bytes,
                                      metis_dtype dtype, double weight, size_t offset);

/* Adds the same values of many updates, values[k] times weights[k]: the same bits as absorbing
 * them one after another, in one pass over the sums. `bytes` is the length of each. */
metis_status metis_accumulator_absorb_many(metis_accumulator *self, const void *const *values,
                                           const double *weights, size_t updates, size_t bytes,
                                           metis_dtype dtype, size_t offset);

/* Writes sum / divisor for the whole range; the divisor is finite and not zero. The quotient is
 * rounded to the nearest value of the dtype, ties to even. Floats: beyond the largest is infinity,
 * and every NaN is the positive quiet NaN without payload. Integers: clamped to their range, also
 * from infinity; NaN is 0. Bool: quotient >= 0.5. The sums stay. */
metis_status metis_accumulator_finalise(const metis_accumulator *self, metis_dtype dtype,
                                        double divisor, void *out, size_t out_bytes);

/* The index of the first NaN or infinity, or METIS_ALL_FINITE. */
#define METIS_ALL_FINITE SIZE_MAX
metis_status metis_first_non_finite(const void *values, size_t bytes, metis_dtype dtype,
                                    size_t *index);

/* Carries a CRC-32C (Castagnoli, as in iSCSI) on over `data`: *crc starts as 0. */
metis_status metis_crc32c(const void *data, size_t bytes, uint32_t *crc);

/* "avx2" or "portable": picked once; METIS_KERNEL=portable in the environment forces the latter. */
const char *metis_kernel(void);

/* Why the calling thread's last failed call failed: one line, valid until its next one. */
const char *metis_error_text(void);

#endif
