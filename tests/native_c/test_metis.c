/* The handle keeps its promises, and no argument leads out of bounds or changes anything when it is
 * refused. Meant to run under ASan and UBSan. */
#include "check.h"
#include "metis.h"
#include "metis_bench.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

enum { UPDATES = 19 }; /* more than are folded at once */

/* Folds the updates of `count` floats, cut at `cut`, one by one or at once, into `out`. */
static void fold_cut(float *const updates[UPDATES], size_t count, size_t cut, bool at_once,
                     double *out) {
  double weights[UPDATES];
  metis_accumulator *sums = NULL;
  CHECK(metis_accumulator_create(count, &sums) == METIS_OK, "%s", metis_error_text());
  CHECK(metis_accumulator_begin(sums, count) == METIS_OK, "%s", metis_error_text());
  const size_t starts[3] = {0, cut, count};
  for (size_t piece = 0; piece < 2; piece++) {
    const size_t start = starts[piece];
    const size_t bytes = (starts[piece + 1] - start) * sizeof(float);
    const void *values[UPDATES];
    metis_status status = METIS_OK;
    for (size_t k = 0; k < UPDATES; k++) {
      values[k] = updates[k] + start;
      weights[k] = 0.375 + (double)k * (k % 3 ? 1.75 : -2.5); /* exact in any mode */
      if (!at_once && status == METIS_OK) {
        status =
            metis_accumulator_absorb(sums, values[k], bytes, METIS_FLOAT32, weights[k], start);
      }
    }
    if (at_once) {
      status = metis_accumulator_absorb_many(sums, values, weights, UPDATES, bytes, METIS_FLOAT32,
                                             start);
    }
    CHECK(status == METIS_OK, "%s", metis_error_text());
  }
  CHECK(metis_accumulator_finalise(sums, METIS_FLOAT64, 3.0, out, count * sizeof *out) == METIS_OK,
        "%s", metis_error_text());
  metis_accumulator_destroy(sums);
}

static void cuts_fusion_and_modes_change_nothing(void) {
  const size_t count = 20011; /* more than two tiles */
  float *updates[UPDATES];
  for (size_t k = 0; k < UPDATES; k++) {
    updates[k] = allocate(count * sizeof(float));
    for (size_t i = 0; i < count; i++) {
      const int exponent = i % 5 ? -(int)(random_bits() % 40) : -149; /* subnormals among them */
      updates[k][i] = ldexpf((float)(int32_t)random_bits() * 0x1p-31f, exponent);
    }
  }
  double *want = allocate(count * sizeof *want);
  double *have = allocate(count * sizeof *have);
  fold_cut(updates, count, 0, false, want);
  for (size_t cut = 0; cut <= count; cut += 1 + cut * 2) {
    for (int at_once = 0; at_once < 2; at_once++) {
      fold_cut(updates, count, cut, at_once, have);
      CHECK(memcmp(want, have, count * sizeof *want) == 0, "cut at %zu, at once %d", cut, at_once);
    }
  }
#if defined(__SSE2__)
  const unsigned before = _mm_getcsr();
  const unsigned other = 0x1F80 | 0x8040 | 0x4000; /* no subnormals, round upward */
  _mm_setcsr(other);
  fold_cut(updates, count, 100, true, have);
  CHECK((_mm_getcsr() & ~0x3Fu) == other, "the caller's mode was not put back");
  _mm_setcsr(before);
  CHECK(memcmp(want, have, count * sizeof *want) == 0, "another floating-point mode, other bits");
#endif
  for (size_t k = 0; k < UPDATES; k++) {
    free(updates[k]);
  }
  free(want);
  free(have);
}

#define REFUSED(call, words)                                                                       \
  do {                                                                                             \
    CHECK((call) == METIS_ERR_ARGUMENT, "not refused");                                            \
    CHECK(strstr(metis_error_text(), words) != NULL, "text: %s", metis_error_text());              \
  } while (0)

static void bad_arguments_are_refused(void) {
  metis_accumulator *sums = NULL;
  REFUSED(metis_accumulator_create(1, NULL), "out is NULL");
  REFUSED(metis_accumulator_create(0, &sums), "capacity of 0");
  REFUSED(metis_accumulator_create(SIZE_MAX, &sums), "outside 1 to 4294967296");
  CHECK(sums == NULL, "written although it failed");
  CHECK(metis_accumulator_create(4, &sums) == METIS_OK, "%s", metis_error_text());

  float ones[4] = {1, 1, 1, 1};
  const float none[3] = {0, 0, 0};
  const void *const updates[2] = {ones, NULL};
  const double weights[2] = {1.0, 1.0};
  const double bad_weights[2] = {1.0, NAN};
  REFUSED(metis_accumulator_begin(NULL, 1), "accumulator is NULL");
  REFUSED(metis_accumulator_begin(sums, 5), "5 values is above the capacity of 4");
  REFUSED(metis_accumulator_absorb(sums, ones, 4, METIS_FLOAT32, 1.0, 0), "a range of 0");
  CHECK(metis_accumulator_begin(sums, 3) == METIS_OK, "%s", metis_error_text());

#define ABSORB(handle, values, bytes, dtype, weight, offset)                                       \
  metis_accumulator_absorb(handle, values, bytes, dtype, weight, offset)
  REFUSED(ABSORB(NULL, ones, 4, METIS_FLOAT32, 1.0, 0), "accumulator is NULL");
  REFUSED(ABSORB(sums, NULL, 4, METIS_FLOAT32, 1.0, 0), "update 0 are NULL");
  REFUSED(ABSORB(sums, ones, 5, METIS_FLOAT32, 1.0, 0), "5 bytes");
  REFUSED(ABSORB(sums, ones, 16, METIS_FLOAT32, 1.0, 0), "4 values from offset 0");
  REFUSED(ABSORB(sums, ones, 8, METIS_FLOAT32, 1.0, 2), "do not fit a range of 3");
  REFUSED(ABSORB(sums, ones, 4, METIS_FLOAT32, 1.0, SIZE_MAX), "do not fit");
  REFUSED(ABSORB(sums, ones, SIZE_MAX - 3, METIS_FLOAT32, 1.0, 1), "do not fit");
  REFUSED(ABSORB(sums, ones, SIZE_MAX, METIS_INT8, 1.0, 1), "do not fit");
  REFUSED(ABSORB(sums, ones, 4, (metis_dtype)13, 1.0, 0), "dtype 13 is unknown");
  REFUSED(ABSORB(sums, ones, 4, (metis_dtype)-1, 1.0, 0), "dtype -1 is unknown");
  REFUSED(ABSORB(sums, ones, 4, METIS_FLOAT32, INFINITY, 0), "inf, not finite");
#define MANY(values, weights) metis_accumulator_absorb_many(sums, values, weights, 2, 4, 2, 0)
  REFUSED(MANY(NULL, weights), "values is NULL");
  REFUSED(MANY(updates, NULL), "weights is NULL");
  REFUSED(MANY(updates, weights), "update 1 are NULL");
  REFUSED(metis_accumulator_absorb_many(sums, (const void *const[]){ones, ones}, bad_weights, 2, 4,
                                        METIS_FLOAT32, 0),
          "update 1 is");

#define FINALISE(handle, dtype, divisor, out, bytes)                                               \
  metis_accumulator_finalise(handle, dtype, divisor, out, bytes)
  REFUSED(FINALISE(NULL, METIS_FLOAT32, 1.0, ones, 12), "accumulator is NULL");
  REFUSED(FINALISE(sums, METIS_FLOAT32, 1.0, NULL, 12), "out is NULL");
  REFUSED(FINALISE(sums, METIS_FLOAT32, 0.0, ones, 12), "divisor of 0");
  REFUSED(FINALISE(sums, METIS_FLOAT32, NAN, ones, 12), "not zero");
  REFUSED(FINALISE(sums, METIS_FLOAT32, 1.0, ones, 16), "room for 4 values");
  REFUSED(FINALISE(sums, METIS_FLOAT32, 1.0, ones, 8), "room for 2 values");
  REFUSED(FINALISE(sums, METIS_FLOAT32, 1.0, ones, 11), "11 bytes");
  REFUSED(FINALISE(sums, (metis_dtype)99, 1.0, ones, 12), "dtype 99");
  CHECK(ones[0] == 1.0f && ones[2] == 1.0f, "an output was written although the call failed");
  CHECK(FINALISE(sums, METIS_FLOAT32, 1.0, ones, 12) == METIS_OK, "%s", metis_error_text());
  CHECK(memcmp(ones, none, sizeof none) == 0, "a refused update went into the sums");
  metis_accumulator_destroy(sums);
  metis_accumulator_destroy(NULL);

  size_t index = 7;
  uint32_t crc = 7;
  REFUSED(metis_first_non_finite(NULL, 4, METIS_FLOAT32, &index), "values is NULL");
  REFUSED(metis_first_non_finite(ones, 4, METIS_FLOAT32, NULL), "index is NULL");
  REFUSED(metis_first_non_finite(ones, 3, METIS_FLOAT16, &index), "3 bytes");
  REFUSED(metis_first_non_finite(ones, 4, (metis_dtype)13, &index), "dtype 13");
  REFUSED(metis_crc32c(NULL, 1, &crc), "data is NULL");
  REFUSED(metis_crc32c(ones, 1, NULL), "crc is NULL");
  CHECK(index == 7 && crc == 7, "written although it failed");
}

static void bench_passes_check_their_lengths(void) {
  metis_accumulator *sums = NULL;
  uint64_t checksum = 0;
  const float values[2] = {1, 2};
  double out[2] = {0, 0};
  CHECK(metis_accumulator_create(2, &sums) == METIS_OK, "%s", metis_error_text());
  CHECK(metis_accumulator_begin(sums, 2) == METIS_OK, "%s", metis_error_text());
  REFUSED(metis_bench_add_pass(sums, values, 4), "4 bytes");
  REFUSED(metis_bench_scan(values, 4, &checksum), "4 bytes");
  uint64_t limbs[2] = {UINT64_MAX, 1};
  REFUSED(metis_bench_limb_pass(limbs, NULL, 2), "2 limbs of nothing");
  REFUSED(metis_bench_limb_pass(NULL, limbs, 2), "2 limbs of nothing");
  CHECK(metis_bench_limb_pass(limbs, (const uint64_t[]){2, 3}, 2) == METIS_OK, "%s",
        metis_error_text());
  CHECK(limbs[0] == 1 && limbs[1] == 4, "the pass did not add");
  CHECK(metis_bench_add_pass(sums, values, 8) == METIS_OK, "%s", metis_error_text());
  CHECK(metis_bench_scan(values, 8, &checksum) == METIS_OK && checksum, "%s", metis_error_text());
  CHECK(metis_accumulator_finalise(sums, METIS_FLOAT64, 1.0, out, 16) == METIS_OK && out[1] == 2.0,
        "%s", metis_error_text());
  metis_accumulator_destroy(sums);
}

int main(void) {
  cuts_fusion_and_modes_change_nothing();
  bad_arguments_are_refused();
  bench_passes_check_their_lengths();
  return 0;
}
