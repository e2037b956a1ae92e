// Law: energies (squared norms) of a row's coordinates, from which an encoder finds the angles between them.
//
// Needs ORDER, ENCODER.
#pragma once

#include "lanes.cuh"

// Of a lane's quads: the energies of their two pairs. The first is never 0.
struct Energies {
    float first[QUADS], second[QUADS];

    // Of N coordinates, from a quad on.
    template <int N> INLINE float of(int quad) const {
        constexpr int LEFT = N / 8 * 4;  // half of them, in whole quads
        if constexpr (N == 4) return first[quad] + second[quad];
        else return of<LEFT>(quad) + of<N - LEFT>(quad + LEFT / 4);
    }
};

#define TINY 1e-37f  // keeps a quotient of two zeros finite

INLINE void find_energies(float (*quads)[4], Energies& energies) {
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++) {
        energies.first[quad] = fmaf(quads[quad][0], quads[quad][0], fmaf(quads[quad][1], quads[quad][1], TINY));
        energies.second[quad] = fmaf(quads[quad][2], quads[quad][2], quads[quad][3] * quads[quad][3]);
    }
}
