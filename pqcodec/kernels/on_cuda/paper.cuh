// Law: the paper coding (SPEC 7): 62 bits for each 16 coordinates, a float16 radius and 15 angles of fixed widths.
//
// A group is such 16 coordinates; a lane's quarter is ORDER / 64 groups. Rows are bits one behind the other, as in the stream.
//
// Needs DECODER or ENCODER, ORDER, ROW_BYTES, RADIUS_EXPONENT_AT, LARGEST_HALF (of float16), GROUP_BITS (62), what radius.cuh
// needs; when decoding the tables ANGLES (cos and sin of four angles for each of levels 2, 3, 4) and DIRECTIONS, when encoding
// PAPER_BOUNDS (of cells, braced).
#pragma once

#include "bits.cuh"
#include "block_place.cuh"
#include "energies.cuh"
#include "lanes.cuh"
#include "radius.cuh"

#define GROUPS (ORDER / 64)  // of a lane

// Bits of a group: where its angles begin, behind 16 bits of radius.
#define LEVEL_4 16
#define LEVEL_3 18
#define LEVEL_2 22
#define LEVEL_1 30

INLINE int place_of_word(int word) { return word; }

// The first bit, in the stage, of a lane's quarter of a row.
INLINE u32 first_bit(int tile_row, int quarter) { return tile_row * ROW_BYTES * 8 + quarter * (GROUPS * GROUP_BITS); }

INLINE int radius_exponent(const Block& block) {  // of the stream
    return *reinterpret_cast<const short*>(__ldg(block.span + STREAM) + RADIUS_EXPONENT_AT);
}

#ifdef DECODER
// A group's coordinates have a norm below GRID (2,048), so a row's is below 512 sqrt(ORDER), plus what their rounding adds; one
// round of the rotation makes sums of at most sqrt(ORDER) times that.
#define LARGEST_SUM (520.0f * ORDER)

INLINE u32 radius_bits(u32 low) {  // float16: the sign is ignored, NaN counts as 0, infinity as the largest
    const u32 bits = low & 0x7fff;
    return bits > HALF_INFINITY ? 0 : min(bits, HALF_INFINITY - 1);
}

INLINE float2 angle_of(const u8* tables, int level, u32 code) {  // cos and sin
    return reinterpret_cast<const float2*>(tables + ANGLES_AT)[4 * (level - 2) + (code & 3)];
}

INLINE void decode_row(const u8* tables, const Block& block, const u32* stage, int tile_row, int quarter, u32 (*quads)[2],
                       float& factor, float& second_factor) {
    const int exponent = radius_exponent(block);
    const u32 words = (u32)__cvta_generic_to_shared(stage), bit = first_bit(tile_row, quarter);
    u32 low[GROUPS], high[GROUPS], largest = 0;
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        wide_window(words, bit + GROUP_BITS * group, low[group], high[group]);
        largest = max(largest, radius_bits(low[group]));
    }
    largest = largest_of_row(largest);
    // The power of two above the row's largest radius; 0 of a zero row. Radii are multiplied so that it becomes 2^11.
    const int power = largest ? (int)(bits_of(half_value(largest)) >> MANTISSA_BITS) - (BIAS - 1) : 0;
    const float unit = power_of_two(11 - power);
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        const float radius = half_value(radius_bits(low[group])) * unit;
        const float2 angle_4 = angle_of(tables, 4, low[group] >> LEVEL_4);
        const u32 sectors = __funnelshift_r(low[group], high[group], LEVEL_1);
#pragma unroll
        for (int eight = 0; eight < 2; eight++) {
            const float2 angle_3 = angle_of(tables, 3, low[group] >> (LEVEL_3 + 2 * eight));
            const float radius_3 = radius * (eight ? angle_4.y : angle_4.x);
#pragma unroll
            for (int quad = 2 * eight; quad < 2 * eight + 2; quad++) {
                const float2 angle_2 = angle_of(tables, 2, low[group] >> (LEVEL_2 + 2 * quad));
                const float radius_2 = radius_3 * (quad & 1 ? angle_3.y : angle_3.x);
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    const float radius_1 = radius_2 * (pair ? angle_2.y : angle_2.x);
                    const u32 sector = sectors >> (8 * quad + 4 * pair) & 15;
                    const float2 direction = reinterpret_cast<const float2*>(tables + DIRECTIONS_AT)[sector];
                    quads[4 * group + quad][pair] =
                        pack_halves(nearest(__fmul_rn(radius_1, direction.x)), nearest(__fmul_rn(radius_1, direction.y)));
                }
            }
        }
    }
    split_factor(*reinterpret_cast<const float*>(tables + MANTISSAS_AT), power + exponent, factor, second_factor);
}
#endif

#ifdef ENCODER
#define TANGENT_OF_16TH 0.41421356f  // of a sixteenth turn

// The cell of the angle between energies a and b.
INLINE u32 cell_of(int level, float a, float b) {
    constexpr float bounds[3][3] = PAPER_BOUNDS;  // squared tangents
    return (b >= bounds[level - 2][0] * a) + (b >= bounds[level - 2][1] * a) + (b >= bounds[level - 2][2] * a);
}

// The sector, of sixteen, that a pair lies in: 0 or 1 in the first octant. Where y is above x, where x is negative, and where y
// is, the order of the first four, eight or sixteen sectors turns over.
INLINE u32 sector_of(float x, float y) {
    const float least = fminf(fabsf(x), fabsf(y)), most = fmaxf(fabsf(x), fabsf(y));
    u32 sector = (least >= TANGENT_OF_16TH * most && most > 0.0f) ^ (fabsf(y) > fabsf(x) ? 3 : 0);
    sector ^= bits_of(x) >> 31 ? 7 : 0;
    return sector ^ (bits_of(y) >> 31 ? 15 : 0);
}

INLINE void encode_row(const u8* tables, const Block& block, u32* stage, u16*, int tile_row, int quarter, float (*quads)[4],
                       const Energies& energies, float own, int exponent) {
    const int stored_exponent = radius_exponent(block);
    Writer out = {(u32)__cvta_generic_to_shared(stage), first_bit(tile_row, quarter)};
    const int power = -exponent - stored_exponent, half_power = power / 2;  // two factors: one may lie outside of float32
#pragma unroll
    for (int group = 0; group < GROUPS; group++) {
        const float energy = energies.of<16>(4 * group);
        const float radius = sqrtf(energy * (1.0f / ORDER)) * power_of_two(half_power) * power_of_two(power - half_power);
        u32 low = energy > LEAST_ENERGY ? half_bits(fminf(radius, LARGEST_HALF)) : 0;
        low |= cell_of(4, energies.of<8>(4 * group), energies.of<8>(4 * group + 2)) << LEVEL_4;
        u32 sectors = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int quad = 4 * group + i;
            if (i % 2 == 0) low |= cell_of(3, energies.of<4>(quad), energies.of<4>(quad + 1)) << (LEVEL_3 + i);
            low |= cell_of(2, energies.first[quad], energies.second[quad]) << (LEVEL_2 + 2 * i);
            sectors |= sector_of(quads[quad][0], quads[quad][1]) << (8 * i) |
                       sector_of(quads[quad][2], quads[quad][3]) << (8 * i + 4);
        }
        out.put(low | sectors << LEVEL_1, sectors >> (32 - LEVEL_1), GROUP_BITS);
    }
}
#endif
