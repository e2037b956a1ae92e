// Law: how a warp goes through its blocks and their rows: alone, in step with three others, or in a team of four.
//
// wgmma multiplies for four warps at once (a warpgroup), so all four must arrive at it (IN_STEP), as long as one of them has a
// block and in it rows. A warp that has none is idle: it codes rows that nobody wants, and writes nothing. A team divides each
// block among its warps (SHARING of them), so that all go through as many tiles; in turns one of them ends it.
//
// Needs WARPGROUPS, SHARING (if more than one), THREADS (of a thread block), PLANES, ROWS (of a tile), CHUNK (tokens).
#pragma once

#include "numbers.cuh"
#include "lanes.cuh"

#define IN_TEAMS (SHARING > 1)
#define IN_STEP (WARPGROUPS && !IN_TEAMS)

#if IN_TEAMS
#define CODERS (THREADS / 32 / SHARING)  // of a thread block, that take blocks: warps or teams
#define CODER (threadIdx.x / (32 * SHARING))
#else
#define CODERS WARPS
#define CODER (threadIdx.x >> 5)
#endif

#if IN_STEP
// Whether a warp goes on with block ``index``: whether the first warp of those in step has a block. ``apart``: from a warp's
// block to the next warp's.
#define WORK_LEFT(index, blocks, apart) ((index) - (not_ahead(threadIdx.x) >> 5 & 3) * (apart) < (blocks))

#define IS_IDLE(index, blocks) ((index) >= (blocks))

// Whether a warp goes on with the tile of rows from ``first_row`` on; ``more``: whether one of those in step has rows there.
INLINE bool rows_left(int first_row, int tokens, int more) { return more; }

// Whether a warp's own block has no rows left, while it goes on for the others.
INLINE bool is_past(int first_row, int tokens) { return first_row >= tokens; }

// How many of the four warps say yes to the first question, plus 8 for each that says yes to the second. Lane 0 answers the
// first; eight lanes answer the second.
INLINE u32 votes_of_four(bool first, bool second) {
    const u32 lane = threadIdx.x & 31, yes = lane ? lane <= 8 && second : first;
    u32 votes;
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; barrier.cta.red.popc.aligned.u32 %0, %1, 128, p;}"
                 : "=r"(votes)
                 : "r"(1 + (threadIdx.x >> 7)), "r"(yes)  // a barrier of each warpgroup's own
                 : "memory");
    return votes;
}

// Whether one of the warps in step says yes.
INLINE int any_in_step(bool yes) { return votes_of_four(false, yes) >> 3; }

#if PLANES
// How far the warps in step go through their blocks: they are asked once, if one of them has a whole chunk, else for each tile.
// ``tokens``: of a warp's own block.
INLINE u32 votes_for_steps(int tokens) { return votes_of_four(tokens == CHUNK, tokens > ROWS); }

// Whether one of them has rows from ``row`` on, a tile's first.
INLINE int any_goes_on(u32 votes, int tokens, int row) {
    return votes & 7 ? row < CHUNK : row == ROWS ? votes >> 3 : any_in_step(row < tokens);
}
#endif
#else
#define WORK_LEFT(index, blocks, apart) ((index) < (blocks))
#define IS_IDLE(index, blocks) false
INLINE bool rows_left(int first_row, int tokens, int more) { return first_row < tokens; }
INLINE bool is_past(int first_row, int tokens) { return false; }
#endif

// A barrier of all threads, after which wgmma sees what each of them wrote into shared memory.
INLINE void tables_are_written() {
#if WARPGROUPS
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    __syncthreads();
}

// The rows of a block of so many tokens that are a warp's own: from the first on, before the end. All of a team have as many,
// some of which are behind the block.
#if IN_TEAMS
INLINE int rows_of_warp(int tokens) { return (tokens + ROWS * SHARING - 1) / (ROWS * SHARING) * ROWS; }
INLINE int warp_of_team() { return (not_ahead(threadIdx.x) >> 5) & SHARING - 1; }
INLINE int first_row_of(int tokens) { return warp_of_team() * rows_of_warp(tokens); }

// How many warps behind this one, or before it, is that which ends the team's block of a ``round``: they take turns.
INLINE int warps_to_ending(u32 round) { return (int)(round % SHARING) - warp_of_team(); }

INLINE void meet_team() {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + CODER), "n"(32 * SHARING) : "memory");
}
#else
constexpr __device__ int first_row_of(int tokens) { return 0; }
#endif
