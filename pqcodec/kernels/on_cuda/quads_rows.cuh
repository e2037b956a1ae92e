// Law: rows of quads (SPEC 8), from their words to the tensor: points by look-ups, the rotation on tensor cores, and stores.
//
// A warp decodes ROWS rows (16 or 32) of a block at a time. Four lanes hold a row: lane l works on rows l / 4, l / 4 + 8 and so
// on, with NEIGHBOURS on rows l / 4 * 2 and the next. A quad is one look-up: of eight bytes, a point and its negative, and a
// choice between them by its signs; or (POINT_BYTES 4) of the point alone, whose bytes then take their signs. These four bytes
// are an operand of mma (and wgmma) as they are: tensor cores multiply them with half of the rotation's matrix, of bytes. Sums
// are whole numbers below 2^22, so the matrix's product begins with the bits of 1.5 * 2^23 and ends as a float32.
//
// The matrix lies in bricks (rotation_two_rounds.cuh); its columns are channels. Its inputs are in the order in which a lane
// has them without shifts: groups of eight quads form spans of four groups, then of two, then of one, and of a span's quads
// each quarter has a run of neighbours, two a group. A matrix for which shared memory has no room is divided by its columns:
// PARTS neighbouring thread blocks decode the same rows, each some pieces of them.
//
// Needs PARTS, JOINT (pieces of one product, into which a thread block's can be divided; 1 without WARPGROUPS), INDEX_BITS (of a
// quad), INDEX_BYTES (of a row's indices), COPIES (of each point of the table, so that lanes meet in no bank), POINT_BYTES,
// ROWS, NEIGHBOURS (where every second row's words lie in other banks), INDICES_BEHIND (words, as Words says), EVEN (whether a
// row's indices begin at multiples of eight bytes wherever their size allows it), the tables MATRIX and POINTS, WARPGROUPS
// (wgmma multiplies, for four warps at once), BULK, and what the other files need.
#pragma once

#include "numbers.cuh"
#include "lanes.cuh"
#include "offsets.cuh"
#define STRIPS 4  // of a panel, which is a piece
#include "rotation_two_rounds.cuh"
#include "stores.cuh"

#define GROUPS (ORDER / 32)                        // of eight quads, of a row
#define OWN_PIECES ((PIECES + PARTS - 1) / PARTS)  // of a thread block
#define PART_BYTES (OWN_PIECES * 4 * BRICKS * BRICK_BYTES)
#define MAGIC_BITS 0x4b400000                      // of MAGIC, 1.5 * 2^23
#define TILES (ROWS / 16)                          // of sixteen rows, which meet the matrix together
#define LANE_ROWS (ROWS / 8)
// Turns of the loops over pieces; where the turns of each row of a run are looked up, registers are few.
#define UNROLLED (PARTS == 1 && GROUPS <= 4 && (!IN_RUNS || RUN_PRODUCTS) ? 2 : 1)
#if WARPGROUPS
#define WAIT_FOR(later, sums) wait_together<false, later>((sums)[0])  // products, after which ``later`` others were begun
#else
#define WAIT_FOR(later, sums) (void)0
#endif
#if JOINT > 1
#include "joint_products.cuh"
#endif

// The words of coded rows: their signs, and what lies INDICES_BEHIND words before their indices.
struct Words {
    const u32 *signs, *indices;
};

// The words of BITS bits from ``bit`` of a tile's indices on, the first bit lowest.
template <int BITS> INLINE void index_words(const u32* indices, int bit, u32* words) {
    const u32* at = indices + INDICES_BEHIND + (bit >> 5);
    constexpr bool whole = BITS % 32 == 0 && 8 * INDEX_BITS % 32 == 0;  // runs begin at whole words
    if (whole && BITS == 64 && EVEN) {
        const uint2 both = *reinterpret_cast<const uint2*>(at);
        words[0] = both.x, words[1] = both.y;
        return;
    }
#pragma unroll
    for (int i = 0; 32 * i < BITS; i++) {
        if (whole) words[i] = at[i];
        else if (32 % BITS == 0 && 8 * INDEX_BITS % BITS == 0) words[i] = at[i] >> (bit & 31);  // a run lies in one word
        else words[i] = __funnelshift_r(at[i], at[i + 1], bit);
    }
}

// A byte of all ones for each byte of ``bytes`` whose top bit is set, else of zeros.
INLINE u32 spread_top_bits(u32 bytes) {
    u32 ones;
    asm("prmt.b32 %0, %1, 0, 0xba98;" : "=r"(ones) : "r"(bytes));
    return ones;
}

// A lane's quads of a row of a span of SPAN groups, a run of neighbours, each as four signed bytes. mma meets them two a group.
template <int SPAN>
INLINE void quads_of(const u8* tables, const Words& coded, int lane, int row, int group, u32* quads) {
    constexpr int RUN = 2 * SPAN;
    const int first = (lane & 3) * RUN;
    const u32 signs = coded.signs[row * (ORDER / 32) + group + (first >> 3)] >> (first & 7);
    u32 words[(RUN * INDEX_BITS + 31) / 32];
    index_words<RUN * INDEX_BITS>(coded.indices, row * (8 * INDEX_BYTES) + (8 * group + first) * INDEX_BITS, words);
    u32 rest = lane / COPIES;  // subtracted: of a mask, the compiler makes one more for each index
    asm("" : "+r"(rest));
    const u32 own = (lane - rest * COPIES) * POINT_BYTES;  // the lane's copy of a point
#pragma unroll
    for (int quad = 0; quad < RUN; quad++) {
        constexpr u32 mask = (1u << INDEX_BITS) - 1;
        const int bit = quad * INDEX_BITS, within = bit % 32;
        u32 at;
        if (INDEX_BITS == 8 && COPIES * POINT_BYTES == 256) {
            at = __byte_perm(words[bit / 32], own, 0x6604 | within / 8 << 4);  // a point's copies are 256 bytes
        } else {
            const bool straddles = within + INDEX_BITS > 32;
            const u32 low = words[bit / 32];
            const u32 index = straddles ? __funnelshift_r(low, words[bit / 32 + 1], within) : low >> within;
            at = (index & mask) * (POINT_BYTES * COPIES) | own;
        }
#if POINT_BYTES == 8
        const uint2 point = *reinterpret_cast<const uint2*>(tables + POINTS_AT + at);  // it and its negative
        const u32 negative = spread_top_bits(signs << (7 - quad));
        quads[quad] = (point.x & ~negative) | (point.y & negative);
#else
        const u32 point = *reinterpret_cast<const u32*>(tables + POINTS_AT + at);
        const u32 negative = spread_top_bits(signs << (7 - quad));
        quads[quad] = (point ^ negative) + (negative & 0x01010101);  // no byte carries into the next: no coordinate is 0
#endif
    }
}

// The row of a tile that a lane works on, its first, second and so on.
INLINE int row_of(int lane, int part) { return NEIGHBOURS ? (lane >> 2) * 2 + part : (lane >> 2) + 8 * part; }

// A lane's quads of a span, of sixteen rows from ``first_row`` on, as operands of mma: {quad 0 of a group of one row, of the
// lane's other row, quad 1 of both}.
template <int SPAN>
INLINE void span_operands(const u8* tables, const Words& coded, int lane, int first_row, int group, u32 (*operands)[4]) {
#pragma unroll
    for (int part = 0; part < 2; part++) {
        u32 quads[2 * SPAN];
        quads_of<SPAN>(tables, coded, lane, first_row + row_of(lane, part), group, quads);
#pragma unroll
        for (int quad = 0; quad < 2 * SPAN; quad++) operands[group + quad / 2][part + quad % 2 * 2] = quads[quad];
    }
}

INLINE void quad_operands(const u8* tables, const Words& coded, int lane, int first_row, u32 (*operands)[4]) {
    constexpr int behind = GROUPS / 4 * 4;
#pragma unroll
    for (int group = 0; group < behind; group += 4) span_operands<4>(tables, coded, lane, first_row, group, operands);
    if (GROUPS & 2) span_operands<2>(tables, coded, lane, first_row, behind, operands);
    if (GROUPS & 1) span_operands<1>(tables, coded, lane, first_row, GROUPS - 1, operands);
}

typedef int Sums[TILES][4][4];  // of four strips of sixteen rows each: two channels of one row and two of the other

// A lane's eight channels of MANY pieces, ``apart`` from each other, in float32 numbers from MAGIC on.
#if WARPGROUPS
// Begins the products; wait_together says when they are there. ``piece``: of the thread block's.
template <int MANY>
INLINE void begin_pieces(const u8* tables, const u32 (*operands)[GROUPS][4], int piece, int apart, Sums* sums) {
#pragma unroll
    for (int many = 0; many < MANY; many++) {
#pragma unroll
        for (int i = 0; i < 16; i++) sums[many][0][i / 4][i % 4] = MAGIC_BITS;
#pragma unroll
        for (int strip = 0; strip < 4; strip++) asm volatile("" : FOUR(sums[many][0][strip]));
    }
#pragma unroll
    for (int group = 0; group < GROUPS; group++)  // operands are in their registers before the fence
        asm volatile("" : : "r"(operands[0][group][0]), "r"(operands[0][group][1]), "r"(operands[0][group][2]),
                     "r"(operands[0][group][3]));
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int many = 0; many < MANY; many++) {
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
            wgmma_step(sums[many][0], operands[0][group], panel_address(tables, piece + many * apart) / 16, 2 * group, 1, 1);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    }
}
#else
// ``panel``: the address of the piece's strips, plus 16 bytes for each lane.
INLINE void eight_channels(u32 panel, const u32 (*operands)[GROUPS][4], Sums& sums) {
#pragma unroll
    for (int strip = 0; strip < 4; strip++) {
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[tile][strip][i] = MAGIC_BITS;
        const u32 address = panel + strip * (BRICKS * BRICK_BYTES);
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

template <int MANY>
INLINE void begin_pieces(const u8* tables, const u32 (*operands)[GROUPS][4], int piece, int apart, Sums* sums) {
#pragma unroll
    for (int many = 0; many < MANY; many++)
        eight_channels(panel_address(tables, piece + many * apart) + (threadIdx.x & 31) * 16, operands, sums[many]);
}
#endif

// What is the same for all pieces of a lane's rows: its first row of the tile and each eighth behind it.
struct LaneRows {
    u8* target[LANE_ROWS];  // of the quarter's first channel, in the tensor or (BULK) in shared memory
    bool wanted[LANE_ROWS];
    float factor[LANE_ROWS], second_factor[LANE_ROWS];
    u32 position;        // of the first; IN_RUNS in its run
    const float* means;  // of their block; IN_RUNS as they are turned to the run's first row, over ``unit``
    float unit;
    const u8 *columns, *turns;  // the lane's operands of products

    // Of the tile from ``first_row`` on; ``factor`` and ``second_factor``: of its row ``lane`` % ROWS. ``rows_out``: where rows
    // are put together with BULK.
    INLINE LaneRows(const Block& block, int first_row, int lane, float of_row, float second_of_row, u8* rows_out) {
#pragma unroll
        for (int part = 0; part < LANE_ROWS; part++) {
            const int tile_row = row_of(lane, part), row = first_row + tile_row;
#if BULK
            target[part] = rows_out + tile_row * OUT_BYTES;
#else
            target[part] = reinterpret_cast<u8*>(block.rows + (i64)row * block.row_stride);
#endif
            target[part] += first_channel(lane & 3, 0) * ITEM;
            wanted[part] = row >= block.first && row < block.last;
            factor[part] = 2.0f * __shfl_sync(ALL_LANES, of_row, tile_row);  // the matrix is R / 2
            second_factor[part] = __shfl_sync(ALL_LANES, second_of_row, tile_row);
        }
    }

#if IN_RUNS
    // ``run``: as RunMeans fills it, for the run that the tile is of.
    INLINE void turn_with(const u8* tables, u8* run, float unit_of_block, int first_row, int lane) {
        means = run_means(run), unit = unit_of_block;
        position = first_row % RUN_ROWS + row_of(lane, 0);
#if RUN_PRODUCTS
        columns = columns_of(run, lane), turns = turns_of(tables, first_row, lane);
#endif
    }
#endif
};

#if OFFSETS
// Offsets of MANY pieces of a row that have the same turns, from channel ``first`` on, PAIRS apart.
template <int MANY> INLINE void offsets_of(const u8* tables, const LaneRows& rows, int part, int first, float (*offsets)[8]) {
    float means[2][8];
    eight_means(rows.means, first, means[0]);
#if PAIRS && !RUN_PRODUCTS
    eight_means(rows.means, partners_of(first), means[1]);
    if (first < TURNING) {
        Turns turns;
        u32 frequencies[TURNS];
        frequencies_of(tables, first, frequencies);
        turns_at(tables, rows.position + row_of(0, part), frequencies, turns);
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

// MANY pieces of a lane's rows, BY from each other, from sums to the tensor. The numbers of ORDINARY rows are within the
// dtype's range. Three times their factor is a float32, too (SPEC 8.3), so MAGIC times it is exact, and so is what fmaf takes
// away: it rounds the product of sum and factor once, and never to -0.
template <bool ORDINARY, int MANY, int BY>
INLINE void finish_rows(const u8* tables, const LaneRows& rows, int quarter, int piece, const Sums* sums) {
#pragma unroll
    for (int part = 0; part < LANE_ROWS; part++) {
        const float factor = rows.factor[part], away = ORDINARY ? -MAGIC * factor : -MAGIC;
        float offsets[MANY][8];
#if OFFSETS
        offsets_of<MANY>(tables, rows, part, first_channel(quarter, piece), offsets);
#endif
#pragma unroll
        for (int i = 0; i < MANY; i++) {
            const int first = first_channel(quarter, piece + i * BY);
            float numbers[8];
            Stored stored[STORES];
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const float sum = float_of(sums[i][part / 2][k / 2][part % 2 * 2 + k % 2]);
                numbers[k] = ORDINARY ? fmaf(sum, factor, away) : sum + away;
#if IN_RUNS
                if (ORDINARY) numbers[k] = fmaf(offsets[i][k], rows.unit, numbers[k]);  // the product is exact
                else offsets[i][k] *= rows.unit;
#elif OFFSETS
                if (ORDINARY) numbers[k] += offsets[i][k];
#endif
            }
            if (ORDINARY) store_numbers(numbers, stored);
            else finish_piece(tables, first, numbers, offsets[i], factor, rows.second_factor[part], false, stored);
            u8* to = rows.target[part] + byte_of_piece(piece + i * BY);
#pragma unroll
            for (int k = 0; k < STORES; k++) STORE(to + k * 16, stored[k], rows.wanted[part]);
        }
    }
}

#if RUN_PRODUCTS
// The same of a piece, and of that with the same turns, whose offsets tensor cores find, strip by strip.
template <bool ORDINARY>
INLINE void finish_turned(const LaneRows& rows, const RunColumns& columns, int piece, const Sums* sums) {
    constexpr int STRIPS_OF_STORE = 4 / STORES;
    u32 stored[RUN_SHARE][2][4];  // of each piece, and each row
#pragma unroll
    for (int strip = 0; strip < 4; strip++) {
        float offsets[RUN_SHARE][4] = {};
        columns.add(rows.turns, piece, strip, offsets);
#pragma unroll
        for (int of_both = 0; of_both < 2 * RUN_SHARE; of_both++) {
            const int i = of_both / 2, part = of_both % 2;
            const float factor = rows.factor[part], away = ORDINARY ? -MAGIC * factor : -MAGIC;
            float two[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                const float sum = float_of(sums[i][0][strip][2 * part + k]), offset = offsets[i][2 * part + k];
                two[k] = ORDINARY ? fmaf(sum, factor, away) : (sum + away) * factor * rows.second_factor[part] + 0.0f;
                two[k] = fmaf(offset, rows.unit, two[k]);  // the product is exact
                if (!ORDINARY) two[k] = fminf(fmaxf(two[k], -LARGEST), LARGEST);
            }
#if DTYPE == FLOAT32
            stored[i][part][strip % 2 * 2] = bits_of(two[0]), stored[i][part][strip % 2 * 2 + 1] = bits_of(two[1]);
#else
            stored[i][part][strip] = pack_stored(two[0], two[1]);
#endif
            if ((strip + 1) % STRIPS_OF_STORE == 0)
                STORE(rows.target[part] + byte_of_piece(piece + i * APART) + strip / STRIPS_OF_STORE * 16,
                      *reinterpret_cast<const Stored*>(stored[i][part]), rows.wanted[part]);
        }
    }
}

INLINE void finish_turned(const LaneRows& rows, bool ordinary, const RunColumns& columns, int piece, const Sums* sums) {
    if (ordinary) finish_turned<true>(rows, columns, piece, sums);
    else finish_turned<false>(rows, columns, piece, sums);
}
#endif

template <int MANY, int BY = APART>
INLINE void finish_pieces(const u8* tables, const LaneRows& rows, bool ordinary, int quarter, int piece, const Sums* sums) {
#if RUN_PRODUCTS && !APART
    static_assert(MANY == 1, "each piece has turns of its own");
    finish_turned(rows, ordinary, RunColumns(rows.columns, piece), piece, sums);
#else
    if (ordinary) finish_rows<true, MANY, BY>(tables, rows, quarter, piece, sums);
    else finish_rows<false, MANY, BY>(tables, rows, quarter, piece, sums);
#endif
}

// Pieces that turn alone, from the first of a thread block's ``part`` of them on: one is multiplied while another is finished.
INLINE void decode_pieces(const u8* tables, const u32 (*operands)[GROUPS][4], const LaneRows& rows, bool ordinary, int quarter,
                          int part) {
    const int first = part * OWN_PIECES, last = PARTS > 1 ? min(first + OWN_PIECES, PIECES) : PIECES;
    Sums sums[2];
    int piece = 2 * APART + first;
#pragma unroll(UNROLLED)
    for (; piece + 1 < last; piece += 2) {
        begin_pieces<2>(tables, operands, piece - first, 1, sums);
        WAIT_FOR(1, sums[0]);
        finish_pieces<1>(tables, rows, ordinary, quarter, piece, sums);
        WAIT_FOR(0, sums[1]);
        finish_pieces<1>(tables, rows, ordinary, quarter, piece + 1, sums + 1);
    }
    if (piece < last) {
        begin_pieces<1>(tables, operands, piece - first, 1, sums);
        WAIT_FOR(0, sums[0]);
        finish_pieces<1>(tables, rows, ordinary, quarter, piece, sums);
    }
}

#if JOINT > 1 && !OFFSETS
// All pieces of a thread block, JOINT at once: while four warps finish them, tensor cores multiply for others.
INLINE void decode_joint(const u8* tables, const u32 (*operands)[GROUPS][4], const LaneRows& rows, bool ordinary, int quarter,
                         int part) {
#pragma unroll 1
    for (int piece = 0; piece < OWN_PIECES; piece += JOINT) {
        Sums sums[JOINT];
        multiply_joint(tables, operands[0], piece, sums[0][0]);
        finish_pieces<JOINT, 1>(tables, rows, ordinary, quarter, part * OWN_PIECES + piece, sums);
    }
}
#endif

INLINE void decode_rows(const u8* tables, const u32 (*operands)[GROUPS][4], const LaneRows& rows, bool ordinary, int quarter,
                        int part) {
#pragma unroll(UNROLLED)
    for (int piece = 0; piece < APART; piece++) {
        Sums sums[2];
#if RUN_PRODUCTS
        const RunColumns columns(rows.columns, piece);  // on their way while tensor cores multiply
#endif
#if JOINT > 1
        multiply_joint(tables, operands[0], 2 * piece, sums[0][0]);
#else
        begin_pieces<2>(tables, operands, piece, APART, sums);
        WAIT_FOR(0, sums[0]), WAIT_FOR(0, sums[1]);
#endif
#if RUN_PRODUCTS
        finish_turned(rows, ordinary, columns, piece, sums);
#else
        finish_pieces<2>(tables, rows, ordinary, quarter, piece, sums);
#endif
    }
#if JOINT > 1 && !OFFSETS
    decode_joint(tables, operands, rows, ordinary, quarter, part);
#else
    decode_pieces(tables, operands, rows, ordinary, quarter, part);
#endif
}
