// Law: rows of a tensor as an encoder takes them: loaded, checked for NaN and Inf, centred, and scaled by a power of two.
//
// A row that holds NaN or Inf is ``wrong``: it is coded as zeros and counted. Rows behind the block's end repeat its last.
//
// Needs DTYPE (FLOAT16, BFLOAT16 or FLOAT32), ITEM (bytes of a number), OFFSETS, BYTES, AS_WORDS (the coding takes rows as they
// are multiplied), LARGEST_32 (the largest float32), FETCHED (a tile's rows are sent for ahead of time, into shared memory, with
// FACTORS by the bulk copy engine, or, with EARLY, into registers), ORDER, ROWS, and what the rotation and the offsets need.
#pragma once

#include "barriers.cuh"
#include "block_place.cuh"
#include "lanes.cuh"
#include "offsets.cuh"
#include "rotation.cuh"

#define PLAIN (DTYPE != FLOAT32 && !OFFSETS && !BYTES)  // rows are multiplied as they are stored
#define OWN_ROWS (ROWS / 8)  // that a lane has a quarter of
#if BRAIN
#define SHORT_TYPE "bf16"  // of numbers that are multiplied
#else
#define SHORT_TYPE "f16"
#endif
#define KEPT (PLAIN && ORDER <= 256)  // rows stay as they are stored beside those that are multiplied: there are registers
#define BY_BULK (FETCHED && FACTORS)
#define PIECE_WORDS (8 * ITEM / 4)
#define LOADS (PIECES * PIECE_WORDS / 4)  // of 16 bytes, of a lane's channels of a row

INLINE i64 row_address(const Block& block, int row) { return block.rows + min(row, block.tokens - 1) * block.row_stride; }

// Sends for the rows of a tile so that they are in the L2 cache when they are loaded: 128 bytes a lane.
INLINE void prefetch_rows(const Block& block, int first_row, int lane) {
    constexpr int LINES = (ORDER * ITEM + 127) / 128;  // of a row
#pragma unroll
    for (int i = 0; i < ROWS * LINES; i += 32) {
        const int line = i + lane;
        if (line < ROWS * LINES)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(row_address(block, first_row + line / LINES) + line % LINES * 128));
    }
}

// Sends for each lane's pieces of a tile's rows, into ``fetched``: registers (EARLY), or the lane's places in shared memory;
// where neither pays (FETCHED is 0), into the L2 cache.
INLINE void fetch_rows(const Block& block, int first_row, int lane, uint4* fetched) {
#if EARLY
#pragma unroll
    for (int part = 0; part < 2; part++) {
        const i64 from = row_address(block, first_row + 8 * part + (lane >> 2)) + first_channel(lane & 3, 0) * ITEM;
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) {
            uint4& got = fetched[part * PIECES + piece];
            asm volatile("ld.global.cs.v4.u32 {%0,%1,%2,%3}, [%4];"  // volatile: the compiler would load later
                         : "=r"(got.x), "=r"(got.y), "=r"(got.z), "=r"(got.w)
                         : "l"(from + byte_of_piece(piece))
                         : "memory");
        }
    }
    __syncwarp();  // what follows is not done before
#elif BY_BULK
    const u32 to = (u32)__cvta_generic_to_shared(fetched), barrier = to - 16;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the exchange was in this place
    const int rows = max(min(block.tokens - first_row, ROWS), 1);  // places of others keep what they had
    const i64 from = row_address(block, first_row);
    if (lane == 0) expect_bytes(barrier, rows * (ORDER * ITEM));
    if (block.row_stride == ORDER * ITEM) {
        if (lane == 0) send_for_bytes(to, from, rows * (ORDER * ITEM), barrier);
    } else if (lane < rows) {
        send_for_bytes(to + lane * (ORDER * ITEM), from + lane * block.row_stride, ORDER * ITEM, barrier);
    }
#elif FETCHED
    const u32 to = (u32)__cvta_generic_to_shared(fetched + lane);
#pragma unroll
    for (int part = 0; part < ROWS / 8; part++) {
        const i64 from = row_address(block, first_row + 8 * part + (lane >> 2)) + first_channel(lane & 3, 0) * ITEM;
#pragma unroll
        for (int i = 0; i < LOADS; i++)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to + (part * LOADS + i) * 512),
                         "l"(from + byte_of_piece(i / (PIECE_WORDS / 4)) + i % (PIECE_WORDS / 4) * 16)
                         : "memory");
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
#else
    prefetch_rows(block, first_row, lane);
#endif
}

// Before the first fetch.
INLINE void prepare_fetches(const uint4* fetched, int lane) {
#if BY_BULK
    if (lane == 0) prepare_barrier((u32)__cvta_generic_to_shared(fetched) - 16, 1);
    barriers_are_prepared();
#endif
}

// Waits for what fetch_rows sent for, the ``tile``-th time. Without the copy engine a lane reads what it sent for itself, so it
// needs no other lane.
INLINE void rows_are_fetched(const uint4* fetched, u32 tile) {
#if BY_BULK
    wait_until_complete((u32)__cvta_generic_to_shared(fetched) - 16, tile & 1);
#elif FETCHED && !EARLY
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
}

// Eight channels as they are stored: those that were ``fetched`` for a lane or, for rows that are taken AGAIN, from the tensor.
template <bool AGAIN = false> INLINE void load_piece(i64 from, const uint4* fetched, int lane, int piece, u32* stored) {
#pragma unroll
    for (int i = 0; i < PIECE_WORDS; i += 4) {
        const uint4 got = FETCHED && !AGAIN ? fetched[EARLY ? piece : (piece * PIECE_WORDS + i) * 8 + lane]
                                            : __ldcs(reinterpret_cast<const uint4*>(from + byte_of_piece(piece)) + i / 4);
        stored[i] = got.x, stored[i + 1] = got.y, stored[i + 2] = got.z, stored[i + 3] = got.w;
    }
}

#if FACTORS
// Where a lane's pieces of even and of odd number begin, in the tensor and in shared memory. The compiler may not know how far
// they are from each other, for it would add up the address of each piece anew.
struct OwnPieces {
    i64 even, odd;
    u32 fetched_even, fetched_odd;

    INLINE OwnPieces(const Block& block, const uint4* fetched, int row, int lane) {
        const u32 own_row = (u32)__cvta_generic_to_shared(fetched) + (lane >> 2) * (ORDER * ITEM);
        const int first = first_channel(lane & 3, 0) * ITEM, second = first_channel(lane & 3, 1) * ITEM;
        even = row_address(block, row) + first, odd = row_address(block, row) + second;
        fetched_even = own_row + first, fetched_odd = own_row + second;
        asm volatile("" : "+l"(even), "+l"(odd), "+r"(fetched_even), "+r"(fetched_odd));
    }

    template <bool AGAIN> INLINE void load(int piece, u32* stored) const {
#pragma unroll
        for (int i = 0; i < PIECE_WORDS; i += 4) {
            uint4 got;
            if (BY_BULK && !AGAIN) {
                asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                             : "=r"(got.x), "=r"(got.y), "=r"(got.z), "=r"(got.w)
                             : "r"((piece % 2 ? fetched_odd : fetched_even) + piece / 2 * (64 * ITEM))
                             : "memory");
            } else {
                got = __ldcs(reinterpret_cast<const uint4*>((piece % 2 ? odd : even) + piece / 2 * (64 * ITEM)) + i / 4);
            }
            stored[i] = got.x, stored[i + 1] = got.y, stored[i + 2] = got.z, stored[i + 3] = got.w;
        }
    }
};
#endif

INLINE float value_of(const u32* stored, int i) {
#if DTYPE == FLOAT32
    return float_of(stored[i]);
#elif DTYPE == FLOAT16
    return half_value(stored[i / 2] >> 16 * (i & 1));
#else
    return float_of(i & 1 ? stored[i / 2] & 0xffff0000u : stored[i / 2] << 16);
#endif
}

INLINE float in_range(float x) { return fminf(fmaxf(x, -LARGEST_32), LARGEST_32); }

// Energies, as those of rotated coordinates, between which rows are multiplied as they are. In factors, sums of float16 stay
// finite so.
#if FACTORS && !BRAIN
#define TOP_EXPONENT 8
#define LEAST_EVEN (1e-4f * ORDER * ORDER)
#define MOST_EVEN (2e8f * ORDER * ORDER)
#else
#define TOP_EXPONENT 13
#define LEAST_EVEN 1e-22f
#define MOST_EVEN 1e30f
#endif

// The exponent of the power of two that brings a row's largest magnitude, as bits, to 2^TOP_EXPONENT or up to twice that.
INLINE int exponent_for(u32 most, bool wrong) {
    return wrong ? 0 : min(TOP_EXPONENT - ((int)(most >> MANTISSA_BITS) - BIAS), 127);
}

#if AS_WORDS
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
            for (int k = 0; k < 8; k++) numbers[k] = value_of(stored, k);
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

    // Of the four lanes' channels, as that of rotated coordinates.
    INLINE float of_row() const { return sum_of_row(even + odd) * ((float)ORDER * ORDER); }
};

#if BRAIN
// Sums of squares of two numbers each, in bfloat16: their errors, a few thousandths of a row's energy, are small beside half a step
// of radii.
struct Squares {
    u32 sums = 0;

    INLINE void add(u32 two) { asm("fma.rn.bf16x2 %0, %1, %1, %0;" : "+r"(sums) : "r"(two)); }
    INLINE float both() const { return float_of(sums << 16) + float_of(sums & 0xffff0000u); }
};
#endif

#if BRAIN && OWN_ROWS == 2
// The energy of the row whose radius a lane finds, of its first row if its quarter is even, else of its second, as that of
// rotated coordinates. ``squares``: of its channels of each.
INLINE float own_energy(const Squares* squares, int lane) {
    const float first = squares[0].both(), second = squares[1].both();
    const float others = __shfl_xor_sync(ALL_LANES, lane & 1 ? first : second, 1);
    const float both = (lane & 1 ? second : first) + others;  // of two quarters
    return (both + __shfl_xor_sync(ALL_LANES, both, 2)) * ((float)ORDER * ORDER);
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
// side by side, as they were loaded, and words of two rows in turns.
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
#elif BRAIN
// The same for a lane's one row.
INLINE void energies_of_tile(const u32 (*rows)[1], const u32 (*stored)[4 * PIECES], int lane, float* owns) {
    Squares squares[4];
#pragma unroll
    for (int i = 0; i < 4 * PIECES; i++) squares[i % 4].add(*rows[i]);
    owns[0] = sum_of_row(squares[0].both() + squares[1].both() + (squares[2].both() + squares[3].both())) *
              ((float)ORDER * ORDER);
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
    for (int piece = 0; piece < APART; piece++) {
        const RunColumns of_pieces(columns, piece);
        u32 stored[2][2][4];  // of both pieces, of both rows
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int part = i % 2;
            const i64 from = row_address(block, first_row + (lane >> 2) + 8 * part) + first_channel(lane & 3, 0) * ITEM;
            const uint4* of_row = fetched + part * LOADS * (EARLY ? 1 : 32);
            load_piece<AGAIN>(from, of_row, lane, piece + i / 2 * APART, stored[i / 2][part]);
        }
#pragma unroll
        for (int strip = 0; strip < 4; strip++) {
            float numbers[2][4], sums[2][4] = {};
#pragma unroll
            for (int i = 0; i < 8; i++) numbers[i / 4][i % 4] = value_of(stored[i / 4][i / 2 % 2], 2 * strip + i % 2);
            if (DIRECT) of_pieces.add(turns, piece, strip, numbers[0], numbers[1]);
            else of_pieces.add(turns, piece, strip, sums[0], sums[1]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
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
// rounded to bfloat16. ``owns``: their energies, as those of rotated coordinates.
INLINE void load_rows(const u8* tables, const Block& block, const float* means, const uint4* fetched, int row, int lane,
                      u32 (*rows)[OWN_ROWS], float* owns) {
#if RUN_PRODUCTS
    const int here = not_ahead(lane), first_row = row - (lane >> 2);
    const u8* run = reinterpret_cast<const u8*>(means);
    Squares squares[OWN_ROWS];
    each_word_of_run<false, true, APART>(tables, block, run, 1.0f, fetched, first_row, here,
                                         [&](int part, int word, const float*, const float* two) {
        const u32 both = pack_brains(two[0], two[1]);
        squares[part].add(both);
        rows[word][part] = both;
    });
    owns[0] = owns[1] = own_energy(squares, lane);
#else
    u32 as_stored[OWN_ROWS][4 * PIECES];
    each_piece<false>(tables, block, means, fetched, row, lane,
                      [&](int part, int piece, const u32* stored, const float* numbers) {
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (KEPT) as_stored[part][4 * piece + k] = stored[k];
            rows[4 * piece + k][part] = KEPT    ? another(stored[k])
                                        : PLAIN ? stored[k]
                                                : pack_brains(numbers[2 * k], numbers[2 * k + 1]);
        }
    });
    energies_of_tile(rows, as_stored, lane, owns);
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
    each_word_of_run<true, false, APART>(tables, block, run, unit, nullptr, first_row, here,
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
#pragma unroll
    for (int part = 0; part < OWN_ROWS; part++) owns[part] = energies[part].of_row();
    wrong_rows = __reduce_add_sync(ALL_LANES, wrong_rows);
    if (lane == 0) bad += wrong_rows;
}
#endif

#if BYTES
// A lane's channels of a row of 16-bit numbers -> times 2^exponent, as whole numbers' low and high bytes, which are operands
// [PIECES][4] of the rotation. ``from``: the address of the first piece; ``bad`` counts wrong rows.
INLINE void bytes_row(const Block& block, const i64 from, const uint4* fetched, int row, int lane, int& bad, int& exponent,
                      u32 (*operands)[4]) {
    u32 stored[PIECES][4], most = 0;  // most: the largest magnitude, as bits; first two of them, packed
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        load_piece(from, fetched, lane, piece, stored[piece]);
#pragma unroll
        for (int i = 0; i < 4; i++) most = __vmaxu2(most, stored[piece][i] & PACKED_MAGNITUDES);
    }
    most = max(most & 0xffff, most >> 16);
    most = largest_of_row(most);
    most = DTYPE == BFLOAT16 ? most << 16 : bits_of(half_value(most));
    const bool wrong = most >= INFINITY_BITS;
    bad += wrong && row < block.tokens && (lane & 3) == 0;
    // The largest number is brought into the octave from 2^14 on, if it is then LARGEST_IN_BYTES at most; else it counts as of
    // the next octave, and comes to half of that.
    const u32 octave = most + ((1 << 15) - LARGEST_IN_BYTES << (MANTISSA_BITS - 14));
    exponent = wrong ? 0
                     : 14 - (octave >> MANTISSA_BITS ? (int)(octave >> MANTISSA_BITS) - BIAS
                                                     : 31 - __clz(octave) - (BIAS - 1 + MANTISSA_BITS));  // subnormal
    // A power of two beyond float32's is not multiplied with: numbers are rounded so much finer, and their bits are the same.
    const int rest = max(exponent - BIAS, 0);
    const float scale = power_of_two(exponent - rest), magic = float_of(bits_of(BYTES_MAGIC) - ((u32)rest << MANTISSA_BITS));
    const u32 mask = wrong ? 0 : ~0u;
#pragma unroll
    for (int four = 0; four < 2 * PIECES; four++) {  // channels
        u32 sums[4];
#pragma unroll
        for (int i = 0; i < 4; i++) sums[i] = bits_of(fmaf(value_of(stored[four / 2], 4 * (four & 1) + i), scale, magic));
        u32* bytes = operands[four / 2] + 2 * (four & 1);
        split_bytes(sums, bytes);
        bytes[0] &= mask, bytes[1] &= mask;
    }
    exponent--;  // the matrix is R / 2
}
#else
// A lane's channels of a row as float32, without their offsets. ``scale``, 2^exponent, is to bring the largest number between
// 2^13 and 2^14, where two numbers of float16 hold 22 bits of it. ``means``: the block's, where there are offsets. ``from``:
// the address of the first piece; ``bad`` counts wrong rows.
template <bool AGAIN>
INLINE void careful_row(const u8* tables, const Block& block, const float* means, const i64 from, const uint4* fetched, int row,
                        int lane, int& bad, int& exponent, float (*numbers)[8], float& scale, bool& wrong) {
    const int quarter = lane & 3;
    u32 most = 0;  // the largest magnitude, as bits
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        u32 stored[PIECE_WORDS];
        load_piece<AGAIN>(from, fetched, lane, piece, stored);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            numbers[piece][i] = value_of(stored, i);
            most = max(most, bits_of(numbers[piece][i]) & MAGNITUDE);
        }
    }
    most = largest_of_row(most);
    wrong = most >= INFINITY_BITS;
    bad += wrong && row < block.tokens && quarter == 0;
#if OFFSETS
    most = 0;
    RowOffsets of_row;
    const u32 position = place_of_row(block, row);
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        float offsets[8];
        of_row.of_piece(tables, means, position, quarter, piece, offsets);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            numbers[piece][i] = in_range(numbers[piece][i] - offsets[i]);
            most = max(most, bits_of(numbers[piece][i]) & MAGNITUDE);
        }
    }
    most = largest_of_row(most);
#endif
    exponent = exponent_for(most, wrong);
    scale = power_of_two(exponent);
}

// A row's coordinates, of its numbers as careful_row gives them.
template <bool TOGETHER, bool AGAIN>
INLINE void rotate_carefully(const u8* tables, const Block& block, const float* means, const i64 from, const uint4* fetched,
                             int row, int lane, int& bad, int& exponent, float (*quads)[4]) {
    float numbers[PIECES][8], scale;
    bool wrong;
    careful_row<AGAIN>(tables, block, means, from, fetched, row, lane, bad, exponent, numbers, scale, wrong);
    rotate_numbers<TOGETHER>(tables, lane, numbers, scale, wrong, quads);
}
#endif
