/* The LM head on a CPU: final norm, logits, and the exact argmax of `exact_argmax.ExactArgmax`.
 *
 * Approximate logits come from int8 rows and states in 15 bits; the tokens that could still be the best go through the
 * product that all logits are made by, so that even ties fall as there, to the lowest token.
 */
#include "kernels.h"

typedef struct {
    Int8 quantized;           /* the rows in int8, w' below */
    const float *error;       /* [vocab] ||w - w'|| and what float32 sums err by, relative to ||state|| */
    const float *norm;        /* [vocab] ||w'|| */
    const bf16 *rows;         /* [vocab, hidden] */
    Norm final_norm;          /* [hidden] */
    int64_t vocab, hidden;
    float eps;
} LMHead;

/* The logit of a token: its row times the state, rounded. One order of summing for all uses. */
INLINE float logit(const bf16 *row, const bf16 *state, int64_t hidden) {
    Floats sum = zero16();
    for (int64_t i = 0; i < hidden; i += 32)
        sum = dot_pairs(sum, load_pairs(state + i), load_pairs(row + i));
    return to_float(narrowed(sum16(sum)));
}

/* states [width, hidden], final norm not yet applied -> normed [width, hidden]. */
void eexit_final_norm(const LMHead *h, const bf16 *states, bf16 *normed, int64_t width) {
    for (int64_t row = 0; row < width; row++)
        apply_norm(h->final_norm, states + row * h->hidden, normed + row * h->hidden, h->hidden, h->eps);
}

/* normed [width, hidden] -> all logits [width, vocab]. */
void eexit_logits(const LMHead *h, const bf16 *normed, bf16 *out, int64_t width, int threads) {
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to;
        share(h->vocab, &from, &to);
        for (int64_t token = from; token < to; token++)
            for (int64_t row = 0; row < width; row++) {
                union {
                    float value;
                    uint32_t bits;
                } found = {logit(h->rows + token * h->hidden, normed + row * h->hidden, h->hidden)};
                out[row * h->vocab + token] = found.bits >> 16;
            }
    }
}

/* How far an approximate logit of these 16 tokens may be from the logit:
 * |A - L| <= ||w - w'|| ||h|| + ||w'|| ||h - h'|| + 2^-8 |A|, with the slack of `exact_argmax.ExactArgmax`. */
INLINE Floats error_of(const LMHead *h, int64_t token, Floats approximate, float norm, float rest) {
    Floats bound = mul16(read16(h->error + token), all16(norm));
    bound = fma16(read16(h->norm + token), all16(rest), bound);
    return fma16(abs16(approximate), all16(1.01f / 256),
                           mul16(bound, all16(1.01f)));
}

/* The argmax of the logits of each state, the lowest token among equals: normed [width, hidden], made here from
 * `states` where these are given -> choices [width] and their logits; -1 and NaN where a state is not finite. Returns
 * 0, or 1 when there is no memory. */
int eexit_choose(const LMHead *h, const bf16 *states, bf16 *normed, int64_t *choices, float *values, int64_t width,
                 int threads) {
    int64_t hidden = h->hidden, tiles = h->vocab / INT8_TILE;
    float *approximate = scratch_of(width * h->vocab * sizeof(float));
    int8_t *whole = scratch_of(width * 2 * hidden);
    float *floors = scratch_of(threads * width * sizeof(float)), *best = scratch_of(threads * width * sizeof(float));
    int64_t *found = scratch_of(threads * width * sizeof(int64_t));
    float step[width], norm[width], rest[width];
    int32_t sum[width];
    int failed = !approximate || !whole || !floors || !best || !found;
    Barrier barrier = {0};
    if (!failed) {
        if (states) eexit_final_norm(h, states, normed, width);
        for (int64_t i = 0; i < threads * width; i++) found[i] = -1; /* the team may be smaller */
        for (int64_t row = 0; row < width; row++) {
            double square = 0;
            for (int64_t i = 0; i < hidden; i++)
                square += (double)to_float(normed[row * hidden + i]) * to_float(normed[row * hidden + i]);
            norm[row] = (float)sqrt(square) * 1.0001f;
            if (!isfinite(norm[row])) {
                memset(whole + row * 2 * hidden, 0, 2 * hidden);
                step[row] = 1, sum[row] = 0;
            } else
                step[row] = split_int15(normed + row * hidden, whole + row * 2 * hidden, hidden, sum + row);
            rest[row] = 0.501f * step[row] * sqrtf((float)hidden);
        }
#pragma omp parallel num_threads(threads)
        {
            int thread = omp_get_thread_num(), team = omp_get_num_threads();
            int64_t from, to;
            share(tiles, &from, &to);
            Floats floor[width];
            for (int64_t row = 0; row < width; row++) floor[row] = all16(-INFINITY);
            for (int64_t t = from; t < to; t++) {
                int64_t token = t * INT8_TILE;
                for (int64_t row = 0; row < width; row += ROWS) {
                    Floats a[ROWS];
                    int rows = min(ROWS, width - row);
                    int8_tile(&h->quantized, t, whole + row * 2 * hidden, step + row, sum + row, rows, a);
                    for (int r = 0; r < rows; r++) {
                        write16(approximate + (row + r) * h->vocab + token, a[r]);
                        floor[row + r] =
                            max16(floor[row + r],
                                          sub16(a[r], error_of(h, token, a[r], norm[row + r], rest[row + r])));
                    }
                }
            }
            for (int64_t row = 0; row < width; row++) floors[thread * width + row] = most16(floor[row]);
            barrier_wait(&barrier);
            for (int64_t row = 0; row < width; row++) {
                float least_possible = -INFINITY;
                for (int other = 0; other < team; other++)
                    least_possible = fmaxf(least_possible, floors[other * width + row]);
                float most = -INFINITY;
                int64_t winner = -1;
                for (int64_t token = from * INT8_TILE; token < to * INT8_TILE; token += INT8_TILE) {
                    Floats a = read16(approximate + row * h->vocab + token);
                    Floats highest = add16(a, error_of(h, token, a, norm[row], rest[row]));
                    unsigned may_win = at_least16(highest, all16(least_possible));
                    for (; may_win; may_win &= may_win - 1) {
                        int64_t candidate = token + __builtin_ctz(may_win);
                        float value = logit(h->rows + candidate * hidden, normed + row * hidden, hidden);
                        if (value > most) most = value, winner = candidate;
                    }
                }
                best[thread * width + row] = most;
                found[thread * width + row] = winner;
            }
        }
        for (int64_t row = 0; row < width; row++) {
            float most = -INFINITY;
            choices[row] = 0;
            for (int thread = 0; thread < threads; thread++) /* ascending tokens: the lowest of equals stays */
                if (found[thread * width + row] >= 0 && best[thread * width + row] > most)
                    most = best[thread * width + row], choices[row] = found[thread * width + row];
            values[row] = most;
            if (!isfinite(norm[row])) choices[row] = -1, values[row] = NAN;
        }
    }
    free(approximate), free(whole), free(floors), free(best), free(found);
    return failed;
}
