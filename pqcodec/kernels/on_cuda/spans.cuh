// Law: which span of a launch holds a block or a lead (kernels/spans.py).
//
// Needs no macros.
#pragma once

#include "numbers.cuh"

#define ALL_LANES 0xffffffffu

// The span of number ``index``, which a whole warp looks for: the last one whose first number is not behind it, five bits at a
// time. ``firsts``: of each span, and behind them numbers that no index reaches, 2^search + 1 in all.
INLINE int span_of(const i64* __restrict__ firsts, int search, u32 index) {
    int which = 0;
#pragma unroll 1
    for (int left = search; left > 0; left -= 5) {
        const int apart = max(left - 5, 0), place = which + ((int)(threadIdx.x & 31) << apart);
        const bool before = (place >> search) == 0 && __ldg(firsts + place) <= index;
        which += (__popc(__ballot_sync(ALL_LANES, before)) - 1) << apart;
    }
    return which;
}
