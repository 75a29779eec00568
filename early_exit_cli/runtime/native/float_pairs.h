/* Pairs of bfloat16 where products are of float32: both numbers of each pair apart. Needs `even_of`, `odd_of`,
 * `read_ints16`, `all_ints16` of its instruction set. */
#pragma once

typedef struct {
    Floats even, odd;
} Pairs;
typedef float Four __attribute__((vector_size(16)));

INLINE Pairs load_pairs(const bf16 *p) {
    Ints pairs = read_ints16(p);
    return (Pairs){even_of(pairs), odd_of(pairs)};
}
INLINE Pairs all_pairs(const bf16 *p) {
    Ints pairs = all_ints16(two_bf16(p));
    return (Pairs){even_of(pairs), odd_of(pairs)};
}
INLINE Floats dot_pairs(Floats sum, Pairs a, Pairs b) { return fma16(a.odd, b.odd, fma16(a.even, b.even, sum)); }
