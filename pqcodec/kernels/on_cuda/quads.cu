// Law: the CUDA kernel that decodes quads (SPEC 8), for orders that are multiples of 32 up to 576.
//
// A warp decodes one block (a chunk of tokens of one leading index), ROWS rows (16 or 32) at a time, and shares nothing with
// other warps but read-only tables. Four lanes hold a row: lane l works on rows l / 4, l / 4 + 8 and so on. A quad is one
// look-up of four bytes, which are an operand of mma as they are: tensor cores multiply them with half of the rotation's
// matrix, of bytes. Sums are whole numbers below 2^22, so the matrix's product begins with the bits of 1.5 * 2^23 and ends as a
// float32. The next tile's words are on their way while this one is decoded.
//
// The matrix lies in bricks (rotation_two_rounds.cuh); its columns are channels. Of a step of 32 inputs, a group of eight
// quads, quarter q brings quads 2 q and 2 q + 1. A matrix for which shared memory has no room is divided by its columns: PARTS
// neighbouring thread blocks decode the same rows, each some pieces of them, and the first one's checksum counts.
//
// Needs PARTS, INDEX_BITS (of a quad), COPIES (of each point of the table, so that lanes meet in no bank), LARGEST_SUM (that the
// rotation makes), the sizes of shared memory (BLOB_BYTES, and WARP_BYTES of each warp: two stages up to BASE_AT, the block's
// base, and from STAGE_BYTES on the next block's place), the tables MATRIX and POINTS, and what the other files need.

#include "numbers.cuh"
#include "lanes.cuh"
#include "quads_words.cuh"
#include "offsets.cuh"
#include "rotation_two_rounds.cuh"  // bricks, and mma with them
#include "stores.cuh"

#define GROUPS (ORDER / 32)                        // of eight quads, of a row
#define OWN_PIECES ((PIECES + PARTS - 1) / PARTS)  // of a thread block
#define PART_BYTES (OWN_PIECES * 4 * BRICKS * BRICK_BYTES)
#define MAGIC_BITS 0x4b400000                      // of MAGIC, 1.5 * 2^23
#define TILES (ROWS / 16)                          // of sixteen rows, which meet the matrix together
#define LANE_ROWS (ROWS / 8)

// A lane's quads of one group and of two rows, as an operand of mma: {quad 2 q of one row, of the other, quad 2 q + 1 ...}.
INLINE void quad_operands(const u8* tables, const u32* stage, int lane, int first_row, int group, u32* operand) {
    const int quarter = lane & 3;
#pragma unroll
    for (int part = 0; part < 2; part++) {
        const int row = first_row + (lane >> 2) + 8 * part;
        const u32 signs = stage[row * (ORDER / 32) + group] >> (2 * quarter);
        const int bit = row * (8 * INDEX_BYTES) + (8 * group + 2 * quarter) * INDEX_BITS;
        const u32* at = stage + SIGN_WORDS + (bit >> 5);
        const u32 window = 32 % (2 * INDEX_BITS) ? __funnelshift_r(at[0], at[1], bit) : at[0] >> (bit & 31);
#pragma unroll
        for (int quad = 0; quad < 2; quad++) {
            const u32 index = window >> (quad * INDEX_BITS) & ((1u << INDEX_BITS) - 1);
            const u32 point = reinterpret_cast<const u32*>(tables + POINTS_AT)[index * COPIES + (lane & (COPIES - 1))];
            const u32 negative = signs >> quad & 0x01010101u;
            operand[part + 2 * quad] = (point ^ negative * 255) + negative;  // two's complement, for no byte is 0
        }
    }
}

// A lane's eight channels of a piece: sums [tiles of sixteen rows][4] of four strips, each of two channels of one row and two of
// the other, in float32 numbers from MAGIC on.
INLINE void eight_channels(u32 matrix, const u32 (*operands)[GROUPS][4], int piece, int (*sums)[4][4]) {
#pragma unroll
    for (int strip = 0; strip < 4; strip++) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[tile][strip][i] = MAGIC_BITS;
        const u32 address = matrix + (4 * piece + strip) * (BRICKS * BRICK_BYTES);
#pragma unroll
        for (int group = 0; group < GROUPS; group += 2) {
            u32 bricks[4];
            if (group + 1 < GROUPS)
                asm("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                    : "=r"(bricks[0]), "=r"(bricks[1]), "=r"(bricks[2]), "=r"(bricks[3])
                    : "r"(address + group * (2 * BRICK_BYTES)));
            else
                asm("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                    : "=r"(bricks[0]), "=r"(bricks[1])
                    : "r"(address + group * (2 * BRICK_BYTES)));
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                mma_step(sums[tile][strip], operands[tile][group], bricks[0], bricks[1]);
                if (group + 1 < GROUPS) mma_step(sums[tile][strip], operands[tile][group + 1], bricks[2], bricks[3]);
            }
        }
    }
}

// What is the same for all pieces of a lane's rows.
struct LaneRows {
    int first;  // of the block; the lane's rows are this one and each eighth behind it
    float factor[LANE_ROWS], second_factor[LANE_ROWS];
    u32 position;        // of the first
    const float* means;  // of their block
};

#if OFFSETS
// Offsets of MANY pieces of a row that have the same turns, from channel ``first`` on, PAIRS apart.
template <int MANY> INLINE void offsets_of(const u8* tables, const LaneRows& rows, int part, int first, float (*offsets)[8]) {
    float means[2][8];
    eight_means(rows.means, first, means[0]);
#if PAIRS
    eight_means(rows.means, partners_of(first), means[1]);
    if (first < TURNING) {
        Turns turns;
        u32 frequencies[TURNS];
        frequencies_of(tables, first, frequencies);
        turns_at(tables, rows.position + 8 * part, frequencies, turns);
#pragma unroll
        for (int i = 0; i < MANY; i++)
            turned_offsets(means[i], means[1 - i], first, MANY > 1 ? i : first >= PAIRS, turns, offsets[i]);
        return;
    }
#endif
#pragma unroll
    for (int i = 0; i < 8; i++) offsets[0][i] = means[0][i];
}
#endif

// MANY pieces of a lane's rows, APART from each other, from sums to the tensor. The numbers of ORDINARY rows are within the
// dtype's range. Three times their factor is a float32, too (SPEC 8.3), so MAGIC times it is exact, and so is what fmaf takes
// away: it rounds the product of sum and factor once, and never to -0.
template <bool ORDINARY, int MANY>
INLINE void finish_rows(const u8* tables, u32 matrix, const u32 (*operands)[GROUPS][4], const Block& block,
                        const LaneRows& rows, int quarter, int piece) {
    int sums[MANY][TILES][4][4];
#pragma unroll
    for (int i = 0; i < MANY; i++) eight_channels(matrix, operands, piece + i * APART, sums[i]);
#pragma unroll
    for (int part = 0; part < LANE_ROWS; part++) {
        const int row = rows.first + 8 * part;
        const i64 target = block.rows + (i64)row * block.row_stride;
        const float factor = rows.factor[part], away = ORDINARY ? -MAGIC * factor : -MAGIC;
        float offsets[MANY][8];
#if OFFSETS
        offsets_of<MANY>(tables, rows, part, first_channel(quarter, piece), offsets);
#endif
#pragma unroll
        for (int i = 0; i < MANY; i++) {
            const int first = first_channel(quarter, piece + i * APART);
            float numbers[8];
            Stored stored[STORES];
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const float sum = float_of(sums[i][part / 2][k / 2][part % 2 * 2 + k % 2]);
                numbers[k] = ORDINARY ? fmaf(sum, factor, away) : sum + away;
#if OFFSETS
                if (ORDINARY) numbers[k] += offsets[i][k];
#endif
            }
            if (ORDINARY) store_numbers(numbers, stored);
            else finish_piece(tables, first, numbers, offsets[i], factor, rows.second_factor[part], false, stored);
            if (row >= block.first && row < block.last)
#pragma unroll
                for (int k = 0; k < STORES; k++) __stcs(reinterpret_cast<Stored*>(target + first * ITEM) + k, stored[k]);
        }
    }
}

// ``matrix``: the address of the first piece's strips, if they were there; ``part``: of the pieces.
template <bool ORDINARY>
INLINE void decode_rows(const u8* tables, u32 matrix, const u32 (*operands)[GROUPS][4], const Block& block,
                        const LaneRows& rows, int quarter, int part) {
    const int last = PARTS > 1 ? min((part + 1) * OWN_PIECES, PIECES) : PIECES;
#pragma unroll 1
    for (int piece = 0; piece < APART; piece++)
        finish_rows<ORDINARY, 2>(tables, matrix, operands, block, rows, quarter, piece);
#pragma unroll 1
    for (int piece = 2 * APART + part * OWN_PIECES; piece < last; piece++)
        finish_rows<ORDINARY, 1>(tables, matrix, operands, block, rows, quarter, piece);
}

// Checks every block (flags [blocks]: 1 where it is damaged), and fills the rows that its span wants; arguments as in
// blocks.cu.
extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_stream_blocks(
    const i64* __restrict__ spans, const i64* __restrict__ firsts, const i64* __restrict__ starts, int* __restrict__ flags,
    const i64* __restrict__ keys, const uint4* __restrict__ blob, i64 blocks, int search) {
    extern __shared__ uint4 memory[];
    const int lane = threadIdx.x & 31, quarter = lane & 3, tile_row = lane >> 2;
    u8* tables = reinterpret_cast<u8*>(memory);
    u8* shelf = tables + BLOB_BYTES + (threadIdx.x >> 5) * WARP_BYTES;
    u32* base = reinterpret_cast<u32*>(shelf + BASE_AT);
    Block* upcoming = reinterpret_cast<Block*>(shelf + STAGE_BYTES);
    float* means = reinterpret_cast<float*>(shelf + MEANS_AT);
    const auto stage_of = [&](int turn) { return reinterpret_cast<u32*>(shelf + turn * (BASE_AT / 2)); };
    int turn = 0;  // of the two stages
    const u32 part = blockIdx.x % PARTS, step = gridDim.x / PARTS;  // from one of a warp's blocks to the next
    u32 stored = 0, index = (threadIdx.x >> 5) * step + blockIdx.x / PARTS;
    if (index < blocks) {
        const Block block = find_block(spans, firsts, starts, search, index);
        send_for_tile(block, 0, lane, stage_of(0));
        send_for_base(block, lane, base);
        stored = stored_checksum(block);
        if (lane == 0) *upcoming = block;
    }
    copy_tables<MATRIX_AT>(blob, memory);  // the matrix comes last
    copy_tables<PART_BYTES>(blob + (MATRIX_AT + part * PART_BYTES) / 16, memory + MATRIX_AT / 16);
    __syncthreads();
    const u32 matrix = (u32)__cvta_generic_to_shared(tables + MATRIX_AT) + lane * 16 - part * PART_BYTES;

    for (; index < blocks; index += step * WARPS) {
        const Block block = *upcoming;
        const int words = block_bytes(block.tokens) / 4 - 1;
        const u32 checksum = stored;
        u64 sum = 0;
        LaneRows rows;
#if OFFSETS
        const float room = LARGEST - 2.0f * keep_means(block, lane, means);  // an offset is below twice the largest mean
        const u32 position = position_of(block);
        rows.means = means;
#else
        const float room = LARGEST;
#endif
        for (int first_row = 0; first_row < block.tokens; first_row += ROWS) {
            wait_for_tile();
            const u32* stage = stage_of(turn);
            turn ^= 1;
#pragma unroll
            for (int part = 0; part < LANE_ROWS; part++)
                quad_factors(tables, radius_of(stage, block, first_row, tile_row + 8 * part), base_of(base, block),
                             rows.factor[part], rows.second_factor[part]);
            sum_tile(tables, keys, stage, block, first_row, lane, words, sum);
            __syncwarp();
            if (first_row + ROWS < block.tokens) {
                send_for_tile(block, first_row + ROWS, lane, stage_of(turn));
            } else {
                sum_rest(tables, keys, block, lane, words, sum);
                if (index + step * WARPS < blocks) {
                    const Block next = find_block(spans, firsts, starts, search, index + step * WARPS);
                    send_for_tile(next, 0, lane, stage_of(turn));
                    send_for_base(next, lane, base);
                    stored = stored_checksum(next);
                    if (lane == 0) *upcoming = next;
                }
            }
            if (first_row + ROWS <= block.first || first_row >= block.last) {
                __syncwarp();
                continue;  // nobody wants these rows
            }
            u32 operands[TILES][GROUPS][4];
#pragma unroll
            for (int tile = 0; tile < TILES; tile++)
#pragma unroll
                for (int group = 0; group < GROUPS; group++)
                    quad_operands(tables, stage, lane, 16 * tile, group, operands[tile][group]);
            __syncwarp();
            rows.first = first_row + tile_row;
            bool ordinary = true;
#pragma unroll
            for (int part = 0; part < LANE_ROWS; part++) {
                ordinary = ordinary && is_ordinary(rows.factor[part], rows.second_factor[part], room);
                rows.factor[part] *= 2.0f;  // the matrix is R / 2
            }
#if OFFSETS
            rows.position = position + rows.first;
#endif
            if (__all_sync(ALL_LANES, ordinary)) decode_rows<true>(tables, matrix, operands, block, rows, quarter, part);
            else decode_rows<false>(tables, matrix, operands, block, rows, quarter, part);
        }
        const u32 good = reduced(sum, 4 * words);
        if (lane == 0 && part == 0) flags[index] = good != checksum;
        __syncwarp();
    }
}
