/* Private to the library and its tests: what a kernel is.
 *
 * Law: the portable kernels are the specification. Another kernel gives the same bits at every
 * length and alignment, or it is wrong. Kernels trust their arguments: metis_accumulator.c and its
 * neighbours have checked them. They run with the standard floating-point environment.
 */
#ifndef METIS_IMPL_H
#define METIS_IMPL_H

#include "metis.h"

#include <float.h>
#include <stdbool.h>

#if FLT_EVAL_METHOD != 0
#error "a double must be rounded to double after every operation"
#endif
_Static_assert(sizeof(size_t) == 8, "bounds such as METIS_CAPACITY_MAX assume 64 bits");

#define METIS_DTYPES (METIS_BOOL + 1)

/* Before a short loop whose arrays are meant to live in registers; and before one that is not worth
 * the code it would become. */
#if defined(METIS_KEEP_LOOPS) /* a sanitizer makes much of each access */
#define METIS_UNROLL
#define METIS_KEEP_LOOP
#elif defined(__clang__)
#define METIS_UNROLL _Pragma("unroll")
#define METIS_KEEP_LOOP _Pragma("nounroll")
#else
#define METIS_UNROLL _Pragma("GCC unroll 16")
#define METIS_KEEP_LOOP _Pragma("GCC unroll 1")
#endif

/* For each i from `start` to below `end`, and each update k in order:
 * sums[i] += (double)values[k][i] * weights[k]. Each values[k] is packed values of one dtype. */
typedef void metis_fold_fn(double *restrict sums, const uint8_t *const *values,
                           const double *weights, size_t updates, size_t start, size_t end);

/* out[i] = sums[i] / divisor, rounded as metis.h says. */
typedef void metis_round_fn(uint8_t *restrict out, const double *restrict sums, size_t count,
                            double divisor);

/* The index of the first NaN or infinity, else `count`. */
typedef size_t metis_scan_fn(const uint8_t *values, size_t count);

typedef uint32_t metis_crc32c_fn(uint32_t crc, const uint8_t *data, size_t bytes);

/* ---- kernels of the encrypted fold: see metis_ckks_impl.h for what uses them ---- */

/* sums[i] += limb i of packed[b] * weights[b] for each block b and i < limbs, modulo 2^64: the
 * caller knows that no sum gets there. With `fresh` the sums count as zero and are not read.
 * crcs[b] is carried on over the bytes of packed[b]. `limbs` is a multiple of 2, so that they are
 * whole bytes; `blocks` is 1 to METIS_BLOCKS_AT_ONCE. */
enum { METIS_BLOCKS_AT_ONCE = 16 }; /* a processor reads few streams well */
typedef void metis_add_packed_fn(uint64_t *restrict sums, bool fresh, const uint8_t *const *packed,
                                 const uint32_t *weights, uint32_t *restrict crcs, size_t blocks,
                                 size_t limbs, unsigned bits);

/* out[i] = limb i of packed, and back; limbs[i] < 2^bits, `count` a multiple of 2. */
typedef void metis_unpack_fn(uint64_t *restrict out, const uint8_t *packed, size_t count,
                             unsigned bits);
typedef void metis_pack_fn(uint8_t *restrict packed, const uint64_t *limbs, size_t count,
                           unsigned bits);

typedef struct {
  uint8_t bytes[11][16];
} metis_round_keys;

/* Block b of out, b < blocks, is AES of the block number first + b and of `nonce`, both u64. */
typedef void metis_keystream_fn(const metis_round_keys *keys, uint64_t nonce, uint64_t first,
                                uint8_t *restrict out, size_t blocks);

/* Where a set has no kernel for a dtype (NULL), the portable one is meant. */
typedef struct {
  const char *name;
  metis_fold_fn *fold[METIS_DTYPES];
  metis_round_fn *round[METIS_DTYPES];
  metis_scan_fn *scan[METIS_DTYPES];
  metis_crc32c_fn *crc32c;
  metis_add_packed_fn *add_packed;
  metis_unpack_fn *unpack;
  metis_pack_fn *pack;
  metis_keystream_fn *keystream;
} metis_kernels;

extern const metis_kernels metis_portable; /* has them all */
#if defined(METIS_HAVE_AVX2)
extern const metis_kernels metis_avx2;
bool metis_cpu_has_avx2(void); /* and all else that metis_avx2 uses */
metis_crc32c_fn metis_crc32c_sse42;
/* Remainders are complements of checksums. That of three pieces end to end, the second and third of
 * `bytes` each and begun with a remainder of 0. */
uint64_t metis_crc32c_join_sse42(const uint64_t remainders[3], size_t bytes);
metis_add_packed_fn metis_add_packed_avx2;
metis_unpack_fn metis_unpack_avx2;
metis_keystream_fn metis_keystream_aesni;
#endif
metis_crc32c_fn metis_crc32c_portable;
metis_add_packed_fn metis_add_packed_portable;
metis_unpack_fn metis_unpack_portable;
metis_pack_fn metis_pack_portable;
metis_keystream_fn metis_keystream_portable;

static inline metis_fold_fn *metis_fold_of(const metis_kernels *set, metis_dtype dtype) {
  return set->fold[dtype] != NULL ? set->fold[dtype] : metis_portable.fold[dtype];
}

static inline metis_round_fn *metis_round_of(const metis_kernels *set, metis_dtype dtype) {
  return set->round[dtype] != NULL ? set->round[dtype] : metis_portable.round[dtype];
}

static inline metis_scan_fn *metis_scan_of(const metis_kernels *set, metis_dtype dtype) {
  return set->scan[dtype] != NULL ? set->scan[dtype] : metis_portable.scan[dtype];
}

/* The fastest kernels of this machine, or those that METIS_KERNEL forces: once per process. */
const metis_kernels *metis_pick_kernels(void);

size_t metis_item_bytes(metis_dtype dtype); /* 0: no such dtype */

/* Sets metis_error_text and returns METIS_ERR_ARGUMENT. */
#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
metis_status metis_refuse(const char *format, ...);

/* Sets it, and what metis_block_fault_last tells, and returns METIS_ERR_BLOCK. */
#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
metis_status metis_refuse_block(size_t block, metis_block_fault fault, const char *format, ...);

struct metis_accumulator {
  const metis_kernels *kernels;
  size_t capacity;
  size_t count; /* of the range begun; sums beyond it were never written */
  double *sums; /* aligned to a cache line */
};

#endif
