// Law: attention straight from quads (SPEC 8): softmax(q K^T) V over encoded keys and values, which are never decoded to memory.
//
// Keys are not rotated back: a query is rotated once, and the weighted sum of values is rotated back once. A
// row of K or V is a radius times points of the table with signs, so a quad is one look-up of four float16 numbers, which are an
// operand of mma as they are.
//
// A thread block takes some chunks of one head of K and V, of one stream; its warps take tiles of 32 tokens by turns, each with a
// running maximum and sum of its own, and are merged at the end. One block more of every head takes the exact tokens: the first
// ones, and the recent ones that are not encoded yet; these blocks begin last, as they take the least time. combine merges the
// blocks' partial results (flash decoding). What a block takes, of each head of a sequence, is told by a row of numbers.
//
// mma's columns are the rows of queries: the query heads that share a head of K and V, times the queries, eight at a time. For
// scores its rows are 16 tokens, and of 16 inputs (coordinates) a step, lane quarter t brings a quad of its own: quad
// t * QUADS_K + step, of tokens g and g + 8. For the weighted sum its rows are coordinates: lane g brings two of a quad,
// g * QUADS_V + step, of tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. Where half of the columns are spare (up to four rows of
// queries), a point is an operand as it is: of two neighbouring coordinates in one register, columns 0 to 3 take the first one, by
// weights (w, 0), and columns 4 to 7 the second one, by (0, w).
//
// The mean that was taken from keys turns with RoPE: q times it is a sum of cosines over pairs of channels, a product of
// coefficients, turned to the first token of a unit of 64, with a table of 64 tokens' turns (TURNS): mma again.
//
// The query is rotated where the tables are filled; the last block of a head that is done merges the partial results, and rotates
// them back.
//
// Needs ORDER (64, 128 or 256, and head_dim), THREADS, RESIDENT (thread blocks of a multiprocessor), HALVES (of eight rows of
// queries: 1 or 2), ROWS_USED (at most 8 * HALVES), QUERIES (of a head: causal among themselves), CHUNK (tokens of a block),
// K_BITS and V_BITS (of a quad), K_BYTES and V_BYTES (of a row's indices), K_COPIES and V_COPIES (of a point, in shared memory),
// HALF (tokens, of BOTH), the places in shared memory V_AT (0: values have the keys' table), TURNS_AT, COEFFICIENTS_AT, INPUTS_AT and WARPS_AT, and
// BLOB_BYTES of the tables; K_MANTISSA and V_MANTISSA (log2 of the factor of radius 0), RADIUS_STEPS, PAIRS (that turn; 0:
// none), INTERLEAVED, K_OFFSETS, V_OFFSETS, ALIGN and BESIDE (of a block's bytes), MOST_BLOCKS (of a head), FIELDS and the places
// of a thread block's numbers (attention.py names them), Q_TYPE and TYPE (of queries and outputs, and of exact rows: FLOAT16,
// BFLOAT16 or FLOAT32), CAP (of scores, where there is one).
//
// With PAGED a stream's chunks are pages of a pool, and exact last tokens are in blocks of a serving engine's cache: see Tile
// and RawBlocks.

#include "halves.cuh"
#include "numbers.cuh"

#define ALL_LANES 0xffffffffu
#define WARPS (THREADS / 32)
#define ROWS (8 * HALVES)
#define SPARE (ROWS_USED <= 4)       // columns 4 to 7 are spare, and repeat the others
#define LANES (SPARE ? 16 : 32)      // whose columns are used
#define QUADS_K (ORDER / 16)  // of a lane, of a key
#define QUADS_V (ORDER / 32)  // of a lane, of a value
#define TILE 32               // tokens
#define UNIT 64               // tokens, to whose first one the coefficients of the keys' mean are turned; BOTH: 2 HALF
#define UNITS ((CHUNK + UNIT - 1) / UNIT)  // of a block
#define HALF_TILES (HALF / TILE)
#define PARTS (BOTH ? 2 * HALF_TILES : CHUNK > TILE ? 2 : 1)  // tiles of a unit
#define QUERIES_KEPT (0 && SPARE && ORDER <= 128)  // in registers
#define NOTHING (-1e30f)      // a maximum of no scores
#define ROOM 14               // log2 of a value's weight whose score is the maximum, so that small ones are far from float16's smallest
#define SLACK 1.0f            // a running maximum is one that scores exceed by so much at most: float16 has room for weights of 2^15
#define STEPS (PAIRS / 8)     // of mma, over pairs of channels

// -- where things are -----------------------------------------------------------------------------------------------
INLINE int block_bytes(int tokens, int row_bytes) { return (tokens * row_bytes + BESIDE + ALIGN - 1) / ALIGN * ALIGN; }

// The planes of a block of K or V.
struct Planes {
    const u32 *signs, *indices;
    const u8* radii;
};

// ``payload``: the address of a stream's first block; ``heads``: of the stream, whose blocks of a chunk lie side by side. With
// PAGED they are those of a pool's first page, and a page.
template <int INDEX_BYTES> INLINE Planes planes_of(i64 payload, int chunk, int tokens, int head, int heads) {
    constexpr int ROW = ORDER / 8 + INDEX_BYTES + 1;
    const i64 before = (i64)(chunk * heads) * block_bytes(CHUNK, ROW) + head * block_bytes(tokens, ROW);
    const u8* block = reinterpret_cast<const u8*>(payload + before);
    return {reinterpret_cast<const u32*>(block), reinterpret_cast<const u32*>(block + tokens * (ORDER / 8)),
            block + tokens * (ORDER / 8 + INDEX_BYTES)};
}

template <bool FULL> INLINE int base_of(const Planes& planes, int tokens) {
    if (FULL && CHUNK % 4 == 0) return (int)__ldg(reinterpret_cast<const short*>(planes.radii + tokens));
    return (int)(short)(__ldg(planes.radii + tokens) | __ldg(planes.radii + tokens + 1) << 8);
}

// -- quads ----------------------------------------------------------------------------------------------------------
// The indices of N quads that begin at quad ``first`` of a row: N * BITS bits of whole words.
template <int BITS, int N> struct Indices {
    static constexpr bool WHOLE = BITS * N % 32 == 0;  // then every row's begin at a word
    static constexpr int LOADED = WHOLE ? BITS * N / 32 : (BITS * N + 31) / 32 + 1;
    static constexpr int WORDS = (BITS * N + 31) / 32;
    u32 words[LOADED];

    // Of row ``row`` and so many ``behind`` it: a number that is known when this is compiled costs no address of its own.
    template <int INDEX_BYTES> INLINE void load(const u32* indices, int row, int behind, int first) {
        constexpr bool ALIGNED = WHOLE && INDEX_BYTES % 4 == 0;
        const int bit = (row + behind) * (8 * INDEX_BYTES) + first * BITS;
        const u32* at = ALIGNED ? indices + (row * (INDEX_BYTES / 4) + first * BITS / 32) + behind * (INDEX_BYTES / 4)
                                : indices + (bit >> 5);
#pragma unroll
        for (int i = 0; i < LOADED; i++) words[i] = __ldcs(at + i);
        if (!WHOLE)
#pragma unroll
            for (int i = 0; i < LOADED - 1; i++) words[i] = __funnelshift_r(words[i], words[i + 1], bit);
        if (!WHOLE && BITS * N % 32 == 0) words[LOADED - 1] = 0;
    }

    // The point of a quad, packed float16: coordinates 0 and 1, 2 and 3. ``table``: the address in shared memory of the lane's own
    // among COPIES of point 0.
    template <int COPIES> INLINE uint2 point(u32 table, int quad) const {
        return *reinterpret_cast<const uint2*>(__cvta_shared_to_generic(place<COPIES>(table, quad)));
    }

    // Its address: the index times the bytes of all copies, behind ``table``.
    template <int COPIES> INLINE u32 place(u32 table, int quad) const {
        if (BITS == 8 && COPIES == 16) return __dp4a(words[quad / 4], 128u << 8 * (quad % 4), table);
        if (BITS == 4 && COPIES == 16) {  // each second index of a word, as a byte of its own
            const u32 bytes = (quad % 2 ? words[quad / 8] >> 4 : words[quad / 8]) & 0x0f0f0f0fu;
            return __dp4a(bytes, 128u << 8 * (quad / 2 % 4), table);
        }
        const int bit = quad * BITS, word = bit / 32;
        const u32 window = bit % 32 + BITS <= 32 ? words[word] >> bit % 32
                                                 : __funnelshift_r(words[word], words[min(word + 1, LOADED - 1)], bit % 32);
        return (window & ((1u << BITS) - 1)) * (8 * COPIES) + table;
    }
};

// Gives a point the signs of quad ``quad`` of eight.
INLINE void add_signs(uint2& point, u32 signs, int quad) {
    point.x ^= signs << (15 - quad) & 0x80008000u;
    point.y ^= signs << (7 - quad) & 0x80008000u;
}

// -- mma ------------------------------------------------------------------------------------------------------------
// sums [4] += rows [4] times matrix [2].
INLINE void multiply(float* sums, u32 a0, u32 a1, u32 a2, u32 a3, uint2 matrix) {
    multiply(sums, a0, a1, a2, a3, matrix.x, matrix.y);
}

// Turns over a matrix of 8 x 8 packed numbers, of which a lane has two of row lane / 4.
INLINE u32 turned_over(u32 packed) {
    u32 found;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(found) : "r"(packed));
    return found;
}

// Of a tile's tokens by rows of queries.
INLINE void clear_tile(float (*sums)[HALVES][4]) {
#pragma unroll
    for (int i = 0; i < TILE / 16 * HALVES * 4; i++) sums[i / (4 * HALVES)][i / 4 % HALVES][i % 4] = 0.0f;
}

INLINE float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// The row of queries of a column.
INLINE int row_of(int column) { return SPARE ? column % 4 : column; }

INLINE float capped(float score) {  // in units of log 2
#ifdef CAP
    return (CAP * 1.44269504f) * tanhf(score * (0.69314718f / CAP));
#else
    return score;
#endif
}

// -- numbers of rows as tensors have them ---------------------------------------------------------------------------
template <int KIND> INLINE float number_at(const void* at, i64 i) {
    if (KIND == FLOAT32) return reinterpret_cast<const float*>(at)[i];
    const u32 bits = reinterpret_cast<const u16*>(at)[i];
    return KIND == FLOAT16 ? half_value(bits) : float_of(bits << 16);
}

template <int KIND> INLINE void put_number(void* at, i64 i, float x) {
    if (KIND == FLOAT32) reinterpret_cast<float*>(at)[i] = x;
    else reinterpret_cast<u16*>(at)[i] = (u16)(KIND == FLOAT16 ? pack_halves(x, 0.0f) : pack_brains(x, 0.0f));
}

// A channel's mean; ``at``: of the stream's exponent, and of the head's means.
INLINE float mean_at(i64 exponent, i64 means, int channel) {
    const float unit = power_of_two(*reinterpret_cast<const short*>(exponent));
    return half_value(reinterpret_cast<const u16*>(means)[channel]) * unit;
}

INLINE float sum_of_warp(float x) {
    for (int apart = 16; apart; apart >>= 1) x += __shfl_xor_sync(ALL_LANES, x, apart);
    return x;
}

INLINE float most_of_warp(float x) {
    for (int apart = 16; apart; apart >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, apart));
    return x;
}

// -- the rotation (SPEC 5.3), of a row by a warp --------------------------------------------------------------------
// R = H D P H E: a lane has MINE neighbours of a row. ``rotation``: E, D (1 or -1) and P (places), int [3][ORDER].
#define MINE (ORDER / 32)

INLINE void hadamard(float* row, int lane) {
#pragma unroll
    for (int apart = 1; apart < MINE; apart *= 2)
#pragma unroll
        for (int i = 0; i < MINE; i++)
            if (!(i & apart)) {
                const float first = row[i], second = row[i + apart];
                row[i] = first + second, row[i + apart] = first - second;
            }
#pragma unroll
    for (int apart = 1; apart < 32; apart *= 2)
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const float other = __shfl_xor_sync(ALL_LANES, row[i], apart);
            row[i] = lane & apart ? other - row[i] : row[i] + other;
        }
}

// R times a row; ``buffer`` [ORDER] in shared memory.
INLINE void rotate(float* row, const int* __restrict__ rotation, float* buffer, int lane) {
    const int* mine = rotation + lane * MINE;
#pragma unroll
    for (int i = 0; i < MINE; i++) row[i] *= (float)__ldg(mine + i);
    hadamard(row, lane);
#pragma unroll
    for (int i = 0; i < MINE; i++) buffer[lane * MINE + i] = row[i];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < MINE; i++) row[i] = buffer[__ldg(mine + 2 * ORDER + i)] * (float)__ldg(mine + ORDER + i);
    __syncwarp();
    hadamard(row, lane);
}

// R's transpose times a row.
INLINE void rotate_back(float* row, const int* __restrict__ rotation, float* buffer, int lane) {
    const int* mine = rotation + lane * MINE;
    hadamard(row, lane);
#pragma unroll
    for (int i = 0; i < MINE; i++) buffer[__ldg(mine + 2 * ORDER + i)] = row[i] * (float)__ldg(mine + ORDER + i);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < MINE; i++) row[i] = buffer[lane * MINE + i];
    __syncwarp();
    hadamard(row, lane);
#pragma unroll
    for (int i = 0; i < MINE; i++) row[i] *= (float)__ldg(mine + i);
}

// What the keys' mean adds to scores under RoPE is found by mma, too: see add_means.
#define MEANS (PAIRS && K_OFFSETS)
#define BOTH (MEANS && SPARE && CHUNK % TILE == 0)  // halves of a unit at once

// -- queries --------------------------------------------------------------------------------------------------------
// Leaves the rows' queries in shared memory: rotated, as operands of mma of their largest number's size; what a score of such
// numbers is multiplied with (about_rows.x); the coefficients of the keys' mean, likewise (.y); and what the mean adds to every
// score (.z), as far as it does not turn. Scores are in units of log 2.
INLINE void prepare_queries(const void* __restrict__ queries, const int* __restrict__ rotation, const i64* fields, int which,
                            int head, float scale, u8* memory, float4* about_rows) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    float* means = reinterpret_cast<float*>(memory);
#if K_OFFSETS
    for (int i = threadIdx.x; i < ORDER; i += THREADS)
        means[i] = mean_at(fields[K_EXPONENT], fields[K_MEANS] + (i64)head * (2 * ORDER + 4), i);
    __syncthreads();
#endif
    u32* inputs = reinterpret_cast<u32*>(memory + INPUTS_AT);
    float2* coefficients = reinterpret_cast<float2*>(memory + COEFFICIENTS_AT);
#pragma unroll 1
    for (int row = warp; row < ROWS; row += WARPS) {
        float4 found = {0.0f, 0.0f, 0.0f, 0.0f};
        const bool used = row < ROWS_USED;
        float *own = means + (1 + 2 * warp) * ORDER, *buffer = own + ORDER, mine[MINE];
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const i64 at = ((i64)which * ROWS_USED + row) * ORDER + lane * MINE + i;
            mine[i] = used ? number_at<Q_TYPE>(queries, at) * scale : 0.0f;
            own[lane * MINE + i] = mine[i];
        }
        rotate(mine, rotation, buffer, lane);
        float most = 1e-30f;
#pragma unroll
        for (int i = 0; i < MINE; i++) most = fmaxf(most, fabsf(mine[i]));
        most = most_of_warp(most);
        found.x = most;
#pragma unroll
        for (int i = 0; i < MINE / 2; i++) {  // two coordinates
            const int two = lane * (MINE / 2) + i, quad = two / 2;
            const int place = (quad % QUADS_K * HALVES + row / 8) * LANES + row % 8 * 4 + quad / QUADS_K;
            if (row % 8 * 4 < LANES) inputs[2 * place + two % 2] = pack_halves(mine[2 * i] / most, mine[2 * i + 1] / most);
        }
#if K_OFFSETS
        float still = 0.0f;
        for (int i = 2 * PAIRS + lane; i < ORDER; i += 32) still = fmaf(own[i], means[i], still);
        found.z = sum_of_warp(still);
#if PAIRS
        float largest = 1e-30f;
        float2 both[(PAIRS + 31) / 32];
#pragma unroll
        for (int i = 0; i < (PAIRS + 31) / 32; i++) {
            const int pair = min(i * 32 + lane, PAIRS - 1);
            const int first = INTERLEAVED ? 2 * pair : pair, second = INTERLEAVED ? 2 * pair + 1 : pair + PAIRS;
            both[i].x = own[first] * means[first] + own[second] * means[second];
            both[i].y = own[second] * means[first] - own[first] * means[second];
            largest = fmaxf(largest, fmaxf(fabsf(both[i].x), fabsf(both[i].y)));
        }
        found.y = most_of_warp(largest);
#pragma unroll
        for (int i = 0; i < (PAIRS + 31) / 32; i++)
            if (used && i * 32 + lane < PAIRS)
                coefficients[row * PAIRS + i * 32 + lane] = make_float2(both[i].x / found.y, both[i].y / found.y);
#endif
#endif
        if (lane == 0) about_rows[row] = found;
    }
    __syncthreads();
}

// -- results --------------------------------------------------------------------------------------------------------
// Leaves a block's result in the partial results: the merged sums of its warps. ``sums`` [WARPS][COUNT] in shared memory, of
// which ``place`` tells the row (ROWS_USED or more: of none) and the coordinate; ``most`` and ``total`` [WARPS][ROWS].
template <int COUNT, typename Place>
INLINE void merge_warps(const float* sums, const float* most, const float* total, Place place, float* out, float2* about) {
    for (int i = threadIdx.x; i < COUNT; i += THREADS) {
        int row, coordinate;
        place(i, row, coordinate);
        if (row >= ROWS_USED) continue;
        float largest = NOTHING, sum = 0.0f, whole = 0.0f;
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) largest = fmaxf(largest, most[warp * ROWS + row]);
#pragma unroll
        for (int warp = 0; warp < WARPS; warp++) {
            const float weight = exp2_of(most[warp * ROWS + row] - largest);
            sum = fmaf(sums[warp * COUNT + i], weight, sum);
            whole = fmaf(total[warp * ROWS + row], weight, whole);
        }
        __stcg(out + row * ORDER + coordinate, sum);
        if (coordinate == 0) __stcg(about + row, make_float2(largest, whole));
    }
}

// The last block of a head to come here merges all partial results of the head, rotates back what is rotated, and writes the
// outputs. ``arrived`` counts a head's blocks, and ends as it began.
INLINE void combine(const float* __restrict__ partial_sums, const float2* __restrict__ partial_about, int* __restrict__ arrived,
                    const int* __restrict__ rotation, const i64* fields, int which, int head, int blocks, u8* memory,
                    void* __restrict__ out) {
    __shared__ bool last;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(arrived + which, 1) == blocks - 1;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) arrived[which] = 0;
    constexpr int STRIDE = MOST_BLOCKS + 2;  // of weights: of each block; of all that is encoded, and of everything
    constexpr int FOURS = ROWS_USED * ORDER / 4, AT_ONCE_SUMS = THREADS > FOURS ? THREADS / FOURS : 1;
    float *weights = reinterpret_cast<float*>(memory), *parts = weights + (ROWS_USED * STRIDE + 3) / 4 * 4;
    float* buffers = parts + AT_ONCE_SUMS * ROWS_USED * ORDER;
    const float2* about = partial_about + (i64)which * blocks * ROWS_USED;
    const float* sums = partial_sums + (i64)which * blocks * ROWS_USED * ORDER;
    for (int row = warp; row < ROWS_USED; row += WARPS) {
        float largest = NOTHING, coded = 0.0f, whole = 0.0f;
        for (int i = lane; i < blocks; i += 32) largest = fmaxf(largest, __ldcg(about + i * ROWS_USED + row).x);
        largest = most_of_warp(largest);
        for (int i = lane; i < blocks; i += 32) {
            const float2 its = __ldcg(about + i * ROWS_USED + row);
            const float weight = its.y > 0.0f ? exp2_of(its.x - largest) : 0.0f;
            weights[row * STRIDE + i] = weight;
            whole = fmaf(its.y, weight, whole);
            if (i < blocks - 1) coded = fmaf(its.y, weight, coded);
        }
        coded = sum_of_warp(coded), whole = sum_of_warp(whole);
        if (lane == 0) weights[row * STRIDE + MOST_BLOCKS] = coded, weights[row * STRIDE + MOST_BLOCKS + 1] = whole;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < AT_ONCE_SUMS * FOURS; i += THREADS) {  // the sums of every AT_ONCE_SUMS-th block
        const int four = i % FOURS;
        const float* its = weights + four * 4 / ORDER * STRIDE;
        float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 8
        for (int block = i / FOURS; block < blocks - 1; block += AT_ONCE_SUMS) {
            const float4 x = __ldcg(reinterpret_cast<const float4*>(sums + (i64)block * (ROWS_USED * ORDER)) + four);
            const float weight = its[block];
            sum.x = fmaf(x.x, weight, sum.x), sum.y = fmaf(x.y, weight, sum.y);
            sum.z = fmaf(x.z, weight, sum.z), sum.w = fmaf(x.w, weight, sum.w);
        }
        reinterpret_cast<float4*>(parts)[i] = sum;
    }
    __syncthreads();
#pragma unroll 1
    for (int row = warp; row < ROWS_USED; row += WARPS) {
        const float* its = weights + row * STRIDE;
        float mine[MINE];
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            mine[i] = 0.0f;
            for (int part = 0; part < AT_ONCE_SUMS; part++) mine[i] += parts[(part * ROWS_USED + row) * ORDER + lane * MINE + i];
        }
        rotate_back(mine, rotation, buffers + warp * ORDER, lane);
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int at = row * ORDER + lane * MINE + i;
            float found = fmaf(__ldcg(sums + (i64)(blocks - 1) * (ROWS_USED * ORDER) + at), its[blocks - 1], mine[i]);
#if V_OFFSETS
            found += its[MOST_BLOCKS] * mean_at(fields[V_EXPONENT], fields[V_MEANS] + (i64)head * (2 * ORDER + 4), at % ORDER);
#endif
            put_number<Q_TYPE>(out, (i64)which * ROWS_USED * ORDER + at, found / its[MOST_BLOCKS + 1]);
        }
    }
}

// -- exact tokens ---------------------------------------------------------------------------------------------------
// The scores and values of tokens that are not encoded, by a warp: token ``first`` and every WARPS-th behind it. A lane has
// ORDER / 32 neighbouring channels. The query is not rotated, nor is the result.
#ifdef PAGED
// Where exact tokens are in the blocks of a serving engine's cache, whose table is read when the kernel runs. A number in it that is
// no block of the cache gives NaN, not a read of other memory.
struct RawBlocks {
    const int* table;     // of the sequence; nothing: rows lie one behind the other
    i64 key, value;       // bytes from block to block
    int first, size;      // token of the sequence that row 0 is; tokens of a block
    int columns, blocks;  // of the table, and of the cache

    INLINE const u8* find(int row, const u8* rows, i64 stride, i64 block_stride) const {
        if (!table) return rows + row * stride;
        const int token = first + row, column = token / size, block = column < columns ? table[column] : -1;
        return block >= 0 && block < blocks ? rows + block * block_stride + token % size * stride : nullptr;
    }
};
#endif

struct ExactRows {
    const u8 *keys, *values;  // of the head's first token
    i64 key_stride, value_stride;  // bytes of a token
    int tokens;
#ifdef PAGED
    RawBlocks raw;
#endif
};

// Keys or values of tokens that are to be put behind others; strides in bytes.
struct NewRows {
    i64 rows, sequence, head, token;

    INLINE const u8* of(int which, int head_number) const {
        return reinterpret_cast<const u8*>(rows + which * sequence + head_number * head);
    }
};

// Copies rows of ROW bytes, by a thread block.
template <int ROW> INLINE void put_behind(const u8* from, i64 from_stride, const u8* to, i64 to_stride, int rows) {
    for (int i = threadIdx.x; i < rows * (ROW / 4); i += THREADS) {
        const int row = i / (ROW / 4), word = i % (ROW / 4);
        u32* target = const_cast<u32*>(reinterpret_cast<const u32*>(to + row * to_stride)) + word;
        *target = reinterpret_cast<const u32*>(from + row * from_stride)[word];
    }
}

#define AT_ONCE 4  // tokens

INLINE void exact_numbers(const u8* row, int lane, float* numbers) {
    constexpr int WORDS = MINE * (TYPE == FLOAT32 ? 4 : 2) / 4;
    u32 words[WORDS];
#ifdef PAGED
    if (!row) {
#pragma unroll
        for (int i = 0; i < MINE; i++) numbers[i] = float_of(0x7fc00000u);  // NaN
        return;
    }
#endif
#pragma unroll
    for (int i = 0; i < WORDS; i++) words[i] = reinterpret_cast<const u32*>(row)[lane * WORDS + i];
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        if (TYPE == FLOAT32) numbers[i] = float_of(words[i % WORDS]);
        else if (TYPE == FLOAT16) numbers[i] = half_value(words[i / 2 % WORDS] >> 16 * (i & 1));
        else numbers[i] = float_of(i & 1 ? words[i / 2 % WORDS] & 0xffff0000u : words[i / 2 % WORDS] << 16);
    }
}

// ``behind``: how many of the last tokens the first query does not see, the next one less of it.
INLINE void add_exact(const ExactRows& rows, int behind, int warp, int lane, const float (*query)[MINE], float* most,
                      float* total, float (*sums)[MINE]) {
#pragma unroll 1
    for (int first = warp; first < rows.tokens; first += WARPS * AT_ONCE) {
        float keys[AT_ONCE][MINE], values[AT_ONCE][MINE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            const int token = min(first + i * WARPS, rows.tokens - 1);
#ifdef PAGED
            exact_numbers(rows.raw.find(token, rows.keys, rows.key_stride, rows.raw.key), lane, keys[i]);
            exact_numbers(rows.raw.find(token, rows.values, rows.value_stride, rows.raw.value), lane, values[i]);
#else
            exact_numbers(rows.keys + token * rows.key_stride, lane, keys[i]);
            exact_numbers(rows.values + token * rows.value_stride, lane, values[i]);
#endif
        }
#pragma unroll
        for (int row = 0; row < ROWS_USED; row++) {
            float scores[AT_ONCE], larger = most[row];
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                scores[i] = 0.0f;
#pragma unroll
                for (int k = 0; k < MINE; k++) scores[i] = fmaf(query[row][k], keys[i][k], scores[i]);
            }
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const int token = first + i * WARPS;
                scores[i] = capped(sum_of_warp(scores[i]));
                if (token >= rows.tokens - max(behind - row % QUERIES, 0)) scores[i] = NOTHING;
                larger = fmaxf(larger, scores[i]);
            }
            const float factor = exp2_of(most[row] - larger);
            most[row] = larger, total[row] *= factor;
#pragma unroll
            for (int k = 0; k < MINE; k++) sums[row][k] *= factor;
#pragma unroll
            for (int i = 0; i < AT_ONCE; i++) {
                const float weight = scores[i] != NOTHING ? exp2_of(scores[i] - larger) : 0.0f;  // NaN stays NaN
                total[row] += weight;
#pragma unroll
                for (int k = 0; k < MINE; k++) sums[row][k] = fmaf(weight, values[i][k], sums[row][k]);
            }
        }
    }
}

// -- encoded tokens -------------------------------------------------------------------------------------------------
// A tile of a warp: so many tokens of a block from ``first`` on.
struct Tile {
    int block, first, tokens;  // of the block
#ifdef PAGED
    int page;  // where the block is

    INLINE int place() const { return page; }
#else
    INLINE int place() const { return block; }
#endif

    INLINE bool counts(int least) const { return first < tokens && block * CHUNK + min(first + TILE, tokens) > least; }
    INLINE bool whole(int least) const { return first + TILE <= tokens && block * CHUNK + first >= least; }
};

// A lane's part of a tile of keys: tokens g, g + 8 ...; and of a tile of values: tokens 2 t, 2 t + 1, 2 t + 8 ... Rows behind the
// block's end repeat its last.
struct Keys {
    Indices<K_BITS, QUADS_K> indices[TILE / 8];
    u32 signs[TILE / 8][(QUADS_K + 7) / 8];
    int code, base;  // of the radius of token ``lane``, and of its block

    template <bool FULL> INLINE void load(const Tile& tile, int tokens, i64 payload, int head, int heads, int lane) {
        const Planes planes = planes_of<K_BYTES>(payload, tile.place(), tokens, head, heads);
        const int g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) {
            const int row = FULL ? tile.first + g : min(tile.first + g + 8 * j, tokens - 1), behind = FULL ? 8 * j : 0;
            indices[j].template load<K_BYTES>(planes.indices, row, behind, t * QUADS_K);
            const u32* its = planes.signs + (row * (ORDER / 32) + t * QUADS_K / 8);
#pragma unroll
            for (int i = 0; i < (QUADS_K + 7) / 8; i++) signs[j][i] = __ldcs(its + (behind * (ORDER / 32) + i));
        }
        code = __ldg(planes.radii + (FULL ? tile.first + lane : min(tile.first + lane, tokens - 1)));
        base = base_of<FULL>(planes, tokens);
    }
};

struct Values {
    Indices<V_BITS, QUADS_V> indices[TILE / 4];
    u32 signs[TILE / 4];
    int code, base;

    template <bool FULL> INLINE void load(const Tile& tile, int tokens, i64 payload, int head, int heads, int lane) {
        const Planes planes = planes_of<V_BYTES>(payload, tile.place(), tokens, head, heads);
        const int g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int i = 0; i < TILE / 4; i++) {
            const int token = tile.first + 2 * t, behind = i / 2 * 8 + i % 2;
            const int row = FULL ? token : min(token + behind, tokens - 1), more = FULL ? behind : 0;
            indices[i].template load<V_BYTES>(planes.indices, row, more, g * QUADS_V);
            signs[i] = __ldcs(planes.signs + (row * (ORDER / 32) + g * QUADS_V / 8) + more * (ORDER / 32));
        }
        code = __ldg(planes.radii + (FULL ? tile.first + lane : min(tile.first + lane, tokens - 1)));
        base = base_of<FULL>(planes, tokens);
    }
};

// Loads a tile of keys or values; of a block that is full, from places that are known when this is compiled.
template <typename Side> INLINE void load_tile(Side& side, const Tile& tile, i64 payload, int head, int heads, int lane) {
    if (CHUNK % TILE == 0 && tile.tokens == CHUNK) side.template load<true>(tile, CHUNK, payload, head, heads, lane);
    else side.template load<false>(tile, tile.tokens, payload, head, heads, lane);
}

// -- the keys' mean -------------------------------------------------------------------------------------------------
// A row's sum of the coefficients' turns at a token is that at the first of some tokens, and the product of the coefficients there
// with (cos - 1, sin) of the turn from there on: float16 is enough for that, as most pairs turn little. These tokens are a unit's;
// where columns are spare (BOTH), a unit has two halves, which may lie in several blocks: columns 0 to 3 are turned to the first
// token of the first one, and 4 to 7 to that of the second.
#define STEP_WORDS (HALVES * (BOTH ? 32 : LANES) * 2 + 8)  // of operands

// The shared memory of one warp: factors of a tile's rows, and the turned coefficients, as operands.
struct WarpMemory {
    float factors[2][TILE];
#if MEANS
    float4 first[ROWS];  // as about_rows, .z at the first token, by columns (BOTH: four of each half)
    u32 operands[STEPS * STEP_WORDS];
#if BOTH
    float2 added[PARTS][TILE / 8][16];  // what it adds to those of each tile beside that, as lanes need it
#endif
#endif
};

#if MEANS
// The place of a column's coefficients of a pair among a warp's operands.
INLINE int operand_at(int column, int pair) {
    return pair / 8 * STEP_WORDS + (column / 8 * LANES + column % 8 * 4 + pair % 4) * 2 + pair % 8 / 4;
}

// The sums of eight numbers over a warp: lanes 4 i to 4 i + 3 get that of number i.
INLINE float sums_of_warp(float* x, int lane) {
#pragma unroll
    for (int apart = 16, left = 4; left; apart /= 2, left /= 2)
#pragma unroll
        for (int i = 0; i < left; i++) {
            const float kept = lane & apart ? x[i + left] : x[i], given = lane & apart ? x[i] : x[i + left];
            x[i] = kept + __shfl_xor_sync(ALL_LANES, given, apart);
        }
    float sum = x[0];
    sum += __shfl_xor_sync(ALL_LANES, sum, 2);
    return sum + __shfl_xor_sync(ALL_LANES, sum, 1);
}

// Turns the coefficients to a token at ``position`` (and to that HALF behind it). Decoders turn by the 16 upper bits of a phase:
// half a step less, on average. Each lane takes some pairs, of all rows.
INLINE void turn_coefficients(const u8* memory, WarpMemory& mine, const float4* about_rows, u32 position, const u32* frequencies,
                              int lane) {
    constexpr int TURNS = BOTH ? 2 : 1;
    float sums[TURNS][ROWS];
#pragma unroll
    for (int i = 0; i < TURNS * ROWS; i++) sums[i / ROWS][i % ROWS] = 0.0f;
#pragma unroll
    for (int pair = lane; pair < PAIRS; pair += 32) {
        const u32 frequency = __ldg(frequencies + pair);
        float cosine[TURNS], sine[TURNS];
#pragma unroll
        for (int i = 0; i < TURNS; i++) {
            const int phase = (int)((position + i * HALF) * frequency - (1u << 15));
            const float angle = (float)phase * 1.46291807927e-9f;  // 2 pi / 2^32
            cosine[i] = __cosf(angle), sine[i] = __sinf(angle);
        }
#pragma unroll
        for (int row = 0; row < ROWS_USED; row++) {
            const float2 own = reinterpret_cast<const float2*>(memory + COEFFICIENTS_AT)[row * PAIRS + pair];
#pragma unroll
            for (int i = 0; i < TURNS; i++) {
                const float x = fmaf(own.x, cosine[i], own.y * sine[i]), y = fmaf(own.y, cosine[i], -own.x * sine[i]);
                sums[i][row] += x;
                mine.operands[operand_at(4 * i + row, pair)] = pack_halves(x, y);
            }
        }
    }
#if BOTH
    float eight[8];
#pragma unroll
    for (int i = 0; i < 8; i++) eight[i] = sums[i / 4][i % 4];
    const float sum = sums_of_warp(eight, lane);
    const float4 its = about_rows[lane / 4 % 4];
    if (lane % 4 == 0) mine.first[lane / 4] = {its.x, its.y, fmaf(sum, its.y, its.z), 0.0f};
#else
#pragma unroll
    for (int row = 0; row < ROWS_USED; row++) {
        const float sum = sum_of_warp(sums[0][row]);
        const float4 its = about_rows[row];
        if (lane == 0) mine.first[row] = {its.x, its.y, fmaf(sum, its.y, its.z), 0.0f};
    }
#endif
}

// What the mean adds to the scores of a tile, whose first token is the ``behind``-th of those that the coefficients were turned for,
// beside what it adds to the first of them: sums [TILE / 16][HALVES][4], in units of their row's coefficients.
INLINE void add_means(const u8* memory, const WarpMemory& mine, int behind, int lane, float (*sums)[HALVES][4]) {
    const uint4* turns = reinterpret_cast<const uint4*>(memory + TURNS_AT) + behind / 16 * (STEPS * 32) + lane;
    clear_tile(sums);
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
        uint2 matrix[HALVES];
#pragma unroll
        for (int i = 0; i < HALVES; i++)
            matrix[i] = *reinterpret_cast<const uint2*>(mine.operands + step * STEP_WORDS + (i * LANES + (BOTH ? lane : lane % LANES)) * 2);
#pragma unroll
        for (int j = 0; j < TILE / 16; j++) {
            const uint4 turn = turns[(j * STEPS + step) * 32];
#pragma unroll
            for (int i = 0; i < HALVES; i++) multiply(sums[j][i], turn.x, turn.y, turn.z, turn.w, matrix[i]);
        }
    }
}
#endif

// -- the kernel -----------------------------------------------------------------------------------------------------
// Fills a table with COPIES of each of 2^BITS points side by side.
template <int BITS, int COPIES> INLINE void fill_table(const uint2* __restrict__ points, u8* table, int warp, int lane) {
    constexpr int ENTRY = 8 * COPIES;  // bytes
#pragma unroll 1
    for (int first = warp * 32; first < 1 << BITS; first += 32 * WARPS) {
        const uint2 mine = __ldg(points + min(first + lane, (1 << BITS) - 1));
#pragma unroll 4
        for (int at = lane * 16; at < 32 * ENTRY; at += 512) {
            const int entry = at / ENTRY;
            const uint2 its = {__shfl_sync(ALL_LANES, mine.x, entry), __shfl_sync(ALL_LANES, mine.y, entry)};
            if (first + entry < 1 << BITS)
                *reinterpret_cast<uint4*>(table + first * ENTRY + at) = make_uint4(its.x, its.y, its.x, its.y);
        }
    }
}

// Partial results: ``sums`` [heads][blocks][ROWS_USED][ORDER], the last block's not rotated; ``about`` [heads][blocks]
// [ROWS_USED]: the largest score, and the sum of weights.
// ``shares`` [sequences][blocks][FIELDS], ``blocks`` of each head; the last one takes the exact tokens. ``recent_at``: where the
// number of recent tokens is, or nowhere: then it is ``recent``; with PAGED the numbers of all tokens of each sequence are there. Of
// the recent ones the last ``appended`` lie at ``k_new`` and ``v_new`` yet, and are put behind the others.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT) attend(
    const i64* __restrict__ shares, int heads, int blocks, const uint4* __restrict__ blob, const u32* __restrict__ frequencies,
    const int* __restrict__ rotation, const void* __restrict__ queries, float scale, float* __restrict__ partial_sums,
    float2* __restrict__ partial_about, int* __restrict__ arrived, void* __restrict__ outputs, const int* __restrict__ recent_at,
    int recent, int appended, NewRows k_new, NewRows v_new) {
    extern __shared__ uint4 shared[];
    u8* memory = reinterpret_cast<u8*>(shared);
    __shared__ float warp_most[WARPS * ROWS], warp_total[WARPS * ROWS];
    __shared__ float4 about_rows[ROWS];  // as prepare leaves them
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int whole = gridDim.x / blocks;  // heads of all sequences: all begin with their first share, and end with the last
    const int which = blockIdx.x % whole, head = which % heads, share = blockIdx.x / whole;
    const bool is_exact = share == blocks - 1;
    const i64* fields = shares + ((i64)(which / heads) * blocks + share) * FIELDS;
    const i64 place = (i64)which * blocks + share;
    float* out = partial_sums + place * (ROWS_USED * ORDER);
    float2* about = partial_about + place * ROWS_USED;
    float* scratch = reinterpret_cast<float*>(memory);  // once the tables are not needed any more

    if (is_exact) {
        float query[ROWS_USED][MINE], sums[ROWS_USED][MINE], most[ROWS_USED], total[ROWS_USED];
#pragma unroll
        for (int row = 0; row < ROWS_USED; row++) {
            most[row] = NOTHING, total[row] = 0.0f;
#pragma unroll
            for (int i = 0; i < MINE; i++) {
                query[row][i] = number_at<Q_TYPE>(queries, ((i64)which * ROWS_USED + row) * ORDER + lane * MINE + i) * scale;
                sums[row][i] = 0.0f;
            }
        }
        constexpr int ROW = ORDER * (TYPE == FLOAT32 ? 4 : 2);
        const i64 before = head * fields[EXACT_HEAD_STRIDE];
#ifdef PAGED
        const int kept = max(recent_at[which / heads] - (int)fields[RAW_FIRST], 0);
        const RawBlocks raw = {reinterpret_cast<const int*>(fields[RAW_TABLE]), fields[K_RAW_BLOCK], fields[V_RAW_BLOCK],
                               (int)fields[RAW_FIRST], (int)fields[RAW_BLOCK], (int)fields[RAW_COLUMNS], (int)fields[RAW_BLOCKS]};
#else
        const int kept = (recent_at ? *recent_at : recent) - appended;
#endif
        const ExactRows first = {reinterpret_cast<const u8*>(fields[K_EXACT] + before),
                                 reinterpret_cast<const u8*>(fields[V_EXACT] + before), ROW, ROW, (int)fields[EXACT]};
        const ExactRows last = {reinterpret_cast<const u8*>(fields[K_RECENT] + head * fields[K_HEAD_STRIDE]),
                                reinterpret_cast<const u8*>(fields[V_RECENT] + head * fields[V_HEAD_STRIDE]),
                                fields[K_STRIDE], fields[V_STRIDE], kept
#ifdef PAGED
                                , raw
#endif
        };
        const ExactRows added = {k_new.of(which / heads, head), v_new.of(which / heads, head), k_new.token, v_new.token, appended};
        add_exact(first, 0, warp, lane, query, most, total, sums);
        add_exact(last, appended ? 0 : QUERIES - 1, warp, lane, query, most, total, sums);
        add_exact(added, QUERIES - 1, warp, lane, query, most, total, sums);
        put_behind<ROW>(added.keys, added.key_stride, last.keys + kept * last.key_stride, last.key_stride, appended);
        put_behind<ROW>(added.values, added.value_stride, last.values + kept * last.value_stride, last.value_stride, appended);
#pragma unroll
        for (int row = 0; row < ROWS_USED; row++)
            if (lane == 0) warp_most[warp * ROWS + row] = most[row], warp_total[warp * ROWS + row] = total[row];
#pragma unroll
        for (int row = 0; row < ROWS_USED; row++)
#pragma unroll
            for (int i = 0; i < MINE; i++) scratch[(warp * ROWS_USED + row) * ORDER + lane * MINE + i] = sums[row][i];
        __syncthreads();
        const auto place_of = [](int i, int& row, int& coordinate) { row = i / ORDER, coordinate = i % ORDER; };
        merge_warps<ROWS_USED * ORDER>(scratch, warp_most, warp_total, place_of, out, about);
        combine(partial_sums, partial_about, arrived, rotation, fields, which, head, blocks, memory, outputs);
        return;
    }

    const int coded = (int)fields[CODED], least = (int)fields[LEAST];  // tokens before that one do not count
    const i64 k_payload = fields[K_PAYLOAD], v_payload = fields[V_PAYLOAD];
#ifdef PAGED
    const int* pages = reinterpret_cast<const int*>(fields[PAGES]);  // of the stream's chunks
#endif
    const auto tile_of = [&](int block, int first) {
        return Tile{block, first, min(coded - block * CHUNK, CHUNK)
#ifdef PAGED
                    , __ldg(pages + block)
#endif
        };
    };
    // Tile ``number`` of this warp; behind the last one, that one again.
#if BOTH
    constexpr int TILES = CHUNK / TILE;  // of a block
    const int first_tile = (int)fields[FIRST_CHUNK] * TILES, last_tile = (int)fields[LAST_CHUNK] * TILES;
    const auto place_of_tile = [&](int number) {
        return first_tile + (number / PARTS * WARPS + warp) * PARTS + number % PARTS;
    };
    const auto is_there = [&](int number) { return place_of_tile(number) < last_tile; };
    const auto tile_at = [&](int number) {
        const int tile = min(place_of_tile(number), last_tile - 1), block = tile / TILES;
        return tile_of(block, tile % TILES * TILE);
    };
#else
    const int first_unit = (int)fields[FIRST_CHUNK] * UNITS + warp, last_unit = (int)fields[LAST_CHUNK] * UNITS;
    const auto is_there = [&](int number) { return first_unit + number / PARTS * WARPS < last_unit; };
    const auto tile_at = [&](int number) {
        const int unit = min(first_unit + number / PARTS * WARPS, last_unit - 1), block = unit / UNITS;
        return tile_of(block, unit % UNITS * UNIT + number % PARTS * TILE);
    };
#endif
    Keys keys;
    Tile next;
    if (is_there(0)) {
        next = tile_at(0);
        load_tile(keys, next, k_payload, head, heads, lane);
    }

    prepare_queries(queries, rotation, fields, which, head, scale, memory, about_rows);
    fill_table<K_BITS, K_COPIES>(reinterpret_cast<const uint2*>(blob), memory, warp, lane);
#if V_AT
    fill_table<V_BITS, V_COPIES>(reinterpret_cast<const uint2*>(blob) + (1 << K_BITS), memory + V_AT, warp, lane);
#endif
#pragma unroll 4
    for (int i = TURNS_AT / 16 + threadIdx.x; i < BLOB_BYTES / 16; i += THREADS)
        shared[i] = __ldg(blob + ((1 << K_BITS) + (V_AT ? 1 << V_BITS : 0)) / 2 + i - TURNS_AT / 16);
    WarpMemory& mine = reinterpret_cast<WarpMemory*>(memory + WARPS_AT)[warp];
    const uint2* inputs = reinterpret_cast<const uint2*>(memory + INPUTS_AT);  // [QUADS_K][HALVES][LANES]
#if MEANS
    for (int i = lane; i < STEPS * STEP_WORDS; i += 32) mine.operands[i] = 0;  // of rows that are not used
    if (lane < ROWS) mine.first[lane] = {0.0f, 0.0f, 0.0f, 0.0f};
#endif
    __syncthreads();

    const u32 tables = (u32)__cvta_generic_to_shared(memory);
    const u32 k_table = tables + lane % K_COPIES * 8, v_table = tables + V_AT + lane % V_COPIES * 8;
#if MEANS
    const u32 position = (u32)fields[POSITION];
    int turned = -1;  // the unit to whose first token the coefficients are turned
#endif

    constexpr int FOURS = (SPARE ? 1 : 2) * QUADS_V;
    uint2 kept[QUADS_K];
#pragma unroll
    for (int quad = 0; quad < QUADS_K; quad++)
        if (QUERIES_KEPT) kept[quad] = inputs[quad * LANES + lane % LANES];
    float sums[HALVES][FOURS][4], most[HALVES][2], total[HALVES][2];  // of columns 2 t and 2 t + 1
#pragma unroll
    for (int i = 0; i < HALVES * FOURS * 4; i++) sums[i / (4 * FOURS)][i / 4 % FOURS][i % 4] = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * HALVES; i++) most[i / 2][i % 2] = NOTHING, total[i / 2][i % 2] = 0.0f;
    int largest = -(1 << 20);  // radius of values so far, in steps: weights are in units of it

#pragma unroll 1
    for (int number = 0; is_there(number); number++) {
        const Tile tile = next;
        next = tile_at(number + 1);
        if (!tile.counts(least)) {
            load_tile(keys, next, k_payload, head, heads, lane);
            continue;
        }
        mine.factors[0][lane] =
            keys.code ? exp2_of((float)(keys.base + keys.code - 1) * (1.0f / RADIUS_STEPS) + K_MANTISSA) : 0.0f;
#if MEANS
        const int part = number % PARTS;  // of the unit
        const bool turns = number / PARTS != turned;
        if (turns) {
            const u32 first = position + tile.block * CHUNK + tile.first - part * TILE;
            turn_coefficients(memory, mine, about_rows, first, frequencies, lane), turned = number / PARTS;
        }
#endif
        __syncwarp();
#if MEANS
        float added[TILE / 16][HALVES][4];
#if BOTH
        if (turns) {
#pragma unroll
            for (int i = 0; i < HALF_TILES; i++) {
                add_means(memory, mine, i * TILE, lane, added);
#pragma unroll
                for (int j = 0; j < TILE / 8; j++)
                    mine.added[t / 2 * HALF_TILES + i][j][2 * g + t % 2] = {added[j / 2][0][j % 2 * 2], added[j / 2][0][j % 2 * 2 + 1]};
            }
            __syncwarp();
        }
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) {
            const float2 its = mine.added[part][j][2 * g + t % 2];
            added[j / 2][0][j % 2 * 2] = its.x, added[j / 2][0][j % 2 * 2 + 1] = its.y;
        }
#else
        add_means(memory, mine, part * TILE, lane, added);
#endif
#endif
        Values values;
        load_tile(values, tile, v_payload, head, heads, lane);

        float scores[TILE / 16][HALVES][4];  // of tokens g, twice, and g + 8
        clear_tile(scores);
#pragma unroll
        for (int quad = 0; quad < QUADS_K; quad++) {
            uint2 query[HALVES];
#pragma unroll
            for (int half = 0; half < HALVES; half++)
                query[half] = QUERIES_KEPT ? kept[quad] : inputs[(quad * HALVES + half) * LANES + lane % LANES];
#pragma unroll
            for (int j = 0; j < TILE / 16; j++) {
                uint2 points[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const u32* signs = keys.signs[2 * j + i];
                    points[i] = keys.indices[2 * j + i].template point<K_COPIES>(k_table, quad);
                    add_signs(points[i], QUADS_K < 8 ? signs[0] >> t * QUADS_K % 8 : signs[quad / 8], quad % 8);
                }
#pragma unroll
                for (int half = 0; half < HALVES; half++)
                    multiply(scores[j][half], points[0].x, points[1].x, points[0].y, points[1].y, query[half]);
            }
        }
        load_tile(keys, next, k_payload, head, heads, lane);
#pragma unroll
        for (int half = 0; half < HALVES; half++)
#pragma unroll
            for (int column = 0; column < 2; column++) {
                const int its = row_of(8 * half + 2 * t + column);
#if MEANS
                const float4 row = mine.first[(BOTH ? part / HALF_TILES * 4 : 0) + its];
#else
                const float4 row = about_rows[its];
#endif
#pragma unroll
                for (int j = 0; j < TILE / 8; j++) {
                    float& score = scores[j / 2][half][j % 2 * 2 + column];
                    score *= mine.factors[0][8 * j + g];
#if MEANS
                    score = fmaf(score, row.x, fmaf(added[j / 2][half][j % 2 * 2 + column], row.y, row.z));
#elif K_OFFSETS
                    score = fmaf(score, row.x, row.z);
#else
                    score *= row.x;
#endif
                    score = capped(score);
                }
            }
        if (!tile.whole(least))
#pragma unroll
            for (int i = 0; i < TILE / 16 * HALVES * 4; i++) {
                const int token = tile.first + i / (4 * HALVES) * 16 + i % 4 / 2 * 8 + g;
                if (token >= tile.tokens || tile.block * CHUNK + token < least)
                    scores[i / (4 * HALVES)][i / 4 % HALVES][i % 4] = NOTHING;
            }
        float now[HALVES][2];  // the largest scores of this lane's tokens
        const int top = values.base + 254;  // the block's largest radius is this one at most
        bool changed = top > largest;
#pragma unroll
        for (int i = 0; i < 2 * HALVES; i++) {
            float& its = now[i / 2][i % 2];
            its = scores[0][i / 2][i % 2];
#pragma unroll
            for (int j = 1; j < TILE / 8; j++) its = fmaxf(its, scores[j / 2][i / 2][j % 2 * 2 + i % 2]);
            changed = changed || its > most[i / 2][i % 2] + SLACK;
        }
        if (__any_sync(ALL_LANES, changed)) {
            const float factor = top > largest ? exp2_of((float)(largest - top) * (1.0f / RADIUS_STEPS)) : 1.0f;
            largest = max(largest, top);
#pragma unroll
            for (int i = 0; i < 2 * HALVES; i++) {
                float its = fmaxf(now[i / 2][i % 2], most[i / 2][i % 2]);
#pragma unroll
                for (int apart = 4; apart < 32; apart *= 2) its = fmaxf(its, __shfl_xor_sync(ALL_LANES, its, apart));
                const float shrunk = exp2_of(most[i / 2][i % 2] - its);
                most[i / 2][i % 2] = its, total[i / 2][i % 2] *= shrunk;
#pragma unroll
                for (int k = 0; k < FOURS * 2; k++) sums[i / 2][k / 2][k % 2 * 2 + i % 2] *= shrunk * factor;
            }
        }
        mine.factors[1][lane] =
            values.code ? exp2_of((float)(values.base + values.code - 1 - largest) * (1.0f / RADIUS_STEPS) + ROOM) : 0.0f;
        __syncwarp();
        uint2 weights[TILE / 16][SPARE ? 2 : HALVES];  // as a matrix of tokens by rows of queries; of eight tokens each, if SPARE
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) {
            const float factor = mine.factors[1][8 * j + g];
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                const float a = exp2_of(scores[j / 2][half][j % 2 * 2] - most[half][0]);
                const float b = exp2_of(scores[j / 2][half][j % 2 * 2 + 1] - most[half][1]);
                total[half][0] += a, total[half][1] += b;
                const u32 both = turned_over(pack_halves(a * factor, b * factor));
#if SPARE
                weights[j / 2][j % 2] = {__byte_perm(both, 0, g < 4 ? 0x4410 : 0x1044), __byte_perm(both, 0, g < 4 ? 0x4432 : 0x3244)};
#else
                if (j % 2) weights[j / 2][half].y = both;
                else weights[j / 2][half].x = both;
#endif
            }
        }
#pragma unroll
        for (int u = 0; u < TILE / 16; u++) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (QUADS_V < 8) values.signs[4 * u + i] >>= g * QUADS_V % 8;
#pragma unroll
            for (int quad = 0; quad < QUADS_V; quad++) {
                uint2 points[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    points[i] = values.indices[4 * u + i].template point<V_COPIES>(v_table, quad);
                    add_signs(points[i], values.signs[4 * u + i], quad);
                }
#if SPARE
#pragma unroll
                for (int i = 0; i < 2; i++)
                    multiply(sums[0][quad], points[2 * i].x, points[2 * i].y, points[2 * i + 1].x, points[2 * i + 1].y,
                             weights[u][i]);
#else
                const u32 rows[2][4] = {
                    {__byte_perm(points[0].x, points[1].x, 0x5410), __byte_perm(points[0].x, points[1].x, 0x7632),
                     __byte_perm(points[2].x, points[3].x, 0x5410), __byte_perm(points[2].x, points[3].x, 0x7632)},
                    {__byte_perm(points[0].y, points[1].y, 0x5410), __byte_perm(points[0].y, points[1].y, 0x7632),
                     __byte_perm(points[2].y, points[3].y, 0x5410), __byte_perm(points[2].y, points[3].y, 0x7632)}};
#pragma unroll
                for (int half = 0; half < HALVES; half++)
#pragma unroll
                    for (int i = 0; i < 2; i++)
                        multiply(sums[half][2 * quad + i], rows[i][0], rows[i][1], rows[i][2], rows[i][3], weights[u][half]);
#endif
            }
        }
        __syncwarp();
    }

    const float of_values = largest > -(1 << 20) ? exp2_of((float)largest / RADIUS_STEPS + (V_MANTISSA - ROOM)) : 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * HALVES; i++) {
        float& its = total[i / 2][i % 2];
#pragma unroll
        for (int apart = 4; apart < 32; apart *= 2) its += __shfl_xor_sync(ALL_LANES, its, apart);
        const int row = 8 * (i / 2) + 2 * t + i % 2;
        if (g == 0) warp_most[warp * ROWS + row] = most[i / 2][i % 2], warp_total[warp * ROWS + row] = its;
    }
    __syncthreads();
    constexpr int COUNT = HALVES * FOURS * 4 * 32;  // of a warp's sums, as its lanes have them
#pragma unroll
    for (int i = 0; i < COUNT / 32; i++)
        scratch[warp * COUNT + i * 32 + lane] = sums[i / (4 * FOURS)][i / 4 % FOURS][i % 4] * of_values;
    __syncthreads();
    const auto place_of = [](int at, int& row, int& coordinate) {
        const int i = at / 32, its_g = at % 32 / 4, column = at % 4 * 2 + i % 2;
        row = SPARE ? column % 4 : i / (4 * FOURS) * 8 + column;
        coordinate = SPARE ? (its_g * QUADS_V + i / 4) * 4 + i % 4 / 2 * 2 + column / 4
                           : (its_g * QUADS_V + i / 8 % QUADS_V) * 4 + i % 8 / 4 * 2 + i % 4 / 2;
    };
    merge_warps<COUNT>(scratch, warp_most, warp_total, place_of, out, about);
    combine(partial_sums, partial_about, arrived, rotation, fields, which, head, blocks, memory, outputs);
}
