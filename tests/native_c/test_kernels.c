/* Every kernel equals the portable one at every length and alignment, and the portable one equals
 * arithmetic. Meant to run under ASan and UBSan. */
#include "check.h"
#include "metis_impl.h"

#include <math.h>
#include <string.h>

enum { LENGTHS = 68, UPDATES = 5 };

static const metis_kernels *kernel_sets[2];
static size_t kernel_sets_count;

static void fill(uint8_t *data, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) {
    /* Half of the bytes are 0 or 255: so NaN, infinity, zero and subnormals are common. */
    const uint64_t bits = random_bits();
    data[i] = (uint8_t)(bits & 256 ? (bits & 512 ? 0xFF : 0) : bits);
  }
}

/* Values whose rounding is worth a look, among them the ties of every integer and float dtype. */
static double random_sum(void) {
  static const double chosen[] = {0.0,
                                  -0.0,
                                  0.5,
                                  1.5,
                                  2.5,
                                  -0.5,
                                  127.5,
                                  -128.5,
                                  255.5,
                                  0x1p-24,
                                  0x1p-25,
                                  0x1.8p-25,
                                  65504.0,
                                  65519.999,
                                  65520.0,
                                  0x1p-126,
                                  0x1.fffffffffffffp-127,
                                  0x1p-133,
                                  0x1p-134,
                                  0x1.8p-134,
                                  0x1.0000001p-134,
                                  0x1.fep127,
                                  0x1.ffp127,
                                  0x1.fffffep127,
                                  0x1.ffffffp127,
                                  2147483647.5,
                                  -2147483648.5,
                                  4294967295.5,
                                  0x1p63,
                                  -0x1p63,
                                  0x1p64,
                                  0x1.fffffffffffffp63,
                                  5e-324,
                                  1e300,
                                  INFINITY,
                                  -INFINITY,
                                  NAN,
                                  -NAN};
  const uint64_t bits = random_bits();
  if (bits & 1) {
    return chosen[(bits >> 8) % (sizeof chosen / sizeof chosen[0])];
  }
  double sum;
  const uint64_t any = random_bits();
  memcpy(&sum, &any, sizeof sum);
  return bits & 2 ? sum : ldexp((double)(int64_t)any, -(int)(bits >> 8 & 127));
}

static uint64_t bits_of(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

/* ---- every kernel against the portable one --------------------------------------------------- */

static void fold_at(const metis_kernels *set, metis_dtype dtype, size_t count, size_t offset) {
  const size_t bytes = count * metis_item_bytes(dtype);
  uint8_t *memory[UPDATES];
  const uint8_t *values[UPDATES];
  double weights[UPDATES];
  for (size_t k = 0; k < UPDATES; k++) {
    memory[k] = allocate(offset + bytes);
    values[k] = memory[k] + offset;
    fill(memory[k] + offset, bytes);
    weights[k] = (double)(int64_t)random_bits() * 0x1p-60;
  }
  double *want = allocate(count * sizeof *want);
  double *have = allocate(count * sizeof *have);
  for (size_t i = 0; i < count; i++) {
    want[i] = have[i] = (double)i * 0.37;
  }
  const size_t start = count / 5; /* the sums before it must stay as they are */
  metis_fold_of(&metis_portable, dtype)(want, values, weights, UPDATES, start, count);
  metis_fold_of(set, dtype)(have, values, weights, UPDATES, start, count);
  for (size_t i = 0; i < count; i++) {
    const bool same = isnan(want[i]) ? isnan(have[i]) : !memcmp(want + i, have + i, sizeof *want);
    CHECK(same, "%s fold, dtype %d, count %zu, offset %zu, sum %zu: %a is not %a", set->name,
          (int)dtype, count, offset, i, have[i], want[i]);
    CHECK(i >= start || have[i] == (double)i * 0.37, "sum %zu, before the start", i);
  }
  for (size_t k = 0; k < UPDATES; k++) {
    free(memory[k]);
  }
  free(want);
  free(have);
}

static void round_at(const metis_kernels *set, metis_dtype dtype, size_t count, size_t offset) {
  const size_t bytes = count * metis_item_bytes(dtype);
  double *sums = allocate(count * sizeof *sums);
  for (size_t i = 0; i < count; i++) {
    sums[i] = random_sum();
  }
  uint8_t *want = allocate(offset + bytes);
  uint8_t *have = allocate(offset + bytes);
  const double divisor = random_bits() & 1 ? 1.0 : -3.0;
  metis_round_of(&metis_portable, dtype)(want + offset, sums, count, divisor);
  metis_round_of(set, dtype)(have + offset, sums, count, divisor);
  CHECK(memcmp(want + offset, have + offset, bytes) == 0, "%s round, dtype %d, count %zu",
        set->name, (int)dtype, count);
  free(sums);
  free(want);
  free(have);
}

static void scan_at(const metis_kernels *set, metis_dtype dtype, size_t count, size_t offset) {
  const size_t item_bytes = metis_item_bytes(dtype);
  uint8_t *memory = allocate(offset + count * item_bytes);
  uint8_t *values = memory + offset;
  memset(values, 1, count * item_bytes);
  metis_scan_fn *const scan = metis_scan_of(set, dtype);
  CHECK(scan(values, count) == count, "%s scan, dtype %d", set->name, (int)dtype);
  const bool is_float = dtype <= METIS_FLOAT64;
  for (size_t bad = 0; bad < count; bad++) {
    uint8_t infinity[8] = {0}; /* the smallest that is not finite, on a little-endian machine */
    const uint8_t top[4] = {0x7C, 0x7F, 0x7F, 0x7F}; /* by dtype */
    const uint8_t next[4] = {0, 0x80, 0x80, 0xF0};
    infinity[item_bytes - 1] = is_float ? top[dtype] : 0xFF;
    if (is_float) {
      infinity[item_bytes - 2] = next[dtype];
    }
    memcpy(values + bad * item_bytes, infinity, item_bytes);
    const size_t found = scan(values, count);
    CHECK(found == (is_float ? bad : count), "%s scan, dtype %d, count %zu: %zu, put at %zu",
          set->name, (int)dtype, count, found, bad);
    memset(values + bad * item_bytes, 1, item_bytes);
  }
  free(memory);
}

static void kernels_equal_the_portable_one(void) {
  for (size_t s = 0; s < kernel_sets_count; s++) {
    for (metis_dtype dtype = 0; dtype < METIS_DTYPES; dtype++) {
      for (size_t count = 0; count < LENGTHS; count++) {
        for (size_t offset = 0; offset < 8; offset += offset ? 2 : 1) {
          fold_at(kernel_sets[s], dtype, count, offset);
          round_at(kernel_sets[s], dtype, count, offset);
          scan_at(kernel_sets[s], dtype, count, offset);
        }
      }
      scan_at(kernel_sets[s], dtype, 1100, 1); /* more than the block that is asked at once */
    }
  }
}

/* ---- the portable one against arithmetic ----------------------------------------------------- */

static double value_of(uint16_t half, int fraction_bits) {
  const int bias = (1 << (14 - fraction_bits)) - 1;
  const int exponent = (half & 0x7FFF) >> fraction_bits;
  const int fraction = half & ((1 << fraction_bits) - 1);
  const int significand = fraction + (exponent ? 1 << fraction_bits : 0);
  const double magnitude = ldexp(significand, (exponent ? exponent : 1) - bias - fraction_bits);
  return half >> 15 ? -magnitude : magnitude;
}

static uint16_t round_one(const metis_kernels *set, metis_dtype dtype, double value) {
  const double sums[4] = {value, value, value, value}; /* enough for a vector kernel */
  uint16_t out[4];
  metis_round_of(set, dtype)((uint8_t *)out, sums, 4, 1.0);
  CHECK(out[0] == out[3], "%s: one value, two results", set->name);
  return out[0];
}

/* Each value, and the tie between it and the next with its two neighbours among the doubles. */
static void all_16_bit_floats(const metis_kernels *set, metis_dtype dtype, int fraction_bits) {
  const uint16_t infinity = (uint16_t)(0x7FFF >> fraction_bits << fraction_bits);
  const double one = 1.0;
  for (unsigned sign = 0; sign < 0x10000; sign += 0x8000) {
    for (unsigned bits = sign; bits < (sign | infinity); bits++) {
      const uint16_t half = (uint16_t)bits;
      const double value = value_of(half, fraction_bits);
      double sum = 0.0;
      const uint8_t *const update = (const uint8_t *)&half;
      metis_fold_of(set, dtype)(&sum, &update, &one, 1, 0, 1);
      CHECK(sum == value, "%s, dtype %d: %#x is %a, not %a", set->name, (int)dtype, bits, value,
            sum);
      const uint16_t even = half & 1 ? half + 1 : half;
      const double tie = (value + value_of(half + 1, fraction_bits)) / 2;
      const double below = nextafter(tie, 0.0);
      const double above = nextafter(tie, 2 * tie);
      CHECK(round_one(set, dtype, value) == half, "%s, dtype %d, %a", set->name, (int)dtype, value);
      CHECK(round_one(set, dtype, tie) == even, "%s, dtype %d, %a", set->name, (int)dtype, tie);
      CHECK(round_one(set, dtype, below) == half, "%s, dtype %d, %a", set->name, (int)dtype, below);
      CHECK(round_one(set, dtype, above) == half + 1, "%s, dtype %d, %a", set->name, (int)dtype,
            above);
    }
  }
  CHECK(round_one(set, dtype, INFINITY) == infinity, "infinity");
  CHECK(round_one(set, dtype, -1e300) == (infinity | 0x8000), "beyond the largest");
  CHECK(round_one(set, dtype, -NAN) == (infinity | 1 << (fraction_bits - 1)), "NaN");
}

static void sixteen_bit_floats_are_exact(void) {
  for (size_t s = 0; s < kernel_sets_count; s++) {
    all_16_bit_floats(kernel_sets[s], METIS_FLOAT16, 10);
    all_16_bit_floats(kernel_sets[s], METIS_BFLOAT16, 7);
  }
}

/* One row: a quotient and what each integer dtype makes of it. */
static void integers_round_and_clamp(void) {
  static const struct {
    double quotient;
    int8_t int8;
    uint8_t uint8;
    int32_t int32;
    int64_t int64;
    uint64_t uint64;
    uint8_t boolean;
  } rows[] = {
      {0.5, 0, 0, 0, 0, 0, 1},
      {0.49999999999999994, 0, 0, 0, 0, 0, 0},
      {1.5, 2, 2, 2, 2, 2, 1},
      {2.5, 2, 2, 2, 2, 2, 1},
      {-2.5, -2, 0, -2, -2, 0, 0},
      {300.0, INT8_MAX, UINT8_MAX, 300, 300, 300, 1},
      {0x1p63, INT8_MAX, UINT8_MAX, INT32_MAX, INT64_MAX, (uint64_t)1 << 63, 1},
      {0x1p64, INT8_MAX, UINT8_MAX, INT32_MAX, INT64_MAX, UINT64_MAX, 1},
      {-0x1p63, INT8_MIN, 0, INT32_MIN, INT64_MIN, 0, 0},
      {INFINITY, INT8_MAX, UINT8_MAX, INT32_MAX, INT64_MAX, UINT64_MAX, 1},
      {-INFINITY, INT8_MIN, 0, INT32_MIN, INT64_MIN, 0, 0},
      {NAN, 0, 0, 0, 0, 0, 0},
  };
#define AGREES(dtype, field)                                                                       \
  do {                                                                                             \
    uint8_t out[sizeof rows[r].field];                                                             \
    metis_round_of(kernel_sets[s], dtype)(out, &rows[r].quotient, 1, 1.0);                         \
    CHECK(memcmp(out, &rows[r].field, sizeof out) == 0, "%s, %a", kernel_sets[s]->name,            \
          rows[r].quotient);                                                                       \
  } while (0)
  for (size_t s = 0; s < kernel_sets_count; s++) {
    for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
      AGREES(METIS_INT8, int8);
      AGREES(METIS_UINT8, uint8);
      AGREES(METIS_INT32, int32);
      AGREES(METIS_INT64, int64);
      AGREES(METIS_UINT64, uint64);
      AGREES(METIS_BOOL, boolean);
    }
  }
}

static void floats_keep_one_nan(void) {
  const double sum = -NAN;
  for (size_t s = 0; s < kernel_sets_count; s++) {
    float single;
    double whole;
    metis_round_of(kernel_sets[s], METIS_FLOAT32)((uint8_t *)&single, &sum, 1, 1.0);
    metis_round_of(kernel_sets[s], METIS_FLOAT64)((uint8_t *)&whole, &sum, 1, 1.0);
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    CHECK(bits == 0x7FC00000, "%s, float32: %#x", kernel_sets[s]->name, bits);
    CHECK(bits_of(whole) == 0x7FF8000000000000, "%s, float64: %a", kernel_sets[s]->name, whole);
  }
}

static void crc32c_is_the_standard_one(void) {
  uint8_t data[32];
  for (size_t s = 0; s < kernel_sets_count; s++) {
    metis_crc32c_fn *const crc32c = kernel_sets[s]->crc32c;
    CHECK(crc32c(0, (const uint8_t *)"123456789", 9) == 0xE3069283, "%s", kernel_sets[s]->name);
    memset(data, 0, sizeof data); /* from RFC 3720, B.4 */
    CHECK(crc32c(0, data, sizeof data) == 0x8A9136AA, "%s, zeros", kernel_sets[s]->name);
    memset(data, 0xFF, sizeof data);
    CHECK(crc32c(0, data, sizeof data) == 0x62A8AB43, "%s, ones", kernel_sets[s]->name);
    for (size_t bytes = 0; bytes < 7000; bytes += bytes < 200 || bytes % 3072 > 2900 ? 1 : 67) {
      uint8_t *memory = allocate(bytes + 3);
      fill(memory, bytes + 3);
      uint32_t want = ~UINT32_C(0x1234);
      for (size_t i = 0; i < bytes; i++) {
        want ^= memory[3 + i];
        for (int bit = 0; bit < 8; bit++) {
          want = want >> 1 ^ (want & 1 ? 0x82F63B78 : 0);
        }
      }
      CHECK(crc32c(0x1234, memory + 3, bytes) == ~want, "%s, %zu bytes", kernel_sets[s]->name,
            bytes);
      const size_t cut = bytes / 3;
      CHECK(crc32c(crc32c(0x1234, memory + 3, cut), memory + 3 + cut, bytes - cut) == ~want,
            "%s, %zu bytes cut at %zu", kernel_sets[s]->name, bytes, cut);
      free(memory);
    }
  }
}

int main(void) {
  kernel_sets[kernel_sets_count++] = &metis_portable;
#if defined(METIS_HAVE_AVX2)
  if (metis_cpu_has_avx2()) {
    kernel_sets[kernel_sets_count++] = &metis_avx2;
  }
#endif
  kernels_equal_the_portable_one();
  sixteen_bit_floats_are_exact();
  integers_round_and_clamp();
  floats_keep_one_nan();
  crc32c_is_the_standard_one();
  printf("%zu kernel sets\n", kernel_sets_count);
  return 0;
}
