// Law: arithmetic of packed float16: two products or sums at once, and tensor cores' products of whole tiles.
//
// Needs no macros.
#pragma once

#include "numbers.cuh"

// a b + c, each rounded once.
INLINE u32 multiply_add(u32 a, u32 b, u32 c) {
    u32 found;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(found) : "r"(a), "r"(b), "r"(c));
    return found;
}

// Both numbers times the first or the second one of ``factors``.
template <bool SECOND> INLINE u32 times_one(u32 packed, u32 factors) {
    u32 found;
    if (SECOND)
        asm("{.reg .b16 a, b; .reg .b32 c; mov.b32 {a, b}, %2; mov.b32 c, {b, b}; mul.rn.f16x2 %0, %1, c;}"
            : "=r"(found) : "r"(packed), "r"(factors));
    else
        asm("{.reg .b16 a, b; .reg .b32 c; mov.b32 {a, b}, %2; mov.b32 c, {a, a}; mul.rn.f16x2 %0, %1, c;}"
            : "=r"(found) : "r"(packed), "r"(factors));
    return found;
}

// sums += rows times a matrix, of a warp's lanes as mma.m16n8k16 has it: lane 4 g + t has columns 2 t and 2 t + 1 of rows g and
// g + 8 of the sums, in a0 (g) and a1 (g + 8) inputs 2 t and 2 t + 1 of the rows, in a2 and a3 inputs 2 t + 8 and 2 t + 9, and in
// b0 and b1 the same inputs of column g.
INLINE void multiply(float* sums, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
