// Law: numbers of a tensor as words hold them.
//
// Needs DTYPE (FLOAT16, BFLOAT16 or FLOAT32).
#pragma once

#include "numbers.cuh"

INLINE float value_of(const u32* stored, int i) {
#if DTYPE == FLOAT32
    return float_of(stored[i]);
#elif DTYPE == FLOAT16
    return half_value(stored[i / 2] >> 16 * (i & 1));
#else
    return float_of(i & 1 ? stored[i / 2] & 0xffff0000u : stored[i / 2] << 16);
#endif
}

// Whether one of the numbers of COUNT words is NaN or Inf.
template <int COUNT> INLINE bool holds_wrong(const u32* stored) {
    u32 most = 0;  // the largest magnitude, as bits; of 16-bit numbers two of them, packed
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        most = DTYPE == FLOAT32 ? max(most, stored[i] & MAGNITUDE) : __vmaxu2(most, stored[i] & PACKED_MAGNITUDES);
    if (DTYPE == FLOAT32) return most >= INFINITY_BITS;
    return max(most & 0xffff, most >> 16) >= (DTYPE == FLOAT16 ? HALF_INFINITY : INFINITY_BITS >> 16);
}
