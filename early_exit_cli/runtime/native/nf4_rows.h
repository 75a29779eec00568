/* The NF4 product where nothing multiplies bfloat16, over bitsandbytes' plain packing, which it has for all
 * processors. A vector holds inputs.
 *
 * The sum over a quantization block of 64 inputs is made of integers, and so has no order: the 16 values of NF4 are
 * whole times 2^-11, and a row's 64 inputs whole times a power of two, in 15 bits. Inputs down to a 64th of the
 * block's largest are what they were; smaller ones are rounded to 2^-14 of it, where bfloat16 itself rounds the
 * largest to 2^-9. No sum is beyond 64 * 2048 * 16320 < 2^31. It becomes a float32, times its scales, and is added to
 * those of the blocks before.
 *
 * weight: [out, in / 2], the first of two inputs in the upper half of a byte. scale: [out / 4, in / 64, 4]. */
#pragma once
#include "kernels.h"

#define TOGETHER 4   /* outputs whose sums are made together */
#define MOST_ROWS 8  /* rows that share a weight that was decoded */
#define WHOLE_BITS 13 /* of an input, behind its first */

/* Rows [rows, in] as the product reads them: whole numbers in the order of `decode_block`, and what they are times,
 * 2^-11 included, [rows, in / 64]. */
typedef struct {
    int16_t *values;
    float *steps;
} Inputs;

INLINE int64_t bytes_of_inputs(int64_t in) { return in * sizeof(int16_t) + in / BLOCK * sizeof(float); }

INLINE float power_of(int exponent) {
    union { uint32_t bits; float value; } u = {(uint32_t)(exponent + 127) << 23};
    return u.value;
}

/* 64 inputs -> whole numbers; returns what they are times: NaN, and zeros, where one of them is not finite. */
INLINE float whole_inputs(const bf16 *x, int16_t *out) {
    int16_t whole[BLOCK];
    unsigned largest = 0;
    for (int i = 0; i < BLOCK; i++) largest = (x[i] & 0x7FFFu) > largest ? (x[i] & 0x7FFFu) : largest;
    int exponent = (int)(largest >> 7) - 127; /* |x| < 2^(exponent + 1) */
    if (exponent == 128) {
        memset(out, 0, BLOCK * sizeof *out);
        return NAN;
    }
    if (exponent < -100) exponent = -100; /* what is smaller is 0 beside it */
    Floats by = all16(power_of(WHOLE_BITS - exponent));
    for (int i = 0; i < BLOCK; i += 16) store_whole(whole + i, to_ints16(mul16(load16(x + i), by)));
    order_inputs(whole, out);
    return power_of(exponent - WHOLE_BITS - NF4_POWER);
}

INLINE Inputs inputs_of(const bf16 *x, int64_t rows, int64_t in, void *scratch) {
    Inputs found = {scratch, (float *)((int16_t *)scratch + rows * in)};
    for (int64_t block = 0; block < rows * in / BLOCK; block++)
        found.steps[block] = whole_inputs(x + block * BLOCK, found.values + block * BLOCK);
    return found;
}

/* Four outputs from `first` on for up to MOST_ROWS rows -> out [rows, 32]: each weight is decoded once. */
INLINE void rows_of_four(const Product *p, int64_t first, const int16_t *x, const float *steps, const int rows,
                         float *out) {
    const int64_t blocks = p->in / BLOCK, stride = p->in / 2;
    const uint8_t *weight = p->weight + first * stride;
    const bf16 *scale = p->scale + first * blocks;
    Four total[MOST_ROWS];
    for (int r = 0; r < rows; r++) total[r] = (Four){0, 0, 0, 0};
    for (int64_t block = 0; block < blocks; block++, weight += BLOCK / 2, scale += TOGETHER) {
        Sums two[MOST_ROWS];
        Codes first = decode_block(weight), second = decode_block(weight + stride);
        for (int r = 0; r < rows; r++) two[r] = dot_two(first, second, x + r * p->in + block * BLOCK);
        Codes third = decode_block(weight + 2 * stride), fourth = decode_block(weight + 3 * stride);
        Four scales = load4(scale);
        for (int r = 0; r < rows; r++) {
            Four whole = sums_of_four(two[r], dot_two(third, fourth, x + r * p->in + block * BLOCK));
            total[r] = fma4(whole * steps[r * blocks + block], scales, total[r]);
        }
    }
    for (int r = 0; r < rows; r++) memcpy(out + r * TILE, &total[r], sizeof total[r]);
}

#ifdef HAS_OUTPUTS
#define SIDES 2 /* vectors of outputs beside each other, */
#define TALL 4  /* and rows, whose sums stay in registers */

/* Adds one block's share of SIDES * HAS_OUTPUTS outputs to those of rows, [rows, 32]; weight: [SIDES, 32,
 * HAS_OUTPUTS]. */
INLINE void add_block(const int32_t *weight, const Eight *scales, const int16_t *x, const float *steps, int64_t in,
                      const int rows, float *total) {
    Wholes sum[TALL][SIDES];
    for (int r = 0; r < rows; r++)
        for (int side = 0; side < SIDES; side++) sum[r][side] = zero_outputs();
#pragma GCC unroll 4
    for (int pair = 0; pair < BLOCK / 2; pair++)
        for (int r = 0; r < rows; r++) {
            Wholes inputs = all_outputs(x + r * in + 2 * pair);
            for (int side = 0; side < SIDES; side++)
                sum[r][side] = add_products(
                    sum[r][side], read_outputs(weight + (side * BLOCK / 2 + pair) * HAS_OUTPUTS), inputs);
        }
    for (int r = 0; r < rows; r++)
        for (int side = 0; side < SIDES; side++) {
            Eight before;
            float *place = total + r * TILE + side * HAS_OUTPUTS;
            memcpy(&before, place, sizeof before);
            before = fma8(floats_of(sum[r][side]) * steps[r * (in / BLOCK)], scales[side], before);
            memcpy(place, &before, sizeof before);
        }
}

/* `rows_of_four` for outputs first .. first + SIDES * HAS_OUTPUTS - 1 and many rows -> out [width, 32], 0 before: the
 * same sums, over weights that are decoded and turned over once for all rows. */
static void many_rows(const Product *p, int64_t first, Inputs x, int64_t width, float *out) {
    const int64_t blocks = p->in / BLOCK, stride = p->in / 2;
    for (int64_t block = 0; block < blocks; block++) {
        int32_t weight[SIDES * BLOCK / 2 * HAS_OUTPUTS];
        Eight scales[SIDES];
        for (int side = 0; side < SIDES; side++) {
            int64_t output = first + side * HAS_OUTPUTS;
            decode_outputs(p->weight + output * stride + block * BLOCK / 2, stride,
                           weight + side * BLOCK / 2 * HAS_OUTPUTS);
            const bf16 *scale = p->scale + (output * blocks + block * TOGETHER);
            scales[side] = eight_of(load4(scale), load4(scale + blocks * TOGETHER));
        }
        for (int64_t row = 0; row < width; row += TALL) {
            int rows = min(TALL, width - row);
#define BODY(n)                                                                                                        \
    add_block(weight, scales, x.values + row * p->in + block * BLOCK, x.steps + row * blocks + block, p->in, n,        \
              out + row * TILE)
            FOR_ROWS(TALL, rows, BODY)
#undef BODY
        }
    }
}
#endif

/* One tile of 32 outputs for all rows -> out [width, 32]. */
static void sums_of_tile(const Product *p, int64_t index, Inputs x, int64_t width, float *out) {
#ifdef HAS_OUTPUTS
    if (width >= MOST_ROWS) { /* fewer rows are not worth the turning */
        memset(out, 0, width * TILE * sizeof(float));
        for (int64_t output = 0; output < TILE; output += SIDES * HAS_OUTPUTS)
            many_rows(p, index * TILE + output, x, width, out + output);
        return;
    }
#endif
    for (int64_t output = 0; output < TILE; output += TOGETHER)
        for (int64_t row = 0; row < width; row += MOST_ROWS) {
            int rows = min(MOST_ROWS, width - row);
#define BODY(n)                                                                                                        \
    rows_of_four(p, index * TILE + output, x.values + row * p->in, x.steps + row * (p->in / BLOCK), n,                 \
                 out + row * TILE + output)
            FOR_ROWS(MOST_ROWS, rows, BODY)
#undef BODY
        }
}
