// Law: radii of rows of quads (SPEC 8.1, 8.3): their factors, from their codes and their block's base.
//
// Needs LEAST, MOST and LOG2_STEPS of radii, RADIUS_STEPS, the table MANTISSAS, LARGEST_SUM (that the rotation makes), and what
// the other files need.
#pragma once

#include "block_place.cuh"
#include "radius.cuh"

#define LARGEST_FUSED 1e30f  // factor of a row, of which MAGIC times it is far from infinite

INLINE int base_of(const u32* words, const Block& block) {
    return (int)(short)__funnelshift_r(words[0], words[1], 8 * (block.tokens & 3));
}

// The factors of a radius code (SPEC 8.3).
INLINE void quad_factors(const u8* tables, u32 code, int base, float& factor, float& second_factor) {
    const int radius = min(max(base + (int)code - 1, LEAST), MOST);
    const float mantissa = reinterpret_cast<const float*>(tables + MANTISSAS_AT)[radius & (RADIUS_STEPS - 1)];
    split_factor(mantissa, radius >> LOG2_STEPS, factor, second_factor);
    factor = code ? factor : 0.0f;
}

// Whether all numbers of a row stay within ``room``, and its factor is one number of which MAGIC times is finite.
INLINE bool is_ordinary(float factor, float second_factor, float room) {
    return second_factor == 1.0f && factor * LARGEST_SUM < room && factor < LARGEST_FUSED;
}
