// Law: the encoder of quads (SPEC 8): a lane finds the nearest points of the quads of its quarter of a row, and writes their
// numbers and signs into the warp's stage as the two planes have them; the row's radius waits for the block's end.
//
// A table's points are all permutations of some representatives, so the nearest point to a quad is that of the representative
// nearest to its sorted magnitudes. These are whole numbers of STEPS. A cell of them, by the upper bits of each, has a few
// candidates: nearly always one of them is the nearest of all. Two quads are sorted together, as 16-bit halves.
//
// Needs INDEX_BITS (of a quad), INDEX_BYTES (of a row), CANDIDATES (of a cell, four at most; two are looked up together), STEPS
// (of a magnitude), INVERSE (what a coordinate over the radius is multiplied with to make STEPS a half, over ORDER), UNIT (the
// same of the table's unit), CELL_BYTES, LARGER_LEVELS (bits that tell levels of the two larger magnitudes), LARGEST_WEIGHT,
// SECOND_WEIGHT, THIRD_WEIGHT and LAST_WEIGHT (of magnitudes in a cell's place), FIRST_BITS, PATTERN_AT, SCORE_AT, COPIES and
// GROUP_COPIES (of the tables below), CHOICES (radii that are tried), MOST_RADIUS, ENERGY_SCALE (that makes the divisor of an
// energy, ORDER^3, a power of two), what radius.cuh needs, and the tables of quads_encoder.py: CELLS, GROUPS and HEADS or
// CORNERS, RANKS and, with CHOICES, POINTS. A lane has its own copies of what it looks up at random places, so that it meets no
// other one in a bank.
#pragma once

#include "bits.cuh"
#include "block_place.cuh"
#include "energies.cuh"
#include "radius.cuh"

// A tile in the stage: signs; indices, from word SIGN_WORDS on.
#define SIGN_WORDS (ROWS * ORDER / 32)
#define INDEX_WORDS (ROWS * INDEX_BYTES / 4)

// Bits of the stage that a lane stores at once, where its numbers of a row fill whole ones; 0 where it adds bits to zeros.
#if QUADS * INDEX_BITS % 64 == 0 && 64 % (4 * INDEX_BITS) == 0
#define STORE_BITS 64
typedef u64 Store;
#elif QUADS * INDEX_BITS % 32 == 0
#define STORE_BITS 32
typedef u32 Store;
#elif QUADS * INDEX_BITS % 16 == 0
#define STORE_BITS 16
typedef u16 Store;
#else
#define STORE_BITS 0
#endif
#define STORED (STORE_BITS && (QUADS % 8 == 0 || FACTORS))  // so are all words of the stage, signs too

#define FOURS ((QUADS + 3) / 4)  // of a lane's quads, the last of which may be two

#ifndef GROUPS_AT
#define GROUPS_AT CELLS_AT  // groups lie among the cells
#endif

#define OWN_COPIES (CANDIDATES == 2 ? GROUP_COPIES : COPIES)  // of a group's words, or of a corner's

#define BOTH(x) ((x) * 0x10001u)  // in both halves of a word

// -- two quads, sorted ----------------------------------------------------------------------------------------------
// A key's high byte is a magnitude, of STEPS steps at the most. Its low byte is the place where the magnitude was, three times:
// in bits 0, 2 and 4.
#define PLACE_THRICE 0x15

INLINE void larger_first(u32& a, u32& b) {
    const u32 larger = __vmaxu2(a, b);
    b = __vminu2(a, b), a = larger;
}

INLINE void sort(u32* keys) {  // of two quads, each largest first
    larger_first(keys[0], keys[1]), larger_first(keys[2], keys[3]);
    larger_first(keys[0], keys[2]), larger_first(keys[1], keys[3]);
    larger_first(keys[1], keys[2]);
}

// Keys of two quads, each largest first. ``scale``: what makes STEPS a half. Of a float32 between a half and one, byte 2 tells
// by how many steps it is above a half, and byte 3 is 0x3f, as place 3 has it.
INLINE void sorted_keys(const float* quad, const float* other, float scale, u32* keys) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float one = __saturatef(fmaf(fabsf(quad[i]), scale, 0.5f + 0.25f / STEPS));
        const float two = __saturatef(fmaf(fabsf(other[i]), scale, 0.5f + 0.25f / STEPS));
        keys[i] = __byte_perm(bits_of(one), bits_of(two), 0x6723) - BOTH((3 - i) * PLACE_THRICE);
    }
    sort(keys);
}

#if HALF_SUMS
// The same of quads in float16: a coordinate of both is a word of ``quads``, and ``scale`` is there twice. A float16 between four
// and four and a half is so many times 2^-8 above four as its low byte says; its high byte is 0x44.
INLINE void sorted_keys(const u32* quads, u32 scale, u32* keys) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 steps;
        asm("{.reg .b32 x; abs.f16x2 x, %1; fma.rn.sat.f16x2 x, x, %2, %3; add.rn.f16x2 %0, x, %4;}"
            : "=r"(steps)
            : "r"(quads[i]), "r"(scale), "r"(BOTH(0x3800)), "r"(BOTH(0x4300)));
        keys[i] = (steps << 8) + (BOTH(i * PLACE_THRICE) - (0x44u << 16));
    }
    sort(keys);
}

typedef u32 Scale;  // twice a float16, and finite, as sums are: their products are numbers
INLINE Scale as_scale(float x) { return pack_halves(fminf(x, LARGEST_HALF), fminf(x, LARGEST_HALF)); }
#else
typedef float Scale;
INLINE Scale as_scale(float x) { return x; }
#endif

// The bits of ``one`` where ``mask`` has ones, else those of ``other``.
INLINE u32 either(u32 mask, u32 one, u32 other) { return (one & mask) | (other & ~mask); }

// Where the cells of two quads lie (quads_encoder.py), in bytes, by levels of their magnitudes. ``larger``: the largest and the
// second magnitude of each.
INLINE void cells_of(const u32* keys, u32 larger, u32* cells) {
    const u32 third = __vminu2(keys[2], BOTH(0x3fffu)) >> (CELL_BYTES == 4 ? 1 : 2), last = __vminu2(keys[3], BOTH(0x1fffu));
    const u32 levels = larger & LARGER_LEVELS;
    const u32 others = __byte_perm(third, last, 0x7351) & BOTH(0x1800u | 7 * CELL_BYTES);
    constexpr u32 weights = LARGEST_WEIGHT | SECOND_WEIGHT << 16, other_weights = THIRD_WEIGHT | LAST_WEIGHT << 16;
    cells[0] = __dp2a_lo(other_weights, others, __dp2a_lo(weights, levels, 0u));
    cells[1] = __dp2a_hi(other_weights, others, __dp2a_hi(weights, levels, 0u));
}

// The sum of products of signed bytes with unsigned ones.
INLINE int dot_signed(u32 signed_bytes, u32 bytes) {
    int sum;
    asm("dp4a.s32.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(signed_bytes), "r"(bytes), "r"(0));
    return sum;
}

// A candidate's word plus its score: half its squared distance, less what all candidates of a cell have alike.
INLINE int scored(u32 apart, u32 word, u32 magnitudes) {
    return (int)(word - ((u32)dot_signed(apart, magnitudes) << SCORE_AT));
}

// The word of the representative nearest to a quad: ``magnitudes`` a byte each, the largest first; ``own``: where a lane's
// copies lie.
INLINE u32 nearest_corner(const u8* tables, u32 cell, u32 magnitudes, u32 own) {
#if CELL_BYTES == 4
    const u32 found = *reinterpret_cast<const u32*>(tables + CELLS_AT + cell);
#else
    const u32 head = *reinterpret_cast<const u16*>(tables + CELLS_AT + cell);
    const u32 found = *reinterpret_cast<const u32*>(tables + HEADS_AT + head);
#endif
#if CANDIDATES == 2
    const uint2 second = *reinterpret_cast<const uint2*>(tables + GROUPS_AT + (found & 0xffffu | own));
    return min((int)(found >> 16), scored(second.x, second.y, magnitudes));
#else
    int least = 0x7fffffff;
#pragma unroll
    for (int i = 0; i < CANDIDATES; i++) {
        const u32 at = COPIES == 32 ? __byte_perm(found, own, 0x5504 | i << 4)
                                    : __byte_perm(found, 0, 0x4440 | i) * (8 * COPIES) + own;
        const uint2 corner = *reinterpret_cast<const uint2*>(tables + CORNERS_AT + at);
        least = min(least, scored(corner.x, corner.y, magnitudes));
    }
    return least;
#endif
}

// -- rows -----------------------------------------------------------------------------------------------------------
// What a row's coordinates, which were multiplied with 2^exponent, are multiplied with so that ``radius`` comes to the table's
// unit.
INLINE float scale_of(u32 radius, int exponent) {
    const u32 steps = max(radius, 1u) - 1;
    const int power = RADIUS_BIAS - (int)(steps / RADIUS_STEPS) - exponent;
    float step;  // 2^(-steps / RADIUS_STEPS), of the steps within an octave
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(step) : "f"((steps % RADIUS_STEPS) * (-1.0f / RADIUS_STEPS)));
    return step * INVERSE * power_of_two(min(max(power, 1 - BIAS), BIAS));
}

// The numbers of the points nearest to two quads, of which these are the sorted keys, a half word each; of INDEX_BITS 8 with
// other bits above them.
INLINE u32 two_points(const u8* tables, const u32* keys, u32 lane) {
    const u32 larger = __byte_perm(keys[0], keys[1], 0x7351), smaller = __byte_perm(keys[2], keys[3], 0x7351);  // of both quads
    const u32 magnitudes[2] = {__byte_perm(larger, smaller, 0x5410), __byte_perm(larger, smaller, 0x7632)};
    u32 cells[2];
    cells_of(keys, larger, cells);
    const u32 own = lane % OWN_COPIES * 8;
    const u32 one = nearest_corner(tables, cells[0], magnitudes[0], own);
    const u32 two = nearest_corner(tables, cells[1], magnitudes[1], own);
    const u32 both = __byte_perm(one, two, 0x5410);
    // How far behind its representative's first point a point is: by the pattern of its representative, and its places.
    const u32 places = either(BOTH(0x0cu), keys[1], keys[2]) & BOTH(0x3cu);
    const u32 at = places * COPIES + BOTH(lane % COPIES * 4) | keys[0] & BOTH(0x03u);
    const u32 ranks = (both & BOTH(7u << PATTERN_AT)) / ((1u << PATTERN_AT) / (64 * COPIES)) | at;
    const u32 rank = tables[RANKS_AT + ranks % (1 << 16)], other_rank = tables[RANKS_AT + (ranks >> 16)];
    return (INDEX_BITS == 8 ? both : both & BOTH((1u << FIRST_BITS) - 1)) + (other_rank * (1 << 16) + rank);
}

// The same of two quads times ``scale``.
INLINE u32 two_points(const u8* tables, const float* quad, const float* other, float scale, u32 lane) {
    u32 keys[4];
    sorted_keys(quad, other, scale, keys);
    return two_points(tables, keys, lane);
}

#if HALF_SUMS
INLINE u32 two_points(const u8* tables, const u32* quads, Scale scale, u32 lane) {
    u32 keys[4];
    sorted_keys(quads, scale, keys);
    return two_points(tables, keys, lane);
}
#endif

// The number of the point nearest to the first or the second of two quads, whose numbers two_points found.
INLINE u32 number_of(u32 both, int which) { return both >> 16 * which & ((1 << INDEX_BITS) - 1); }

// Numbers of two quads, and of four, side by side.
INLINE u32 side_by_side(u32 both) {
    if (INDEX_BITS == 8) return __byte_perm(both, 0, 0x4420);
    return both - (both >> 16) * ((1 << 16) - (1 << INDEX_BITS));
}
INLINE u64 side_by_side(u32 both, u32 others) {
    if (INDEX_BITS == 8) return __byte_perm(both, others, 0x6420);
    return side_by_side(both) | (u64)side_by_side(others) << (2 * INDEX_BITS);
}

// The numbers of a lane's points, four quads' side by side; returns the squared error, where several radii are tried.
INLINE float find_points(const u8* tables, float (*quads)[4], float scale, u64* codes) {
    float error = 0.0f;
    u32 before;
#pragma unroll
    for (int quad = 0; quad < QUADS; quad += 2) {
        const u32 both = two_points(tables, quads[quad], quads[quad + 1], scale, threadIdx.x);
        if (quad % 4) codes[quad / 4] = side_by_side(before, both);
        else if (quad + 2 == QUADS) codes[quad / 4] = side_by_side(both);
        before = both;
#if CHOICES > 1
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 point = reinterpret_cast<const u32*>(tables + POINTS_AT)[number_of(both, i)];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float off = fabsf(quads[quad + i][k] * scale) - (float)(point >> 8 * k & 255) * UNIT;
                error = fmaf(off, off, error);
            }
        }
#endif
    }
    return error;
}

// The radius of a row from its energy: the least one is 1, and 0 that of a row of zeros.
INLINE u32 radius_of_row(float energy, int exponent) {
    return min(radius_code(energy * ENERGY_SCALE, exponent), (u32)MOST_RADIUS);
}

// Two numbers' signs, each as a byte of ones or zeros, and the same two once more.
INLINE u32 signs_of(float one, float two) {
    u32 signs;
    asm("prmt.b32 %0, %1, %2, 0xfbfb;" : "=r"(signs) : "r"(bits_of(one)), "r"(bits_of(two)));
    return signs;
}

// The sum less the weights, of 16 bits each, of those of the first two signs that are ones.
INLINE int less_signs(int sum, u32 signs, u32 weights) {
    int less;
    asm("dp2a.lo.u32.s32 %0, %1, %2, %3;" : "=r"(less) : "r"(weights), "r"(signs), "r"(sum));
    return less;
}

// Takes a bit for each sign of a row's quad, which is the ``number``-th of up to eight side by side, from the two words below
// zero that these eight have.
INLINE void add_signs(const float* quad, int number, int* less) {
    const u32 weights = 0x01000001u << number;  // two coordinates, each of which has a byte
    less[0] = less_signs(less[0], signs_of(quad[0], quad[2]), weights);
    less[1] = less_signs(less[1], signs_of(quad[1], quad[3]), weights);
}

#if HALF_SUMS
// The same of two quads, ``apart`` from each other, a coordinate of both in a word of ``quads``; ``number``: the first one's.
INLINE void add_signs(const u32* quads, int number, int apart, int* less) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        u32 signs;  // of coordinates i and i + 2 of one quad, and of the other
        asm("prmt.b32 %0, %1, %2, 0xfbd9;" : "=r"(signs) : "r"(quads[i]), "r"(quads[i + 2]));
        less[i] = less_signs(less[i], signs, 0x01000001u << number);
        asm("dp2a.hi.u32.s32 %0, %1, %2, %0;" : "+r"(less[i]) : "r"(0x01000001u << (number + apart)), "r"(signs));
    }
}
#endif

// The word of eight quads' signs, of what add_signs found.
INLINE u32 signs_less(const int* less) { return (u32)-(less[1] * (1 << 16) + less[0]); }

// The signs of N quads of a row, from ``quad`` on, into the plane (SPEC 8.1), which held zeros: of eight quads a coordinate's
// side by side, the first quad's lowest. Two lanes' quads may lie in one word, and a lane's in two.
template <int N> INLINE void put_signs(const int* less, u32* stage, int tile_row, int quad) {
    const u32 signs = signs_less(less);
    u32* word = stage + tile_row * (ORDER / 32) + quad / 8;
    if (QUADS % 8 == 0) {
        *word = signs;
    } else {
        const u32 address = (u32)__cvta_generic_to_shared(word), shift = quad % 8, below = 0x01010101u * ((1u << shift) - 1);
        Writer::add(address, signs << shift & ~below);
        if (8 % QUADS) Writer::add(address + 4, signs >> (8 - shift) & below);
    }
}

// The numbers of N of a lane's quads of a row, from its ``quad`` on, into the plane. ``waiting``: bits before
// them that were too few to be stored.
template <int N>
INLINE void put_numbers(u64 numbers, u64& waiting, u32* stage, int tile_row, int quarter, int quad) {
#if STORE_BITS
    const int has = quad * INDEX_BITS % STORE_BITS, full = (has + N * INDEX_BITS) / STORE_BITS;
    waiting = has ? waiting | numbers << has : numbers;
    Store* to = reinterpret_cast<Store*>(stage + SIGN_WORDS) + tile_row * (8 * INDEX_BYTES / STORE_BITS) +
               quarter * (QUADS * INDEX_BITS / STORE_BITS);
#pragma unroll
    for (int i = 0; i < full; i++) to[quad * INDEX_BITS / STORE_BITS + i] = (Store)(waiting >> i * STORE_BITS);
    waiting = full * STORE_BITS < 64 ? waiting >> full * STORE_BITS : 0;
#else
    const int bit = tile_row * 8 * INDEX_BYTES + (quarter * QUADS + quad) * INDEX_BITS;
    Writer out = {(u32)__cvta_generic_to_shared(stage + SIGN_WORDS), (u32)bit};
    if (N * INDEX_BITS > 32) out.put((u32)numbers, (u32)(numbers >> 32), N * INDEX_BITS);
    else out.put((u32)numbers, N * INDEX_BITS);
#endif
}

INLINE void encode_row(const u8* tables, const Block& block, u32* stage, u16* radii, int tile_row, int quarter,
                       float (*quads)[4], const Energies& energies, float own, int exponent) {
    const u32 own_radius = radius_of_row(sum_of_row(own), exponent);
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
    if (quarter == 0) radii[tile_row] = radius;
#pragma unroll
    for (int first = 0; first < QUADS; first += 8) {
        int less[2] = {0, 0};
#pragma unroll
        for (int quad = first; quad < min(first + 8, QUADS); quad++) add_signs(quads[quad], quad - first, less);
        if (first + 8 <= QUADS) put_signs<8>(less, stage, tile_row, quarter * QUADS + first);
        else put_signs<QUADS % 8>(less, stage, tile_row, quarter * QUADS + first);
    }
    u64 waiting = 0;
#pragma unroll
    for (int i = 0; i < FOURS; i++) {
        if (4 * i + 4 <= QUADS) put_numbers<4>(codes[i], waiting, stage, tile_row, quarter, 4 * i);
        else put_numbers<QUADS % 4>(codes[i], waiting, stage, tile_row, quarter, 4 * i);
    }
}

#if WIDE
// -- two rows of a lane ---------------------------------------------------------------------------------------------
// Of a tile of sixteen rows, as mma has them, a lane holds rows l / 4 and l / 4 + 8: half as many products as for eight rows of
// two parts each. A panel's quads are coded as soon as they are rotated, for a row's energy is that of its channels.

#define UNDER_WAY (STRIPS >= 8 || PANELS == 1 ? 1 : 2)  // panels at once: two if there are two, and registers for both
#define PAIRS_OF_PANEL (STRIPS / 4)       // of a lane's quads of a row
#define FREED_AT (STRIPS == 16 ? PAIRS_OF_PANEL / 2 : 0)  // pairs of the last panel, behind which registers are free

// Two rows' bits, in a stage that held zeros, if not all of it is STORED. ``stored`` [4 PIECES words][2]: a lane's channels as
// they are multiplied, times 2^exponent each; ``energies``: the rows', or with RUN_PRODUCTS the halves of that of which the lane
// finds the radius; the rows' radii go to ``radii``, those of the tile.
// ``multiplied`` is called when the channels were, and registers are free.
template <typename Call>
INLINE void encode_two_rows(const u8* tables, u32* stage, u16* radii, int lane, const u32 (*stored)[2], const float* energies,
                            const int* exponents, Call multiplied) {
    const int tile_row = lane >> 2, quarter = lane & 3;
    Scale scale[2];
    int less[2][2];  // signs
    u32 before[2];  // numbers of two quads that wait for two others
    u64 waiting[2];
    const u32(*operands)[4] = reinterpret_cast<const u32(*)[4]>(stored);
    Sum both_sums[PANELS > 1 && UNDER_WAY > 1 ? 2 : 1][STRIPS][OF_STRIP];
    const u32 matrix = panel_address(tables, 0);
    begin_together<false>(matrix, operands, both_sums[0]);
    const int own_exponent = quarter & 1 ? exponents[1] : exponents[0];  // of a row whose radius the lane finds
    const float own_energy = RUN_PRODUCTS ? energies[0] + energies[1] : quarter & 1 ? energies[1] : energies[0];
    const u32 radius = radius_of_row(own_energy, own_exponent);
    const Scale own_scale = as_scale(scale_of(radius, own_exponent - LOST_EXPONENTS));
    if (quarter < 2) radii[tile_row + 8 * quarter] = radius;
#pragma unroll
    for (int part = 0; part < 2; part++) scale[part] = __shfl_sync(ALL_LANES, own_scale, 4 * tile_row + part);
#pragma unroll
    for (int panel = 0; panel < PANELS; panel++) {
        Sum(*sums)[OF_STRIP] = both_sums[UNDER_WAY > 1 ? panel % 2 : 0];
        if (UNDER_WAY > 1 && PANELS > 1 && panel + 1 < PANELS) {  // on its way while this one's quads are coded
            begin_together<false>(matrix + (panel + 1) * PANEL_BYTES, operands, both_sums[(panel + 1) % 2]);
            wait_together<false, 1>(sums);
        } else {
            wait_together<false, 0>(sums);
            if (panel + 1 == PANELS && !FREED_AT) multiplied();
        }
#pragma unroll
        for (int of_panel = 0; of_panel < PAIRS_OF_PANEL; of_panel++) {
            const int pair = panel * PAIRS_OF_PANEL + of_panel;
            const bool last = pair == QUADS / 2 - 1;
            u32 both[2];
            if (panel + 1 == PANELS && FREED_AT && of_panel == FREED_AT) multiplied();
#pragma unroll
            for (int part = 0; part < 2; part++) {
                if (pair % 4 == 0) less[part][0] = less[part][1] = 0;
#if HALF_SUMS
                u32 quads[4];
#pragma unroll
                for (int k = 0; k < 4; k++) quads[k] = sums[of_panel * 4 + k][part];
                add_signs(quads, pair % 4 * 2, 1, less[part]);
                both[part] = two_points(tables, quads, scale[part], lane);
#else
                float quads[2][4];
#pragma unroll
                for (int k = 0; k < 8; k++) quads[k / 4][k % 4] = sums[of_panel * 4 + k / 2][2 * part + k % 2];
#pragma unroll
                for (int k = 0; k < 2; k++) add_signs(quads[k], pair % 4 * 2 + k, less[part]);
                both[part] = two_points(tables, quads[0], quads[1], scale[part], lane);
#endif
            }
#pragma unroll
            for (int part = 0; part < 2; part++) {
                const int row = tile_row + 8 * part, quad = quarter * QUADS + pair / 4 * 8;
                if (pair % 2) {
                    const u64 numbers = side_by_side(before[part], both[part]);
                    put_numbers<4>(numbers, waiting[part], stage, row, quarter, 2 * pair - 2);
                } else if (last) {
                    put_numbers<2>(side_by_side(both[part]), waiting[part], stage, row, quarter, 2 * pair);
                }
                before[part] = both[part];
                if (pair % 4 == 3) put_signs<8>(less[part], stage, row, quad);
                else if (last) put_signs<QUADS % 8>(less[part], stage, row, quad);
            }
        }
        if (UNDER_WAY == 1 && panel + 1 < PANELS)
            begin_together<false>(matrix + (panel + 1) * PANEL_BYTES, operands, both_sums[0]);
    }
}
#endif

#if FACTORS
#include "quads_in_factors.cuh"
#endif
