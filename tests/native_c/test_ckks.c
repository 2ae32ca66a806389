/* A block that is not what it says is refused for what is wrong with it, and no argument leads out
 * of bounds or changes anything when it is refused. Meant to run under ASan and UBSan. */
#include "check.h"
#include "metis.h"

#include <stdbool.h>
#include <string.h>

enum { RING = 1024, BLOCKS = 20 /* more than are folded at once */ };

static const unsigned widths[4] = {32, 44, 48, 52};

static metis_ckks_context context_of(unsigned bits) {
  metis_ckks_context context = {
      .modulus = ((uint64_t)1 << bits) - 16383, .limb_bits = bits, .ring_dimension = RING};
  memset(context.fingerprint, 'F', sizeof context.fingerprint);
  return context;
}

static metis_ckks_range range_of(uint32_t ciphertexts, uint32_t polynomials) {
  metis_ckks_range range = {
      .index = 3, .count = 5, .ciphertexts = ciphertexts, .polynomials = polynomials};
  memset(range.exponents_digest, 'E', sizeof range.exponents_digest);
  return range;
}

#define OK(call) CHECK((call) == METIS_OK, "%s", metis_error_text())

#define REFUSED(call, words)                                                                       \
  do {                                                                                             \
    CHECK((call) == METIS_ERR_ARGUMENT, "not refused");                                            \
    CHECK(strstr(metis_error_text(), words) != NULL, "text: %s", metis_error_text());              \
  } while (0)

#define FAULT(call, expected)                                                                      \
  do {                                                                                             \
    CHECK((call) == METIS_ERR_BLOCK, "not refused");                                               \
    CHECK(metis_block_fault_last(NULL) == (expected), "fault %d: %s",                              \
          (int)metis_block_fault_last(NULL), metis_error_text());                                  \
  } while (0)

typedef struct {
  uint8_t *data; /* to its exact size, so that a sanitizer sees one byte too far */
  size_t bytes;
} block;

static uint64_t *random_limbs(const metis_ckks_context *context, size_t count) {
  uint64_t *const limbs = allocate(count * sizeof *limbs);
  for (size_t i = 0; i < count; i++) {
    limbs[i] = random_bits() % context->modulus;
  }
  return limbs;
}

/* With random limbs and, with one polynomial, a random seed. */
static block seal(const metis_ckks_context *context, const metis_ckks_range *range) {
  const size_t limbs = (size_t)range->ciphertexts * context->ring_dimension;
  const bool seeded = range->polynomials == 1;
  uint64_t *const c0 = random_limbs(context, limbs);
  uint64_t *const c1 = random_limbs(context, limbs);
  uint8_t seed[METIS_SEED_BYTES];
  for (size_t i = 0; i < sizeof seed; i++) {
    seed[i] = (uint8_t)(random_bits() >> 20);
  }
  block b = {.bytes = 0};
  OK(metis_ckks_block_bytes(context, range->ciphertexts, range->polynomials, seeded, &b.bytes));
  b.data = allocate(b.bytes);
  OK(metis_ckks_seal_block(context, range, c0, seeded ? NULL : c1, limbs, seeded ? seed : NULL,
                           b.data, b.bytes));
  free(c0);
  free(c1);
  return b;
}

static block finalised(metis_ckks_fold *fold) {
  block b = {.bytes = 0};
  OK(metis_ckks_fold_bytes(fold, &b.bytes));
  b.data = allocate(b.bytes);
  OK(metis_ckks_fold_finalise(fold, b.data, b.bytes));
  return b;
}

/* The fold must be what it was. */
static void check_sums(metis_ckks_fold *fold, block before, const char *when) {
  const block now = finalised(fold);
  CHECK(now.bytes == before.bytes && memcmp(now.data, before.data, now.bytes) == 0, "%s", when);
  free(now.data);
}

static void put_u32(uint8_t *at, uint32_t value) {
  for (int i = 0; i < 4; i++) {
    at[i] = (uint8_t)(value >> 8 * i);
  }
}

/* Makes both checksums right again. */
static void repair(block b) {
  uint32_t crc = 0;
  OK(metis_crc32c(b.data + METIS_BLOCK_HEADER_BYTES, b.bytes - METIS_BLOCK_HEADER_BYTES, &crc));
  put_u32(b.data + 56, crc);
  crc = 0;
  OK(metis_crc32c(b.data, 60, &crc));
  put_u32(b.data + 60, crc);
}

static block copy_of(block b) {
  block copy = {.data = allocate(b.bytes), .bytes = b.bytes};
  memcpy(copy.data, b.data, b.bytes);
  return copy;
}

/* ---- what a block may be refused for --------------------------------------------------------- */

/* One row: bytes put over a good block of one polynomial, and what it is then refused for. */
static const struct {
  size_t at;
  size_t length;
  uint8_t bytes[4];
  metis_block_fault fault;
} changes[] = {
    {0, 1, {'m'}, METIS_BLOCK_MAGIC},
    {3, 1, {'C'}, METIS_BLOCK_MAGIC},
    {4, 1, {0}, METIS_BLOCK_VERSION},
    {4, 1, {2}, METIS_BLOCK_VERSION},
    {5, 1, {32}, METIS_BLOCK_LIMB_BITS},
    {5, 1, {0}, METIS_BLOCK_LIMB_BITS},
    {5, 1, {255}, METIS_BLOCK_LIMB_BITS},
    {6, 1, {11}, METIS_BLOCK_RING},
    {6, 1, {0}, METIS_BLOCK_RING},
    {6, 1, {255}, METIS_BLOCK_RING},
    {7, 1, {0}, METIS_BLOCK_POLYNOMIALS},
    {7, 1, {2}, METIS_BLOCK_POLYNOMIALS},
    {7, 1, {3}, METIS_BLOCK_POLYNOMIALS},
    {8, 1, {'f'}, METIS_BLOCK_FINGERPRINT},
    {23, 1, {'f'}, METIS_BLOCK_FINGERPRINT},
    {24, 1, {'e'}, METIS_BLOCK_EXPONENTS},
    {39, 1, {'e'}, METIS_BLOCK_EXPONENTS},
    {40, 1, {2}, METIS_BLOCK_INDEX},
    {43, 1, {1}, METIS_BLOCK_INDEX},
    {44, 1, {6}, METIS_BLOCK_COUNT},
    {47, 1, {1}, METIS_BLOCK_COUNT},
    {48, 2, {0, 0}, METIS_BLOCK_LENGTH},
    {48, 2, {1, 0}, METIS_BLOCK_LENGTH},
    {48, 2, {0xFF, 0xFF}, METIS_BLOCK_LENGTH},
    {50, 2, {0, 0}, METIS_BLOCK_SEEDS},
    {50, 2, {1, 4}, METIS_BLOCK_SEEDS},
    {50, 2, {0xFF, 0xFF}, METIS_BLOCK_SEEDS},
    {50, 2, {2, 0}, METIS_BLOCK_LENGTH},
    {52, 4, {0, 0, 0, 0}, METIS_BLOCK_LENGTH},
    {52, 4, {0xFF, 0xFF, 0xFF, 0xFF}, METIS_BLOCK_LENGTH},
    {80, 4, {0, 0, 0, 0}, METIS_BLOCK_WEIGHT},
};

static void each_field_has_its_fault(void) {
  const metis_ckks_context context = context_of(44);
  const metis_ckks_range range = range_of(2, 1);
  const size_t limbs = 2 * RING;
  const block good = seal(&context, &range);
  const block other = seal(&context, &range);
  uint64_t *const c0 = allocate(limbs * sizeof *c0);
  uint64_t *const c1 = allocate(limbs * sizeof *c1);
  memset(c0, 0xEE, limbs * sizeof *c0);
  memset(c1, 0xEE, limbs * sizeof *c1);
  metis_ckks_fold *fold = NULL;
  OK(metis_ckks_fold_create(&context, &fold));
  OK(metis_ckks_fold_begin(fold, &range));
  OK(metis_ckks_fold_absorb(fold, other.data, other.bytes, 1));
  const block before = finalised(fold);
  for (size_t i = 0; i < sizeof changes / sizeof changes[0]; i++) {
    const block bad = copy_of(good);
    memcpy(bad.data + changes[i].at, changes[i].bytes, changes[i].length);
    /* Damage is told from another kind of block by the checksum; the first five bytes say whether
     * there is one. */
    const metis_block_fault damage = changes[i].at < 5 ? changes[i].fault : METIS_BLOCK_CHECKSUM;
    FAULT(metis_ckks_fold_absorb(fold, bad.data, bad.bytes, 1), damage);
    repair(bad);
    FAULT(metis_ckks_fold_absorb(fold, bad.data, bad.bytes, 1), changes[i].fault);
    if (changes[i].fault != METIS_BLOCK_WEIGHT) { /* that is just a block never absorbed */
      FAULT(metis_ckks_fold_retract(fold, bad.data, bad.bytes, 1), changes[i].fault);
    }
    FAULT(metis_ckks_open_block(&context, &range, bad.data, bad.bytes, c0, c1, limbs),
          changes[i].fault);
    free(bad.data);
  }
  check_sums(fold, before, "a refused block went into the sums");
  for (size_t i = 0; i < limbs; i++) {
    CHECK(c0[i] == 0xEEEEEEEEEEEEEEEE && c1[i] == c0[i], "limb %zu written", i);
  }
  OK(metis_ckks_fold_absorb(fold, good.data, good.bytes, 1));
  metis_ckks_fold_destroy(fold);
  free(good.data);
  free(other.data);
  free(before.data);
  free(c0);
  free(c1);
}

/* Every length but the right one, each in memory of just that size. */
static void a_cut_block_is_refused(void) {
  for (size_t w = 0; w < 4; w++) {
    const metis_ckks_context context = context_of(widths[w]);
    const metis_ckks_range range = range_of(1, 1);
    const block good = seal(&context, &range);
    metis_ckks_fold *fold = NULL;
    OK(metis_ckks_fold_create(&context, &fold));
    OK(metis_ckks_fold_begin(fold, &range));
    for (size_t bytes = 0; bytes < good.bytes + 40; bytes++) {
      uint8_t *const cut = allocate(bytes);
      memcpy(cut, good.data, bytes < good.bytes ? bytes : good.bytes);
      if (bytes == good.bytes) {
        OK(metis_ckks_fold_absorb(fold, cut, bytes, 1));
      } else {
        FAULT(metis_ckks_fold_absorb(fold, cut, bytes, 1), METIS_BLOCK_LENGTH);
      }
      free(cut);
    }
    metis_ckks_fold_destroy(fold);
    free(good.data);
  }
}

/* One bit anywhere, alone or among many blocks: the sums are what they were, and it is named. */
static void a_flipped_bit_is_found_and_leaves_no_trace(void) {
  for (size_t w = 0; w < 4; w++) {
    for (uint32_t polynomials = 1; polynomials <= 2; polynomials++) {
      const metis_ckks_context context = context_of(widths[w]);
      const metis_ckks_range range = range_of(2, polynomials);
      const metis_ckks_range any = range_of(2, 0);
      uint64_t *const c0 = random_limbs(&context, 2 * RING);
      uint64_t *const c1 = random_limbs(&context, 2 * RING);
      const void *blocks[BLOCKS];
      size_t bytes[BLOCKS];
      uint32_t weights[BLOCKS];
      metis_ckks_fold *fold = NULL;
      OK(metis_ckks_fold_create(&context, &fold));
      OK(metis_ckks_fold_begin(fold, &range));
      for (size_t b = 0; b < BLOCKS; b++) {
        const metis_ckks_range kind = range_of(2, b % 2 ? 1 : polynomials);
        const block good = seal(&context, &kind);
        blocks[b] = good.data;
        bytes[b] = good.bytes;
        /* In turn lazily, and beyond what 64 bits hold. */
        weights[b] = b % 5 == 4 ? UINT32_MAX - (uint32_t)b : (uint32_t)b + 1;
      }
      OK(metis_ckks_fold_absorb(fold, blocks[0], bytes[0], 5));
      const block before = finalised(fold);
      for (size_t round = 0; round < 100; round++) {
        const size_t bad = 1 + random_bits() % (BLOCKS - 1);
        const size_t count = round % 2 ? 1 : BLOCKS - 1;
        const size_t first = round % 2 ? bad : 1;
        const size_t at = random_bits() % bytes[bad];
        uint8_t *const byte = (uint8_t *)(uintptr_t)blocks[bad] + at;
        const uint8_t was = *byte;
        *byte ^= (uint8_t)(1 << random_bits() % 8);
        size_t position = SIZE_MAX;
        CHECK(metis_ckks_fold_absorb_many(fold, blocks + first, bytes + first, weights + first,
                                          count) == METIS_ERR_BLOCK,
              "byte %zu of block %zu", at, bad);
        const metis_block_fault fault = metis_block_fault_last(&position);
        CHECK(position == bad - first, "block %zu, not %zu", position + first, bad);
        CHECK(fault == (at < 4    ? METIS_BLOCK_MAGIC
                        : at == 4 ? METIS_BLOCK_VERSION
                                  : METIS_BLOCK_CHECKSUM),
              "byte %zu: %s", at, metis_error_text());
        FAULT(metis_ckks_open_block(&context, &any, blocks[bad], bytes[bad], c0, c1, 2 * RING),
              fault);
        FAULT(metis_ckks_fold_retract(fold, blocks[bad], bytes[bad], weights[bad]), fault);
        *byte = was;
        check_sums(fold, before, "a damaged block left a trace");
      }
      OK(metis_ckks_fold_absorb_many(fold, blocks + 1, bytes + 1, weights + 1, BLOCKS - 1));
      for (size_t b = 1; b < BLOCKS; b++) {
        OK(metis_ckks_fold_retract(fold, blocks[b], bytes[b], weights[b]));
      }
      check_sums(fold, before, "what was retracted left a trace");
      for (size_t b = 0; b < BLOCKS; b++) {
        free((void *)(uintptr_t)blocks[b]);
      }
      free(c0);
      free(c1);
      free(before.data);
      metis_ckks_fold_destroy(fold);
    }
  }
}

static void nothing_is_folded_twice(void) {
  const metis_ckks_context context = context_of(48);
  for (uint32_t polynomials = 1; polynomials <= 2; polynomials++) {
    const metis_ckks_range range = range_of(1, polynomials);
    const block a = seal(&context, &range);
    const block b = seal(&context, &range);
    const void *const blocks[3] = {b.data, a.data, b.data};
    const size_t bytes[3] = {b.bytes, a.bytes, b.bytes};
    const uint32_t weights[3] = {1, 1, 1};
    metis_ckks_fold *fold = NULL;
    size_t position = 0;
    OK(metis_ckks_fold_create(&context, &fold));
    OK(metis_ckks_fold_begin(fold, &range));
    OK(metis_ckks_fold_absorb(fold, a.data, a.bytes, 1));
    const block before = finalised(fold);
    FAULT(metis_ckks_fold_absorb(fold, a.data, a.bytes, 2), METIS_BLOCK_DUPLICATE);
    FAULT(metis_ckks_fold_absorb_many(fold, blocks, bytes, weights, 2), METIS_BLOCK_DUPLICATE);
    metis_block_fault_last(&position);
    CHECK(position == 1, "block %zu", position);
    OK(metis_ckks_fold_retract(fold, a.data, a.bytes, 1));
    FAULT(metis_ckks_fold_absorb_many(fold, blocks, bytes, weights, 3), METIS_BLOCK_DUPLICATE);
    metis_block_fault_last(&position);
    CHECK(position == 2, "block %zu", position);
    OK(metis_ckks_fold_absorb(fold, a.data, a.bytes, 1));
    check_sums(fold, before, "a block refused as a duplicate left a trace");
    OK(metis_ckks_fold_begin(fold, &range)); /* another range knows nothing of it */
    OK(metis_ckks_fold_absorb(fold, a.data, a.bytes, 1));
    free(a.data);
    free(b.data);
    free(before.data);
    metis_ckks_fold_destroy(fold);
  }
}

static void only_what_was_absorbed_is_retracted(void) {
  const metis_ckks_context context = context_of(32);
  for (uint32_t polynomials = 1; polynomials <= 2; polynomials++) {
    const metis_ckks_range range = range_of(1, polynomials);
    const block a = seal(&context, &range);
    const block b = seal(&context, &range);
    metis_ckks_fold *fold = NULL;
    OK(metis_ckks_fold_create(&context, &fold));
    OK(metis_ckks_fold_begin(fold, &range));
    OK(metis_ckks_fold_absorb(fold, a.data, a.bytes, 7));
    const block before = finalised(fold);
    REFUSED(metis_ckks_fold_retract(fold, b.data, b.bytes, 7), "was not absorbed");
    REFUSED(metis_ckks_fold_retract(fold, a.data, a.bytes, 6), "with a weight of 6");
    check_sums(fold, before, "a refused retraction left a trace");
    OK(metis_ckks_fold_retract(fold, a.data, a.bytes, 7));
    size_t bytes = 0;
    REFUSED(metis_ckks_fold_bytes(fold, &bytes), "absorbed nothing");
    free(a.data);
    free(b.data);
    free(before.data);
    metis_ckks_fold_destroy(fold);
  }
}

/* ---- what a call may be refused for ---------------------------------------------------------- */

static void bad_contexts_and_ranges_are_refused(void) {
  const metis_ckks_context good = context_of(44);
  const metis_ckks_range place = range_of(1, 1);
  metis_ckks_context context = good;
  metis_ckks_fold *fold = NULL;
  size_t bytes = 7;
#define CONTEXT_REFUSED(field, value, words)                                                       \
  do {                                                                                             \
    context = good;                                                                                \
    context.field = value;                                                                         \
    REFUSED(metis_ckks_fold_create(&context, &fold), words);                                       \
    REFUSED(metis_ckks_block_bytes(&context, 1, 1, 1, &bytes), words);                             \
  } while (0)
  CONTEXT_REFUSED(limb_bits, 0, "limbs of 0 bits");
  CONTEXT_REFUSED(limb_bits, 45, "limbs of 45 bits");
  CONTEXT_REFUSED(limb_bits, UINT32_MAX, "limbs of");
  CONTEXT_REFUSED(ring_dimension, 0, "ring dimension of 0");
  CONTEXT_REFUSED(ring_dimension, 512, "ring dimension of 512");
  CONTEXT_REFUSED(ring_dimension, 1 << 17, "ring dimension of 131072");
  CONTEXT_REFUSED(ring_dimension, 2000, "ring dimension of 2000");
  CONTEXT_REFUSED(modulus, 0, "modulus of 0");
  CONTEXT_REFUSED(modulus, good.modulus - 1, "odd");
  CONTEXT_REFUSED(modulus, good.modulus / 2, "exactly 44 bits");
  CONTEXT_REFUSED(modulus, good.modulus * 2 + 1, "exactly 44 bits");
  CONTEXT_REFUSED(modulus, UINT64_MAX, "exactly 44 bits");
  REFUSED(metis_ckks_fold_create(NULL, &fold), "context is NULL");
  REFUSED(metis_ckks_fold_create(&good, NULL), "out is NULL");
  CHECK(fold == NULL && bytes == 7, "written although it failed");

  REFUSED(metis_ckks_block_bytes(&good, 0, 1, 1, &bytes), "0 ciphertexts");
  REFUSED(metis_ckks_block_bytes(&good, 1025, 1, 1, &bytes), "1025 ciphertexts");
  REFUSED(metis_ckks_block_bytes(&good, 1, 0, 1, &bytes), "0 polynomials");
  REFUSED(metis_ckks_block_bytes(&good, 1, 3, 1, &bytes), "3 polynomials");
  REFUSED(metis_ckks_block_bytes(&good, 1, 1, 0, &bytes), "0 seeds");
  REFUSED(metis_ckks_block_bytes(&good, 1, 1, 1025, &bytes), "1025 seeds");
  REFUSED(metis_ckks_block_bytes(&good, 1, 2, 1, &bytes), "1 seeds");
  REFUSED(metis_ckks_block_bytes(&good, 1, 1, 1, NULL), "bytes is NULL");
  context = good;
  context.limb_bits = 52;
  context.modulus = ((uint64_t)1 << 52) - 1;
  context.ring_dimension = 1 << 16;
  OK(metis_ckks_block_bytes(&context, 1024, 2, 0, &bytes)); /* the largest there is */
  CHECK(bytes == 64 + (size_t)1024 * 2 * 65536 / 8 * 52, "%zu", bytes);

  OK(metis_ckks_fold_create(&good, &fold));
  metis_ckks_range range = place;
  REFUSED(metis_ckks_fold_begin(NULL, &range), "fold is NULL");
  REFUSED(metis_ckks_fold_begin(fold, NULL), "range is NULL");
  range.index = 5;
  REFUSED(metis_ckks_fold_begin(fold, &range), "block 5 of 5");
  range = place;
  range.ciphertexts = 1025;
  REFUSED(metis_ckks_fold_begin(fold, &range), "1025 ciphertexts");
  range = place;
  range.polynomials = 0;
  REFUSED(metis_ckks_fold_begin(fold, &range), "0 polynomials");
  metis_ckks_fold_destroy(fold);
  metis_ckks_fold_destroy(NULL);
}

static void bad_arguments_of_a_fold_are_refused(void) {
  const metis_ckks_context context = context_of(52);
  const metis_ckks_range range = range_of(1, 1);
  const block good = seal(&context, &range);
  const void *const blocks[2] = {good.data, NULL};
  const size_t bytes[2] = {good.bytes, good.bytes};
  const uint32_t weights[2] = {1, 1};
  const uint32_t bad_weights[2] = {0, 1};
  uint8_t out[16];
  size_t out_bytes = 7;
  metis_ckks_fold *fold = NULL;
  OK(metis_ckks_fold_create(&context, &fold));
  REFUSED(metis_ckks_fold_absorb(fold, good.data, good.bytes, 1), "has not begun");
  REFUSED(metis_ckks_fold_retract(fold, good.data, good.bytes, 1), "has not begun");
  REFUSED(metis_ckks_fold_bytes(fold, &out_bytes), "absorbed nothing");
  REFUSED(metis_ckks_fold_finalise(fold, out, sizeof out), "absorbed nothing");
  OK(metis_ckks_fold_begin(fold, &range));
  REFUSED(metis_ckks_fold_absorb(NULL, good.data, good.bytes, 1), "fold is NULL");
  REFUSED(metis_ckks_fold_absorb(fold, NULL, good.bytes, 1), "block 0 is NULL");
  REFUSED(metis_ckks_fold_absorb(fold, good.data, good.bytes, 0), "weight of block 0 is 0");
  REFUSED(metis_ckks_fold_absorb_many(fold, NULL, bytes, weights, 1), "blocks is NULL");
  REFUSED(metis_ckks_fold_absorb_many(fold, blocks, NULL, weights, 1), "bytes is NULL");
  REFUSED(metis_ckks_fold_absorb_many(fold, blocks, bytes, NULL, 1), "weights is NULL");
  REFUSED(metis_ckks_fold_absorb_many(fold, blocks, bytes, weights, 2), "block 1 is NULL");
  REFUSED(metis_ckks_fold_absorb_many(fold, blocks, bytes, bad_weights, 1), "weight of block 0");
  OK(metis_ckks_fold_absorb_many(fold, blocks, bytes, weights, 0));
  REFUSED(metis_ckks_fold_bytes(fold, &out_bytes), "absorbed nothing");
  OK(metis_ckks_fold_absorb(fold, good.data, good.bytes, 1));
  REFUSED(metis_ckks_fold_bytes(NULL, &out_bytes), "fold is NULL");
  REFUSED(metis_ckks_fold_bytes(fold, NULL), "bytes is NULL");
  REFUSED(metis_ckks_fold_finalise(NULL, out, sizeof out), "fold is NULL");
  REFUSED(metis_ckks_fold_finalise(fold, NULL, good.bytes), "out is NULL");
  REFUSED(metis_ckks_fold_finalise(fold, out, sizeof out), "room for 16 bytes");
  REFUSED(metis_ckks_fold_retract(NULL, good.data, good.bytes, 1), "fold is NULL");
  REFUSED(metis_ckks_fold_retract(fold, NULL, good.bytes, 1), "block 0 is NULL");
  REFUSED(metis_ckks_fold_retract(fold, good.data, good.bytes, 0), "weight of block 0 is 0");
  CHECK(out_bytes == 7, "written although it failed");
  metis_ckks_fold_destroy(fold);
  free(good.data);
}

static void bad_limbs_are_refused(void) {
  const metis_ckks_context context = context_of(44);
  const metis_ckks_range one = range_of(1, 1);
  const metis_ckks_range two = range_of(1, 2);
  const uint8_t seed[METIS_SEED_BYTES] = {1};
  uint64_t *const c0 = random_limbs(&context, RING);
  uint64_t *const c1 = random_limbs(&context, RING);
  uint64_t *const s = random_limbs(&context, RING);
  uint8_t out[200] = {9};
  const block b = seal(&context, &one);
#define SEAL(range, c0, c1, limbs, seed)                                                           \
  metis_ckks_seal_block(&context, range, c0, c1, limbs, seed, out, sizeof out)
  REFUSED(SEAL(&one, c0, c1, RING, seed), "need a seed and no c1");
  REFUSED(SEAL(&one, c0, NULL, RING, NULL), "need a seed and no c1");
  REFUSED(SEAL(&two, c0, c1, RING, seed), "need a c1 and no seed");
  REFUSED(SEAL(&two, c0, NULL, RING, NULL), "need a c1 and no seed");
  REFUSED(SEAL(&one, NULL, NULL, RING, seed), "c0 is NULL");
  REFUSED(SEAL(&one, c0, NULL, RING - 1, seed), "1023 limbs of c0");
  REFUSED(SEAL(&one, c0, NULL, RING, seed), "room for 200 bytes");
  REFUSED(SEAL(NULL, c0, NULL, RING, seed), "range is NULL");
  REFUSED(metis_ckks_seal_block(NULL, &one, c0, NULL, RING, seed, out, 9), "context is NULL");
  REFUSED(metis_ckks_seal_block(&context, &one, c0, NULL, RING, seed, NULL, b.bytes), "room for 0");
  c1[RING - 1] = context.modulus;
  REFUSED(SEAL(&two, c0, c1, RING, NULL), "limb 1023 of c1");
#define RESEED(c0, c1, limbs, s, seed) metis_ckks_reseed(&context, c0, c1, limbs, s, seed, 0)
  REFUSED(RESEED(c0, c1, RING, s, seed), "limb 1023 of c1");
  c1[RING - 1] = 0;
  s[5] = UINT64_MAX;
  REFUSED(RESEED(c0, c1, RING, s, seed), "limb 5 of secret");
  s[5] = 0;
  REFUSED(RESEED(NULL, c1, RING, s, seed), "c0 is NULL");
  REFUSED(RESEED(c0, NULL, RING, s, seed), "c1 is NULL");
  REFUSED(RESEED(c0, c1, RING, NULL, seed), "secret is NULL");
  REFUSED(RESEED(c0, c1, RING, s, NULL), "seed is NULL");
  REFUSED(RESEED(c0, c1, RING + 1, s, seed), "1025 limbs are not");
  REFUSED(metis_ckks_reseed(NULL, c0, c1, RING, s, seed, 0), "context is NULL");
  c0[0] = context.modulus;
  REFUSED(SEAL(&one, c0, NULL, RING, seed), "limb 0 of c0");
  REFUSED(RESEED(c0, c1, RING, s, seed), "limb 0 of c0");
  REFUSED(metis_ckks_expand(&context, NULL, 0, c0, RING), "seed is NULL");
  REFUSED(metis_ckks_expand(&context, seed, 0, NULL, RING), "out is NULL");
  REFUSED(metis_ckks_expand(&context, seed, 0, c0, RING + 1), "1025 limbs of out");
  REFUSED(metis_ckks_expand(NULL, seed, 0, c0, RING), "context is NULL");
#define OPEN(data, c0, c1, limbs)                                                                  \
  metis_ckks_open_block(&context, &one, data, b.bytes, c0, c1, limbs)
  REFUSED(OPEN(NULL, c0, c1, RING), "block is NULL");
  REFUSED(OPEN(b.data, NULL, c1, RING), "c0 is NULL");
  REFUSED(OPEN(b.data, c0, NULL, RING), "c1 is NULL");
  REFUSED(OPEN(b.data, c0, c1, RING - 1), "1023 limbs of c0");
  CHECK(out[0] == 9 && c0[0] == context.modulus, "written although it failed");
  free(c0);
  free(c1);
  free(s);
  free(b.data);
}

/* ---- the wire format ------------------------------------------------------------------------- */

/* The test vectors of metis.h. */
static void seeds_expand_as_specified(void) {
  static const struct {
    unsigned bits;
    uint64_t modulus;
    uint64_t ciphertext;
    uint64_t limbs[4]; /* the first three and the last of 2048 */
  } rows[] = {
      {32, 0xFFFFD001, 0, {0x373BA1C6, 0x825B8F87, 0x62814F6F, 0x39DD5159}},
      {44, 0xFFFFFFFC001, 0, {0xF87373BA1C6, 0x8A162814F6F, 0xCDD63D37CE3, 0xBF0C4B81924}},
      {48, 0xFFFFFFFFC001, 0, {0x8F87373BA1C6, 0xC8A162814F6F, 0x7CDD63D37CE3, 0x6BF0C4B81924}},
      {52,
       0xFFFFFFFFFC001,
       0,
       {0xB8F87373BA1C6, 0x8C8A162814F6F, 0x77CDD63D37CE3, 0x96BF0C4B81924}},
      {32, 0x8000000B, 7, {0x3C182375, 0x3C3A35B6, 0x2A2635B2, 0x26792741}},
      {52, 0x8000000000015, 7, {0x4AE73C3A35B6, 0x56B012A2635B2, 0x78F6C212F4894, 0x42DE7F528FA1F}},
  };
  uint8_t seed[METIS_SEED_BYTES];
  for (uint8_t i = 0; i < sizeof seed; i++) {
    seed[i] = i;
  }
  for (size_t r = 0; r < sizeof rows / sizeof rows[0]; r++) {
    const metis_ckks_context context = {
        .modulus = rows[r].modulus, .limb_bits = rows[r].bits, .ring_dimension = 2048};
    uint64_t limbs[2048];
    OK(metis_ckks_expand(&context, seed, rows[r].ciphertext, limbs, 2048));
    for (size_t i = 0; i < 4; i++) {
      const uint64_t limb = limbs[i < 3 ? i : 2047];
      CHECK(limb == rows[r].limbs[i], "row %zu: %llx", r, (unsigned long long)limb);
    }
  }
}

int main(void) {
  each_field_has_its_fault();
  a_cut_block_is_refused();
  a_flipped_bit_is_found_and_leaves_no_trace();
  nothing_is_folded_twice();
  only_what_was_absorbed_is_retracted();
  bad_contexts_and_ranges_are_refused();
  bad_arguments_of_a_fold_are_refused();
  bad_limbs_are_refused();
  seeds_expand_as_specified();
  return 0;
}
