/* Invariant tested: whatever bytes come as the values of a plain chunk, in whatever pieces, the
 * kernels of this machine give the bits of the portable ones, what does not fit is refused and
 * leaves no trace in the sums, and nothing is read outside of them.
 *
 * An input is 16 bytes that say what is done, then the values. */
#include "check.h"
#include "metis_impl.h"

#include <math.h>
#include <string.h>

enum {
  HEAD = 16,
  CAPACITY = 256, /* values; more teach nothing new */
  UPDATES = 3,
};

static metis_accumulator *accumulator;

static void must(metis_status status) { CHECK(status == METIS_OK, "%s", metis_error_text()); }

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  (void)argc;
  (void)argv;
  must(metis_accumulator_create(CAPACITY, &accumulator));
  return 0;
}

static double weight_of(const uint8_t *data) {
  double weight;
  memcpy(&weight, data, sizeof weight);
  return weight;
}

/* In place of memcmp, which libFuzzer listens to: it would learn sums by heart. */
static void same(const uint8_t *ours, const uint8_t *portable, size_t bytes, const char *what) {
  for (size_t i = 0; i < bytes; i++) {
    CHECK(ours[i] == portable[i], "%s: byte %zu is %02x, not %02x", what, i, ours[i], portable[i]);
  }
}

/* The sums, without the rounding that hides a difference. */
static void read_sums(double *out, size_t count) {
  must(metis_accumulator_finalise(accumulator, METIS_FLOAT64, 1.0, out, count * sizeof *out));
}

/* One of the library's float64 for every NaN: which of two it keeps is the processor's choice. */
static void check_sums(const double *wanted, size_t count, const char *what) {
  double found[CAPACITY], rounded[CAPACITY];
  read_sums(found, count);
  metis_portable.round[METIS_FLOAT64]((uint8_t *)rounded, wanted, count, 1.0);
  same((const uint8_t *)found, (const uint8_t *)rounded, count * sizeof *found, what);
}

static void check_rounding(const double *sums, size_t count, metis_dtype dtype, double divisor) {
  const size_t bytes = count * metis_item_bytes(dtype);
  uint8_t *const ours = allocate(bytes);
  uint8_t *const portable = allocate(bytes);
  const metis_status status =
      metis_accumulator_finalise(accumulator, dtype, divisor, ours, bytes);
  CHECK((status == METIS_OK) == (isfinite(divisor) && divisor != 0), "divisor %g: %d", divisor,
        (int)status);
  if (status == METIS_OK) {
    metis_round_of(&metis_portable, dtype)(portable, sums, count, divisor);
    same(ours, portable, bytes, "rounded");
  }
  free(ours);
  free(portable);
}

static void check_scan(const uint8_t *values, size_t bytes, metis_dtype dtype) {
  const size_t count = bytes / metis_item_bytes(dtype);
  size_t found = 0;
  must(metis_first_non_finite(values, count * metis_item_bytes(dtype), dtype, &found));
  const size_t wanted = metis_scan_of(&metis_portable, dtype)(values, count);
  CHECK(found == (wanted == count ? METIS_ALL_FINITE : wanted), "first is %zu, not %zu", found,
        wanted);
}

static void check_crc(const uint8_t *values, size_t bytes, size_t cut) {
  uint32_t crc = 0;
  must(metis_crc32c(values, cut, &crc));
  must(metis_crc32c(values + cut, bytes - cut, &crc));
  CHECK(crc == metis_crc32c_portable(0, values, bytes), "CRC-32C %08x", crc);
}

/* Absorbs `bytes` at `offset`, as one update or as several; tells whether that was allowed. */
static bool absorb(const uint8_t *values, size_t bytes, metis_dtype dtype, double weight,
                   size_t offset, size_t updates) {
  if (updates == 1) {
    return metis_accumulator_absorb(accumulator, values, bytes, dtype, weight, offset) == METIS_OK;
  }
  const uint8_t *all[UPDATES] = {values, values, values};
  const double weights[UPDATES] = {weight, 1.0, weight};
  return metis_accumulator_absorb_many(accumulator, (const void *const *)all, weights, updates,
                                       bytes, dtype, offset) == METIS_OK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  uint8_t head[HEAD] = {0};
  memcpy(head, data, size < HEAD ? size : HEAD);
  const size_t bytes = size < HEAD ? 0 : size - HEAD;
  uint8_t *const values = allocate(bytes); /* to its exact size, for the sanitizers */
  memcpy(values, data + size - bytes, bytes);

  const metis_dtype dtype = (metis_dtype)(head[0] % METIS_DTYPES);
  const size_t item = metis_item_bytes(dtype), updates = 1 + head[1] % UPDATES;
  const size_t count = 1 + head[2] % CAPACITY, offset = head[3];
  const double weight = weight_of(head + 4);
  double sums[CAPACITY] = {0};
  must(metis_accumulator_begin(accumulator, count));
  const bool right = isfinite(weight) && bytes % item == 0 && offset <= count &&
                     bytes / item <= count - offset;
  CHECK(absorb(values, bytes, dtype, weight, offset, updates) == right,
        "%zu bytes of dtype %d at %zu of %zu, weight %g: %s", bytes, (int)dtype, offset, count,
        weight, metis_error_text());
  if (right) {
    const uint8_t *all[UPDATES] = {values, values, values};
    const double weights[UPDATES] = {weight, 1.0, weight};
    metis_fold_of(&metis_portable, dtype)(sums + offset, all, weights, updates, 0, bytes / item);
  }
  check_sums(sums, count, right ? "absorbed" : "refused");
  read_sums(sums, count);
  check_rounding(sums, count, (metis_dtype)(head[12] % METIS_DTYPES), weight_of(head + 4));
  check_scan(values, bytes, dtype);
  check_crc(values, bytes, bytes * head[13] / 256);
  free(values);
  return 0;
}
