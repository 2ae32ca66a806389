/* AES-128 in counter mode, bit-sliced: the specification of the stream, and its portable kernel.
 *
 * Law: no table and no branch looks at data. 128 blocks go at once, cut into 128 planes: plane p
 * holds bit p % 8 of byte p / 8 of every block, one lane a block. Moving bytes is then renaming
 * planes, and the S-box a circuit of gates.
 */
#include "metis_ckks_impl.h"

#include <string.h>

enum { HALVES = 2, LANES = 64 * HALVES, PLANES = 128, ROUNDS = 10 };

/* One bit of each block; two words because every processor of note has vectors of 128 bits. */
typedef uint64_t plane __attribute__((vector_size(8 * HALVES)));

/* The S-box on the eight bits of a byte, lowest first: the circuit of 115 gates by Boyar and
 * Peralta, "A new combinational logic minimization technique with applications to cryptology",
 * in their names. */
static inline void sub_byte(plane bits[8]) {
  const plane x0 = bits[7], x1 = bits[6], x2 = bits[5], x3 = bits[4];
  const plane x4 = bits[3], x5 = bits[2], x6 = bits[1], x7 = bits[0];

  const plane y14 = x3 ^ x5, y13 = x0 ^ x6, y9 = x0 ^ x3, y8 = x0 ^ x5, t0 = x1 ^ x2;
  const plane y1 = t0 ^ x7, y4 = y1 ^ x3, y12 = y13 ^ y14, y2 = y1 ^ x0, y5 = y1 ^ x6;
  const plane y3 = y5 ^ y8, t1 = x4 ^ y12, y15 = t1 ^ x5, y20 = t1 ^ x1, y6 = y15 ^ x7;
  const plane y10 = y15 ^ t0, y11 = y20 ^ y9, y7 = x7 ^ y11, y17 = y10 ^ y11, y19 = y10 ^ y8;
  const plane y16 = t0 ^ y11, y21 = y13 ^ y16, y18 = x0 ^ y16;

  const plane t2 = y12 & y15, t3 = y3 & y6, t4 = t3 ^ t2, t5 = y4 & x7, t6 = t5 ^ t2;
  const plane t7 = y13 & y16, t8 = y5 & y1, t9 = t8 ^ t7, t10 = y2 & y7, t11 = t10 ^ t7;
  const plane t12 = y9 & y11, t13 = y14 & y17, t14 = t13 ^ t12, t15 = y8 & y10, t16 = t15 ^ t12;
  const plane t17 = t4 ^ t14, t18 = t6 ^ t16, t19 = t9 ^ t14, t20 = t11 ^ t16;
  const plane t21 = t17 ^ y20, t22 = t18 ^ y19, t23 = t19 ^ y21, t24 = t20 ^ y18;
  const plane t25 = t21 ^ t22, t26 = t21 & t23, t27 = t24 ^ t26, t28 = t25 & t27, t29 = t28 ^ t22;
  const plane t30 = t23 ^ t24, t31 = t22 ^ t26, t32 = t31 & t30, t33 = t32 ^ t24, t34 = t23 ^ t33;
  const plane t35 = t27 ^ t33, t36 = t24 & t35, t37 = t36 ^ t34, t38 = t27 ^ t36, t39 = t29 & t38;
  const plane t40 = t25 ^ t39, t41 = t40 ^ t37, t42 = t29 ^ t33, t43 = t29 ^ t40, t44 = t33 ^ t37;
  const plane t45 = t42 ^ t41;
  const plane z0 = t44 & y15, z1 = t37 & y6, z2 = t33 & x7, z3 = t43 & y16, z4 = t40 & y1;
  const plane z5 = t29 & y7, z6 = t42 & y11, z7 = t45 & y17, z8 = t41 & y10, z9 = t44 & y12;
  const plane z10 = t37 & y3, z11 = t33 & y4, z12 = t43 & y13, z13 = t40 & y5, z14 = t29 & y2;
  const plane z15 = t42 & y9, z16 = t45 & y14, z17 = t41 & y8;

  const plane t46 = z15 ^ z16, t47 = z10 ^ z11, t48 = z5 ^ z13, t49 = z9 ^ z10, t50 = z2 ^ z12;
  const plane t51 = z2 ^ z5, t52 = z7 ^ z8, t53 = z0 ^ z3, t54 = z6 ^ z7, t55 = z16 ^ z17;
  const plane t56 = z12 ^ t48, t57 = t50 ^ t53, t58 = z4 ^ t46, t59 = z3 ^ t54, t60 = t46 ^ t57;
  const plane t61 = z14 ^ t57, t62 = t52 ^ t58, t63 = t49 ^ t58, t64 = z4 ^ t59, t65 = t61 ^ t62;
  const plane t66 = z1 ^ t63, t67 = t64 ^ t65, s3 = t53 ^ t66;

  bits[7] = t59 ^ t63;
  bits[6] = t64 ^ ~s3;
  bits[5] = t55 ^ ~t67;
  bits[4] = s3;
  bits[3] = t51 ^ t66;
  bits[2] = t47 ^ t65;
  bits[1] = t56 ^ ~t62;
  bits[0] = t48 ^ ~t60;
}

/* Times x in the field of AES. */
static inline void double_byte(plane out[8], const plane in[8]) {
  out[0] = in[7];
  out[1] = in[0] ^ in[7];
  out[2] = in[1];
  out[3] = in[2] ^ in[7];
  out[4] = in[3] ^ in[7];
  out[5] = in[4];
  out[6] = in[5];
  out[7] = in[6];
}

static inline void add_round_key(plane state[PLANES], const uint8_t key[16]) {
  for (size_t p = 0; p < PLANES; p++) {
    const uint64_t all = (uint64_t)0 - (key[p / 8] >> p % 8 & 1);
    state[p] ^= (plane){0} + all;
  }
}

/* SubBytes and ShiftRows: the byte of row r in column c comes from column c + r. */
static inline void sub_and_shift(plane out[PLANES], const plane in[PLANES]) {
  for (size_t byte = 0; byte < 16; byte++) {
    const size_t from = (byte + 4 * (byte % 4)) % 16;
    memcpy(out + 8 * byte, in + 8 * from, 8 * sizeof in[0]);
    sub_byte(out + 8 * byte);
  }
}

static inline void mix_columns(plane out[PLANES], const plane in[PLANES]) {
  for (size_t column = 0; column < PLANES; column += 32) {
    for (size_t row = 0; row < 4; row++) {
      const plane *const a = in + column + 8 * row;
      const plane *const b = in + column + 8 * ((row + 1) % 4);
      const plane *const c = in + column + 8 * ((row + 2) % 4);
      const plane *const d = in + column + 8 * ((row + 3) % 4);
      plane sum[8];
      plane twice[8];
      for (size_t i = 0; i < 8; i++) {
        sum[i] = a[i] ^ b[i];
      }
      double_byte(twice, sum);
      for (size_t i = 0; i < 8; i++) {
        out[column + 8 * row + i] = twice[i] ^ b[i] ^ c[i] ^ d[i];
      }
    }
  }
}

/* Bit c of row r and bit r of row c change places: by halves, quarters, and so on. */
static void transpose(uint64_t rows[64]) {
  uint64_t lower = 0x00000000FFFFFFFF;
  for (unsigned width = 32; width != 0; width >>= 1, lower ^= lower << width) {
    for (size_t r = 0; r < 64; r = (r + width + 1) & ~(size_t)width) {
      const uint64_t swapped = (rows[r] >> width ^ rows[r + width]) & lower;
      rows[r] ^= swapped << width;
      rows[r + width] ^= swapped;
    }
  }
}

static void encrypt_counters(const metis_round_keys *keys, uint64_t nonce, uint64_t first,
                             uint64_t blocks[LANES][2]) {
  plane state[PLANES];
  plane next[PLANES];
  for (size_t half = 0; half < HALVES; half++) {
    uint64_t rows[64];
    for (size_t i = 0; i < 64; i++) {
      rows[i] = first + 64 * half + i;
    }
    transpose(rows);
    for (size_t p = 0; p < 64; p++) {
      state[p][half] = rows[p];
      state[64 + p][half] = (uint64_t)0 - (nonce >> p & 1);
    }
  }
  add_round_key(state, keys->bytes[0]);
  for (size_t round = 1; round < ROUNDS; round++) {
    sub_and_shift(next, state);
    mix_columns(state, next);
    add_round_key(state, keys->bytes[round]);
  }
  sub_and_shift(next, state);
  add_round_key(next, keys->bytes[ROUNDS]);
  for (size_t half = 0; half < HALVES; half++) {
    for (size_t word = 0; word < 2; word++) {
      uint64_t rows[64];
      for (size_t p = 0; p < 64; p++) {
        rows[p] = next[64 * word + p][half];
      }
      transpose(rows);
      for (size_t i = 0; i < 64; i++) {
        blocks[64 * half + i][word] = rows[i];
      }
    }
  }
}

void metis_keystream_portable(const metis_round_keys *keys, uint64_t nonce, uint64_t first,
                              uint8_t *restrict out, size_t blocks) {
  uint64_t encrypted[LANES][2];
  for (size_t done = 0; done < blocks; done += LANES) {
    const size_t count = blocks - done < LANES ? blocks - done : LANES;
    encrypt_counters(keys, nonce, first + done, encrypted);
    for (size_t i = 0; i < count; i++) {
      metis_store_u64(out + 16 * (done + i), encrypted[i][0]);
      metis_store_u64(out + 16 * (done + i) + 8, encrypted[i][1]);
    }
  }
}

/* Four bytes through the S-box, each in a lane of its own. */
static void sub_word(uint8_t word[4]) {
  plane bits[8];
  for (unsigned b = 0; b < 8; b++) {
    uint64_t lanes = 0;
    for (unsigned i = 0; i < 4; i++) {
      lanes |= (uint64_t)(word[i] >> b & 1) << i;
    }
    bits[b] = (plane){lanes};
  }
  sub_byte(bits);
  memset(word, 0, 4);
  for (unsigned b = 0; b < 8; b++) {
    for (unsigned i = 0; i < 4; i++) {
      word[i] = (uint8_t)(word[i] | (bits[b][0] >> i & 1) << b);
    }
  }
}

void metis_round_keys_of(const uint8_t seed[METIS_SEED_BYTES], metis_round_keys *keys) {
  unsigned constant = 1;
  memcpy(keys->bytes[0], seed, 16);
  for (size_t round = 1; round <= ROUNDS; round++) {
    const uint8_t *const before = keys->bytes[round - 1];
    uint8_t *const key = keys->bytes[round];
    uint8_t word[4] = {before[13], before[14], before[15], before[12]};
    sub_word(word);
    word[0] = (uint8_t)(word[0] ^ constant);
    constant = (constant << 1) ^ (constant >> 7) * 0x11B;
    for (size_t i = 0; i < 16; i++) {
      key[i] = (uint8_t)(before[i] ^ (i < 4 ? word[i] : key[i - 4]));
    }
  }
}
