/* The EAGLE head on a CPU, as `eagle.EagleHead` computes it, with its products in int8:
 * drafts may be approximate. Of the positions that a pass verified all but the last only leave keys and values.
 */
#include "kernels.h"

typedef struct {
    Attention attention;
    Int8 fuse, gate_up, down, lm_head;
    const bf16 *fuse_norms; /* [normed_parts, state_size], of the first of the parts that are fused */
    const bf16 *joint_norm; /* [parts * state_size], of all together, or NULL */
    const bf16 *input_norm, *hidden_norm, *mlp_norm, *norm; /* [hidden] */
    const bf16 *embedding; /* [vocab, hidden] */
    int64_t parts, normed_parts, state_size, hidden, inner;
    int64_t norm_before_residual; /* whether the block's residual begins at its normed state */
    int64_t norm_output;          /* whether what it rolls forward from is normed */
    float eps;
} Eagle;

/* Positions `position` .. + rows - 1, each with the token that follows it -> the state behind the last, [hidden], its
 * logits [draft vocab], the best of these and their entropy in nats.
 *
 * states: `parts` pointers to [rows, state_size]; or NULL, then `own` [hidden] is the head's own state and rows is 1.
 * Returns 0, or 1 when there is no memory.
 */
int eexit_eagle(const Eagle *h, const bf16 *const *states, const bf16 *own, const int64_t *tokens, int64_t rows,
                int64_t position, const KVBuffers *buffers, bf16 *state, float *logits, int64_t *choice, float *entropy,
                int threads) {
    int64_t hidden = h->hidden, state_size = h->state_size, wide = h->parts * state_size;
    int64_t widest = max(max(max(wide, 2 * hidden), h->inner), h->attention.output.in), chunk = min(rows, PIECE);
    bf16 *joined = scratch_of(rows * wide * sizeof(bf16)), *fused = scratch_of(rows * hidden * sizeof(bf16));
    bf16 *inputs = scratch_of(threads * rows * 2 * hidden * sizeof(bf16)),
         *normed = scratch_of(threads * hidden * sizeof(bf16));
    bf16 *gated = scratch_of(3 * h->inner * sizeof(bf16));
    int8_t *int15 = scratch_of(threads * 2 * chunk * widest);
    float *steps = scratch_of(threads * chunk * sizeof(float));
    int32_t *sums_of = scratch_of(threads * chunk * sizeof(int32_t));
    AttentionScratch scratch = new_attention_scratch(&h->attention, rows, position + rows, threads);
    int failed =
        !joined || !fused || !inputs || !normed || !gated || !int15 || !steps || !sums_of || !is_allocated(&scratch);
    Barrier barrier = {0};
    if (!failed)
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num();
        Int15 mine = {int15 + thread * 2 * chunk * widest, steps + thread * chunk, sums_of + thread * chunk};
        bf16 *input = inputs + thread * rows * 2 * hidden, *last = fused + (rows - 1) * hidden,
             *own_norm = normed + thread * hidden;
        int64_t from, to;
        if (states) {
            share(rows, &from, &to);
            for (int64_t row = from; row < to; row++) {
                bf16 *parts = joined + row * wide;
                for (int64_t i = 0; i < h->parts; i++)
                    if (i < h->normed_parts)
                        rms_norm(states[i] + row * state_size, h->fuse_norms + i * state_size, parts + i * state_size,
                                 state_size, h->eps);
                    else
                        memcpy(parts + i * state_size, states[i] + row * state_size, state_size * sizeof(bf16));
                if (h->joint_norm) rms_norm(parts, h->joint_norm, parts, wide, h->eps);
            }
            barrier_wait(&barrier);
            int8_product(&h->fuse, joined, NULL, fused, rows, &mine);
        } else if (thread == 0)
            memcpy(fused, own, hidden * sizeof(bf16));
        barrier_wait(&barrier);
        for (int64_t row = 0; row < rows; row++) {
            rms_norm(h->embedding + tokens[row] * hidden, h->input_norm, input + row * 2 * hidden, hidden, h->eps);
            rms_norm(fused + row * hidden, h->hidden_norm, input + row * 2 * hidden + hidden, hidden, h->eps);
        }
        const bf16 *residual = h->norm_before_residual ? input + (2 * rows - 1) * hidden : last;
        attend_last(&h->attention, input, rows, position, buffers, &scratch, residual, last, &mine, &barrier);
        barrier_wait(&barrier);
        rms_norm(last, h->mlp_norm, own_norm, hidden, h->eps);
        int8_product(&h->gate_up, own_norm, NULL, gated, 1, &mine);
        barrier_wait(&barrier);
        share(h->inner / INT8_TILE, &from, &to);
        for (int64_t i = from * INT8_TILE; i < to * INT8_TILE; i += 16)
            store16(gated + 2 * h->inner + i,
                    mul16(rounded16(silu(load16(gated + i))), load16(gated + h->inner + i)));
        barrier_wait(&barrier);
        int8_product(&h->down, gated + 2 * h->inner, last, last, 1, &mine);
        barrier_wait(&barrier);
        rms_norm(last, h->norm, own_norm, hidden, h->eps);
        if (thread == 0) memcpy(state, h->norm_output ? own_norm : last, hidden * sizeof(bf16));
        int8_logits(&h->lm_head, own_norm, logits, &mine);
    }
    if (!failed) choice_and_entropy(logits, h->lm_head.out, choice, entropy, NULL);
    free(joined), free(fused), free(inputs), free(normed), free(gated), free(int15), free(steps), free(sums_of);
    free_attention_scratch(&scratch);
    return failed;
}
