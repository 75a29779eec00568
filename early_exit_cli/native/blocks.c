/* A pass of blocks of the Llama shape over NF4 weights, on a CPU with AVX512-BF16.
 *
 * One parallel region a pass: the threads share every product by tiles of 32 outputs and meet at barriers. The bits of a
 * row depend on nothing but the tokens before it, whatever the number of rows, of threads or of keys in the buffer.
 *
 * Values are rounded to bfloat16 where the library's modules round. The NF4 product is bitsandbytes' (csrc/cpu_ops.cpp):
 * over each quantization block of 64 inputs in float32, then times the block's scale; over its own packing of weights.
 */
#include "kernels.h"

#define TILE 32     /* outputs that bitsandbytes packs together */
#define BLOCK 64    /* inputs that share a scale */
#define QUERIES 4   /* rows that share a converted value in attention */

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

static void tile(const Product *p, int64_t index, const bf16 *x, int64_t stride, int rows, __m512 out[][2]) {
#define BODY(n) tile_of(p, index, x, stride, n, out)
    FOR_ROWS(rows, BODY)
#undef BODY
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
