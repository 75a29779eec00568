/* Vectors of NEON (ARM64): four registers hold the 16 numbers. */
#pragma once
#include <arm_neon.h>

#define ROWS 4
#define VALUES 1
#define KEY_TILES 1
#define SUMS 4
#define INT8_INPUTS 2

typedef struct {
    float32x4_t of[4];
} Floats;
typedef struct {
    int32x4_t of[4];
} Ints;
typedef struct {
    uint32x4_t of[4];
} Lanes;

#define FOUR(type, x) ((type){{x(0), x(1), x(2), x(3)}})
#define FLOATS(name, f)                                                                                                \
    INLINE Floats name(Floats a, Floats b) {                                                                           \
        return (Floats){{f(a.of[0], b.of[0]), f(a.of[1], b.of[1]), f(a.of[2], b.of[2]), f(a.of[3], b.of[3])}};         \
    }

INLINE void relax(void) { __asm__ volatile("yield"); }

FLOATS(add16, vaddq_f32)
FLOATS(sub16, vsubq_f32)
FLOATS(mul16, vmulq_f32)
FLOATS(div16, vdivq_f32)

/* As on x86: the second of two where one is no number. */
INLINE float32x4_t larger4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
INLINE float32x4_t smaller4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
FLOATS(max16, larger4)
FLOATS(min16, smaller4)

#define X(i) vfmaq_f32(c.of[i], a.of[i], b.of[i])
INLINE Floats fma16(Floats a, Floats b, Floats c) { return FOUR(Floats, X); }
#undef X
#define X(i) vfmsq_f32(c.of[i], a.of[i], b.of[i])
INLINE Floats negative_fma16(Floats a, Floats b, Floats c) { return FOUR(Floats, X); }
#undef X
#define X(i) vdupq_n_f32(x)
INLINE Floats all16(float x) { return FOUR(Floats, X); }
#undef X
INLINE Floats zero16(void) { return all16(0); }
#define X(i) vld1q_f32(p + 4 * i)
INLINE Floats read16(const float *p) { return FOUR(Floats, X); }
#undef X
INLINE void write16(float *p, Floats x) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, x.of[i]);
}
#define X(i) vabsq_f32(x.of[i])
INLINE Floats abs16(Floats x) { return FOUR(Floats, X); }
#undef X
#define X(i) vrndnq_f32(x.of[i])
INLINE Floats nearest16(Floats x) { return FOUR(Floats, X); }
#undef X

/* 2^n, n a whole number from -126 to 127 */
INLINE float32x4_t power_of_two(int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
}
/* In two steps, since 2^n alone may be no float32. */
INLINE float32x4_t times_power(float32x4_t x, float32x4_t n) {
    int32x4_t whole = vcvtnq_s32_f32(n), half = vshrq_n_s32(whole, 1);
    return vmulq_f32(vmulq_f32(x, power_of_two(half)), power_of_two(vsubq_s32(whole, half)));
}
#define X(i) times_power(x.of[i], n.of[i])
INLINE Floats times_power16(Floats x, Floats n) { return FOUR(Floats, X); }
#undef X

/* In the order of AVX2's: numbers 8 apart, then 4, 2, 1. */
INLINE float sum16(Floats x) {
    float32x4_t four = vaddq_f32(vaddq_f32(x.of[0], x.of[2]), vaddq_f32(x.of[1], x.of[3]));
    float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
INLINE float most16(Floats x) {
    float32x4_t four = larger4(larger4(x.of[0], x.of[2]), larger4(x.of[1], x.of[3]));
    float most = vgetq_lane_f32(four, 0);
    for (int i = 1; i < 4; i++) most = most > four[i] ? most : four[i];
    return most;
}

INLINE Lanes between16(int64_t first, int64_t low, int64_t high) {
    static const int32_t lane[4] = {0, 1, 2, 3};
    Lanes found;
    for (int i = 0; i < 4; i++) {
        int32x4_t place = vaddq_s32(vld1q_s32(lane), vdupq_n_s32((int32_t)first + 4 * i));
        found.of[i] = vandq_u32(vcgeq_s32(place, vdupq_n_s32((int32_t)low)),
                                vcltq_s32(place, vdupq_n_s32((int32_t)high)));
    }
    return found;
}
#define X(i) vreinterpretq_f32_u32(vandq_u32(lanes.of[i], vreinterpretq_u32_f32(x.of[i])))
INLINE Floats or_zero16(Lanes lanes, Floats x) { return FOUR(Floats, X); }
#undef X
#define X(i) vbslq_f32(lanes.of[i], larger4(a.of[i], b.of[i]), a.of[i])
INLINE Floats max_where16(Lanes lanes, Floats a, Floats b) { return FOUR(Floats, X); }
#undef X

INLINE unsigned bits16(Lanes lanes) {
    static const uint32_t weight[4] = {1, 2, 4, 8};
    unsigned bits = 0;
    for (int i = 0; i < 4; i++) bits |= vaddvq_u32(vandq_u32(lanes.of[i], vld1q_u32(weight))) << 4 * i;
    return bits;
}
#define X(i) vceqq_f32(a.of[i], b.of[i])
INLINE unsigned equal16(Floats a, Floats b) { return bits16(FOUR(Lanes, X)); }
#undef X
#define X(i) vcgeq_f32(a.of[i], b.of[i])
INLINE unsigned at_least16(Floats a, Floats b) { return bits16(FOUR(Lanes, X)); }
#undef X

#define X(i) vdupq_n_s32(0)
INLINE Ints zero_ints16(void) { return FOUR(Ints, X); }
#undef X
#define X(i) vcvtnq_s32_f32(x.of[i])
INLINE Ints to_ints16(Floats x) { return FOUR(Ints, X); }
#undef X
#define X(i) vaddq_s32(a.of[i], b.of[i])
INLINE Ints add_ints16(Ints a, Ints b) { return FOUR(Ints, X); }
#undef X
INLINE int32_t sum_ints16(Ints x) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(x.of[0], x.of[1]), vaddq_s32(x.of[2], x.of[3])));
}
#define X(i) vcvtq_f32_s32(vsubq_s32(x.of[i], vdupq_n_s32(less)))
INLINE Floats less_to_floats16(Ints x, int32_t less) { return FOUR(Floats, X); }
#undef X

#define X(i) vcvtq_f32_s32(vmovl_s16((i) % 2 ? vget_high_s16(half[(i) / 2]) : vget_low_s16(half[(i) / 2])))
INLINE Floats of_bytes16(const int8_t *p) {
    int16x8_t half[2] = {vmovl_s8(vld1_s8(p)), vmovl_s8(vld1_s8(p + 8))};
    return FOUR(Floats, X);
}
#undef X
#define X(i) vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16))
INLINE Floats load16(const bf16 *p) { return FOUR(Floats, X); }
#undef X

/* bfloat16 bits in the upper halves, what was behind them in the lower ones */
INLINE uint32x4_t to_nearest(float32x4_t x) {
    uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    uint32x4_t nearest = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7FFF)));
    return vbslq_u32(vceqq_f32(x, x), nearest, vorrq_u32(bits, vdupq_n_u32(0x400000)));
}
INLINE void store16(bf16 *p, Floats x) {
    for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vshrn_n_u32(to_nearest(x.of[i]), 16));
}
#define X(i) vreinterpretq_f32_u32(vandq_u32(to_nearest(x.of[i]), vdupq_n_u32(0xFFFF0000)))
INLINE Floats rounded16(Floats x) { return FOUR(Floats, X); }
#undef X
INLINE bf16 narrowed(float x) { return (bf16)(vgetq_lane_u32(to_nearest(vdupq_n_f32(x)), 0) >> 16); }

/* ---- pairs ---- */

#define X(i) vreinterpretq_f32_s32(vshlq_n_s32(pairs.of[i], 16))
INLINE Floats even_of(Ints pairs) { return FOUR(Floats, X); }
#undef X
#define X(i) vreinterpretq_f32_s32(vandq_s32(pairs.of[i], vdupq_n_s32((int32_t)0xFFFF0000)))
INLINE Floats odd_of(Ints pairs) { return FOUR(Floats, X); }
#undef X
#define X(i) vdupq_n_s32(x)
INLINE Ints all_ints16(int32_t x) { return FOUR(Ints, X); }
#undef X
#define X(i) vreinterpretq_s32_u8(vld1q_u8((const uint8_t *)p + 16 * i))
INLINE Ints read_ints16(const void *p) { return FOUR(Ints, X); }
#undef X
#include "float_pairs.h"

/* ---- blocks of 64 inputs in integers, see nf4_rows.h ---- */

typedef struct {
    int16x8_t of[8];
} Codes;
typedef int32x4_t Sums;

INLINE int16x8_t looked_up(uint8x8_t lower, uint8x8_t upper) {
    return vreinterpretq_s16_u16(vorrq_u16(vmovl_u8(lower), vshll_n_u8(upper, 8)));
}

/* Inputs of half a byte each: the values' lower bytes are looked up, then their upper ones. In `of`: even inputs,
 * eight at a time, then the odd ones. */
INLINE Codes decode_block(const uint8_t *weight) {
    const uint8x16_t lower = vld1q_u8(NF4_LOWER), upper = vld1q_u8(NF4_UPPER);
    Codes found;
    for (int half = 0; half < 2; half++) {
        uint8x16_t bytes = vld1q_u8(weight + 16 * half);
        uint8x16_t halves[2] = {vshrq_n_u8(bytes, 4), vandq_u8(bytes, vdupq_n_u8(15))};
        for (int odd = 0; odd < 2; odd++) {
            uint8x16_t low = vqtbl1q_u8(lower, halves[odd]), high = vqtbl1q_u8(upper, halves[odd]);
            found.of[4 * odd + 2 * half] = looked_up(vget_low_u8(low), vget_low_u8(high));
            found.of[4 * odd + 2 * half + 1] = looked_up(vget_high_u8(low), vget_high_u8(high));
        }
    }
    return found;
}

INLINE void order_inputs(const int16_t x[64], int16_t *out) {
    for (int i = 0; i < 4; i++) {
        int16x8x2_t pairs = vld2q_s16(x + 16 * i);
        vst1q_s16(out + 8 * i, pairs.val[0]);
        vst1q_s16(out + 32 + 8 * i, pairs.val[1]);
    }
}

INLINE void store_whole(int16_t *p, Ints x) {
    for (int i = 0; i < 4; i++) vst1_s16(p + 4 * i, vmovn_s32(x.of[i]));
}

INLINE Sums dot_two(Codes v, Codes w, const int16_t *x) {
    int32x4_t first = vdupq_n_s32(0), second = first;
    for (int i = 0; i < 8; i++) {
        int16x8_t inputs = vld1q_s16(x + 8 * i);
        first = vmlal_s16(first, vget_low_s16(v.of[i]), vget_low_s16(inputs));
        first = vmlal_high_s16(first, v.of[i], inputs);
        second = vmlal_s16(second, vget_low_s16(w.of[i]), vget_low_s16(inputs));
        second = vmlal_high_s16(second, w.of[i], inputs);
    }
    return vpaddq_s32(first, second);
}

INLINE Four sums_of_four(Sums two, Sums others) { return (Four)vcvtq_f32_s32(vpaddq_s32(two, others)); }

INLINE Four load4(const bf16 *p) { return (Four)vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
INLINE Four fma4(Four a, Four b, Four c) { return (Four)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }

/* ---- products over int8 rows, see kernels.h ---- */

/* 16 states' integers of 15 bits, two bytes each. */
INLINE void store_states(int8_t *states, int64_t size, int64_t i, Ints x) {
    (void)size;
    store_whole((int16_t *)states + i, x);
}

/* [in / 2, 16, 2] bytes times rows of states [rows, 2 size] -> sums of 16 outputs for each. */
INLINE void int8_sums(const uint8_t *weight, const int8_t *states, int64_t size, const int rows, Ints *out) {
    for (int r = 0; r < rows; r++) out[r] = zero_ints16();
    for (int64_t i = 0; i < size; i += 2, weight += 32) {
        uint8x16x2_t two = vld2q_u8(weight); /* an input of 16 outputs each */
        for (int input = 0; input < 2; input++) {
            int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(two.val[input])));
            int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(two.val[input])));
            for (int r = 0; r < rows; r++) {
                int16_t state = ((const int16_t *)states)[r * size + i + input];
                out[r].of[0] = vmlal_n_s16(out[r].of[0], vget_low_s16(low), state);
                out[r].of[1] = vmlal_n_s16(out[r].of[1], vget_high_s16(low), state);
                out[r].of[2] = vmlal_n_s16(out[r].of[2], vget_low_s16(high), state);
                out[r].of[3] = vmlal_n_s16(out[r].of[3], vget_high_s16(high), state);
            }
        }
    }
}
