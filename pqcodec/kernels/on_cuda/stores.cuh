// Law: decoded numbers on their way to a tensor: factors and offsets, the dtype's range and rounding, and stores (SPEC 6.5,
// steps 4 to 6).
//
// Needs DTYPE (FLOAT16, BFLOAT16 or FLOAT32), ITEM (bytes of a number), LARGEST (of the dtype), OFFSETS, ROUNDS, ORDER, ROWS,
// and BULK: rows leave shared memory, where they lie OUT_BYTES apart, by the bulk copy engine, as whole lines, and past the
// pipe that look-ups keep busy.
#pragma once

#include "block_place.cuh"
#include "lanes.cuh"
#if ROUNDS == 1
#include "rotation.cuh"  // which leaves D's signs to be given here
#endif

// -- from the rotation's sums to stored numbers ---------------------------------------------------------------------
#if DTYPE == FLOAT32
typedef float4 Stored;  // 16 bytes of numbers
#else
typedef uint4 Stored;

INLINE u32 pack_stored(float even, float odd) { return DTYPE == FLOAT16 ? pack_halves(even, odd) : pack_brains(even, odd); }
#endif
#define STORES (8 * ITEM / 16)  // of a piece

// Eight numbers that are within the dtype's range, as they are stored.
INLINE void store_numbers(const float* numbers, Stored* stored) {
#if DTYPE == FLOAT32
#pragma unroll
    for (int i = 0; i < STORES; i++)
        stored[i] = make_float4(numbers[4 * i], numbers[4 * i + 1], numbers[4 * i + 2], numbers[4 * i + 3]);
#else
    stored[0] = make_uint4(pack_stored(numbers[0], numbers[1]), pack_stored(numbers[2], numbers[3]),
                           pack_stored(numbers[4], numbers[5]), pack_stored(numbers[6], numbers[7]));
#endif
}

// A lane's eight channels of a piece of a row, from channel ``first`` on: ``numbers`` as the rotation leaves them -> as they
// are stored. Numbers of an ordinary row (blocks.cu) need neither the second factor nor limits, and may get D's signs after
// they are rounded. ``offsets``: the piece's, where there are any.
INLINE void finish_piece(const u8* tables, int first, float* numbers, const float* offsets, float factor, float second_factor,
                         bool ordinary, Stored* stored) {
#if DTYPE != FLOAT32 && !OFFSETS && ROUNDS == 1
    const uint4 signs = packed_signs(tables, first);
    const u32 sign[4] = {signs.x, signs.y, signs.z, signs.w};
#endif
#if DTYPE == FLOAT32 || OFFSETS
#pragma unroll
    for (int i = 0; i < 8; i++) {
#if ROUNDS == 1
        numbers[i] = float_of(bits_of(numbers[i]) ^ top_bits(tables, first)[i]);
#endif
        numbers[i] = ordinary ? fmaf(numbers[i], factor, 0.0f) : numbers[i] * factor * second_factor + 0.0f;  // never -0
#if OFFSETS
        numbers[i] += offsets[i];
#endif
        if (!ordinary) numbers[i] = fminf(fmaxf(numbers[i], -LARGEST), LARGEST);
    }
#else
#pragma unroll
    for (int i = 0; i < 8; i++) numbers[i] = numbers[i] * factor;
    if (!ordinary)
#pragma unroll
        for (int i = 0; i < 8; i++) {
#if ROUNDS == 1  // the sign comes before the 0 is added: what is too small for the dtype keeps it
            numbers[i] = float_of(bits_of(numbers[i]) ^ top_bits(tables, first)[i]);
#endif
            numbers[i] = fminf(fmaxf(numbers[i] * second_factor + 0.0f, -LARGEST), LARGEST);
        }
#endif
#if DTYPE != FLOAT32 && !OFFSETS && ROUNDS == 1
    u32 packed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        packed[i] = pack_stored(numbers[2 * i], numbers[2 * i + 1]);
        if (ordinary) packed[i] = with_signs(packed[i], sign[i]);
    }
    stored[0] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
#else
    store_numbers(numbers, stored);
#endif
}

// -- stores ---------------------------------------------------------------------------------------------------------
#if BULK
#define STORE(address, stored, wanted) *reinterpret_cast<Stored*>(address) = stored  // store_bulk asks which rows are wanted

// Waits until the engine has read what it was given before.
INLINE void wait_for_bulk() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    __syncwarp();
}

// Gives ``bytes`` from an address of shared memory on to the engine, to be stored at another. EVICTED_FIRST: as by __stcs.
INLINE void give_to_bulk(u32 from, i64 to, int bytes) {
#ifdef EVICTED_FIRST
    asm volatile(
        "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;"
        " cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, policy;}" ::"l"(to),
        "r"(from), "r"(bytes)
        : "memory");
#else
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
                 "r"(from), "r"(bytes)
                 : "memory");
#endif
}

// Gives the wanted rows of a tile, from ``first_row`` on, to the engine: all at once where they lie side by side, else a row a
// lane.
INLINE void store_bulk(const u8* rows_out, const Block& block, int first_row, int lane) {
    const int from = max(first_row, block.first), to = min(first_row + ROWS, block.last), stride = block.row_stride;
    const i64 rows = block.rows;  // all of this is loaded before the fence, for the block may be in shared memory
    const u32 address = (u32)__cvta_generic_to_shared(rows_out);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (OUT_BYTES == ORDER * ITEM && stride == OUT_BYTES) {
        if (from < to) {
            const u32 first = of_first_lane(address + (from - first_row) * OUT_BYTES);
            const int bytes = of_first_lane((u32)((to - from) * OUT_BYTES));
            const i64 there = of_first_lane(rows + (i64)from * OUT_BYTES);
            if (lane == 0) give_to_bulk(first, there, bytes);
        }
    } else {
        const int row = first_row + lane;
        if (lane < ROWS && row >= from && row < to)
            give_to_bulk(address + lane * OUT_BYTES, rows + (i64)row * stride, ORDER * ITEM);
    }
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
#else
#define STORE(address, stored, wanted) \
    if (wanted) __stcs(reinterpret_cast<Stored*>(address), stored)
INLINE void wait_for_bulk() {}
INLINE void store_bulk(const u8* rows_out, const Block& block, int first_row, int lane) {}
#endif
