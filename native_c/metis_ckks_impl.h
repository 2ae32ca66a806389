/* Private to the library and its tests: what a block says, and limbs modulo q.
 *
 * Law: residues are kept as any uint64_t that stands for them; only `reduce` makes them canonical,
 * and only what leaves the library must be.
 */
#ifndef METIS_CKKS_IMPL_H
#define METIS_CKKS_IMPL_H

#include "metis_impl.h"

#include <string.h>

#if !defined(__SIZEOF_INT128__)
#error "products of limbs need a 128-bit integer"
#endif
__extension__ typedef unsigned __int128 metis_u128;

/* Little-endian numbers at any address. */
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define METIS_LITTLE_64(value) __builtin_bswap64(value)
#define METIS_LITTLE_32(value) __builtin_bswap32(value)
#else
#define METIS_LITTLE_64(value) (value)
#define METIS_LITTLE_32(value) (value)
#endif

static inline uint64_t metis_load_u64(const uint8_t *at) {
  uint64_t value;
  memcpy(&value, at, sizeof value);
  return METIS_LITTLE_64(value);
}

static inline uint32_t metis_load_u32(const uint8_t *at) {
  uint32_t value;
  memcpy(&value, at, sizeof value);
  return METIS_LITTLE_32(value);
}

static inline void metis_store_u64(uint8_t *at, uint64_t value) {
  value = METIS_LITTLE_64(value);
  memcpy(at, &value, sizeof value);
}

static inline void metis_store_u32(uint8_t *at, uint32_t value) {
  value = METIS_LITTLE_32(value);
  memcpy(at, &value, sizeof value);
}

/* ---- metis_block.c: the bytes of a block ----------------------------------------------------- */

enum { METIS_SEED_ENTRY_BYTES = METIS_SEED_BYTES + 4 };

typedef struct {
  const uint8_t *seeds; /* entries of METIS_SEED_ENTRY_BYTES */
  uint32_t seeds_count;
  uint32_t polynomials;
  const uint8_t *c0; /* then c1, if there are two polynomials */
  const uint8_t *payload;
  size_t payload_bytes;
  uint32_t payload_crc; /* as the header says */
} metis_block_view;

/* Each refuses with METIS_ERR_ARGUMENT. */
metis_status metis_check_context(const metis_ckks_context *context);
metis_status metis_check_range(const metis_ckks_range *range, uint32_t polynomials_least);

/* A checked context and numbers within their bounds: no overflow is possible. */
size_t metis_poly_bytes(const metis_ckks_context *context);
size_t metis_block_bytes(const metis_ckks_context *context, uint32_t ciphertexts,
                         uint32_t polynomials, uint32_t seeds);

/* Everything that can be known from the header and the length; nothing behind the header is read.
 * range->polynomials == 0 allows both. `position` is for the error. */
metis_status metis_read_header(const metis_ckks_context *context, const metis_ckks_range *range,
                               const uint8_t *block, size_t bytes, size_t position,
                               metis_block_view *view);

/* Refuses when `crc`, of the payload, is not what the header says. */
metis_status metis_compare_crc(const metis_block_view *view, uint32_t crc, size_t position);
metis_status metis_check_payload(const metis_kernels *kernels, const metis_block_view *view,
                                 size_t position);

/* The payload is in place; writes the header in front of it. */
void metis_write_header(const metis_kernels *kernels, const metis_ckks_context *context,
                        const metis_ckks_range *range, uint32_t seeds, uint8_t *block);

/* ---- metis_modulus.c: arithmetic on limbs -----------------------------------------------------
 */

typedef struct {
  uint64_t q;
  unsigned bits;
  uint64_t inverse; /* floor(2^64 / q) */
  uint64_t barrett; /* floor(2^(2 * bits) / q) */
} metis_modulus;

metis_modulus metis_modulus_of(const metis_ckks_context *context);

/* sums[i] += limbs[i] * weight, modulo 2^64. */
void metis_add_limbs(uint64_t *restrict sums, const uint64_t *restrict limbs, size_t count,
                     uint32_t weight);

/* What is added here stands for weight * limb modulo q and is below METIS_REDUCED_UNITS * q,
 * whatever the weight. limbs[i] < 2^bits. */
enum { METIS_REDUCED_UNITS = 6 };
void metis_add_reduced(uint64_t *restrict sums, const uint64_t *restrict limbs, size_t count,
                       uint32_t weight, const metis_modulus *modulus);
/* And here for its negative. */
void metis_subtract_reduced(uint64_t *restrict sums, const uint64_t *restrict limbs, size_t count,
                            uint32_t weight, const metis_modulus *modulus);

/* values[i] modulo q. */
void metis_reduce(uint64_t *values, size_t count, const metis_modulus *modulus);

/* c0[i] + (c1[i] - a[i]) * s[i] modulo q; all below q. */
void metis_reseed_limbs(uint64_t *restrict c0, const uint64_t *c1, const uint64_t *a,
                        const uint64_t *s, size_t count, const metis_modulus *modulus);

/* The index of the first that is not below q, else `count`. */
size_t metis_first_not_below(const uint64_t *limbs, size_t count, uint64_t q);

/* ---- metis_seed.c: the stream from a seed to limbs --------------------------------------------
 */

typedef struct {
  const metis_kernels *kernels;
  metis_round_keys keys;
  uint64_t nonce;
  uint64_t next_block;
  uint64_t q;
  unsigned bits;
  size_t taken; /* bytes of the buffer */
  uint8_t buffer[2048];
} metis_stream;

void metis_round_keys_of(const uint8_t seed[METIS_SEED_BYTES], metis_round_keys *keys);

void metis_stream_start(metis_stream *stream, const metis_kernels *kernels,
                        const metis_modulus *modulus, const uint8_t seed[METIS_SEED_BYTES]);
void metis_stream_seek(metis_stream *stream, uint64_t ciphertext);          /* to its first limb */
void metis_stream_limbs(metis_stream *stream, uint64_t *out, size_t count); /* the next ones */

/* ---- metis_sums.c: sums that never overflow ---------------------------------------------------
 */

typedef struct {
  const metis_kernels *kernels;
  const metis_modulus *modulus;
  uint64_t *values; /* each stands for its residue */
  size_t count;     /* whole polynomials */
  size_t ring_dimension;
  uint64_t units; /* no value is above units * (2^bits - 1), and that is below 2^64. With 0 the
                   * values are zero, whatever lies there. */
} metis_sums;

void metis_sums_clear(metis_sums *sums);
void metis_sums_reduce(metis_sums *sums); /* each value below q */

/* Each of `packed` is `count` limbs, and goes in weights[b] times; crcs[b] is carried on over it.
 * At most METIS_BLOCKS_AT_ONCE blocks. */
void metis_sums_add_packed(metis_sums *sums, const uint8_t *const *packed, const uint32_t *weights,
                           uint32_t *crcs, size_t blocks);
void metis_sums_subtract_packed(metis_sums *sums, const uint8_t *packed, uint32_t weight);

/* The polynomials that the seed stands for. */
void metis_sums_add_seed(metis_sums *sums, const uint8_t *seed, uint32_t weight);
void metis_sums_subtract_seed(metis_sums *sums, const uint8_t *seed, uint32_t weight);

#endif
