/* What the compiled passes share: norms, rotation, attention of one row, products over int8 rows, in the vectors of
 * whichever instruction set it is compiled for.
 *
 * Every sum runs in one fixed order. Nothing here may be compiled with reassociation or contraction.
 */
#pragma once
#include <math.h>
#if __has_include(<omp.h>)
#include <omp.h>
#else /* as with Apple's compiler */
int omp_get_thread_num(void);
int omp_get_num_threads(void);
#endif
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#define PIECE 64      /* rows of a product that are worked on at a time, so that they stay in the caches */
#define INT8_TILE 16  /* outputs that int8 rows are packed by */

/* ---- functions of numbers ---- */

/* e^x, within 2 units in the last place of float32; 0 far below, infinite far above (Cephes' expf) */
INLINE Floats exponential(Floats x) {
    x = max16(min16(x, all16(128.0f)), all16(-128.0f));
    Floats n = nearest16(mul16(x, all16(1.44269504088896341f)));
    Floats r = negative_fma16(n, all16(0.693359375f), x);
    r = negative_fma16(n, all16(-2.12194440e-4f), r);
    Floats p = all16(1.9875691500e-4f);
    p = fma16(p, r, all16(1.3981999507e-3f));
    p = fma16(p, r, all16(8.3334519073e-3f));
    p = fma16(p, r, all16(4.1665795894e-2f));
    p = fma16(p, r, all16(1.6666665459e-1f));
    p = fma16(p, r, all16(5.0000001201e-1f));
    p = fma16(p, mul16(r, r), add16(r, all16(1.0f)));
    return times_power16(p, n);
}

INLINE Floats silu(Floats x) {
    Floats e = exponential(sub16(zero16(), x));
    return div16(x, add16(all16(1.0f), e));
}

/* GELU by tanh: x (1 + tanh u) / 2 = x / (1 + e^(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3) */
INLINE Floats gelu(Floats x) {
    Floats twice = mul16(x, fma16(mul16(x, x), all16(0.0713548162726f), all16(1.59576912160573f)));
    return div16(x, add16(all16(1.0f), exponential(sub16(zero16(), twice))));
}

/* Below `cap`: cap tanh(x / cap), in place, for `count` numbers, whole vectors. */
SHARED void bend(float *x, int64_t count, float cap) {
    for (int64_t i = 0; i < count; i += 16) {
        Floats e = exponential(min16(all16(80.0f), mul16(read16(x + i), all16(-2.0f / cap)))); /* finite */
        Floats tanh = div16(sub16(all16(1.0f), e), add16(all16(1.0f), e));
        write16(x + i, mul16(tanh, all16(cap)));
    }
}

/* 1 / sqrt(mean(x^2) + eps) */
INLINE Floats inverse_root(const bf16 *x, int64_t size, float eps) {
    Floats total = zero16();
    for (int64_t i = 0; i < size; i += 16) {
        Floats value = load16(x + i);
        total = fma16(value, value, total);
    }
    return all16(1.0f / sqrtf(sum16(total) / (float)size + eps));
}

/* x / sqrt(mean(x^2) + eps), rounded, times the weight, rounded: [size] */
INLINE void rms_norm(const bf16 *x, const bf16 *weight, bf16 *out, int64_t size, float eps) {
    Floats by = inverse_root(x, size, eps);
    for (int64_t i = 0; i < size; i += 16)
        store16(out + i, mul16(load16(weight + i), rounded16(mul16(load16(x + i), by))));
}

/* The same times a float32 weight, with one rounding at the end: Gemma's and OLMo 2's. */
SHARED void rms_norm_once(const bf16 *x, const float *weight, bf16 *out, int64_t size, float eps) {
    Floats by = inverse_root(x, size, eps);
    for (int64_t i = 0; i < size; i += 16) store16(out + i, mul16(mul16(load16(x + i), by), read16(weight + i)));
}

/* A norm's weight: for `rms_norm`, or for `rms_norm_once`; neither where there is no norm. */
typedef struct {
    const bf16 *weight;
    const float *once;
} Norm;

INLINE int is_there(Norm norm) { return norm.weight || norm.once; }

/* Its part from a place on. */
INLINE Norm norm_from(Norm norm, int64_t place) {
    return (Norm){norm.weight ? norm.weight + place : NULL, norm.once ? norm.once + place : NULL};
}

INLINE void apply_norm(Norm norm, const bf16 *x, bf16 *out, int64_t size, float eps) {
    if (norm.weight)
        rms_norm(x, norm.weight, out, size, eps);
    else
        rms_norm_once(x, norm.once, out, size, eps);
}

/* Calls `body` with a constant number of rows, `most` at most, so that sums stay in registers. */
#define FOR_ROWS(most, count, body)                                                                                    \
    switch (count) {                                                                                                   \
    case 1: body(1); break;                                                                                            \
    case 2: body(2); break;                                                                                            \
    case 3: body(3); break;                                                                                            \
    case 4: body(4); break;                                                                                            \
    case 5: if (most >= 5) body(5); break;                                                                             \
    case 6: if (most >= 6) body(6); break;                                                                             \
    case 7: if (most >= 7) body(7); break;                                                                             \
    default: if (most >= 8) body(8); break;                                                                            \
    }

INLINE int min(int64_t a, int64_t b) { return (int)(a < b ? a : b); }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

/* A thread's share of `count` things: [from, to). */
INLINE void share(int64_t count, int64_t *from, int64_t *to) {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *from = count * thread / threads;
    *to = count * (thread + 1) / threads;
}

/* Where the threads of a pass wait for each other. One that waits spins for some microseconds only: on a machine that
 * does other things too, the thread it waits for may have no core. */
typedef struct {
    atomic_int arrived, passed;
} Barrier;

#define SPINS 1000

INLINE void barrier_wait(Barrier *barrier) {
    int passed = atomic_load(&barrier->passed);
    if (atomic_fetch_add(&barrier->arrived, 1) + 1 == omp_get_num_threads()) {
        atomic_store(&barrier->arrived, 0);
        atomic_fetch_add(&barrier->passed, 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&barrier->passed, memory_order_acquire) == passed; spins++)
        if (spins < SPINS)
            relax();
        else
            sched_yield();
}

/* ---- attention ---- */

/* One head of one row: normed where the model does that, then its first `turned` numbers rotated; sin is 0 and cos 1 of
 * those behind. [size] to [size]. */
SHARED void rotate(const bf16 *x, Norm norm, const bf16 *cos, const bf16 *sin, bf16 *out, int64_t size, int64_t turned,
                   float eps) {
    bf16 normed[size];
    if (is_there(norm)) {
        apply_norm(norm, x, normed, size, eps);
        x = normed;
    }
    int64_t half = turned / 2;
    for (int64_t i = 0; i < size; i += 16) {
        Floats other_half = load16(x + (i < half ? i + half : i < turned ? i - half : i));
        Floats product = rounded16(mul16(load16(x + i), load16(cos + i)));
        store16(out + i, add16(product, rounded16(mul16(other_half, load16(sin + i)))));
    }
}

/* The same without a norm, by tables in float32, rounded once (OLMo 2). */
SHARED void rotate_once(const bf16 *x, const float *cos, const float *sin, bf16 *out, int64_t size, int64_t turned) {
    int64_t half = turned / 2;
    for (int64_t i = 0; i < size; i += 16) {
        Floats other_half = load16(x + (i < half ? i + half : i < turned ? i - half : i));
        store16(out + i, add16(mul16(load16(x + i), read16(cos + i)), mul16(other_half, read16(sin + i))));
    }
}

/* The KV cache of one key head holds keys by 16 tokens, [capacity / 16, size / 2, 16, 2], and values by two,
 * [capacity / 2, size, 2]: the pairs that a bfloat16 product adds up stand side by side. */
#define KEY_TILE 16

SHARED void store_kv(const bf16 *key, const bf16 *value, bf16 *keys, bf16 *values, int64_t place, int64_t size) {
    bf16 *target = keys + place / KEY_TILE * KEY_TILE * size + place % KEY_TILE * 2;
    for (int64_t i = 0; i < size; i += 2) memcpy(target + i * KEY_TILE, key + i, 2 * sizeof(bf16));
    target = values + place / 2 * 2 * size + place % 2;
    for (int64_t i = 0; i < size; i++) target[2 * i] = value[i];
}

/* Scores of `rows` queries [rows, size] over `tiles` tiles of keys -> out [rows, stride]. */
INLINE void score_tiles(const bf16 *queries, const bf16 *keys, int64_t size, float scale, const int rows,
                        const int tiles, float *out, int64_t stride) {
    Floats sum[ROWS][KEY_TILES];
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tiles; t++) sum[r][t] = zero16();
    for (int64_t i = 0; i < size; i += 2) {
        Pairs pair[KEY_TILES];
        for (int t = 0; t < tiles; t++) pair[t] = load_pairs(keys + (t * size + i) * KEY_TILE);
        for (int r = 0; r < rows; r++) {
            Pairs query = all_pairs(queries + r * size + i);
            for (int t = 0; t < tiles; t++) sum[r][t] = dot_pairs(sum[r][t], pair[t], query);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int t = 0; t < tiles; t++) write16(out + r * stride + t * KEY_TILE, mul16(sum[r][t], all16(scale)));
}

/* Scores q . k * scale of `rows` queries [rows, size] over keys [begin, end), begin a multiple of 16 -> out [rows,
 * stride]. */
INLINE void score(const bf16 *queries, const bf16 *keys, int64_t begin, int64_t end, int64_t size, float scale,
                  const int rows, float *out, int64_t stride) {
    int64_t first = begin;
    for (; end - first > (KEY_TILES - 1) * KEY_TILE; first += KEY_TILES * KEY_TILE)
        score_tiles(queries, keys + first * size, size, scale, rows, KEY_TILES, out + first - begin, stride);
    for (; first < end; first += KEY_TILE)
        score_tiles(queries, keys + first * size, size, scale, rows, 1, out + first - begin, stride);
}

/* Softmax of one row's scores of keys `begin` .. + count - 1 (whole tiles), of which it sees [from, end): in place,
 * rounded to bfloat16 and not yet divided by their sum, which is returned. */
SHARED float softmax(float *x, int64_t begin, int64_t count, int64_t from, int64_t end) {
    Floats most = all16(-INFINITY), total = zero16();
    int64_t first = (max(from - begin, 0) + KEY_TILE - 1) & -KEY_TILE, last = (end - begin) & -KEY_TILE; /* seen whole */
    for (int64_t i = 0; i < count; i += KEY_TILE)
        if (i >= first && i < last)
            most = max16(most, read16(x + i));
        else
            most = max_where16(between16(begin + i, from, end), most, read16(x + i));
    most = all16(most16(most));
    bf16 *weights = (bf16 *)x; /* behind what is still to be read */
    for (int64_t i = 0; i < count; i += KEY_TILE) {
        Floats e = exponential(sub16(read16(x + i), most));
        if (i < first || i >= last) e = or_zero16(between16(begin + i, from, end), e);
        e = rounded16(e);
        store16(weights + i, e);
        total = add16(total, e);
    }
    return sum16(total);
}

/* Sums of 16 `vectors` dimensions of the values, weighted for `rows` rows by bfloat16 weights [rows, stride]; count is
 * even. out: [rows, VALUES]. */
INLINE void weighted_sum(const bf16 *weights, int64_t stride, const bf16 *values, int64_t size, int64_t count,
                         const int rows, const int vectors, Floats out[][VALUES]) {
    Floats sum[ROWS][VALUES];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < vectors; i++) sum[r][i] = zero16();
    for (int64_t key = 0; key < count; key += 2) {
        Pairs value[VALUES];
        for (int i = 0; i < vectors; i++) value[i] = load_pairs(values + key * size + 32 * i);
        for (int r = 0; r < rows; r++) {
            Pairs weight = all_pairs(weights + r * stride + key);
            for (int i = 0; i < vectors; i++) sum[r][i] = dot_pairs(sum[r][i], weight, value[i]);
        }
    }
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < vectors; i++) out[r][i] = sum[r][i];
}

/* Attention of `rows` rotated queries of one key head, [rows, size], row r over the keys before `end[r]` (ascending),
 * the last `window` of them (0: all) -> out[r] [size]. cap: what scores are bent below (0: they are not). scores: [rows,
 * last end + 32] of scratch. */
INLINE void attend(const bf16 *queries, const int64_t *end, const bf16 *keys, const bf16 *values, int64_t window,
                   int64_t size, float scale, float cap, const int rows, float *scores, bf16 *const *out) {
    int64_t last = end[rows - 1], begin = window && end[0] > window ? (end[0] - window) & ~(int64_t)(KEY_TILE - 1) : 0;
    int64_t count = (last - begin + KEY_TILE - 1) & ~(int64_t)(KEY_TILE - 1), seen = (last - begin + 1) & ~(int64_t)1;
    float total[ROWS];
    score(queries, keys, begin, last, size, scale, rows, scores, count);
    if (cap) bend(scores, rows * count, cap);
    for (int r = 0; r < rows; r++)
        total[r] = softmax(scores + r * count, begin, count, window && end[r] > window ? end[r] - window : 0, end[r]);
    const bf16 *weights = (const bf16 *)scores;
    const int vectors = rows > ROWS / 2 ? (VALUES + 1) / 2 : VALUES; /* whose sums fit into the registers */
    for (int64_t d = 0; d < size; d += 16 * vectors) {
        Floats found[ROWS][VALUES];
        weighted_sum(weights, 2 * count, values + begin * size + 2 * d, size, seen, rows, vectors, found);
        for (int r = 0; r < rows; r++)
            for (int i = 0; i < vectors; i++)
                store16(out[r] + d + 16 * i, div16(found[r][i], all16(total[r])));
    }
}

/* ---- products over int8 rows ---- */

typedef struct {
    const uint8_t *weight; /* [out / 16, in / INT8_INPUTS, 16, INT8_INPUTS], int8 rows plus 128 */
    const float *scale;    /* [out], of the rows */
    int64_t in, out;
} Int8;

/* States in 15 bits: x ~ step * whole, [size], which `store_states` lays into 2 size bytes. sum: of the whole numbers.
 * Returns the step. */
INLINE float split_int15(const bf16 *x, int8_t *states, int64_t size, int32_t *sum) {
    Floats most = zero16();
    for (int64_t i = 0; i < size; i += 16) most = max16(most, abs16(load16(x + i)));
    float peak = most16(most);
    float step = peak > 0 ? peak / 16255.0f : 1.0f;
    Ints total = zero_ints16();
    for (int64_t i = 0; i < size; i += 16) {
        Ints whole = to_ints16(div16(load16(x + i), all16(step)));
        total = add_ints16(total, whole);
        store_states(states, size, i, whole);
    }
    *sum = sum_ints16(total);
    return step;
}

/* One tile of 16 outputs for up to ROWS split rows, [rows, 2 in] bytes -> out [rows]. */
INLINE void int8_tile(const Int8 *p, int64_t tile, const int8_t *states, const float *step, const int32_t *sum,
                      int rows, Floats *out) {
    Ints found[ROWS];
    Floats scale = read16(p->scale + tile * INT8_TILE);
#define BODY(n) int8_sums(p->weight + tile * INT8_TILE * p->in, states, p->in, n, found)
    FOR_ROWS(ROWS, rows, BODY)
#undef BODY
    for (int r = 0; r < rows; r++) /* less the rows' 128s */
        out[r] = mul16(mul16(less_to_floats16(found[r], (int32_t)(128u * (uint32_t)sum[r])), scale), all16(step[r]));
}

/* Scratch for up to PIECE rows. */
typedef struct {
    int8_t *states;
    float *step;
    int32_t *sum;
} Int15;

/* out [rows, p->out] = x [rows, p->in] times the weights, this thread's share of the outputs,
 * added to `base` if there. */
SHARED void int8_product(const Int8 *p, const bf16 *x, const bf16 *base, bf16 *out, int64_t rows, Int15 *own) {
    int64_t from, to;
    share(p->out / INT8_TILE, &from, &to);
    for (int64_t first = 0; first < rows; first += PIECE) {
        int chunk = min(PIECE, rows - first);
        for (int r = 0; r < chunk; r++)
            own->step[r] = split_int15(x + (first + r) * p->in, own->states + r * 2 * p->in, p->in, own->sum + r);
        for (int64_t t = from; t < to; t++)
            for (int row = 0; row < chunk; row += ROWS) {
                Floats found[ROWS];
                int count = min(ROWS, chunk - row);
                int8_tile(p, t, own->states + row * 2 * p->in, own->step + row, own->sum + row, count, found);
                for (int r = 0; r < count; r++) {
                    int64_t place = (first + row + r) * p->out + t * INT8_TILE;
                    store16(out + place, base ? add16(load16(base + place), found[r]) : found[r]);
                }
            }
    }
}

/* This thread's share of the logits of one state. */
SHARED void int8_logits(const Int8 *p, const bf16 *x, float *logits, Int15 *own) {
    own->step[0] = split_int15(x, own->states, p->in, own->sum);
    int64_t from, to;
    share(p->out / INT8_TILE, &from, &to);
    for (int64_t t = from; t < to; t++) {
        Floats found[1];
        int8_tile(p, t, own->states, own->step, own->sum, 1, found);
        write16(logits + t * INT8_TILE, found[0]);
    }
}

/* Entropy (nats) of the softmax of `count` logits, the first of the best, and, where asked for, its probability. */
SHARED void choice_and_entropy(const float *logits, int64_t count, int64_t *choice, float *entropy, float *confidence) {
    Floats most = all16(-INFINITY), total = zero16(), weighted = zero16();
    for (int64_t i = 0; i < count; i += 16) most = max16(most, read16(logits + i));
    float peak = most16(most);
    *choice = 0;
    for (int64_t i = count - 16; i >= 0; i -= 16) {
        unsigned equal = equal16(read16(logits + i), all16(peak));
        if (equal) *choice = i + __builtin_ctz(equal);
    }
    for (int64_t i = 0; i < count; i += 16) {
        Floats below = sub16(read16(logits + i), all16(peak));
        Floats e = exponential(below);
        total = add16(total, e);
        weighted = fma16(e, below, weighted);
    }
    float sum = sum16(total); /* H = ln sum - (sum e x) / sum */
    if (confidence) *confidence = 1 / sum;
    *entropy = logf(sum) - sum16(weighted) / sum;
}

SHARED void *scratch_of(size_t bytes) { return aligned_alloc(64, (bytes + 64) & ~(size_t)63); }

/* ---- a head's own attention ---- */

typedef struct {
    Int8 key_value, query, output;
    const bf16 *query_norm, *key_norm; /* [head_dim], or NULL */
    int64_t query_heads, kv_heads, head_dim;
    float scale, eps;
} Attention;

/* A text's buffers, a KV cache for each key head, and the rotary tables of all positions, [capacity, head_dim]. */
typedef struct {
    bf16 *keys, *values;
    const bf16 *cos, *sin;
    int64_t capacity;
} KVBuffers;

/* What the threads of `attend_last` share. */
typedef struct {
    bf16 *kv, *query, *attended;
    float *scores;
} AttentionScratch;

SHARED AttentionScratch new_attention_scratch(const Attention *a, int64_t rows, int64_t end, int threads) {
    int64_t width = a->query_heads * a->head_dim;
    return (AttentionScratch){scratch_of(rows * 2 * a->kv_heads * a->head_dim * sizeof(bf16)),
                              scratch_of(width * sizeof(bf16)), scratch_of(width * sizeof(bf16)),
                              scratch_of(threads * (end + 32) * sizeof(float))};
}

SHARED int is_allocated(const AttentionScratch *s) { return s->kv && s->query && s->attended && s->scores; }

SHARED void free_attention_scratch(const AttentionScratch *s) {
    free(s->kv), free(s->query), free(s->attended), free(s->scores);
}

/* Normed rows [rows, key_value.in] at `position`: all leave keys and values, the last one attends over all of the text,
 * and what it finds and `residual` [hidden] are added up in `last` [hidden], which may be the same. Every thread of a
 * pass calls it; the sum is there after a barrier. */
SHARED void attend_last(const Attention *a, const bf16 *rows_in, int64_t rows, int64_t position,
                        const KVBuffers *buffers, const AttentionScratch *s, const bf16 *residual, bf16 *last,
                        Int15 *mine, Barrier *barrier) {
    int64_t size = a->head_dim, end = position + rows, from, to;
    const Norm query_norm = {a->query_norm, NULL}, key_norm = {a->key_norm, NULL};
    int8_product(&a->key_value, rows_in, NULL, s->kv, rows, mine);
    int8_product(&a->query, rows_in + (rows - 1) * a->query.in, NULL, s->query, 1, mine);
    barrier_wait(barrier);
    share(a->kv_heads * rows, &from, &to);
    for (int64_t unit = from; unit < to; unit++) {
        int64_t head = unit / rows, row = unit % rows, place = position + row, start = head * buffers->capacity * size;
        const bf16 *key = s->kv + row * 2 * a->kv_heads * size + head * size;
        bf16 rotated[size];
        rotate(key, key_norm, buffers->cos + place * size, buffers->sin + place * size, rotated, size, size, a->eps);
        store_kv(rotated, key + a->kv_heads * size, buffers->keys + start, buffers->values + start, place, size);
    }
    barrier_wait(barrier);
    share(a->query_heads, &from, &to);
    for (int64_t head = from; head < to; head++) {
        int64_t start = head / (a->query_heads / a->kv_heads) * buffers->capacity * size;
        bf16 rotated[size], *found = s->attended + head * size;
        rotate(s->query + head * size, query_norm, buffers->cos + (end - 1) * size, buffers->sin + (end - 1) * size,
               rotated, size, size, a->eps);
        attend(rotated, &end, buffers->keys + start, buffers->values + start, 0, size, a->scale, 0, 1,
               s->scores + omp_get_thread_num() * (end + 32), &found);
    }
    barrier_wait(barrier);
    int8_product(&a->output, s->attended, residual, last, 1, mine);
}
