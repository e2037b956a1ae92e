// Law: an encoder's two rounds of the rotation in factors, where their matrix is too large for shared memory.
//
// A round multiplies by H, of which factors.py tells two factors: butterflies of eight numbers, and products with one small
// matrix for both rounds and all numbers of a butterfly. Numbers are float16, and so are sums, two in a word, which takes nothing
// from codes of a few bits.
//
// A lane has a quarter of one row's channels, strip by strip: eight words of a strip are a butterfly, its numbers two by two.
// wgmma's 64 rows are those of four warps' tiles, each with one of the butterfly's numbers and, eight rows below, its
// neighbour: so four products, of a set of two numbers each, are a round, and one is on its way while another's sums are used.
// Between the rounds numbers are permuted through the warp's exchange, where a row of shared memory is a number of all of the
// tile's rows; no two rows that are moved at once lie in the same banks.
//
// Needs DOWN_SHIFT (octaves by which each round's sums are too small), WARPGROUPS (four warps multiply together), ORDER, and the
// tables of factors.py.
#pragma once

#include "halves.cuh"
#include "lanes.cuh"

typedef u32 Sum;  // two of them

#define STRIPS (ORDER / 64)
#define BRICKS (STRIPS + STRIPS % 2 * 2)    // of a strip: 16 bytes of eight columns' inputs each
#define OF_STRIP 2                          // registers of a lane's sums
#define PAIRS_OF_STRIPS ((STRIPS + 1) / 2)  // of which the last may be one strip
#define FLIP_WORDS PAIRS_OF_STRIPS          // of a lane's signs
#define LOST_EXPONENTS (2 * DOWN_SHIFT)     // of coordinates, by both rounds
#define MINUS_ONES 0xbc00bc00u              // -1.0 twice
#define NOUGHTS 0x80008000u                 // -0 twice, which may be added to anything
#define WGMMA_KIND "k16.f16.f16.f16"
#define WGMMA_SIGNS ", 1, 1, 0"
#define IN_OUT(x) "+r"(x)
#include "wgmma.cuh"

INLINE u32 pack_entries(float even, float odd) { return pack_halves(even, odd); }

// -- butterflies ----------------------------------------------------------------------------------------------------
// The sum of two words and their difference, in their places.
INLINE void sum_and_difference(u32& a, u32& b) {
    const u32 sum = multiply_add(b, HALF_ONES, a);
    b = multiply_add(b, MINUS_ONES, a), a = sum;
}

// A lane's signs of a round (0 or 1), which the words of its strips get one strip after the other, in ascending order.
struct Flips {
    const u32* next;
    u32 bits;  // the signs of the next word are bits 15 and 31, and behind them are those of the words behind it

    INLINE Flips(const u8* tables, int round, int quarter)
        : next(reinterpret_cast<const u32*>(tables + FLIPS_AT) + ((round * 2 + SWAPPED) * 4 + quarter) * FLIP_WORDS) {}

    INLINE void flip(int strip, u32* words) {
        if (strip % 2 == 0) bits = *next++;
#pragma unroll
        for (int i = 0; i < 8; i++) words[i] ^= bits & 0x80008000u, bits += bits;
    }
};

// A strip's eight words, of which SWAPPED rows have the last four first, through a butterfly.
INLINE void butterfly(u32* words) {
#pragma unroll
    for (int apart = 1; apart < 8; apart *= 2)
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (!(i & apart)) sum_and_difference(words[i], words[i + apart]);
}

// -- products -------------------------------------------------------------------------------------------------------
// The sums of a set are of two of the butterfly's numbers (set 0: of the first two): ``sums`` [STRIPS][OF_STRIP] are two of the
// even one and two of its neighbour.

// The words of a set that are multiplied with two bricks, from ``strip`` on. A last strip that has no neighbour comes with the
// words of the set beside it, for which there is a brick of zeros: behind its own or before it.
INLINE const u32* parts_of(const u32 (*words)[8], int set, int strip, u32* four) {
    if (strip + 1 == STRIPS) return words[strip] + set / 2 * 4;
    four[0] = words[strip][2 * set], four[1] = words[strip][2 * set + 1];
    four[2] = words[strip + 1][2 * set], four[3] = words[strip + 1][2 * set + 1];
    return four;
}
INLINE int brick_of(int set, int strip) { return strip + 1 == STRIPS ? strip + set % 2 : strip; }

#if WARPGROUPS
// Begins the products of a set; the sums may not be touched before they are waited for.
INLINE void begin_set(const u8* tables, int set, const u32 (*words)[8], Sum (*sums)[OF_STRIP]) {
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)  // words are in their registers before the fence
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : : "r"(words[strip][set / 2 * 4 + i]));
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    const u64 bricks = described((u32)__cvta_generic_to_shared(tables + MATRIX_AT) / 16, 0, 1);
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip += 2) {
        u32 four[4];
        const int at = brick_of(set, strip) * BRICK_BYTES / 16;
        wgmma<STRIPS * OF_STRIP>(sums[0], parts_of(words, set, strip, four), bricks, at, strip);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for sums, after which LATER other sets were begun.
template <int LATER> INLINE void wait_for_set(Sum (*sums)[OF_STRIP]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++) asm volatile("" : TWO(sums[strip]));  // no sum is read before this
}
#else
INLINE void begin_set(const u8* tables, int set, const u32 (*words)[8], Sum (*sums)[OF_STRIP]) {
    const u32 matrix = (u32)__cvta_generic_to_shared(tables + MATRIX_AT) + (threadIdx.x & 15) * 16;
#pragma unroll
    for (int n = 0; n < STRIPS; n++) {
        sums[n][0] = sums[n][1] = 0;
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip += 2) {
            u32 four[4], brick, next_brick;
            asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                         : "=r"(brick), "=r"(next_brick)
                         : "r"(matrix + (n * BRICKS + brick_of(set, strip)) * BRICK_BYTES));
            const u32* parts = parts_of(words, set, strip, four);
            asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%0,%1};"
                : TWO(sums[n])
                : "r"(parts[0]), "r"(parts[1]), "r"(parts[2]), "r"(parts[3]), "r"(brick), "r"(next_brick));
        }
    }
}
template <int LATER> INLINE void wait_for_set(Sum (*sums)[OF_STRIP]) {}
#endif

// Multiplies the four sets. ``use`` takes one after the other, and its sums, while those of the next one are on their way.
template <typename Use> INLINE void each_set(const u8* tables, const u32 (*words)[8], Use use) {
    Sum sums[2][STRIPS][OF_STRIP];
    begin_set(tables, 0, words, sums[0]);
#pragma unroll
    for (int set = 0; set < 4; set++) {
        if (set < 3) begin_set(tables, set + 1, words, sums[(set + 1) % 2]), wait_for_set<1>(sums[set % 2]);
        else wait_for_set<0>(sums[set % 2]);
        use(set, sums[set % 2]);
    }
}

// -- the exchange ---------------------------------------------------------------------------------------------------
// MANY (four or two) matrices of eight rows of shared memory: a lane's word of each, for the numbers 2 (l % 4) and 2 (l % 4) + 1
// of row l / 4 of the tile. ``address``: lane l's of row l % 8 of matrix l / 8.
template <int MANY> INLINE void put(u32 address, const u32* words) {
#if __CUDA_ARCH__ >= 900
    if (MANY == 4)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(words[0]),
                     "r"(words[1]), "r"(words[MANY - 2]), "r"(words[MANY - 1])
                     : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(address), "r"(words[0]), "r"(words[1])
                     : "memory");
#else
#pragma unroll
    for (int i = 0; i < MANY; i++) {
        u32 turned;  // two tile rows' numbers l / 4
        asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(words[i]));
        const u32 lane = threadIdx.x & 31, to = __shfl_sync(ALL_LANES, address, 8 * i + lane / 4) + lane % 4 * 4;
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(turned) : "memory");
    }
#endif
}

INLINE void take_four(u32 address, u32* words) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

// A lane's places in the exchange, two in a word, in the order in which they are asked for: the first AHEAD_OF_ALL of them are
// looked up at once, others eight at a time.
template <int AHEAD_OF_ALL> struct Places {
    const uint4* table;
    uint4 own[(AHEAD_OF_ALL + 7) / 8], others;

    INLINE Places(const u8* tables) : table(reinterpret_cast<const uint4*>(tables) + (threadIdx.x & 31)) {
#pragma unroll
        for (int i = 0; i < AHEAD_OF_ALL; i += 8) own[i / 8] = table[i / 8 * 32];
    }

    INLINE u32 operator[](int i) {
        if (i >= AHEAD_OF_ALL && i % 8 == 0) others = table[i / 8 * 32];
        const uint4 eight = i < (AHEAD_OF_ALL + 7) / 8 * 8 ? own[i / 8] : others;
        const u32 two = i / 2 % 4 == 0 ? eight.x : i / 2 % 4 == 1 ? eight.y : i / 2 % 4 == 2 ? eight.z : eight.w;
        return i % 2 ? two >> 16 : two & 0xffff;
    }
};

// The words [STRIPS][8] of a lane's channels -> those that the second round's products take. ``exchange``: 16 ORDER bytes of
// the warp's shared memory.
INLINE void rotate_halfway(const u8* tables, u8* exchange, int lane, u32 (*words)[8]) {
    const u32 address = (u32)__cvta_generic_to_shared(exchange);
    Flips flips(tables, 0, lane & 3);
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++) flips.flip(strip, words[strip]), butterfly(words[strip]);
    __syncwarp();
    Places<8> puts(tables + PUTS_AT);
    each_set(tables, words, [&](int set, const Sum (*sums)[OF_STRIP]) {
#pragma unroll
        for (int strip = 0; strip < STRIPS; strip += 2) {
            const u32 to = address + puts[set * PAIRS_OF_STRIPS + strip / 2];
            if (strip + 1 < STRIPS) put<4>(to, sums[strip]);
            else put<2>(to, sums[strip]);
        }
    });
    Places<2 * STRIPS> takes(tables + TAKES_AT);
    Flips flips_back(tables, 1, lane & 3);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2 * STRIPS; i++) take_four(address + takes[i], words[i / 2] + i % 2 * 4);
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++) flips_back.flip(strip, words[strip]), butterfly(words[strip]);
    __syncwarp();
}
