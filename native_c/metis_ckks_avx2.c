/* Packed limbs four at a time (AVX2): the same sums as metis_ckks_portable.c.
 *
 * Four limbs of k bits are k / 2 whole bytes, at least 16. Two loads of 16 bytes, the first from
 * the start and the second up to the end, hold two limbs each and never reach beyond.
 */
#include "metis_impl.h"

#include <immintrin.h>
#include <string.h>

/* Each function is made once for each k, with every shift and offset a constant. */
#define INLINE static inline __attribute__((always_inline))

typedef struct {
  __m256i bytes;  /* which bytes of its load each lane takes */
  __m256i shifts; /* and how far its limb is from their lowest bit */
  __m256i mask;
} layout;

INLINE layout layout_of(unsigned bits) {
  /* The second load begins k / 2 - 16 bytes after the first; its two limbs at k / 4. */
  const unsigned start = bits / 4 - (bits / 2 - 16);
  const unsigned firsts[4] = {0, bits / 8, start, start + bits / 8};
  uint8_t bytes[32];
  for (unsigned i = 0; i < 32; i++) {
    const unsigned from = firsts[i / 8] + i % 8;
    bytes[i] = from < 16 ? (uint8_t)from : 0x80; /* 0x80: a zero */
  }
  const long long odd = bits % 8;
  return (layout){.bytes = _mm256_loadu_si256((const __m256i *)(const void *)bytes),
                  .shifts = _mm256_set_epi64x(odd, 0, odd, 0),
                  .mask = _mm256_set1_epi64x((long long)(((uint64_t)1 << bits) - 1))};
}

INLINE __m128i load_128(const uint8_t *at) {
  return _mm_loadu_si128((const __m128i *)(const void *)at);
}

INLINE uint64_t load_64(const uint8_t *at) {
  uint64_t word;
  memcpy(&word, at, sizeof word);
  return word;
}

/* Four limbs, in order. */
INLINE __m256i unpack_4(const uint8_t *packed, unsigned bits, layout layout) {
  if (bits == 32) {
    return _mm256_cvtepu32_epi64(load_128(packed));
  }
  const __m128i second = load_128(packed + bits / 2 - 16);
  __m256i lanes = _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(packed)), second, 1);
  lanes = _mm256_shuffle_epi8(lanes, layout.bytes);
  if (bits % 8 != 0) {
    lanes = _mm256_srlv_epi64(lanes, layout.shifts);
  }
  return _mm256_and_si256(lanes, layout.mask);
}

/* The lower 64 bits of limb * weight. */
INLINE __m256i product(__m256i limbs, __m256i weight) {
  const __m256i lower = _mm256_mul_epu32(limbs, weight);
  const __m256i upper = _mm256_mul_epu32(_mm256_srli_epi64(limbs, 32), weight);
  return _mm256_add_epi64(lower, _mm256_slli_epi64(upper, 32));
}

/* Sixteen sums in registers. Limbs of 32 bits are summed as they lie in a vector, those at even
 * places and those at odd places apart, and come into order when a vector of sums is done. */
typedef struct {
  __m256i of[4];
} sums_16;

INLINE __m256i swap_middle(__m256i a) { return _mm256_permute4x64_epi64(a, 0xD8); }

INLINE sums_16 load_sums(const uint64_t *sums, bool fresh, unsigned bits) {
  sums_16 s = {{_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                _mm256_setzero_si256()}};
  if (fresh) {
    return s;
  }
  for (size_t v = 0; v < 4; v++) {
    s.of[v] = _mm256_loadu_si256((const __m256i *)(const void *)(sums + 4 * v));
  }
  for (size_t v = 0; v < 4 && bits == 32; v += 2) {
    const __m256i a = swap_middle(s.of[v]);     /* 0 2 1 3 */
    const __m256i b = swap_middle(s.of[v + 1]); /* 4 6 5 7 */
    s.of[v] = _mm256_permute2x128_si256(a, b, 0x20);
    s.of[v + 1] = _mm256_permute2x128_si256(a, b, 0x31);
  }
  return s;
}

INLINE void store_sums(uint64_t *sums, sums_16 s, unsigned bits) {
  for (size_t v = 0; v < 4 && bits == 32; v += 2) {
    const __m256i a = _mm256_permute2x128_si256(s.of[v], s.of[v + 1], 0x20);
    const __m256i b = _mm256_permute2x128_si256(s.of[v], s.of[v + 1], 0x31);
    s.of[v] = swap_middle(a);
    s.of[v + 1] = swap_middle(b);
  }
  for (size_t v = 0; v < 4; v++) {
    _mm256_storeu_si256((__m256i *)(void *)(sums + 4 * v), s.of[v]);
  }
}

INLINE sums_16 add_16(sums_16 s, const uint8_t *packed, uint32_t weight, bool weighted,
                      unsigned bits, layout layout) {
  const __m256i weights = _mm256_set1_epi64x(weight);
  for (size_t v = 0; v < 4 && bits == 32; v += 2) {
    const __m256i limbs = _mm256_loadu_si256((const __m256i *)(const void *)(packed + 16 * v));
    const __m256i odd = _mm256_srli_epi64(limbs, 32);
    s.of[v] = _mm256_add_epi64(s.of[v], weighted ? _mm256_mul_epu32(limbs, weights)
                                                 : _mm256_and_si256(limbs, layout.mask));
    s.of[v + 1] = _mm256_add_epi64(s.of[v + 1], weighted ? _mm256_mul_epu32(odd, weights) : odd);
  }
  for (size_t v = 0; v < 4 && bits != 32; v++) {
    const __m256i limbs = unpack_4(packed + v * (bits / 2), bits, layout);
    s.of[v] = _mm256_add_epi64(s.of[v], weighted ? product(limbs, weights) : limbs);
  }
  return s;
}

/* The processor's own prefetcher stops at each page and follows few streams. An address past the
 * end is never read through. */
enum { AHEAD_BYTES = 1024 };

INLINE void prefetch_16(const uint8_t *packed, unsigned bits) {
  for (size_t line = 0; line < 2 * bits; line += 64) {
    _mm_prefetch((const char *)((uintptr_t)packed + AHEAD_BYTES + line), _MM_HINT_T0);
  }
}

/* Carries the remainders of several streams on over sixteen limbs each, which are k / 4 words of 64
 * bits. The instruction takes three cycles and one can start in each, so three streams in step keep
 * it busy; and the sums go on beside it. */
INLINE void carry_16(uint64_t *restrict remainders, const uint8_t *const *at, size_t streams,
                     unsigned bits) {
  METIS_KEEP_LOOP
  for (size_t word = 0; word < bits / 4; word++) {
    METIS_UNROLL
    for (size_t s = 0; s < streams; s++) {
      remainders[s] = _mm_crc32_u64(remainders[s], load_64(at[s] + 8 * word));
    }
  }
}

enum {
  STREAMS_MAX = 4,
  TILE_LIMBS = 1024, /* their sums stay in the first cache from one group of blocks to the next */
};

/* Three or four blocks in step. More would get in each other's way: blocks tend to lie at the same
 * place within a page, and the first cache keeps eight lines of a place. */
INLINE void add_in_step(uint64_t *restrict sums, bool fresh, const uint8_t *const *packed,
                        size_t offset, const uint32_t *weights, uint64_t *restrict remainders,
                        size_t streams, size_t limbs, bool weighted, unsigned bits, layout layout) {
  const uint8_t *at[STREAMS_MAX];
  uint64_t carried[STREAMS_MAX];
  METIS_UNROLL
  for (size_t s = 0; s < streams; s++) {
    at[s] = packed[s] + offset;
    carried[s] = remainders[s];
  }
  for (size_t i = 0; i < limbs; i += 16) {
    sums_16 all = load_sums(sums + i, fresh, bits);
    METIS_UNROLL
    for (size_t s = 0; s < streams; s++) {
      prefetch_16(at[s], bits);
    }
    carry_16(carried, at, streams, bits);
    METIS_UNROLL
    for (size_t s = 0; s < streams; s++) {
      all = add_16(all, at[s], weights[s], weighted, bits, layout);
      at[s] += 2 * bits;
    }
    store_sums(sums + i, all, bits);
  }
  METIS_UNROLL
  for (size_t s = 0; s < streams; s++) {
    remainders[s] = carried[s];
  }
}

/* Any number of blocks that is a sum of threes and fours; `limbs` is a multiple of 16. */
INLINE void add_blocks(uint64_t *restrict sums, bool fresh, const uint8_t *const *packed,
                       const uint32_t *weights, uint64_t *restrict remainders, size_t blocks,
                       size_t limbs, bool weighted, unsigned bits) {
  const layout layout = layout_of(bits);
  for (size_t start = 0; start < limbs; start += TILE_LIMBS) {
    const size_t count = limbs - start < TILE_LIMBS ? limbs - start : TILE_LIMBS;
    for (size_t b = 0; b < blocks;) {
#define ADD_IN_STEP(n)                                                                             \
  add_in_step(sums + start, fresh && b == 0, packed + b, start / 8 * bits, weights + b,            \
              remainders + b, n, count, weighted, bits, layout);                                   \
  b += n
      if ((blocks - b) % 3 == 0) {
        ADD_IN_STEP(3);
      } else {
        ADD_IN_STEP(4);
      }
    }
  }
}

/* One block keeps the processor as busy when it is cut into three pieces that go in step. Returns
 * how many limbs were added. */
INLINE size_t add_block(uint64_t *restrict sums, bool fresh, const uint8_t *packed, uint32_t weight,
                        uint64_t *restrict remainder, size_t limbs, bool weighted, unsigned bits) {
  const layout layout = layout_of(bits);
  const size_t third = limbs / 48 * 16;
  const size_t third_bytes = third / 8 * bits;
  uint64_t carried[3] = {*remainder, 0, 0};
  for (size_t i = 0; i < third; i += 16, packed += 2 * bits) {
    const uint8_t *const at[3] = {packed, packed + third_bytes, packed + 2 * third_bytes};
    METIS_UNROLL
    for (size_t piece = 0; piece < 3; piece++) {
      prefetch_16(at[piece], bits);
    }
    carry_16(carried, at, 3, bits);
    METIS_UNROLL
    for (size_t piece = 0; piece < 3; piece++) {
      uint64_t *const place = sums + piece * third + i;
      const sums_16 before = load_sums(place, fresh, bits);
      store_sums(place, add_16(before, at[piece], weight, weighted, bits, layout), bits);
    }
  }
  *remainder = metis_crc32c_join_sse42(carried, third_bytes);
  return 3 * third;
}

INLINE void add_packed(uint64_t *restrict sums, bool fresh, const uint8_t *const *packed,
                       const uint32_t *weights, uint32_t *restrict crcs, size_t blocks,
                       size_t limbs, bool weighted, unsigned bits) {
  /* 1, 2 and 5 are no sums of threes and fours. */
  const size_t in_step = blocks < 3 ? 0 : blocks == 5 ? 4 : blocks;
  uint64_t remainders[METIS_BLOCKS_AT_ONCE];
  for (size_t b = 0; b < blocks; b++) {
    remainders[b] = (uint32_t)~crcs[b];
  }
  add_blocks(sums, fresh, packed, weights, remainders, in_step, limbs / 16 * 16, weighted, bits);
  for (size_t b = 0; b < blocks; b++) {
    size_t done = limbs / 16 * 16;
    if (b >= in_step) {
      done = add_block(sums, fresh && b == 0, packed[b], weights[b], &remainders[b], limbs,
                       weighted, bits);
    }
    const uint8_t *const rest = packed[b] + done / 8 * bits;
    crcs[b] = ~(uint32_t)remainders[b];
    metis_add_packed_portable(sums + done, fresh && b == 0, &rest, weights + b, crcs + b, 1,
                              limbs - done, bits);
  }
}

INLINE void unpack(uint64_t *restrict out, const uint8_t *packed, size_t count, unsigned bits) {
  const layout layout = layout_of(bits);
  size_t i = 0;
  for (; count - i >= 4; i += 4, packed += bits / 2) {
    _mm256_storeu_si256((__m256i *)(void *)(out + i), unpack_4(packed, bits, layout));
  }
  metis_unpack_portable(out + i, packed, count - i, bits);
}

/* A function for each k, since together they are too long for a compiler to follow. */
#define WIDTH(k)                                                                                   \
  static void add_packed_##k(uint64_t *restrict sums, bool fresh, const uint8_t *const *packed,    \
                             const uint32_t *weights, uint32_t *restrict crcs, size_t blocks,      \
                             size_t limbs) {                                                       \
    bool weighted = false;                                                                         \
    for (size_t b = 0; b < blocks; b++) {                                                          \
      weighted = weighted || weights[b] != 1;                                                      \
    }                                                                                              \
    if (weighted) {                                                                                \
      add_packed(sums, fresh, packed, weights, crcs, blocks, limbs, true, k);                      \
    } else {                                                                                       \
      add_packed(sums, fresh, packed, weights, crcs, blocks, limbs, false, k);                     \
    }                                                                                              \
  }                                                                                                \
  static void unpack_##k(uint64_t *restrict out, const uint8_t *packed, size_t count) {            \
    unpack(out, packed, count, k);                                                                 \
  }

WIDTH(32)
WIDTH(44)
WIDTH(48)
WIDTH(52)

#define BY_WIDTH(function, ...)                                                                    \
  switch (bits) {                                                                                  \
  case 32:                                                                                         \
    function##_32(__VA_ARGS__);                                                                    \
    break;                                                                                         \
  case 44:                                                                                         \
    function##_44(__VA_ARGS__);                                                                    \
    break;                                                                                         \
  case 48:                                                                                         \
    function##_48(__VA_ARGS__);                                                                    \
    break;                                                                                         \
  case 52:                                                                                         \
    function##_52(__VA_ARGS__);                                                                    \
    break;                                                                                         \
  }

void metis_add_packed_avx2(uint64_t *restrict sums, bool fresh, const uint8_t *const *packed,
                           const uint32_t *weights, uint32_t *restrict crcs, size_t blocks,
                           size_t limbs, unsigned bits) {
  BY_WIDTH(add_packed, sums, fresh, packed, weights, crcs, blocks, limbs)
}

void metis_unpack_avx2(uint64_t *restrict out, const uint8_t *packed, size_t count, unsigned bits) {
  BY_WIDTH(unpack, out, packed, count)
}
