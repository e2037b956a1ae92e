// Law: how the 32 lanes of a warp share a tile, the eight rows that the warp codes together: four lanes hold a row.
//
// Lane l works on row l / 4 of the tile, and its quarter is l % 4. Of the row's rotated coordinates it holds one quarter, which
// is one of the four subtrees below the tree's two upper nodes; as quads, four neighbouring coordinates each. Of the row's
// channels it holds pieces: eight neighbours of every 32, so that four lanes load and store 32 neighbours side by side. With
// FACTORS two pieces are neighbours, 16 channels of every 64. Rows of odd number are SWAPPED: they have the second of both
// first, so that lanes that load whole rows from shared memory do not meet in a bank.
//
// Needs ORDER, FACTORS (of the rotation; 0 if not defined), THREADS (of a thread block), BLOB_BYTES (of its tables), ROW_BYTES,
// ITEM (bytes of a stored number).
#pragma once

#include "spans.cuh"

#define WARPS (THREADS / 32)  // of a thread block
#define QUADS (ORDER / 16)    // of a lane
#define PIECES (ORDER / 32)   // of a lane

// Words of coded rows, as many as are whole; what is left of a row's last word belongs to the next row.
constexpr __device__ int words_of(int rows) { return rows * ROW_BYTES / 4; }

// The first channel of a lane's piece, and how many bytes of a row of the tensor lie between it and the first piece's.
#if FACTORS
#define SWAPPED ((int)(threadIdx.x >> 2 & 1))
INLINE int first_channel(int quarter, int piece) { return piece / 2 * 64 + quarter * 16 + (piece % 2 ^ SWAPPED) * 8; }
#else
INLINE int first_channel(int quarter, int piece) { return piece * 32 + quarter * 8; }
#endif
INLINE int byte_of_piece(int piece) { return piece * 32 * ITEM; }

// A lane's number, of which the compiler finds nothing ahead of time: what is seldom needed would keep registers for ever.
INLINE int not_ahead(int lane) {
    asm volatile("" : "+r"(lane));
    return lane;
}

// The first lane's number, of which the compiler knows then that it is one for all lanes.
INLINE u32 of_first_lane(u32 x) { return __shfl_sync(ALL_LANES, x, 0); }
INLINE i64 of_first_lane(i64 x) { return (i64)of_first_lane((u32)(x >> 32)) << 32 | of_first_lane((u32)x); }

// A lane's number, by way of shared memory at ``place``: the compiler may not find it anew, which takes longer than a look-up.
INLINE int kept_lane(void* place) {
    u32 lane = threadIdx.x & 31, address = (u32)__cvta_generic_to_shared(place) + 4 * lane;
    asm volatile("st.volatile.shared.u32 [%1], %0; ld.volatile.shared.u32 %0, [%1];" : "+r"(lane) : "r"(address) : "memory");
    return lane;
}

// Copies bytes of a thread block's tables from ``blob`` on into shared memory, several words of a thread at once.
template <int BYTES_COPIED = BLOB_BYTES> INLINE void copy_tables(const uint4* __restrict__ blob, uint4* memory) {
#pragma unroll 8
    for (int i = threadIdx.x; i < BYTES_COPIED / 16; i += THREADS) memory[i] = __ldg(blob + i);
}

// Sends for the same, without a wait. They have come, for every thread, behind cp.async.wait_all and a barrier.
template <int BYTES_COPIED = BLOB_BYTES> INLINE void send_for_tables(const uint4* __restrict__ blob, uint4* memory) {
    const u32 to = (u32)__cvta_generic_to_shared(memory);
#pragma unroll 8
    for (int i = threadIdx.x; i < BYTES_COPIED / 16; i += THREADS)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + i * 16), "l"(blob + i) : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// The largest of the four lanes' numbers of a row, for each of them.
INLINE u32 largest_of_row(u32 x) {
    x = max(x, __shfl_xor_sync(ALL_LANES, x, 1));
    return max(x, __shfl_xor_sync(ALL_LANES, x, 2));
}

INLINE float sum_of_row(float x) {  // of the four lanes' numbers
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}
