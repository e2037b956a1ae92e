// Law: the CUDA kernel that decodes quads (SPEC 8), for orders that are multiples of 32 up to 576.
//
// A warp decodes one block (a chunk of tokens of one leading index), ROWS rows at a time as quads_rows.cuh says, and shares
// nothing with other warps but read-only tables; with WARPGROUPS four warps multiply together, so that the matrix is read once
// for all their rows. The next tile's words are on their way while this one is decoded, and where the next blocks lie is found
// for several at once, each by one lane. Of the PARTS thread blocks that decode the same rows, the first one finds the
// checksum.
//
// Needs AHEAD (blocks that a warp looks for at once, 32 at most), the sizes of shared memory (BLOB_BYTES, and WARP_BYTES of each
// warp: two stages up to BASE_AT, the block's base, from STAGE_BYTES on the places of blocks ahead, and from ROWS_AT on decoded
// rows on their way out, with BULK), and what the other files need.

#define INDICES_BEHIND (ROWS * ORDER / 32)
#define EVEN (ROWS * ORDER / 32 % 2 == 0)
#include "quads_radii.cuh"
#include "quads_rows.cuh"
#include "quads_words.cuh"
#include "warpgroups.cuh"

// Checks every block (flags [blocks]: 1 where it is damaged), and fills the rows that its span wants; arguments as in
// blocks.cu.
extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_stream_blocks(
    const i64* __restrict__ spans, const i64* __restrict__ firsts, const i64* __restrict__ starts, int* __restrict__ flags,
    const i64* __restrict__ keys, const uint4* __restrict__ blob, i64 blocks, int search) {
    extern __shared__ uint4 memory[];
    const int lane = threadIdx.x & 31;
    u8* tables = reinterpret_cast<u8*>(memory);
    u8* shelf = tables + BLOB_BYTES + (threadIdx.x >> 5) * WARP_BYTES;
    u32* base = reinterpret_cast<u32*>(shelf + BASE_AT);
    Block* upcoming = reinterpret_cast<Block*>(shelf + STAGE_BYTES);  // [AHEAD], of which the current block is number ``place``
    float* means = reinterpret_cast<float*>(shelf + MEANS_AT);
    u8* rows_out = shelf + ROWS_AT;
    const auto stage_of = [&](int turn) { return reinterpret_cast<u32*>(shelf + turn * (BASE_AT / 2)); };
    int turn = 0;  // of the two stages
    const u32 part = blockIdx.x % PARTS, step = gridDim.x / PARTS;  // from one of a warp's blocks to the next
    u32 stored = 0, index = (threadIdx.x >> 5) * step + blockIdx.x / PARTS, place = AHEAD - 1;
    if (index < blocks) {
        const Block block = find_block(spans, firsts, starts, search, index);
        send_for_tile(block, 0, lane, stage_of(0));
        send_for_base(block, lane, base);
        stored = stored_checksum(block);
        if (lane == 0) upcoming[place] = block;
    }
#if WARPGROUPS
    else {  // an idle warp takes any block
        const Block block = find_block(spans, firsts, starts, search, 0);
        if (lane == 0) upcoming[place] = block;
    }
#endif
    copy_tables<MATRIX_AT>(blob, memory);  // the matrix comes last
    copy_tables<PART_BYTES>(blob + (MATRIX_AT + part * PART_BYTES) / 16, memory + MATRIX_AT / 16);
    tables_are_written();

    for (; WORK_LEFT(index, blocks, step); index += step * WARPS) {
        Block block = upcoming[place];
        if (IS_IDLE(index, blocks)) block.tokens = block.first = block.last = 0;
        const int words = block_bytes(block.tokens) / 4 - 1;
        const u32 checksum = stored;
        u64 sum = 0;
#if IN_RUNS
        bool in_run = false;
#endif
#if OFFSETS
        // An offset is below twice the largest mean.
        const float room = LARGEST - 2.0f * keep_means(block, lane, IN_RUNS ? nullptr : means);
        const u32 position = block.position;
#else
        const float room = LARGEST;
#endif
        for (int first_row = 0, more = 1; rows_left(first_row, block.tokens, more); first_row += ROWS) {
            const bool wanted = first_row + ROWS > block.first && first_row < block.last;
            const u32* stage = stage_of(turn);
            float factor = 0.0f, second_factor = 1.0f;  // of one row of the tile a lane
            bool ordinary = true;
            if (!is_past(first_row, block.tokens)) {  // else its next block's tile is on its way
                wait_for_tile();
                turn ^= 1;
                const u32 code = radius_of(stage, block, first_row, lane % ROWS);
                quad_factors(tables, code, base_of(base, block), factor, second_factor);
                ordinary = __all_sync(ALL_LANES, is_ordinary(factor, second_factor, room));
                if (PARTS == 1 || part == 0) sum_tile(tables, keys, stage, block, first_row, lane, words, sum);
                __syncwarp();
                if (first_row + ROWS < block.tokens) {
                    send_for_tile(block, first_row + ROWS, lane, stage_of(turn));
                } else {
                    if (PARTS == 1 || part == 0) sum_rest(tables, keys, block, lane, words, sum);
                    if (index + step * WARPS < blocks) {
                        const u32 apart = step * WARPS;
                        place = next_place(spans, firsts, starts, search, index + apart, apart, blocks, lane, upcoming, place);
                        const Block next = upcoming[place];
                        send_for_tile(next, 0, lane, stage_of(turn));
                        send_for_base(next, lane, base);
                        stored = stored_checksum(next);
                    }
                }
            }
#if WARPGROUPS
            const u32 votes = votes_of_four(wanted, first_row + ROWS < block.tokens);
            more = votes >> 3;
            const bool decoded = votes & 7;
#else
            const bool decoded = wanted;
#endif
            if (decoded) {
                u32 operands[TILES][GROUPS][4];
                const Words coded = {stage, stage};
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) quad_operands(tables, coded, lane, 16 * tile, operands[tile]);
#if IN_RUNS
                if (first_row % RUN_ROWS == 0 || !in_run) {
                    turn_to_run(tables, block, position + first_row / RUN_ROWS * RUN_ROWS, lane, shelf + MEANS_AT);
                    in_run = true;
                }
#endif
                LaneRows rows(block, first_row, lane, factor, second_factor, rows_out);
#if IN_RUNS
                rows.turn_with(tables, shelf + MEANS_AT, unit_of_means(block), first_row, lane);
#elif OFFSETS
                rows.means = means, rows.position = position + first_row + row_of(lane, 0);
#endif
                wait_for_bulk();
                decode_rows(tables, operands, rows, ordinary, lane & 3, part);
                store_bulk(rows_out, block, first_row, lane);
            }
            __syncwarp();
        }
        const u32 good = reduced(sum, 4 * words);
        if (lane == 0 && part == 0 && !IS_IDLE(index, blocks)) flags[index] = good != checksum;
        __syncwarp();
    }
    wait_for_bulk();
}
