// Law: two rounds of the rotation: products with their matrix R, which lies in shared memory. Its entries are even integers.
//
// Two parts of a row (rotation.cuh) are one of these:
//
//     BYTES (decoders, and encoders of rows of 256 16-bit numbers, where reading a matrix of 16 bits takes too long): the low
//         and the high bytes of whole numbers. The matrix is R / 2, of signed bytes; sums of high bytes count 256 times.
//     TWICE: different inputs of a row of 16-bit numbers. The matrix is R, of 16-bit numbers. Each part meets other rows of it,
//         so there are two products, and of each the sums of one part count.
//     neither: 16-bit numbers, and the rest that float32 has beyond them, or (WIDE) of another row. The matrix is R, of 16-bit
//         numbers. With HALF_SUMS these are float16, and so are sums, two of a word: the matrix is R over 2^DOWN_SHIFT.
//
// The matrix lies in bricks of 128 bytes: a strip of eight columns, one behind the other, by 16 bytes of inputs. All bricks of
// the first strip come first. Both mma (by ldmatrix) and wgmma (without swizzle) read such bricks. A panel is as many strips as
// a lane has registers for: 32 sums, or 16 where parts are a number and its rest, and where a lane holds two rows (WIDE) of
// another order than 64 or 128. Those of order 128 have 64 sums, one panel, unless means are turned for each row. With HALF_SUMS
// a panel is all strips, but of order 256 half of them.
//
// Needs BYTES, STRIPS (of a panel, if not the usual number), BRAIN (16-bit numbers are bfloat16, else float16), HALF_SUMS,
// DOWN_SHIFT, WARPGROUPS (four warps multiply together), DECODER or ENCODER, ORDER, DTYPE, OFFSETS, and the table MATRIX.
#pragma once

#include "lanes.cuh"

#ifndef HALF_SUMS
#define HALF_SUMS 0
#endif

#if BYTES
typedef int Sum;
#define BRICKS (ORDER / 16)  // of a strip
#ifndef STRIPS
#define STRIPS 8             // of a panel
#endif
#define MMA_SHAPE "m16n8k32.row.col.s32.s8.s8.s32"
#define WGMMA_KIND "k32.s32.s8.s8"
#define WGMMA_SIGNS ""  // of its factors, which whole numbers have none for
#define IN_OUT(x) "+r"(x)
#else
#define BRICKS (ORDER / 8)
#if HALF_SUMS
#define STRIPS (ORDER == 256 ? BRICKS / 2 : BRICKS)
#elif WIDE && ORDER == 128 && WARPGROUPS && (!OFFSETS || defined(RUN_TURNS_AT))
#define STRIPS 16
#elif WIDE && (ORDER == 64 || ORDER == 128)
#define STRIPS 8
#else
#define STRIPS 4
#endif
#define WGMMA_SIGNS ", 1, 1, 0"
#if HALF_SUMS
typedef u32 Sum;  // two of them
#define MMA_SHAPE "m16n8k16.row.col.f16.f16.f16.f16"
#define WGMMA_KIND "k16.f16.f16.f16"
#define IN_OUT(x) "+r"(x)
#else
typedef float Sum;
#define IN_OUT(x) "+f"(x)
#if BRAIN
#define MMA_SHAPE "m16n8k16.row.col.f32.bf16.bf16.f32"
#define WGMMA_KIND "k16.f32.bf16.bf16"
#else
#define MMA_SHAPE "m16n8k16.row.col.f32.f16.f16.f32"
#define WGMMA_KIND "k16.f32.f16.f16"
#endif
#endif
#endif
#define PANELS (ORDER / (8 * STRIPS))
#define OF_STRIP (HALF_SUMS ? 2 : 4)  // registers of a lane's sums
#define LOST_EXPONENTS (HALF_SUMS * DOWN_SHIFT)  // of coordinates
#include "wgmma.cuh"
#if HALF_SUMS
#define WHOLE_STRIP(sums) TWO(sums)
#else
#define WHOLE_STRIP(sums) FOUR(sums)
#endif

// Below, ``sums`` [strips][OF_STRIP] are of two columns each: two of the first part, two of the second. ``parts`` [..][4] are
// mma's operands of four registers: {first part, second part} of one brick's inputs, and of the next one's.

#define PANEL_BYTES (STRIPS * BRICKS * BRICK_BYTES)

INLINE u32 panel_address(const u8* tables, int panel) {
    return (u32)__cvta_generic_to_shared(tables + MATRIX_AT) + panel * PANEL_BYTES;
}

// -- by one warp ----------------------------------------------------------------------------------------------------
INLINE void mma_step(Sum* sums, const u32* parts, u32 brick, u32 next_brick) {
#if HALF_SUMS
    asm("mma.sync.aligned." MMA_SHAPE " {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
#else
    asm("mma.sync.aligned." MMA_SHAPE " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : WHOLE_STRIP(sums)
        : "r"(parts[0]), "r"(parts[1]), "r"(parts[2]), "r"(parts[3]), "r"(brick), "r"(next_brick));
}

// Four bricks, one behind the other. ``address``: of the first, plus 16 bytes for each lane.
INLINE void load_bricks(u32 address, u32* bricks) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(bricks[0]), "=r"(bricks[1]), "=r"(bricks[2]), "=r"(bricks[3])
                 : "r"(address));
}

// The sums of a panel, of which ``panel`` is the address. TWICE, ``parts`` hold four bricks of inputs in turns: {first part of
// brick 0, second part of brick 1, first of 2, second of 3}; the sums of first parts are the first STRIPS, those of second
// parts the others.
template <bool TWICE> INLINE void multiply(u32 panel, const u32 (*parts)[4], Sum (*sums)[OF_STRIP]) {
    const u32 address = panel + (threadIdx.x & 31) * 16;
#pragma unroll
    for (int i = 0; i < (TWICE ? 2 : 1) * STRIPS * OF_STRIP; i++) sums[i / OF_STRIP][i % OF_STRIP] = 0;
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
        for (int brick = 0; brick < BRICKS; brick += 4) {
            u32 bricks[4];
            load_bricks(address + (strip * BRICKS + brick) * BRICK_BYTES, bricks);
            if (TWICE) {
                mma_step(sums[strip], parts[brick / 4], bricks[0], bricks[2]);
                mma_step(sums[STRIPS + strip], parts[brick / 4], bricks[1], bricks[3]);
            } else {
                mma_step(sums[strip], parts[brick / 2], bricks[0], bricks[1]);
                mma_step(sums[strip], parts[brick / 2 + 1], bricks[2], bricks[3]);
            }
        }
}

// -- by four warps, each of which has rows of its own ---------------------------------------------------------------
#if WARPGROUPS
// Adds the products of two bricks, ``apart`` bricks apart, to STRIPS sums. ``matrix``: its address / 16. Where ``add`` is 0,
// the sums are these products alone.
INLINE void wgmma_step(Sum (*sums)[OF_STRIP], const u32* parts, u32 matrix, int brick, int apart, u32 add) {
    wgmma<STRIPS * OF_STRIP>(sums[0], parts, described(matrix, brick, apart), 0, add);
}

// Begins what ``multiply`` does; the sums may not be touched before they are waited for.
template <bool TWICE> INLINE void begin_together(u32 panel, const u32 (*parts)[4], Sum (*sums)[OF_STRIP]) {
#pragma unroll
    for (int i = 0; i < BRICKS / (TWICE ? 4 : 2); i++)  // operands are in their registers before the fence
        asm volatile("" : : "r"(parts[i][0]), "r"(parts[i][1]), "r"(parts[i][2]), "r"(parts[i][3]));
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int brick = 0; brick < BRICKS; brick += TWICE ? 4 : 2) {
        wgmma_step(sums, parts[brick / (TWICE ? 4 : 2)], panel / 16, brick, TWICE ? 2 : 1, brick);
        if (TWICE) wgmma_step(sums + STRIPS, parts[brick / 4], panel / 16, brick + 1, 2, brick);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for sums, after which LATER other products were begun.
template <bool TWICE, int LATER> INLINE void wait_together(Sum (*sums)[OF_STRIP]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
#pragma unroll
    for (int strip = 0; strip < (TWICE ? 2 : 1) * STRIPS; strip++)  // no sum is read before this
        asm volatile("" : WHOLE_STRIP(sums[strip]));
}
#else
template <bool TWICE> INLINE void begin_together(u32 panel, const u32 (*parts)[4], Sum (*sums)[OF_STRIP]) {
    multiply<TWICE>(panel, parts, sums);
}
template <bool TWICE, int LATER> INLINE void wait_together(Sum (*sums)[OF_STRIP]) {}
#endif

// What ``multiply`` finds.
template <bool TWICE> INLINE void multiply_together(u32 panel, const u32 (*parts)[4], Sum (*sums)[OF_STRIP]) {
    begin_together<TWICE>(panel, parts, sums);
    wait_together<TWICE, 0>(sums);
}

#if defined(ENCODER) && !BYTES
INLINE u32 pack_entries(float even, float odd) { return BRAIN ? pack_brains(even, odd) : pack_halves(even, odd); }
#endif

#ifdef DECODER
// -- decoding: half of each channel ---------------------------------------------------------------------------------
struct BackRotation {
    Sum sums[STRIPS][4];  // of a panel, which is two pieces

    INLINE BackRotation(const u8* tables, int lane) {}

    // A lane's eight channels of a piece. ``quads`` [QUADS][2]: its coordinates, as low and high bytes.
    INLINE void eight_channels(const u8* tables, u32 (*quads)[2], int quarter, int piece, float* numbers) {
        if (piece % 2 == 0) multiply_together<false>(panel_address(tables, piece / 2), reinterpret_cast<u32 (*)[4]>(quads), sums);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const Sum* both = sums[piece % 2 * 4 + i / 2];
            numbers[i] = (float)(both[i % 2] + both[2 + i % 2] * 256);
        }
    }
};
#endif

#if defined(ENCODER) && !HALF_SUMS
// -- encoding: coordinates, ORDER times too long; with BYTES half of that -------------------------------------------
template <bool TWICE, bool TOGETHER> INLINE void rotate(const u8* tables, const u32 (*parts)[4], float (*quads)[4]) {
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++) {
        Sum sums[(TWICE ? 2 : 1) * STRIPS][4];
        if (TOGETHER) multiply_together<TWICE>(panel_address(tables, panel), parts, sums);
        else multiply<TWICE>(panel_address(tables, panel), parts, sums);
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                quads[(panel * STRIPS + strip) / 2][2 * (strip & 1) + i] =
                    sums[strip][i] + sums[TWICE ? STRIPS + strip : strip][2 + i] * (BYTES ? 256 : 1);
    }
}

#if !BYTES
// ``stored`` [PIECES][4]: a lane's channels as they are stored.
template <bool TOGETHER> INLINE void rotate_stored(const u8* tables, int lane, u32 (*stored)[4], float (*quads)[4]) {
    rotate<true, TOGETHER>(tables, stored, quads);
}

INLINE float entry_value(u32 packed) {  // of the number in the low half
    return BRAIN ? float_of(packed << 16) : half_value(packed & 0xffff);
}

// ``numbers`` [PIECES][8]: a lane's channels.
template <bool TOGETHER>
INLINE void rotate_numbers(const u8* tables, int lane, float (*numbers)[8], float scale, bool wrong, float (*quads)[4]) {
    u32 operands[BRICKS / 2][4];
#pragma unroll
    for (int brick = 0; brick < BRICKS; brick++) {
        float even = wrong ? 0.0f : numbers[brick / 4][2 * (brick & 3)] * scale;
        float odd = wrong ? 0.0f : numbers[brick / 4][2 * (brick & 3) + 1] * scale;
        u32* parts = operands[brick / 2] + 2 * (brick & 1);
        parts[0] = pack_entries(even, odd);
        even -= entry_value(parts[0]), odd -= entry_value(parts[0] >> 16);
        parts[1] = pack_entries(even, odd);
    }
    rotate<false, TOGETHER>(tables, operands, quads);
}
#endif
#endif
