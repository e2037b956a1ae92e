// Law: a block's planes (SPEC 8.1) on their way from a warp's stage into the stream: a tile's signs and indices as soon as
// they are coded, the radii with their base at the block's end.
//
// Needs RADII_AT (of the block's radii, in bytes from the stage on), LEAST (radius, in steps), what quads_encoder.cuh and
// checksum.cuh need.
#pragma once

#include "block_place.cuh"
#include "checksum.cuh"
#include "coding.cuh"

#define RADIUS_CODES 255  // of a row that is not zero

// Writes words of a run, and adds to the checksum's sum; ``at``: the first one's place in the block, of ``words`` words. WHOLE:
// the run has as many as it can.
template <int MOST, bool WHOLE>
INLINE void write_run(const u8* tables, const i64* __restrict__ keys, const u32* run, int have, u32* payload, int at, int words,
                      int lane, u64& sum) {
    u32* to = payload + at + lane;
#pragma unroll
    for (int i = 0; i < MOST; i += 32) {
        if (WHOLE && MOST % 32 == 0 || i + lane < (WHOLE ? MOST : have)) {
            const u32 word = run[i + lane];
            sum += folded((u64)word * key_of(tables, keys, words, at + lane + i));
            __stcs(to + i, word);
        }
    }
}

INLINE u16* radii_of(u32* stage) { return reinterpret_cast<u16*>(reinterpret_cast<u8*>(stage) + RADII_AT); }

template <bool WHOLE>
INLINE void write_planes(const u8* tables, const i64* __restrict__ keys, const u32* stage, int rows, const Block& block,
                         int first_row, int lane, u64& sum) {
    const int tokens = block.tokens, words = block_bytes(tokens) / 4 - 1;
    u32* payload = block.payload;  // read once: stores might change it, for all that the compiler knows
    write_run<SIGN_WORDS, WHOLE>(tables, keys, stage + SIGNS_AT, rows * (ORDER / 32), payload, first_row * (ORDER / 32), words,
                                 lane, sum);
    write_run<INDEX_WORDS, WHOLE>(tables, keys, stage + INDICES_AT, rows * INDEX_BYTES / 4, payload,
                                  tokens * (ORDER / 32) + first_row * INDEX_BYTES / 4, words, lane, sum);
}

// Writes the signs and indices of a tile of ``rows`` rows, and keeps their radii: beside the stage of the warp that ends the
// block.
INLINE void write_tile(const u8* tables, const i64* __restrict__ keys, u32* stage, u32* ending, int rows, const Block& block,
                       int first_row, int lane, u64& sum) {
    if (lane < rows) radii_of(ending)[first_row + lane] = stage[lane];
    if (rows == ROWS) write_planes<true>(tables, keys, stage, rows, block, first_row, lane, sum);
    else if (rows > 0) write_planes<false>(tables, keys, stage, rows, block, first_row, lane, sum);
}

// Writes what lies behind the two planes: codes of radii, their base, and zeros.
INLINE void write_rest(const u8* tables, const i64* __restrict__ keys, u32* stage, const Block& block, int lane, u64& sum) {
    const u16* radii = radii_of(stage);
    const int tokens = block.tokens;
    u32* payload = block.payload;
    u32 most = 0;
    for (int row = lane; row < tokens; row += 32) most = max(most, (u32)radii[row]);
    for (int apart = 16; apart; apart >>= 1) most = max(most, __shfl_xor_sync(ALL_LANES, most, apart));
    const int base = most ? (int)most - RADIUS_CODES : 0;  // a radius of base + code has that code
    const u32 stored = most ? base + LEAST : 0;
    const int words = block_bytes(tokens) / 4 - 1, first = tokens * (ORDER / 8 + INDEX_BYTES) / 4;
#pragma unroll 1
    for (int word = first + lane; word < words; word += 32) {
        u32 value = 0;
        for (int i = 0; i < 4; i++) {
            const int row = 4 * (word - first) + i;
            u32 byte = row == tokens ? stored & 255 : row == tokens + 1 ? stored >> 8 & 255 : 0;
            if (row < tokens) byte = radii[row] ? max((int)radii[row] - base, 0) : 0;
            value |= byte << 8 * i;
        }
        sum += folded((u64)value * key_of(tables, keys, words, word));
        __stcs(payload + word, value);
    }
}
