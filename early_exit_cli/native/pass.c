/* A pass of blocks of the Llama shape over NF4 weights, and the LM head's argmax, on a CPU with AVX512-BF16.
 *
 * One parallel region a pass: the threads share every product by tiles of 32 outputs and meet at barriers. The bits of a
 * row depend on nothing but the tokens before it: every sum over inputs or keys runs in one fixed order, whatever the
 * number of rows, of threads or of keys in the buffer. So nothing here may be compiled with reassociation or contraction.
 *
 * Values are rounded to bfloat16 where the library's modules round. The NF4 product is bitsandbytes' (csrc/cpu_ops.cpp):
 * over each quantization block of 64 inputs in float32, then times the block's scale; over its own packing of weights.
 */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))
#define TILE 32     /* outputs that bitsandbytes packs together */
#define BLOCK 64    /* inputs that share a scale */
#define ROWS 8      /* rows that share a decoded weight */
#define QUERIES 4   /* rows that share a converted value in attention */
#define VOCAB_TILE 16

typedef struct {
    const uint8_t *weight; /* [out / 32, in / 2, 32] bytes: low halves for outputs 0..15, high ones for 16..31, two inputs each */
    const bf16 *scale;     /* [in / 64, out] */
    const bf16 *bias;      /* [out] or NULL */
    int64_t in, out;
} Product;

typedef struct {
    const bf16 *input_norm, *mlp_norm; /* [hidden] */
    const bf16 *qk_norm;               /* [query_heads + kv_heads, head_dim] or NULL */
    Product qkv, output, gate_up, down;
    int64_t window; /* keys a row sees, 0 for all */
} Block;

typedef struct {
    const Block *blocks;
    int64_t hidden, inner, query_heads, kv_heads, head_dim;
    float eps, scale;
} Model;

/* Rows of one text: `width` of them from `position` on. keys and values: one pointer a block, [kv_heads, capacity, head_dim].
 * cos and sin: [width, head_dim] of these positions, sin with the sign of rotate_half. */
typedef struct {
    bf16 *const *keys, *const *values;
    const bf16 *cos, *sin;
    int64_t capacity, position, width;
} Part;

typedef struct {
    const uint8_t *quantized; /* [vocab / 16, hidden / 4, 16, 4], int8 rows plus 128 */
    const float *scale;       /* [vocab] of the int8 rows */
    const float *error;       /* [vocab] ||w - w'|| and what float32 sums err by, relative to ||state|| */
    const float *norm;        /* [vocab] ||w'|| */
    const bf16 *rows;         /* [vocab, hidden] */
    const bf16 *final_norm;   /* [hidden] */
    int64_t vocab, hidden;
    float eps;
} LMHead;

/* ---- numbers ---- */

INLINE float widen(bf16 x) {
    union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
    return u.value;
}

INLINE __m512 load16(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

INLINE __m256i narrow(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

INLINE __m512 rounded(__m512 x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(x)), 16)); }

INLINE void store16(bf16 *p, __m512 x) { _mm256_storeu_si256((__m256i *)p, narrow(x)); }

/* e^x, within 2 units in the last place of float32; 0 far below, infinite far above (Cephes' expf) */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_min_ps(x, _mm512_set1_ps(128.0f)), _mm512_set1_ps(-128.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

INLINE __m512 silu(__m512 x) {
    __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), x));
    return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), e));
}

/* The 16 sums of 16 vectors. */
INLINE __m512 sums(__m512 v[16]) {
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) /* lanes: pairs of (2i, 2i + 1) */
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++)
        b[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]))),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]))));
    for (int i = 0; i < 2; i++)
        c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88), _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
}

/* x / sqrt(mean(x^2) + eps), rounded, times the weight, rounded: [size] */
INLINE void rms_norm(const bf16 *x, const bf16 *weight, bf16 *out, int64_t size, float eps) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) {
        __m512 value = load16(x + i);
        total = _mm512_fmadd_ps(value, value, total);
    }
    __m512 by = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(total) / (float)size + eps));
    for (int64_t i = 0; i < size; i += 16)
        store16(out + i, _mm512_mul_ps(load16(weight + i), rounded(_mm512_mul_ps(load16(x + i), by))));
}

/* ---- the NF4 product ---- */

static const bf16 NF4[32] __attribute__((aligned(64))) = {
    0xBF80, 0xBF32, 0xBF06, 0xBECA, 0xBE92, 0xBE3D, 0xBDBA, 0x0000, 0x3DA3, 0x3E25, 0x3E7C, 0x3EAD, 0x3EE2, 0x3F10, 0x3F39, 0x3F80,
    0xBF80, 0xBF32, 0xBF06, 0xBECA, 0xBE92, 0xBE3D, 0xBDBA, 0x0000, 0x3DA3, 0x3E25, 0x3E7C, 0x3EAD, 0x3EE2, 0x3F10, 0x3F39, 0x3F80,
}; /* twice: a lookup reads five bits, the fifth being another weight's */

/* One tile of outputs for `rows` rows of x, [rows, stride] -> out [rows][2]. */
INLINE void tile_of(const Product *p, int64_t tile, const bf16 *x, int64_t stride, const int rows, __m512 out[][2]) {
    const uint8_t *weight = p->weight + tile * TILE * p->in / 2;
    const bf16 *scale = p->scale + tile * TILE;
    const __m512i table = _mm512_load_si512(NF4);
    for (int r = 0; r < rows; r++) out[r][0] = out[r][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < p->in; k += BLOCK) {
        __m512 sum[ROWS][2];
        for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
        for (int64_t pair = 0; pair < BLOCK; pair += 2, weight += 32) {
            __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)weight));
            _mm_prefetch(weight + 2048, _MM_HINT_T0);
            __m512bh low = (__m512bh)_mm512_permutexvar_epi16(both, table);
            __m512bh high = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), table);
            for (int r = 0; r < rows; r++) {
                __m512bh value = (__m512bh)_mm512_set1_epi32(*(const int32_t *)(x + r * stride + k + pair));
                sum[r][0] = _mm512_dpbf16_ps(sum[r][0], value, low);
                sum[r][1] = _mm512_dpbf16_ps(sum[r][1], value, high);
            }
        }
        __m512 first = load16(scale), second = load16(scale + 16);
        scale += p->out;
        for (int r = 0; r < rows; r++) {
            out[r][0] = _mm512_fmadd_ps(sum[r][0], first, out[r][0]);
            out[r][1] = _mm512_fmadd_ps(sum[r][1], second, out[r][1]);
        }
    }
    for (int half = 0; half < 2; half++)
        for (int r = 0; r < rows; r++) {
            out[r][half] = rounded(out[r][half]);
            if (p->bias) out[r][half] = rounded(_mm512_add_ps(out[r][half], load16(p->bias + tile * TILE + 16 * half)));
        }
}

/* Calls `body` with a constant number of rows, so that sums stay in registers. */
#define FOR_ROWS(count, body)                                                                                                  \
    switch (count) {                                                                                                           \
    case 1: body(1); break;                                                                                                    \
    case 2: body(2); break;                                                                                                    \
    case 3: body(3); break;                                                                                                    \
    case 4: body(4); break;                                                                                                    \
    case 5: body(5); break;                                                                                                    \
    case 6: body(6); break;                                                                                                    \
    case 7: body(7); break;                                                                                                    \
    default: body(8); break;                                                                                                   \
    }

static void tile(const Product *p, int64_t index, const bf16 *x, int64_t stride, int rows, __m512 out[][2]) {
#define BODY(n) tile_of(p, index, x, stride, n, out)
    FOR_ROWS(rows, BODY)
#undef BODY
}

INLINE int least(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

/* A thread's share of `count` things: [from, to). */
INLINE void share(int64_t count, int64_t *from, int64_t *to) {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *from = count * thread / threads;
    *to = count * (thread + 1) / threads;
}

/* out [width, p->out] = x [width, p->in] times the weights, or added to what is there. */
static void product(const Product *p, const bf16 *x, bf16 *out, int64_t width, int adds) {
    int64_t from, to;
    share(p->out / TILE, &from, &to);
    for (int64_t t = from; t < to; t++)
        for (int64_t row = 0; row < width; row += ROWS) {
            __m512 found[ROWS][2];
            int rows = least(ROWS, width - row);
            tile(p, t, x + row * p->in, p->in, rows, found);
            for (int r = 0; r < rows; r++)
                for (int half = 0; half < 2; half++) {
                    bf16 *place = out + (row + r) * p->out + t * TILE + 16 * half;
                    store16(place, adds ? _mm512_add_ps(load16(place), found[r][half]) : found[r][half]);
                }
        }
}

/* out [width, inner] = silu(gate) * up. */
static void gated(const Product *p, const bf16 *x, bf16 *out, int64_t width, int64_t inner) {
    int64_t from, to;
    share(inner / TILE, &from, &to);
    for (int64_t t = from; t < to; t++)
        for (int64_t row = 0; row < width; row += ROWS) {
            __m512 gate[ROWS][2], up[ROWS][2];
            int rows = least(ROWS, width - row);
            tile(p, t, x + row * p->in, p->in, rows, gate);
            tile(p, t + inner / TILE, x + row * p->in, p->in, rows, up);
            for (int r = 0; r < rows; r++)
                for (int half = 0; half < 2; half++)
                    store16(out + (row + r) * inner + t * TILE + 16 * half, _mm512_mul_ps(rounded(silu(gate[r][half])), up[r][half]));
        }
}

/* ---- attention ---- */

/* One head of one row: normed where the model does that, then rotated. [size] to [size]. */
static void rotate(const bf16 *x, const bf16 *norm, const bf16 *cos, const bf16 *sin, bf16 *out, int64_t size, float eps) {
    bf16 normed[size];
    if (norm) {
        rms_norm(x, norm, normed, size, eps);
        x = normed;
    }
    int64_t half = size / 2;
    for (int64_t i = 0; i < size; i += 16) {
        __m512 turned = load16(x + (i < half ? i + half : i - half));
        __m512 product = rounded(_mm512_mul_ps(load16(x + i), load16(cos + i)));
        store16(out + i, _mm512_add_ps(product, rounded(_mm512_mul_ps(turned, load16(sin + i)))));
    }
}

/* Scores of one query over keys [begin, end), begin a multiple of 16: q . k * scale, -inf outside of [from, end). */
static void score(const bf16 *query, const bf16 *keys, int64_t begin, int64_t from, int64_t end, int64_t size, float scale, float *out) {
    for (int64_t first = begin; first < end; first += 16) {
        __m512 dot[16];
        for (int i = 0; i < 16; i++) {
            const bf16 *key = keys + (first + i < end ? first + i : end - 1) * size;
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; d < size; d += 32)
                sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(query + d), (__m512bh)_mm512_loadu_si512(key + d));
            dot[i] = sum;
        }
        __m512 found = _mm512_mul_ps(sums(dot), _mm512_set1_ps(scale));
        if (first < from || first + 16 > end) {
            __m512i key = _mm512_add_epi32(_mm512_set1_epi32((int)first), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
            __mmask16 seen = _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32((int)from)) & _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32((int)end));
            found = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), found);
        }
        _mm512_storeu_ps(out + first - begin, found);
    }
}

/* Softmax of `count` scores (a multiple of 16) in place, not yet divided; its sum. */
static float softmax(float *x, int64_t count) {
    __m512 most = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t i = 0; i < count; i += 16) most = _mm512_max_ps(most, _mm512_loadu_ps(x + i));
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t i = 0; i < count; i += 16) {
        __m512 score = _mm512_loadu_ps(x + i);
        __m512 e = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(score, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ), exponential(_mm512_sub_ps(score, most)));
        _mm512_storeu_ps(x + i, e);
        total = _mm512_add_ps(total, e);
    }
    return _mm512_reduce_add_ps(total);
}

/* Weighted sums of 64 dimensions of the values [count, stride] for `rows` rows of weights [rows, ld]. */
INLINE void weigh(const float *weights, int64_t ld, const bf16 *values, int64_t stride, int64_t count, const int rows, __m512 out[][4]) {
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++) out[r][i] = _mm512_setzero_ps();
    for (int64_t key = 0; key < count; key++) {
        __m512 value[4];
        for (int i = 0; i < 4; i++) value[i] = load16(values + key * stride + 16 * i);
        for (int r = 0; r < rows; r++) {
            __m512 weight = _mm512_set1_ps(weights[r * ld + key]);
            for (int i = 0; i < 4; i++) out[r][i] = _mm512_fmadd_ps(weight, value[i], out[r][i]);
        }
    }
}

/* One query head over the rows of one text: queries [width, stride] (not rotated) -> out [width, out_stride]. */
static void attend(const Model *m, const Block *block, const Part *part, int index, int64_t head, const bf16 *queries, int64_t stride, bf16 *out, int64_t out_stride, float *scratch) {
    int64_t size = m->head_dim, group = m->query_heads / m->kv_heads;
    const bf16 *keys = part->keys[index] + head / group * part->capacity * size;
    const bf16 *values = part->values[index] + head / group * part->capacity * size;
    for (int64_t row = 0; row < part->width; row += QUERIES) {
        int rows = least(QUERIES, part->width - row);
        int64_t end = part->position + row + rows; /* of the last row */
        int64_t begin = block->window && part->position + row + 1 > block->window ? part->position + row + 1 - block->window : 0;
        begin &= ~(int64_t)15;
        int64_t count = (end - begin + 15) & ~(int64_t)15;
        float total[QUERIES];
        for (int r = 0; r < rows; r++) {
            bf16 query[size];
            int64_t own_end = part->position + row + r + 1;
            int64_t own_from = block->window && own_end > block->window ? own_end - block->window : 0;
            float *scores = scratch + r * count;
            rotate(queries + (row + r) * stride, block->qk_norm ? block->qk_norm + head * size : NULL, part->cos + (row + r) * size, part->sin + (row + r) * size, query, size, m->eps);
            score(query, keys, begin, own_from, own_end, size, m->scale, scores);
            for (int64_t i = (own_end - begin + 15) & ~(int64_t)15; i < count; i++) scores[i] = -INFINITY;
            total[r] = softmax(scores, count);
        }
        for (int64_t d = 0; d < size; d += 64) {
            __m512 found[QUERIES][4];
            const bf16 *from = values + begin * size + d;
            switch (rows) {
            case 1: weigh(scratch, count, from, size, end - begin, 1, found); break;
            case 2: weigh(scratch, count, from, size, end - begin, 2, found); break;
            case 3: weigh(scratch, count, from, size, end - begin, 3, found); break;
            default: weigh(scratch, count, from, size, end - begin, 4, found); break;
            }
            for (int r = 0; r < rows; r++)
                for (int i = 0; i < 4; i++)
                    store16(out + (row + r) * out_stride + d + 16 * i, _mm512_div_ps(found[r][i], _mm512_set1_ps(total[r])));
        }
    }
}

/* Rotated keys, and values, of a text's rows into its buffers, for a share of the key heads. */
static void remember(const Model *m, const Block *block, const Part *part, int index, const bf16 *qkv, int64_t stride) {
    int64_t size = m->head_dim, from, to;
    share(m->kv_heads * part->width, &from, &to);
    for (int64_t unit = from; unit < to; unit++) {
        int64_t head = unit / part->width, row = unit % part->width;
        int64_t place = (head * part->capacity + part->position + row) * size;
        const bf16 *key = qkv + row * stride + (m->query_heads + head) * size;
        const bf16 *norm = block->qk_norm ? block->qk_norm + (m->query_heads + head) * size : NULL;
        rotate(key, norm, part->cos + row * size, part->sin + row * size, part->keys[index] + place, size, m->eps);
        memcpy(part->values[index] + place, key + m->kv_heads * size, size * sizeof(bf16));
    }
}

/* ---- a pass ---- */

static void *scratch_of(size_t bytes) { return aligned_alloc(64, (bytes + 63) & ~(size_t)63); }

/* Blocks first .. last - 1 over the rows of the texts, one after another, in place: hidden [sum of widths, hidden].
 * Returns 0, or 1 when there is no memory. */
int eexit_run(const Model *m, bf16 *hidden, const Part *parts, int64_t count, int first, int last, int threads) {
    int64_t width = 0, keys = 0;
    for (int64_t i = 0; i < count; i++) {
        width += parts[i].width;
        if (keys < parts[i].position + parts[i].width) keys = parts[i].position + parts[i].width;
    }
    int64_t size = m->head_dim, queries = m->query_heads * size, stride = (m->query_heads + 2 * m->kv_heads) * size;
    bf16 *qkv = scratch_of(width * stride * sizeof(bf16)), *attended = scratch_of(width * queries * sizeof(bf16));
    bf16 *gate = scratch_of(width * m->inner * sizeof(bf16)), *normed = scratch_of(threads * width * m->hidden * sizeof(bf16));
    int64_t row_of_scores = QUERIES * (keys + 32);
    float *scores = scratch_of(threads * row_of_scores * sizeof(float));
    int failed = !qkv || !attended || !gate || !normed || !scores;
    if (!failed)
#pragma omp parallel num_threads(threads)
    {
        int thread = omp_get_thread_num();
        bf16 *own = normed + thread * width * m->hidden;
        for (int index = first; index < last; index++) {
            const Block *block = m->blocks + index;
            for (int64_t row = 0; row < width; row++)
                rms_norm(hidden + row * m->hidden, block->input_norm, own + row * m->hidden, m->hidden, m->eps);
            product(&block->qkv, own, qkv, width, 0);
#pragma omp barrier
            for (int64_t i = 0, row = 0; i < count; row += parts[i++].width)
                remember(m, block, parts + i, index, qkv + row * stride, stride);
#pragma omp barrier
            int64_t from, to, done = 0;
            share(count * m->query_heads, &from, &to);
            for (int64_t i = 0, row = 0; i < count; row += parts[i++].width)
                for (int64_t head = 0; head < m->query_heads; head++, done++)
                    if (done >= from && done < to)
                        attend(m, block, parts + i, index, head, qkv + row * stride + head * size, stride, attended + row * queries + head * size, queries, scores + thread * row_of_scores);
#pragma omp barrier
            product(&block->output, attended, hidden, width, 1);
#pragma omp barrier
            for (int64_t row = 0; row < width; row++)
                rms_norm(hidden + row * m->hidden, block->mlp_norm, own + row * m->hidden, m->hidden, m->eps);
            gated(&block->gate_up, own, gate, width, m->inner);
#pragma omp barrier
            product(&block->down, gate, hidden, width, 1);
#pragma omp barrier
        }
    }
    free(qkv), free(attended), free(gate), free(normed), free(scores);
    return failed;
}

/* ---- the LM head ---- */

/* The logit of a token: its row times the state, rounded. One order of summing for all uses. */
INLINE float logit(const bf16 *row, const bf16 *state, int64_t hidden) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < hidden; i += 32)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(state + i), (__m512bh)_mm512_loadu_si512(row + i));
    bf16 narrowed = (bf16)_mm256_extract_epi16(narrow(_mm512_set1_ps(_mm512_reduce_add_ps(sum))), 0);
    return widen(narrowed);
}

/* states [width, hidden], final norm not yet applied -> normed [width, hidden]. */
void eexit_final_norm(const LMHead *h, const bf16 *states, bf16 *normed, int64_t width) {
    for (int64_t row = 0; row < width; row++)
        rms_norm(states + row * h->hidden, h->final_norm, normed + row * h->hidden, h->hidden, h->eps);
}

/* normed [width, hidden] -> all logits [width, vocab]. */
void eexit_logits(const LMHead *h, const bf16 *normed, bf16 *out, int64_t width, int threads) {
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to;
        share(h->vocab, &from, &to);
        for (int64_t token = from; token < to; token++)
            for (int64_t row = 0; row < width; row++) {
                union { float value; uint32_t bits; } found = {logit(h->rows + token * h->hidden, normed + row * h->hidden, h->hidden)};
                out[row * h->vocab + token] = found.bits >> 16;
            }
    }
}

/* int8 halves of states in 15 bits: state ~ step * (128 high + low). Returns the step. */
static float halve(const bf16 *state, int8_t *high, int8_t *low, int64_t hidden, int64_t *sum) {
    float most = 0;
    for (int64_t i = 0; i < hidden; i++) most = fmaxf(most, fabsf(widen(state[i])));
    float step = most > 0 ? most / 16255.0f : 1.0f;
    *sum = 0;
    for (int64_t i = 0; i < hidden; i++) {
        int value = (int)lrintf(widen(state[i]) / step);
        int upper = (value + 64) >> 7;
        high[i] = (int8_t)upper;
        low[i] = (int8_t)(value - 128 * upper);
        *sum += value;
    }
    return step;
}

/* Approximate logits of 16 tokens, less the rows' scales and steps: 128 (w . high) + (w . low), for `rows` states. */
INLINE void vocab_tile(const uint8_t *weight, const int8_t *high, const int8_t *low, int64_t hidden, const int rows, __m512i out[][2]) {
    for (int r = 0; r < rows; r++) out[r][0] = out[r][1] = _mm512_setzero_si512();
    for (int64_t i = 0; i < hidden; i += 4, weight += 64) {
        __m512i four = _mm512_loadu_si512(weight);
        _mm_prefetch(weight + 4096, _MM_HINT_T0);
        for (int r = 0; r < rows; r++) {
            out[r][0] = _mm512_dpbusd_epi32(out[r][0], four, _mm512_set1_epi32(*(const int32_t *)(high + r * hidden + i)));
            out[r][1] = _mm512_dpbusd_epi32(out[r][1], four, _mm512_set1_epi32(*(const int32_t *)(low + r * hidden + i)));
        }
    }
}

/* How far an approximate logit of these 16 tokens may be from the logit:
 * |A - L| <= ||w - w'|| ||h|| + ||w'|| ||h - h'|| + 2^-8 |A|, with the slack of `lm_head.ExactArgmax`. */
INLINE __m512 error_of(const LMHead *h, int64_t token, __m512 approximate, float norm, float rest) {
    __m512 bound = _mm512_mul_ps(_mm512_loadu_ps(h->error + token), _mm512_set1_ps(norm));
    bound = _mm512_fmadd_ps(_mm512_loadu_ps(h->norm + token), _mm512_set1_ps(rest), bound);
    return _mm512_fmadd_ps(_mm512_abs_ps(approximate), _mm512_set1_ps(1.01f / 256), _mm512_mul_ps(bound, _mm512_set1_ps(1.01f)));
}

/* The argmax of the logits of each state, the lowest token among equals: normed [width, hidden] -> choices [width] and
 * their logits, NaN where a state is not finite. Returns 0, or 1 when there is no memory. */
int eexit_choose(const LMHead *h, const bf16 *normed, int64_t *choices, float *values, int64_t width, int threads) {
    int64_t hidden = h->hidden, tiles = h->vocab / VOCAB_TILE;
    float *approximate = scratch_of(width * h->vocab * sizeof(float));
    int8_t *high = scratch_of(width * hidden), *low = scratch_of(width * hidden);
    float *floors = scratch_of(threads * width * sizeof(float)), *best = scratch_of(threads * width * sizeof(float));
    int64_t *found = scratch_of(threads * width * sizeof(int64_t));
    float step[width], norm[width], rest[width];
    int64_t sum[width];
    int failed = !approximate || !high || !low || !floors || !best || !found;
    if (!failed) {
        for (int64_t i = 0; i < threads * width; i++) found[i] = -1; /* the team may be smaller */
        for (int64_t row = 0; row < width; row++) {
            double square = 0;
            for (int64_t i = 0; i < hidden; i++) square += (double)widen(normed[row * hidden + i]) * widen(normed[row * hidden + i]);
            norm[row] = (float)sqrt(square) * 1.0001f;
            if (!isfinite(norm[row])) {
                memset(high + row * hidden, 0, hidden), memset(low + row * hidden, 0, hidden);
                step[row] = 1, sum[row] = 0;
            } else
                step[row] = halve(normed + row * hidden, high + row * hidden, low + row * hidden, hidden, sum + row);
            rest[row] = 0.501f * step[row] * sqrtf((float)hidden);
        }
#pragma omp parallel num_threads(threads)
        {
            int thread = omp_get_thread_num(), team = omp_get_num_threads();
            int64_t from, to;
            share(tiles, &from, &to);
            __m512 floor[width];
            for (int64_t row = 0; row < width; row++) floor[row] = _mm512_set1_ps(-INFINITY);
            for (int64_t t = from; t < to; t++) {
                int64_t token = t * VOCAB_TILE;
                __m512 scale = _mm512_loadu_ps(h->scale + token);
                for (int64_t row = 0; row < width; row += ROWS) {
                    __m512i part[ROWS][2];
                    int rows = least(ROWS, width - row);
#define BODY(n) vocab_tile(h->quantized + token * hidden, high + row * hidden, low + row * hidden, hidden, n, part)
                    FOR_ROWS(rows, BODY)
#undef BODY
                    for (int r = 0; r < rows; r++) {
                        __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(part[r][0], 7), part[r][1]);
                        whole = _mm512_sub_epi32(whole, _mm512_set1_epi32((int)(128 * sum[row + r])));
                        __m512 a = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(whole), scale), _mm512_set1_ps(step[row + r]));
                        _mm512_storeu_ps(approximate + (row + r) * h->vocab + token, a);
                        floor[row + r] = _mm512_max_ps(floor[row + r], _mm512_sub_ps(a, error_of(h, token, a, norm[row + r], rest[row + r])));
                    }
                }
            }
            for (int64_t row = 0; row < width; row++) floors[thread * width + row] = _mm512_reduce_max_ps(floor[row]);
#pragma omp barrier
            for (int64_t row = 0; row < width; row++) {
                float least_possible = -INFINITY;
                for (int other = 0; other < team; other++) least_possible = fmaxf(least_possible, floors[other * width + row]);
                float most = -INFINITY;
                int64_t winner = -1;
                for (int64_t token = from * VOCAB_TILE; token < to * VOCAB_TILE; token += VOCAB_TILE) {
                    __m512 a = _mm512_loadu_ps(approximate + row * h->vocab + token);
                    __m512 highest = _mm512_add_ps(a, error_of(h, token, a, norm[row], rest[row]));
                    unsigned may_win = _mm512_cmp_ps_mask(highest, _mm512_set1_ps(least_possible), _CMP_GE_OQ);
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
            values[row] = isfinite(norm[row]) ? most : NAN;
        }
    }
    free(approximate), free(high), free(low), free(floors), free(best), free(found);
    return failed;
}
