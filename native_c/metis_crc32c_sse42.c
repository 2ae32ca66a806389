/* CRC-32C by the processor's own instruction.
 *
 * The instruction takes three cycles but one can start each cycle, so a block is cut into three
 * lanes that run side by side: three times the speed of one. Moving a lane's remainder over the
 * lanes behind it is a multiplication by a power of x: a carry-less product, reduced by the same
 * instruction.
 */
#include "metis_impl.h"

#include <nmmintrin.h>
#include <string.h>
#include <wmmintrin.h>

enum { LANE_BYTES = 1024 };

/* x to the power 8 * LANE_BYTES - 33, and 16 * LANE_BYTES - 33, modulo the polynomial, bits
 * reversed. The 33: reducing 64 bits multiplies by x^32, reversing a product by x. */
static const uint32_t over_one_lane = 0x170076FA;
static const uint32_t over_two_lanes = 0xA51B6135;

static uint64_t load(const uint8_t *data) {
  uint64_t word;
  memcpy(&word, data, sizeof word);
  return word;
}

/* An address past the end is never read through. */
static void prefetch(const uint8_t *at) { _mm_prefetch((const char *)at, _MM_HINT_T0); }

static uint64_t product(uint64_t crc, uint64_t power) {
  const __m128i both = _mm_clmulepi64_si128(_mm_cvtsi64_si128((long long)crc),
                                            _mm_cvtsi64_si128((long long)power), 0);
  return (uint64_t)_mm_cvtsi128_si64(both);
}

static uint64_t reduced_product(uint64_t crc, uint64_t power) {
  return _mm_crc32_u64(0, product(crc, power));
}

uint64_t metis_crc32c_join_sse42(const uint64_t remainders[3], size_t bytes) {
  uint64_t power = 0xA9CDDA0D;  /* x^-33 */
  uint64_t square = 0xBF818109; /* x^(8 - 33) */
  for (; bytes != 0; bytes >>= 1) {
    if (bytes % 2 != 0) {
      power = reduced_product(power, square);
    }
    square = reduced_product(square, square);
  }
  const uint64_t two = reduced_product(remainders[0], power) ^ remainders[1];
  return reduced_product(two, power) ^ remainders[2];
}

uint32_t metis_crc32c_sse42(uint32_t start, const uint8_t *data, size_t bytes) {
  uint64_t crc = (uint32_t)~start;
  for (; bytes >= 3 * LANE_BYTES; bytes -= 3 * LANE_BYTES, data += 3 * LANE_BYTES) {
    uint64_t second = 0;
    uint64_t third = 0;
    for (size_t i = 0; i < LANE_BYTES; i += 8) {
      if (i % 64 == 0) { /* the processor's own prefetcher gets lost among the lanes */
        prefetch(data + 3 * LANE_BYTES + i);
        prefetch(data + 4 * LANE_BYTES + i);
        prefetch(data + 5 * LANE_BYTES + i);
      }
      crc = _mm_crc32_u64(crc, load(data + i));
      second = _mm_crc32_u64(second, load(data + LANE_BYTES + i));
      third = _mm_crc32_u64(third, load(data + 2 * LANE_BYTES + i));
    }
    crc = _mm_crc32_u64(0, product(crc, over_two_lanes) ^ product(second, over_one_lane)) ^ third;
  }
  for (; bytes >= 8; bytes -= 8, data += 8) {
    crc = _mm_crc32_u64(crc, load(data));
  }
  for (; bytes > 0; bytes--, data++) {
    crc = _mm_crc32_u8((uint32_t)crc, *data);
  }
  return ~(uint32_t)crc;
}
