/* The fold of encrypted blocks: the handle, and what may be folded together.
 *
 * Law: a call looks at every header and every seed before it adds; and, since each payload is read
 * only once, takes its checksum while it adds. Sums modulo q can be undone to the bit: when a call
 * fails, what it added is subtracted, and neither a residue nor a seed has changed.
 */
#include "metis_ckks_impl.h"

#include <stdlib.h>
#include <string.h>

enum {
  CACHE_LINE_BYTES = 64,
  RECORDS_MAX = 1 << 16, /* where seeds are expanded they are kept only to know them again */
};

/* What was absorbed: a seed, or a block of two polynomials. */
typedef struct {
  uint64_t id[2]; /* the seed, or the first bytes of the limbs, which no two encryptions share */
  uint32_t crc;   /* of the payload; 0 for a seed */
  uint32_t weight;
  bool is_seed;
} record;

struct metis_ckks_fold {
  const metis_kernels *kernels;
  metis_ckks_context context;
  metis_modulus modulus;
  metis_ckks_range range; /* count 0: none has begun */
  metis_sums sums[2];     /* of c0 and, with two polynomials, of c1 */
  size_t capacity[2];     /* values allocated */
  record *records;
  size_t records_count;
  size_t records_capacity;
  metis_block_view *views; /* of the blocks of one call */
  size_t views_capacity;
};

static metis_status refuse_memory(size_t bytes) {
  metis_refuse("no memory for %zu bytes of a fold", bytes);
  return METIS_ERR_MEMORY;
}

metis_status metis_ckks_fold_create(const metis_ckks_context *context, metis_ckks_fold **out) {
  const metis_status status = metis_check_context(context);
  if (status != METIS_OK) {
    return status;
  }
  if (out == NULL) {
    return metis_refuse("out is NULL");
  }
  metis_ckks_fold *self = calloc(1, sizeof *self);
  if (self == NULL) {
    return refuse_memory(sizeof *self);
  }
  self->kernels = metis_pick_kernels();
  self->context = *context;
  self->modulus = metis_modulus_of(context);
  for (size_t p = 0; p < 2; p++) {
    self->sums[p] = (metis_sums){.kernels = self->kernels,
                                 .modulus = &self->modulus,
                                 .ring_dimension = context->ring_dimension};
  }
  *out = self;
  return METIS_OK;
}

void metis_ckks_fold_destroy(metis_ckks_fold *self) {
  if (self != NULL) {
    free(self->sums[0].values);
    free(self->sums[1].values);
    free(self->records);
    free(self->views);
    free(self);
  }
}

static metis_status reserve_sums(metis_ckks_fold *self, size_t p, size_t count) {
  if (self->capacity[p] < count) {
    free(self->sums[p].values);
    self->capacity[p] = 0;
    /* Whole polynomials: a multiple of the cache line. */
    self->sums[p].values = aligned_alloc(CACHE_LINE_BYTES, count * sizeof(uint64_t));
    if (self->sums[p].values == NULL) {
      return refuse_memory(count * sizeof(uint64_t));
    }
    self->capacity[p] = count;
  }
  self->sums[p].count = count;
  metis_sums_clear(&self->sums[p]);
  return METIS_OK;
}

metis_status metis_ckks_fold_begin(metis_ckks_fold *self, const metis_ckks_range *range) {
  if (self == NULL) {
    return metis_refuse("the fold is NULL: not created, or closed");
  }
  const metis_status status = metis_check_range(range, 1);
  if (status != METIS_OK) {
    return status;
  }
  self->range.count = 0;
  self->records_count = 0;
  for (size_t p = 0; p < range->polynomials; p++) {
    const metis_status memory =
        reserve_sums(self, p, (size_t)range->ciphertexts * self->context.ring_dimension);
    if (memory != METIS_OK) {
      return memory;
    }
  }
  self->range = *range;
  return METIS_OK;
}

/* ---- what was absorbed ----------------------------------------------------------------------- */

static bool same(const record *a, const record *b) {
  return ((a->id[0] ^ b->id[0]) | (a->id[1] ^ b->id[1])) == 0 && a->crc == b->crc &&
         a->is_seed == b->is_seed;
}

/* The index of an equal one among the first `count`, else `count`. */
static size_t find(const metis_ckks_fold *self, size_t count, const record *wanted) {
  for (size_t i = 0; i < count; i++) {
    if (same(&self->records[i], wanted)) {
      return i;
    }
  }
  return count;
}

static size_t records_of(const metis_block_view *view) {
  return view->polynomials == 1 ? view->seeds_count : 1;
}

/* The weight may be above 32 bits: record.weight is not set here. */
static uint64_t read_record(const metis_block_view *view, size_t i, uint32_t weight, record *out) {
  *out = (record){.is_seed = view->polynomials == 1};
  if (out->is_seed) {
    const uint8_t *const entry = view->seeds + i * METIS_SEED_ENTRY_BYTES;
    memcpy(out->id, entry, sizeof out->id);
    return (uint64_t)weight * metis_load_u32(entry + METIS_SEED_BYTES);
  }
  memcpy(out->id, view->c0, sizeof out->id);
  out->crc = view->payload_crc;
  return weight;
}

/* Writes the records of a block from `count` on, where there is room for them. */
static metis_status admit(metis_ckks_fold *self, const metis_block_view *view, uint32_t weight,
                          size_t position, size_t count) {
  for (size_t i = 0; i < records_of(view); i++) {
    record *const added = &self->records[count + i];
    const uint64_t weighted = read_record(view, i, weight, added);
    if (weighted == 0 || weighted > UINT32_MAX) {
      return metis_refuse_block(position, METIS_BLOCK_WEIGHT,
                                "seed %zu of a block has weight %llu, allowed: 1 to 2^32 - 1", i,
                                (unsigned long long)weighted);
    }
    added->weight = (uint32_t)weighted;
    if (find(self, count + i, added) < count + i) {
      return metis_refuse_block(position, METIS_BLOCK_DUPLICATE,
                                added->is_seed ? "seed %zu of a block was absorbed before"
                                               : "a block was absorbed before",
                                i);
    }
  }
  return METIS_OK;
}

static metis_status reserve(void **memory, size_t *capacity, size_t count, size_t item_bytes) {
  if (*capacity < count) {
    const size_t grown = count < 2 * *capacity ? 2 * *capacity : count;
    void *const moved = realloc(*memory, grown * item_bytes);
    if (moved == NULL) {
      return refuse_memory(grown * item_bytes);
    }
    *memory = moved;
    *capacity = grown;
  }
  return METIS_OK;
}

/* ---- absorb ---------------------------------------------------------------------------------- */

static metis_status check_arguments(const metis_ckks_fold *self, const void *const *blocks,
                                    const size_t *bytes, const uint32_t *weights, size_t count) {
  if (self == NULL) {
    return metis_refuse("the fold is NULL: not created, or closed");
  }
  if (self->range.count == 0) {
    return metis_refuse("the fold has not begun a range");
  }
  if (blocks == NULL || bytes == NULL || weights == NULL) {
    return metis_refuse("%s is NULL", blocks == NULL  ? "blocks"
                                      : bytes == NULL ? "bytes"
                                                      : "weights");
  }
  for (size_t b = 0; b < count; b++) {
    if (blocks[b] == NULL) {
      return metis_refuse("block %zu is NULL", b);
    }
    if (weights[b] == 0) {
      return metis_refuse("the weight of block %zu is 0, allowed: 1 to 2^32 - 1", b);
    }
  }
  return METIS_OK;
}

/* Fills self->views from the headers, after all checks of these. */
static metis_status view_blocks(metis_ckks_fold *self, const void *const *blocks,
                                const size_t *bytes, size_t count) {
  metis_ckks_range expected = self->range;
  expected.polynomials = self->range.polynomials == 1 ? 1 : 0;
  void *views = self->views;
  metis_status status = reserve(&views, &self->views_capacity, count, sizeof self->views[0]);
  self->views = views;
  for (size_t b = 0; b < count && status == METIS_OK; b++) {
    status = metis_read_header(&self->context, &expected, blocks[b], bytes[b], b, &self->views[b]);
  }
  return status;
}

static metis_status check_payloads(const metis_ckks_fold *self, size_t count) {
  metis_status status = METIS_OK;
  for (size_t b = 0; b < count && status == METIS_OK; b++) {
    status = metis_check_payload(self->kernels, &self->views[b], b);
  }
  return status;
}

/* Writes the records of all views behind those that count; *records is how many there are then. */
static metis_status admit_blocks(metis_ckks_fold *self, const uint32_t *weights, size_t count,
                                 size_t *records) {
  const size_t records_max =
      self->range.polynomials == 1 ? METIS_BLOCK_SEEDS_MAX : (size_t)RECORDS_MAX;
  *records = self->records_count;
  for (size_t b = 0; b < count; b++) {
    const size_t added = records_of(&self->views[b]);
    if (added > records_max - *records) {
      return metis_refuse_block(b, METIS_BLOCK_SEEDS,
                                "%zu seeds more than the %zu absorbed, allowed together: %zu",
                                added, *records, records_max);
    }
    void *grown = self->records;
    metis_status status =
        reserve(&grown, &self->records_capacity, *records + added, sizeof self->records[0]);
    self->records = grown;
    if (status == METIS_OK) {
      status = admit(self, &self->views[b], weights[b], b, *records);
    }
    if (status != METIS_OK) {
      return status;
    }
    *records += added;
  }
  return METIS_OK;
}

static const uint8_t *second_polynomials(const metis_ckks_fold *self,
                                         const metis_block_view *view) {
  return view->c0 + self->range.ciphertexts * metis_poly_bytes(&self->context);
}

/* Adds the limbs of up to METIS_BLOCKS_AT_ONCE blocks from `first` on and, since each byte is read
 * once, only then knows their checksums: whoever gets a refusal has to subtract them again. */
static metis_status add_and_check(metis_ckks_fold *self, const uint32_t *weights, size_t first,
                                  size_t count) {
  const uint8_t *packed[METIS_BLOCKS_AT_ONCE];
  uint32_t crcs[METIS_BLOCKS_AT_ONCE];
  const uint8_t *second[METIS_BLOCKS_AT_ONCE];
  uint32_t second_weights[METIS_BLOCKS_AT_ONCE];
  uint32_t second_crcs[METIS_BLOCKS_AT_ONCE];
  size_t seconds = 0;
  for (size_t b = 0; b < count; b++) {
    const metis_block_view *const view = &self->views[first + b];
    packed[b] = view->c0;
    crcs[b] = self->kernels->crc32c(0, view->payload, (size_t)(view->c0 - view->payload));
  }
  metis_sums_add_packed(&self->sums[0], packed, weights + first, crcs, count);
  for (size_t b = 0; b < count; b++) {
    if (self->views[first + b].polynomials == 2) {
      second[seconds] = second_polynomials(self, &self->views[first + b]);
      second_weights[seconds] = weights[first + b];
      second_crcs[seconds++] = crcs[b];
    }
  }
  if (seconds > 0) {
    metis_sums_add_packed(&self->sums[1], second, second_weights, second_crcs, seconds);
  }
  metis_status status = METIS_OK;
  for (size_t b = 0, s = 0; b < count && status == METIS_OK; b++) {
    const metis_block_view *const view = &self->views[first + b];
    status =
        metis_compare_crc(view, view->polynomials == 2 ? second_crcs[s++] : crcs[b], first + b);
  }
  return status;
}

static void subtract(metis_ckks_fold *self, const metis_block_view *view, uint32_t weight) {
  metis_sums_subtract_packed(&self->sums[0], view->c0, weight);
  if (view->polynomials == 2) {
    metis_sums_subtract_packed(&self->sums[1], second_polynomials(self, view), weight);
  }
}

metis_status metis_ckks_fold_absorb_many(metis_ckks_fold *self, const void *const *blocks,
                                         const size_t *bytes, const uint32_t *weights,
                                         size_t count) {
  size_t records = 0;
  metis_status status = check_arguments(self, blocks, bytes, weights, count);
  if (status == METIS_OK) {
    status = view_blocks(self, blocks, bytes, count);
  }
  if (status == METIS_OK) {
    status = admit_blocks(self, weights, count, &records);
    if (status == METIS_ERR_BLOCK) { /* or the seeds were damaged: then that is what to say */
      const metis_status damage = check_payloads(self, count);
      return damage != METIS_OK ? damage : admit_blocks(self, weights, count, &records);
    }
  }
  for (size_t first = 0; first < count && status == METIS_OK; first += METIS_BLOCKS_AT_ONCE) {
    const size_t left = count - first;
    const size_t size = left < METIS_BLOCKS_AT_ONCE ? left : METIS_BLOCKS_AT_ONCE;
    status = add_and_check(self, weights, first, size);
    for (size_t b = 0; b < first + size && status != METIS_OK; b++) {
      subtract(self, &self->views[b], weights[b]);
    }
  }
  if (status != METIS_OK) {
    return status;
  }
  for (size_t i = self->records_count; i < records && self->range.polynomials == 2; i++) {
    if (self->records[i].is_seed) {
      metis_sums_add_seed(&self->sums[1], (const uint8_t *)self->records[i].id,
                          self->records[i].weight);
    }
  }
  self->records_count = records;
  return METIS_OK;
}

metis_status metis_ckks_fold_absorb(metis_ckks_fold *self, const void *block, size_t bytes,
                                    uint32_t weight) {
  return metis_ckks_fold_absorb_many(self, &block, &bytes, &weight, 1);
}

metis_status metis_ckks_fold_retract(metis_ckks_fold *self, const void *block, size_t bytes,
                                     uint32_t weight) {
  metis_status status = check_arguments(self, &block, &bytes, &weight, 1);
  if (status == METIS_OK) {
    status = view_blocks(self, &block, &bytes, 1);
  }
  if (status == METIS_OK) {
    status = check_payloads(self, 1);
  }
  if (status != METIS_OK) {
    return status;
  }
  const metis_block_view *const view = &self->views[0];
  for (size_t i = 0; i < records_of(view); i++) {
    record wanted;
    const uint64_t weighted = read_record(view, i, weight, &wanted);
    const size_t found = find(self, self->records_count, &wanted);
    if (found == self->records_count || self->records[found].weight != weighted) {
      return metis_refuse("a block to retract was not absorbed with a weight of %u", weight);
    }
  }
  subtract(self, view, weight);
  for (size_t i = 0; i < records_of(view); i++) {
    record wanted;
    const uint64_t weighted = read_record(view, i, weight, &wanted);
    const size_t found = find(self, self->records_count, &wanted);
    if (wanted.is_seed && self->range.polynomials == 2) {
      metis_sums_subtract_seed(&self->sums[1], (const uint8_t *)wanted.id, (uint32_t)weighted);
    }
    self->records_count--;
    memmove(&self->records[found], &self->records[found + 1],
            (self->records_count - found) * sizeof self->records[0]);
  }
  return METIS_OK;
}

/* ---- finalise -------------------------------------------------------------------------------- */

static uint32_t seeds_carried(const metis_ckks_fold *self) {
  return self->range.polynomials == 1 ? (uint32_t)self->records_count : 0;
}

metis_status metis_ckks_fold_bytes(const metis_ckks_fold *self, size_t *bytes) {
  if (self == NULL) {
    return metis_refuse("the fold is NULL: not created, or closed");
  }
  if (bytes == NULL) {
    return metis_refuse("bytes is NULL");
  }
  if (self->range.count == 0 || self->records_count == 0) {
    return metis_refuse("the fold has absorbed nothing");
  }
  *bytes = metis_block_bytes(&self->context, self->range.ciphertexts, self->range.polynomials,
                             seeds_carried(self));
  return METIS_OK;
}

metis_status metis_ckks_fold_finalise(metis_ckks_fold *self, void *out, size_t out_bytes) {
  size_t expected = 0;
  const metis_status status = metis_ckks_fold_bytes(self, &expected);
  if (status != METIS_OK) {
    return status;
  }
  if (out == NULL) {
    return metis_refuse("out is NULL");
  }
  if (out_bytes != expected) {
    return metis_refuse("room for %zu bytes, but the block has %zu", out_bytes, expected);
  }
  uint8_t *const block = out;
  uint8_t *at = block + METIS_BLOCK_HEADER_BYTES;
  for (size_t i = 0; i < seeds_carried(self); i++, at += METIS_SEED_ENTRY_BYTES) {
    memcpy(at, self->records[i].id, METIS_SEED_BYTES);
    metis_store_u32(at + METIS_SEED_BYTES, self->records[i].weight);
  }
  const size_t bytes = self->range.ciphertexts * metis_poly_bytes(&self->context);
  for (size_t p = 0; p < self->range.polynomials; p++, at += bytes) {
    metis_sums_reduce(&self->sums[p]);
    self->kernels->pack(at, self->sums[p].values, self->sums[p].count, self->modulus.bits);
  }
  metis_write_header(self->kernels, &self->context, &self->range, seeds_carried(self), block);
  return METIS_OK;
}
