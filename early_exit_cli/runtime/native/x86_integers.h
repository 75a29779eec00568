/* What AVX2 and AVX512 have alike of the NF4 product in integers (nf4_rows.h): sums of four outputs, and blocks of weights
 * turned over for products of many rows, where a register of 256 bits holds eight outputs. Needs `Sums`, `Codes`,
 * `decode_block`, `quarter_of` and `add_products` of the instruction set. */
#pragma once

INLINE Four sums_of_four(Sums two, Sums others) {
    __m256i all = _mm256_add_epi32(_mm256_unpacklo_epi64(two, others), _mm256_unpackhi_epi64(two, others));
    return _mm_cvtepi32_ps(_mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}

INLINE Four load4(const bf16 *p) {
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)p)), 16));
}
INLINE Four fma4(Four a, Four b, Four c) { return _mm_fmadd_ps(a, b, c); }

#define HAS_OUTPUTS 8

typedef __m256i Wholes; /* of eight outputs */
typedef float Eight __attribute__((vector_size(32)));

/* 8 numbers of 8 registers -> the first of all, the second of all, ... */
INLINE void turn_over(const __m256i in[8], int32_t *out) {
    __m256i two[8], four[8];
    for (int i = 0; i < 4; i++) {
        two[2 * i] = _mm256_unpacklo_epi32(in[2 * i], in[2 * i + 1]);
        two[2 * i + 1] = _mm256_unpackhi_epi32(in[2 * i], in[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        four[i] = _mm256_unpacklo_epi64(two[i], two[i + 2]), four[i + 1] = _mm256_unpackhi_epi64(two[i], two[i + 2]);
        four[i + 2] = _mm256_unpacklo_epi64(two[i + 1], two[i + 3]);
        four[i + 3] = _mm256_unpackhi_epi64(two[i + 1], two[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_si256((__m256i *)(out + 8 * i), _mm256_permute2x128_si256(four[i], four[i + 4], 0x20));
        _mm256_storeu_si256((__m256i *)(out + 8 * (i + 4)), _mm256_permute2x128_si256(four[i], four[i + 4], 0x31));
    }
}

/* A block of 64 inputs of eight outputs -> [32 pairs of inputs, in the order of `order_inputs`; 8 outputs]. */
INLINE void decode_outputs(const uint8_t *weight, int64_t stride, int32_t *out) {
    Codes codes[8];
    for (int i = 0; i < 8; i++) codes[i] = decode_block(weight + i * stride);
    for (int quarter = 0; quarter < 4; quarter++) {
        __m256i part[8];
        for (int i = 0; i < 8; i++) part[i] = quarter_of(codes[i], quarter);
        turn_over(part, out + 64 * quarter);
    }
}

INLINE Wholes read_outputs(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE Wholes zero_outputs(void) { return _mm256_setzero_si256(); }
INLINE Wholes all_outputs(const int16_t *two) { return _mm256_set1_epi32(two_bf16((const bf16 *)two)); }
INLINE Eight floats_of(Wholes x) { return _mm256_cvtepi32_ps(x); }
INLINE Eight eight_of(Four low, Four high) { return _mm256_set_m128(high, low); }
INLINE Eight fma8(Eight a, Eight b, Eight c) { return _mm256_fmadd_ps(a, b, c); }
