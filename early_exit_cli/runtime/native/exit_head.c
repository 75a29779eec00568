/* An exit head on a CPU, as `exit_heads.LinearHead`, `exit_heads.AdapterHead` and `exit_heads.AttentionHead` compute
 * it, with its products in int8: drafts may be approximate.
 */
#include "kernels.h"

typedef struct {
    Attention attention; /* of no heads where there is none */
    Int8 down, up, lm_head; /* a linear head has no `down` and `up`; `final_norm` and `lm_head` are its own */
    const bf16 *attention_norm, *norm, *final_norm; /* [hidden] */
    float eps, final_eps;
} ExitHead;

/* States [rows, hidden] at `position` -> of the last one: logits [draft vocab], the best of these, their entropy in
 * nats, and the best one's probability. The others, and `buffers`, are for the attention. Returns 0, or 1 when there is
 * no memory. */
int eexit_read_head(const ExitHead *h, const bf16 *states, int64_t rows, int64_t position, const KVBuffers *buffers,
                    float *logits, int64_t *choice, float *entropy, float *confidence, int threads) {
    int64_t hidden = h->lm_head.in, rank = h->up.in, widest = max(max(hidden, rank), h->attention.output.in),
            chunk = min(rows, PIECE);
    int attends = h->attention.query_heads > 0;
    bf16 *inner = scratch_of(rank * sizeof(bf16)), *state = scratch_of(hidden * sizeof(bf16)),
         *moved = scratch_of(hidden * sizeof(bf16));
    bf16 *inputs = scratch_of(threads * rows * widest * sizeof(bf16));
    int8_t *int15 = scratch_of(threads * 2 * chunk * widest);
    float *steps = scratch_of(threads * chunk * sizeof(float));
    int32_t *sums_of = scratch_of(threads * chunk * sizeof(int32_t));
    AttentionScratch scratch = {0};
    if (attends) scratch = new_attention_scratch(&h->attention, rows, position + rows, threads);
    int failed =
        !inner || !state || !moved || !inputs || !int15 || !steps || !sums_of || (attends && !is_allocated(&scratch));
    Barrier barrier = {0};
    if (!failed) memcpy(state, states + (rows - 1) * hidden, hidden * sizeof(bf16));
    if (!failed)
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num();
        Int15 mine = {int15 + thread * 2 * chunk * widest, steps + thread * chunk, sums_of + thread * chunk};
        bf16 *input = inputs + thread * rows * widest;
        if (attends) {
            for (int64_t row = 0; row < rows; row++)
                rms_norm(states + row * hidden, h->attention_norm, input + row * hidden, hidden, h->eps);
            attend_last(&h->attention, input, rows, position, buffers, &scratch, state, state, &mine, &barrier);
            barrier_wait(&barrier);
        }
        if (rank) {
            rms_norm(state, h->norm, input, hidden, h->eps);
            int8_product(&h->down, input, NULL, inner, 1, &mine);
            barrier_wait(&barrier);
            for (int64_t i = 0; i < rank; i += 16) store16(input + i, silu(load16(inner + i)));
            int8_product(&h->up, input, state, moved, 1, &mine);
            barrier_wait(&barrier);
        }
        rms_norm(rank ? moved : state, h->final_norm, input, hidden, h->final_eps);
        int8_logits(&h->lm_head, input, logits, &mine);
    }
    if (!failed) choice_and_entropy(logits, h->lm_head.out, choice, entropy, confidence);
    free(inner), free(state), free(moved), free(inputs), free(int15), free(steps), free(sums_of);
    free_attention_scratch(&scratch);
    return failed;
}
