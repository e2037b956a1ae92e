// Law: offsets (SPEC 9): each channel's stored mean, turned by its token's position under RoPE.
//
// A warp keeps its block's means in shared memory. Pieces are eight neighbouring channels (lanes.cuh). Under RoPE the channels
// that turn together are neighbours (INTERLEAVED), or PAIRS apart: then one piece's turns are those of another, too, if that is
// the same lane's.
//
// Every operation rounds by itself, for decoders' results depend on it; but within a run (IN_RUNS, SPEC 9.5) none rounds, and
// where there is room for the table RUN_TURNS, tensor cores turn a run's means: of a lane's channels the turns are operands
// as they are, and the means the diagonals of the others (RunMeans).
//
// Needs OFFSETS, IN_RUNS, ORDER, CHECKSUM_BYTES, OFFSET_EXPONENT_AT; LARGEST_HALF (of float16), RUN_ROWS (of a run), RUN_MAGIC
// (what is added to a run's turns, and taken off again, rounds them), RUN_BYTES (of a run's means, and BEHIND_RUN bytes behind
// them); PAIRS (of channels that turn; 0 without RoPE), INTERLEAVED (how channels are paired), PARTS (if more than one: of a
// row's pieces), and with RoPE the tables FREQUENCIES (of each pair) and PHASES (256 times cos and sin of a coarse turn, and of
// a fine one, PHASE_COPIES of each side by side, so that fewer lanes meet in a bank). With the table RUN_TURNS a run's means
// are operands of products, RUN_PIECE bytes a piece, and encoders have no PHASES. With the tables TILE_TURN and ROW_TURNS
// (tables.py; the latter of TURNED_PIECES) an encoder turns a block's means to its first row, then on to each tile's first row,
// and from there to the tile's others.
#pragma once

#include "block_place.cuh"
#include "halves.cuh"
#include "lanes.cuh"
#include "turns.cuh"

#if OFFSETS && PAIRS && !INTERLEAVED && PAIRS % (FACTORS ? 64 : 32) == 0 && !(PARTS > 1)
#define APART (PAIRS / 32)  // pieces from one to that with the same turns; 0 where there is none
#else
#define APART 0
#endif

#define UNIT_AT (RUN_BYTES - BEHIND_RUN)  // of a run: where its means' unit is, or what is left of it
#define SMALLEST_HALF 6.103515625e-05f    // 2^-14, of float16's that are not subnormal
#define LEAST_DIRECT (-27)                // the exponent of means of which the largest is above 2^-13
#ifdef RUN_TURNS_AT
#define RUN_PRODUCTS 1
#define RUN_PIECES (APART ? APART : PIECES)  // of which there are turns: where pieces are APART, for two of them
#define RUN_SHARE (APART ? 2 : 1)            // pieces with the same turns
#else
#define RUN_PRODUCTS 0
#endif

#if defined(ENCODER) && RUN_PRODUCTS
#define PHASES_AT 0  // there is no table, and nothing looks up a phase
#endif

#ifdef ROW_TURNS_AT
#define TILE_TURNS 1
#else
#define TILE_TURNS 0
#define TURNED_PIECES 0
#endif

// Whether means are turned to a run's first row, and from there by each row's turn. An encoder that turns them from a tile's
// first row on comes as near as 16-bit numbers can tell.
#define BY_RUNS (IN_RUNS && !TILE_TURNS)

#if OFFSETS
INLINE float unit_of_means(const Block& block) { return power_of_two(block.exponent); }

// Fills ``means`` [ORDER], unless it is null, with those of a block's leading index; returns the largest magnitude, in every
// lane.
INLINE float keep_means(const Block& block, int lane, float* means) {
    const float unit = unit_of_means(block);
    const u32* halves = block.means;
    float most = 0.0f;
#pragma unroll
    for (int i = lane; i < ORDER / 2; i += 32) {
        const u32 both = __ldg(halves + i);
        const float2 two = make_float2(half_value(both & 0xffff) * unit, half_value(both >> 16) * unit);
        if (means) reinterpret_cast<float2*>(means)[i] = two;
        most = fmaxf(most, fmaxf(fabsf(two.x), fabsf(two.y)));
    }
    for (int apart = 16; apart; apart >>= 1) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, apart));
    __syncwarp();
    return most;
}

// Where a row of a block is for turns_at: at its position or, BY_RUNS, in its run.
INLINE u32 place_of_row(const Block& block, int row) { return BY_RUNS ? row % RUN_ROWS : block.position + row; }

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

// The turn of a phase, by look-ups.
struct TwoTurns : Turn {
    INLINE TwoTurns(const u8* tables, u32 phase) {
        const u32 lane_bytes = (threadIdx.x & (PHASE_COPIES - 1)) * 8;
        const u8 *phases = tables + PHASES_AT, *fines = phases + 8 * PHASE_COPIES;
        coarse = *reinterpret_cast<const float2*>(phases + turn_at(phase, 3, lane_bytes));
        fine = *reinterpret_cast<const float2*>(fines + turn_at(phase, 2, lane_bytes));
    }
};

#if defined(ENCODER) && RUN_PRODUCTS
// The turn of a phase as near to that as special function units come, without a look-up: what is rounded to eleven bits of it
// is hardly ever another number.
struct NearTurn {
    float angle;

    INLINE NearTurn(u32 phase) : angle((int)(phase & 0xffff0000u) * 1.4629180792671596e-9f) {}  // 2 pi / 2^32
    INLINE float cos() const { return __cosf(angle); }
    INLINE float sin() const { return __sinf(angle); }
};
#endif

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

INLINE float turn_of_run(float x) { return x + RUN_MAGIC - RUN_MAGIC; }  // to a multiple of 2^-11

// The turns of a piece at a position or, BY_RUNS, of a row in its run.
INLINE void turns_at(const u8* tables, u32 position, const u32* frequencies, Turns& turns) {
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
        const TwoTurns turn(tables, position * frequencies[i]);
#if defined(ENCODER) && !BY_RUNS
        turns.cos[i] = turn.fused_cos(), turns.sin[i] = turn.fused_sin();
#else
        turns.cos[i] = turn.cos(), turns.sin[i] = turn.sin();
#endif
        if (BY_RUNS) turns.cos[i] = turn_of_run(turns.cos[i]), turns.sin[i] = turn_of_run(turns.sin[i]);
    }
}

#if IN_RUNS
// A pair of means, not times their unit, turned to a run's first row.
INLINE float2 turned_to_run(float one, float two, float cos, float sin) {
    const float x = fminf(fmaxf(one * cos - two * sin, -LARGEST_HALF), LARGEST_HALF);
    const float y = fminf(fmaxf(one * sin + two * cos, -LARGEST_HALF), LARGEST_HALF);
    const float most = fmaxf(fmaxf(fabsf(x), fabsf(y)), SMALLEST_HALF);
    // 1.5 * 2^13 times the power of two in ``most``: what is added to it is rounded to 2^-10 of that power
    const float magic = float_of((bits_of(most) & INFINITY_BITS) + (13u << MANTISSA_BITS) | 1u << (MANTISSA_BITS - 1));
    return make_float2(x + magic - magic, y + magic - magic);
}

// Where a run has the means of channels that do not turn, and without products of all; with products of all pieces nowhere.
INLINE float* run_means(u8* run) {
    return reinterpret_cast<float*>(run) + RUN_PRODUCTS * (APART * (RUN_PIECE / 4) - TURNING);
}

// Of a warp that turns a block's stored means to a run's first row, a lane's pairs, and its channels that do not turn.
struct RunMeans {
    static constexpr int MANY = (PAIRS + 31) / 32, OTHERS = (ORDER - TURNING + 31) / 32;
    u16 ones[MANY], twos[MANY], others[OTHERS + 1];

    INLINE static bool has(u32 i, u32 lane, u32 count) { return count % 32 == 0 || i * 32 + lane < count; }
    INLINE static u32 first_of(u32 pair) { return INTERLEAVED ? 2 * pair : pair; }
    INLINE static u32 second_of(u32 pair) { return INTERLEAVED ? 2 * pair + 1 : pair + PAIRS; }

    INLINE void load(const Block& block, u32 lane) {
        const u16* means = reinterpret_cast<const u16*>(block.means);
#pragma unroll
        for (int i = 0; i < MANY; i++)
            if (has(i, lane, PAIRS))
                ones[i] = __ldg(means + first_of(i * 32 + lane)), twos[i] = __ldg(means + second_of(i * 32 + lane));
#pragma unroll
        for (int i = 0; i < OTHERS; i++)
            if (has(i, lane, ORDER - TURNING)) others[i] = __ldg(means + TURNING + i * 32 + lane);
    }

    // The largest magnitude, in every lane.
    INLINE float largest() const {
        u32 most = 0;
#pragma unroll
        for (int i = 0; i < 2 * MANY; i++)
            if (has(i / 2, threadIdx.x & 31, PAIRS)) most = max(most, (i % 2 ? twos[i / 2] : ones[i / 2]) & 0x7fffu);
#pragma unroll
        for (int i = 0; i < OTHERS; i++)
            if (has(i, threadIdx.x & 31, ORDER - TURNING)) most = max(most, others[i] & 0x7fffu);
        return half_value(__reduce_max_sync(ALL_LANES, most));
    }

    // A channel's words in columns of products: its mean and, times the sine's sign, that of the channel it turns with.
    INLINE static void put(u8* run, u32 channel, float mean, float partner) {
        const u32 odd = channel % 2 * 16, column = channel % 32 / 8 * 2 + channel % 2, strip = channel % 8 / 2;
        *reinterpret_cast<uint2*>(run + channel / 32 * RUN_PIECE + column * 32 + strip * 8) =
            make_uint2(half_bits(mean) << odd, half_bits(partner) << odd);
    }

    // Fills ``run`` with them as they are turned at a position, times ``scale``: [ORDER] in float32, or where tensor cores go
    // on, first RUN_PIECE bytes for each of RUN_PIECES. These are nine columns of products: of each, of a channel in each of
    // the four strips, two words that have its means in the channel's half, and 0 in the other. The ninth column is 0.
    INLINE void turn(const u8* tables, u32 position, u32 lane, u8* run, float scale = 1.0f) const {
        __builtin_assume(lane < 32);
        float2 turned[MANY];  // all of them before any is stored, which the compiler takes for a change of the tables
#pragma unroll
        for (int i = 0; i < MANY; i++) {
            if (!has(i, lane, PAIRS)) break;
            const u32 phase = position * reinterpret_cast<const u32*>(tables + FREQUENCIES_AT)[i * 32 + lane];
#if defined(ENCODER) && RUN_PRODUCTS
            const NearTurn turn(phase);
#else
            const TwoTurns turn(tables, phase);
#endif
            turned[i] = turned_to_run(half_value(ones[i]), half_value(twos[i]), turn.cos(), turn.sin());
            turned[i].x *= scale, turned[i].y *= scale;
        }
#pragma unroll
        for (int i = 0; i < MANY; i++) {
            if (!has(i, lane, PAIRS)) break;
            const u32 pair = i * 32 + lane;
#if RUN_PRODUCTS
            put(run, first_of(pair), turned[i].x, -turned[i].y);
            if (!APART) put(run, second_of(pair), turned[i].y, turned[i].x);
#else
            run_means(run)[first_of(pair)] = turned[i].x, run_means(run)[second_of(pair)] = turned[i].y;
#endif
        }
#if RUN_PRODUCTS
#pragma unroll
        for (u32 i = lane; i < 3 * RUN_PIECES; i += 32)
            *reinterpret_cast<uint4*>(run + i / 3 * RUN_PIECE + 8 * 32 + i % 3 * 16) = make_uint4(0, 0, 0, 0);
#endif
#pragma unroll
        for (int i = 0; i < OTHERS; i++) {
            const u32 channel = TURNING + i * 32 + lane;
            if (!has(i, lane, ORDER - TURNING)) break;
            const float mean = half_value(others[i]) * scale;
            if (RUN_PRODUCTS && !APART) put(run, channel, mean, 0.0f);
            else run_means(run)[channel] = mean;
        }
    }
};

#if defined(ENCODER) && RUN_PRODUCTS
// Whether float16 holds means times their unit as well as they are stored, so that they are taken from rows in one step.
INLINE bool are_direct(const Block& block) {
    return block.exponent <= 0 && block.exponent >= LEAST_DIRECT;
}
#endif

// What a run's means are kept times: an encoder takes them from rows, where tensor cores do so as negative sums.
INLINE float scale_of_run(const Block& block) {
#ifndef ENCODER
    return 1.0f;
#elif RUN_PRODUCTS
    return are_direct(block) ? -unit_of_means(block) : -1.0f;
#else
    return unit_of_means(block);
#endif
}

// Turns a block's ``means`` to the run whose first row is at a position, by all lanes of a warp.
INLINE void turn_to_run(const u8* tables, const Block& block, const RunMeans& means, u32 position, int lane, u8* run) {
    means.turn(tables, position, lane, run, scale_of_run(block));
    __syncwarp();
}

// The same for means that are still to be loaded.
INLINE void turn_to_run(const u8* tables, const Block& block, u32 position, int lane, u8* run) {
    RunMeans means;
    means.load(block, lane);
    turn_to_run(tables, block, means, position, lane, run);
}

#if RUN_PRODUCTS
// Where a lane's columns begin: of the operand's eight it has two numbers of one column, or zeros.
// The zeros begin 16 bytes behind the columns, so that lanes do not meet in a bank.
INLINE const u8* columns_of(const u8* run, int lane) { return run + (lane >> 3 == (lane & 3) ? lane / 4 * 32 : 8 * 32 + 16); }

// Where a lane's turns begin, for the tile of sixteen rows from ``first_row`` of a block on.
INLINE const u8* turns_of(const u8* tables, int first_row, int lane) {
    return tables + RUN_TURNS_AT + first_row % RUN_ROWS / 16 * (RUN_PIECES * 4 * 512) + lane * 16;
}

// A lane's columns of products of a piece, and of that APART behind it, of four strips.
struct RunColumns {
    uint4 strips[2];  // two each: the first mean, and the second times its sine's sign

    // ``columns``: where the lane's begin.
    INLINE RunColumns(const u8* columns, int piece) {
        strips[0] = *reinterpret_cast<const uint4*>(columns + piece * RUN_PIECE);
        strips[1] = *reinterpret_cast<const uint4*>(columns + piece * RUN_PIECE + 16);
    }

    // Adds a strip's offsets, over their unit, to sums of two channels of one row, and of the other: of the first piece and, if
    // there is one, of the second. ``turns``: where the lane's begin.
    INLINE void add(const u8* turns, int piece, int strip, float (*sums)[4]) const {
        const uint4 turn = *reinterpret_cast<const uint4*>(turns + (piece * 4 + strip) * 512);
        const uint4& two = strips[strip / 2];
        const u32 one = strip % 2 ? two.z : two.x, less = strip % 2 ? two.w : two.y;
        multiply(sums[0], turn.x, turn.y, turn.z, turn.w, one, less);
        if (APART) multiply(sums[1], turn.x, turn.y, turn.z, turn.w, less ^ 0x80008000u, one);
    }
};
#endif
#endif

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
#pragma unroll
    for (int i = 0; i < PAIRS; i += 32) {
        const int pair = i + lane;
        if (PAIRS % 32 && pair >= PAIRS) break;
        const TwoTurns turn(tables, position * reinterpret_cast<const u32*>(tables + FREQUENCIES_AT)[pair]);
        const float cos = turn.fused_cos(), sin = turn.fused_sin();
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
