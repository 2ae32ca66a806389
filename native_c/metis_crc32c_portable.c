/* CRC-32C by table, eight bytes a step: the specification of the checksum.
 *
 * Law: no start-up work and nothing to keep up by hand. A table entry is linear in its index, so
 * each table of 256 is spelled by the compiler out of eight numbers: table t at index 1 << b is
 * the remainder of the byte 1 << b with t zero bytes after it.
 */
#include "metis_impl.h"

#define BIT(i, b, remainder) ((i) >> (b)&1 ? UINT32_C(remainder) : 0)
#define ENTRY(i, r0, r1, r2, r3, r4, r5, r6, r7)                                                   \
  BIT(i, 0, r0) ^ BIT(i, 1, r1) ^ BIT(i, 2, r2) ^ BIT(i, 3, r3) ^ BIT(i, 4, r4) ^ BIT(i, 5, r5) ^  \
      BIT(i, 6, r6) ^ BIT(i, 7, r7)
#define ENTRIES_4(i, ...)                                                                          \
  ENTRY(i, __VA_ARGS__), ENTRY(i + 1, __VA_ARGS__), ENTRY(i + 2, __VA_ARGS__),                     \
      ENTRY(i + 3, __VA_ARGS__)
#define ENTRIES_16(i, ...)                                                                         \
  ENTRIES_4(i, __VA_ARGS__), ENTRIES_4(i + 4, __VA_ARGS__), ENTRIES_4(i + 8, __VA_ARGS__),         \
      ENTRIES_4(i + 12, __VA_ARGS__)
#define ENTRIES_64(i, ...)                                                                         \
  ENTRIES_16(i, __VA_ARGS__), ENTRIES_16(i + 16, __VA_ARGS__), ENTRIES_16(i + 32, __VA_ARGS__),    \
      ENTRIES_16(i + 48, __VA_ARGS__)
#define TABLE(...)                                                                                 \
  {                                                                                                \
    ENTRIES_64(0, __VA_ARGS__), ENTRIES_64(64, __VA_ARGS__), ENTRIES_64(128, __VA_ARGS__),         \
        ENTRIES_64(192, __VA_ARGS__)                                                               \
  }

static const uint32_t table[8][256] = {
    TABLE(0xF26B8303, 0xE13B70F7, 0xC79A971F, 0x8AD958CF,  //
          0x105EC76F, 0x20BD8EDE, 0x417B1DBC, 0x82F63B78), //
    TABLE(0x13A29877, 0x274530EE, 0x4E8A61DC, 0x9D14C3B8,  //
          0x3FC5F181, 0x7F8BE302, 0xFF17C604, 0xFBC3FAF9), //
    TABLE(0xA541927E, 0x4F6F520D, 0x9EDEA41A, 0x38513EC5,  //
          0x70A27D8A, 0xE144FB14, 0xC76580D9, 0x8B277743), //
    TABLE(0xDD45AAB8, 0xBF672381, 0x7B2231F3, 0xF64463E6,  //
          0xE964B13D, 0xD725148B, 0xABA65FE7, 0x52A0C93F), //
    TABLE(0x38116FAC, 0x7022DF58, 0xE045BEB0, 0xC5670B91,  //
          0x8F2261D3, 0x1BA8B557, 0x37516AAE, 0x6EA2D55C), //
    TABLE(0xEF306B19, 0xDB8CA0C3, 0xB2F53777, 0x6006181F,  //
          0xC00C303E, 0x85F4168D, 0x0E045BEB, 0x1C08B7D6), //
    TABLE(0x68032CC8, 0xD0065990, 0xA5E0C5D1, 0x4E2DFD53,  //
          0x9C5BFAA6, 0x3D5B83BD, 0x7AB7077A, 0xF56E0EF4), //
    TABLE(0x493C7D27, 0x9278FA4E, 0x211D826D, 0x423B04DA,  //
          0x847609B4, 0x0D006599, 0x1A00CB32, 0x34019664),
};

uint32_t metis_crc32c_portable(uint32_t crc, const uint8_t *data, size_t bytes) {
  crc = ~crc;
  for (; bytes >= 8; bytes -= 8, data += 8) {
    crc = table[7][(crc ^ data[0]) & 0xFF] ^ table[6][(crc >> 8 ^ data[1]) & 0xFF] ^
          table[5][(crc >> 16 ^ data[2]) & 0xFF] ^ table[4][(crc >> 24 ^ data[3]) & 0xFF] ^
          table[3][data[4]] ^ table[2][data[5]] ^ table[1][data[6]] ^ table[0][data[7]];
  }
  for (; bytes > 0; bytes--, data++) {
    crc = crc >> 8 ^ table[0][(crc ^ *data) & 0xFF];
  }
  return ~crc;
}
