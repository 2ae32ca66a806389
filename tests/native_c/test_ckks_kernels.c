/* Every kernel of the encrypted fold, at every k, equals 128-bit arithmetic; and so the kernel sets
 * equal each other. Meant to run under ASan and UBSan. */
#include "check.h"
#include "metis_ckks_impl.h"

#include <string.h>

enum { WIDTHS = 4, GUARD = 0x5A };

static const unsigned widths[WIDTHS] = {32, 44, 48, 52};
static const metis_kernels *kernel_sets[2];
static size_t kernel_sets_count;

/* ---- the reference --------------------------------------------------------------------------- */

/* Bit by bit, as metis.h says: limb i begins at bit i * k, the first one lowest. */
static uint64_t limb_of(const uint8_t *packed, size_t i, unsigned bits) {
  uint64_t limb = 0;
  for (unsigned b = 0; b < bits; b++) {
    const size_t at = i * bits + b;
    limb |= (uint64_t)(packed[at / 8] >> at % 8 & 1) << b;
  }
  return limb;
}

static void fill(uint8_t *data, size_t bytes) {
  const uint64_t kind = random_bits() % 4; /* sometimes all bits set, or none */
  for (size_t i = 0; i < bytes; i++) {
    data[i] = kind == 0 ? 0xFF : kind == 1 ? 0 : (uint8_t)(random_bits() >> 13);
  }
}

/* The moduli at both ends of what `bits` allows, and the one that is in use. */
static uint64_t modulus_of(unsigned bits, size_t which) {
  const uint64_t highest = ((uint64_t)1 << bits) - 1;
  return which == 0 ? highest : which == 1 ? (highest >> 1) + 2 : highest - 16382;
}

static metis_modulus make_modulus(unsigned bits, size_t which) {
  const metis_ckks_context context = {
      .modulus = modulus_of(bits, which), .limb_bits = bits, .ring_dimension = 1024};
  CHECK(metis_check_context(&context) == METIS_OK, "%s", metis_error_text());
  return metis_modulus_of(&context);
}

/* Of `bits` bits, and often at a boundary. */
static uint64_t random_limb(uint64_t q, unsigned bits) {
  const uint64_t highest = ((uint64_t)1 << bits) - 1;
  const uint64_t chosen[] = {0, 1, q - 1, q, highest, highest / 2};
  const uint64_t draw = random_bits();
  return draw % 4 == 0 ? chosen[(draw >> 8) % 6] : draw >> 9 & highest;
}

/* ---- packed limbs ---------------------------------------------------------------------------- */

typedef struct {
  size_t limbs;
  size_t blocks;
  size_t offset; /* how far the blocks are from an aligned address */
  bool fresh;
  bool weighted;
} add_case;

static void add_at(const metis_kernels *set, unsigned bits, add_case c) {
  const size_t bytes = c.limbs / 2 * bits / 4;
  uint8_t *memory[METIS_BLOCKS_AT_ONCE];
  const uint8_t *packed[METIS_BLOCKS_AT_ONCE];
  uint32_t weights[METIS_BLOCKS_AT_ONCE];
  uint32_t crcs[METIS_BLOCKS_AT_ONCE];
  uint32_t want_crcs[METIS_BLOCKS_AT_ONCE];
  for (size_t b = 0; b < c.blocks; b++) {
    memory[b] = allocate(c.offset + bytes);
    packed[b] = memory[b] + c.offset;
    fill(memory[b], c.offset + bytes);
    weights[b] = c.weighted ? (uint32_t)random_bits() >> random_bits() % 32 : 1;
    crcs[b] = (uint32_t)random_bits();
    want_crcs[b] = metis_crc32c_portable(crcs[b], packed[b], bytes);
  }
  uint64_t *have = allocate(c.limbs * sizeof *have);
  uint64_t *want = allocate(c.limbs * sizeof *want);
  for (size_t i = 0; i < c.limbs; i++) {
    have[i] = random_bits();
    metis_u128 sum = c.fresh ? 0 : have[i];
    for (size_t b = 0; b < c.blocks; b++) {
      sum += (metis_u128)limb_of(packed[b], i, bits) * weights[b];
    }
    want[i] = (uint64_t)sum;
  }
  set->add_packed(have, c.fresh, packed, weights, crcs, c.blocks, c.limbs, bits);
  for (size_t i = 0; i < c.limbs; i++) {
    CHECK(have[i] == want[i], "%s, k %u, %zu limbs, %zu blocks, fresh %d, weighted %d: sum %zu",
          set->name, bits, c.limbs, c.blocks, c.fresh, c.weighted, i);
  }
  for (size_t b = 0; b < c.blocks; b++) {
    CHECK(crcs[b] == want_crcs[b], "%s, k %u, %zu limbs, %zu blocks: checksum %zu", set->name, bits,
          c.limbs, c.blocks, b);
    free(memory[b]);
  }
  free(have);
  free(want);
}

static void sums_and_checksums_are_exact(void) {
  static const size_t lengths[] = {0,   2,   4,    6,    8,    14,   16,   18,   30,  32,  46,
                                   48,  50,  62,   64,   94,   96,   98,   142,  144, 146, 510,
                                   512, 514, 1022, 1024, 1026, 1040, 2048, 2050, 3072};
  for (size_t s = 0; s < kernel_sets_count; s++) {
    for (size_t w = 0; w < WIDTHS; w++) {
      for (size_t n = 0; n < sizeof lengths / sizeof lengths[0]; n++) {
        for (size_t blocks = 1; blocks <= METIS_BLOCKS_AT_ONCE;
             blocks += lengths[n] < 200 || blocks < 5 ? 1 : 4) {
          const size_t draw = random_bits();
          add_at(kernel_sets[s], widths[w],
                 (add_case){.limbs = lengths[n],
                            .blocks = blocks,
                            .offset = draw % 8,
                            .fresh = draw >> 8 & 1,
                            .weighted = draw >> 9 & 1});
        }
      }
    }
  }
}

static void unpacking_undoes_packing(void) {
  for (size_t s = 0; s < kernel_sets_count; s++) {
    for (size_t w = 0; w < WIDTHS; w++) {
      const unsigned bits = widths[w];
      for (size_t count = 0; count < 70; count += 2) {
        const size_t bytes = count / 2 * bits / 4;
        const size_t offset = count / 2 % 8;
        uint64_t *limbs = allocate(count * sizeof *limbs);
        uint64_t *back = allocate(count * sizeof *back);
        uint8_t *memory = allocate(offset + bytes);
        for (size_t i = 0; i < count; i++) {
          limbs[i] = random_limb(modulus_of(bits, 2), bits);
        }
        memset(memory, GUARD, offset + bytes);
        kernel_sets[s]->pack(memory + offset, limbs, count, bits);
        kernel_sets[s]->unpack(back, memory + offset, count, bits);
        for (size_t i = 0; i < count; i++) {
          CHECK(limb_of(memory + offset, i, bits) == limbs[i], "%s, k %u, %zu limbs: packed %zu",
                kernel_sets[s]->name, bits, count, i);
          CHECK(back[i] == limbs[i], "%s, k %u, %zu limbs: unpacked %zu", kernel_sets[s]->name,
                bits, count, i);
        }
        CHECK(offset == 0 || memory[offset - 1] == GUARD, "written before the start");
        free(limbs);
        free(back);
        free(memory);
      }
    }
  }
}

/* ---- limbs modulo q -------------------------------------------------------------------------- */

static void residues_are_exact(unsigned bits, size_t which) {
  enum { COUNT = 77 };
  const metis_modulus m = make_modulus(bits, which);
  const uint32_t weights[] = {
      1, 2, 3, UINT32_MAX, UINT32_MAX - 1, 1u << 31, (uint32_t)random_bits() | 1};
  uint64_t limbs[COUNT];
  uint64_t start[COUNT];
  for (size_t w = 0; w < sizeof weights / sizeof weights[0]; w++) {
    const uint32_t weight = weights[w];
    uint64_t lazy[COUNT];
    uint64_t added[COUNT] = {0};
    uint64_t subtracted[COUNT] = {0};
    uint64_t both[COUNT];
    for (size_t i = 0; i < COUNT; i++) {
      limbs[i] = random_limb(m.q, bits);
      start[i] = random_limb(m.q, bits);
      lazy[i] = both[i] = start[i];
    }
    metis_add_limbs(lazy, limbs, COUNT, weight);
    metis_add_reduced(added, limbs, COUNT, weight, &m);
    metis_subtract_reduced(subtracted, limbs, COUNT, weight, &m);
    metis_add_reduced(both, limbs, COUNT, weight, &m);
    metis_subtract_reduced(both, limbs, COUNT, weight, &m);
    for (size_t i = 0; i < COUNT; i++) {
      const metis_u128 product = (metis_u128)limbs[i] * weight;
      CHECK(lazy[i] == start[i] + (uint64_t)product, "k %u, lazy %zu", bits, i);
      CHECK(added[i] % m.q == (uint64_t)(product % m.q), "k %u, q %zu, weight %u, limb %llu", bits,
            which, weight, (unsigned long long)limbs[i]);
      CHECK(added[i] / METIS_REDUCED_UNITS < m.q, "k %u: %llu is too much", bits,
            (unsigned long long)added[i]);
      CHECK((added[i] + subtracted[i]) % m.q == 0, "k %u, weight %u: not the negative", bits,
            weight);
      CHECK(subtracted[i] <= METIS_REDUCED_UNITS * m.q, "k %u: %llu is too much", bits,
            (unsigned long long)subtracted[i]);
      CHECK(both[i] % m.q == start[i] % m.q, "k %u, weight %u: not undone", bits, weight);
    }
  }
}

static void reductions_are_exact(unsigned bits, size_t which) {
  enum { COUNT = 203 };
  const metis_modulus m = make_modulus(bits, which);
  uint64_t values[COUNT];
  uint64_t want[COUNT];
  for (size_t i = 0; i < COUNT; i++) {
    const uint64_t multiple = random_bits() / m.q * m.q; /* around multiples of q errors show */
    values[i] = i % 3 == 0   ? random_bits()
                : i % 3 == 1 ? multiple + random_bits() % 3 - 1
                             : UINT64_MAX - random_bits() % 5;
    want[i] = values[i] % m.q;
  }
  metis_reduce(values, COUNT, &m);
  for (size_t i = 0; i < COUNT; i++) {
    CHECK(values[i] == want[i], "k %u, q %zu: value %zu", bits, which, i);
  }
}

static void reseeding_is_exact(unsigned bits, size_t which) {
  enum { COUNT = 203 };
  const metis_modulus m = make_modulus(bits, which);
  uint64_t c0[COUNT], c1[COUNT], a[COUNT], s[COUNT], want[COUNT];
  for (size_t i = 0; i < COUNT; i++) {
    c0[i] = random_limb(m.q, bits) % m.q;
    c1[i] = random_limb(m.q, bits) % m.q;
    a[i] = random_limb(m.q, bits) % m.q;
    s[i] = random_limb(m.q, bits) % m.q;
    want[i] = (uint64_t)((c0[i] + (metis_u128)((c1[i] + m.q - a[i]) % m.q) * s[i]) % m.q);
  }
  metis_reseed_limbs(c0, c1, a, s, COUNT, &m);
  for (size_t i = 0; i < COUNT; i++) {
    CHECK(c0[i] == want[i], "k %u, q %zu: limb %zu", bits, which, i);
  }
}

static void arithmetic_modulo_q_is_exact(void) {
  for (size_t w = 0; w < WIDTHS; w++) {
    for (size_t which = 0; which < 3; which++) {
      for (size_t again = 0; again < 50; again++) {
        residues_are_exact(widths[w], which);
        reductions_are_exact(widths[w], which);
        reseeding_is_exact(widths[w], which);
      }
    }
  }
}

/* So many products that 64 bits would not hold them, added and subtracted in every way there is. */
static void sums_never_overflow(unsigned bits, size_t which, bool subtract, bool heavy) {
  enum { COUNT = 1024, STEPS = 6000 };
  const metis_modulus m = make_modulus(bits, which);
  uint64_t *const have = allocate(COUNT * sizeof *have);
  uint64_t *const limbs = allocate(COUNT * sizeof *limbs);
  uint64_t want[3] = {0}; /* of the first limb, the last, and one between */
  const size_t places[3] = {0, COUNT - 1, 500};
  uint8_t *const packed = allocate(COUNT / 8 * bits);
  const uint8_t *const one = packed;
  metis_sums sums = {.kernels = kernel_sets[which % kernel_sets_count],
                     .modulus = &m,
                     .values = have,
                     .count = COUNT,
                     .ring_dimension = COUNT};
  for (size_t i = 0; i < COUNT; i++) {
    limbs[i] = i % 7 ? random_limb(m.q, bits) : ((uint64_t)1 << bits) - 1;
  }
  sums.kernels->pack(packed, limbs, COUNT, bits);
  for (size_t step = 0; step < STEPS; step++) {
    const uint32_t weight =
        heavy ? UINT32_MAX - (uint32_t)random_bits() % 1000 : 1 + (uint32_t)random_bits() % 3;
    uint32_t crc = 0;
    if (subtract) {
      metis_sums_subtract_packed(&sums, packed, weight);
    } else {
      metis_sums_add_packed(&sums, &one, &weight, &crc, 1);
      CHECK(crc == metis_crc32c_portable(0, packed, COUNT / 8 * bits), "k %u: checksum", bits);
    }
    for (size_t p = 0; p < 3; p++) {
      const uint64_t product = (uint64_t)((metis_u128)limbs[places[p]] * weight % m.q);
      want[p] = (want[p] + (subtract ? m.q - product : product)) % m.q;
    }
  }
  metis_sums_reduce(&sums);
  for (size_t p = 0; p < 3; p++) {
    CHECK(have[places[p]] == want[p], "k %u, q %zu, subtract %d, heavy %d: limb %zu", bits, which,
          subtract, heavy, places[p]);
  }
  free(have);
  free(limbs);
  free(packed);
}

static void no_sum_overflows(void) {
  for (size_t which = 0; which < 3; which++) { /* at 52 bits there is the least room */
    sums_never_overflow(52, which, false, false);
    sums_never_overflow(52, which, false, true);
    sums_never_overflow(52, which, true, true);
    sums_never_overflow(44, which, false, true);
  }
}

/* ---- from seeds to limbs --------------------------------------------------------------------- */

static void the_cipher_is_aes_128(void) {
  static const uint8_t want[16] = {0x69, 0xC4, 0xE0, 0xD8, 0x6A, 0x7B, 0x04, 0x30,
                                   0xD8, 0xCD, 0xB7, 0x80, 0x70, 0xB4, 0xC5, 0x5A};
  uint8_t key[16];
  metis_round_keys keys;
  for (uint8_t i = 0; i < 16; i++) {
    key[i] = i;
  }
  metis_round_keys_of(key, &keys);
  for (size_t s = 0; s < kernel_sets_count; s++) { /* FIPS 197, appendix C.1 */
    uint8_t out[16];
    kernel_sets[s]->keystream(&keys, 0xFFEEDDCCBBAA9988, 0x7766554433221100, out, 1);
    CHECK(memcmp(out, want, sizeof want) == 0, "%s", kernel_sets[s]->name);
  }
}

static void keystreams_agree_at_every_length(void) {
  for (size_t blocks = 0; blocks < 300; blocks += blocks < 20 ? 1 : 31) {
    uint8_t seed[16];
    metis_round_keys keys;
    fill(seed, sizeof seed);
    metis_round_keys_of(seed, &keys);
    const uint64_t nonce = random_bits();
    const uint64_t first = blocks % 3 ? random_bits() : UINT64_MAX - 3; /* wraps */
    uint8_t *want = allocate(blocks * 16);
    uint8_t *have = allocate(blocks * 16 + 1);
    metis_keystream_portable(&keys, nonce, first, want, blocks);
    for (size_t b = 0; b < blocks; b++) { /* a block does not depend on its neighbours */
      uint8_t alone[16];
      metis_keystream_portable(&keys, nonce, first + b, alone, 1);
      CHECK(memcmp(alone, want + 16 * b, 16) == 0, "block %zu of %zu", b, blocks);
    }
    for (size_t s = 0; s < kernel_sets_count; s++) {
      kernel_sets[s]->keystream(&keys, nonce, first, have + 1, blocks);
      CHECK(memcmp(want, have + 1, blocks * 16) == 0, "%s, %zu blocks", kernel_sets[s]->name,
            blocks);
    }
    free(want);
    free(have);
  }
}

/* Word by word, with as many pieces as it takes; half of the words are skipped at the least q. */
static void limbs_are_the_words_below_q(void) {
  enum { COUNT = 3000, WORDS = 4 * COUNT };
  for (size_t s = 0; s < kernel_sets_count; s++) {
    for (size_t w = 0; w < WIDTHS; w++) {
      for (size_t which = 0; which < 3; which++) {
        const unsigned bits = widths[w];
        const metis_modulus m = make_modulus(bits, which);
        const size_t word_bytes = bits == 32 ? 4 : 8;
        uint8_t seed[16];
        metis_round_keys keys;
        fill(seed, sizeof seed);
        metis_round_keys_of(seed, &keys);
        uint8_t *words = allocate(WORDS * word_bytes);
        uint64_t *have = allocate(COUNT * sizeof *have);
        metis_keystream_portable(&keys, 11, 0, words, WORDS * word_bytes / 16);
        metis_stream stream;
        metis_stream_start(&stream, kernel_sets[s], &m, seed);
        metis_stream_seek(&stream, 11);
        for (size_t done = 0; done < COUNT;) {
          const size_t piece = 1 + random_bits() % 700;
          const size_t count = piece < COUNT - done ? piece : COUNT - done;
          metis_stream_limbs(&stream, have + done, count);
          done += count;
        }
        size_t word = 0;
        for (size_t i = 0; i < COUNT; i++, word++) {
          while (limb_of(words + word * word_bytes, 0, bits) >= m.q) {
            word++;
          }
          CHECK(have[i] == limb_of(words + word * word_bytes, 0, bits), "%s, k %u, q %zu: limb %zu",
                kernel_sets[s]->name, bits, which, i);
        }
        CHECK(which != 1 || word > COUNT + COUNT / 2, "only %zu words for %d limbs", word, COUNT);
        free(words);
        free(have);
      }
    }
  }
}

int main(void) {
  kernel_sets[kernel_sets_count++] = &metis_portable;
#if defined(METIS_HAVE_AVX2)
  if (metis_cpu_has_avx2()) {
    kernel_sets[kernel_sets_count++] = &metis_avx2;
  }
#endif
  sums_and_checksums_are_exact();
  unpacking_undoes_packing();
  arithmetic_modulo_q_is_exact();
  no_sum_overflows();
  the_cipher_is_aes_128();
  keystreams_agree_at_every_length();
  limbs_are_the_words_below_q();
  printf("%zu kernel sets\n", kernel_sets_count);
  return 0;
}
