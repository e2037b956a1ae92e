// Law: a block's planes (SPEC 8.1) on their way from a warp's stage into the stream: a tile's signs and indices as soon as
// they are coded, the radii with their base at the block's end.
//
// Needs LEAST (radius, in steps), what quads_encoder.cuh and checksum.cuh need, and radii_of (payload.cuh).
#pragma once

#include "block_place.cuh"
#include "checksum.cuh"
#include "coding.cuh"

#define RADIUS_CODES 255  // of a row that is not zero

// Writes words of a run, and adds to the checksum's sum; ``at``: the first one's place in the block, of ``words`` words. WHOLE:
// the run has as many as it can.
template <int MOST, bool WHOLE, typename Words>
INLINE void write_run(const u8* tables, const i64* __restrict__ keys, const u32* run, int have, u32* payload, int at, int words,
                      int lane, Words& sum) {
    u32* to = payload + at + lane;
#pragma unroll
    for (int i = 0; i < MOST; i += 32) {
        if (WHOLE && MOST % 32 == 0 || i + lane < (WHOLE ? MOST : have)) {
            const u32 word = run[i + lane];
            sum.add(word, key_of(tables, keys, words, at + lane + i));
            __stcs(to + i, word);
        }
    }
}

template <bool WHOLE>
INLINE void write_planes(const u8* tables, const i64* __restrict__ keys, const u32* stage, int rows, const Block& block,
                         int first_row, int lane, u64& sum) {
    const int tokens = block.tokens, words = block_bytes(tokens) / 4 - 1;
    u32* payload = block.payload;  // read once: stores might change it, for all that the compiler knows
    WordSum<(SIGN_WORDS + INDEX_WORDS > 8 * 32)> words_sum(sum);
    write_run<SIGN_WORDS, WHOLE>(tables, keys, stage, rows * (ORDER / 32), payload, first_row * (ORDER / 32), words,
                                 lane, words_sum);
    write_run<INDEX_WORDS, WHOLE>(tables, keys, stage + SIGN_WORDS, rows * INDEX_BYTES / 4, payload,
                                  tokens * (ORDER / 32) + first_row * INDEX_BYTES / 4, words, lane, words_sum);
    sum = words_sum.folded();
}

// Writes the signs and indices of a tile of ``rows`` rows.
INLINE void write_tile(const u8* tables, const i64* __restrict__ keys, const u32* stage, int rows, const Block& block,
                       int first_row, int lane, u64& sum) {
    if (rows == ROWS) write_planes<true>(tables, keys, stage, rows, block, first_row, lane, sum);
    else if (rows > 0) write_planes<false>(tables, keys, stage, rows, block, first_row, lane, sum);
}

// The codes of four radii, side by side: how far each lies above ``base``, and 0 of those below it and of rows of zeros.
INLINE u32 radius_codes(u32 two, u32 others, int base) {
    u32 codes = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int radius = (int)((i < 2 ? two : others) >> i % 2 * 16 & 0xffff);
        codes |= (radius ? max(radius - base, 0) : 0) << 8 * i;
    }
    return codes;
}

// Writes what lies behind the two planes: codes of radii, their base, and zeros.
INLINE void write_rest(const u8* tables, const i64* __restrict__ keys, u32* stage, const Block& block, int lane, u64& sum) {
    const u32* pairs = reinterpret_cast<const u32*>(radii_of(stage));  // of radii
    const int tokens = block.tokens, whole = tokens / 2;               // pairs
    u32* payload = block.payload;
    u32 largest = 0;  // of the first of each pair, and of the second
    for (int pair = lane; pair < whole; pair += 32) largest = __vmaxu2(largest, pairs[pair]);
    if (tokens % 2) largest = __vmaxu2(largest, pairs[whole] & 0xffff);
    const u32 most = __reduce_max_sync(ALL_LANES, max(largest & 0xffff, largest >> 16));
    const int base = most ? (int)most - RADIUS_CODES : 0;  // a radius of base + code has that code
    const u32 stored = most ? base + LEAST : 0;
    const int words = block_bytes(tokens) / 4 - 1, first = tokens * (ORDER / 8 + INDEX_BYTES) / 4;
#pragma unroll 1
    for (int word = lane; word < words - first; word += 32) {
        const int have = tokens - 4 * word;  // of its bytes that are codes; the base is behind them
        u32 value = have > 0 ? radius_codes(pairs[2 * word], pairs[2 * word + 1], base) : 0;
        if (have < 4) {
            const u64 behind = have < 0 ? (u64)(stored & 0xffff) >> min(-8 * have, 32) : (u64)(stored & 0xffff) << 8 * have;
            value = value & ((1u << 8 * max(have, 0)) - 1) | (u32)behind;
        }
        sum += folded((u64)value * key_of(tables, keys, words, first + word));
        __stcs(payload + first + word, value);
    }
}
