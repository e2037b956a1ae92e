// Law: the encoder of quads where rows are rotated in factors: a lane has a quarter of one row, set by set.
//
// A set's sums bring, of each pair of strips, one of four neighbouring quads, and one of the next four: the first strip's words
// have a coordinate of each, and the second strip's the next one. Of the last of strips that are odd in number the words have
// two coordinates of the same quad, so that it waits for the next set's.
//
// Needs what quads_encoder.cuh needs, which includes this.
#pragma once

// The signs of a lane's quads, eight by eight, of which the last are four -> its words of the plane: a lane of odd quarter begins
// with four, in the word with which the lane before it ends.
INLINE void share_signs(u32* signs, int quarter) {
    constexpr int LAST = PAIRS_OF_STRIPS - 1;
    const u32 firsts = 0x0f0f0f0fu;  // four signs of each coordinate
#pragma unroll
    for (int i = LAST; i >= 0; i--) {
        const u32 later = (i ? signs[i - 1] >> 4 & firsts : 0) | (signs[i] & firsts) << 4;
        signs[i] = quarter & 1 ? later : signs[i];
    }
    const u32 others = __shfl_xor_sync(ALL_LANES, quarter & 1 ? signs[0] : signs[LAST], 1);
    if (quarter & 1) signs[0] |= others;
    else signs[LAST] |= others;
}

// The row's bits, in a stage as for two rows, and its radius in ``radii``. ``words``: what the second round's products take of a
// lane's channels times 2^exponent; ``energy``: the row's.
INLINE void encode_in_factors(const u8* tables, u32* stage, u16* radii, int lane, const u32 (*words)[8], float energy,
                              int exponent) {
    const int tile_row = lane >> 2, quarter = lane & 3;
    const u32 radius = radius_of_row(energy, exponent);
    const Scale scale = as_scale(scale_of(radius, exponent - LOST_EXPONENTS));
    if (quarter == 0) radii[tile_row] = radius;
    int less[PAIRS_OF_STRIPS][2] = {};  // signs, of eight quads each; of the last pair they may be four
    u32 numbers[PAIRS_OF_STRIPS][3];    // of quads that wait for others: of the first two sets, and of the third
    u32 lone[2];                        // the last strip's words
    u64 waiting;
    each_set(tables, words, [&](int set, const Sum (*sums)[OF_STRIP]) {
#pragma unroll
        for (int pair = 0; pair < PAIRS_OF_STRIPS; pair++) {
            const Sum(*strip)[OF_STRIP] = sums + 2 * pair;
            const bool whole = 2 * pair + 1 < STRIPS;
            if (!whole && set % 2 == 0) {  // in other registers, for the products of the set behind the next one take these
                for (int i = 0; i < 2; i++) lone[i] = multiply_add(strip[0][i], HALF_ONES, NOUGHTS);
                continue;
            }
            u32 quads[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                quads[i] = whole ? strip[i % 2][i / 2] : __byte_perm(lone[i / 2], strip[0][i / 2], i % 2 ? 0x7632 : 0x5410);
            add_signs(quads, whole ? set : set - 1, whole ? 4 : 1, less[pair]);
            const u32 both = two_points(tables, quads, scale, lane);
            u32* waits = numbers[pair];
            if (!whole) {
                if (set == 1) waits[0] = both;
                else put_numbers<4>(side_by_side(waits[0], both), waiting, stage, tile_row, quarter, 8 * pair);
            } else if (set % 2 == 0) {
                waits[2] = both;
            } else {
                const u32 first = __byte_perm(waits[2], both, 0x5410), second = __byte_perm(waits[2], both, 0x7632);
                if (set == 1) {
                    waits[0] = first, waits[1] = second;
                } else {
                    put_numbers<4>(side_by_side(waits[0], first), waiting, stage, tile_row, quarter, 8 * pair);
                    put_numbers<4>(side_by_side(waits[1], second), waiting, stage, tile_row, quarter, 8 * pair + 4);
                }
            }
        }
    });
    u32 signs[PAIRS_OF_STRIPS];
#pragma unroll
    for (int pair = 0; pair < PAIRS_OF_STRIPS; pair++) signs[pair] = signs_less(less[pair]);
    if (QUADS % 8) share_signs(signs, quarter);
    u32* words_of_row = stage + tile_row * (ORDER / 32) + quarter * QUADS / 8;
#pragma unroll
    for (int pair = 0; pair < PAIRS_OF_STRIPS; pair++) words_of_row[pair] = signs[pair];
}
