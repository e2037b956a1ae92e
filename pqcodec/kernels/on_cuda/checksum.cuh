// Law: a block's checksum (SPEC 4.2): the sum of its words, each times a key, and of its bytes times key 0, modulo a prime.
//
// Needs PRIME, PRIME_GAP (2^32 modulo PRIME), KEY_0, and KEYS_AT where the keys are among the tables.
#pragma once

#include "lanes.cuh"

// A number below 2^36 that equals x modulo the prime.
INLINE u64 folded(u64 x) { return (x & 0xffffffffull) + (x >> 32) * PRIME_GAP; }

// The sum of a warp's lanes' sums, each below 2^54, in every lane.
INLINE u64 sum_of_lanes(u64 sum) {
    const u32 low = __reduce_add_sync(ALL_LANES, (u32)sum & 0x7ffffff), high = __reduce_add_sync(ALL_LANES, (u32)(sum >> 27));
    return ((u64)high << 27) + low;
}

// The sum of all words, below 2^62, and the number of bytes -> the checksum.
INLINE u32 checksum_of(u64 sum, u32 bytes) {
    const u64 total = folded(folded(sum + folded((u64)bytes * KEY_0)));  // below 2^32
    return total >= PRIME ? (u32)(total - PRIME) : (u32)total;
}

INLINE u32 reduced(u64 sum, u32 bytes) { return checksum_of(sum_of_lanes(sum), bytes); }

// The key of a block's word. Words behind the block's end are taken for zero, so that any key will do for them.
INLINE u32 key_of(const u8* tables, const i64* __restrict__ keys, int block_words, int word) {
#ifdef KEYS_AT
    return reinterpret_cast<const u32*>(tables + KEYS_AT)[1 + word];
#else
    return (u32)__ldg(keys + 1 + min(word, block_words - 1));
#endif
}
