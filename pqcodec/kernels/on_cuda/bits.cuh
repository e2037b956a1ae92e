// Law: fields of bits in words of shared memory, little-endian: windows to read them from, and a writer.
//
// Needs DECODER or ENCODER. ``words`` is an address in shared memory, and ``bit`` counts from there on. Windows touch the word,
// or the two words, behind the one in which they begin, and so does the writer.
#pragma once

#include "numbers.cuh"

// The address of the word that a bit lies in. (As C++ it would take three instructions instead of two.)
INLINE u32 word_address(u32 words, u32 bit) {
    u32 word;
    asm("shr.u32 %0, %1, 5;" : "=r"(word) : "r"(bit));
    return words + word * 4;
}

#ifdef DECODER
// The word at an address in shared memory. It is volatile so that it stays behind the barrier before it.
INLINE u32 word_at(u32 address) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
    return word;
}

// 32 bits from ``bit`` on.
INLINE u32 window(u32 words, u32 bit) {
    const u32 address = word_address(words, bit);
    return __funnelshift_r(word_at(address), word_at(address + 4), bit);
}

// 64 bits from ``bit`` on.
INLINE void wide_window(u32 words, u32 bit, u32& low, u32& high) {
    const u32 address = word_address(words, bit), middle = word_at(address + 4);
    low = __funnelshift_r(word_at(address), middle, bit);
    high = __funnelshift_r(middle, word_at(address + 8), bit);
}
#endif

#ifdef ENCODER
// Writes one field behind the other into words that held zeros. A word that gets none of a field's bits is ORed with zero: that
// costs less than to ask whether it gets any.
struct Writer {
    u32 words;
    u32 bit;  // the next field's first

    INLINE static void add(u32 address, u32 value) {
        asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
    }

    INLINE void put(u32 value, int width) {  // up to 32 bits
        const u32 address = word_address(words, bit);
        add(address, __funnelshift_l(0, value, bit));
        add(address + 4, __funnelshift_l(value, 0, bit));
        bit += width;
    }

    INLINE void put(u32 low, u32 high, int width) {  // up to 64 bits
        const u32 address = word_address(words, bit);
        add(address, __funnelshift_l(0, low, bit));
        add(address + 4, __funnelshift_l(low, high, bit));
        add(address + 8, __funnelshift_l(high, 0, bit));
        bit += width;
    }
};
#endif
