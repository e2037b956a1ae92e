// Law: the turn of a phase of RoPE (SPEC 9.2): a coarse one and a fine one, as cos and sin.
//
// Needs no macros.
#pragma once

#include "numbers.cuh"

struct Turn {
    float2 coarse, fine;

    // As decoders find them: every product and sum rounds.
    INLINE float cos() const { return coarse.x * fine.x - coarse.y * fine.y; }
    INLINE float sin() const { return coarse.y * fine.x + coarse.x * fine.y; }

    // As an encoder may.
    INLINE float fused_cos() const { return fmaf(coarse.x, fine.x, -coarse.y * fine.y); }
    INLINE float fused_sin() const { return fmaf(coarse.y, fine.x, coarse.x * fine.y); }
};
