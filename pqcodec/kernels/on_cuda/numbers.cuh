// Law: numbers and their bits: float32, float16 and bfloat16, rounding to whole numbers, and whole numbers as two bytes.
//
// Needs no macros.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned short u16;
typedef unsigned char u8;

#define INLINE __device__ __forceinline__

// -- float32: a sign, eight bits of exponent (a power of two plus 127), 23 bits of mantissa -------------------------
#define BIAS 127
#define MANTISSA_BITS 23
#define MANTISSA ((1u << MANTISSA_BITS) - 1)
#define MAGNITUDE 0x7fffffffu      // all but the sign
#define INFINITY_BITS 0x7f800000u  // the magnitude of Inf; NaN's is larger

INLINE u32 bits_of(float x) { return __float_as_uint(x); }
INLINE float float_of(u32 bits) { return __uint_as_float(bits); }
INLINE float power_of_two(int exponent) { return float_of((u32)(exponent + BIAS) << MANTISSA_BITS); }  // -126 .. 127

// -- 16-bit numbers; packed: two in one word, the even one in the low half ------------------------------------------
#define PACKED_MAGNITUDES 0x7fff7fffu
#define HALF_INFINITY 0x7c00u   // the magnitude of float16's Inf
#define HALF_ONES 0x3c003c00u   // 1.0 twice, float16
#define BRAIN_ONES 0x3f803f80u  // 1.0 twice, bfloat16

INLINE u32 half_bits(float x) {  // float16, to nearest, ties to even
    u32 bits;
    asm("{.reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h;}" : "=r"(bits) : "f"(x));
    return bits;
}

INLINE float half_value(u32 bits) {  // of the float16 in the low half
    float x;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(x) : "r"(bits));
    return x;
}

INLINE float2 half_values(u32 packed) {
    float2 x;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(x.x), "=f"(x.y) : "r"(packed));
    return x;
}

INLINE u32 pack_halves(float even, float odd) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(odd), "f"(even));
    return packed;
}

INLINE u32 pack_brains(float even, float odd) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(odd), "f"(even));
    return packed;
}

// -- whole numbers --------------------------------------------------------------------------------------------------
// A float32 that is added to 1.5 * 2^23 is rounded to a whole number, ties to even, which then stands in the sum's low bits.
#define MAGIC 12582912.0f

INLINE float nearest(float x) { return __fadd_rn(x, MAGIC) - MAGIC; }

// A whole number from -32,896 to 32,639 is 256 * high + low, both of them signed bytes. BYTES_MAGIC adds 128, so that the low
// byte counts from 0 and takes nothing from the high one; turning over its top bit makes it a signed byte again.
#define LARGEST_IN_BYTES 32639
#define BYTES_MAGIC (MAGIC + 128.0f)
#define TOP_BITS 0x80808080u

// The bits of four sums of a number and BYTES_MAGIC -> bytes[0]: the four low bytes; bytes[1]: the four high bytes.
INLINE void split_bytes(const u32* sums, u32* bytes) {
    const u32 first_two = __byte_perm(sums[0], sums[1], 0x5140);  // low, low, high, high
    const u32 last_two = __byte_perm(sums[2], sums[3], 0x5140);
    bytes[0] = __byte_perm(first_two, last_two, 0x5410) ^ TOP_BITS;
    bytes[1] = __byte_perm(first_two, last_two, 0x7632);
}
