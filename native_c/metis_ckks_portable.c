/* Packed limbs, the specification: plain C that every other kernel must equal, bit for bit.
 *
 * Two limbs of k bits are k / 4 whole bytes, at least 8. So the lower one is the lower k bits of
 * the first 8 bytes, the upper one the upper k bits of the last 8, and nothing is read or written
 * outside of them.
 */
#include "metis_ckks_impl.h"

#include <string.h>

static inline size_t pair_bytes(unsigned bits) { return bits / 4; }

static inline uint64_t lower_limb(const uint8_t *pair, unsigned bits) {
  return metis_load_u64(pair) & (((uint64_t)1 << bits) - 1);
}

static inline uint64_t upper_limb(const uint8_t *pair, unsigned bits) {
  return metis_load_u64(pair + pair_bytes(bits) - 8) >> (64 - bits);
}

static void add_block(uint64_t *restrict sums, const uint8_t *pair, uint64_t weight, size_t limbs,
                      unsigned bits) {
  for (size_t i = 0; i < limbs; i += 2, pair += pair_bytes(bits)) {
    sums[i] += lower_limb(pair, bits) * weight;
    sums[i + 1] += upper_limb(pair, bits) * weight;
  }
}

void metis_add_packed_portable(uint64_t *restrict sums, bool fresh, const uint8_t *const *packed,
                               const uint32_t *weights, uint32_t *restrict crcs, size_t blocks,
                               size_t limbs, unsigned bits) {
  enum { TILE_LIMBS = 1024 }; /* sums and blocks stay in the first cache meanwhile */
  for (size_t start = 0; start < limbs; start += TILE_LIMBS) {
    const size_t count = limbs - start < TILE_LIMBS ? limbs - start : TILE_LIMBS;
    if (fresh) {
      memset(sums + start, 0, count * sizeof sums[0]);
    }
    for (size_t b = 0; b < blocks; b++) {
      const uint8_t *const tile = packed[b] + start / 2 * pair_bytes(bits);
      crcs[b] = metis_crc32c_portable(crcs[b], tile, count / 2 * pair_bytes(bits));
      add_block(sums + start, tile, weights[b], count, bits);
    }
  }
}

void metis_unpack_portable(uint64_t *restrict out, const uint8_t *packed, size_t count,
                           unsigned bits) {
  for (size_t i = 0; i < count; i += 2, packed += pair_bytes(bits)) {
    out[i] = lower_limb(packed, bits);
    out[i + 1] = upper_limb(packed, bits);
  }
}

void metis_pack_portable(uint8_t *restrict packed, const uint64_t *limbs, size_t count,
                         unsigned bits) {
  for (size_t i = 0; i < count; i += 2, packed += pair_bytes(bits)) {
    /* The two stores overlap, and agree where they do. */
    metis_store_u64(packed, limbs[i] | limbs[i + 1] << bits);
    metis_store_u64(packed + pair_bytes(bits) - 8,
                    limbs[i] >> (2 * bits - 64) | limbs[i + 1] << (64 - bits));
  }
}
