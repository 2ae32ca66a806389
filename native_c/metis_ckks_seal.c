/* Blocks at the sites: sealed from limbs, opened into limbs, and the switch to a seed.
 *
 * Law: no output is written before every argument and, of a block, every byte has been checked.
 */
#include "metis_ckks_impl.h"

#include <string.h>

enum { PIECE_LIMBS = 1024 }; /* divides every ring dimension */

static metis_status check_limbs(const char *name, const uint64_t *limbs, size_t count, uint64_t q) {
  if (limbs == NULL) {
    return metis_refuse("%s is NULL", name);
  }
  const size_t bad = metis_first_not_below(limbs, count, q);
  if (bad < count) {
    return metis_refuse("limb %zu of %s is %llu, not below the modulus %llu", bad, name,
                        (unsigned long long)limbs[bad], (unsigned long long)q);
  }
  return METIS_OK;
}

static metis_status check_count(const char *name, size_t have, size_t want) {
  if (have != want) {
    return metis_refuse("%zu limbs of %s, expected: %zu", have, name, want);
  }
  return METIS_OK;
}

metis_status metis_ckks_seal_block(const metis_ckks_context *context, const metis_ckks_range *range,
                                   const uint64_t *c0, const uint64_t *c1, size_t limbs,
                                   const uint8_t *seed, void *out, size_t out_bytes) {
  metis_status status = metis_check_context(context);
  if (status == METIS_OK) {
    status = metis_check_range(range, 1);
  }
  if (status != METIS_OK) {
    return status;
  }
  const size_t count = (size_t)range->ciphertexts * context->ring_dimension;
  const uint32_t seeds = range->polynomials == 1 ? 1 : 0;
  const size_t bytes = metis_block_bytes(context, range->ciphertexts, range->polynomials, seeds);
  if ((seed == NULL) != (seeds == 0) || (c1 == NULL) != (seeds == 1)) {
    return metis_refuse("%u polynomials need %s", range->polynomials,
                        seeds == 1 ? "a seed and no c1" : "a c1 and no seed");
  }
  status = check_count("c0", limbs, count);
  if (status == METIS_OK) {
    status = check_limbs("c0", c0, count, context->modulus);
  }
  if (status == METIS_OK && c1 != NULL) {
    status = check_limbs("c1", c1, count, context->modulus);
  }
  if (status != METIS_OK) {
    return status;
  }
  if (out == NULL || out_bytes != bytes) {
    return metis_refuse("room for %zu bytes, but the block has %zu", out == NULL ? 0 : out_bytes,
                        bytes);
  }
  const metis_kernels *const kernels = metis_pick_kernels();
  uint8_t *const block = out;
  uint8_t *at = block + METIS_BLOCK_HEADER_BYTES;
  if (seed != NULL) {
    memcpy(at, seed, METIS_SEED_BYTES);
    metis_store_u32(at + METIS_SEED_BYTES, 1);
    at += METIS_SEED_ENTRY_BYTES;
  }
  kernels->pack(at, c0, count, context->limb_bits);
  if (c1 != NULL) {
    at += range->ciphertexts * metis_poly_bytes(context);
    kernels->pack(at, c1, count, context->limb_bits);
  }
  metis_write_header(kernels, context, range, seeds, block);
  return METIS_OK;
}

/* No seed twice, no weight of 0: what the fold checks of a block that it takes. */
static metis_status check_seeds(const metis_block_view *view) {
  for (size_t i = 0; i < view->seeds_count; i++) {
    const uint8_t *const entry = view->seeds + i * METIS_SEED_ENTRY_BYTES;
    if (metis_load_u32(entry + METIS_SEED_BYTES) == 0) {
      return metis_refuse_block(0, METIS_BLOCK_WEIGHT,
                                "seed %zu of a block has weight 0, allowed: 1 to 2^32 - 1", i);
    }
    for (size_t k = 0; k < i; k++) {
      if (memcmp(view->seeds + k * METIS_SEED_ENTRY_BYTES, entry, METIS_SEED_BYTES) == 0) {
        return metis_refuse_block(0, METIS_BLOCK_DUPLICATE,
                                  "a block has one seed twice: seeds %zu and %zu", k, i);
      }
    }
  }
  return METIS_OK;
}

metis_status metis_ckks_open_block(const metis_ckks_context *context, const metis_ckks_range *range,
                                   const void *block, size_t bytes, uint64_t *c0, uint64_t *c1,
                                   size_t limbs) {
  metis_status status = metis_check_context(context);
  if (status == METIS_OK) {
    status = metis_check_range(range, 0);
  }
  if (status != METIS_OK) {
    return status;
  }
  if (block == NULL || c0 == NULL || c1 == NULL) {
    return metis_refuse("%s is NULL", block == NULL ? "block" : c0 == NULL ? "c0" : "c1");
  }
  const metis_kernels *const kernels = metis_pick_kernels();
  metis_block_view view = {0};
  status = check_count("c0", limbs, (size_t)range->ciphertexts * context->ring_dimension);
  if (status == METIS_OK) {
    status = metis_read_header(context, range, block, bytes, 0, &view);
  }
  if (status == METIS_OK) {
    status = metis_check_payload(kernels, &view, 0);
  }
  if (status == METIS_OK) {
    status = check_seeds(&view);
  }
  if (status != METIS_OK) {
    return status;
  }
  const metis_modulus modulus = metis_modulus_of(context);
  kernels->unpack(c0, view.c0, limbs, modulus.bits);
  metis_reduce(c0, limbs, &modulus);
  if (view.polynomials == 2) {
    const uint8_t *const second = view.c0 + range->ciphertexts * metis_poly_bytes(context);
    kernels->unpack(c1, second, limbs, modulus.bits);
    metis_reduce(c1, limbs, &modulus);
    return METIS_OK;
  }
  metis_sums sums = {.kernels = kernels,
                     .modulus = &modulus,
                     .values = c1,
                     .count = limbs,
                     .ring_dimension = context->ring_dimension};
  for (size_t i = 0; i < view.seeds_count; i++) {
    const uint8_t *const entry = view.seeds + i * METIS_SEED_ENTRY_BYTES;
    metis_sums_add_seed(&sums, entry, metis_load_u32(entry + METIS_SEED_BYTES));
  }
  metis_sums_reduce(&sums);
  return METIS_OK;
}

metis_status metis_ckks_expand(const metis_ckks_context *context, const uint8_t *seed,
                               uint64_t ciphertext, uint64_t *out, size_t limbs) {
  metis_status status = metis_check_context(context);
  if (status == METIS_OK) {
    status = check_count("out", limbs, context->ring_dimension);
  }
  if (status != METIS_OK) {
    return status;
  }
  if (seed == NULL || out == NULL) {
    return metis_refuse("%s is NULL", seed == NULL ? "seed" : "out");
  }
  const metis_modulus modulus = metis_modulus_of(context);
  metis_stream stream;
  metis_stream_start(&stream, metis_pick_kernels(), &modulus, seed);
  metis_stream_seek(&stream, ciphertext);
  metis_stream_limbs(&stream, out, limbs);
  return METIS_OK;
}

metis_status metis_ckks_reseed(const metis_ckks_context *context, uint64_t *c0, const uint64_t *c1,
                               size_t limbs, const uint64_t *secret, const uint8_t *seed,
                               uint64_t first_ciphertext) {
  metis_status status = metis_check_context(context);
  if (status != METIS_OK) {
    return status;
  }
  const size_t ring = context->ring_dimension;
  if (limbs % ring != 0) {
    return metis_refuse("%zu limbs are not a whole number of polynomials of %zu", limbs, ring);
  }
  if (seed == NULL) {
    return metis_refuse("seed is NULL");
  }
  status = check_limbs("c0", c0, limbs, context->modulus);
  if (status == METIS_OK) {
    status = check_limbs("c1", c1, limbs, context->modulus);
  }
  if (status == METIS_OK) {
    status = check_limbs("secret", secret, ring, context->modulus);
  }
  if (status != METIS_OK) {
    return status;
  }
  const metis_modulus modulus = metis_modulus_of(context);
  metis_stream stream;
  uint64_t a[PIECE_LIMBS];
  metis_stream_start(&stream, metis_pick_kernels(), &modulus, seed);
  for (size_t at = 0; at < limbs; at += PIECE_LIMBS) {
    if (at % ring == 0) {
      metis_stream_seek(&stream, first_ciphertext + at / ring);
    }
    metis_stream_limbs(&stream, a, PIECE_LIMBS);
    metis_reseed_limbs(c0 + at, c1 + at, a, secret + at % ring, PIECE_LIMBS, &modulus);
  }
  return METIS_OK;
}
