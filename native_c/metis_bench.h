/* What a fold is measured against: passes over the same memory that do no more than they must.
 * Nothing but native_c/bench.py calls them. */
#ifndef METIS_BENCH_H
#define METIS_BENCH_H

#include "metis.h"

/* sum[i] += value[i] for the whole range: float32 values, no weight, no kernel. */
metis_status metis_bench_add_pass(metis_accumulator *self, const void *values, size_t bytes);

/* Reads every byte once; *checksum depends on each, so that no compiler leaves a read out. `bytes`
 * is a multiple of 8. */
metis_status metis_bench_scan(const void *values, size_t bytes, uint64_t *checksum);

/* sums[i] += limbs[i]: limbs as words of 64 bits, no weight, no checksum. */
metis_status metis_bench_limb_pass(uint64_t *sums, const uint64_t *limbs, size_t count);

#endif
