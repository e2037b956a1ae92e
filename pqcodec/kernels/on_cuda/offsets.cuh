// Law: offsets (SPEC 9): each channel's stored mean, turned by its token's position under RoPE.
//
// A warp keeps its block's means in shared memory. Pieces are eight neighbouring channels (lanes.cuh). Under RoPE the channels
// that turn together are neighbours (INTERLEAVED), or PAIRS apart: then one piece's turns are those of another, too, if that is
// the same lane's.
//
// Every operation rounds by itself, for decoders' results depend on it.
//
// Needs OFFSETS, ORDER, CHECKSUM_BYTES, OFFSET_EXPONENT_AT; PAIRS (of channels that turn; 0 without RoPE), INTERLEAVED (how
// channels are paired), PARTS (if more than one: of a row's pieces), and with RoPE the tables FREQUENCIES (of each pair) and
// PHASES (256 times cos and sin of a coarse turn, and of a fine one, PHASE_COPIES of each side by side, so that fewer lanes meet
// in a bank). With the tables TILE_TURN and ROW_TURNS (tables.py) an encoder turns a block's means to its first row, then on to
// each tile's first row, and from there to the tile's others.
#pragma once

#include "block_place.cuh"
#include "lanes.cuh"

#if OFFSETS && PAIRS && !INTERLEAVED && PAIRS % (FACTORS ? 64 : 32) == 0 && !(PARTS > 1)
#define APART (PAIRS / 32)  // pieces from one to that with the same turns; 0 where there is none
#else
#define APART 0
#endif

#ifdef ROW_TURNS_AT
#define TILE_TURNS 1
#define TURNED_PIECES (APART ? APART : (2 * PAIRS + 31) / 32)  // whose turns the table has
#else
#define TILE_TURNS 0
#define TURNED_PIECES 0
#endif

#if OFFSETS
// Fills ``means`` [ORDER] with those of a block's leading index; returns the largest magnitude, in every lane.
INLINE float keep_means(const Block& block, int lane, float* means) {
    const i64 stream = __ldg(block.span + STREAM);
    const float unit = power_of_two(*reinterpret_cast<const short*>(stream + OFFSET_EXPONENT_AT));
    const u32* halves =
        reinterpret_cast<const u32*>(stream + __ldg(block.span + OFFSETS_AT) + block.lead * (2 * ORDER + CHECKSUM_BYTES));
    float most = 0.0f;
#pragma unroll
    for (int i = lane; i < ORDER / 2; i += 32) {
        const u32 both = __ldg(halves + i);
        const float2 two = make_float2(half_value(both & 0xffff) * unit, half_value(both >> 16) * unit);
        reinterpret_cast<float2*>(means)[i] = two;
        most = fmaxf(most, fmaxf(fabsf(two.x), fabsf(two.y)));
    }
    for (int apart = 16; apart; apart >>= 1) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, apart));
    __syncwarp();
    return most;
}

INLINE u32 position_of(const Block& block) { return (u32)(block.token + __ldg(block.span + POSITION)); }  // of its first row

INLINE void eight_means(const float* means, int first, float* eight) {
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(means + first + i);
        eight[i] = four.x, eight[i + 1] = four.y, eight[i + 2] = four.z, eight[i + 3] = four.w;
    }
}

#define TURNING (2 * PAIRS)  // channels that turn
#if PAIRS
#define TURNS (INTERLEAVED ? 4 : 8)  // of a piece

struct Turns {
    float cos[TURNS], sin[TURNS];
};

// The byte, from the phases on, at which one of the four bytes of a phase finds its turn, for lanes with these low bits. With
// 16 copies an entry has 256 bytes: its coarse turns, and then the fine ones.
INLINE u32 turn_at(u32 phase, int byte, u32 lane_bytes) {
    if (PHASE_COPIES == 16) return __byte_perm(phase, lane_bytes, byte == 3 ? 0x7734 : 0x7724);
    return (phase >> 8 * byte & 255) * (16 * PHASE_COPIES) + lane_bytes;
}

// The frequencies of the piece that begins at a channel that turns, in turns / 2^32 a position.
INLINE void frequencies_of(const u8* tables, int first, u32* frequencies) {
    const int pair = INTERLEAVED ? first / 2 : first < PAIRS ? first : first - PAIRS;
    const u32* all = reinterpret_cast<const u32*>(tables + FREQUENCIES_AT) + pair;
#pragma unroll
    for (int i = 0; i < TURNS; i += 4) {
        if (PAIRS % 4 == 0) {
            const uint4 four = *reinterpret_cast<const uint4*>(all + i);
            frequencies[i] = four.x, frequencies[i + 1] = four.y, frequencies[i + 2] = four.z, frequencies[i + 3] = four.w;
        } else {
            for (int j = i; j < i + 4; j++) frequencies[j] = all[INTERLEAVED && first + 2 * j >= TURNING ? 0 : j];
        }
    }
}

// The turns of a piece at a position.
INLINE void turns_at(const u8* tables, u32 position, const u32* frequencies, Turns& turns) {
    const u32 lane_bytes = (threadIdx.x & (PHASE_COPIES - 1)) * 8;
    const u8* phases = tables + PHASES_AT;
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const u32 phase = position * frequencies[i];
        const u8* fines = phases + 8 * PHASE_COPIES;
        const float2 coarse = *reinterpret_cast<const float2*>(phases + turn_at(phase, 3, lane_bytes));
        const float2 fine = *reinterpret_cast<const float2*>(fines + turn_at(phase, 2, lane_bytes));
#ifdef ENCODER
        turns.cos[i] = fmaf(coarse.x, fine.x, -coarse.y * fine.y), turns.sin[i] = fmaf(coarse.y, fine.x, coarse.x * fine.y);
#else
        turns.cos[i] = coarse.x * fine.x - coarse.y * fine.y, turns.sin[i] = coarse.y * fine.x + coarse.x * fine.y;
#endif
    }
}

// Where the means begin of the channels that those of a piece turn with.
INLINE int partners_of(int first) {
    return INTERLEAVED || first >= TURNING ? first : first < PAIRS ? first + PAIRS : first - PAIRS;
}

// The offsets of the piece that begins at channel ``first``, from its means and its partners'; ``second``: whether its channels
// are the second of their pairs.
INLINE void turned_offsets(const float* means, const float* partners, int first, bool second, const Turns& turns,
                           float* offsets) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
#if INTERLEAVED
        const float own = means[i] * turns.cos[i / 2], cross = means[i ^ 1] * turns.sin[i / 2];
        const float turned = i & 1 ? own + cross : own - cross;
        offsets[i] = first + i < TURNING ? turned : means[i];
#else
        const float own = means[i] * turns.cos[i], cross = partners[i] * turns.sin[i];
        const float turned = second ? own + cross : own - cross;
        offsets[i] = first < TURNING ? turned : means[i];
#endif
    }
}

#ifdef ENCODER
// The same for the piece that begins at channel ``first``.
INLINE void turns_at(const u8* tables, u32 position, int first, Turns& turns) {
    u32 frequencies[TURNS];
    frequencies_of(tables, first, frequencies);
    turns_at(tables, position, frequencies, turns);
}

#if TILE_TURNS
// Fills ``turned`` [ORDER] with a block's means as they are turned at a position, by all lanes of a warp.
INLINE void turn_means(const u8* tables, const float* means, u32 position, int lane, float* turned) {
    const u32 lane_bytes = (lane & (PHASE_COPIES - 1)) * 8;
    const u8 *phases = tables + PHASES_AT, *fines = phases + 8 * PHASE_COPIES;
#pragma unroll
    for (int i = 0; i < PAIRS; i += 32) {
        const int pair = i + lane;
        if (PAIRS % 32 && pair >= PAIRS) break;
        const u32 phase = position * reinterpret_cast<const u32*>(tables + FREQUENCIES_AT)[pair];
        const float2 coarse = *reinterpret_cast<const float2*>(phases + turn_at(phase, 3, lane_bytes));
        const float2 fine = *reinterpret_cast<const float2*>(fines + turn_at(phase, 2, lane_bytes));
        const float cos = fmaf(coarse.x, fine.x, -coarse.y * fine.y), sin = fmaf(coarse.y, fine.x, coarse.x * fine.y);
        const int one = INTERLEAVED ? 2 * pair : pair, two = INTERLEAVED ? one + 1 : pair + PAIRS;
        turned[one] = fmaf(means[one], cos, -means[two] * sin), turned[two] = fmaf(means[two], cos, means[one] * sin);
    }
#pragma unroll
    for (int i = TURNING; i < ORDER; i += 32)
        if ((ORDER - TURNING) % 32 == 0 || i + lane < ORDER) turned[i + lane] = means[i + lane];
    __syncwarp();
}

// Turns such means on to the next tile's first row.
INLINE void turn_on(const u8* tables, int lane, float* turned) {
#pragma unroll
    for (int i = 0; i < PAIRS; i += 32) {
        const int pair = i + lane;
        if (PAIRS % 32 && pair >= PAIRS) break;
        const float2 turn = reinterpret_cast<const float2*>(tables + TILE_TURN_AT)[pair];
        float *one = turned + (INTERLEAVED ? 2 * pair : pair), *two = one + (INTERLEAVED ? 1 : PAIRS);
        const float first = *one, second = *two;
        *one = fmaf(first, turn.x, -second * turn.y), *two = fmaf(second, turn.x, first * turn.y);
    }
    __syncwarp();
}

// The turns of a lane's piece from a tile's first row to one of its two rows; ``which``: twice the piece, plus which row.
INLINE void turns_in_tile(const u8* tables, int which, int lane, Turns& turns) {
    const float4* both = reinterpret_cast<const float4*>(tables + ROW_TURNS_AT) + which * (TURNS / 2) * 32 + lane;
#pragma unroll
    for (int i = 0; i < TURNS; i += 2) {
        const float4 two = both[i / 2 * 32];
        turns.cos[i] = two.x, turns.sin[i] = two.y, turns.cos[i + 1] = two.z, turns.sin[i + 1] = two.w;
    }
}
#endif

// Takes the offsets from the numbers of a piece, as an encoder may round them; else as turned_offsets.
INLINE void take_offsets(const float* means, const float* partners, int piece, int first, bool second, const Turns& turns,
                         float* numbers) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float cos = turns.cos[INTERLEAVED ? i / 2 : i];
        float sin = turns.sin[INTERLEAVED ? i / 2 : i];
        const float partner = INTERLEAVED ? means[i ^ 1] : partners[i];
        if (INTERLEAVED ? i & 1 : (!TILE_TURNS || APART) && second) sin = -sin;  // else the table has that sign
        const bool turns_too = TILE_TURNS ? piece < (APART ? 2 * APART : TURNED_PIECES)
                                          : first + (INTERLEAVED ? i : 0) < TURNING;
        numbers[i] = turns_too ? fmaf(partner, sin, fmaf(-means[i], cos, numbers[i])) : numbers[i] - means[i];
    }
}
#endif
#endif

// A lane's offsets of a row, piece by piece in ascending order, in unrolled code.
struct RowOffsets {
#if PAIRS
    Turns kept[APART ? APART : 1];
#endif

    INLINE void of_piece(const u8* tables, const float* means, u32 position, int quarter, int piece, float* offsets) {
        const int first = first_channel(quarter, piece);
#if PAIRS
        float own[8], partners[8];
        eight_means(means, first, own);
        eight_means(means, partners_of(first), partners);
        const int place = APART ? piece % APART : 0;
        if (first < TURNING && (!APART || piece < APART)) {
            u32 frequencies[TURNS];
            frequencies_of(tables, first, frequencies);
            turns_at(tables, position, frequencies, kept[place]);
        }
        turned_offsets(own, partners, first, APART ? piece >= APART : first >= PAIRS, kept[place], offsets);
#else
        eight_means(means, first, offsets);
#endif
    }
};
#endif

#if !PAIRS
struct Turns {};
#endif
