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

typedef struct {
    int8_t *high, *low;
    float *step;
    int32_t *sum;
} Halves;

/* out [rows, p->out] = x [rows, p->in] times the weights, this thread's share of the outputs, added to `base` if there. */
static void int8_product(const Int8 *p, const bf16 *x, const bf16 *base, bf16 *out, int64_t rows, Halves *own) {
    for (int64_t row = 0; row < rows; row++) own->step[row] = halve(x + row * p->in, own->high + row * p->in, own->low + row * p->in, p->in, own->sum + row);
    int64_t from, to;
    share(p->out / INT8_TILE, &from, &to);
    for (int64_t t = from; t < to; t++)
        for (int64_t row = 0; row < rows; row += ROWS) {
            __m512 found[ROWS];
            int count = least(ROWS, rows - row);
            int8_tile(p, t, own->high + row * p->in, own->low + row * p->in, own->step + row, own->sum + row, count, found);
            for (int r = 0; r < count; r++) {
                int64_t place = (row + r) * p->out + t * INT8_TILE;
                store16(out + place, base ? _mm512_add_ps(load16(base + place), found[r]) : found[r]);
            }
        }
}

/* Entropy (nats) of the softmax of `count` logits, and the first of the best. */
static void summary(const float *logits, int64_t count, int64_t *choice, float *entropy) {
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps(), weighted = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(logits + i));
    float peak = _mm512_reduce_max_ps(most);
    *choice = 0;
    for (int64_t i = count - 16; i >= 0; i -= 16) {
        unsigned equal = _mm512_cmp_ps_mask(_mm512_loadu_ps(logits + i), _mm512_set1_ps(peak), _CMP_EQ_OQ);
        if (equal) *choice = i + __builtin_ctz(equal);
    }
    for (int64_t i = 0; i < count; i += 16) {
        __m512 below = _mm512_sub_ps(_mm512_loadu_ps(logits + i), _mm512_set1_ps(peak));
        __m512 e = exponential(below);
        total = _mm512_add_ps(total, e);
        weighted = _mm512_fmadd_ps(e, below, weighted);
    }
    float sum = _mm512_reduce_add_ps(total); /* H = ln sum - (sum e x) / sum */
    *entropy = logf(sum) - _mm512_reduce_add_ps(weighted) / sum;
}

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
        mine.step[0] = halve(own_norm, mine.high, mine.low, hidden, mine.sum);
        share(h->lm_head.out / INT8_TILE, &from, &to);
        for (int64_t t = from; t < to; t++) {
            __m512 found[1];
            int8_tile(&h->lm_head, t, mine.high, mine.low, mine.step, mine.sum, 1, found);
            _mm512_storeu_ps(logits + t * INT8_TILE, found[0]);
        }
    }
    if (!failed) summary(logits, h->lm_head.out, choice, entropy);
    free(joined), free(fused), free(inputs), free(normed), free(kv), free(query), free(attended), free(gated);
    free(scores), free(halves), free(steps), free(sums_of);
    return failed;
}
