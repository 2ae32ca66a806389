/* Which kernels run: the only file that asks the processor or the environment. */
#include "metis_impl.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#if defined(METIS_HAVE_AVX2)
#include <cpuid.h>

/* Older compilers know no name for F16C, so its bit is read here; whether the operating system
 * keeps wide registers is what the compiler's own check of AVX2 includes. */
bool metis_cpu_has_avx2(void) {
  const unsigned needed = bit_SSE4_2 | bit_PCLMUL | bit_F16C | bit_AES;
  unsigned eax, ebx, ecx, edx;
  return __builtin_cpu_supports("avx2") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
         (ecx & needed) == needed;
}
#endif

static const metis_kernels *fastest_allowed(void) {
#if defined(METIS_HAVE_AVX2)
  const char *forced = getenv("METIS_KERNEL");
  if ((forced == NULL || strcmp(forced, "portable") != 0) && metis_cpu_has_avx2()) {
    return &metis_avx2;
  }
#endif
  return &metis_portable;
}

/* Two threads that come first together find the same answer, so no lock is needed. */
const metis_kernels *metis_pick_kernels(void) {
  static _Atomic(const metis_kernels *) picked = NULL;
  const metis_kernels *kernels = atomic_load_explicit(&picked, memory_order_relaxed);
  if (kernels == NULL) {
    kernels = fastest_allowed();
    atomic_store_explicit(&picked, kernels, memory_order_relaxed);
  }
  return kernels;
}

const char *metis_kernel(void) { return metis_pick_kernels()->name; }
