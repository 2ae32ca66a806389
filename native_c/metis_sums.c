/* Sums of weighted limbs that never overflow, whatever the weights.
 *
 * Law: products are added as they are for as long as 64 bits can hold the sum (lazy). Then all sums
 * are reduced modulo q once and it goes on; and a weight that alone is too large is multiplied with
 * a reduction in it. Which of these happens cannot be seen in the residues.
 */
#include "metis_ckks_impl.h"

#include <string.h>

enum { PIECE_LIMBS = 1024 }; /* divides every ring dimension */

void metis_sums_clear(metis_sums *sums) { sums->units = 0; }

/* For whoever reads the values: with no units they were never written. */
static void write_zeros(metis_sums *sums) {
  if (sums->units == 0) {
    memset(sums->values, 0, sums->count * sizeof sums->values[0]);
  }
}

void metis_sums_reduce(metis_sums *sums) {
  write_zeros(sums);
  metis_reduce(sums->values, sums->count, sums->modulus);
  sums->units = 1;
}

static uint64_t units_max(const metis_sums *sums) {
  return (uint64_t)1 << (64 - sums->modulus->bits);
}

/* Makes room for `units` more, below units_max, and counts them. */
static void take_room(metis_sums *sums, uint64_t units) {
  if (units > units_max(sums) - sums->units) {
    metis_sums_reduce(sums);
  }
  sums->units += units;
}

typedef enum { ADD_LAZY, ADD_REDUCED, SUBTRACT_REDUCED } operation;

static operation prepare_to_add(metis_sums *sums, uint32_t weight) {
  const bool lazy = weight < units_max(sums);
  write_zeros(sums);
  take_room(sums, lazy ? weight : METIS_REDUCED_UNITS);
  return lazy ? ADD_LAZY : ADD_REDUCED;
}

static operation prepare_to_subtract(metis_sums *sums) {
  write_zeros(sums);
  take_room(sums, METIS_REDUCED_UNITS);
  return SUBTRACT_REDUCED;
}

static void apply(metis_sums *sums, operation operation, size_t at, const uint64_t *limbs,
                  size_t count, uint32_t weight) {
  uint64_t *const values = sums->values + at;
  switch (operation) {
  case ADD_LAZY:
    metis_add_limbs(values, limbs, count, weight);
    return;
  case ADD_REDUCED:
    metis_add_reduced(values, limbs, count, weight, sums->modulus);
    return;
  case SUBTRACT_REDUCED:
    metis_subtract_reduced(values, limbs, count, weight, sums->modulus);
    return;
  }
}

static void apply_packed(metis_sums *sums, operation operation, const uint8_t *packed,
                         uint32_t weight) {
  const unsigned bits = sums->modulus->bits;
  uint64_t limbs[PIECE_LIMBS];
  for (size_t at = 0; at < sums->count; at += PIECE_LIMBS) {
    sums->kernels->unpack(limbs, packed + at / 8 * bits, PIECE_LIMBS, bits);
    apply(sums, operation, at, limbs, PIECE_LIMBS, weight);
  }
}

static void apply_seed(metis_sums *sums, operation operation, const uint8_t *seed,
                       uint32_t weight) {
  metis_stream stream;
  uint64_t limbs[PIECE_LIMBS];
  metis_stream_start(&stream, sums->kernels, sums->modulus, seed);
  for (size_t at = 0; at < sums->count; at += PIECE_LIMBS) {
    if (at % sums->ring_dimension == 0) {
      metis_stream_seek(&stream, at / sums->ring_dimension);
    }
    metis_stream_limbs(&stream, limbs, PIECE_LIMBS);
    apply(sums, operation, at, limbs, PIECE_LIMBS, weight);
  }
}

void metis_sums_add_packed(metis_sums *sums, const uint8_t *const *packed, const uint32_t *weights,
                           uint32_t *crcs, size_t blocks) {
  const unsigned bits = sums->modulus->bits;
  uint64_t units = 0;
  for (size_t b = 0; b < blocks; b++) {
    units += weights[b];
  }
  if (units < units_max(sums)) {
    const bool fresh = sums->units == 0;
    take_room(sums, units);
    sums->kernels->add_packed(sums->values, fresh, packed, weights, crcs, blocks, sums->count,
                              bits);
    return;
  }
  for (size_t b = 0; b < blocks; b++) {
    crcs[b] = sums->kernels->crc32c(crcs[b], packed[b], sums->count / 8 * bits);
    apply_packed(sums, prepare_to_add(sums, weights[b]), packed[b], weights[b]);
  }
}

void metis_sums_subtract_packed(metis_sums *sums, const uint8_t *packed, uint32_t weight) {
  apply_packed(sums, prepare_to_subtract(sums), packed, weight);
}

void metis_sums_add_seed(metis_sums *sums, const uint8_t *seed, uint32_t weight) {
  apply_seed(sums, prepare_to_add(sums, weight), seed, weight);
}

void metis_sums_subtract_seed(metis_sums *sums, const uint8_t *seed, uint32_t weight) {
  apply_seed(sums, prepare_to_subtract(sums), seed, weight);
}
