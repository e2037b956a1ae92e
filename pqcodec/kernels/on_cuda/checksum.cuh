// Law: a block's checksum (SPEC 4.2): the sum of its words, each times a key, and of its bytes times key 0, modulo a prime.
//
// Needs PRIME, PRIME_GAP (2^32 modulo PRIME), KEY_0, and KEYS_AT where the keys are among the tables.
#pragma once

#include "lanes.cuh"

// A number below 2^36 that equals x modulo the prime.
INLINE u64 folded(u64 x) { return (x & 0xffffffffull) + (x >> 32) * PRIME_GAP; }

// A lane's sum of words times their keys. Of MANY words, each of which is counted in when it does not fit into 64 bits; else each
// product is folded, for which there need to be fewer registers.
template <bool MANY> struct WordSum {
    u32 low, high, over = 0;

    INLINE explicit WordSum(u64 before = 0) : low((u32)before), high((u32)(before >> 32)) {}
    INLINE void add(u32 word, u32 key) {
        asm("mad.lo.cc.u32 %0, %3, %4, %0; madc.hi.cc.u32 %1, %3, %4, %1; addc.u32 %2, %2, 0;"
            : "+r"(low), "+r"(high), "+r"(over)
            : "r"(word), "r"(key));
    }

    // A number below 2^38 that equals the sum modulo the prime.
    INLINE u64 folded() const { return low + (u64)high * PRIME_GAP + (u64)over * (PRIME_GAP * PRIME_GAP); }
};

template <> struct WordSum<false> {
    u64 sum;

    INLINE explicit WordSum(u64 before = 0) : sum(before) {}
    INLINE void add(u32 word, u32 key) { sum += ::folded((u64)word * key); }
    INLINE u64 folded() const { return sum; }
};

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
