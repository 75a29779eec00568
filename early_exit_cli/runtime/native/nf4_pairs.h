/* The NF4 product where an instruction multiplies pairs of bfloat16: over bitsandbytes' own packing for such
 * processors, and in its order (csrc/cpu_ops.cpp): over each quantization block of 64 inputs in float32, two at a
 * time, then times the block's scale. A vector holds outputs.
 *
 * weight: [out / 32, in / 2, 32], two inputs a byte: low half for outputs 0..15, high for 16..31. scale: [in / 64,
 * out]. */
#pragma once
#include "kernels.h"

/* Rows [rows, in] as the product reads them: as they are. */
typedef const bf16 *Inputs;

INLINE int64_t bytes_of_inputs(int64_t in) { return 0 * in; }

INLINE Inputs inputs_of(const bf16 *x, int64_t rows, int64_t in, void *scratch) {
    (void)rows, (void)in, (void)scratch;
    return x;
}

/* Adds two inputs' share of the rows to their sums. */
INLINE void add_pair(Floats sum[][2], const bf16 *x, int64_t stride, Pairs low, Pairs high, const int rows) {
    for (int r = 0; r < rows; r++) {
        Pairs value = all_pairs(x + r * stride);
        sum[r][0] = dot_pairs(sum[r][0], value, low);
        sum[r][1] = dot_pairs(sum[r][1], value, high);
    }
}

/* total += sum * scale, for the 64 inputs that share it */
INLINE void add_scaled(Floats total[][2], Floats sum[][2], const bf16 *scale, const int rows) {
    Floats first = load16(scale), second = load16(scale + 16);
    for (int r = 0; r < rows; r++) {
        total[r][0] = fma16(sum[r][0], first, total[r][0]);
        total[r][1] = fma16(sum[r][1], second, total[r][1]);
    }
}

/* One tile of outputs for up to ROWS rows -> out [rows, 32]: weights are used as they are decoded. */
INLINE void rows_of_tile(const Product *p, const uint8_t *weight, const bf16 *scale, const bf16 *x, const int rows,
                         float *out) {
    Floats total[ROWS][2];
    for (int r = 0; r < rows; r++) total[r][0] = total[r][1] = zero16();
    for (int64_t k = 0; k < p->in; k += BLOCK, scale += p->out) {
        Floats sum[ROWS][2];
        for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = zero16();
        for (int64_t pair = 0; pair < BLOCK; pair += 2, weight += 32) {
            Pairs low, high;
            decode_pairs(weight, &low, &high);
            add_pair(sum, x + k + pair, p->in, low, high, rows);
        }
        add_scaled(total, sum, scale, rows);
    }
    for (int r = 0; r < rows; r++) {
        write16(out + r * TILE, total[r][0]);
        write16(out + r * TILE + 16, total[r][1]);
    }
}

/* One tile of 32 outputs for all rows -> out [width, 32]. */
static void sums_of_tile(const Product *p, int64_t index, Inputs x, int64_t width, float *out) {
    const uint8_t *weight = p->weight + index * TILE * p->in / 2;
    const bf16 *scale = p->scale + index * TILE;
    for (int64_t row = 0; row < width; row += ROWS) {
        int rows = min(ROWS, width - row);
#define BODY(n) rows_of_tile(p, weight, scale, x + row * p->in, n, out + row * TILE)
        FOR_ROWS(ROWS, rows, BODY)
#undef BODY
    }
}
