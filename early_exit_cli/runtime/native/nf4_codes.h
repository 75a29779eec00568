/* The 16 values that half a byte of NF4 stands for (Dettmers et al. 2023), each rounded to bfloat16. Twice where a
 * lookup reads five bits, the fifth being another weight's. */
#pragma once
#include <stdint.h>

#define ALIGNED __attribute__((aligned(64), unused))

static const uint16_t NF4[32] ALIGNED = {
    0xBF80, 0xBF32, 0xBF06, 0xBECA, 0xBE92, 0xBE3D, 0xBDBA, 0x0000,
    0x3DA3, 0x3E25, 0x3E7C, 0x3EAD, 0x3EE2, 0x3F10, 0x3F39, 0x3F80,
    0xBF80, 0xBF32, 0xBF06, 0xBECA, 0xBE92, 0xBE3D, 0xBDBA, 0x0000,
    0x3DA3, 0x3E25, 0x3E7C, 0x3EAD, 0x3EE2, 0x3F10, 0x3F39, 0x3F80,
};

/* The same times 2^11, which makes all of them whole. */
#define NF4_POWER 11
static const int16_t NF4_WHOLE[32] ALIGNED = {
    -2048, -1424, -1072, -808, -584, -378, -186, 0, 163, 330, 504, 692, 904, 1152, 1480, 2048,
    -2048, -1424, -1072, -808, -584, -378, -186, 0, 163, 330, 504, 692, 904, 1152, 1480, 2048,
};
static const uint8_t NF4_LOWER[16] ALIGNED = {0, 112, 208, 216, 184, 134, 70, 0, 163, 74, 248, 180, 136, 128, 200, 0};
static const uint8_t NF4_UPPER[16] ALIGNED = {248, 250, 251, 252, 253, 254, 255, 0, 0, 1, 1, 2, 3, 4, 5, 8};
