// Law: the encoder of quads (SPEC 8): a lane finds the nearest points of the quads of its quarter of a row, and writes their
// numbers and signs into the warp's stage as the two planes have them; the row's radius waits for the block's end.
//
// A table's points are all permutations of some representatives, so the nearest point to a quad is that of the representative
// nearest to its sorted magnitudes. These are whole numbers of the table's unit. A cell of them, by the upper bits of each, has
// a few candidates: nearly always one of them is the nearest of all. Two quads are sorted together, as 16-bit halves.
//
// Needs INDEX_BITS (of a quad), INDEX_BYTES (of a row), CANDIDATES (of a cell, four at most), INVERSES (units of the table over
// a radius within its octave, braced, divided by ORDER), CHOICES (radii that are tried), MOST_RADIUS, ENERGY_SCALE (that makes
// the divisor of an energy, ORDER^3, a power of two), what radius.cuh needs,
// and the tables CELLS (numbers of representatives times STEP, a byte each), CORNERS (representatives, a byte for each
// magnitude, the largest first), NUMBERS (of points, by representative and places) and, with CHOICES, POINTS (a byte for each
// coordinate).
#pragma once

#include "bits.cuh"
#include "block_place.cuh"
#include "energies.cuh"
#include "radius.cuh"

// A tile in the stage: a radius a row, counted from below the least one, which is 1; signs; indices.
#define SIGN_WORDS (ROWS * ORDER / 32)
#define INDEX_WORDS (ROWS * INDEX_BYTES / 4)
#define SIGNS_AT ROWS  // words
#define INDICES_AT (SIGNS_AT + SIGN_WORDS)

#define FOURS ((QUADS + 3) / 4)  // of a lane's quads, the last of which may be two

#define BOTH(x) ((x) * 0x10001u)  // in both halves of a word

// -- two quads, sorted ----------------------------------------------------------------------------------------------
// A key is eight times a magnitude, which is 255 at most, plus twice the place where it was.
#define PLACE BOTH(6u)

INLINE void larger_first(u32& a, u32& b) {
    const u32 larger = __vmaxu2(a, b);
    b = __vminu2(a, b), a = larger;
}

// Keys of two quads times ``scale``, each largest first.
INLINE void sorted_keys(const float* quad, const float* other, float scale, u32* keys) {
    constexpr float magic = 8388608.0f;  // 2^23: a sum's low bits are the nearest whole number
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 both =
            __byte_perm(bits_of(fabsf(quad[i] * scale) + magic), bits_of(fabsf(other[i] * scale) + magic), 0x5410);
        keys[i] = __vminu2(both, BOTH(255)) * 8 + BOTH(2 * i);
    }
    larger_first(keys[0], keys[1]), larger_first(keys[2], keys[3]);
    larger_first(keys[0], keys[2]), larger_first(keys[1], keys[3]);
    larger_first(keys[1], keys[2]);
}

// Cells of two quads (quads_encoder.py), by levels of magnitudes, eight units wide.
INLINE u32 cells_of(const u32* keys) {
    const u32 first = __vminu2(keys[0], BOTH(0x3ffu)) & BOTH(0x3c0u);
    const u32 second = __vminu2(keys[1], BOTH(0x3ffu)) & BOTH(0x3c0u);
    const u32 third = __vminu2(keys[2], BOTH(0x1ffu)) & BOTH(0x1c0u), last = __vminu2(keys[3], BOTH(0xffu)) & BOTH(0xc0u);
    return first * 8 + (second >> 1) + (third * 4 + last >> 6);
}

INLINE u32 byte_of(u32 bytes, u32 which) { return __byte_perm(bytes, 0, 0x4440 | which); }

// The number of the point nearest to a quad: ``magnitudes``, a byte each, the largest first; ``places``: of the three largest,
// base 4, twice.
INLINE u32 nearest_point(const u8* tables, u32 cell, u32 magnitudes, u32 places) {
    const u32 candidates = reinterpret_cast<const u32*>(tables + CELLS_AT)[cell];
    int least = 0x7fffffff;
#pragma unroll
    for (int i = 0; i < CANDIDATES; i++) {
        const u32 corner = *reinterpret_cast<const u32*>(tables + CORNERS_AT + byte_of(candidates, i) * (4 / STEP));
        const int distance = __dp4a(corner, corner, 0u) - 2 * __dp4a(corner, magnitudes, 0u);  // less the magnitudes' square
        least = min(least, distance * 4 + i);
    }
    return *reinterpret_cast<const u16*>(tables + NUMBERS_AT + byte_of(candidates, least & 3) * (128 / STEP) + places);
}

// -- rows -----------------------------------------------------------------------------------------------------------
// What a row's coordinates, which were multiplied with 2^exponent, are multiplied with so that ``radius`` comes to the table's
// unit.
INLINE float scale_of(u32 radius, int exponent) {
    constexpr float inverses[] = INVERSES;
    const int steps = max(radius, 1u) - 1, power = RADIUS_BIAS - steps / RADIUS_STEPS - exponent;
    float inverse = inverses[0];
#pragma unroll
    for (int i = 1; i < RADIUS_STEPS; i++) inverse = steps % RADIUS_STEPS == i ? inverses[i] : inverse;
    return inverse * power_of_two(min(max(power, 1 - BIAS), BIAS));
}

// The numbers of the points nearest to two quads times ``scale``.
INLINE void two_points(const u8* tables, const float* quad, const float* other, float scale, u32* numbers) {
    u32 keys[4];
    sorted_keys(quad, other, scale, keys);
    const u32 cells = cells_of(keys);
    const u32 places = (keys[0] & PLACE) + (keys[1] & PLACE) * 4 + (keys[2] & PLACE) * 16;
    const u32 larger = __byte_perm(keys[0] >> 3, keys[1] >> 3, 0x6240);  // of both quads
    const u32 smaller = __byte_perm(keys[2] >> 3, keys[3] >> 3, 0x6240);
    numbers[0] = nearest_point(tables, cells & 0xffff, __byte_perm(larger, smaller, 0x5410), places & 0xffff);
    numbers[1] = nearest_point(tables, cells >> 16, __byte_perm(larger, smaller, 0x7632), places >> 16);
}

// The numbers of a lane's points, four quads' side by side; returns the squared error, where several radii are tried.
INLINE float find_points(const u8* tables, float (*quads)[4], float scale, u64* codes) {
    float error = 0.0f;
#pragma unroll
    for (int quad = 0; quad < QUADS; quad += 2) {
        u32 numbers[2];
        two_points(tables, quads[quad], quads[quad + 1], scale, numbers);
        if (quad % 4 == 0) codes[quad / 4] = 0;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            codes[quad / 4] |= (u64)numbers[i] << ((quad % 4 + i) * INDEX_BITS);
#if CHOICES > 1
            const u32 point = reinterpret_cast<const u32*>(tables + POINTS_AT)[numbers[i]];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float off = fabsf(quads[quad + i][k] * scale) - (float)(point >> 8 * k & 255);
                error = fmaf(off, off, error);
            }
#endif
        }
    }
    return error;
}

INLINE float sum_of_row(float x) {  // of the four lanes' numbers
    x += __shfl_xor_sync(ALL_LANES, x, 1);
    return x + __shfl_xor_sync(ALL_LANES, x, 2);
}

// The radius of a row, from a lane's part of its energy, as it is stored in the stage.
INLINE u32 radius_of_row(float own, int exponent) {
    return min(radius_code(sum_of_row(own) * ENERGY_SCALE, exponent), (u32)MOST_RADIUS);
}

// Adds a quad's signs to those of up to seven before it, each coordinate's apart.
INLINE void add_signs(const float* quad, u32* apart) {
#pragma unroll
    for (int i = 0; i < 4; i++) apart[i] = __funnelshift_l(bits_of(quad[i]), apart[i], 1);
}

// The signs of N quads of a row, from ``quad`` on, into the plane (SPEC 8.1), which held zeros: of eight quads a coordinate's
// side by side, the first quad's lowest. Two lanes' quads may lie in one word, and a lane's in two.
template <int N> INLINE void put_signs(const u32* apart, u32* stage, int tile_row, int quad) {
    const u32 turned = apart[3] | apart[1] << 8 | apart[2] << 16 | apart[0] << 24;
    const u32 signs = __brev(turned << (8 - N));
    u32* word = stage + SIGNS_AT + tile_row * (ORDER / 32) + quad / 8;
    if (QUADS % 8 == 0) {
        *word = signs;
    } else {
        const u32 address = (u32)__cvta_generic_to_shared(word), shift = quad % 8, below = 0x01010101u * ((1u << shift) - 1);
        Writer::add(address, signs << shift & ~below);
        if (8 % QUADS) Writer::add(address + 4, signs >> (8 - shift) & below);
    }
}

// The numbers of N of a lane's quads of a row, from ``quad`` on, into a plane that held zeros.
template <int N> INLINE void put_numbers(u64 numbers, u32* stage, int tile_row, int quarter, int quad) {
    const int bit = tile_row * 8 * INDEX_BYTES + (quarter * QUADS + quad) * INDEX_BITS;
    if (4 * INDEX_BITS == 32 && QUADS % 4 == 0) {
        stage[INDICES_AT + bit / 32] = (u32)numbers;
    } else {
        Writer out = {(u32)__cvta_generic_to_shared(stage + INDICES_AT), (u32)bit};
        if (N * INDEX_BITS > 32) out.put((u32)numbers, (u32)(numbers >> 32), N * INDEX_BITS);
        else out.put((u32)numbers, N * INDEX_BITS);
    }
}

INLINE void encode_row(const u8* tables, const Block& block, u32* stage, int tile_row, int quarter, float (*quads)[4],
                       const Energies& energies, float own, int exponent) {
    const u32 own_radius = radius_of_row(own, exponent);
    u32 radius = own_radius;
    u64 codes[FOURS];
#if CHOICES == 1
    find_points(tables, quads, scale_of(radius, exponent), codes);
#else
    float least = 3e38f;
#pragma unroll 1
    for (int choice = 0; choice < CHOICES; choice++) {
        const int step = (choice + 1) / 2 * (choice % 2 ? -1 : 1);  // 0, -1, 1, -2, 2
        const u32 tried = min(max((int)own_radius + step, 1), MOST_RADIUS);
        const float scale = scale_of(tried, exponent);
        u64 found[FOURS];
        const float error = sum_of_row(find_points(tables, quads, scale, found)) / (scale * scale);
        if (error < least) {
            least = error, radius = own_radius ? tried : 0;
#pragma unroll
            for (int i = 0; i < FOURS; i++) codes[i] = found[i];
        }
    }
#endif
    if (quarter == 0) stage[tile_row] = radius;
#pragma unroll
    for (int first = 0; first < QUADS; first += 8) {
        u32 apart[4] = {0, 0, 0, 0};
#pragma unroll
        for (int quad = first; quad < min(first + 8, QUADS); quad++) add_signs(quads[quad], apart);
        if (first + 8 <= QUADS) put_signs<8>(apart, stage, tile_row, quarter * QUADS + first);
        else put_signs<QUADS % 8>(apart, stage, tile_row, quarter * QUADS + first);
    }
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        if (4 * i + 4 <= QUADS) put_numbers<4>(codes[i], stage, tile_row, quarter, 4 * i);
        else put_numbers<QUADS % 4>(codes[i], stage, tile_row, quarter, 4 * i);
    }
}

#if WIDE
// -- two rows of a lane ---------------------------------------------------------------------------------------------
// Of a tile of sixteen rows, as mma has them, a lane holds rows l / 4 and l / 4 + 8: half as many products as for eight rows of
// two parts each. A panel's quads are coded as soon as they are rotated, for a row's energy is that of its channels.

#define UNROLLED (STREAMED ? 2 : PANELS)  // panels: an even number of them, if they are streamed

// Two rows' bits, in a stage that held zeros. ``stored`` [2][PIECES][4]: a lane's channels as they are multiplied, times
// 2^exponent each; ``own``: their energies.
INLINE void encode_two_rows(const u8* tables, u32* stage, int tile_row, int quarter, u32 (*stored)[PIECES][4],
                            const float* own, const int* exponents, Panels& panels) {
    float scale[2];
    u32 operands[2 * PIECES][4], apart[2][4];
    u64 codes[2];
#pragma unroll
    for (int part = 0; part < 2; part++) {
        const u32 radius = radius_of_row(own[part], exponents[part]);
        scale[part] = scale_of(radius, exponents[part]);
        if (quarter == 0) stage[tile_row + 8 * part] = radius;
#pragma unroll
        for (int i = 0; i < 4 * PIECES; i++) operands[i / 2][i % 2 * 2 + part] = stored[part][i / 4][i % 4];
    }
    Sum both_sums[2][STRIPS][4];
    begin_together<false>(panels.first(), operands, both_sums[0]);
#pragma unroll 1
    for (int first = 0; first < PANELS; first += UNROLLED)
#pragma unroll
        for (int i = 0; i < UNROLLED; i++) {
            const int panel = first + i;
            Sum(*sums)[4] = both_sums[i % 2];
            const u32 next = panels.next(panel);
            if (panel + 1 < PANELS) {  // on its way while this one's quads are coded
                begin_together<false>(next, operands, both_sums[(i + 1) % 2]);
                wait_together<false, 1>(sums);
            } else {
                wait_together<false, 0>(sums);
            }
#pragma unroll
            for (int part = 0; part < 2; part++) {
                float quads[2][4];
                u32 numbers[2];
                if (panel % 4 == 0)
#pragma unroll
                    for (int k = 0; k < 4; k++) apart[part][k] = 0;
#pragma unroll
                for (int k = 0; k < 8; k++) quads[k / 4][k % 4] = sums[k / 2][2 * part + k % 2];
                add_signs(quads[0], apart[part]), add_signs(quads[1], apart[part]);
                two_points(tables, quads[0], quads[1], scale[part], numbers);
                const u64 both = numbers[0] | (u64)numbers[1] << INDEX_BITS;
                codes[part] = i % 2 ? codes[part] | both << (2 * INDEX_BITS) : both;
                if (i % 2) put_numbers<4>(codes[part], stage, tile_row + 8 * part, quarter, 2 * panel - 2);
                else if (panel == PANELS - 1) put_numbers<2>(codes[part], stage, tile_row + 8 * part, quarter, 2 * panel);
                const int quad = quarter * QUADS + panel / 4 * 8;
                if (panel % 4 == 3) put_signs<8>(apart[part], stage, tile_row + 8 * part, quad);
                else if (panel == PANELS - 1) put_signs<QUADS % 8>(apart[part], stage, tile_row + 8 * part, quad);
            }
        }
}
#endif
