/* The specification: plain C that every other kernel must equal, bit for bit.
 *
 * Law: one value at a time, each operation rounded by itself (the build sets -ffp-contract=off).
 * Values are read and written through memcpy, since they may lie at any address.
 */
#include "metis_impl.h"

#include <math.h>
#include <string.h>

/* ---- value to double ------------------------------------------------------------------------ */

static double from_float16(uint16_t half) {
  const unsigned exponent = half >> 10 & 31;
  const unsigned fraction = half & 0x3FF;
  double magnitude;
  if (exponent == 31) {
    magnitude = fraction ? (double)NAN : (double)INFINITY;
  } else if (exponent == 0) {
    magnitude = fraction * 0x1p-24;
  } else {
    const uint64_t bits = (uint64_t)(exponent - 15 + 1023) << 52 | (uint64_t)fraction << 42;
    memcpy(&magnitude, &bits, sizeof magnitude);
  }
  return half >> 15 ? -magnitude : magnitude;
}

static double from_bfloat16(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static double from_bool(uint8_t byte) { return byte != 0; }

#define FOLD(name, type, from)                                                                     \
  static void fold_##name(double *restrict sums, const uint8_t *const *values,                     \
                          const double *weights, size_t updates, size_t start, size_t end) {       \
    for (size_t k = 0; k < updates; k++) {                                                         \
      const uint8_t *restrict update = values[k];                                                  \
      const double weight = weights[k];                                                            \
      for (size_t i = start; i < end; i++) {                                                       \
        type value;                                                                                \
        memcpy(&value, update + i * sizeof value, sizeof value);                                   \
        sums[i] += from(value) * weight;                                                           \
      }                                                                                            \
    }                                                                                              \
  }

FOLD(float16, uint16_t, from_float16)
FOLD(bfloat16, uint16_t, from_bfloat16)
FOLD(float32, float, (double))
FOLD(float64, double, (double))
FOLD(int8, int8_t, (double))
FOLD(int16, int16_t, (double))
FOLD(int32, int32_t, (double))
FOLD(int64, int64_t, (double))
FOLD(uint8, uint8_t, (double))
FOLD(uint16, uint16_t, (double))
FOLD(uint32, uint32_t, (double))
FOLD(uint64, uint64_t, (double))
FOLD(bool, uint8_t, from_bool)

/* ---- double to value ------------------------------------------------------------------------ */

/* The nearest value, ties to even, of a 16-bit format with this many fraction bits. It rounds
 * once: going through float32 would round twice, and wrongly so near a tie. */
static uint16_t to_16_bits(double value, int fraction_bits) {
  const int bias = (1 << (14 - fraction_bits)) - 1;
  const uint16_t infinity = (uint16_t)(0x7FFF >> fraction_bits << fraction_bits);
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = (uint16_t)(bits >> 63 << 15);
  int exponent = (int)(bits >> 52 & 0x7FF) - 1023 + bias;
  const uint64_t significand = (bits & 0xFFFFFFFFFFFFF) | (uint64_t)1 << 52;
  int dropped = 52 - fraction_bits;
  if (isnan(value)) {
    return (uint16_t)(infinity | 1 << (fraction_bits - 1));
  }
  if (exponent > 2 * bias) {
    return sign | infinity;
  }
  if (exponent < 1) { /* a subnormal: the exponent stands still and more of the fraction goes */
    dropped += 1 - exponent;
    exponent = 1;
  }
  if (dropped > 53) { /* below half of the smallest; so is each subnormal double */
    return sign;
  }
  const uint64_t rest = significand & (((uint64_t)1 << dropped) - 1);
  const uint64_t half = (uint64_t)1 << (dropped - 1);
  uint64_t kept = significand >> dropped;
  kept += rest > half || (rest == half && (kept & 1));
  /* The leading bit of `kept` counts into the exponent; so does a carry, up to infinity. */
  return (uint16_t)(sign | (((uint64_t)(exponent - 1) << fraction_bits) + kept));
}

static uint16_t to_float16(double value) { return to_16_bits(value, 10); }

static uint16_t to_bfloat16(double value) { return to_16_bits(value, 7); }

static float to_float32(double value) {
  const float nearest = (float)value; /* before the question, so that it can be a vector */
  return isnan(value) ? NAN : nearest;
}

static double to_float64(double value) { return isnan(value) ? (double)NAN : value; }

static uint8_t to_bool(double value) { return value >= 0.5; }

/* (double)highest may be one above the highest, as with int64; then nothing lies between. */
#define TO_INTEGER(name, type, lowest, highest)                                                    \
  static type to_##name(double value) {                                                            \
    if (isnan(value)) {                                                                            \
      return 0;                                                                                    \
    }                                                                                              \
    const double nearest = nearbyint(value);                                                       \
    if (nearest <= (double)(lowest)) {                                                             \
      return lowest;                                                                               \
    }                                                                                              \
    return (type)(nearest >= (double)(highest) ? (highest) : (type)nearest);                       \
  }

TO_INTEGER(int8, int8_t, INT8_MIN, INT8_MAX)
TO_INTEGER(int16, int16_t, INT16_MIN, INT16_MAX)
TO_INTEGER(int32, int32_t, INT32_MIN, INT32_MAX)
TO_INTEGER(int64, int64_t, INT64_MIN, INT64_MAX)
TO_INTEGER(uint8, uint8_t, 0, UINT8_MAX)
TO_INTEGER(uint16, uint16_t, 0, UINT16_MAX)
TO_INTEGER(uint32, uint32_t, 0, UINT32_MAX)
TO_INTEGER(uint64, uint64_t, 0, UINT64_MAX)

#define ROUND(name, type)                                                                          \
  static void round_##name(uint8_t *restrict out, const double *restrict sums, size_t count,       \
                           double divisor) {                                                       \
    for (size_t i = 0; i < count; i++) {                                                           \
      const type value = to_##name(sums[i] / divisor);                                             \
      memcpy(out + i * sizeof value, &value, sizeof value);                                        \
    }                                                                                              \
  }

ROUND(float16, uint16_t)
ROUND(bfloat16, uint16_t)
ROUND(float32, float)
ROUND(float64, double)
ROUND(int8, int8_t)
ROUND(int16, int16_t)
ROUND(int32, int32_t)
ROUND(int64, int64_t)
ROUND(uint8, uint8_t)
ROUND(uint16, uint16_t)
ROUND(uint32, uint32_t)
ROUND(uint64, uint64_t)
ROUND(bool, uint8_t)

/* ---- NaN and infinity ------------------------------------------------------------------------ */

/* A block is first asked "any?" without a branch, which compilers turn into vector code; only a
 * block that says yes is searched. */
#define SCAN(name, type, exponent)                                                                 \
  static size_t scan_##name(const uint8_t *values, size_t count) {                                 \
    enum { BLOCK = 512 };                                                                          \
    for (size_t start = 0; start < count; start += BLOCK) {                                        \
      const size_t end = count - start < BLOCK ? count : start + BLOCK;                            \
      type any = 0;                                                                                \
      for (size_t i = start; i < end; i++) {                                                       \
        type bits;                                                                                 \
        memcpy(&bits, values + i * sizeof bits, sizeof bits);                                      \
        any |= (bits & (exponent)) == (exponent);                                                  \
      }                                                                                            \
      for (size_t i = start; any && i < end; i++) {                                                \
        type bits;                                                                                 \
        memcpy(&bits, values + i * sizeof bits, sizeof bits);                                      \
        if ((bits & (exponent)) == (exponent)) {                                                   \
          return i;                                                                                \
        }                                                                                          \
      }                                                                                            \
    }                                                                                              \
    return count;                                                                                  \
  }

SCAN(float16, uint16_t, 0x7C00)
SCAN(bfloat16, uint16_t, 0x7F80)
SCAN(float32, uint32_t, UINT32_C(0x7F800000))
SCAN(float64, uint64_t, UINT64_C(0x7FF0000000000000))

static size_t scan_nothing(const uint8_t *values, size_t count) {
  (void)values;
  return count;
}

/* ---- the table ------------------------------------------------------------------------------- */

const metis_kernels metis_portable = {
    .name = "portable",
    .fold = {[METIS_FLOAT16] = fold_float16,
             [METIS_BFLOAT16] = fold_bfloat16,
             [METIS_FLOAT32] = fold_float32,
             [METIS_FLOAT64] = fold_float64,
             [METIS_INT8] = fold_int8,
             [METIS_INT16] = fold_int16,
             [METIS_INT32] = fold_int32,
             [METIS_INT64] = fold_int64,
             [METIS_UINT8] = fold_uint8,
             [METIS_UINT16] = fold_uint16,
             [METIS_UINT32] = fold_uint32,
             [METIS_UINT64] = fold_uint64,
             [METIS_BOOL] = fold_bool},
    .round = {[METIS_FLOAT16] = round_float16,
              [METIS_BFLOAT16] = round_bfloat16,
              [METIS_FLOAT32] = round_float32,
              [METIS_FLOAT64] = round_float64,
              [METIS_INT8] = round_int8,
              [METIS_INT16] = round_int16,
              [METIS_INT32] = round_int32,
              [METIS_INT64] = round_int64,
              [METIS_UINT8] = round_uint8,
              [METIS_UINT16] = round_uint16,
              [METIS_UINT32] = round_uint32,
              [METIS_UINT64] = round_uint64,
              [METIS_BOOL] = round_bool},
    .scan = {[METIS_FLOAT16] = scan_float16,
             [METIS_BFLOAT16] = scan_bfloat16,
             [METIS_FLOAT32] = scan_float32,
             [METIS_FLOAT64] = scan_float64,
             [METIS_INT8] = scan_nothing,
             [METIS_INT16] = scan_nothing,
             [METIS_INT32] = scan_nothing,
             [METIS_INT64] = scan_nothing,
             [METIS_UINT8] = scan_nothing,
             [METIS_UINT16] = scan_nothing,
             [METIS_UINT32] = scan_nothing,
             [METIS_UINT64] = scan_nothing,
             [METIS_BOOL] = scan_nothing},
    .crc32c = metis_crc32c_portable,
    .add_packed = metis_add_packed_portable,
    .unpack = metis_unpack_portable,
    .pack = metis_pack_portable,
    .keystream = metis_keystream_portable,
};
