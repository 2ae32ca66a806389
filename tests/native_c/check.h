/* What the C tests share. A failed check says what, where and with which values; the run ends. */
#ifndef CHECK_H
#define CHECK_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition, ...)                                                                      \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition);                              \
      fprintf(stderr, __VA_ARGS__);                                                                \
      fputc('\n', stderr);                                                                         \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)

static inline uint64_t random_bits(void) {
  static uint64_t state = 0x9E3779B97F4A7C15;
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

/* To the exact size, so that a sanitizer sees one byte too far. */
static inline void *allocate(size_t bytes) {
  void *memory = malloc(bytes ? bytes : 1);
  CHECK(memory != NULL, "%zu bytes", bytes);
  return memory;
}

#endif
