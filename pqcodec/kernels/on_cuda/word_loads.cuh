// Law: a tile's rows as words of two 16-bit numbers that are multiplied as they are, and their energies.
//
// Rows of ordinary size are taken as they are stored or, less their offsets, rounded to 16 bits; others once more, carefully. With
// HALF_SUMS all are float16.
//
// Needs what loads.cuh needs.
#pragma once

#include "loads.cuh"

#define OWN_ROWS (ROWS / 8)  // that a lane has a quarter of
#if BRAIN
#define SHORT_TYPE "bf16"  // of numbers that are multiplied
#else
#define SHORT_TYPE "f16"
#endif
#define SQUARED (FACTORS && PLAIN && DTYPE == BFLOAT16)  // rows' energies are of bfloat16, though they are multiplied as float16
#define KEPT (PLAIN && ORDER <= 256)  // rows stay as they are stored beside those that are multiplied: there are registers

// The first or the second number of a stored word of two. Units of floating point take bfloat16 apart, for integer ones are
// busier; beside NaN or Inf it may be another number.
template <bool SECOND> INLINE float one_of(u32 word) {
#if DTYPE == BFLOAT16
    u32 found = word;
    if (!SECOND) asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; mov.b32 %0, {a, a};}" : "=r"(found) : "r"(word));
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(found) : "r"(0x3f800000u), "r"(0u));  // times 0 and 1
    return float_of(found);
#else
    return half_value(word >> 16 * SECOND);
#endif
}

// A number of a lane's channels. ROUGH: of two bfloat16 side by side the second may be larger by as much as its last bit.
template <bool ROUGH> INLINE float loaded_value(const u32* stored, int i) {
    if (DTYPE == FLOAT32) return value_of(stored, i);
    if (i % 2 == 0) return one_of<false>(stored[i / 2]);
    return ROUGH && DTYPE == BFLOAT16 ? float_of(stored[i / 2]) : one_of<true>(stored[i / 2]);
}

// Each piece of a lane's channels of row ``row`` of a block and, if it has two rows, of the eighth behind it: ``use`` takes
// which of both it is, the piece, its channels as they are stored, and less their offsets. AGAIN: rows are taken from the tensor.
template <bool AGAIN, int UNROLLED_PIECES = PIECES, typename Use>
INLINE void each_piece(const u8* tables, const Block& block, const float* means, const uint4* fetched, int row, int lane,
                       Use use) {
    const int quarter = lane & 3;
#if FACTORS
    const OwnPieces pieces(block, fetched, row, lane);
#endif
    Turns turns[OWN_ROWS];
    float own[8], partners[8];  // means of a piece, and of those that turn with it
#pragma unroll UNROLLED_PIECES
    for (int i = 0; i < PIECES; i++) {
        const int piece = i < 2 * APART ? i / 2 + i % 2 * APART : i;  // those that turn together one after the other
        const int first = first_channel(quarter, piece);
#if OFFSETS
        const bool again = APART && i % 2 && i < 2 * APART;  // the same turns as of the last one, and means the other way round
        if (!again) eight_means(TILE_TURNS ? means + ORDER : means, first, own);
#endif
#if PAIRS
        if (!again) eight_means(TILE_TURNS ? means + ORDER : means, partners_of(first), partners);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const float mean = own[k];
            own[k] = again ? partners[k] : mean, partners[k] = again ? mean : partners[k];
        }
#pragma unroll
        for (int part = 0; part < OWN_ROWS; part++) {
            if (again) continue;
#if TILE_TURNS
            if (piece < TURNED_PIECES) turns_in_tile(tables, OWN_ROWS * piece + part, lane, turns[part]);
#else
            if (first < TURNING) turns_at(tables, place_of_row(block, row + 8 * part), first, turns[part]);
#endif
        }
#endif
#pragma unroll
        for (int part = 0; part < OWN_ROWS; part++) {
            u32 stored[PIECE_WORDS];
            float numbers[8];
#if FACTORS
            pieces.load<AGAIN>(piece, stored);
#else
            const i64 from = row_address(block, row + 8 * part) + first_channel(quarter, 0) * ITEM;
            load_piece<AGAIN>(from, fetched + part * LOADS * (EARLY ? 1 : 32), lane, piece, stored);
#endif
#pragma unroll
            for (int k = 0; k < 8; k++) numbers[k] = loaded_value<SQUARED && !AGAIN>(stored, k);
#if PAIRS
            take_offsets(own, partners, piece, first, APART ? i % 2 : first >= PAIRS, turns[part], numbers);
#elif OFFSETS
#pragma unroll
            for (int k = 0; k < 8; k++) numbers[k] -= own[k];
#endif
            use(part, piece, stored, numbers);
        }
    }
}

// The energy of a lane's channels of a row.
struct Energy {
    float even = 0.0f, odd = 0.0f;

    template <int COUNT = 8> INLINE void add(const float* numbers) {
#pragma unroll
        for (int k = 0; k < COUNT; k += 2) {
            even = fmaf(numbers[k], numbers[k], even);
            odd = fmaf(numbers[k + 1], numbers[k + 1], odd);
        }
    }

    // As that of rotated coordinates: of a lane's channels, and of the four lanes'.
    INLINE float of_quarter() const { return (even + odd) * ((float)ORDER * ORDER); }
    INLINE float of_row() const { return sum_of_row(of_quarter()); }
};

// Sums of squares of two numbers each, in bfloat16: their errors, a few thousandths of a row's energy, are small beside half a step
// of radii.
struct Squares {
    u32 sums = 0;

    INLINE void add(u32 two) { asm("fma.rn.bf16x2 %0, %1, %1, %0;" : "+r"(sums) : "r"(two)); }
    INLINE float both() const { return float_of(sums << 16) + float_of(sums & 0xffff0000u); }
    INLINE float of_quarter() const { return both() * ((float)ORDER * ORDER); }
};

#if RUN_PRODUCTS
// The energy of two quarters of the row whose radius a lane finds: of its first row if its own quarter is even, else of its second.
// ``first`` and ``second``: those of the lane's quarter.
INLINE float of_two_quarters(float first, float second, int lane) {
    return (lane & 1 ? second : first) + __shfl_xor_sync(ALL_LANES, lane & 1 ? first : second, 1);
}
#endif

// Adds the products of a tile's rows, of which a lane has a word each of row l / 4 and of the eighth behind it, with those eight
// rows that it has ``by`` of: to sums with rows 2 (l % 4) and 2 (l % 4) + 1 of them, two of its first row and two of its second.
INLINE void square_step(float* sums, const u32* words, u32 by) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32." SHORT_TYPE "." SHORT_TYPE ".f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(words[0]), "r"(words[1]), "r"(by));
}

// The same for two words of each row.
INLINE void square_step(float* sums, const u32 (*words)[2], u32 by, u32 next_by) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." SHORT_TYPE "." SHORT_TYPE ".f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(words[0][0]), "r"(words[0][1]), "r"(words[1][0]), "r"(words[1][1]), "r"(by), "r"(next_by));
}

// A word in another register. The compiler does not know that they are the same, and keeps both: mma reads words of one row
// side by side, as they were loaded, and words of two rows in turns. Units of floating point make it, for integer ones are
// busier; any two numbers but NaN stay as they are, of float16, too.
INLINE u32 another(u32 word) {
    asm volatile("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(word) : "r"(BRAIN_ONES), "r"(0x80008000u));  // times 1, less 0
    return word;
}

#if OWN_ROWS == 2
// The energies of a lane's two rows, as those of rotated coordinates, in each of their four lanes: they lie on the diagonal of
// the tile's products with itself. ``rows`` [4 PIECES words][2]: of 16-bit numbers, one of each row side by side; ``stored``:
// the same row by row, if they are KEPT.
INLINE void energies_of_tile(const u32 (*rows)[2], const u32 (*stored)[4 * PIECES], int lane, float* owns) {
    float firsts[4] = {0.0f, 0.0f, 0.0f, 0.0f}, seconds[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 4 * PIECES; i += 2) {
        if (KEPT) {
            square_step(firsts, rows + i, stored[0][i], stored[0][i + 1]);
            square_step(seconds, rows + i, stored[1][i], stored[1][i + 1]);
        } else {
#pragma unroll
            for (int k = i; k < i + 2; k++) square_step(firsts, rows[k], rows[k][0]), square_step(seconds, rows[k], rows[k][1]);
        }
    }
    const int row = lane >> 2, has = row * 4 + row / 2;  // the lane that has the diagonal's
    owns[0] = __shfl_sync(ALL_LANES, row & 1 ? firsts[1] : firsts[0], has) * ((float)ORDER * ORDER);
    owns[1] = __shfl_sync(ALL_LANES, row & 1 ? seconds[3] : seconds[2], has) * ((float)ORDER * ORDER);
}
#else
// The same, of whose words the even ones and the odd ones are taken for two rows.
INLINE void energies_of_tile(const u32 (*rows)[1], const u32 (*stored)[4 * PIECES], int lane, float* owns) {
    float sums[4][4] = {};
#pragma unroll
    for (int i = 0; i < 4 * PIECES; i += 2) {
        square_step(sums[i % 4], rows[i], *rows[i]);
        square_step(sums[i % 4 + 1], rows[i], *rows[i + 1]);
    }
    const int row = lane >> 2, has = row * 4 + row / 2;  // the lane that has the diagonal's
    const float even = sums[0][0] + sums[1][2] + (sums[2][0] + sums[3][2]);
    const float odd = sums[0][1] + sums[1][3] + (sums[2][1] + sums[3][3]);
    const float evens = __shfl_sync(ALL_LANES, even, has), odds = __shfl_sync(ALL_LANES, odd, has);
    owns[0] = (row & 1 ? odds : evens) * ((float)ORDER * ORDER);
}
#endif

#if RUN_PRODUCTS
// Each two neighbouring channels of a lane's two rows, where tensor cores find their offsets: ``use`` takes which row it is, the
// word, and both numbers as they are stored and less their offsets. ``run``: the run's means, times -1, as RunMeans has them;
// ``first_row``: of the tile; DIRECT: the means' ``unit`` is 1.
template <bool AGAIN, bool DIRECT, int UNROLLED_PIECES, typename Use>
INLINE void each_word_of_run(const u8* tables, const Block& block, const u8* run, float unit, const uint4* fetched, int first_row,
                             int lane, Use use) {
    const u8 *columns = columns_of(run, lane), *turns = turns_of(tables, first_row, lane);
#pragma unroll UNROLLED_PIECES
    for (int piece = 0; piece < RUN_PIECES; piece++) {
        const RunColumns of_pieces(columns, piece);
        u32 stored[RUN_SHARE][2][4];  // of pieces with the same turns, of both rows
#pragma unroll
        for (int i = 0; i < 2 * RUN_SHARE; i++) {
            const int part = i % 2;
            const i64 from = row_address(block, first_row + (lane >> 2) + 8 * part) + first_channel(lane & 3, 0) * ITEM;
            const uint4* of_row = fetched + part * LOADS * (EARLY ? 1 : 32);
            load_piece<AGAIN>(from, of_row, lane, piece + i / 2 * APART, stored[i / 2][part]);
        }
#pragma unroll
        for (int strip = 0; strip < 4; strip++) {
            float numbers[RUN_SHARE][4], sums[RUN_SHARE][4] = {};
#pragma unroll
            for (int i = 0; i < 4 * RUN_SHARE; i++) {
                const u32* word = stored[i / 4][i / 2 % 2] + strip;
                numbers[i / 4][i % 4] = i % 2 ? one_of<true>(*word) : value_of(word, 0);
            }
            of_pieces.add(turns, piece, strip, DIRECT ? numbers : sums);
#pragma unroll
            for (int i = 0; i < 2 * RUN_SHARE; i++) {
                float* two = numbers[i / 2] + i % 2 * 2;
                const float before[2] = {two[0], two[1]};
                if (!DIRECT)
#pragma unroll
                    for (int k = 0; k < 2; k++) two[k] = fmaf(sums[i / 2][i % 2 * 2 + k], unit, two[k]);
                use(i % 2, 4 * (piece + i / 2 * APART) + strip, before, two);
            }
        }
        if (AGAIN) asm volatile("" ::: "memory");  // one piece after the other: this is to need few registers
    }
}

// What a run's means, as they are kept, are still to be multiplied with.
INLINE float kept_unit(const Block& block) { return are_direct(block) ? 1.0f : unit_of_means(block); }
#endif

// A lane's rows' channels as they are multiplied, rows [4 PIECES words][OWN_ROWS]: as they are stored or, less their offsets,
// rounded to 16 bits. ``owns``: their energies, as those of rotated coordinates; with RUN_PRODUCTS there is one, of_two_quarters.
INLINE void load_rows(const u8* tables, const Block& block, const float* means, const uint4* fetched, int row, int lane,
                      u32 (*rows)[OWN_ROWS], float* owns) {
#if RUN_PRODUCTS
    const int here = not_ahead(lane), first_row = row - (lane >> 2);
    const u8* run = reinterpret_cast<const u8*>(means);
    Energy energies[OWN_ROWS];
    each_word_of_run<false, true, RUN_PIECES>(tables, block, run, 1.0f, fetched, first_row, here,
                                              [&](int part, int word, const float*, const float* two) {
        energies[part].add<2>(two);
        rows[word][part] = pack_entries(two[0], two[1]);
    });
    *owns = of_two_quarters(energies[0].of_quarter(), energies[1].of_quarter(), here);
#else
    u32 as_stored[OWN_ROWS][4 * PIECES];
#if SQUARED
    Squares squares[4];
#endif
    each_piece<false>(tables, block, means, fetched, row, lane,
                      [&](int part, int piece, const u32* stored, const float* numbers) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (KEPT) as_stored[part][4 * piece + k] = stored[k];
            rows[4 * piece + k][part] = KEPT                ? another(stored[k])
                                        : PLAIN && !SQUARED ? stored[k]
                                                            : pack_entries(numbers[2 * k], numbers[2 * k + 1]);
#if SQUARED
            squares[k].add(stored[k]);
#endif
        }
    });
#if SQUARED
    *owns = sum_of_row(squares[0].of_quarter() + squares[1].of_quarter() + (squares[2].of_quarter() + squares[3].of_quarter()));
#else
    energies_of_tile(rows, as_stored, lane, owns);
#endif
#endif
}

// The same for rows of any size: they are multiplied with 2^exponent each, as exponent_for says. Wrong rows are zeros, and
// ``bad`` counts them. ``unit``: kept_unit.
INLINE void load_rows_carefully(const u8* tables, const Block& block, const float* means, float unit, int row, int lane, int& bad,
                                u32 (*rows)[OWN_ROWS], float* owns, int* exponents) {
    int wrong_rows = 0;
    u32 stored_most[OWN_ROWS] = {}, most[OWN_ROWS] = {};  // the largest magnitudes, as bits
#if RUN_PRODUCTS
    const int here = not_ahead(lane), first_row = row - (lane >> 2);
    const u8* run = reinterpret_cast<const u8*>(means);
    each_word_of_run<true, false, 1>(tables, block, run, unit, nullptr, first_row, here,
                                     [&](int part, int, const float* stored, const float* two) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            stored_most[part] = max(stored_most[part], bits_of(stored[k]) & MAGNITUDE);
            most[part] = max(most[part], bits_of(in_range(two[k])) & MAGNITUDE);
        }
    });
#else
    each_piece<true, 1>(tables, block, means, nullptr, row, lane,
                        [&](int part, int piece, const u32* stored, const float* numbers) {
#pragma unroll
        for (int k = 0; k < 8; k++) {
            stored_most[part] = max(stored_most[part], bits_of(value_of(stored, k)) & MAGNITUDE);
            most[part] = max(most[part], bits_of(in_range(numbers[k])) & MAGNITUDE);
        }
    });
#endif
    bool wrong[OWN_ROWS];
    float scale[OWN_ROWS];
#pragma unroll
    for (int part = 0; part < OWN_ROWS; part++) {
        wrong[part] = largest_of_row(stored_most[part]) >= INFINITY_BITS;
        wrong_rows += wrong[part] && row + 8 * part < block.tokens && (lane & 3) == 0;
        exponents[part] = exponent_for(largest_of_row(most[part]), wrong[part]);
        scale[part] = power_of_two(exponents[part]);
    }
    Energy energies[OWN_ROWS];
#if RUN_PRODUCTS
    each_word_of_run<true, false, RUN_PIECES>(tables, block, run, unit, nullptr, first_row, here,
                                              [&](int part, int word, const float*, float* two) {
#pragma unroll
        for (int k = 0; k < 2; k++) two[k] = wrong[part] ? 0.0f : in_range(two[k]) * scale[part];
        energies[part].add<2>(two);
        rows[word][part] = pack_entries(two[0], two[1]);
    });
#else
    each_piece<true>(tables, block, means, nullptr, row, lane, [&](int part, int piece, const u32* stored, float* numbers) {
#pragma unroll
        for (int k = 0; k < 8; k++) numbers[k] = wrong[part] ? 0.0f : in_range(numbers[k]) * scale[part];
        energies[part].add(numbers);
#pragma unroll
        for (int k = 0; k < 4; k++) rows[4 * piece + k][part] = pack_entries(numbers[2 * k], numbers[2 * k + 1]);
        asm volatile("" ::: "memory");  // one piece after the other: this is to need few registers
    });
#endif
#if RUN_PRODUCTS
    *owns = of_two_quarters(energies[0].of_quarter(), energies[1].of_quarter(), here);
#else
#pragma unroll
    for (int part = 0; part < OWN_ROWS; part++) owns[part] = energies[part].of_row();
#endif
    wrong_rows = __reduce_add_sync(ALL_LANES, wrong_rows);
    if (lane == 0) bad += wrong_rows;
}
