// Law: the split coding (SPEC 6): what its decoder and its encoder share, which is how a node shares out its bits.
//
// A node of n coordinates owns a budget of bits: first an angle, then its left child's run, then its right child's. A lane's
// quarter is the subtree of one node of ORDER / 4 coordinates, which ends in quads. All four lanes walk down to their own.
//
// Needs ORDER, ROW_BYTES, STRIDE_WORDS (words from one row of a tile to the next), CAP (most bits a coordinate), MOST_WIDTH
// (most bits of an angle) and WIDTH_SHIFT.
#pragma once

#include "lanes.cuh"

// Rows are kept apart in the stage, so that lanes of different rows meet in no bank of the shared memory.
INLINE int place_of_word(int word) { return word + word / words_of(1) * (STRIDE_WORDS - words_of(1)); }

// Bits of the angle of a node of N coordinates: its budget is multiplied with 16 / (15 N), which look_ups.division shows to be
// exact.
template <int N> INLINE int width_of(int budget) {
    constexpr u32 factor = ((16u << WIDTH_SHIFT) + 15 * N - 1) / (15 * N);
    return (int)min(min(max((u32)budget * factor, 1u << WIDTH_SHIFT) >> WIDTH_SHIFT, (u32)MOST_WIDTH), (u32)budget);
}

// Bits of the left child, of those that the angle left; ``shift``: how many more than half the angle gives it. M: a child's
// coordinates.
template <int M> INLINE int share_of(int rest, int shift) {
    return min(max((rest >> 1) + shift, max(rest - CAP * M, 0)), min(rest, CAP * M));
}

// How far below the root the nodes of n coordinates are: their place in tables.
constexpr __device__ int level_of(int n) { return n == ORDER ? 0 : 1 + level_of(2 * n); }
