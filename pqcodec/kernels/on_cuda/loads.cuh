// Law: rows of a tensor as an encoder takes them: loaded, checked for NaN and Inf, centred, and scaled by a power of two.
//
// A row that holds NaN or Inf is ``wrong``: it is coded as zeros and counted.
//
// Needs DTYPE, OFFSETS, BYTES, LARGEST_32 (the largest float32), and what fetches.cuh, stored_numbers.cuh, the rotation and the
// offsets need.
#pragma once

#include "fetches.cuh"
#include "offsets.cuh"
#include "rotation.cuh"
#include "stored_numbers.cuh"

#define PLAIN (DTYPE != FLOAT32 && !OFFSETS && !BYTES)  // rows are multiplied as they are stored

INLINE float in_range(float x) { return fminf(fmaxf(x, -LARGEST_32), LARGEST_32); }

// Energies, as those of rotated coordinates, between which rows are multiplied as they are. Sums of float16 stay finite so, and
// keep what counts.
#if FACTORS
#define TOP_EXPONENT 8
#define LEAST_EVEN (1e-4f * ORDER * ORDER)
#define MOST_EVEN (2e8f * ORDER * ORDER)
#elif HALF_SUMS  // of half a row
#define TOP_EXPONENT 7
#define LEAST_EVEN (1e-8f * ORDER * ORDER)
#define MOST_EVEN (5e5f * ORDER * ORDER)
#else
#define TOP_EXPONENT 13
#define LEAST_EVEN 1e-22f
#define MOST_EVEN 1e30f
#endif

// The exponent of the power of two that brings a row's largest magnitude, as bits, to 2^TOP_EXPONENT or up to twice that.
INLINE int exponent_for(u32 most, bool wrong) {
    return wrong ? 0 : min(TOP_EXPONENT - ((int)(most >> MANTISSA_BITS) - BIAS), 127);
}

#if BYTES
// A lane's channels of a row of 16-bit numbers -> times 2^exponent, as whole numbers' low and high bytes, which are operands
// [PIECES][4] of the rotation. ``from``: the address of the first piece; ``bad`` counts wrong rows.
INLINE void bytes_row(const Block& block, const i64 from, const uint4* fetched, int row, int lane, int& bad, int& exponent,
                      u32 (*operands)[4]) {
    u32 stored[PIECES][4], most = 0;  // most: the largest magnitude, as bits; first two of them, packed
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        load_piece(from, fetched, lane, piece, stored[piece]);
#pragma unroll
        for (int i = 0; i < 4; i++) most = __vmaxu2(most, stored[piece][i] & PACKED_MAGNITUDES);
    }
    most = max(most & 0xffff, most >> 16);
    most = largest_of_row(most);
    most = DTYPE == BFLOAT16 ? most << 16 : bits_of(half_value(most));
    const bool wrong = most >= INFINITY_BITS;
    bad += wrong && row < block.tokens && (lane & 3) == 0;
    // The largest number is brought into the octave from 2^14 on, if it is then LARGEST_IN_BYTES at most; else it counts as of
    // the next octave, and comes to half of that.
    const u32 octave = most + ((1 << 15) - LARGEST_IN_BYTES << (MANTISSA_BITS - 14));
    exponent = wrong ? 0
                     : 14 - (octave >> MANTISSA_BITS ? (int)(octave >> MANTISSA_BITS) - BIAS
                                                     : 31 - __clz(octave) - (BIAS - 1 + MANTISSA_BITS));  // subnormal
    // A power of two beyond float32's is not multiplied with: numbers are rounded so much finer, and their bits are the same.
    const int rest = max(exponent - BIAS, 0);
    const float scale = power_of_two(exponent - rest), magic = float_of(bits_of(BYTES_MAGIC) - ((u32)rest << MANTISSA_BITS));
    const u32 mask = wrong ? 0 : ~0u;
#pragma unroll
    for (int four = 0; four < 2 * PIECES; four++) {  // channels
        u32 sums[4];
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = bits_of(fmaf(value_of(stored[four / 2], 4 * (four & 1) + i), scale, magic));
        u32* bytes = operands[four / 2] + 2 * (four & 1);
        split_bytes(sums, bytes);
        bytes[0] &= mask, bytes[1] &= mask;
    }
    exponent--;  // the matrix is R / 2
}
#else
// A lane's channels of a row as float32, without their offsets. ``scale``, 2^exponent, is to bring the largest number between
// 2^13 and 2^14, where two numbers of float16 hold 22 bits of it. ``means``: the block's, where there are offsets. ``from``:
// the address of the first piece; ``bad`` counts wrong rows.
template <bool AGAIN>
INLINE void careful_row(const u8* tables, const Block& block, const float* means, const i64 from, const uint4* fetched, int row,
                        int lane, int& bad, int& exponent, float (*numbers)[8], float& scale, bool& wrong) {
    const int quarter = lane & 3;
    u32 most = 0;  // the largest magnitude, as bits
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        u32 stored[PIECE_WORDS];
        load_piece<AGAIN>(from, fetched, lane, piece, stored);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            numbers[piece][i] = value_of(stored, i);
            most = max(most, bits_of(numbers[piece][i]) & MAGNITUDE);
        }
    }
    most = largest_of_row(most);
    wrong = most >= INFINITY_BITS;
    bad += wrong && row < block.tokens && quarter == 0;
#if OFFSETS
    most = 0;
    RowOffsets of_row;
    const u32 position = place_of_row(block, row);
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        float offsets[8];
        of_row.of_piece(tables, means, position, quarter, piece, offsets);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            numbers[piece][i] = in_range(numbers[piece][i] - offsets[i]);
            most = max(most, bits_of(numbers[piece][i]) & MAGNITUDE);
        }
    }
    most = largest_of_row(most);
#endif
    exponent = exponent_for(most, wrong);
    scale = power_of_two(exponent);
}

// A row's coordinates, of its numbers as careful_row gives them.
template <bool TOGETHER, bool AGAIN>
INLINE void rotate_carefully(const u8* tables, const Block& block, const float* means, const i64 from, const uint4* fetched,
                             int row, int lane, int& bad, int& exponent, float (*quads)[4]) {
    float numbers[PIECES][8], scale;
    bool wrong;
    careful_row<AGAIN>(tables, block, means, from, fetched, row, lane, bad, exponent, numbers, scale, wrong);
    rotate_numbers<TOGETHER>(tables, lane, numbers, scale, wrong, quads);
}
#endif
