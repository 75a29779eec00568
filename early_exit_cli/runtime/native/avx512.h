/* Vectors of AVX512 with VNNI: one register holds all 16 numbers. With BF16 (`HAS_BF16`) pairs are multiplied as they
 * lie. */
#pragma once
#include <immintrin.h>

#ifdef __AVX512BF16__
#define HAS_BF16
#endif
#define ROWS 8
#define VALUES 4
#define KEY_TILES 2
#define SUMS 16
#define INT8_INPUTS 4

typedef __m512 Floats;
typedef __m512i Ints;
typedef __mmask16 Lanes;

INLINE void relax(void) { _mm_pause(); }

INLINE Floats zero16(void) { return _mm512_setzero_ps(); }
INLINE Floats all16(float x) { return _mm512_set1_ps(x); }
INLINE Floats read16(const float *p) { return _mm512_loadu_ps(p); }
INLINE void write16(float *p, Floats x) { _mm512_storeu_ps(p, x); }
INLINE Floats add16(Floats a, Floats b) { return _mm512_add_ps(a, b); }
INLINE Floats sub16(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
INLINE Floats mul16(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
INLINE Floats div16(Floats a, Floats b) { return _mm512_div_ps(a, b); }
INLINE Floats max16(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats min16(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Floats abs16(Floats x) { return _mm512_abs_ps(x); }
INLINE Floats nearest16(Floats x) { return _mm512_roundscale_ps(x, 0); }
INLINE Floats fma16(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats negative_fma16(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE Floats times_power16(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
INLINE float sum16(Floats x) { return _mm512_reduce_add_ps(x); }

#define SUM_EACH16
/* The sums of 16 vectors, each in the order of `sum16`: two vectors' halves are added side by side, then quarters. */
INLINE Floats halves_of(Floats a, Floats b) {
    return add16(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
}
INLINE Floats quarters_of(Floats a, Floats b) {
    return add16(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}
INLINE Floats twos_of(Floats a, Floats b) {
    return add16(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xEE));
}
INLINE Floats ones_of(Floats a, Floats b) {
    return add16(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD));
}
INLINE void sum_each16(const Floats *x, const int count, float *out) {
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    Floats four[4];
    for (int i = 0; i < 4; i++)
        four[i] = quarters_of(halves_of(x[4 * i], x[4 * i + 1]), halves_of(x[4 * i + 2], x[4 * i + 3]));
    Floats all = ones_of(twos_of(four[0], four[1]), twos_of(four[2], four[3]));
    write16(out, _mm512_permutexvar_ps(order, all));
    (void)count;
}
INLINE float most16(Floats x) { return _mm512_reduce_max_ps(x); }

INLINE Lanes between16(int64_t first, int64_t low, int64_t high) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i place = _mm512_add_epi32(lane, _mm512_set1_epi32((int)first));
    return _mm512_cmpge_epi32_mask(place, _mm512_set1_epi32((int)low)) &
           _mm512_cmplt_epi32_mask(place, _mm512_set1_epi32((int)high));
}
INLINE Floats or_zero16(Lanes lanes, Floats x) { return _mm512_maskz_mov_ps(lanes, x); }
INLINE Floats max_where16(Lanes lanes, Floats a, Floats b) { return _mm512_mask_max_ps(a, lanes, a, b); }
INLINE unsigned equal16(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
INLINE unsigned at_least16(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }

INLINE Ints zero_ints16(void) { return _mm512_setzero_si512(); }
INLINE Ints to_ints16(Floats x) { return _mm512_cvtps_epi32(x); }
INLINE Ints add_ints16(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
INLINE int32_t sum_ints16(Ints x) { return _mm512_reduce_add_epi32(x); }
INLINE Floats less_to_floats16(Ints x, int32_t less) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(x, _mm512_set1_epi32(less)));
}

INLINE Floats load16(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

INLINE Floats of_bytes16(const int8_t *p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

#ifdef HAS_BF16
INLINE __m256i to_bf16(Floats x) { return (__m256i)_mm512_cvtneps_pbh(x); }
#else
INLINE __m256i to_bf16(Floats x) {
    const __m512i one = _mm512_set1_epi32(1);
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    __m512i nearest = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    nearest = _mm512_mask_or_epi32(nearest, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(nearest, 16));
}
#endif

INLINE void store16(bf16 *p, Floats x) { _mm256_storeu_si256((__m256i *)p, to_bf16(x)); }
INLINE Floats rounded16(Floats x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(to_bf16(x)), 16));
}
INLINE bf16 narrowed(float x) { return (bf16)_mm256_extract_epi16(to_bf16(_mm512_set1_ps(x)), 0); }

/* ---- pairs ---- */

#ifdef HAS_BF16
typedef __m512bh Pairs;

INLINE Pairs load_pairs(const bf16 *p) { return (__m512bh)_mm512_loadu_si512(p); }
INLINE Pairs all_pairs(const bf16 *p) { return (__m512bh)_mm512_set1_epi32(two_bf16(p)); }
INLINE Floats dot_pairs(Floats sum, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sum, a, b); }

/* 32 bytes of NF4, two inputs of 32 outputs: pairs of outputs 0..15 from the low halves, 16..31 from the high ones. */
INLINE void decode_pairs(const uint8_t *weight, Pairs *low, Pairs *high) {
    const __m512i values = _mm512_load_si512(NF4);
    __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)weight));
    _mm_prefetch((const char *)weight + 2048, _MM_HINT_T0);
    *low = (__m512bh)_mm512_permutexvar_epi16(both, values);
    *high = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), values);
}
#else
INLINE Floats even_of(Ints pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
INLINE Floats odd_of(Ints pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xFFFF0000)));
}
INLINE Ints all_ints16(int32_t x) { return _mm512_set1_epi32(x); }
INLINE Ints read_ints16(const void *p) { return _mm512_loadu_si512(p); }
#include "float_pairs.h"

/* ---- blocks of 64 inputs in integers, see nf4_rows.h ---- */

typedef struct {
    __m512i of[2];
} Codes;
typedef __m256i Sums;

/* Inputs of half a byte each: the even ones, then the odd ones. */
INLINE Codes decode_block(const uint8_t *weight) {
    const __m512i values = _mm512_load_si512(NF4_WHOLE);
    _mm_prefetch((const char *)weight + 2048, _MM_HINT_T0);
    __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)weight));
    return (Codes){{_mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), values),
                    _mm512_permutexvar_epi16(both, values)}};
}

INLINE void order_inputs(const int16_t x[64], int16_t *out) {
    for (int half = 0; half < 2; half++) {
        __m512i pairs = _mm512_loadu_si512(x + 32 * half);
        _mm256_storeu_si256((__m256i *)(out + 16 * half), _mm512_cvtepi32_epi16(pairs));
        _mm256_storeu_si256((__m256i *)(out + 32 + 16 * half), _mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
    }
}

INLINE void store_whole(int16_t *p, Ints x) { _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(x)); }

INLINE __m256i dot_one(Codes w, __m512i even, __m512i odd) {
    __m512i sum = _mm512_dpwssd_epi32(_mm512_madd_epi16(w.of[0], even), w.of[1], odd);
    return _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
}
INLINE Sums dot_two(Codes v, Codes w, const int16_t *x) {
    __m512i even = _mm512_loadu_si512(x), odd = _mm512_loadu_si512(x + 32);
    __m256i first = dot_one(v, even, odd), second = dot_one(w, even, odd);
    return _mm256_add_epi32(_mm256_unpacklo_epi32(first, second), _mm256_unpackhi_epi32(first, second));
}

INLINE __m256i quarter_of(Codes codes, int i) {
    return i % 2 ? _mm512_extracti64x4_epi64(codes.of[i / 2], 1) : _mm512_castsi512_si256(codes.of[i / 2]);
}
INLINE __m256i add_products(__m256i sum, __m256i a, __m256i b) { return _mm256_dpwssd_epi32(sum, a, b); }
#include "x86_integers.h"
#endif

/* 16 states' integers of 15 bits as 128 high + low, a byte each: all of the high ones, then all of the low ones. */
INLINE void store_states(int8_t *states, int64_t size, int64_t i, Ints x) {
    __m512i high = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(64)), 7);
    _mm_storeu_si128((__m128i *)(states + i), _mm512_cvtepi32_epi8(high));
    __m512i low = _mm512_sub_epi32(x, _mm512_slli_epi32(high, 7));
    _mm_storeu_si128((__m128i *)(states + size + i), _mm512_cvtepi32_epi8(low));
}

/* [in / 4, 16, 4] bytes times rows of states [rows, 2 size] -> sums of 16 outputs for each. */
INLINE void int8_sums(const uint8_t *weight, const int8_t *states, int64_t size, const int rows, Ints *out) {
    __m512i high[ROWS], low[ROWS];
    for (int r = 0; r < rows; r++) high[r] = low[r] = _mm512_setzero_si512();
    for (int64_t i = 0; i < size; i += 4, weight += 64) {
        __m512i four = _mm512_loadu_si512(weight);
        _mm_prefetch((const char *)weight + 4096, _MM_HINT_T0);
        for (int r = 0; r < rows; r++) {
            int32_t of_high, of_low;
            memcpy(&of_high, states + r * 2 * size + i, 4);
            memcpy(&of_low, states + r * 2 * size + size + i, 4);
            high[r] = _mm512_dpbusd_epi32(high[r], four, _mm512_set1_epi32(of_high));
            low[r] = _mm512_dpbusd_epi32(low[r], four, _mm512_set1_epi32(of_low));
        }
    }
    for (int r = 0; r < rows; r++) out[r] = _mm512_add_epi32(_mm512_slli_epi32(high[r], 7), low[r]);
}
