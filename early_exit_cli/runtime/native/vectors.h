/* The vectors that all operations are written in, and which instruction set they become.
 *
 * Each header gives the same names the same meaning:
 *
 *   Floats, Ints            16 float32, 16 int32
 *   zero16 all16            16 times 0, 16 times one number
 *   load16 store16          16 bfloat16 in memory; storing rounds to the nearest, even where two are as near
 *   read16 write16          16 float32 in memory
 *   add16 sub16 mul16 div16 max16 min16 abs16 nearest16      as they say, nearest16 to a whole number
 *   fma16(a, b, c)          a b + c, rounded once; negative_fma16(a, b, c): c - a b
 *   times_power16(a, n)     a 2^n, n whole
 *   rounded16               to bfloat16 and back; narrowed: one number to bfloat16
 *   sum16 most16            of the 16 numbers, in one order; sum_each16 of several vectors, SUMS at most
 *   of_bytes16              16 int8 in memory
 *   Lanes                   some of the 16: between16(first, low, high) those of the places first .. first + 15 that
 *                           lie in [low, high); or_zero16 and max_where16(lanes, a, b) leave the others 0, and a
 *   equal16 at_least16      a bit for each number
 *   Pairs                   16 pairs of bfloat16: load_pairs of 32 in memory, all_pairs of one pair,
 *   dot_pairs(sum, a, b)    sum + both products of each pair
 *   to_ints16 add_ints16 sum_ints16 less_to_floats16         of 16 integers; the last takes one number from each
 *   store_states int8_sums  products over int8 rows, see kernels.h
 *   decode_pairs            with HAS_BF16, for nf4_pairs.h; else
 *   decode_block order_inputs store_whole dot_two sums_of_four load4 fma4     for nf4_rows.h
 *
 * ROWS: so many rows share a weight that was read. VALUES: so many vectors of attention's values fit beside half of
 * them, and KEY_TILES: so many of its keys beside all. SUMS: so many sums of a product of rows fit, whatever they are of.
 * INT8_INPUTS: inputs of an int8 row that lie side by side.
 */
#pragma once
#include <stdint.h>
#include <string.h>

#include "nf4_codes.h"

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline, unused))
#define SHARED static __attribute__((unused))

INLINE float to_float(bf16 x) {
    union { uint32_t bits; float value; } u = {(uint32_t)x << 16};
    return u.value;
}

/* Two neighbours in memory, of any alignment. */
INLINE int32_t two_bf16(const bf16 *p) {
    int32_t both;
    memcpy(&both, p, sizeof both);
    return both;
}

#if defined(__AVX512VNNI__)
#include "avx512.h"
#elif defined(__AVX2__) && defined(__FMA__)
#include "avx2.h"
#elif defined(__aarch64__)
#include "neon.h"
#else
#error "no vectors for this instruction set"
#endif

#ifndef SUM_EACH16
INLINE void sum_each16(const Floats *x, const int count, float *out) {
    for (int i = 0; i < count; i++) out[i] = sum16(x[i]);
}
#endif
