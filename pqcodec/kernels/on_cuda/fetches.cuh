// Law: rows of a tensor on their way to an encoder's lanes: sent for ahead of time, and a lane's pieces of them.
//
// Rows behind the block's end repeat its last.
//
// Needs ITEM (bytes of a number), FETCHED (a tile's rows are sent for ahead of time, into shared memory, with FACTORS by the bulk
// copy engine, or, with EARLY, into registers), ORDER, ROWS, and what block_place.cuh needs.
#pragma once

#include "barriers.cuh"
#include "block_place.cuh"
#include "lanes.cuh"

#define BY_BULK (FETCHED && FACTORS)
#define PIECE_WORDS (8 * ITEM / 4)
#define LOADS (PIECES * PIECE_WORDS / 4)  // of 16 bytes, of a lane's channels of a row

INLINE i64 row_address(const Block& block, int row) { return block.rows + min(row, block.tokens - 1) * block.row_stride; }

// Sends for the rows of a tile so that they are in the L2 cache when they are loaded: 128 bytes a lane.
INLINE void prefetch_rows(const Block& block, int first_row, int lane) {
    constexpr int LINES = (ORDER * ITEM + 127) / 128;  // of a row
#pragma unroll
    for (int i = 0; i < ROWS * LINES; i += 32) {
        const int line = i + lane;
        if (line < ROWS * LINES)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(row_address(block, first_row + line / LINES) + line % LINES * 128));
    }
}

// Sends for each lane's pieces of a tile's rows, into ``fetched``: registers (EARLY), or the lane's places in shared memory;
// where neither pays (FETCHED is 0), into the L2 cache.
INLINE void fetch_rows(const Block& block, int first_row, int lane, uint4* fetched) {
#if EARLY
#pragma unroll
    for (int part = 0; part < 2; part++) {
        const i64 from = row_address(block, first_row + 8 * part + (lane >> 2)) + first_channel(lane & 3, 0) * ITEM;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
            uint4& got = fetched[part * PIECES + piece];
            asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];"  // volatile: the compiler would load later
                         : "=r"(got.x), "=r"(got.y), "=r"(got.z), "=r"(got.w)
                         : "l"(from + byte_of_piece(piece))
                         : "memory");
        }
    }
    __syncwarp();  // what follows is not done before
#elif BY_BULK
    const u32 to = (u32)__cvta_generic_to_shared(fetched), barrier = to - 16;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the exchange was in this place
    const int rows = max(min(block.tokens - first_row, ROWS), 1);  // places of others keep what they had
    const i64 from = row_address(block, first_row);
    if (lane == 0) expect_bytes(barrier, rows * (ORDER * ITEM));
    if (block.row_stride == ORDER * ITEM) {
        if (lane == 0) send_for_bytes(to, from, rows * (ORDER * ITEM), barrier);
    } else if (lane < rows) {
        send_for_bytes(to + lane * (ORDER * ITEM), from + lane * block.row_stride, ORDER * ITEM, barrier);
    }
#elif FETCHED
    const u32 to = (u32)__cvta_generic_to_shared(fetched + lane);
#pragma unroll
    for (int part = 0; part < ROWS / 8; part++) {
        const i64 from = row_address(block, first_row + 8 * part + (lane >> 2)) + first_channel(lane & 3, 0) * ITEM;
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + (part * LOADS + i) * 512),
                         "l"(from + byte_of_piece(i / (PIECE_WORDS / 4)) + i % (PIECE_WORDS / 4) * 16)
                         : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    prefetch_rows(block, first_row, lane);
#endif
}

// Before the first fetch.
INLINE void prepare_fetches(const uint4* fetched, int lane) {
#if BY_BULK
    if (lane == 0) prepare_barrier((u32)__cvta_generic_to_shared(fetched) - 16, 1);
    barriers_are_prepared();
#endif
}

// Waits for what fetch_rows sent for, the ``tile``-th time. Without the copy engine a lane reads what it sent for itself, so it
// needs no other lane.
INLINE void rows_are_fetched(const uint4* fetched, u32 tile) {
#if BY_BULK
    wait_until_complete((u32)__cvta_generic_to_shared(fetched) - 16, tile & 1);
#elif FETCHED && !EARLY
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
}

// Eight channels as they are stored: those that were ``fetched`` for a lane or, for rows that are taken AGAIN, from the tensor.
template <bool AGAIN = false> INLINE void load_piece(i64 from, const uint4* fetched, int lane, int piece, u32* stored) {
#pragma unroll
    for (int i = 0; i < PIECE_WORDS; i += 4) {
        const uint4 got = FETCHED && !AGAIN ? fetched[EARLY ? piece : (piece * PIECE_WORDS + i) * 8 + lane]
                                            : __ldcs(reinterpret_cast<const uint4*>(from + byte_of_piece(piece)) + i / 4);
        stored[i] = got.x, stored[i + 1] = got.y, stored[i + 2] = got.z, stored[i + 3] = got.w;
    }
}

#if FACTORS
// Where a lane's pieces of even and of odd number begin, in the tensor and in shared memory. The compiler may not know how far
// they are from each other, for it would add up the address of each piece anew.
struct OwnPieces {
    i64 even, odd;
    u32 fetched_even, fetched_odd;

    INLINE OwnPieces(const Block& block, const uint4* fetched, int row, int lane) {
        const u32 own_row = (u32)__cvta_generic_to_shared(fetched) + (lane >> 2) * (ORDER * ITEM);
        const int first = first_channel(lane & 3, 0) * ITEM, second = first_channel(lane & 3, 1) * ITEM;
        even = row_address(block, row) + first, odd = row_address(block, row) + second;
        fetched_even = own_row + first, fetched_odd = own_row + second;
        asm volatile("" : "+l"(even), "+l"(odd), "+r"(fetched_even), "+r"(fetched_odd));
    }

    template <bool AGAIN> INLINE void load(int piece, u32* stored) const {
#pragma unroll
        for (int i = 0; i < PIECE_WORDS; i += 4) {
            uint4 got;
            if (BY_BULK && !AGAIN) {
                asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                             : "=r"(got.x), "=r"(got.y), "=r"(got.z), "=r"(got.w)
                             : "r"((piece % 2 ? fetched_odd : fetched_even) + piece / 2 * (64 * ITEM))
                             : "memory");
            } else {
                got = __ldcs(reinterpret_cast<const uint4*>((piece % 2 ? odd : even) + piece / 2 * (64 * ITEM)) + i / 4);
            }
            stored[i] = got.x, stored[i + 1] = got.y, stored[i + 2] = got.z, stored[i + 3] = got.w;
        }
    }
};
#endif
