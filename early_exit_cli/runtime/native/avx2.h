/* Vectors of AVX2 with FMA and F16C (x86-64-v3): two registers hold the 16 numbers. */
#pragma once
#include <immintrin.h>

#define ROWS 4
#define VALUES 1
#define KEY_TILES 1
#define SUMS 4
#define INT8_INPUTS 2

typedef struct {
    __m256 low, high;
} Floats;
typedef struct {
    __m256i low, high;
} Ints;
typedef Ints Lanes;

#define FLOATS(name, f)                                                                                                \
    INLINE Floats name(Floats a, Floats b) { return (Floats){f(a.low, b.low), f(a.high, b.high)}; }
#define FLOATS_OF_THREE(name, f)                                                                                       \
    INLINE Floats name(Floats a, Floats b, Floats c) {                                                                 \
        return (Floats){f(a.low, b.low, c.low), f(a.high, b.high, c.high)};                                            \
    }

INLINE void relax(void) { _mm_pause(); }

FLOATS(add16, _mm256_add_ps)
FLOATS(sub16, _mm256_sub_ps)
FLOATS(mul16, _mm256_mul_ps)
FLOATS(div16, _mm256_div_ps)
FLOATS(max16, _mm256_max_ps)
FLOATS(min16, _mm256_min_ps)
FLOATS_OF_THREE(fma16, _mm256_fmadd_ps)
FLOATS_OF_THREE(negative_fma16, _mm256_fnmadd_ps)

INLINE Floats all16(float x) { return (Floats){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE Floats zero16(void) { return all16(0); }
INLINE Floats read16(const float *p) { return (Floats){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE void write16(float *p, Floats x) {
    _mm256_storeu_ps(p, x.low);
    _mm256_storeu_ps(p + 8, x.high);
}
INLINE Ints as_ints(Floats x) { return (Ints){_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
INLINE Floats as_floats(__m256i low, __m256i high) {
    return (Floats){_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)};
}
INLINE Floats abs16(Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return (Floats){_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
#define NEAREST(x) _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
INLINE Floats nearest16(Floats x) { return (Floats){NEAREST(x.low), NEAREST(x.high)}; }

/* 2^n, n a whole number from -126 to 127 */
INLINE __m256 power_of_two(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
/* In two steps, since 2^n alone may be no float32. */
INLINE __m256 times_power(__m256 x, __m256 n) {
    __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}
INLINE Floats times_power16(Floats x, Floats n) {
    return (Floats){times_power(x.low, n.low), times_power(x.high, n.high)};
}

INLINE float sum16(Floats x) {
    __m256 eight = _mm256_add_ps(x.low, x.high);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
INLINE float most16(Floats x) {
    __m256 eight = _mm256_max_ps(x.low, x.high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

INLINE __m256i between8(int64_t first, int64_t low, int64_t high) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    __m256i place = _mm256_add_epi32(lane, _mm256_set1_epi32((int)first));
    return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32((int)low), place),
                               _mm256_cmpgt_epi32(_mm256_set1_epi32((int)high), place));
}
INLINE Lanes between16(int64_t first, int64_t low, int64_t high) {
    return (Lanes){between8(first, low, high), between8(first + 8, low, high)};
}
INLINE Floats or_zero16(Lanes lanes, Floats x) {
    return (Floats){_mm256_and_ps(_mm256_castsi256_ps(lanes.low), x.low),
                    _mm256_and_ps(_mm256_castsi256_ps(lanes.high), x.high)};
}
INLINE Floats max_where16(Lanes lanes, Floats a, Floats b) {
    Floats most = max16(a, b);
    return (Floats){_mm256_blendv_ps(a.low, most.low, _mm256_castsi256_ps(lanes.low)),
                    _mm256_blendv_ps(a.high, most.high, _mm256_castsi256_ps(lanes.high))};
}
#define BITS(a, b, how)                                                                                                \
    ((unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a.low, b.low, how)) |                                                  \
     (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(a.high, b.high, how)) << 8)
INLINE unsigned equal16(Floats a, Floats b) { return BITS(a, b, _CMP_EQ_OQ); }
INLINE unsigned at_least16(Floats a, Floats b) { return BITS(a, b, _CMP_GE_OQ); }

INLINE Ints zero_ints16(void) { return (Ints){_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE Ints to_ints16(Floats x) { return (Ints){_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
INLINE Ints add_ints16(Ints a, Ints b) {
    return (Ints){_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
INLINE int32_t sum_ints16(Ints x) {
    __m256i eight = _mm256_add_epi32(x.low, x.high);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}
INLINE Floats less_to_floats16(Ints x, int32_t less) {
    const __m256i by = _mm256_set1_epi32(less);
    return (Floats){_mm256_cvtepi32_ps(_mm256_sub_epi32(x.low, by)), _mm256_cvtepi32_ps(_mm256_sub_epi32(x.high, by))};
}

INLINE __m256i widened(const bf16 *p) {
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
INLINE __m256 of_bytes8(const int8_t *p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
INLINE Floats of_bytes16(const int8_t *p) { return (Floats){of_bytes8(p), of_bytes8(p + 8)}; }
INLINE Floats load16(const bf16 *p) { return as_floats(widened(p), widened(p + 8)); }

/* bfloat16 bits in the upper halves, what was behind them in the lower ones */
INLINE __m256i to_nearest(__m256 x) {
    __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    return _mm256_blendv_epi8(nearest, nan, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
INLINE void store16(bf16 *p, Floats x) {
    __m256i low = _mm256_srli_epi32(to_nearest(x.low), 16), high = _mm256_srli_epi32(to_nearest(x.high), 16);
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xD8));
}
INLINE Floats rounded16(Floats x) {
    const __m256i upper = _mm256_set1_epi32((int)0xFFFF0000);
    return as_floats(_mm256_and_si256(to_nearest(x.low), upper), _mm256_and_si256(to_nearest(x.high), upper));
}
INLINE bf16 narrowed(float x) { return (bf16)(_mm256_cvtsi256_si32(to_nearest(_mm256_set1_ps(x))) >> 16); }

/* ---- pairs ---- */

INLINE Floats even_of(Ints pairs) {
    return as_floats(_mm256_slli_epi32(pairs.low, 16), _mm256_slli_epi32(pairs.high, 16));
}
INLINE Floats odd_of(Ints pairs) {
    const __m256i upper = _mm256_set1_epi32((int)0xFFFF0000);
    return as_floats(_mm256_and_si256(pairs.low, upper), _mm256_and_si256(pairs.high, upper));
}
INLINE Ints all_ints16(int32_t x) { return (Ints){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE Ints read_ints16(const void *p) {
    return (Ints){_mm256_loadu_si256((const __m256i *)p), _mm256_loadu_si256((const __m256i *)p + 1)};
}
#include "float_pairs.h"

/* ---- blocks of 64 inputs in integers, see nf4_rows.h ---- */

typedef struct {
    __m256i of[4];
} Codes;
typedef __m256i Sums;

/* 16 bytes, twice */
INLINE __m256i both_lanes(const void *p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)); }

/* 16 bytes, twice */
INLINE __m256i twice(const uint8_t *p) { return _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)p)); }

/* Inputs of half a byte each: the values' lower bytes are looked up, then their upper ones. In `of`: even inputs 0..14
 * and 32..46, 16..30 and 48..62, then the odd ones. */
INLINE Codes decode_block(const uint8_t *weight) {
    const __m256i half = _mm256_set1_epi8(15), lower = twice(NF4_LOWER), upper = twice(NF4_UPPER);
    __m256i bytes = _mm256_loadu_si256((const __m256i *)weight);
    _mm_prefetch((const char *)weight + 2048, _MM_HINT_T0);
    __m256i even = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), half), odd = _mm256_and_si256(bytes, half);
    __m256i even_lower = _mm256_shuffle_epi8(lower, even), even_upper = _mm256_shuffle_epi8(upper, even);
    __m256i odd_lower = _mm256_shuffle_epi8(lower, odd), odd_upper = _mm256_shuffle_epi8(upper, odd);
    return (Codes){{_mm256_unpacklo_epi8(even_lower, even_upper), _mm256_unpackhi_epi8(even_lower, even_upper),
                    _mm256_unpacklo_epi8(odd_lower, odd_upper), _mm256_unpackhi_epi8(odd_lower, odd_upper)}};
}

INLINE void order_inputs(const int16_t x[64], int16_t *out) {
    for (int half = 0; half < 2; half++) { /* inputs 0..15 beside 32..47, then 16..31 beside 48..63 */
        __m256i a = _mm256_loadu_si256((const __m256i *)(x + 16 * half));
        __m256i b = _mm256_loadu_si256((const __m256i *)(x + 16 * half + 32));
        __m256i even = _mm256_packs_epi32(_mm256_srai_epi32(_mm256_slli_epi32(a, 16), 16),
                                          _mm256_srai_epi32(_mm256_slli_epi32(b, 16), 16));
        __m256i odd = _mm256_packs_epi32(_mm256_srai_epi32(a, 16), _mm256_srai_epi32(b, 16));
        _mm256_storeu_si256((__m256i *)(out + 16 * half), _mm256_permute4x64_epi64(even, 0xD8));
        _mm256_storeu_si256((__m256i *)(out + 16 * half + 32), _mm256_permute4x64_epi64(odd, 0xD8));
    }
}

INLINE void store_whole(int16_t *p, Ints x) {
    _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0xD8));
}

INLINE Sums dot_two(Codes v, Codes w, const int16_t *x) {
    __m256i first = _mm256_setzero_si256(), second = _mm256_setzero_si256();
    for (int i = 0; i < 4; i++) {
        __m256i inputs = _mm256_loadu_si256((const __m256i *)(x + 16 * i));
        first = _mm256_add_epi32(first, _mm256_madd_epi16(v.of[i], inputs));
        second = _mm256_add_epi32(second, _mm256_madd_epi16(w.of[i], inputs));
    }
    return _mm256_add_epi32(_mm256_unpacklo_epi32(first, second), _mm256_unpackhi_epi32(first, second));
}

INLINE __m256i quarter_of(Codes codes, int i) { return codes.of[i]; }
INLINE __m256i add_products(__m256i sum, __m256i a, __m256i b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
}
#include "x86_integers.h"

/* ---- products over int8 rows, see kernels.h ---- */

/* 16 states' integers of 15 bits, two bytes each. */
INLINE void store_states(int8_t *states, int64_t size, int64_t i, Ints x) {
    (void)size;
    store_whole((int16_t *)states + i, x);
}

/* [in / 2, 16, 2] bytes times rows of states [rows, 2 size] -> sums of 16 outputs for each. */
INLINE void int8_sums(const uint8_t *weight, const int8_t *states, int64_t size, const int rows, Ints *out) {
    Ints sum[ROWS];
    for (int r = 0; r < rows; r++) sum[r] = zero_ints16();
    for (int64_t i = 0; i < size; i += 2, weight += 32) {
        __m256i low = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)weight));
        __m256i high = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)weight + 1));
        _mm_prefetch((const char *)weight + 4096, _MM_HINT_T0);
        for (int r = 0; r < rows; r++) {
            __m256i two = _mm256_set1_epi32(two_bf16((const bf16 *)(states + 2 * (r * size + i))));
            sum[r].low = _mm256_add_epi32(sum[r].low, _mm256_madd_epi16(low, two));
            sum[r].high = _mm256_add_epi32(sum[r].high, _mm256_madd_epi16(high, two));
        }
    }
    for (int r = 0; r < rows; r++) out[r] = sum[r];
}
