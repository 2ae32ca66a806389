/* Limbs modulo q, in plain C for the compiler to vectorise.
 *
 * Law: no division in a loop. A quotient is estimated from below by a product with a reciprocal,
 * and how far it can fall short is proved beside it, for every q of exactly `bits` bits.
 */
#include "metis_ckks_impl.h"

metis_modulus metis_modulus_of(const metis_ckks_context *context) {
  const uint64_t q = context->modulus;
  const unsigned bits = context->limb_bits;
  return (metis_modulus){
      .q = q,
      .bits = bits,
      .inverse = UINT64_MAX / q, /* q is odd, so this is also that of 2^64 */
      .barrett = (uint64_t)(((metis_u128)1 << 2 * bits) / q),
  };
}

void metis_add_limbs(uint64_t *restrict sums, const uint64_t *restrict limbs, size_t count,
                     uint32_t weight) {
  for (size_t i = 0; i < count; i++) {
    sums[i] += limbs[i] * weight;
  }
}

/* x = limb * weight / 2q is the quotient that is wanted. `reciprocal` falls short of
 * weight * 2^bits / 2q by less than 1, and the upper 32 bits of the limb stand for it with an error
 * of less than 1; so the estimate lies above x - limb / 2^bits - 2^bits / 2q - 1 > x - 3, and never
 * above x. The rest is below 3 * 2q. Each factor has 32 bits, which vectors can multiply. */
static inline uint64_t reduced_product(uint64_t limb, uint32_t weight, uint64_t reciprocal,
                                       const metis_modulus *modulus) {
  const uint64_t quotient = (limb >> (modulus->bits - 32)) * reciprocal >> 32;
  return limb * weight - quotient * (2 * modulus->q);
}

static uint64_t reciprocal_of(uint32_t weight, const metis_modulus *modulus) {
  return (uint64_t)(((metis_u128)weight << (modulus->bits - 1)) / modulus->q);
}

void metis_add_reduced(uint64_t *restrict sums, const uint64_t *restrict limbs, size_t count,
                       uint32_t weight, const metis_modulus *modulus) {
  const uint64_t reciprocal = reciprocal_of(weight, modulus);
  for (size_t i = 0; i < count; i++) {
    sums[i] += reduced_product(limbs[i], weight, reciprocal, modulus);
  }
}

void metis_subtract_reduced(uint64_t *restrict sums, const uint64_t *restrict limbs, size_t count,
                            uint32_t weight, const metis_modulus *modulus) {
  const uint64_t reciprocal = reciprocal_of(weight, modulus);
  const uint64_t zero = METIS_REDUCED_UNITS * modulus->q;
  for (size_t i = 0; i < count; i++) {
    sums[i] += zero - reduced_product(limbs[i], weight, reciprocal, modulus);
  }
}

/* `inverse` falls short of 2^64 / q by less than 1, so the quotient of a value below 2^64 by less
 * than 1 before it is cut, by at most 1 after. */
void metis_reduce(uint64_t *values, size_t count, const metis_modulus *modulus) {
  const uint64_t q = modulus->q;
  for (size_t i = 0; i < count; i++) {
    const uint64_t quotient = (uint64_t)((metis_u128)values[i] * modulus->inverse >> 64);
    const uint64_t rest = values[i] - quotient * q;
    values[i] = rest >= q ? rest - q : rest;
  }
}

/* Barrett's product: with x = a * b < q^2, the quotient falls short by at most 2. */
static inline uint64_t product(uint64_t a, uint64_t b, const metis_modulus *modulus) {
  const metis_u128 x = (metis_u128)a * b;
  const uint64_t upper = (uint64_t)(x >> (modulus->bits - 1));
  const uint64_t quotient = (uint64_t)((metis_u128)upper * modulus->barrett >> (modulus->bits + 1));
  uint64_t rest = (uint64_t)x - quotient * modulus->q;
  rest = rest >= 2 * modulus->q ? rest - 2 * modulus->q : rest;
  return rest >= modulus->q ? rest - modulus->q : rest;
}

void metis_reseed_limbs(uint64_t *restrict c0, const uint64_t *c1, const uint64_t *a,
                        const uint64_t *s, size_t count, const metis_modulus *modulus) {
  const uint64_t q = modulus->q;
  for (size_t i = 0; i < count; i++) {
    const uint64_t difference = c1[i] >= a[i] ? c1[i] - a[i] : c1[i] + q - a[i];
    const uint64_t sum = c0[i] + product(difference, s[i], modulus);
    c0[i] = sum >= q ? sum - q : sum;
  }
}

size_t metis_first_not_below(const uint64_t *limbs, size_t count, uint64_t q) {
  for (size_t i = 0; i < count; i++) {
    if (limbs[i] >= q) {
      return i;
    }
  }
  return count;
}
