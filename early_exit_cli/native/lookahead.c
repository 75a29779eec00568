/* The lookahead head on a CPU with AVX512-BF16, as `lookahead.LookaheadHead` computes it, with its products in int8:
 * drafts may be approximate. Of the positions that a pass verified all but the last only leave keys and values.
 */
#include "kernels.h"

typedef struct {
    Int8 fuse, key_value, query, output, gate_up, down, lm_head;
    const bf16 *fuse_norms; /* [exits, hidden] */
    const bf16 *input_norm, *hidden_norm, *mlp_norm, *norm; /* [hidden] */
    const bf16 *embedding; /* [vocab, hidden] */
    int64_t exits, hidden, inner, query_heads, kv_heads, head_dim;
    float eps, scale;
} Lookahead;

/* The text's buffers, a KV cache for each key head, and the rotary tables of all positions, [capacity, head_dim]. */
typedef struct {
    bf16 *keys, *values;
    const bf16 *cos, *sin;
    int64_t capacity;
} Memory;

/* Positions `position` .. + rows - 1, each with the token that follows it -> the state behind the last, [hidden], its logits
 * [draft vocab], the best of these and their entropy in nats.
 *
 * states: exits + 1 pointers to [rows, hidden], the last with the final norm applied; or NULL, then `own` [hidden] is the
 * head's own state and rows is 1. Returns 0, or 1 when there is no memory.
 */
int eexit_lookahead(const Lookahead *h, const bf16 *const *states, const bf16 *own, const int64_t *tokens, int64_t rows,
                    int64_t position, const Memory *memory, bf16 *state, float *logits, int64_t *choice, float *entropy, int threads) {
    int64_t hidden = h->hidden, size = h->head_dim, wide = (h->exits + 1) * hidden, end = position + rows;
    int64_t most = wide > h->inner ? wide : h->inner;
    bf16 *joined = scratch_of(rows * wide * sizeof(bf16)), *fused = scratch_of(rows * hidden * sizeof(bf16));
    bf16 *inputs = scratch_of(threads * rows * 2 * hidden * sizeof(bf16)), *normed = scratch_of(threads * hidden * sizeof(bf16));
    bf16 *kv = scratch_of(rows * 2 * h->kv_heads * size * sizeof(bf16)), *query = scratch_of(h->query_heads * size * sizeof(bf16));
    bf16 *attended = scratch_of(h->query_heads * size * sizeof(bf16)), *gated = scratch_of(3 * h->inner * sizeof(bf16));
    float *scores = scratch_of(threads * (end + 32) * sizeof(float));
    int8_t *halves = scratch_of(threads * 2 * rows * most);
    float *steps = scratch_of(threads * rows * sizeof(float));
    int32_t *sums_of = scratch_of(threads * rows * sizeof(int32_t));
    int failed = !joined || !fused || !inputs || !normed || !kv || !query || !attended || !gated || !scores || !halves || !steps || !sums_of;
    Meeting meeting = {0};
    if (!failed)
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num();
        Halves mine = {halves + thread * 2 * rows * most, halves + (thread * 2 + 1) * rows * most, steps + thread * rows, sums_of + thread * rows};
        bf16 *input = inputs + thread * rows * 2 * hidden, *last = fused + (rows - 1) * hidden, *own_norm = normed + thread * hidden;
        int64_t from, to;
        if (states) {
            share(rows, &from, &to);
            for (int64_t row = from; row < to; row++) {
                for (int64_t i = 0; i < h->exits; i++)
                    rms_norm(states[i] + row * hidden, h->fuse_norms + i * hidden, joined + row * wide + i * hidden, hidden, h->eps);
                memcpy(joined + row * wide + h->exits * hidden, states[h->exits] + row * hidden, hidden * sizeof(bf16));
            }
            meet(&meeting);
            int8_product(&h->fuse, joined, NULL, fused, rows, &mine);
        } else if (thread == 0)
            memcpy(fused, own, hidden * sizeof(bf16));
        meet(&meeting);
        for (int64_t row = 0; row < rows; row++) {
            rms_norm(h->embedding + tokens[row] * hidden, h->input_norm, input + row * 2 * hidden, hidden, h->eps);
            rms_norm(fused + row * hidden, h->hidden_norm, input + row * 2 * hidden + hidden, hidden, h->eps);
        }
        int8_product(&h->key_value, input, NULL, kv, rows, &mine);
        int8_product(&h->query, input + (rows - 1) * 2 * hidden, NULL, query, 1, &mine);
        meet(&meeting);
        share(h->kv_heads * rows, &from, &to);
        for (int64_t unit = from; unit < to; unit++) {
            int64_t head = unit / rows, row = unit % rows, place = position + row;
            const bf16 *key = kv + row * 2 * h->kv_heads * size + head * size;
            int64_t start = head * memory->capacity * size;
            bf16 turned[size];
            rotate(key, NULL, memory->cos + place * size, memory->sin + place * size, turned, size, h->eps);
            remember(turned, key + h->kv_heads * size, memory->keys + start, memory->values + start, place, size);
        }
        meet(&meeting);
        share(h->query_heads, &from, &to);
        for (int64_t head = from; head < to; head++) {
            int64_t start = head / (h->query_heads / h->kv_heads) * memory->capacity * size;
            bf16 turned[size];
            rotate(query + head * size, NULL, memory->cos + (end - 1) * size, memory->sin + (end - 1) * size, turned, size, h->eps);
            attend(turned, memory->keys + start, memory->values + start, end - 1, 0, size, h->scale, 1, scores + thread * (end + 32), attended + head * size, size);
        }
        meet(&meeting);
        int8_product(&h->output, attended, last, last, 1, &mine);
        meet(&meeting);
        rms_norm(last, h->mlp_norm, own_norm, hidden, h->eps);
        int8_product(&h->gate_up, own_norm, NULL, gated, 1, &mine);
        meet(&meeting);
        share(h->inner / INT8_TILE, &from, &to);
        for (int64_t i = from * INT8_TILE; i < to * INT8_TILE; i += 16)
            store16(gated + 2 * h->inner + i, _mm512_mul_ps(rounded(silu(load16(gated + i))), load16(gated + h->inner + i)));
        meet(&meeting);
        int8_product(&h->down, gated + 2 * h->inner, last, last, 1, &mine);
        meet(&meeting);
        rms_norm(last, h->norm, own_norm, hidden, h->eps);
        if (thread == 0) memcpy(state, own_norm, hidden * sizeof(bf16));
        int8_logits(&h->lm_head, own_norm, logits, &mine);
    }
    if (!failed) summary(logits, h->lm_head.out, choice, entropy, NULL);
    free(joined), free(fused), free(inputs), free(normed), free(kv), free(query), free(attended), free(gated);
    free(scores), free(halves), free(steps), free(sums_of);
    return failed;
}
