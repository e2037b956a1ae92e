// Law: products with JOINT neighbouring panels of the matrix of two rounds at once, by four warps (rotation_two_rounds.cuh).
//
// One step of wgmma multiplies with all their columns: there are fewer steps.
//
// Needs JOINT (2 or 3), MAGIC_BITS (that sums begin with), and what rotation_two_rounds.cuh needs. BYTES and WARPGROUPS are 1,
// STRIPS is 4.
#pragma once

#include "rotation_two_rounds.cuh"

#define JOINT_STRIPS (JOINT * STRIPS)

// Adds the products of two neighbouring bricks. ``matrix``: the address / 16 of the first panel.
INLINE void joint_step(Sum (*sums)[4], const u32* parts, u32 matrix, int brick) {
    const u64 bricks = matrix + (brick * BRICK_BYTES / 16 | BRICK_BYTES / 16 << 16) | (u64)(BRICKS * BRICK_BYTES / 16) << 32;
#if JOINT == 3
    asm volatile(
        "wgmma.mma_async.sync.aligned." WGMMA_SHAPE("96")
        " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
        "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47},"
        " {%48,%49,%50,%51}, %52, 1;"
        : FOUR(sums[0]), FOUR(sums[1]), FOUR(sums[2]), FOUR(sums[3]), FOUR(sums[4]), FOUR(sums[5]), FOUR(sums[6]),
          FOUR(sums[7]), FOUR(sums[8]), FOUR(sums[9]), FOUR(sums[10]), FOUR(sums[11])
        : "r"(parts[0]), "r"(parts[1]), "r"(parts[2]), "r"(parts[3]), "l"(bricks));
#else
    asm volatile(
        "wgmma.mma_async.sync.aligned." WGMMA_SHAPE("64")
        " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
        "%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, 1;"
        : FOUR(sums[0]), FOUR(sums[1]), FOUR(sums[2]), FOUR(sums[3]), FOUR(sums[4]), FOUR(sums[5]), FOUR(sums[6]), FOUR(sums[7])
        : "r"(parts[0]), "r"(parts[1]), "r"(parts[2]), "r"(parts[3]), "l"(bricks));
#endif
}

// The sums [JOINT_STRIPS][4] of the panels from number ``panel`` on, in float32 numbers from MAGIC on.
INLINE void multiply_joint(const u8* tables, const u32 (*operands)[4], int panel, Sum (*sums)[4]) {
#pragma unroll
    for (int strip = 0; strip < JOINT_STRIPS; strip++) {
        sums[strip][0] = sums[strip][1] = sums[strip][2] = sums[strip][3] = MAGIC_BITS;
        asm volatile("" : FOUR(sums[strip]));
    }
#pragma unroll
    for (int group = 0; group < BRICKS / 2; group++)  // operands are in their registers before the fence
        asm volatile("" : : "r"(operands[group][0]), "r"(operands[group][1]), "r"(operands[group][2]), "r"(operands[group][3]));
    // Lane 0's address, so that the compiler knows that it is one number for all lanes.
    const u32 matrix = __shfl_sync(ALL_LANES, panel_address(tables, panel), 0) / 16;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int group = 0; group < BRICKS / 2; group++) joint_step(sums, operands[group], matrix, 2 * group);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int strip = 0; strip < JOINT_STRIPS; strip++) asm volatile("" : FOUR(sums[strip]));  // no sum is read before this
}
