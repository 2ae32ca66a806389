/* Invariant tested: whatever bytes come as a block, they are taken if they are one by the words of
 * metis.h, else refused with a fault that it names, and nothing is read outside of them. A refused
 * block leaves no trace in the sum or in an output; an absorbed one can be retracted without a
 * trace, and opened into limbs below q.
 *
 * The first byte of an input says how the rest becomes a block. In half of the cases its lengths
 * and both checksums are repaired, since no fuzzer guesses a checksum. */
#include "check.h"
#include "metis_ckks_impl.h"

#include <string.h>

enum {
  REPAIR = 1,        /* pad or cut to the length that the header is of; set lengths and checksums */
  DIFFERENCE = 2,    /* and then the header is what distinguishes it from that of a good block */
  TWO = 4,           /* the result of the fold has two polynomials */
  BESIDE_OTHERS = 8, /* absorb it among good blocks, not alone */
  WIDTH_SHIFT = 4,   /* two bits: which k */
  ALWAYS_LOOK = 64,  /* compare sums even when they were not touched */
  WEIGHTED = 128,
  RING = 1024,
  OTHERS = 4,
};

typedef struct {
  metis_ckks_context context;
  metis_ckks_range range;
  metis_ckks_fold *fold;
  uint8_t *before; /* the fold of the first of the good blocks */
  size_t before_bytes;
  uint8_t *good[OTHERS];
  size_t good_bytes[OTHERS];
  uint64_t limbs[2 * RING];
} setting;

static setting settings[4][2];

static void must(metis_status status) { CHECK(status == METIS_OK, "%s", metis_error_text()); }

/* The fold as a block; the caller frees it. */
static uint8_t *finalised(setting *s, size_t *bytes) {
  must(metis_ckks_fold_bytes(s->fold, bytes));
  uint8_t *const out = allocate(*bytes);
  must(metis_ckks_fold_finalise(s->fold, out, *bytes));
  return out;
}

static void set_up(setting *s, unsigned bits, uint32_t polynomials) {
  s->context = (metis_ckks_context){
      .modulus = ((uint64_t)1 << bits) - 16383, .limb_bits = bits, .ring_dimension = RING};
  memset(s->context.fingerprint, 'F', sizeof s->context.fingerprint);
  s->range =
      (metis_ckks_range){.index = 1, .count = 3, .ciphertexts = 1, .polynomials = polynomials};
  memset(s->range.exponents_digest, 'E', sizeof s->range.exponents_digest);
  must(metis_ckks_fold_create(&s->context, &s->fold));
  must(metis_ckks_fold_begin(s->fold, &s->range));
  for (size_t i = 0; i < OTHERS; i++) { /* of both kinds, where both are allowed */
    metis_ckks_range range = s->range;
    uint8_t seed[METIS_SEED_BYTES];
    range.polynomials = i % 2 == 0 ? 1 : polynomials;
    memset(seed, (int)i, sizeof seed);
    for (size_t k = 0; k < RING; k++) {
      s->limbs[k] = random_bits() % s->context.modulus;
    }
    const uint32_t seeds = range.polynomials == 1;
    must(metis_ckks_block_bytes(&s->context, 1, range.polynomials, seeds, &s->good_bytes[i]));
    s->good[i] = allocate(s->good_bytes[i]);
    must(metis_ckks_seal_block(&s->context, &range, s->limbs, seeds ? NULL : s->limbs, RING,
                               seeds ? seed : NULL, s->good[i], s->good_bytes[i]));
  }
  must(metis_ckks_fold_absorb(s->fold, s->good[0], s->good_bytes[0], 1));
  s->before = finalised(s, &s->before_bytes);
}

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  static const unsigned widths[4] = {32, 44, 48, 52};
  (void)argc;
  (void)argv;
  for (size_t w = 0; w < 4; w++) {
    for (uint32_t polynomials = 1; polynomials <= 2; polynomials++) {
      set_up(&settings[w][polynomials - 1], widths[w], polynomials);
    }
  }
  return 0;
}

/* In place of memcmp, which libFuzzer listens to: it would learn limbs by heart. */
static bool same_bytes(const uint8_t *a, const uint8_t *b, size_t count) {
  uint8_t differing = 0;
  for (size_t i = 0; i < count; i++) {
    differing |= a[i] ^ b[i];
  }
  return differing == 0;
}

/* A second reading of metis.h, to hold against the library's. */
static bool is_block(const setting *s, const uint8_t *block, size_t bytes) {
  if (bytes < METIS_BLOCK_HEADER_BYTES || !same_bytes(block, s->good[0], 7) ||
      !same_bytes(block + 8, s->good[0] + 8, 42) || (block[7] != 1 && block[7] != 2)) {
    return false;
  }
  const size_t seeds = (size_t)block[50] + 256 * (size_t)block[51];
  const size_t payload_bytes = seeds * 20 + RING / 8 * s->context.limb_bits * block[7];
  if (bytes != 64 + payload_bytes || metis_load_u32(block + 52) != payload_bytes ||
      (block[7] == 1 ? seeds < 1 || seeds > 1024 : seeds != 0) ||
      metis_load_u32(block + 56) != metis_crc32c_portable(0, block + 64, payload_bytes) ||
      metis_load_u32(block + 60) != metis_crc32c_portable(0, block, 60)) {
    return false;
  }
  for (const uint8_t *a = block + 64; a < block + 64 + 20 * seeds; a += 20) {
    for (const uint8_t *b = block + 64; b < a; b += 20) {
      if (same_bytes(a, b, 16)) {
        return false;
      }
    }
    if (metis_load_u32(a + 16) == 0) {
      return false;
    }
  }
  return true;
}

static void check_sums(setting *s, const char *when) {
  size_t bytes = 0;
  uint8_t *const now = finalised(s, &bytes);
  CHECK(bytes == s->before_bytes && same_bytes(now, s->before, bytes), "the sum changed: %s", when);
  free(now);
}

/* What is given, from behind the header on; then seeds, no two the same, and one byte for the rest.
 */
static void fill(uint8_t *payload, size_t bytes, size_t seeds, const uint8_t *data, size_t size) {
  memset(payload, size > 0 ? data[size - 1] : 0, bytes);
  for (size_t i = 0; i < seeds && (i + 1) * METIS_SEED_ENTRY_BYTES <= bytes; i++) {
    memset(payload + i * METIS_SEED_ENTRY_BYTES, (int)i + 100, METIS_SEED_ENTRY_BYTES);
  }
  if (size > METIS_BLOCK_HEADER_BYTES) {
    const size_t given = size - METIS_BLOCK_HEADER_BYTES;
    memcpy(payload, data + METIS_BLOCK_HEADER_BYTES, given < bytes ? given : bytes);
  }
}

/* To its exact size, so that a sanitizer sees one byte too far; the caller frees it. */
static uint8_t *make_block(const setting *s, unsigned how, const uint8_t *data, size_t size,
                           size_t *bytes) {
  *bytes = size;
  if (!(how & REPAIR)) {
    uint8_t *const block = allocate(size);
    memcpy(block, data, size);
    return block;
  }
  const int too_long = size > 0 ? (int8_t)data[0] : 0;
  data += size > 0;
  size -= size > 0;
  uint8_t header[METIS_BLOCK_HEADER_BYTES] = {0};
  uint8_t errors[METIS_BLOCK_HEADER_BYTES - 52] = {0}; /* in lengths and checksums */
  memcpy(header, data, size < sizeof header ? size : sizeof header);
  if (how & DIFFERENCE) {
    memcpy(errors, header + 52, sizeof errors);
    for (size_t i = 0; i < 52; i++) {
      header[i] ^= s->good[0][i];
    }
  }
  /* Few seeds, since each is expanded; and sometimes more than any block can have. */
  const uint32_t declared = header[50] | (uint32_t)header[51] << 8;
  const uint32_t seeds = declared % 12;
  if (declared < 0xE000) {
    header[50] = (uint8_t)seeds;
    header[51] = 0;
  }
  const size_t right = metis_block_bytes(&s->context, s->range.ciphertexts, header[7] % 4, seeds);
  *bytes = too_long < 0 && right < sizeof header + 128 ? right : right + (size_t)too_long;
  uint8_t *const block = allocate(*bytes);
  uint8_t *const payload = block + sizeof header;
  const size_t payload_bytes = *bytes - sizeof header;
  fill(payload, payload_bytes, seeds, data, size);
  metis_crc32c_fn *const crc32c = metis_pick_kernels()->crc32c;
  metis_store_u32(header + 52, (uint32_t)(right - sizeof header));
  const size_t summed = *bytes < right ? payload_bytes : right - sizeof header;
  metis_store_u32(header + 56, crc32c(0, payload, summed));
  for (size_t i = 0; i < 8; i++) {
    header[52 + i] ^= errors[i];
  }
  metis_store_u32(header + 60, crc32c(0, header, 60) ^ metis_load_u32(errors + 8));
  memcpy(block, header, sizeof header);
  return block;
}

static void absorb(setting *s, unsigned how, const uint8_t *block, size_t bytes) {
  const uint32_t weight = how & WEIGHTED ? UINT32_MAX - block[bytes / 2] : 1;
  const size_t count = how & BESIDE_OTHERS ? OTHERS : 1;
  const size_t place = count == 1 ? 0 : 1 + bytes % (OTHERS - 1);
  const void *blocks[OTHERS] = {s->good[1], s->good[2], s->good[3], s->good[3]};
  size_t sizes[OTHERS] = {s->good_bytes[1], s->good_bytes[2], s->good_bytes[3], s->good_bytes[3]};
  uint32_t weights[OTHERS] = {3, 2, 1, 7};
  for (size_t i = OTHERS - 1; i > place; i--) {
    blocks[i] = blocks[i - 1];
    sizes[i] = sizes[i - 1];
  }
  blocks[place] = block;
  sizes[place] = bytes;
  weights[place] = weight;
  const metis_status status = metis_ckks_fold_absorb_many(s->fold, blocks, sizes, weights, count);
  if (status == METIS_OK) {
    CHECK(is_block(s, block, bytes), "absorbed what is no block");
    for (size_t i = 0; i < count; i++) {
      must(metis_ckks_fold_retract(s->fold, blocks[i], sizes[i], weights[i]));
    }
    check_sums(s, "absorbed and retracted");
    return;
  }
  size_t at = 0;
  const metis_block_fault fault = metis_block_fault_last(&at);
  CHECK(status == METIS_ERR_BLOCK, "status %d: %s", (int)status, metis_error_text());
  CHECK(fault >= METIS_BLOCK_MAGIC && fault <= METIS_BLOCK_WEIGHT, "fault %d", (int)fault);
  CHECK(at == place || (fault == METIS_BLOCK_DUPLICATE && at > place), "block %zu, not %zu: %s", at,
        place, metis_error_text());
  if (fault == METIS_BLOCK_CHECKSUM || how & ALWAYS_LOOK) {
    check_sums(s, "refused");
  }
}

static void open_it(setting *s, const uint8_t *block, size_t bytes) {
  enum { UNTOUCHED = 0xEE };
  metis_ckks_range range = s->range;
  range.polynomials = 0;
  memset(s->limbs, UNTOUCHED, sizeof s->limbs);
  const metis_status status =
      metis_ckks_open_block(&s->context, &range, block, bytes, s->limbs, s->limbs + RING, RING);
  CHECK((status == METIS_OK) == is_block(s, block, bytes), "status %d: %s", (int)status,
        metis_error_text());
  if (status == METIS_OK) {
    const size_t first = metis_first_not_below(s->limbs, 2 * RING, s->context.modulus);
    CHECK(first == 2 * RING, "limb %zu", first);
    return;
  }
  CHECK(status == METIS_ERR_BLOCK, "status %d: %s", (int)status, metis_error_text());
  /* All bytes are the same when the first is right and each equals the next. */
  const uint8_t *const all = (const uint8_t *)s->limbs;
  CHECK(all[0] == UNTOUCHED && same_bytes(all, all + 1, sizeof s->limbs - 1), "output changed");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  const unsigned how = size > 0 ? data[0] : 0;
  setting *const s = &settings[how >> WIDTH_SHIFT & 3][how & TWO ? 1 : 0];
  size_t bytes = 0;
  uint8_t *const block =
      make_block(s, how, size > 0 ? data + 1 : data, size > 0 ? size - 1 : 0, &bytes);
  absorb(s, how, block, bytes);
  if (!(how & BESIDE_OTHERS)) {
    open_it(s, block, bytes);
  }
  free(block);
  return 0;
}
