// Law: scores q k straight from the codes of pair polar (SPEC 14), which are looked up and never decoded to memory.
//
// A warp takes a share of the tokens of one head, group by group. Of a group it fills a table of the points (cos, sin) of every
// pair's angles, as float16; a code is one look-up, times its radius, and then an operand of mma as it is: rows are 16 tokens,
// and lane quarter t brings pairs 16 t to 16 t + 15 of tokens g and g + 8.
//
// Blocks begin at any even byte, loads at multiples of 16 (of 4, where codes have 6 bits). So a lane's pairs are those of a
// virtual row, which begins WRAPPED pairs earlier than its token: these are the last ones of the token before it. Columns 0 to 3
// of mma are four rows of queries without the wrapped pairs, columns 4 to 7 the same rows with these alone, and a token's score
// is a sum of two virtual rows'. The group's last pairs take the place of what stands before its first token.
//
// A radius is step * code + start: the code's bits, where they stand in a half of a word, are a denormal float16, which a
// fused multiply-add takes without a conversion.
//
// A thread block is one warp, of which a multiprocessor runs so many that they hide each other's waits.
//
// Needs ANGLE_BITS and RADIUS_BITS (4 and 4, or 3 and 3), CHUNK (tokens of a block, whole groups), INTERLEAVED (a pair's channels
// are neighbours), ROWS_USED (of queries: 1 to 8), RESIDENT (warps of a multiprocessor), FLOAT16 (a dtype of queries; else they
// are bfloat16), FIELDS and the places of a share's numbers (pair_scores.py names them).

#include "halves.cuh"

#define ALL_LANES 0xffffffffu
#define PAIRS 64
#define CHANNELS (2 * PAIRS)
#define GROUP 128  // tokens that share fields
#define ANGLES (1 << ANGLE_BITS)
#define RADII (1 << RADIUS_BITS)
#define BITS (ANGLE_BITS + RADIUS_BITS)
#define ROW_BYTES (PAIRS * BITS / 8)
#define WORDS (ROW_BYTES / 16)  // of a lane's pairs of a row
#define SLOT (4 * ANGLES)       // bytes of a pair's points
#define SETS ((ROWS_USED + 3) / 4)
#define TILE 32                             // tokens, of which two operands of mma have 16 each
#define KEPT(x) asm volatile("" : "+r"(x))  // in a register, and not computed again
// Bits of a half at which the radii of a word's codes 0 and 1 stand, and those of 2 and 3, when they are multiplied
#define LOW_BIT (BITS == 8 ? 4 : 7)
#define HIGH_BIT (BITS == 8 ? 4 : 3)
#define LARGEST_SIZE (HIGH_BIT + RADIUS_BITS - 9)  // log2 of what radii stay below, so that no step overflows
#define RADIANS 9.58737992e-5f                     // of 2^-16 of a turn

// -- where things are -----------------------------------------------------------------------------------------------
struct Memory {
    u32 points[PAIRS * ANGLES];
    u16 steps[PAIRS], starts[PAIRS];
    u32 queries[4 * SETS][PAIRS + 4];
};

// A group of tokens of a head: addresses of its first row, of its fields, and of its block's exponent; its tokens.
struct Place {
    i64 rows, fields, exponent;
    int tokens;
};

INLINE Place place_of(const i64* share, int lead, int leads, i64 coded) {
    const i64 chunk = coded / CHUNK;
    const int row = (int)(coded - chunk * CHUNK);
    const i64 left = share[CODED] - chunk * CHUNK;  // tokens of this block and of those behind it
    const int tokens = left < CHUNK ? (int)left : CHUNK;
    const i64 size = left < CHUNK ? share[LAST_BYTES] : share[WHOLE_BYTES];
    const i64 block = share[PAYLOAD] + chunk * leads * share[WHOLE_BYTES] + lead * size;
    const i64 fields = block + (i64)tokens * ROW_BYTES + row / GROUP * (8 * PAIRS);
    return {block + (i64)row * ROW_BYTES, fields, block + size - 6, min(tokens - row, GROUP)};
}

// Pairs by which virtual rows begin before tokens, and their bytes.
INLINE int wrapped_of(i64 rows) { return BITS == 8 ? (int)rows & 15 : 4 * (-(int)rows & 3); }
INLINE int bytes_of(int pairs) { return pairs * BITS / 8; }

// -- codes ----------------------------------------------------------------------------------------------------------
struct Codes {
    u32 words[WORDS];
};

// Of a lane's pairs of a virtual row; ``first``: the address of the lane's in row 0.
INLINE Codes load_codes(i64 first, int row) {
    Codes found;
    const i64 at = first + row * ROW_BYTES;
#if BITS == 8
    const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(at));
    found.words[0] = loaded.x, found.words[1] = loaded.y, found.words[2] = loaded.z, found.words[3] = loaded.w;
#else
#pragma unroll
    for (int i = 0; i < WORDS; i++) found.words[i] = __ldg(reinterpret_cast<const u32*>(at) + i);
#endif
    return found;
}

// The first ``bytes`` bytes are those of other codes.
INLINE void begin_with(Codes& codes, const Codes& other, int bytes) {
#pragma unroll
    for (int i = 0; i < WORDS; i++) {
        const int own = min(max(bytes - 4 * i, 0), 4);
        const u32 mask = own == 4 ? 0xffffffffu : (1u << 8 * own) - 1;
        codes.words[i] = (other.words[i] & mask) | (codes.words[i] & ~mask);
    }
}

// Codes 4 m to 4 m + 3, from the least bit on.
INLINE u32 four_codes(const Codes& codes, int m) {
#if BITS == 8
    return codes.words[m];
#else
    return m == 0   ? codes.words[0]
           : m == 3 ? codes.words[2] >> 8
                    : __funnelshift_r(codes.words[m - 1], codes.words[m], 32 - 8 * m);
#endif
}

// The radii of codes 0 and 2 (``odd``: of 1 and 3) and one half, each in a half of a word.
INLINE u32 two_radii(u32 four, bool odd) {
    constexpr u32 CODES = (RADII - 1) << LOW_BIT | (RADII - 1) << (16 + HIGH_BIT);
    constexpr u32 ONE_HALF = 1u << (LOW_BIT - 1) | 1u << (15 + HIGH_BIT);
    if (BITS == 8) return ((odd ? four >> 8 : four) & CODES) | ONE_HALF;
    return ((odd ? four >> 2 : four << 4) & CODES) | ONE_HALF;
}

// Where the point of code i of four stands; ``slot``: where the points of its pair do.
INLINE u32 point_at(u32 four, int i, u32 slot) {
    if (BITS == 8) return __dp4a(four & 0x0f0f0f0fu, 4u << 8 * i, slot);
    return ((i == 0 ? four << 2 : four >> (6 * i - 2)) & 0x1cu) | slot;
}

INLINE u32 shared_word(u32 at) { return *reinterpret_cast<const u32*>(__cvta_shared_to_generic(at)); }

// -- queries --------------------------------------------------------------------------------------------------------
INLINE float query_at(const void* queries, i64 at, int kind) {
    const u32 bits = __ldg(reinterpret_cast<const u16*>(queries) + at);
    return kind == FLOAT16 ? half_value(bits) : float_of(bits << 16);
}

// Leaves a row of queries in shared memory, pair by pair, over the power of two that is returned.
INLINE float prepare_row(const void* queries, i64 row, int kind, u32* out, int lane) {
    float2 both[2];
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int pair = lane + 32 * i;
        const i64 at = row * CHANNELS;
        both[i].x = query_at(queries, at + (INTERLEAVED ? 2 * pair : pair), kind);
        both[i].y = query_at(queries, at + (INTERLEAVED ? 2 * pair + 1 : pair + PAIRS), kind);
        most = max(most, max(bits_of(both[i].x) & MAGNITUDE, bits_of(both[i].y) & MAGNITUDE));
    }
    most = __reduce_max_sync(ALL_LANES, most);
    const int exponent = min(max((int)(most >> MANTISSA_BITS) - BIAS, -126), 126);
    const float over = power_of_two(-exponent);
#pragma unroll
    for (int i = 0; i < 2; i++) out[lane + 32 * i] = pack_halves(both[i].x * over, both[i].y * over);
    return power_of_two(exponent);
}

// A lane's operands of mma: of pairs 16 t + j and columns g; ``wrapped``: pairs of virtual rows that are another token's.
INLINE void load_matrix(u32 (*matrix)[16], const Memory& memory, int wrapped, int lane) {
    const int t = lane & 3, column = lane >> 2;
#pragma unroll
    for (int set = 0; set < SETS; set++)
#pragma unroll
        for (int j = 0; j < 16; j++) {
            const u32 found = memory.queries[4 * set + (column & 3)][(16 * t + j - wrapped) & (PAIRS - 1)];
            matrix[set][j] = (t == 0 && j < wrapped) == (column >= 4) ? found : 0;
        }
}

// -- fields ---------------------------------------------------------------------------------------------------------
// Those of pairs ``lane`` and ``lane + 32`` of a group, and its block's exponent.
struct Fields {
    u32 start[2], step[2], first[2], wide[2];
    int exponent;
};

INLINE Fields load_fields(const Place& place, int lane) {
    Fields found;
    const u16* at = reinterpret_cast<const u16*>(place.fields) + lane;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        found.start[i] = __ldg(at + 32 * i);
        found.step[i] = __ldg(at + 32 * i + PAIRS);
        found.first[i] = __ldg(at + 32 * i + 2 * PAIRS);
        found.wide[i] = __ldg(at + 32 * i + 3 * PAIRS);
    }
    found.exponent = (short)__ldg(reinterpret_cast<const u16*>(place.exponent));
    return found;
}

// NaN counts as 0, an infinity as the largest finite number of its sign.
INLINE float finite_half(u32 field) {
    const u32 size = field & 0x7fffu;
    return half_value((size > HALF_INFINITY ? 0 : min(size, HALF_INFINITY - 1)) | (field & 0x8000u));
}

// Fills the table, in the order of virtual rows; returns what sums of products are multiplied with.
INLINE float fill(Memory& memory, const Fields& fields, int wrapped, int lane) {
    float start[2], step[2];
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        start[i] = finite_half(fields.start[i]);
        step[i] = finite_half(fields.step[i]);
        most = max(most, bits_of(fabsf(start[i]) + RADII * fabsf(step[i])));
    }
    most = __reduce_max_sync(ALL_LANES, most);
    const int power = LARGEST_SIZE - 1 - max((int)(most >> MANTISSA_BITS) - BIAS, -100);
    const float unit = power_of_two(power);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int pair = (lane + 32 * i + wrapped) & (PAIRS - 1), quarter = pair >> 4;
        const int place = (pair & ~3) + (pair & 1) * 2 + (pair >> 1 & 1);  // of four: 0, 2, 1, 3
        const float size = pair & 2 ? power_of_two(24 - HIGH_BIT) : power_of_two(24 - LOW_BIT);
        memory.steps[place] = (u16)half_bits(step[i] * unit * size);
        memory.starts[place] = (u16)half_bits(start[i] * unit);
        const float wide = (float)(int)fields.wide[i] * RADIANS;
        const float first = (float)(short)(fields.first[i] + (fields.wide[i] >> 1)) * RADIANS;
        uint4* slot = reinterpret_cast<uint4*>(memory.points + (pair ^ quarter) * ANGLES);
#pragma unroll
        for (int n = 0; n < ANGLES / 4; n++) {  // four angles; lanes take turns, so that they meet in no bank
            const int four = (n + (pair >> (BITS == 8 ? 1 : 2))) & (ANGLES / 4 - 1);
            const float least = fmaf((float)(4 * four), wide, first);
            u32 found[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float angle = fmaf((float)k, wide, least);
                found[k] = pack_halves(__cosf(angle), __sinf(angle));
            }
            slot[four] = make_uint4(found[0], found[1], found[2], found[3]);
        }
    }
    const int exponent = min(max(fields.exponent, -126), 127);
    return power_of_two(exponent) * power_of_two(-power);
}

// -- products -------------------------------------------------------------------------------------------------------
// What a lane knows of its pairs 16 t to 16 t + 15: steps and starts of radii, those of a word's codes 0 and 2 beside those of 1
// and 3, and where the points of codes 0 to 3 of a first word stand.
struct Lane {
    u32 steps[8], starts[8], slots[4];
};

INLINE void load_lane(Lane& own, const Memory& memory, int lane) {
    const int t = lane & 3;
    const uint4* steps = reinterpret_cast<const uint4*>(memory.steps) + 2 * t;
    const uint4* starts = reinterpret_cast<const uint4*>(memory.starts) + 2 * t;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const uint4 step = steps[i], start = starts[i];
        own.steps[4 * i] = step.x, own.steps[4 * i + 1] = step.y, own.steps[4 * i + 2] = step.z, own.steps[4 * i + 3] = step.w;
        own.starts[4 * i] = start.x, own.starts[4 * i + 1] = start.y;
        own.starts[4 * i + 2] = start.z, own.starts[4 * i + 3] = start.w;
    }
}

// Four pairs' numbers of a virtual row.
INLINE void decode(u32* out, const Codes& codes, int m, const Lane& own) {
    const u32 four = four_codes(codes, m);
    const u32 even = multiply_add(two_radii(four, false), own.steps[2 * m], own.starts[2 * m]);
    const u32 odd = multiply_add(two_radii(four, true), own.steps[2 * m + 1], own.starts[2 * m + 1]);
    out[0] = times_one<false>(shared_word(point_at(four, 0, own.slots[0]) + 4 * SLOT * m), even);
    out[1] = times_one<false>(shared_word(point_at(four, 1, own.slots[1]) + 4 * SLOT * m), odd);
    out[2] = times_one<true>(shared_word(point_at(four, 2, own.slots[2]) + 4 * SLOT * m), even);
    out[3] = times_one<true>(shared_word(point_at(four, 3, own.slots[3]) + 4 * SLOT * m), odd);
}

// Products of a tile's virtual rows g and g + 8 with the queries.
INLINE void tile_sums(float (*sums)[4], const Codes* codes, const Lane& own, const u32 (*matrix)[16]) {
#pragma unroll
    for (int i = 0; i < 4 * SETS; i++) sums[i / 4][i % 4] = 0.0f;
#pragma unroll
    for (int m = 0; m < 4; m++) {
        u32 upper[4], lower[4];
        decode(upper, codes[0], m, own);
        decode(lower, codes[1], m, own);
#pragma unroll
        for (int two = 0; two < 4; two += 2)
#pragma unroll
            for (int set = 0; set < SETS; set++)
                multiply(sums[set], upper[two], lower[two], upper[two + 1], lower[two + 1], matrix[set][4 * m + two],
                         matrix[set][4 * m + two + 1]);
    }
}

// -- scores ---------------------------------------------------------------------------------------------------------
// Of a lane's virtual row: what it adds up itself, and what it gives to another lane.
struct RowSums {
    float own, given;
};

// Which scores a lane finishes: of a row of queries out of four, of a token out of eight. Lanes with t < 2 have two rows of
// queries, of which they finish the first one; those with t >= 2 have the wrapped pairs of the token before, and finish the second.
struct Role {
    bool wraps, takes_next;  // whether its token is of the eight before
    int partner, row, token;  // partner: the lane that gives the other sum
};

INLINE Role role_of(int lane) {
    const int t = lane & 3, g = lane >> 2;
    const bool wraps = t >= 2;
    return {wraps, wraps && g == 0, (wraps ? lane - 6 : lane + 6) & 31, 2 * (t & 1) + wraps, wraps ? (g - 1) & 7 : g};
}

INLINE RowSums row_sums(const float* both, const Role& role) {
    return role.wraps ? RowSums{both[1], both[0]} : RowSums{both[0], both[1]};
}

// A token's score before its factor; ``behind``: of the virtual row that is eight rows behind.
INLINE float finished(const RowSums& row, const RowSums& behind, const Role& role) {
    const float given = __shfl_sync(ALL_LANES, role.takes_next ? behind.given : row.given, role.partner);
    return (role.takes_next ? behind.own : row.own) + given;
}

// Writes a score where its token is among those that count.
INLINE void write(float* at, float score, int token, u32 count) {
    if ((u32)token < count) __stcs(at, score);
}

// Scores of a group's tokens, of which ``count`` from ``low`` on are written; ``codes``: of the first tile, whose rows begin at
// ``rows``; ``at``: where the score of the lane's token of the first eight belongs, which then is that of the next group's.
INLINE void score_group(Codes* codes, i64 rows, int tokens, int low, int count, const Lane& own, const u32 (*matrix)[16],
                        const Role& role, const float* factors, float unit, float** at) {
    const int g = (threadIdx.x & 31) >> 2;
    RowSums beginning[SETS], before[SETS];  // of the group's first eight rows, and of the last eight
    int token = role.token - low;
#pragma unroll 1
    for (int tile = 0; tile < tokens; tile += TILE) {
        RowSums found[SETS][TILE / 8];
#pragma unroll
        for (int i = 0; i < TILE / 8; i += 2) {
            float sums[SETS][4];
            tile_sums(sums, codes + i, own, matrix);
#pragma unroll
            for (int j = i; j < i + 2; j++) codes[j] = load_codes(rows, min(tile + TILE + 8 * j + g, tokens));
#pragma unroll
            for (int set = 0; set < SETS; set++)
#pragma unroll
                for (int j = 0; j < 2; j++) found[set][i + j] = row_sums(sums[set] + 2 * j, role);
        }
#pragma unroll
        for (int set = 0; set < SETS; set++) {
            const u32 most = 4 * set + role.row < ROWS_USED ? count : 0;
            const float factor = factors[set] * unit;
            const RowSums next = found[set][0];
            const float past = finished(tile ? before[set] : next, next, role);
            if (tile) write(at[set] - 8, past * factor, token - 8, most);
#pragma unroll
            for (int i = 0; i < TILE / 8 - 1; i++)
                write(at[set] + 8 * i, finished(found[set][i], found[set][i + 1], role) * factor, token + 8 * i, most);
            if (!tile) beginning[set] = next;
            before[set] = found[set][TILE / 8 - 1];
            at[set] += TILE;
        }
        token += TILE;
    }
#pragma unroll
    for (int set = 0; set < SETS; set++) {
        const u32 most = 4 * set + role.row < ROWS_USED ? count : 0;
        const float past = finished(before[set], beginning[set], role);
        write(at[set] - 8, past * (factors[set] * unit), token - 8, most);
    }
}

// A thread block is a warp: a share of one head. ``kind``: dtype of the queries [sequences, leads, ROWS_USED, CHANNELS]; ``out``
// [sequences, leads, ROWS_USED, tokens], scores times ``scale``.
extern "C" __global__ void __launch_bounds__(32, RESIDENT)
    score_pairs(const i64* __restrict__ shares, const void* __restrict__ queries, float* __restrict__ out, int leads, int kind,
                float scale) {
    __shared__ __align__(SLOT) Memory memory;  // so that a place among a pair's points is an OR
    const int lane = threadIdx.x, t = lane & 3, g = lane >> 2;
    const int lead = blockIdx.x % leads;
    const i64* share = shares + (i64)(blockIdx.x / leads) * FIELDS;
    const Role role = role_of(lane);
    const i64 first_row = (share[SEQUENCE] * leads + lead) * ROWS_USED;
    i64 coded = share[FIRST] - share[EXACT];  // of the group's first token
    int low = (int)(coded % GROUP), left = (int)(share[LAST] - share[FIRST]) + low;  // tokens of the group that count
    coded -= low;
    float factors[SETS];
    float* at[SETS];
#pragma unroll
    for (int set = 0; set < SETS; set++) {
        const int own = 4 * set + role.row;
        at[set] = out + (first_row + min(own, ROWS_USED - 1)) * share[TOTAL] + share[POSITION] + share[EXACT] + coded + role.token;
#pragma unroll 1
        for (int row = 4 * set; row < 4 * set + 4; row++) {
            const float size = prepare_row(queries, first_row + min(row, ROWS_USED - 1), kind, memory.queries[row], lane);
            if (row == own) factors[set] = size * scale;
        }
    }
    __syncwarp();
    Place place = place_of(share, lead, leads, coded);
    Fields fields = load_fields(place, lane);
    u32 matrix[SETS][16];
    Lane own;
    int matrix_wrapped = -1;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        own.slots[i] = (u32)__cvta_generic_to_shared(memory.points) + (16 * t + (i ^ t)) * SLOT;
        KEPT(own.slots[i]);
    }
#pragma unroll 1
    while (true) {
        const int wrapped = wrapped_of(place.rows), tokens = place.tokens;
        const i64 rows = place.rows - bytes_of(wrapped) + 4 * WORDS * t;
        Codes codes[TILE / 8];
#pragma unroll
        for (int i = 0; i < TILE / 8; i++) codes[i] = load_codes(rows, min(8 * i + g, tokens));
        if (lane == 0) begin_with(codes[0], load_codes(rows, tokens), bytes_of(wrapped));
        if (wrapped != matrix_wrapped) load_matrix(matrix, memory, wrapped, lane), matrix_wrapped = wrapped;
        const float unit = fill(memory, fields, wrapped, lane);
        __syncwarp();
        load_lane(own, memory, lane);
        const int count = min(left, tokens) - low;
        left -= GROUP;
        coded += GROUP;
        if (left > 0) {
            place = place_of(share, lead, leads, coded);
            fields = load_fields(place, lane);
        }
        score_group(codes, rows, tokens, low, count, own, matrix, role, factors, unit, at);
        if (left <= 0) break;
        low = 0;
        __syncwarp();
    }
}
