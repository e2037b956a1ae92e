// Law: the split coding's decoder (SPEC 6.3 to 6.5): a lane walks down its quarter of a row's tree, to the coordinates of its
// quads.
//
// Nodes, and quads, that stand side by side are decoded side by side, because each of them waits for its look-ups.
//
// Needs what split.cuh and radius.cuh need; ROOT_BUDGET (bits of the tree), GRID (the norm of a row's coordinates), CODES_ROW
// (entries of a level in NODES), CIRCLE (directions), PHASE_SHIFT, TABLE_BITS (of the largest quads that are looked up whole;
// 0: none are); and the tables NODES, BUDGETS, RECORDS, CIRCLE and, with TABLE_BITS, CODES and POINTS.
#pragma once

#include "bits.cuh"
#include "block_place.cuh"
#include "radius.cuh"
#include "split.cuh"

// The norm of a row's coordinates is GRID, 2,048, and a little more by their rounding. One round of the rotation makes sums of
// at most sqrt(ORDER) times the norm: less than 362 ORDER, for the norm is below 362 sqrt(64). Two rounds make sums of at most
// ORDER times the norm.
#define LARGEST_SUM ((ROUNDS == 1 ? 362.0f : 2 * GRID) * ORDER)

// -- nodes ----------------------------------------------------------------------------------------------------------
struct Node {
    u32 bit;  // the first of its run
    int budget;
    float radius;
};

// What a node's angle means.
struct Angle {
    u32 factors;  // of the children's radii: cos and sin, packed
    int shift;    // of the left child's share

    INLINE float cos() const { return half_values(factors).x; }
    INLINE float sin() const { return half_values(factors).y; }
};

// The angle in the first ``width`` bits of a node's window.
template <int N> INLINE Angle angle_of(const u8* tables, u32 window, int width) {
    constexpr int level = level_of(N);
    const u32 one = 1u << width;
    const uint2 entry = reinterpret_cast<const uint2*>(tables + NODES_AT)[level * CODES_ROW + ((window & (one - 1)) | one)];
    return {entry.x, (int)entry.y};
}

// Replaces a node by one of its children.
template <int N> INLINE void descend(const u8* tables, u32 words, Node& node, bool right) {
    const int width = width_of<N>(node.budget);
    const Angle angle = angle_of<N>(tables, window(words, node.bit), width);
    const int rest = node.budget - width, share = share_of<N / 2>(rest, angle.shift);
    node.radius *= right ? angle.sin() : angle.cos();
    node.budget = right ? rest - share : share;
    node.bit += right ? width + share : width;
}

// Both children of COUNT nodes.
template <int N, int COUNT> INLINE void split(const u8* tables, u32 words, const Node* nodes, Node* children) {
    int width[COUNT];
    Angle angle[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        width[i] = width_of<N>(nodes[i].budget);
        angle[i] = angle_of<N>(tables, window(words, nodes[i].bit), width[i]);
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const int rest = nodes[i].budget - width[i], share = share_of<N / 2>(rest, angle[i].shift);
        const u32 bit = nodes[i].bit + width[i];
        children[2 * i] = {bit, share, nodes[i].radius * angle[i].cos()};
        children[2 * i + 1] = {bit + share, rest - share, nodes[i].radius * angle[i].sin()};
    }
}

// -- quads (SPEC 6.4) -----------------------------------------------------------------------------------------------
// A quad's point at radius 1: two pairs of coordinates.
struct Point {
    float2 first, second;
};

// The middle of a sector, plus half a direction, in directions times 2^PHASE_SHIFT. ``half_width``: of the circle's sectors.
INLINE u32 middle_of(u32 sector, u32 half_width) { return (2 * sector + 1) * half_width + (1u << (PHASE_SHIFT - 1)); }

INLINE u32 direction_at(const u8* tables, u32 middle) {  // cos and sin, packed
    return *reinterpret_cast<const u32*>(tables + CIRCLE_AT + (middle >> (PHASE_SHIFT - 2) & ((CIRCLE - 1) << 2)));
}

// The points of COUNT quads. x div n is the upper word of (2 x + 1) times n's magic number, shifted.
template <int COUNT> INLINE void find_points(const u8* tables, const u32* codes, const int* budgets, Point* points) {
    u32 left[COUNT];  // of a code, without the cell
    uint4 record[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        // Of a budget: the magic number of a cell's codes; a shift, and from bit 16 on the last cell; -codes; the first record.
        const uint4 cells = reinterpret_cast<const uint4*>(tables + BUDGETS_AT)[budgets[i]];
        const u32 code = codes[i] & ((1u << budgets[i]) - 1);
        const u32 cell = min(__funnelshift_r(__umulhi(2 * code + 1, cells.x), 0, cells.y), cells.y >> 16);
        record[i] = reinterpret_cast<const uint4*>(tables + RECORDS_AT)[cells.w + cell];
        left[i] = code + cell * cells.z;
    }
    u32 direction[COUNT][2];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        // Of a cell: the magic number of n_b, the second circle's sectors; half the width of each circle's sectors, whose five
        // upper bits reach no direction, and hold the lower and the upper five bits of -n_b; the two pairs' factors.
        const u32 minus_n_b = __funnelshift_l(record[i].y, (int)record[i].z >> 27, 5);
        const u32 sector = __umulhi(2 * left[i] + 1, record[i].x);
        const u32 first = middle_of(sector, record[i].y), second = middle_of(left[i] + sector * minus_n_b, record[i].z);
        direction[i][0] = direction_at(tables, first);
        direction[i][1] = direction_at(tables, second);
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float2 factors = half_values(record[i].w);
        const float2 first = half_values(direction[i][0]), second = half_values(direction[i][1]);
        points[i] = {make_float2(__fmul_rn(factors.x, first.x), __fmul_rn(factors.x, first.y)),
                     make_float2(__fmul_rn(factors.y, second.x), __fmul_rn(factors.y, second.y))};
    }
}

#if TABLE_BITS
// Where the two pairs of a quad's point stand in POINTS, 16 bits each. For a quad of more than TABLE_BITS they are another's.
INLINE u32 point_places(const u8* tables, u32 code, int budget) {
    const u32 one = 1u << budget;
    return reinterpret_cast<const u32*>(tables + CODES_AT)[min((code & (one - 1)) | one, (2u << TABLE_BITS) - 1)];
}

INLINE Point point_at(const u8* tables, u32 places) {
    return {*reinterpret_cast<const float2*>(tables + POINTS_AT + (places & 0xffff)),
            *reinterpret_cast<const float2*>(tables + POINTS_AT + (places >> 16))};
}
#endif

// A quad's coordinates, rounded to whole numbers: two registers of the rotation's operands.
INLINE void quad_operands(Point point, float radius, u32* operands) {
#if ROUNDS == 2
    const u32 sums[4] = {bits_of(__fadd_rn(__fmul_rn(radius, point.first.x), BYTES_MAGIC)),
                         bits_of(__fadd_rn(__fmul_rn(radius, point.first.y), BYTES_MAGIC)),
                         bits_of(__fadd_rn(__fmul_rn(radius, point.second.x), BYTES_MAGIC)),
                         bits_of(__fadd_rn(__fmul_rn(radius, point.second.y), BYTES_MAGIC))};
    split_bytes(sums, operands);
#else
    operands[0] = pack_halves(nearest(__fmul_rn(radius, point.first.x)), nearest(__fmul_rn(radius, point.first.y)));
    operands[1] = pack_halves(nearest(__fmul_rn(radius, point.second.x)), nearest(__fmul_rn(radius, point.second.y)));
#endif
}

// -- the tree -------------------------------------------------------------------------------------------------------
// Two nodes of eight coordinates, and their four quads. A node's angle and quads are at most 56 bits side by side.
INLINE void decode_eights(const u8* tables, u32 words, const Node* nodes, u32 (*quads)[2]) {
    u32 low[2], high[2];
    int width[2];
    Angle angle[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        wide_window(words, nodes[i].bit, low[i], high[i]);
        width[i] = width_of<8>(nodes[i].budget);
        angle[i] = angle_of<8>(tables, low[i], width[i]);
    }
    u32 code[4];
    int budget[4];
    float radius[4];
    Point point[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int rest = nodes[i].budget - width[i];
        budget[2 * i] = share_of<4>(rest, angle[i].shift), budget[2 * i + 1] = rest - budget[2 * i];
        code[2 * i] = __funnelshift_r(low[i], high[i], width[i]);
        code[2 * i + 1] = __funnelshift_r(code[2 * i], high[i] >> width[i], budget[2 * i]);
        radius[2 * i] = nodes[i].radius * angle[i].cos(), radius[2 * i + 1] = nodes[i].radius * angle[i].sin();
    }
#if TABLE_BITS
    u32 places[4];
#pragma unroll
    for (int i = 0; i < 4; i++) places[i] = point_places(tables, code[i], budget[i]);
#pragma unroll
    for (int i = 0; i < 4; i++) point[i] = point_at(tables, places[i]);
    if (max(max(budget[0], budget[1]), max(budget[2], budget[3])) > TABLE_BITS)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (budget[i] > TABLE_BITS) find_points<1>(tables, code + i, budget + i, point + i);
#else
    find_points<4>(tables, code, budget, point);
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) quad_operands(point[i], radius[i], quads[i]);
}

// Everything below a node of N coordinates.
template <int N> INLINE void decode_subtree(const u8* tables, u32 words, const Node& node, u32 (*quads)[2]) {
    if constexpr (N == 16) {
        Node eights[2];
        split<16, 1>(tables, words, &node, eights);
        decode_eights(tables, words, eights, quads);
    } else if constexpr (N == 32) {
        Node sixteens[2], eights[4];
        split<32, 1>(tables, words, &node, sixteens);
        split<16, 2>(tables, words, sixteens, eights);
        decode_eights(tables, words, eights, quads);
        decode_eights(tables, words, eights + 2, quads + 4);
    } else {
        Node children[2];
        split<N, 1>(tables, words, &node, children);
        decode_subtree<N / 2>(tables, words, children[0], quads);
        decode_subtree<N / 2>(tables, words, children[1], quads + N / 8);
    }
}

// -- a row (coding.cuh) ---------------------------------------------------------------------------------------------
INLINE void decode_row(const u8* tables, const Block& block, const u32* stage, int tile_row, int quarter, u32 (*quads)[2],
                       float& factor, float& second_factor) {
    const u32 words = (u32)__cvta_generic_to_shared(stage + tile_row * STRIDE_WORDS);
    radius_factors(tables, word_at(words) & ((1u << RADIUS_BITS) - 1), factor, second_factor);
    Node node = {RADIUS_BITS, ROOT_BUDGET, GRID};
    descend<ORDER>(tables, words, node, quarter & 2);
    descend<ORDER / 2>(tables, words, node, quarter & 1);
    decode_subtree<ORDER / 4>(tables, words, node, quads);
}
