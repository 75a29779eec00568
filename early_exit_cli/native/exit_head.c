/* An adapter head on a CPU with AVX512-BF16, as `heads.AdapterHead` computes it, with its products in int8: drafts may be
 * approximate.
 */
#include "kernels.h"

typedef struct {
    Int8 down, up, lm_head;
    const bf16 *norm, *final_norm; /* [hidden] */
    float eps, final_eps;
} ExitHead;

/* A token's state [hidden] -> its logits [draft vocab], the best of these, their entropy in nats, and the best one's
 * probability. Returns 0, or 1 when there is no memory. */
int eexit_read_head(const ExitHead *h, const bf16 *state, float *logits, int64_t *choice, float *entropy, float *confidence, int threads) {
    int64_t hidden = h->down.in, rank = h->up.in, most = hidden > rank ? hidden : rank;
    bf16 *inner = scratch_of(rank * sizeof(bf16)), *moved = scratch_of(hidden * sizeof(bf16));
    bf16 *inputs = scratch_of(threads * most * sizeof(bf16));
    int8_t *halves = scratch_of(threads * 2 * most);
    int failed = !inner || !moved || !inputs || !halves;
    Meeting meeting = {0};
    if (!failed)
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num();
        float step;
        int32_t sum;
        Halves mine = {halves + thread * 2 * most, halves + (thread * 2 + 1) * most, &step, &sum};
        bf16 *input = inputs + thread * most;
        rms_norm(state, h->norm, input, hidden, h->eps);
        int8_product(&h->down, input, NULL, inner, 1, &mine);
        meet(&meeting);
        for (int64_t i = 0; i < rank; i += 16) store16(input + i, silu(load16(inner + i)));
        int8_product(&h->up, input, state, moved, 1, &mine);
        meet(&meeting);
        rms_norm(moved, h->final_norm, input, hidden, h->final_eps);
        int8_logits(&h->lm_head, input, logits, &mine);
    }
    if (!failed) summary(logits, h->lm_head.out, choice, entropy, confidence);
    free(inner), free(moved), free(inputs), free(halves);
    return failed;
}
