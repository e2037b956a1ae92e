// Law: the split coding's encoder (SPEC 6.3, 6.4, 10): a lane finds the angles and codes of its quarter of a row's tree, and
// writes them.
//
// An encoder may choose another cell than the nearest: what is found here is good to float32. Nodes, and quads, that stand side
// by side are done side by side, because each of them waits for its look-ups.
//
// Needs what split.cuh and radius.cuh need; SQUARED_STRETCH (of a radius that keeps the norm), ROOT_BUDGET, CODES_ROW,
// BOUNDS_ROW, COARSE_GRID, FINE_GRID (places of sin^2), LOOK_UP_BYTES (of a row), LOOK_UP_ROWS (a level's first row,
// braced), LOOK_UP_ROW_16 (the first row of 16 coordinates); and the tables LOOK_UPS, BOUNDS, SHIFTS, SHIFTS_16, CELLS,
// BUDGETS, SECTORS.
#pragma once

#include "bits.cuh"
#include "block_place.cuh"
#include "energies.cuh"
#include "radius.cuh"
#include "split.cuh"

// -- quotients and angles -------------------------------------------------------------------------------------------
INLINE float inverse(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The place of b's share of the energy a + b on a grid of sin^2; a is not 0. The product is rounded down as a subnormal number,
// whose bits are the whole number: float_of(1) is the smallest of them.
INLINE u32 place_of(float a, float b, float grid) { return bits_of(__fmul_rd(b * inverse(a + b), grid * float_of(1))); }

// The angle of (x, y) in turns, -1/8 .. 7/8: a polynomial, good to 2e-8; negative angles are a turn too small. NaN at (0, 0).
INLINE float turns_of(float x, float y) {
    const bool steep = fabsf(y) > fabsf(x);
    const float top = steep ? -x : y, bottom = steep ? y : x;
    float slope;  // where the divisor is too small to be normal, so is the dividend, and is 0 here
    asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(slope) : "f"(top), "f"(inverse(bottom)));
    const float square = slope * slope;
    float turns = fmaf(-0.00074305835f, square, 0.00384616872f);
    turns = fmaf(turns, square, -0.00944856755f);
    turns = fmaf(turns, square, 0.0157660429f);
    turns = fmaf(turns, square, -0.0223080879f);
    turns = fmaf(turns, square, 0.0317820252f);
    turns = fmaf(turns, square, -0.0530494615f);
    turns = fmaf(turns, square, 0.159154927f);
    turns *= slope;
    if (steep) turns += 0.25f;
    if (bottom < 0.0f) turns += 0.5f;
    return turns;
}

// The sector, of ``count``, that an angle in turns lies in; 0 if there is no angle.
INLINE u32 sector_of(float turns, u32 count) {
    const u32 sector = __float2int_rd(turns * (float)(u16)count);
    return min(sector, sector + count);  // a negative one gets a turn
}

// -- nodes ----------------------------------------------------------------------------------------------------------
struct Angle {
    u32 code;
    int width;
    int left, right;  // budgets of the children
};

// The angles of COUNT nodes whose children have the energies a and b.
template <int N, int COUNT>
INLINE void find_angles(const u8* tables, const float* a, const float* b, const int* budgets, Angle* angles) {
    constexpr int first_rows[] = LOOK_UP_ROWS, first_row = first_rows[level_of(N)];
    int shift[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        angles[i].width = width_of<N>(budgets[i]);
        const u8* look_up = tables + LOOK_UPS_AT + (first_row + angles[i].width) * LOOK_UP_BYTES;
        if constexpr (N <= 16) {  // the place finds the code, and the shift as well
            constexpr int TO_SHIFTS = SHIFTS_16_AT - LOOK_UPS_AT - LOOK_UP_ROW_16 * LOOK_UP_BYTES;
            const u32 place = place_of(a[i], b[i], COARSE_GRID);
            angles[i].code = look_up[place];
            shift[i] = reinterpret_cast<const signed char*>(look_up + TO_SHIFTS)[place];
        } else {  // the look-up is coarser than places: one more cell may begin before this one
            const u32 place = place_of(a[i], b[i], FINE_GRID);
            u32 code = look_up[place / (FINE_GRID / COARSE_GRID)];
            const u16* bounds = reinterpret_cast<const u16*>(tables + BOUNDS_AT) + (first_row + angles[i].width) * BOUNDS_ROW;
            code += bounds[1 + code] <= place;
            const signed char* shifts = reinterpret_cast<const signed char*>(tables + SHIFTS_AT) + level_of(N) * CODES_ROW;
            shift[i] = shifts[(1 << angles[i].width) + code];
            angles[i].code = code;
        }
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const int rest = budgets[i] - angles[i].width;
        angles[i].left = share_of<N / 2>(rest, shift[i]);
        angles[i].right = rest - angles[i].left;
    }
}

// -- quads ----------------------------------------------------------------------------------------------------------
// The codes of COUNT quads, from the quad ``first`` on.
template <int COUNT>
INLINE void find_codes(const u8* tables, float (*quads)[4], const Energies& energies, int first, const int* budgets,
                       u32* codes) {
    u32 cell[COUNT], sectors[COUNT];  // sectors: of the first circle, and from bit 16 on of the second
    uint2 cells[COUNT];               // of a budget: codes of a cell, the first record
    float turns[COUNT][2];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const u32 place = place_of(energies.first[first + i], energies.second[first + i], COARSE_GRID);
        cell[i] = (tables + CELLS_AT)[budgets[i] * LOOK_UP_BYTES + place];
        cells[i] = reinterpret_cast<const uint2*>(tables + BUDGETS_AT)[budgets[i]];
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float* quad = quads[first + i];
        turns[i][0] = turns_of(quad[0], quad[1]), turns[i][1] = turns_of(quad[2], quad[3]);
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) sectors[i] = reinterpret_cast<const u32*>(tables + SECTORS_AT)[cells[i].y + cell[i]];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const u32 first_sector = sector_of(turns[i][0], sectors[i] & 0xffff);
        const u32 second_sector = sector_of(turns[i][1], sectors[i] >> 16);
        codes[i] = cell[i] * cells[i].x + (first_sector * (sectors[i] >> 16) + second_sector);
    }
}

// -- the tree -------------------------------------------------------------------------------------------------------
// Two nodes of eight coordinates and their four quads, from ``quad`` on. ``before``: an angle that is written first.
INLINE void encode_eights(const u8* tables, Writer& out, float (*quads)[4], const Energies& energies, int quad,
                          const int* budgets, u32 before, int before_width) {
    const float a[2] = {energies.of<4>(quad), energies.of<4>(quad + 2)};
    const float b[2] = {energies.of<4>(quad + 1), energies.of<4>(quad + 3)};
    Angle angle[2];
    find_angles<8, 2>(tables, a, b, budgets, angle);
    const int of_quads[4] = {angle[0].left, angle[0].right, angle[1].left, angle[1].right};
    u32 codes[4];
    find_codes<4>(tables, quads, energies, quad, of_quads, codes);
#pragma unroll
    for (int i = 0; i < 2; i++) {  // 64 bits: a node's angle and two quads are 56 at most, the angle before them is seven
        u32 low = codes[2 * i] | codes[2 * i + 1] << angle[i].left, high = __funnelshift_l(codes[2 * i + 1], 0, angle[i].left);
        high = __funnelshift_l(low, high, angle[i].width), low = low << angle[i].width | angle[i].code;
        if (i == 0) high = __funnelshift_l(low, high, before_width), low = low << before_width | before;
        out.put(low, high, budgets[i] + (i == 0 ? before_width : 0));
    }
}

// A node of N coordinates, from ``quad`` on, and everything below it.
template <int N>
INLINE void encode_subtree(const u8* tables, Writer& out, float (*quads)[4], const Energies& energies, int quad, int budget) {
    const float a = energies.of<N / 2>(quad), b = energies.of<N / 2>(quad + N / 8);
    Angle angle;
    find_angles<N, 1>(tables, &a, &b, &budget, &angle);
    if constexpr (N == 16) {
        const int of_eights[2] = {angle.left, angle.right};
        encode_eights(tables, out, quads, energies, quad, of_eights, angle.code, angle.width);
    } else {
        out.put(angle.code, angle.width);
        if constexpr (N == 32) {
            const float as[2] = {energies.of<8>(quad), energies.of<8>(quad + 4)};
            const float bs[2] = {energies.of<8>(quad + 2), energies.of<8>(quad + 6)};
            const int of_sixteens[2] = {angle.left, angle.right};
            Angle sixteens[2];
            find_angles<16, 2>(tables, as, bs, of_sixteens, sixteens);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int of_eights[2] = {sixteens[i].left, sixteens[i].right};
                encode_eights(tables, out, quads, energies, quad + 4 * i, of_eights, sixteens[i].code, sixteens[i].width);
            }
        } else {
            encode_subtree<N / 2>(tables, out, quads, energies, quad, angle.left);
            encode_subtree<N / 2>(tables, out, quads, energies, quad + N / 8, angle.right);
        }
    }
}

// -- a row (coding.cuh) ---------------------------------------------------------------------------------------------
// All four lanes find the angles of the root and of their half. The first lane writes the radius and both angles, the third one
// the angle of its half, the others none; each writes its quarter.
INLINE void encode_row(const u8* tables, const Block& block, u32* stage, u16*, int tile_row, int quarter, float (*quads)[4],
                       const Energies& energies, float own, int exponent) {
    const float beside = __shfl_xor_sync(ALL_LANES, own, 1);  // of the other quarter of the lane's half
    const float half = own + beside;
    const float far = __shfl_xor_sync(ALL_LANES, half, 2);  // of the other half
    // The left and right child of the root, and of the lane's half.
    const float left[2] = {quarter & 2 ? far : half, quarter & 1 ? beside : own};
    const float right[2] = {quarter & 2 ? half : far, quarter & 1 ? own : beside};
    const int root_budget = ROOT_BUDGET;
    Angle root, next;
    find_angles<ORDER, 1>(tables, left, right, &root_budget, &root);
    const int half_budget = quarter & 2 ? root.right : root.left;
    find_angles<ORDER / 2, 1>(tables, left + 1, right + 1, &half_budget, &next);
    Writer out = {(u32)__cvta_generic_to_shared(stage + tile_row * STRIDE_WORDS), 0};
    const u32 head = radius_code((half + far) * SQUARED_STRETCH, exponent) | root.code << RADIUS_BITS;
    const int head_width = RADIUS_BITS + root.width;
    const u32 value = quarter & 1 ? 0 : quarter & 2 ? next.code : head | next.code << head_width;
    out.bit = quarter & 2 ? head_width + root.left : 0;
    out.put(value, quarter & 2 ? next.width : head_width + next.width);
    out.bit += quarter & 1 ? next.left : 0;
    encode_subtree<ORDER / 4>(tables, out, quads, energies, 0, quarter & 1 ? next.right : next.left);
}
