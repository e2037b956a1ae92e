// Law: the words of coded rows, on their way between the stream and a warp's stage, and their checksum on that way.
//
// The stage is shared memory, where the rows of one tile are coded. Lane l moves words l, l + 32 ... of a tile.
//
// Needs ROWS (of a tile), DECODER or ENCODER, STAGE_BYTES; ENCODER, RADII_AT (of a block's radii, if they wait for its end, in
// bytes from the stage on); and what checksum.cuh and the coding need.
#pragma once

#include "block_place.cuh"
#include "checksum.cuh"
#include "coding.cuh"
#include "warpgroups.cuh"

#define FETCHES ((words_of(ROWS) + 31) / 32)  // of a lane, for a tile

#ifdef DECODER
// A lane's words of the tile of rows from ``first_row`` on; zero behind the block's end.
INLINE void fetch_words(u32* fetched, const Block& block, int first_row, int lane) {
    const int have = min(words_of(block.tokens - first_row), words_of(ROWS));
#pragma unroll
    for (int i = 0; i < FETCHES; i++) {
        const int word = i * 32 + lane;
        fetched[i] = word < have ? __ldcs(block.payload + words_of(first_row) + word) : 0;
    }
}

// Puts those words into the stage, and adds to the checksum's sum, unless the block has no such rows.
INLINE void stage_words(const u8* tables, const i64* __restrict__ keys, const u32* fetched, const Block& block, int first_row,
                        int lane, u32* stage, u64& sum) {
#pragma unroll
    for (int i = 0; i < FETCHES; i++) {
        const int word = i * 32 + lane;
        if (FETCHES * 32 == words_of(ROWS) || word < words_of(ROWS)) {
            const u64 value = fetched[i];
            if (!is_past(first_row, block.tokens))
                sum += folded(value * key_of(tables, keys, words_of(block.tokens), words_of(first_row) + word));
            stage[place_of_word(word)] = fetched[i];
        }
    }
}
#endif

#ifdef ENCODER
INLINE void clear_stage(u32* stage, int lane) {
#if !STORED
    constexpr int AT_ONCE = 32 * 16;  // bytes, 16 a lane
#pragma unroll
    for (int i = 0; i < (STAGE_BYTES + AT_ONCE - 1) / AT_ONCE; i++)
        if (i * AT_ONCE + lane * 16 < STAGE_BYTES) reinterpret_cast<uint4*>(stage)[i * 32 + lane] = make_uint4(0, 0, 0, 0);
#endif
}

// A block's radii beside a warp's stage.
INLINE u16* radii_of(u32* stage) { return reinterpret_cast<u16*>(reinterpret_cast<u8*>(stage) + RADII_AT); }

#if PLANES
#include "planes.cuh"
#else
// Writes a tile's first ``rows`` rows into the stream, and adds to the checksum's sum.
INLINE void write_tile(const u8* tables, const i64* __restrict__ keys, const u32* stage, int rows, const Block& block,
                       int first_row, int lane, u64& sum) {
    const int have = words_of(rows);
    u32* payload = block.payload + words_of(first_row);
#pragma unroll
    for (int i = 0; i < FETCHES; i++) {
        const int place = i * 32 + lane;
        const bool inside = place < have;
        const u32 word = inside ? stage[place_of_word(place)] : 0;
        sum += folded((u64)word * key_of(tables, keys, words_of(block.tokens), words_of(first_row) + place));
        if (inside) __stcs(payload + place, word);
    }
}

INLINE void write_rest(const u8* tables, const i64* __restrict__ keys, u32* stage, const Block& block, int lane, u64& sum) {}
#endif
#endif
