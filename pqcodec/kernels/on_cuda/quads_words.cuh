// Law: the words of a block of quads (SPEC 8.1): signs and indices of ROWS rows at a time, the checksum of all words, and radii.
//
// A warp sends for a tile's words while it decodes the tile before: they come into one of its two stages, signs first. They all
// belong to the block's checksum.
//
// Needs INDEX_BYTES (of a row's indices), ROWS (of a tile), and what the other files need.
#pragma once

#include "block_place.cuh"
#include "checksum.cuh"

#define SIGN_WORDS (ROWS * ORDER / 32)        // of a tile
#define INDEX_WORDS (ROWS * INDEX_BYTES / 4)  // of a tile
#define TILE_WORDS (SIGN_WORDS + INDEX_WORDS)  // and behind them the rows' radii, a byte each

INLINE const u32* radii_of(const Block& block) { return block.payload + block.tokens * (ORDER / 8 + INDEX_BYTES) / 4; }

// Sends for a word; a zero stands for one that is not ``there``.
INLINE void send_for_word(const u32* from, u32* to, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from),
                 "r"(there ? 4 : 0)
                 : "memory");
}

// Sends for the words of a tile of rows. WHOLE: the block has all of them; else zeros stand for those behind its end.
template <bool WHOLE> INLINE void send_for_rows(const Block& block, int first_row, int lane, u32* stage) {
    const int rows = block.tokens - first_row;
    const u32* signs = block.payload + (first_row * (ORDER / 32) + lane);
    const u32* indices = block.payload + (block.tokens * (ORDER / 32) + first_row * INDEX_BYTES / 4 + lane);
    const u32* radii = block.payload + (block.tokens * (ORDER / 8 + INDEX_BYTES) + first_row) / 4 + lane;
#pragma unroll
    for (int i = 0; i < SIGN_WORDS; i += 32)
        if (SIGN_WORDS % 32 == 0 || i + lane < SIGN_WORDS)
            send_for_word(signs + i, stage + i + lane, WHOLE || i + lane < rows * (ORDER / 32));
#pragma unroll
    for (int i = 0; i < INDEX_WORDS; i += 32)
        if (INDEX_WORDS % 32 == 0 || i + lane < INDEX_WORDS)
            send_for_word(indices + i, stage + SIGN_WORDS + i + lane, WHOLE || i + lane < rows * INDEX_BYTES / 4);
    if (lane < ROWS / 4) send_for_word(radii, stage + TILE_WORDS + lane, WHOLE || 4 * lane < rows);
}

// Sends for the words of the tile of rows from ``first_row`` on.
INLINE void send_for_tile(const Block& block, int first_row, int lane, u32* stage) {
    if (first_row + ROWS <= block.tokens) send_for_rows<true>(block, first_row, lane, stage);
    else send_for_rows<false>(block, first_row, lane, stage);
}

// Waits for the words that a warp sent for.
INLINE void wait_for_tile() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
}

// How many words a lane reads at once of so many, which begin at a multiple of ORDER / 32 of a block's words.
constexpr __device__ int words_at_once(int words) {
#ifdef KEYS_AT  // where KEYS_AT is chosen so that a block's first key lies at a multiple of 16 bytes
    if (ORDER % 128 == 0 && words % 128 == 0) return 4;
    if (ORDER % 64 == 0 && words % 64 == 0) return 2;
#endif
    return 1;
}

// Adds words of a plane to the checksum's sum: WORDS of them, from the block's word ``first`` on.
template <int WORDS>
INLINE void sum_plane(const u8* tables, const i64* __restrict__ keys, const u32* plane, int first, int lane, int words,
                      WordSum<true>& sum) {
    constexpr int MANY = words_at_once(WORDS);
    struct alignas(4 * MANY) Words { u32 word[MANY]; };
#pragma unroll
    for (int place = MANY * lane; place < WORDS; place += 32 * MANY) {
        const Words read = *reinterpret_cast<const Words*>(plane + place);
#ifdef KEYS_AT
        const Words own = *reinterpret_cast<const Words*>(tables + KEYS_AT + 4 + 4 * (first + place));
#else
        const Words own = {key_of(tables, keys, words, first + place)};
#endif
#pragma unroll
        for (int i = 0; i < MANY; i++) sum.add(read.word[i], own.word[i]);
    }
}

// Adds a tile's words to the checksum's sum.
INLINE void sum_tile(const u8* tables, const i64* __restrict__ keys, const u32* stage, const Block& block, int first_row,
                     int lane, int words, u64& sum) {
    const int indices = block.tokens * (ORDER / 32) + first_row * INDEX_BYTES / 4;
    WordSum<true> words_sum(sum);
    sum_plane<SIGN_WORDS>(tables, keys, stage, first_row * (ORDER / 32), lane, words, words_sum);
    sum_plane<INDEX_WORDS>(tables, keys, stage + SIGN_WORDS, indices, lane, words, words_sum);
    sum = words_sum.folded();
}

// Adds what lies behind the two planes: radii, base and zeros.
INLINE void sum_rest(const u8* tables, const i64* __restrict__ keys, const Block& block, int lane, int words, u64& sum) {
    for (int word = block.tokens * (ORDER / 8 + INDEX_BYTES) / 4 + lane; word < words; word += 32)
        sum += folded((u64)__ldg(block.payload + word) * key_of(tables, keys, words, word));
}

// The radius code of a staged tile's row; 0 behind the block's end.
INLINE u32 radius_of(const u32* stage, const Block& block, int first_row, int row) {
    return first_row + row < block.tokens ? reinterpret_cast<const u8*>(stage + TILE_WORDS)[row] : 0;
}

INLINE u32 stored_checksum(const Block& block) { return __ldcs(block.payload + block_bytes(block.tokens) / 4 - 1); }

// Sends for the two words that a block's base lies in, which is behind its radii.
INLINE void send_for_base(const Block& block, int lane, u32* target) {
    if (lane < 2) send_for_word(radii_of(block) + block.tokens / 4 + lane, target + lane, true);
}
