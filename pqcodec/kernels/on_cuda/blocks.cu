// Law: the CUDA kernels for orders 64, 128 and 256 (of quads, for multiples of 32 up to 576), compiled at run time for one
// kind of stream; each section is a .cuh file.
//
// A warp codes one block (a chunk of tokens of one leading index), a tile of eight rows at a time. It shares nothing with other
// warps but read-only tables; for two rounds of rotation, on Hopper, four warps also multiply together. Four lanes hold a row:
// each owns a quarter of its tree, so that no lane waits for another but at the two upper nodes. Tensor cores do the rotation;
// a lane's coordinates are what they read (decoding) or add up (encoding). The next rows are on their way while these are
// coded.
//
// Nothing may be fused that decides output bits: these files are compiled with --fmad=false, and the encoder, which may round
// as it likes, says fmaf where it wants one.
//
//     numbers                   floats and their bits; packed numbers; whole numbers as bytes
//     lanes                     how the lanes of a warp share a tile
//     warpgroups                how a warp goes through its blocks and rows, alone or with three others
//     block_place               where a block lies in its stream and its tensor
//     checksum                  of a block
//     bits                      fields of bits in shared memory
//     loads                     rows of the tensor, as an encoder takes them
//     stores                    rows of the tensor, as a decoder leaves them
//     rotation                  products with its matrix: rotation_one_round, rotation_two_rounds or rotation_in_factors
//     offsets                   means, turned under RoPE
//     coding                    which coding, and what each brings: split_decoder and split_encoder (on split), or paper
//     radius, energies          of a row, for codings
//     payload                   coded rows between the stream and shared memory
//
// The macros come from compiled.py. Needs DECODER or ENCODER, AHEAD (blocks that an encoder's warp looks for at once), ROUNDS,
// ROWS (of a tile), THREADS, what the other files need, and the sizes of shared memory: BLOB_BYTES of tables (the table NAME
// begins at byte NAME_AT), ROTATION_BYTES of the rotation and, for each warp, WARP_BYTES: STAGE_BYTES for coded rows,
// UPCOMING_BYTES for each block ahead; its block's means from MEANS_AT on; and from ROWS_AT on decoded rows (with BULK) or the
// next tile's rows (with FETCHED).

#include "numbers.cuh"
#include "lanes.cuh"
#include "warpgroups.cuh"
#include "block_place.cuh"
#include "rotation.cuh"
#include "offsets.cuh"
#include "coding.cuh"
#include "payload.cuh"
#ifdef DECODER
#include "stores.cuh"
#else
#include "loads.cuh"
#if AS_WORDS
#include "word_loads.cuh"
#endif
#endif

static_assert(sizeof(Block) <= UPCOMING_BYTES);

// What an encoder knows of a warp's block. Where registers are SCARCE it is kept in shared memory, for what is spilled from them
// comes back only behind the next rows.
struct Current {
    u32 votes;   // votes_for_steps
    u32 round;   // of a team's blocks
    float unit;  // kept_unit
    int bad;     // rows with NaN or Inf; lane 0's
};
#define SCARCE (AS_WORDS && (OFFSETS || FACTORS))
static_assert((AHEAD + 1) * sizeof(Block) + sizeof(Current) <= (AHEAD + 1) * UPCOMING_BYTES);

// Both kernels take ``spans``, ``firsts``, ``starts`` and ``search`` as find_block does, the checksum's ``keys``, the tables as
// a ``blob`` of 16-byte words, and the number of ``blocks``. Warp w of thread block t codes block w * gridDim.x + t, and so on.

#ifdef DECODER
// Checks every block (flags [blocks]: 1 where it is damaged), and fills the rows that its span wants.
extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_stream_blocks(
    const i64* __restrict__ spans, const i64* __restrict__ firsts, const i64* __restrict__ starts, int* __restrict__ flags,
    const i64* __restrict__ keys, const uint4* __restrict__ blob, i64 blocks, int search) {
    extern __shared__ uint4 memory[];
    const int lane = threadIdx.x & 31, quarter = lane & 3, tile_row = lane >> 2;
    u8* tables = reinterpret_cast<u8*>(memory);
    u32* stage = reinterpret_cast<u32*>(tables + BLOB_BYTES + ROTATION_BYTES + (threadIdx.x >> 5) * WARP_BYTES);
    Block* upcoming = reinterpret_cast<Block*>(reinterpret_cast<u8*>(stage) + STAGE_BYTES);
    float* means = reinterpret_cast<float*>(reinterpret_cast<u8*>(stage) + MEANS_AT);
#if BULK
    u8* rows_out = reinterpret_cast<u8*>(stage) + ROWS_AT;
#endif
    u32 fetched[FETCHES];
    u32 index = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
    if (index < blocks) {
        const Block block = find_block(spans, firsts, starts, search, index);
        fetch_words(fetched, block, 0, lane);
        if (lane == 0) *upcoming = block;
    }
#if WARPGROUPS
    else {  // an idle warp takes any block
        const Block block = find_block(spans, firsts, starts, search, 0);
        if (lane == 0) *upcoming = block;
    }
#endif
    copy_tables(blob, memory);
#if ROUNDS == 1
    if (threadIdx.x < 32) prepare_signs(tables, lane);
#endif
    tables_are_written();

    for (; WORK_LEFT(index, blocks, gridDim.x); index += gridDim.x * WARPS) {
        Block block = *upcoming;
        if (IS_IDLE(index, blocks)) block.tokens = block.first = block.last = 0;
        const u32 checksum = __ldcs(block.payload + words_of(block.tokens));
        u64 sum = 0;
#if OFFSETS
        const float room = LARGEST - 2.0f * keep_means(block, lane, means);  // an offset is below twice the largest mean
        const u32 position = block.position;
#else
        const float room = LARGEST;
#endif
        for (int first_row = 0, more = 1; rows_left(first_row, block.tokens, more); first_row += ROWS) {
            stage_words(tables, keys, fetched, block, first_row, lane, stage, sum);
            __syncwarp();
            if (is_past(first_row, block.tokens)) {  // its next block was found before
            } else if (first_row + ROWS < block.tokens) {
                fetch_words(fetched, block, first_row + ROWS, lane);
            } else if (index + gridDim.x * WARPS < blocks) {
                const Block next = find_block(spans, firsts, starts, search, index + gridDim.x * WARPS);
                fetch_words(fetched, next, 0, lane);
                if (lane == 0) *upcoming = next;
            }
#if WARPGROUPS
            const u32 votes =
                votes_of_four(first_row + ROWS > block.first && first_row < block.last, first_row + ROWS < block.tokens);
            more = votes >> 3;
            if (!(votes & 7)) {
#else
            if (first_row + ROWS <= block.first || first_row >= block.last) {
#endif
                __syncwarp();
                continue;  // nobody wants these rows
            }

            u32 quads[QUADS][2];
            float factor, second_factor;
            decode_row(tables, block, stage, tile_row, quarter, quads, factor, second_factor);
            __syncwarp();

            // The numbers of an ordinary row leave neither float32's normal range nor the dtype's; nor is one of them too small
            // for the dtype: they are whole numbers times the factor.
            const bool ordinary = __all_sync(ALL_LANES, second_factor == 1.0f && factor * LARGEST_SUM < room &&
                                                            (ROUNDS > 1 || factor >= SMALLEST || factor == 0.0f));
            BackRotation rotation(tables, lane);
#if ROUNDS == 2
            factor *= 2.0f;  // the matrix is R / 2; the largest factor is below 2^121
#endif
            const int row = first_row + tile_row;
            const bool wanted = row >= block.first && row < block.last;
#if BULK
            wait_for_bulk();
            u8* target = rows_out + tile_row * OUT_BYTES + first_channel(quarter, 0) * ITEM;
#else
            const i64 target = block.rows + (i64)row * block.row_stride + first_channel(quarter, 0) * ITEM;
#endif
#if OFFSETS
            RowOffsets of_row;
#endif
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
                float numbers[8];
                rotation.eight_channels(tables, quads, quarter, piece, numbers);
                Stored stored[STORES];
                float offsets[8];
#if OFFSETS
                of_row.of_piece(tables, means, position + row, quarter, piece, offsets);
#endif
                finish_piece(tables, first_channel(quarter, piece), numbers, offsets, factor, second_factor, ordinary, stored);
#pragma unroll
                for (int i = 0; i < STORES; i++) STORE(target + byte_of_piece(piece) + i * 16, stored[i], wanted);
            }
#if BULK
            store_bulk(rows_out, block, first_row, lane);
#endif
        }
        const u32 good = reduced(sum, block.tokens * ROW_BYTES);
        if (lane == 0 && !IS_IDLE(index, blocks)) flags[index] = good != checksum;
        __syncwarp();
    }
#if BULK
    wait_for_bulk();
#endif
}
#endif

#ifdef ENCODER
// Writes every block. Rows with NaN or Inf are coded as zeros; flags [blocks] counts them.
extern "C" __global__ void __launch_bounds__(THREADS, 1) encode_stream_blocks(
    const i64* __restrict__ spans, const i64* __restrict__ firsts, const i64* __restrict__ starts, int* __restrict__ flags,
    const i64* __restrict__ keys, const uint4* __restrict__ blob, i64 blocks, int search) {
    extern __shared__ uint4 memory[];
    u8* tables = reinterpret_cast<u8*>(memory);
    u32* stage = reinterpret_cast<u32*>(tables + BLOB_BYTES + ROTATION_BYTES + (threadIdx.x >> 5) * WARP_BYTES);
    const int lane = WIDE && SCARCE ? kept_lane(stage) : threadIdx.x & 31, quarter = lane & 3, tile_row = lane >> 2;
    Block* upcoming = reinterpret_cast<Block*>(reinterpret_cast<u8*>(stage) + STAGE_BYTES);
    float* means = reinterpret_cast<float*>(reinterpret_cast<u8*>(stage) + MEANS_AT);
#if AS_WORDS
    send_for_tables(blob, memory);  // on their way while a block is looked for
#endif
#if EARLY
    uint4 fetched[2 * PIECES];
#else
    uint4* fetched = reinterpret_cast<uint4*>(reinterpret_cast<u8*>(stage) + ROWS_AT);
#endif
    u32 index = CODER * gridDim.x + blockIdx.x, place = AHEAD - 1, tile = 0;
    prepare_fetches(fetched, lane);
    if (IN_STEP || index < blocks) {  // an idle warp takes any block, but leaves its rows: so many warps' at once take long
        const Block block = find_block(spans, firsts, starts, search, index < blocks ? index : 0);
        if (!EARLY && IS_IDLE(index, blocks)) {  // one ``if`` for both lines of the other case would need more registers
            if (lane == 0) upcoming[place] = block;
        } else {
            fetch_rows(block, first_row_of(block.tokens), lane, fetched);
            if (lane == 0) upcoming[place] = block;
        }
    }
#if AS_WORDS
    asm volatile("cp.async.wait_all;" ::: "memory");
#else
    copy_tables(blob, memory);
#endif
#if ROUNDS == 1
    if (threadIdx.x < 32) prepare_signs(tables, lane);
#endif
    tables_are_written();

#if SCARCE
    Current& current = *reinterpret_cast<Current*>(upcoming + AHEAD + 1);
    if (IN_TEAMS && lane == 0) current.round = ~0u;
#endif
    for (; WORK_LEFT(index, blocks, gridDim.x); index += gridDim.x * CODERS) {
#if AS_WORDS  // it stays in shared memory, for registers are few
        __syncwarp();
        const int word = SCARCE ? not_ahead(lane) : lane;
        if (word < sizeof(Block) / 8)
            reinterpret_cast<u64*>(upcoming + AHEAD)[word] = reinterpret_cast<const u64*>(upcoming + place)[word];
        const Block& block = upcoming[AHEAD];
#else
        const Block block = upcoming[place];
#endif
#if !SCARCE
        Current current;
#endif
        if (!SCARCE || lane == 0) current.bad = 0;
        if (IN_TEAMS && lane == 0) current.round++;
        u64 sum = 0;
        __syncwarp();
#if IN_TEAMS
        const int begin = first_row_of(block.tokens), end = begin + rows_of_warp(block.tokens);
#else
        constexpr int begin = 0;
        const int& end = block.tokens;
#endif
#if RUN_PRODUCTS
        if (lane == 0) current.unit = kept_unit(block);
#elif OFFSETS && !BY_RUNS
        keep_means(block, lane, means);
#endif
#if TILE_TURNS
        turn_means(tables, means, block.position + begin, lane, means + ORDER);
#endif
#if BY_RUNS
        RunMeans first_means;  // on their way while the warps in step are asked
        first_means.load(block, not_ahead(lane));
#endif
#if IN_STEP && PLANES
        current.votes = votes_for_steps(IS_IDLE(index, blocks) ? 0 : block.tokens);
#endif
#if BY_RUNS
        turn_to_run(tables, block, first_means, block.position + begin / RUN_ROWS * RUN_ROWS, not_ahead(lane),
                    reinterpret_cast<u8*>(means));
#endif
        // Whether this warp, or one in step with it, has rows behind a tile.
        const auto goes_on_behind = [&](int first_row, u32 votes) {
#if IN_STEP && PLANES
            return any_goes_on(votes, IS_IDLE(index, blocks) ? 0 : block.tokens, first_row + ROWS);
#elif IN_STEP
            return any_in_step(!IS_IDLE(index, blocks) && first_row + ROWS < block.tokens);
#else
            return 1;
#endif
        };
        for (int first_row = begin, more = 1; rows_left(first_row, end, more); first_row += ROWS) {
            if (!SCARCE) more = goes_on_behind(first_row, IN_STEP && PLANES ? current.votes : 0);
#if BY_RUNS
            if (CHUNK > RUN_ROWS && first_row != begin && first_row % RUN_ROWS == 0)
                turn_to_run(tables, block, block.position + first_row, not_ahead(lane), reinterpret_cast<u8*>(means));
#endif
#if TILE_TURNS
            if (first_row != begin) turn_on(tables, lane, means + ORDER);
#endif
            const int row = first_row + tile_row;
            rows_are_fetched(fetched, tile++);
#if !AS_WORDS
            const i64 from = row_address(block, row) + first_channel(quarter, 0) * ITEM;
            float quads[QUADS][4];
            int exponent = 0;  // the row was multiplied with 2^exponent
#endif
#if AS_WORDS
            u32 words[4 * PIECES][OWN_ROWS];
            float owns[OWN_ROWS];
            int exponents[OWN_ROWS] = {};
            load_rows(tables, block, means, fetched, row, lane, words, owns);
            // Rows with NaN or Inf, and those too large or small to be multiplied as they are, are loaded once more.
            const float own = owns[0], other = owns[RUN_PRODUCTS ? 0 : OWN_ROWS - 1];
            bool even = own > LEAST_EVEN && own < MOST_EVEN && other > LEAST_EVEN && other < MOST_EVEN;
            if (RUN_PRODUCTS) even = even && current.unit == 1.0f;  // so are others whose means were not taken in one step
            if (!__all_sync(ALL_LANES, even))
                load_rows_carefully(tables, block, means, current.unit, row, lane, current.bad, words, owns, exponents);
#if RUN_PRODUCTS
            owns[1] = __shfl_xor_sync(ALL_LANES, owns[0], 2);  // of the other two quarters
#endif
#if FACTORS
            u32(*strips)[8] = reinterpret_cast<u32(*)[8]>(words);
            rotate_halfway(tables, reinterpret_cast<u8*>(stage) + ROWS_AT, lane, strips);
#endif
            clear_stage(stage, lane);
            __syncwarp();
#elif PLAIN
            u32 stored[PIECES][4];
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) load_piece(from, fetched, lane, piece, stored[piece]);
            clear_stage(stage, lane);
            rotate_stored<WARPGROUPS>(tables, lane, stored, quads);
#elif BYTES
            clear_stage(stage, lane);
            u32 operands[PIECES][4];
            bytes_row(block, from, fetched, row, lane, current.bad, exponent, operands);
            rotate<false, WARPGROUPS>(tables, operands, quads);
#else
            clear_stage(stage, lane);
            rotate_carefully<WARPGROUPS, false>(tables, block, means, from, fetched, row, lane, current.bad, exponent, quads);
#endif
            __syncwarp();
            const bool goes_on = first_row + ROWS < end;
            const bool next = !goes_on && !is_past(first_row, end) && index + gridDim.x * CODERS < blocks;
            if (next) {
                const u32 apart = gridDim.x * CODERS;
                place = next_place(spans, firsts, starts, search, index + apart, apart, blocks, lane, upcoming, place);
            }
            const int next_row = goes_on ? first_row + ROWS : first_row_of(upcoming[place].tokens);
            const int here = SCARCE ? not_ahead(lane) : lane;
            if (!EARLY && (goes_on || next)) fetch_rows(upcoming[place], next_row, here, fetched);
#if IN_TEAMS
            u32* ending = stage + warps_to_ending(current.round) * (WARP_BYTES / 4);  // of the warp that ends the block
#else
            u32* ending = stage;
#endif
            u16* radii = radii_of(ending) + first_row;  // of the tile
#if WIDE
            encode_two_rows(tables, stage, radii, here, words, owns, exponents, [&] {
                if (EARLY) fetch_rows(upcoming[place], next_row, here, fetched);  // again the same ones, if there are no others
            });
#elif FACTORS
            encode_in_factors(tables, stage, radii, here, strips, owns[0], exponents[0]);
#else
            Energies energies;
            find_energies(quads, energies);
            float own = energies.of<ORDER / 4>(0);  // of a lane's quarter
#if PLAIN
            // Rows with NaN or Inf, and rows so large or small that squares may leave float32, are rotated once more.
            if (!__all_sync(ALL_LANES, own > 1e-22f && own < 1e30f)) {
                rotate_carefully<false, true>(tables, block, means, from, fetched, row, lane, current.bad, exponent, quads);
                find_energies(quads, energies);
                own = energies.of<ORDER / 4>(0);
            }
#endif
            encode_row(tables, block, stage, radii, tile_row, quarter, quads, energies, own, exponent);
#endif
#if IN_TEAMS  // without a maximum with 0, of which ptxas 13.0 makes that rows behind the block are a whole tile
            const int rows = min(block.tokens - first_row, ROWS);
#else
            const int rows = IS_IDLE(index, blocks) ? 0 : max(min(block.tokens - first_row, ROWS), 0);
#endif
            const u32 votes = SCARCE && IN_STEP ? current.votes : 0;  // looked up with what is written
            __syncwarp();
            write_tile(tables, keys, stage, rows, block, first_row, here, sum);
            __syncwarp();
            if (SCARCE) more = goes_on_behind(first_row, votes);
        }
#if IN_TEAMS
        const int to_ending = warps_to_ending(current.round);
        u8* ending = reinterpret_cast<u8*>(stage) + to_ending * WARP_BYTES;
        u64* sums = reinterpret_cast<u64*>(ending + SUMS_AT);  // of warps: of words, and of bad rows
        sum = sum_of_lanes(sum);
        if (lane == 0) sums[threadIdx.x / 32 % SHARING] = sum, sums[SHARING + threadIdx.x / 32 % SHARING] = current.bad;
        meet_team();
        if (to_ending) continue;
        sum = lane < SHARING ? sums[lane] : 0;
        const int bad_rows = __reduce_add_sync(ALL_LANES, lane < SHARING ? (int)sums[SHARING + lane] : 0);
#elif AS_WORDS
        const int bad_rows = current.bad;
#else
        const int bad_rows = __reduce_add_sync(ALL_LANES, current.bad);
#endif
        const int words = block_bytes(block.tokens) / 4 - 1;
        if (!IS_IDLE(index, blocks)) write_rest(tables, keys, stage, block, lane, sum);
        const u32 total = reduced(sum, 4 * words);
        if (lane == 0 && !IS_IDLE(index, blocks)) block.payload[words] = total;
        if (lane == 0 && !IS_IDLE(index, blocks)) flags[index] = bad_rows;
    }
}
#endif
