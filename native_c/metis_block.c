/* The bytes of a block: its header is read, checked and written here and nowhere else.
 *
 * Law: what a header declares is compared with what the caller expects before it is used; lengths
 * are computed from numbers that were checked, and compared for equality.
 */
#include "metis_ckks_impl.h"

#include <string.h>

static const uint8_t magic[4] = {'M', 'F', 'C', 'B'};

enum { VERSION = 1 };

/* Where the fields of metis.h lie. */
enum {
  AT_VERSION = 4,
  AT_LIMB_BITS = 5,
  AT_RING = 6,
  AT_POLYNOMIALS = 7,
  AT_FINGERPRINT = 8,
  AT_EXPONENTS = 24,
  AT_INDEX = 40,
  AT_COUNT = 44,
  AT_CIPHERTEXTS = 48,
  AT_SEEDS = 50,
  AT_PAYLOAD_BYTES = 52,
  AT_PAYLOAD_CRC = 56,
  AT_HEADER_CRC = 60,
};

static uint32_t load_u16(const uint8_t *at) { return at[0] | (uint32_t)at[1] << 8; }

static unsigned log2_of(uint32_t power) {
  unsigned exponent = 0;
  while (power >> exponent > 1) {
    exponent++;
  }
  return exponent;
}

metis_status metis_check_context(const metis_ckks_context *context) {
  if (context == NULL) {
    return metis_refuse("the context is NULL");
  }
  const uint32_t bits = context->limb_bits;
  if (bits != 32 && bits != 44 && bits != 48 && bits != 52) {
    return metis_refuse("limbs of %u bits, allowed: 32, 44, 48, 52", bits);
  }
  const uint32_t ring = context->ring_dimension;
  if (ring < 1u << 10 || ring > 1u << 16 || (ring & (ring - 1)) != 0) {
    return metis_refuse("a ring dimension of %u, allowed: powers of two, 1024 to 65536", ring);
  }
  if (context->modulus >> (bits - 1) != 1 || context->modulus % 2 != 1) {
    return metis_refuse("a modulus of %llu, allowed: odd numbers of exactly %u bits",
                        (unsigned long long)context->modulus, bits);
  }
  return METIS_OK;
}

metis_status metis_check_range(const metis_ckks_range *range, uint32_t polynomials_least) {
  if (range == NULL) {
    return metis_refuse("the range is NULL");
  }
  if (range->index >= range->count) {
    return metis_refuse("block %u of %u, counted from 0", range->index, range->count);
  }
  if (range->ciphertexts == 0 || range->ciphertexts > METIS_BLOCK_CIPHERTEXTS_MAX) {
    return metis_refuse("%u ciphertexts in a block, allowed: 1 to %d", range->ciphertexts,
                        METIS_BLOCK_CIPHERTEXTS_MAX);
  }
  if (range->polynomials < polynomials_least || range->polynomials > 2) {
    return metis_refuse("%u polynomials, allowed: %u to 2", range->polynomials, polynomials_least);
  }
  return METIS_OK;
}

size_t metis_poly_bytes(const metis_ckks_context *context) {
  return (size_t)context->ring_dimension / 8 * context->limb_bits;
}

size_t metis_block_bytes(const metis_ckks_context *context, uint32_t ciphertexts,
                         uint32_t polynomials, uint32_t seeds) {
  return METIS_BLOCK_HEADER_BYTES + (size_t)seeds * METIS_SEED_ENTRY_BYTES +
         (size_t)ciphertexts * polynomials * metis_poly_bytes(context);
}

metis_status metis_ckks_block_bytes(const metis_ckks_context *context, uint32_t ciphertexts,
                                    uint32_t polynomials, uint32_t seeds, size_t *bytes) {
  const metis_status status = metis_check_context(context);
  if (status != METIS_OK) {
    return status;
  }
  const metis_ckks_range range = {
      .count = 1, .ciphertexts = ciphertexts, .polynomials = polynomials};
  const metis_status bounds = metis_check_range(&range, 1);
  if (bounds != METIS_OK) {
    return bounds;
  }
  if (polynomials == 1 ? seeds == 0 || seeds > METIS_BLOCK_SEEDS_MAX : seeds != 0) {
    return metis_refuse("%u seeds with %u polynomials, allowed: 1 to %d with one, 0 with two",
                        seeds, polynomials, METIS_BLOCK_SEEDS_MAX);
  }
  if (bytes == NULL) {
    return metis_refuse("bytes is NULL");
  }
  *bytes = metis_block_bytes(context, ciphertexts, polynomials, seeds);
  return METIS_OK;
}

metis_status metis_read_header(const metis_ckks_context *context, const metis_ckks_range *range,
                               const uint8_t *block, size_t bytes, size_t position,
                               metis_block_view *view) {
#define REFUSE(fault, ...) return metis_refuse_block(position, fault, __VA_ARGS__)
  if (bytes < METIS_BLOCK_HEADER_BYTES) {
    REFUSE(METIS_BLOCK_LENGTH, "a block of %zu bytes is shorter than its header of %d", bytes,
           METIS_BLOCK_HEADER_BYTES);
  }
  if (memcmp(block, magic, sizeof magic) != 0) {
    REFUSE(METIS_BLOCK_MAGIC, "a block begins with %02x %02x %02x %02x, not with MFCB", block[0],
           block[1], block[2], block[3]);
  }
  if (block[AT_VERSION] != VERSION) {
    REFUSE(METIS_BLOCK_VERSION, "a block of version %u, known: %d", block[AT_VERSION], VERSION);
  }
  /* The portable kernel: 60 bytes are not worth asking which one runs. */
  const uint32_t crc = metis_crc32c_portable(0, block, AT_HEADER_CRC);
  if (crc != metis_load_u32(block + AT_HEADER_CRC)) {
    REFUSE(METIS_BLOCK_CHECKSUM, "the header of a block has checksum %08x, but says %08x", crc,
           metis_load_u32(block + AT_HEADER_CRC));
  }
  if (memcmp(block + AT_FINGERPRINT, context->fingerprint, sizeof context->fingerprint) != 0) {
    const uint8_t *const have = block + AT_FINGERPRINT;
    const uint8_t *const want = context->fingerprint;
    REFUSE(METIS_BLOCK_FINGERPRINT,
           "a block was sealed under the key %02x%02x%02x%02x..., expected: %02x%02x%02x%02x...",
           have[0], have[1], have[2], have[3], want[0], want[1], want[2], want[3]);
  }
  if (block[AT_LIMB_BITS] != context->limb_bits) {
    REFUSE(METIS_BLOCK_LIMB_BITS, "a block has limbs of %u bits, expected: %u", block[AT_LIMB_BITS],
           context->limb_bits);
  }
  if (block[AT_RING] != log2_of(context->ring_dimension)) {
    REFUSE(METIS_BLOCK_RING, "a block has ring dimension 2^%u, expected: %u", block[AT_RING],
           context->ring_dimension);
  }
  const uint32_t polynomials = block[AT_POLYNOMIALS];
  if (polynomials < 1 || polynomials > 2 ||
      (range->polynomials != 0 && polynomials != range->polynomials)) {
    REFUSE(METIS_BLOCK_POLYNOMIALS, "a block has %u polynomials a ciphertext, expected: %s",
           polynomials,
           range->polynomials == 0   ? "1 or 2"
           : range->polynomials == 1 ? "1"
                                     : "2");
  }
  if (memcmp(block + AT_EXPONENTS, range->exponents_digest, sizeof range->exponents_digest) != 0) {
    REFUSE(METIS_BLOCK_EXPONENTS,
           "a block was scaled by other exponents, digest %02x%02x..., expected: %02x%02x...",
           block[AT_EXPONENTS], block[AT_EXPONENTS + 1], range->exponents_digest[0],
           range->exponents_digest[1]);
  }
  if (metis_load_u32(block + AT_COUNT) != range->count) {
    REFUSE(METIS_BLOCK_COUNT, "a block is one of %u, expected: one of %u",
           metis_load_u32(block + AT_COUNT), range->count);
  }
  if (metis_load_u32(block + AT_INDEX) != range->index) {
    REFUSE(METIS_BLOCK_INDEX, "block %u came where block %u was expected",
           metis_load_u32(block + AT_INDEX), range->index);
  }
  const uint32_t seeds = load_u16(block + AT_SEEDS);
  if (polynomials == 1 ? seeds == 0 || seeds > METIS_BLOCK_SEEDS_MAX : seeds != 0) {
    REFUSE(METIS_BLOCK_SEEDS, "a block has %u seeds, allowed with %u polynomials: %s", seeds,
           polynomials, polynomials == 1 ? "1 to 1024" : "0");
  }
  if (load_u16(block + AT_CIPHERTEXTS) != range->ciphertexts) {
    REFUSE(METIS_BLOCK_LENGTH, "a block has %u ciphertexts, expected: %u",
           load_u16(block + AT_CIPHERTEXTS), range->ciphertexts);
  }
  const size_t expected = metis_block_bytes(context, range->ciphertexts, polynomials, seeds);
  if (bytes != expected) {
    REFUSE(METIS_BLOCK_LENGTH, "a block of %zu bytes, but its header is of one of %zu", bytes,
           expected);
  }
  if (metis_load_u32(block + AT_PAYLOAD_BYTES) != expected - METIS_BLOCK_HEADER_BYTES) {
    REFUSE(METIS_BLOCK_LENGTH, "a block declares %u bytes of payload, expected: %zu",
           metis_load_u32(block + AT_PAYLOAD_BYTES), expected - METIS_BLOCK_HEADER_BYTES);
  }
#undef REFUSE
  const uint8_t *const payload = block + METIS_BLOCK_HEADER_BYTES;
  *view = (metis_block_view){
      .seeds = payload,
      .seeds_count = seeds,
      .polynomials = polynomials,
      .c0 = payload + (size_t)seeds * METIS_SEED_ENTRY_BYTES,
      .payload = payload,
      .payload_bytes = expected - METIS_BLOCK_HEADER_BYTES,
      .payload_crc = metis_load_u32(block + AT_PAYLOAD_CRC),
  };
  return METIS_OK;
}

metis_status metis_compare_crc(const metis_block_view *view, uint32_t crc, size_t position) {
  if (crc != view->payload_crc) {
    return metis_refuse_block(position, METIS_BLOCK_CHECKSUM,
                              "the payload of a block has checksum %08x, but its header says %08x",
                              crc, view->payload_crc);
  }
  return METIS_OK;
}

metis_status metis_check_payload(const metis_kernels *kernels, const metis_block_view *view,
                                 size_t position) {
  return metis_compare_crc(view, kernels->crc32c(0, view->payload, view->payload_bytes), position);
}

void metis_write_header(const metis_kernels *kernels, const metis_ckks_context *context,
                        const metis_ckks_range *range, uint32_t seeds, uint8_t *block) {
  const size_t payload_bytes =
      metis_block_bytes(context, range->ciphertexts, range->polynomials, seeds) -
      METIS_BLOCK_HEADER_BYTES;
  memcpy(block, magic, sizeof magic);
  block[AT_VERSION] = VERSION;
  block[AT_LIMB_BITS] = (uint8_t)context->limb_bits;
  block[AT_RING] = (uint8_t)log2_of(context->ring_dimension);
  block[AT_POLYNOMIALS] = (uint8_t)range->polynomials;
  memcpy(block + AT_FINGERPRINT, context->fingerprint, sizeof context->fingerprint);
  memcpy(block + AT_EXPONENTS, range->exponents_digest, sizeof range->exponents_digest);
  metis_store_u32(block + AT_INDEX, range->index);
  metis_store_u32(block + AT_COUNT, range->count);
  /* Two numbers of 16 bits, the lower first. */
  metis_store_u32(block + AT_CIPHERTEXTS, range->ciphertexts | seeds << 16);
  metis_store_u32(block + AT_PAYLOAD_BYTES, (uint32_t)payload_bytes);
  metis_store_u32(block + AT_PAYLOAD_CRC,
                  kernels->crc32c(0, block + METIS_BLOCK_HEADER_BYTES, payload_bytes));
  metis_store_u32(block + AT_HEADER_CRC, metis_crc32c_portable(0, block, AT_HEADER_CRC));
}
