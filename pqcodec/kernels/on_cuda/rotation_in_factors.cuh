// Law: an encoder's two rounds of the rotation in factors, where their matrix is too large for shared memory.
//
// A round multiplies by H, of which factors.py tells two factors: butterflies of eight numbers, and products with one small
// matrix for both rounds and all numbers of a butterfly. Numbers are rounded to 16 bits between the steps, which takes nothing
// from codes of a few bits.
//
// A lane has a quarter of one row's channels, strip by strip: eight words of a strip are a butterfly, its numbers two by two.
// wgmma's 64 rows are those of four warps' tiles, each with one of the butterfly's numbers and, eight rows below, its
// neighbour: so four products are a round. Between the rounds numbers are permuted through the warp's exchange, where a row of
// shared memory is a number of all of the tile's rows; no two rows that are moved at once lie in the same banks.
//
// Needs BRAIN (16-bit numbers are bfloat16, else float16, of which each round's sums are DOWN_SHIFT octaves too small),
// WARPGROUPS (four warps multiply together), ORDER, and the tables of factors.py.
#pragma once

#include "lanes.cuh"

typedef float Sum;

#define STRIPS (ORDER / 64)
#define BRICKS ((STRIPS + 1) / 2 * 2)  // of a strip: 16 bytes of eight columns' inputs each
#ifndef PANEL
#define PANEL (STRIPS % 3 == 0 ? 3 : STRIPS == 5 ? 5 : 4)  // strips at once, at the most
#endif

#if BRAIN
#define OF_16_BITS "bf16"
#define ONES 0x3f803f80u  // 1.0 twice
#define MINUS_ONES 0xbf80bf80u
#define LOST_EXPONENTS 0  // of coordinates, by both rounds
#else
#define OF_16_BITS "f16"
#define ONES 0x3c003c00u
#define MINUS_ONES 0xbc00bc00u
#define LOST_EXPONENTS (2 * DOWN_SHIFT)
#endif
#define PANELS ((STRIPS + PANEL - 1) / PANEL)
#define FLIP_WORDS ((STRIPS + 1) / 2)  // of a lane's signs
#ifndef UNDER_WAY
#define UNDER_WAY (THREADS <= 256 ? 2 : 1)  // panels at once
#endif
#define FOUR(sums) "+f"((sums)[0]), "+f"((sums)[1]), "+f"((sums)[2]), "+f"((sums)[3])

INLINE u32 pack_entries(float even, float odd) { return BRAIN ? pack_brains(even, odd) : pack_halves(even, odd); }

// -- butterflies ----------------------------------------------------------------------------------------------------
// a * b + c, of two numbers each.
INLINE u32 fused(u32 a, u32 b, u32 c) {
    u32 sum;
    asm("fma.rn." OF_16_BITS "x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(b), "r"(c));
    return sum;
}

// The sum of two words and their difference, in their places.
INLINE void sum_and_difference(u32& a, u32& b) {
    const u32 sum = fused(b, ONES, a);
    b = fused(b, MINUS_ONES, a), a = sum;
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
// The sums of a panel are of four of the butterfly's numbers (``half``: the first or the last four), two by two: ``sums``
// [2][PANEL][4] are two of an even one and two of its neighbour.

#if WARPGROUPS
// Adds the products of 16 inputs to ``count`` strips' sums; where ``add`` is 0, the sums are these alone. ``bricks``: the first
// descriptor; ``at``: how far this one is. They are added here, for else the compiler keeps all of them in registers.
#define WGMMA_BEGIN(bricks, at, add) \
    "{.reg .pred p; .reg .b64 those; setp.ne.u32 p, " add ", 0; add.s64 those, " bricks ", " at ";" \
    "wgmma.mma_async.sync.aligned."
#define WGMMA_SHAPE(columns) "m64n" columns "k16.f32." OF_16_BITS "." OF_16_BITS
INLINE void wgmma_step(Sum (*sums)[4], int count, u32 a, u32 b, u32 c, u32 d, u64 bricks, u64 at, u32 add) {
    if (count == 3)
        asm volatile(WGMMA_BEGIN("%16", "%17", "%18") WGMMA_SHAPE("24")
                     " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11},"
                     " {%12,%13,%14,%15}, those, p, 1, 1, 0;}"
                     : FOUR(sums[0]), FOUR(sums[1]), FOUR(sums[2])
                     : "r"(a), "r"(b), "r"(c), "r"(d), "l"(bricks), "l"(at), "r"(add));
#if PANEL >= 4
    if (count == 4)
        asm volatile(WGMMA_BEGIN("%20", "%21", "%22") WGMMA_SHAPE("32")
                     " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15},"
                     " {%16,%17,%18,%19}, those, p, 1, 1, 0;}"
                     : FOUR(sums[0]), FOUR(sums[1]), FOUR(sums[2]), FOUR(sums[3])
                     : "r"(a), "r"(b), "r"(c), "r"(d), "l"(bricks), "l"(at), "r"(add));
#endif
#if PANEL >= 5
    if (count == 5)
        asm volatile(WGMMA_BEGIN("%24", "%25", "%26") WGMMA_SHAPE("40")
                     " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19},"
                     " {%20,%21,%22,%23}, those, p, 1, 1, 0;}"
                     : FOUR(sums[0]), FOUR(sums[1]), FOUR(sums[2]), FOUR(sums[3]), FOUR(sums[4])
                     : "r"(a), "r"(b), "r"(c), "r"(d), "l"(bricks), "l"(at), "r"(add));
#endif
}

// Begins the products of the panel of strips from ``first`` on; the sums may not be touched before they are waited for.
INLINE void begin_panel(const u8* tables, int first, int half, const u32 (*words)[8], Sum (*sums)[PANEL][4]) {
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++)  // words are in their registers before the fence
#pragma unroll
        for (int i = 0; i < 4; i++) asm volatile("" : : "r"(words[strip][4 * half + i]));
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    // A descriptor's fields, in units of 16 bytes: a brick, how far its neighbour is, how far the next strip is.
    const u64 bricks = (u32)__cvta_generic_to_shared(tables + MATRIX_AT) / 16 + (8 << 16) + ((u64)(BRICKS * 8) << 32);
#pragma unroll
    for (int strip = 0; strip < BRICKS; strip += 2)
#pragma unroll
        for (int set = 0; set < 2; set++) {
            const u32* words_of = words[strip] + 4 * half + 2 * set;
            const bool both = strip + 1 < STRIPS;
            wgmma_step(sums[set], min(STRIPS - first, PANEL), words_of[0], words_of[1], both ? words_of[8] : 0,
                       both ? words_of[9] : 0, bricks, (first * BRICKS + strip) * 8, strip);
        }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits for sums, after which LATER other panels were begun.
template <int LATER> INLINE void wait_for_panel(Sum (*sums)[PANEL][4]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LATER) : "memory");
#pragma unroll
    for (int i = 0; i < 2 * PANEL; i++) asm volatile("" : FOUR(sums[i / PANEL][i % PANEL]));  // no sum is read before this
}
#else
INLINE void begin_panel(const u8* tables, int first, int half, const u32 (*words)[8], Sum (*sums)[PANEL][4]) {
    const u32 matrix = (u32)__cvta_generic_to_shared(tables + MATRIX_AT) + (threadIdx.x & 15) * 16;
#pragma unroll
    for (int n = 0; n < min(STRIPS - first, PANEL); n++) {
#pragma unroll
        for (int set = 0; set < 2; set++) sums[set][n][0] = sums[set][n][1] = sums[set][n][2] = sums[set][n][3] = 0.0f;
#pragma unroll
        for (int strip = 0; strip < BRICKS; strip += 2) {
            u32 brick, next_brick;
            asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
                         : "=r"(brick), "=r"(next_brick)
                         : "r"(matrix + ((first + n) * BRICKS + strip) * 128));
#pragma unroll
            for (int set = 0; set < 2; set++) {
                const u32* words_of = words[strip] + 4 * half + 2 * set;
                const bool both = strip + 1 < STRIPS;
                asm("mma.sync.aligned.m16n8k16.row.col.f32." OF_16_BITS "." OF_16_BITS
                    ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                    : FOUR(sums[set][n])
                    : "r"(words_of[0]), "r"(words_of[1]), "r"(both ? words_of[8] : 0), "r"(both ? words_of[9] : 0), "r"(brick),
                      "r"(next_brick));
            }
        }
    }
}
template <int LATER> INLINE void wait_for_panel(Sum (*sums)[PANEL][4]) {}
#endif

// Multiplies panel by panel, both halves of the butterfly's numbers after each other, or (BY_HALVES) all panels of the first
// half before those of the second. ``use`` takes the first strip, the half, and the sums, while the next ones are on their way,
// if there are registers for them (UNDER_WAY).
template <bool BY_HALVES, typename Use> INLINE void each_panel(const u8* tables, const u32 (*words)[8], Use use) {
    Sum sums[UNDER_WAY][2][PANEL][4];
#pragma unroll
    for (int i = 1 - UNDER_WAY; i < 2 * PANELS; i++) {
        const int next = i + UNDER_WAY - 1;
        if (next < 2 * PANELS)
            begin_panel(tables, (BY_HALVES ? next % PANELS : next / 2) * PANEL, BY_HALVES ? next / PANELS : next % 2, words,
                        sums[next % UNDER_WAY]);
        if (i < 0) continue;
        if (next < 2 * PANELS) wait_for_panel<UNDER_WAY - 1>(sums[i % UNDER_WAY]);
        else wait_for_panel<0>(sums[i % UNDER_WAY]);
        use((BY_HALVES ? i % PANELS : i / 2) * PANEL, BY_HALVES ? i / PANELS : i % 2, sums[i % UNDER_WAY]);
    }
}

// -- the exchange ---------------------------------------------------------------------------------------------------
// Four matrices of eight rows of shared memory: a lane's word of each, for the numbers 2 (l % 4) and 2 (l % 4) + 1 of row l / 4
// of the tile. ``address``: lane l's of row l % 8 of matrix l / 8.
INLINE void put_four(u32 address, const u32* words) {
#if __CUDA_ARCH__ >= 900
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
#else
#pragma unroll
    for (int i = 0; i < 4; i++) {
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

// A lane's places in the exchange, in the order in which they are asked for.
struct Places {
    const uint4* own;
    uint4 four;

    INLINE Places(const u8* table) : own(reinterpret_cast<const uint4*>(table) + (threadIdx.x & 31)) {}

    INLINE u32 operator[](int i) {
        if (i % 4 == 0) four = own[i / 4 * 32];
        return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
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
    Places puts(tables + PUTS_AT);
    each_panel<true>(tables, words, [&](int first, int half, const Sum (*sums)[PANEL][4]) {
#pragma unroll
        for (int n = 0; n < min(STRIPS - first, PANEL); n++) {
            u32 four[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float* two = sums[i / 2][n] + i % 2 * 2;
                four[i] = pack_entries(two[0], two[1]);
            }
            put_four(address + puts[half * STRIPS + first + n], four);
        }
    });
    __syncwarp();
    Places takes(tables + TAKES_AT);
    Flips flips_back(tables, 1, lane & 3);
#pragma unroll
    for (int strip = 0; strip < STRIPS; strip++) {
#pragma unroll
        for (int half = 0; half < 2; half++) take_four(address + takes[2 * strip + half], words[strip] + 4 * half);
        flips_back.flip(strip, words[strip]), butterfly(words[strip]);
    }
    __syncwarp();
}
