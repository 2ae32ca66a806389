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
  METIS_ERR_BLOCK = 3,    /* the sender's fault: see metis_block_fault */
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

/* ==== Encrypted blocks ==========================================================================
 *
 * The payload of an encrypted model is a row of blocks. A block holds ciphertexts under one CKKS
 * key with one modulus q; a ciphertext is two polynomials, c0 and c1, of N values modulo q, the
 * limbs. Sums and products with whole weights are taken limb by limb, so this library adds what it
 * cannot read. It never holds a key that decrypts.
 *
 * Block, version 1; all numbers little-endian:
 *   offset bytes
 *    0      4   "MFCB"
 *    4      1   version, 1
 *    5      1   k, bits of a limb: 32, 44, 48 or 52
 *    6      1   log2 of N: 10 to 16
 *    7      1   polynomials: 1 (c0; c1 is rebuilt from the seeds) or 2 (c0 and c1)
 *    8     16   fingerprint of the key
 *   24     16   digest of the exponents
 *   40      4   index of the block
 *   44      4   count of blocks, above the index
 *   48      2   ciphertexts: 1 to 1024
 *   50      2   seeds: 1 to 1024 with one polynomial, 0 with two
 *   52      4   bytes of the payload, which is all that follows the header
 *   56      4   CRC-32C of the payload
 *   60      4   CRC-32C of the 60 bytes before
 *   64          payload: the seeds, each 16 bytes and a u32 weight of 1 or more, no seed twice;
 *               then c0 of each ciphertext; then, with two polynomials, c1 of each
 * A polynomial is N limbs of k bits, the first one lowest, without gaps: N * k / 8 bytes. Any k
 * bits are a limb; it stands for its residue modulo q.
 *
 * From seeds to c1: with one polynomial, c1 of ciphertext j of a block (from 0) is the sum over its
 * seeds of weight * expand(seed, j), modulo q. expand(seed, j) is read from a stream of bytes,
 * AES-128 in counter mode: block b of the stream, from 0 on, is AES with the seed as key of the 16
 * bytes b (u64) and j (u64). The stream is cut into words of 4 bytes (k = 32) or 8 bytes (else); of
 * each word the lower k bits are taken, and skipped if they are not below q; the first N that
 * remain are the limbs, in the order in which OpenFHE keeps a polynomial in EVALUATION format.
 *
 * Test vectors, made with openssl, for the seed 00 01 02 ... 0f:
 *   the stream of j = 0 begins c6a13b37878f5b826f4f8162a1c8d879 e37cd363dd7c87a09aff0e3e60e09c82,
 *   that of j = 7 begins       7523183cf1a47df9b6353a3ce74a10a7 b235262a016b252094482f216c8f2710;
 *   so, with N = 2048, the first three limbs and the last are
 *     k = 32, q = 2^32 - 12287, j = 0:  373ba1c6 825b8f87 62814f6f ... 39dd5159
 *     k = 44, q = 2^44 - 16383, j = 0:  f87373ba1c6 8a162814f6f cdd63d37ce3 ... bf0c4b81924
 *     k = 48, q = 2^48 - 16383, j = 0:  8f87373ba1c6 c8a162814f6f 7cdd63d37ce3 ... 6bf0c4b81924
 *     k = 52, q = 2^52 - 16383, j = 0:  b8f87373ba1c6 8c8a162814f6f 77cdd63d37ce3 ... 96bf0c4b81924
 *     k = 32, q = 2^31 + 11, j = 7:     3c182375 3c3a35b6 2a2635b2 ... 26792741
 *       (here 2008 of 4056 words are skipped)
 *     k = 52, q = 2^51 + 21, j = 7:     4ae73c3a35b6 56b012a2635b2 78f6c212f4894 ... 42de7f528fa1f
 * A seed is public once it is sent. Drawn twice under one key, it gives two updates away.
 *
 * Checks of a foreign block, in this order: that there is a header, magic, version, the header's
 * checksum, its fields against what the caller expects, the length; the payload's checksum; seeds.
 * The first that fails is reported. Nothing behind a header is read before all headers of a call
 * are good.
 */
#define METIS_BLOCK_HEADER_BYTES 64
#define METIS_SEED_BYTES 16
#define METIS_BLOCK_SEEDS_MAX 1024
#define METIS_BLOCK_CIPHERTEXTS_MAX 1024

/* What a block was refused for. */
typedef enum {
  METIS_BLOCK_MAGIC = 1,
  METIS_BLOCK_VERSION = 2,
  METIS_BLOCK_FINGERPRINT = 3, /* sealed under another key */
  METIS_BLOCK_LIMB_BITS = 4,
  METIS_BLOCK_RING = 5,
  METIS_BLOCK_POLYNOMIALS = 6,
  METIS_BLOCK_EXPONENTS = 7, /* scaled in another way: its sum would have no meaning */
  METIS_BLOCK_INDEX = 8,
  METIS_BLOCK_COUNT = 9,
  METIS_BLOCK_LENGTH = 10, /* cut, too long, or with another number of ciphertexts */
  METIS_BLOCK_SEEDS = 11,  /* their number, or more of them than a block can carry */
  METIS_BLOCK_CHECKSUM = 12,
  METIS_BLOCK_DUPLICATE = 13, /* a seed, or a whole block, for the second time */
  METIS_BLOCK_WEIGHT = 14,    /* of a seed: 0, or above 2^32 - 1 once weighted */
} metis_block_fault;

/* What the calling thread's last METIS_ERR_BLOCK was about. *block, unless NULL, becomes the
 * position of the block among those that the call was given. */
metis_block_fault metis_block_fault_last(size_t *block);

/* The kind of ciphertext. The modulus is odd and has exactly limb_bits bits. */
typedef struct {
  uint8_t fingerprint[16];
  uint64_t modulus;
  uint32_t limb_bits;      /* 32, 44, 48 or 52 */
  uint32_t ring_dimension; /* N: a power of two, 2^10 to 2^16 */
} metis_ckks_context;

/* Which block of a model. */
typedef struct {
  uint8_t exponents_digest[16];
  uint32_t index;       /* below count */
  uint32_t count;       /* of blocks */
  uint32_t ciphertexts; /* in this block: 1 to METIS_BLOCK_CIPHERTEXTS_MAX */
  uint32_t polynomials; /* 1 or 2 */
} metis_ckks_range;

/* The length of a block; seeds as in the header. */
metis_status metis_ckks_block_bytes(const metis_ckks_context *context, uint32_t ciphertexts,
                                    uint32_t polynomials, uint32_t seeds, size_t *bytes);

/* ---- the fold: a weighted sum of blocks ------------------------------------------------------
 *
 * begin a range, absorb the same block of each update, finalise the sum into a block. Ownership,
 * threads and errors are as above. The limbs of the result do not depend on the
 * order of the blocks nor on how the calls are cut; they are exact whatever the weights add up to.
 * With one polynomial the result carries all seeds, in the order absorbed, each with its weight
 * times that of its block; then all blocks must have one polynomial. With two polynomials the
 * seeds are expanded and summed here, and blocks of both kinds mix. What was folded can be folded
 * again.
 */
typedef struct metis_ckks_fold metis_ckks_fold;

/* The context is copied; *out is written on success only. */
metis_status metis_ckks_fold_create(const metis_ckks_context *context, metis_ckks_fold **out);
void metis_ckks_fold_destroy(metis_ckks_fold *self); /* NULL is allowed */

/* Takes 8 bytes for each limb of the result and forgets what was absorbed before. When it fails
 * the fold has no range. */
metis_status metis_ckks_fold_begin(metis_ckks_fold *self, const metis_ckks_range *range);

/* Adds weight * block, weight >= 1. A block is taken once in a range: with one polynomial its seeds
 * say whether it is the same, with two its checksum and first 16 bytes of limbs. */
metis_status metis_ckks_fold_absorb(metis_ckks_fold *self, const void *block, size_t bytes,
                                    uint32_t weight);

/* Adds all of them or, when one is refused, none: the same limbs as one after another, in less
 * time. blocks[i] has bytes[i] bytes and goes in weights[i] times. */
metis_status metis_ckks_fold_absorb_many(metis_ckks_fold *self, const void *const *blocks,
                                         const size_t *bytes, const uint32_t *weights,
                                         size_t count);

/* Undoes an absorb of the same block with the same weight: afterwards it was never there. */
metis_status metis_ckks_fold_retract(metis_ckks_fold *self, const void *block, size_t bytes,
                                     uint32_t weight);

/* The length of the block that finalise writes now: it grows with the seeds. */
metis_status metis_ckks_fold_bytes(const metis_ckks_fold *self, size_t *bytes);

/* Writes the sum as a block, each limb below q. The sums stay, so that more can be absorbed. At
 * least one block has been absorbed. */
metis_status metis_ckks_fold_finalise(metis_ckks_fold *self, void *out, size_t out_bytes);

/* ---- at the sites ----------------------------------------------------------------------------
 *
 * Arrays of limbs are uint64_t, ciphertext by ciphertext, N limbs each, all below q; any alignment.
 */

/* Writes a block of range->ciphertexts. With one polynomial: c0 and the seed that c1 is expanded
 * from, c1 NULL. With two: c0 and c1, seed NULL. `limbs` is the length of c0. */
metis_status metis_ckks_seal_block(const metis_ckks_context *context, const metis_ckks_range *range,
                                   const uint64_t *c0, const uint64_t *c1, size_t limbs,
                                   const uint8_t *seed, void *out, size_t out_bytes);

/* Checks a block and writes its c0 and c1, rebuilt from the seeds or unpacked, below q. Here
 * range->polynomials may be 0: either kind is welcome. `limbs` is the room in each of c0, c1. */
metis_status metis_ckks_open_block(const metis_ckks_context *context, const metis_ckks_range *range,
                                   const void *block, size_t bytes, uint64_t *c0, uint64_t *c1,
                                   size_t limbs);

/* Writes expand(seed, ciphertext): N limbs. */
metis_status metis_ckks_expand(const metis_ckks_context *context, const uint8_t *seed,
                               uint64_t ciphertext, uint64_t *out, size_t limbs);

/* Replaces the uniform half of encryptions under a secret key: for each row j of N limbs,
 * c0 += (c1 - expand(seed, first_ciphertext + j)) * secret. `limbs` is the length of c0 and of c1;
 * the secret has N limbs, in EVALUATION format as all. */
metis_status metis_ckks_reseed(const metis_ckks_context *context, uint64_t *c0, const uint64_t *c1,
                               size_t limbs, const uint64_t *secret, const uint8_t *seed,
                               uint64_t first_ciphertext);

/* "avx2" or "portable": picked once; METIS_KERNEL=portable in the environment forces the latter. */
const char *metis_kernel(void);

/* Why the calling thread's last failed call failed: one line, valid until its next one. */
const char *metis_error_text(void);

#endif
