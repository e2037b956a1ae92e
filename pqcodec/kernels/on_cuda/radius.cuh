// Law: a row's radius (SPEC 6.1): codes of even steps of its logarithm, and the two factors that a decoder multiplies with.
//
// Needs DECODER or ENCODER, LOG2_ORDER, ENERGY_ORDERS, RADIUS_BITS, RADIUS_STEPS (codes an octave), RADIUS_BIAS, RADIUS_SPLIT,
// RADIUS_SHIFT, SECOND_FACTOR and, when decoding, the table MANTISSAS.
#pragma once

#include "numbers.cuh"

#ifdef DECODER
// The factors of mantissa * 2^exponent: small ones have a second factor, so that the first is in float32's normal range.
INLINE void split_factor(float mantissa, int exponent, float& factor, float& second_factor) {
    const bool small = exponent < RADIUS_SPLIT;
    factor = float_of(bits_of(mantissa) + ((exponent + (small ? RADIUS_SHIFT : 0)) << MANTISSA_BITS));
    second_factor = small ? SECOND_FACTOR : 1.0f;
}

// The factors of a radius code; of code 0 they are 0 and 1.
INLINE void radius_factors(const u8* tables, u32 code, float& factor, float& second_factor) {
    u32 step = max(code, 1u) - 1, octave = step / RADIUS_STEPS;
    const float mantissa = reinterpret_cast<const float*>(tables + MANTISSAS_AT)[step - octave * RADIUS_STEPS];
    split_factor(mantissa, (int)octave - RADIUS_BIAS, factor, second_factor);
    factor = code ? factor : 0.0f;
}
#endif

#ifdef ENCODER
#define LEAST_ENERGY 1e-30f  // rows of less are coded as zero rows

// The code of the radius sqrt(energy / ORDER^ENERGY_ORDERS) 2^-exponent; 0 of a zero row.
INLINE u32 radius_code(float energy, int exponent) {
    const u32 bits = bits_of(energy);
    const int power = (int)(bits >> MANTISSA_BITS) - BIAS - ENERGY_ORDERS * LOG2_ORDER;
    float doubled;  // twice the radius's logarithm within its octave: 0 .. 2
    asm("lg2.approx.ftz.f32 %0, %1;"
        : "=f"(doubled)
        : "f"(float_of((bits & MANTISSA) + (BIAS + (power & 1) << MANTISSA_BITS))));
    const int octave = (power >> 1) - exponent + RADIUS_BIAS;
    const int step = octave * RADIUS_STEPS + __float2int_rd(doubled * (0.5f * RADIUS_STEPS) + 0.5f);
    return energy > LEAST_ENERGY ? min(max(step + 1, 1), (1 << RADIUS_BITS) - 1) : 0;
}
#endif
