/* Products over weights as PyTorch and bitsandbytes keep them, [out, in]: in bfloat16, or in int8 with a scale for each
 * output. Nothing is packed, so nothing is held twice. A vector holds inputs; bits are the same for any number of rows.
 *
 * The i-th of a sum's 16 numbers is that of inputs 32 k + 2 i and + 1, k ascending, in float32. Then the 16 are added, in the
 * order of `sum16`. Weights of int8 are whole numbers, which bfloat16 holds exactly: `GROUP` outputs at a time become
 * that, and the scale multiplies their sum. */
#pragma once
#include "kernels.h"

#define GROUP 8 /* outputs whose weights are read for all rows, so that they stay in the caches */

INLINE int64_t bytes_of_group(int64_t in) { return GROUP * in * sizeof(bf16); }

/* So many outputs have their sums in registers beside each other, for each of so many rows. */
#define BESIDE(rows) (SUMS / (rows) >= GROUP ? GROUP : SUMS / (rows) >= 4 ? 4 : SUMS / (rows) >= 2 ? 2 : 1)

/* weight [count, in] for x [rows, in] -> out [rows, 32]. next: weights that are wanted soon, of which memory is told: rows
 * are too short for the processor to see where reading goes on, but where all of a group are read side by side. */
INLINE void rows_of_outputs(const bf16 *weight, const bf16 *next, const bf16 *x, int64_t in, const int rows,
                            const int count, float *out) {
    Floats sum[SUMS];
    float found[SUMS];
    for (int i = 0; i < SUMS; i++) sum[i] = zero16();
    for (int64_t k = 0; k < in; k += 32) {
        Pairs weights[GROUP];
        for (int o = 0; o < count; o++) {
            weights[o] = load_pairs(weight + o * in + k);
            if (count < GROUP) __builtin_prefetch(next + o * in + k);
        }
        for (int r = 0; r < rows; r++) {
            Pairs inputs = load_pairs(x + r * in + k);
            for (int o = 0; o < count; o++) sum[r * count + o] = dot_pairs(sum[r * count + o], inputs, weights[o]);
        }
    }
    sum_each16(sum, rows * count, found);
    for (int r = 0; r < rows; r++) memcpy(out + r * TILE, found + r * count, count * sizeof *found);
}

/* Weights [GROUP, in] of a product from output `first` on, in bfloat16. */
INLINE const bf16 *group_of(const Product *p, int64_t first, bf16 *decoded) {
    if (p->kind == BF16) return (const bf16 *)p->weight + first * p->in;
    const int8_t *whole = (const int8_t *)p->weight + first * p->in;
    for (int64_t i = 0; i < GROUP * p->in; i += 16) store16(decoded + i, of_bytes16(whole + i));
    return decoded;
}

/* One tile of 32 outputs for all rows of x -> out [width, 32]. decoded: [GROUP, in] of scratch. */
static void plain_sums_of_tile(const Product *p, int64_t index, const bf16 *x, int64_t width, bf16 *decoded,
                               float *out) {
    for (int64_t first = 0; first < TILE; first += GROUP) {
        const bf16 *weight = group_of(p, index * TILE + first, decoded);
        const bf16 *next = p->kind == BF16 ? weight + GROUP * p->in : weight;
        for (int64_t row = 0; row < width; row += ROWS) {
            int rows = min(ROWS, width - row);
#define BODY(n)                                                                                                        \
    for (int o = 0; o < GROUP; o += BESIDE(n))                                                                         \
    rows_of_outputs(weight + o * p->in, next + o * p->in, x + row * p->in, p->in, n, BESIDE(n),                        \
                    out + row * TILE + first + o)
            FOR_ROWS(ROWS, rows, BODY)
#undef BODY
        }
    }
    if (p->kind == INT8)
        for (int64_t i = 0; i < width * TILE; i += 16)
            write16(out + i, mul16(read16(out + i), read16(p->row_scale + index * TILE + i % TILE)));
}
