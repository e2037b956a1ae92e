// Law: one round of the rotation: products with the Hadamard matrix H, whose operands are made of signs, not loaded.
//
// H has a minus between input k and output n where k & n has an odd number of bits. One of the two is a channel, the other a
// coordinate: numbers of L bits, for ORDER is 2^L. What tells a bit of theirs:
//
//     bit         of a channel                         of a coordinate
//     0           half of a register, or column        half of a register, or column
//     1           mma's part, or ``join``              mma's part, or ``join``
//     3, 4        the lane's quarter                   counted; decoding, 3 is HALF
//     L-2, L-1    counted; encoding, L-1 is HALF       the lane's quarter
//     others      counted                              counted
//
// HALF: which of a part's two registers holds the input. Counted: by steps (inputs), or by strips of eight columns (outputs),
// so that it is known when this is compiled. A sign is then a product of signs, by what tells the bit of the input, and of the
// output:
//
//     a lane, a lane          bit 0, and bit 4 of order 64                 Signs.first
//     a register, a lane      HALF                                         Signs.half
//     the step, a lane        IN                                           Signs.in
//     a lane, the strip       OUT_HIGH, OUT_LOW                            added by Signs.operands
//     the step, the strip     all others                                   counted_bits
//
// Needs DECODER or ENCODER, ORDER, LOG2_ORDER, DTYPE, BLOB_BYTES, ROTATION_BYTES, and the tables SIGNS (D's signs as packed 16-bit
// numbers) and SIGNS_32 (as the top bits of words).
#pragma once

#include "lanes.cuh"

INLINE u32 parity(u32 x) { return __popc(x) & 1; }

// -- mma ------------------------------------------------------------------------------------------------------------
// sums [4] = inputs times matrix [2], plus ``plus`` [4]. Inputs: a register of the first part and one of the second, then the
// registers of those inputs whose bit HALF is set. Sums are of two columns each: two of the first part, two of the second.
INLINE void mma_half(float* sums, u32 first, u32 second, u32 first_half, u32 second_half, const u32* matrix,
                     const float* plus) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
        : "r"(first), "r"(second), "r"(first_half), "r"(second_half), "r"(matrix[0]), "r"(matrix[1]),
          "f"(plus[0]), "f"(plus[1]), "f"(plus[2]), "f"(plus[3]));
}

INLINE void mma_brain(float* sums, u32 first, u32 second, u32 first_half, u32 second_half, const u32* matrix,
                      const float* plus) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
        : "r"(first), "r"(second), "r"(first_half), "r"(second_half), "r"(matrix[0]), "r"(matrix[1]),
          "f"(plus[0]), "f"(plus[1]), "f"(plus[2]), "f"(plus[3]));
}

// -- H's signs ------------------------------------------------------------------------------------------------------
#define NEGATIVE 0x80008000u  // changes the signs of two packed numbers
#define STEPS (ORDER / 32)    // of 32 inputs of a row, 16 in each part
#ifdef DECODER
#define HALF 3
#define IN 4
#define OUT_HIGH (LOG2_ORDER - 1)
#define OUT_LOW (LOG2_ORDER - 2)
#define FIRST_COUNTED 4
#else
#define HALF (LOG2_ORDER - 1)
#define IN (LOG2_ORDER - 2)
#define OUT_HIGH 4
#define OUT_LOW 3
#define FIRST_COUNTED 5
#endif

// The counted bits of a step's inputs: bit 2, and those from FIRST_COUNTED up.
INLINE u32 input_of_step(int step) { return (step & 1) << 2 | step >> 1 << FIRST_COUNTED; }

// What a lane knows of the matrix's signs, 16 bytes in shared memory for each lane.
struct Signs {
    u32 first;   // the matrix's first register, where no counted bit is set
    u32 half;    // what the second register differs by
    u32 in;      // what both differ by in steps whose bit IN is set
    u32 unused;  // 16 bytes are one load

    INLINE void prepare(int lane, u32 ones) {  // ones: 1.0 twice, as packed numbers
        const u32 in_high = lane >> 1 & 1, in_low = lane & 1;  // of inputs: the two bits of the lane's quarter
        // Of outputs: a lane brings column lane / 4, whose sums go to the quarter of two of these bits.
        const u32 out_high = lane >> 4 & 1, out_low = lane >> 3 & 1, out_0 = lane >> 2 & 1;
#ifdef DECODER
        const u32 meet = in_low & out_high, at_half = out_low, at_in = out_high;
#else
        const u32 meet = in_high & out_low, at_half = out_high, at_in = out_low;
#endif
        const u32 sign = ORDER == 64 ? meet : 0;  // there bit 4 is told by lanes both of a channel and of a coordinate
        first = ones ^ sign << 15 ^ (sign ^ out_0) << 31;
        half = at_half ? NEGATIVE : 0, in = at_in ? NEGATIVE : 0;
    }

    // A lane's two registers of the matrix, for steps whose bit IN is ``in_bit`` and strips with bits OUT_HIGH and OUT_LOW as
    // ``output`` has them: matrix[0] where ``counted_bits`` are even in number, matrix[1] where they are odd.
    INLINE void operands(int quarter, u32 in_bit, u32 output, u32 (*matrix)[2]) const {
        u32 entries = first ^ (output >> OUT_HIGH & 1 && (ORDER > 64 || OUT_HIGH != 4) ? (quarter >> 1) * NEGATIVE : 0);
        entries ^= output >> OUT_LOW & 1 && (ORDER > 64 || OUT_LOW != 4) ? (quarter & 1) * NEGATIVE : 0;
        entries ^= in_bit && ORDER > 64 ? in : 0;
        matrix[0][0] = entries, matrix[0][1] = entries ^ half;
        matrix[1][0] = entries ^ NEGATIVE, matrix[1][1] = matrix[0][1] ^ NEGATIVE;
    }
};

// The bits that are counted of an input and of an output, and set in both.
INLINE u32 counted_bits(u32 input, u32 output) { return input & output & ~(1u << IN); }

INLINE Signs signs_of(const u8* tables, int lane, bool brain) {
    return reinterpret_cast<const Signs*>(tables + BLOB_BYTES + (brain ? ROTATION_BYTES / 2 : 0))[lane];
}

// Writes a lane's Signs behind the tables: of float16 and, when encoding, of bfloat16.
INLINE void prepare_signs(u8* tables, int lane) {
    reinterpret_cast<Signs*>(tables + BLOB_BYTES)[lane].prepare(lane, HALF_ONES);
#ifdef ENCODER
    reinterpret_cast<Signs*>(tables + BLOB_BYTES + ROTATION_BYTES / 2)[lane].prepare(lane, BRAIN_ONES);
#endif
}

// A row's first part is its inputs whose bit 1 is not set, the second those whose bit 1 is. H adds the sums of both for outputs
// whose bit 1 is not set, and subtracts the second for those whose bit 1 is. ``sums``, as mma leaves them -> four neighbouring
// outputs.
INLINE void join(float* sums) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float first = sums[i], second = sums[2 + i];
        sums[i] = first + second, sums[2 + i] = first - second;
    }
}

// -- D's signs ------------------------------------------------------------------------------------------------------
INLINE const u32* top_bits(const u8* tables, int channel) {  // of the channels from this one on
    return reinterpret_cast<const u32*>(tables + SIGNS_32_AT) + channel;
}

INLINE uint4 packed_signs(const u8* tables, int channel) {  // of eight channels
    return *reinterpret_cast<const uint4*>(tables + SIGNS_AT + channel * 2);
}

#if DTYPE != FLOAT32
INLINE u32 with_signs(u32 packed, u32 signs) {  // two packed numbers, each times 1 or -1, and never -0
    u32 product;
#if DTYPE == FLOAT16
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(packed), "r"(signs), "r"(0u));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(packed), "r"(signs), "r"(0u));
#endif
    return product;
}
#endif

#ifdef DECODER
// -- decoding: channels without D's signs ---------------------------------------------------------------------------
struct BackRotation {
    Signs signs;

    INLINE BackRotation(const u8* tables, int lane) : signs(signs_of(tables, lane, false)) {}

    // A lane's eight channels of a piece. ``quads`` [QUADS][2]: its coordinates, packed float16.
    INLINE void eight_channels(const u8* tables, u32 (*quads)[2], int quarter, int piece, float* numbers) {
        float (*sums)[4] = reinterpret_cast<float (*)[4]>(numbers);  // of four channels each
        u32 matrix[2][2][2];  // [bit IN][whether counted_bits are odd][register]
        signs.operands(quarter, 0, piece << 5, matrix[0]);
        signs.operands(quarter, 1, piece << 5, matrix[1]);
#pragma unroll
        for (int step = 0; step < STEPS; step++)
#pragma unroll
            for (int four = 0; four < 2; four++) {
                const float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                const u32 input = input_of_step(step), output = piece << 5 | four << 2;
                const u32 *quad = quads[input / 4], *half = quads[input / 4 + (1 << HALF) / 4];
                mma_half(sums[four], quad[0], quad[1], half[0], half[1],
                         matrix[input >> IN & 1][parity(counted_bits(input, output))], step ? sums[four] : zeros);
            }
        join(sums[0]);
        join(sums[1]);
    }
};
#endif

#ifdef ENCODER
// -- encoding: coordinates, sqrt(ORDER) times too long --------------------------------------------------------------
// The two registers of the matrix for a step and a quad, out of operands [bits OUT of the quad][whether counted_bits are
// odd][register].
#define MATRIX(operands, step, quad) operands[(quad) >> 1 & 3][parity(counted_bits(input_of_step(step), (quad) << 2))]

// Finds the operands for a step and those after it, where they change: at the first step, and where bit IN is set from then on.
INLINE void next_operands(const Signs& signs, int quarter, int step, u32 (*operands)[2][2]) {
    if (step == 0 || (step == STEPS / 2 && ORDER > 64))
#pragma unroll
        for (int bits = 0; bits < 4; bits++) signs.operands(quarter, step > 0, bits << OUT_LOW, operands[bits]);
}

#if DTYPE != FLOAT32
// ``stored`` [PIECES][4]: a lane's channels as they are stored; they get D's signs.
template <bool TOGETHER> INLINE void rotate_stored(const u8* tables, int lane, u32 (*stored)[4], float (*quads)[4]) {
    const int quarter = lane & 3;
    const Signs signs = signs_of(tables, lane, DTYPE == BFLOAT16);
    u32 operands[4][2][2];
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        const uint4 sign = packed_signs(tables, first_channel(quarter, piece));
        stored[piece][0] = with_signs(stored[piece][0], sign.x), stored[piece][1] = with_signs(stored[piece][1], sign.y);
        stored[piece][2] = with_signs(stored[piece][2], sign.z), stored[piece][3] = with_signs(stored[piece][3], sign.w);
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        const u32 *pair = stored[step / 2] + 2 * (step & 1), *half = stored[step / 2 + PIECES / 2] + 2 * (step & 1);
        next_operands(signs, quarter, step, operands);
#pragma unroll
        for (int quad = 0; quad < QUADS; quad++) {
            const float zeros[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            const float* plus = step ? quads[quad] : zeros;
#if DTYPE == FLOAT16
            mma_half(quads[quad], pair[0], pair[1], half[0], half[1], MATRIX(operands, step, quad), plus);
#else
            mma_brain(quads[quad], pair[0], pair[1], half[0], half[1], MATRIX(operands, step, quad), plus);
#endif
        }
    }
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++) join(quads[quad]);
}
#endif

// ``numbers`` [PIECES][8]: a lane's channels. Each is multiplied as two terms of float16: the nearest, and what is left.
template <bool TOGETHER>
INLINE void rotate_numbers(const u8* tables, int lane, float (*numbers)[8], float scale, bool wrong, float (*quads)[4]) {
    const int quarter = lane & 3;
    const Signs signs = signs_of(tables, lane, false);
    u32 operands[4][2][2];
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++) quads[quad][0] = quads[quad][1] = quads[quad][2] = quads[quad][3] = 0.0f;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        u32 terms[2][4];  // [term][bit HALF, bit 1 of the channels]: mma's registers
        next_operands(signs, quarter, step, operands);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int piece = step / 2 + (i >> 1) * PIECES / 2, at = 4 * (step & 1) + 2 * (i & 1);
            const u32* sign = top_bits(tables, first_channel(quarter, piece) + at);
            float even = wrong ? 0.0f : float_of(bits_of(numbers[piece][at] * scale) ^ sign[0]);
            float odd = wrong ? 0.0f : float_of(bits_of(numbers[piece][at + 1] * scale) ^ sign[1]);
            terms[0][i] = pack_halves(even, odd);
            even -= half_value(terms[0][i] & 0xffff), odd -= half_value(terms[0][i] >> 16);
            terms[1][i] = pack_halves(even, odd);
        }
#pragma unroll
        for (int quad = 0; quad < QUADS; quad++)
#pragma unroll
            for (int term = 0; term < 2; term++)
                mma_half(quads[quad], terms[term][0], terms[term][1], terms[term][2], terms[term][3],
                         MATRIX(operands, step, quad), quads[quad]);
    }
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++) join(quads[quad]);
}
#endif
