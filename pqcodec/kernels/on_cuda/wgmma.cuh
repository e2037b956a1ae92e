// Law: one step of wgmma, by four warps: products with a matrix of eight columns or many, added to a lane's sums.
//
// Needs Sum and IN_OUT (how asm takes one), WGMMA_KIND (inputs of a step, and the types of sums and factors), WGMMA_SIGNS (of the
// factors), HALF_SUMS (sums are float16, two of a register), and BRICKS (of a strip of the matrix).
#pragma once

#include "numbers.cuh"

#define BRICK_BYTES 128  // of eight columns, 16 bytes of inputs each

#define TWO(sums) IN_OUT((sums)[0]), IN_OUT((sums)[1])
#define FOUR(sums) TWO(sums), IN_OUT((sums)[2]), IN_OUT((sums)[3])

// Lists of so many sums.
#define SUMS_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define SUMS_10 SUMS_8 ",%8,%9"
#define SUMS_12 SUMS_10 ",%10,%11"
#define SUMS_14 SUMS_12 ",%12,%13"
#define SUMS_16 SUMS_14 ",%14,%15"
#define SUMS_18 SUMS_16 ",%16,%17"
#define SUMS_24 SUMS_18 ",%18,%19,%20,%21,%22,%23"
#define SUMS_32 SUMS_24 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define SUMS_40 SUMS_32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define SUMS_48 SUMS_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define SUMS_64 SUMS_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// The same as operands, of the array ``sums``.
#define ALL_8 FOUR(sums), FOUR(sums + 4)
#define ALL_10 ALL_8, TWO(sums + 8)
#define ALL_12 ALL_10, TWO(sums + 10)
#define ALL_14 ALL_12, TWO(sums + 12)
#define ALL_16 ALL_14, TWO(sums + 14)
#define ALL_18 ALL_16, TWO(sums + 16)
#define ALL_24 ALL_18, FOUR(sums + 18), TWO(sums + 22)
#define ALL_32 ALL_24, FOUR(sums + 24), FOUR(sums + 28)
#define ALL_40 ALL_32, FOUR(sums + 32), FOUR(sums + 36)
#define ALL_48 ALL_40, FOUR(sums + 40), FOUR(sums + 44)
#define ALL_64 ALL_48, FOUR(sums + 48), FOUR(sums + 52), FOUR(sums + 56), FOUR(sums + 60)

#if HALF_SUMS
#define COLUMNS(of_halves, of_others) of_halves
#else
#define COLUMNS(of_halves, of_others) of_others
#endif
#define WGMMA(registers, of_halves, of_others, a, b, c, d, matrix, brick, added)                                           \
    if constexpr (REGISTERS == registers)                                                                                  \
    asm volatile("{.reg .pred p; .reg .b64 those; setp.ne.u32 p, " added ", 0; add.s64 those, " matrix ", " brick ";"      \
                 "wgmma.mma_async.sync.aligned.m64n" COLUMNS(of_halves, of_others) WGMMA_KIND " {" SUMS_##registers "},"   \
                 " {" a "," b "," c "," d "}, those, p" WGMMA_SIGNS ";}"                                                   \
                 : ALL_##registers                                                                                         \
                 : "r"(parts[0]), "r"(parts[1]), "r"(parts[2]), "r"(parts[3]), "l"(bricks), "l"(at), "r"(add))

// The descriptor of two bricks, ``apart`` bricks apart, of a strip and of those behind it. ``matrix``: its address / 16. The
// fields, in units of 16 bytes: the first brick, how far the second is, how far the next strip is.
INLINE u64 described(u32 matrix, int brick, int apart) {
    constexpr int UNITS_OF_BRICK = BRICK_BYTES / 16;
    return matrix + brick * UNITS_OF_BRICK + (apart * UNITS_OF_BRICK << 16) + ((u64)(BRICKS * UNITS_OF_BRICK) << 32);
}

// Adds the products of four ``parts`` with two bricks to REGISTERS sums, or where ``add`` is 0, puts them there. ``bricks``: a
// descriptor; ``at``: how far the one that is meant is from it, which is added here, for else the compiler keeps all of them.
template <int REGISTERS> INLINE void wgmma(Sum* sums, const u32* parts, u64 bricks, u64 at, u32 add) {
    static_assert(REGISTERS <= 18 ? REGISTERS >= 8 && REGISTERS % 2 == 0
                                  : REGISTERS == 24 || REGISTERS == 32 || REGISTERS == 40 || REGISTERS == 48 || REGISTERS == 64);
    WGMMA(8, "32", "16", "%8", "%9", "%10", "%11", "%12", "%13", "%14");
    WGMMA(10, "40", "20", "%10", "%11", "%12", "%13", "%14", "%15", "%16");
    WGMMA(12, "48", "24", "%12", "%13", "%14", "%15", "%16", "%17", "%18");
    WGMMA(14, "56", "28", "%14", "%15", "%16", "%17", "%18", "%19", "%20");
    WGMMA(16, "64", "32", "%16", "%17", "%18", "%19", "%20", "%21", "%22");
    WGMMA(18, "72", "36", "%18", "%19", "%20", "%21", "%22", "%23", "%24");
    WGMMA(24, "96", "48", "%24", "%25", "%26", "%27", "%28", "%29", "%30");
    WGMMA(32, "128", "64", "%32", "%33", "%34", "%35", "%36", "%37", "%38");
    WGMMA(40, "160", "80", "%40", "%41", "%42", "%43", "%44", "%45", "%46");
    WGMMA(48, "192", "96", "%48", "%49", "%50", "%51", "%52", "%53", "%54");
    WGMMA(64, "256", "128", "%64", "%65", "%66", "%67", "%68", "%69", "%70");
}
