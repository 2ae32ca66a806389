/* From a seed to limbs: the stream that metis.h specifies.
 *
 * Law: nothing here is secret. A seed is published with its block, so only speed matters below,
 * and the limbs are the same on every machine.
 */
#include "metis_ckks_impl.h"

enum { AES_BLOCK_BYTES = 16 };

void metis_stream_start(metis_stream *stream, const metis_kernels *kernels,
                        const metis_modulus *modulus, const uint8_t seed[METIS_SEED_BYTES]) {
  stream->kernels = kernels;
  stream->q = modulus->q;
  stream->bits = modulus->bits;
  metis_round_keys_of(seed, &stream->keys);
  metis_stream_seek(stream, 0);
}

void metis_stream_seek(metis_stream *stream, uint64_t ciphertext) {
  stream->nonce = ciphertext;
  stream->next_block = 0;
  stream->taken = sizeof stream->buffer;
}

static void refill(metis_stream *stream) {
  const size_t blocks = sizeof stream->buffer / AES_BLOCK_BYTES;
  stream->kernels->keystream(&stream->keys, stream->nonce, stream->next_block, stream->buffer,
                             blocks);
  stream->next_block += blocks;
  stream->taken = 0;
}

/* Removes what is not below q; returns how many are left. */
static size_t compact(uint64_t *limbs, size_t count, uint64_t q) {
  size_t kept = 0;
  for (size_t i = 0; i < count; i++) {
    limbs[kept] = limbs[i];
    kept += limbs[i] < q;
  }
  return kept;
}

/* Takes `count` words; returns how many limbs they gave. A word to skip is rare where q is close to
 * 2^bits, so first all are taken, which vectors can do. */
static size_t take(uint64_t *restrict out, const uint8_t *restrict words, size_t count, uint64_t q,
                   unsigned bits) {
  const uint64_t mask = ((uint64_t)1 << bits) - 1;
  uint64_t above = 0; /* its top bit: any of q - 1 - limb is negative */
  if (bits == 32) {
    for (size_t i = 0; i < count; i++) {
      out[i] = metis_load_u32(words + 4 * i);
      above |= q - 1 - out[i];
    }
  } else {
    for (size_t i = 0; i < count; i++) {
      out[i] = metis_load_u64(words + 8 * i) & mask;
      above |= q - 1 - out[i];
    }
  }
  return above >> 63 ? compact(out, count, q) : count;
}

void metis_stream_limbs(metis_stream *stream, uint64_t *out, size_t count) {
  const size_t word_bytes = stream->bits == 32 ? 4 : 8;
  for (size_t done = 0; done < count;) {
    if (stream->taken == sizeof stream->buffer) {
      refill(stream);
    }
    const size_t left = (sizeof stream->buffer - stream->taken) / word_bytes;
    const size_t words = left < count - done ? left : count - done;
    done += take(out + done, stream->buffer + stream->taken, words, stream->q, stream->bits);
    stream->taken += words * word_bytes;
  }
}
