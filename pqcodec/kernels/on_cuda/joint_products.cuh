// Law: products with JOINT neighbouring panels of the matrix of two rounds at once, by four warps (rotation_two_rounds.cuh).
//
// One step of wgmma multiplies with all their columns: there are fewer steps.
//
// Needs JOINT (2 or 3), MAGIC_BITS (that sums begin with), and what rotation_two_rounds.cuh needs. BYTES and WARPGROUPS are 1,
// STRIPS is 4.
#pragma once

#include "rotation_two_rounds.cuh"

#define JOINT_STRIPS (JOINT * STRIPS)

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
    const u32 matrix = of_first_lane(panel_address(tables, panel)) / 16;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int group = 0; group < BRICKS / 2; group++)
        wgmma<4 * JOINT_STRIPS>(sums[0], operands[group], described(matrix, 2 * group, 1), 0, 1);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int strip = 0; strip < JOINT_STRIPS; strip++) asm volatile("" : FOUR(sums[strip]));  // no sum is read before this
}
