/* What the compiled passes share: numbers, norms, rotation, attention of one row, products over int8 rows.
 *
 * Every sum runs in one fixed order. Nothing here may be compiled with reassociation or contraction.
 */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline, unused))
#define SHARED static __attribute__((unused))
#define ROWS 8        /* rows that share a weight that was read */
#define INT8_TILE 16  /* outputs that int8 rows are packed by */

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

INLINE int least(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

/* A thread's share of `count` things: [from, to). */
INLINE void share(int64_t count, int64_t *from, int64_t *to) {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *from = count * thread / threads;
    *to = count * (thread + 1) / threads;
}

/* ---- attention ---- */

/* One head of one row: normed where the model does that, then rotated. [size] to [size]. */
SHARED void rotate(const bf16 *x, const bf16 *norm, const bf16 *cos, const bf16 *sin, bf16 *out, int64_t size, float eps) {
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
SHARED void score(const bf16 *query, const bf16 *keys, int64_t begin, int64_t from, int64_t end, int64_t size, float scale, float *out) {
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
SHARED float softmax(float *x, int64_t count) {
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

/* ---- products over int8 rows ---- */

typedef struct {
    const uint8_t *weight; /* [out / 16, in / 4, 16, 4], int8 rows plus 128 */
    const float *scale;    /* [out], of the rows */
    int64_t in, out;
} Int8;

/* States in 15 bits: x ~ step * (128 high + low), [size] each. sum: of 128 high + low. Returns the step. */
INLINE float halve(const bf16 *x, int8_t *high, int8_t *low, int64_t size, int32_t *sum) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t i = 0; i < size; i += 16) most = _mm512_max_ps(most, _mm512_abs_ps(load16(x + i)));
    float peak = _mm512_reduce_max_ps(most);
    float step = peak > 0 ? peak / 16255.0f : 1.0f;
    __m512 by = _mm512_set1_ps(step);
    __m512i total = _mm512_setzero_si512();
    for (int64_t i = 0; i < size; i += 16) {
        __m512i value = _mm512_cvtps_epi32(_mm512_div_ps(load16(x + i), by));
        __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(64)), 7);
        total = _mm512_add_epi32(total, value);
        _mm_storeu_si128((__m128i *)(high + i), _mm512_cvtepi32_epi8(upper));
        _mm_storeu_si128((__m128i *)(low + i), _mm512_cvtepi32_epi8(_mm512_sub_epi32(value, _mm512_slli_epi32(upper, 7))));
    }
    *sum = _mm512_reduce_add_epi32(total);
    return step;
}

INLINE void int8_sums(const uint8_t *weight, const int8_t *high, const int8_t *low, int64_t size, const int rows, __m512i out[][2]) {
    for (int r = 0; r < rows; r++) out[r][0] = out[r][1] = _mm512_setzero_si512();
    for (int64_t i = 0; i < size; i += 4, weight += 64) {
        __m512i four = _mm512_loadu_si512(weight);
        _mm_prefetch(weight + 4096, _MM_HINT_T0);
        for (int r = 0; r < rows; r++) {
            out[r][0] = _mm512_dpbusd_epi32(out[r][0], four, _mm512_set1_epi32(*(const int32_t *)(high + r * size + i)));
            out[r][1] = _mm512_dpbusd_epi32(out[r][1], four, _mm512_set1_epi32(*(const int32_t *)(low + r * size + i)));
        }
    }
}

/* One tile of 16 outputs for up to ROWS halved rows, [rows, in] each -> out [rows]. */
INLINE void int8_tile(const Int8 *p, int64_t tile, const int8_t *high, const int8_t *low, const float *step, const int32_t *sum, int rows, __m512 *out) {
    __m512i part[ROWS][2];
    __m512 scale = _mm512_loadu_ps(p->scale + tile * INT8_TILE);
#define BODY(n) int8_sums(p->weight + tile * INT8_TILE * p->in, high, low, p->in, n, part)
    FOR_ROWS(rows, BODY)
#undef BODY
    for (int r = 0; r < rows; r++) {
        __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(part[r][0], 7), part[r][1]);
        whole = _mm512_sub_epi32(whole, _mm512_set1_epi32(128 * sum[r])); /* the rows' 128s */
        out[r] = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(whole), scale), _mm512_set1_ps(step[r]));
    }
}

SHARED void *scratch_of(size_t bytes) { return aligned_alloc(64, (bytes + 63) & ~(size_t)63); }
