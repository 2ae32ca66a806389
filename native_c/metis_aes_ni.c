/* AES-128 in counter mode by the processor's own instruction.
 *
 * A round takes a few cycles but one or two can start in each, so eight blocks go side by side.
 */
#include "metis_impl.h"

#include <emmintrin.h>
#include <wmmintrin.h>

enum { ROUNDS = 10, SIDE_BY_SIDE = 8 };

static inline __m128i load(const uint8_t *at) {
  return _mm_loadu_si128((const __m128i *)(const void *)at);
}

static inline __attribute__((always_inline)) void encrypt(const __m128i keys[ROUNDS + 1],
                                                          __m128i *blocks, size_t count) {
  for (size_t b = 0; b < count; b++) {
    blocks[b] = _mm_xor_si128(blocks[b], keys[0]);
  }
  METIS_UNROLL
  for (size_t round = 1; round < ROUNDS; round++) {
    METIS_UNROLL
    for (size_t b = 0; b < count; b++) {
      blocks[b] = _mm_aesenc_si128(blocks[b], keys[round]);
    }
  }
  for (size_t b = 0; b < count; b++) {
    blocks[b] = _mm_aesenclast_si128(blocks[b], keys[ROUNDS]);
  }
}

static inline void counters(__m128i *blocks, size_t count, uint64_t nonce, uint64_t first) {
  for (size_t b = 0; b < count; b++) {
    blocks[b] = _mm_set_epi64x((long long)nonce, (long long)(first + b));
  }
}

static inline void store(uint8_t *out, const __m128i *blocks, size_t count) {
  for (size_t b = 0; b < count; b++) {
    _mm_storeu_si128((__m128i *)(void *)(out + 16 * b), blocks[b]);
  }
}

void metis_keystream_aesni(const metis_round_keys *keys, uint64_t nonce, uint64_t first,
                           uint8_t *restrict out, size_t blocks) {
  __m128i round_keys[ROUNDS + 1];
  __m128i side_by_side[SIDE_BY_SIDE];
  for (size_t round = 0; round <= ROUNDS; round++) {
    round_keys[round] = load(keys->bytes[round]);
  }
  size_t done = 0;
  for (; blocks - done >= SIDE_BY_SIDE; done += SIDE_BY_SIDE) {
    counters(side_by_side, SIDE_BY_SIDE, nonce, first + done);
    encrypt(round_keys, side_by_side, SIDE_BY_SIDE);
    store(out + 16 * done, side_by_side, SIDE_BY_SIDE);
  }
  for (; done < blocks; done++) {
    counters(side_by_side, 1, nonce, first + done);
    encrypt(round_keys, side_by_side, 1);
    store(out + 16 * done, side_by_side, 1);
  }
}
