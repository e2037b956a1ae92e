// Law: the CUDA kernels for orders 64, 128 and 256, compiled at run time for one kind of stream.
//
// A warp codes one block (a chunk of tokens of one leading index), eight rows at a time, and shares nothing with other warps but
// read-only tables. Four lanes hold a row: each owns a quarter of its tree, so no lane waits for another but at the two nodes
// above. The rotation is mma with operands of +-1: a lane's quads are what mma reads
// (decoding) or adds up (encoding), and channels lie so that a lane loads and stores sixteen bytes beside its neighbours'. All
// sums of the decoder are integers below 2^24, so they are exact. The next rows are on their way while these are coded.
// Nothing may be fused that decides output bits: this file is compiled with --fmad=false, and the encoder, which is free,
// says fmaf where it wants one.
//
// Bits of a channel or coordinate of the order 2^L, from 0 up. In a k-step of mma a lane q = lane % 4 holds inputs 2 q, 2 q + 1
// (bit 0) and the same + 8 (bit HALF); of a tile's outputs it holds 2 q, 2 q + 1 (bit 0). Coordinates: q is bits L-1, L-2 (a
// quarter of the tree). Channels: q is bits 4 and 3. What is left counts k-steps or tiles.
//
// Two rounds of the rotation are one product with a matrix in shared memory; on Hopper four warps multiply together, and nothing
// else do they share.
//
// Compiled with: DECODER or ENCODER, PAPER (the coding), ROUNDS (of the rotation), BYTES (their matrix is of bytes), WARPGROUPS (four
// warps multiply together), ORDER, LOG2_ORDER, DTYPE (1 float16, 2 bfloat16, 3 float32), ROOT_BUDGET, RADIUS_BITS, RADIUS_STEPS,
// ROWS (of a tile), ROW_BYTES, STRIDE_WORDS (between rows that are being coded), CHUNK, OFFSETS, TABLE_BITS, the numbers of
// constants.py and device.py, sizes of shared memory, and the places of the tables.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned short u16;
typedef unsigned char u8;

#define QUADS_LANE (ORDER / 16)  // quads of a lane's quarter
#define PIECES (ORDER / 32)      // runs of eight channels of a lane
#define WARPS (THREADS / 32)
#define WORDS(rows) ((rows) * ROW_BYTES / 4)
#define FETCHES ((WORDS(ROWS) + 31) / 32)
#define ALL 0xffffffffu
#define PLAIN (DTYPE != 3 && !OFFSETS && !BYTES)  // when encoding: rows are multiplied as they are stored
#define INLINE __device__ __forceinline__

INLINE u32 bits_of(float x) { return __float_as_uint(x); }
INLINE float float_of(u32 x) { return __uint_as_float(x); }
INLINE u32 parity(u32 x) { return __popc(x) & 1; }

INLINE u32 half_bits(float x) {
    u32 r;
    asm("{.reg .b16 h; cvt.rn.f16.f32 h, %1; cvt.u32.u16 %0, h;}" : "=r"(r) : "f"(x));
    return r;
}

INLINE float half_value(u32 bits) {
    float r;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "r"(bits));
    return r;
}

// -- blocks ------------------------------------------------------------------------------------------------------
struct Block {
    const i64* span;
    u32* payload;
    i64 lead, token;  // token: of the tensor, that the first row codes
    i64 rows;         // address of the first row in the tensor
    int stride;       // bytes from row to row
    int tokens;
    int first, last;  // rows that are wanted
};

INLINE Block find_block(const i64* __restrict__ rows, const i64* __restrict__ firsts, const i64* __restrict__ starts, int search,
                        u32 index) {
    int low = 0;
#pragma unroll 1
    for (int bit = search - 1; bit >= 0; bit--)
        if (__ldg(firsts + low + (1 << bit)) <= index) low += 1 << bit;
    Block b;
    b.span = rows + low * FIELDS;
    const u32 local = index - (u32)__ldg(firsts + low), leads = (u32)__ldg(b.span + LEADS), turn = local / leads;
    const i64 chunk = __ldg(b.span + FIRST_CHUNK) + turn, left = __ldg(b.span + CODED) - chunk * CHUNK;
    const i64 first_token = __ldg(b.span + FIRST_TOKEN);
    b.lead = __ldg(b.span + FIRST_LEAD) + (local - turn * leads);
    b.tokens = left < CHUNK ? (int)left : CHUNK;
    b.token = __ldg(b.span + EXACT) + chunk * CHUNK;
    b.payload = reinterpret_cast<u32*>(__ldg(b.span + PAYLOAD) + chunk * __ldg(b.span + LEADING) * (CHUNK * ROW_BYTES + 4) +
                                       b.lead * (b.tokens * ROW_BYTES + 4));
    b.stride = (int)__ldg(b.span + STRIDE) * ITEM;
    b.rows = __ldg(starts + __ldg(b.span + STARTS) + (local - turn * leads)) + (b.token - first_token) * b.stride;
    b.first = (int)max(first_token - b.token, 0ll);
    b.last = (int)min(__ldg(b.span + LAST_TOKEN) - b.token, (i64)b.tokens);
    return b;
}

// -- checksum (SPEC 4.2): sums of products, folded below 2^36 by 2^32 = 5 (mod p) -----------------------------------
INLINE u64 folded(u64 x) { return (x & 0xffffffffull) + (x >> 32) * PRIME_GAP; }

INLINE u32 reduced(u64 sum, u32 bytes, u32 key) {
    for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(ALL, sum, i);
    return (u32)((sum + folded((u64)bytes * key)) % PRIME);
}

// Key of a word of a block; words behind the block's end are zero, so any key will do there.
INLINE u32 key_of(const u8* tables, const i64* __restrict__ keys, int block_words, int word) {
#ifdef KEYS_AT
    return reinterpret_cast<const u32*>(tables + KEYS_AT)[1 + word];
#else
    return (u32)__ldg(keys + 1 + min(word, block_words - 1));
#endif
}

// Where a word of the rows lies in the stage. Rows are kept apart so that lanes of different rows meet in no bank.
INLINE int place_of_word(int word) {
#if PAPER
    return word;
#else
    return word + word / WORDS(1) * (STRIDE_WORDS - WORDS(1));
#endif
}

#if DTYPE != 3
INLINE u32 with_signs(u32 x, u32 signs) {  // x times +-1 in both halves, and never -0
    u32 r;
#if DTYPE == 1
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(signs), "r"(0u));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(signs), "r"(0u));
#endif
    return r;
}
#endif

// -- the rotation ------------------------------------------------------------------------------------------------
INLINE void mma_half(float* d, u32 a0, u32 a1, u32 a2, u32 a3, const u32* b, const float* c) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

INLINE void mma_brain(float* d, u32 a0, u32 a1, u32 a2, u32 a3, const u32* b, const float* c) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}

#if ROUNDS == 1
// Operands of +-1: the sign of H between input k and output n is the parity of k & n. Bits of k and n that both sides' lanes tell
// meet each other (bit 0, and one more in order 64); the inputs of one operand differ in bit HALF, which lanes tell of n; one bit
// of k that steps count, IN, is told of n by lanes; two bits of n that tiles count are told of k by lanes (OUT). The rest of k & n
// is known when this is compiled.
#define NEGATIVE 0x80008000u
#ifdef DECODER
#define HALF 3
#define IN 4
#define OUT_HIGH (LOG2_ORDER - 1)
#define OUT_LOW (LOG2_ORDER - 2)
#define STEP(t) (((t) & 1) << 2 | (t) >> 1 << 4)  // the first input of a k-step, but for what lanes tell
#else
#define HALF (LOG2_ORDER - 1)
#define IN (LOG2_ORDER - 2)
#define OUT_HIGH 4
#define OUT_LOW 3
#define STEP(t) (((t) & 1) << 2 | (t) >> 1 << 5)
#endif
#define STEPS (ORDER / 32)

struct Signs {  // of a lane: an operand's first register; what changes its second one, and both in steps of bit IN
    u32 first, half, in, unused;

    INLINE void prepare(int lane, u32 one) {  // one: 1.0 in both halves
        const u32 k_high = lane >> 1 & 1, k_low = lane & 1, n_high = lane >> 4 & 1, n_low = lane >> 3 & 1, n_0 = lane >> 2 & 1;
#ifdef DECODER
        const u32 meet = k_low & n_high, at_half = n_low, at_in = n_high;
#else
        const u32 meet = k_high & n_low, at_half = n_high, at_in = n_low;
#endif
        const u32 sign = ORDER == 64 ? meet : 0;
        first = one ^ sign << 15 ^ (sign ^ n_0) << 31;
        half = at_half ? NEGATIVE : 0, in = at_in ? NEGATIVE : 0;
    }
    // The operand of a step with k's bit IN and a tile with n's bits OUT; ``pair`` [negative][register].
    INLINE void operands(int q, u32 in_bit, u32 n, u32 (*pair)[2]) const {
        u32 x = first ^ (n >> OUT_HIGH & 1 && (ORDER > 64 || OUT_HIGH != 4) ? (q >> 1) * NEGATIVE : 0);
        x ^= n >> OUT_LOW & 1 && (ORDER > 64 || OUT_LOW != 4) ? (q & 1) * NEGATIVE : 0;
        x ^= in_bit && ORDER > 64 ? in : 0;
        pair[0][0] = x, pair[0][1] = x ^ half;
        pair[1][0] = x ^ NEGATIVE, pair[1][1] = pair[0][1] ^ NEGATIVE;
    }
};

// A tile has eight rows: the other eight of mma's are the same rows' inputs whose bit 1 is set. Their sums are added for
// outputs whose bit 1 is not set, and taken away for those whose it is.
INLINE void join(float* p) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float clear = p[i], set = p[2 + i];
        p[i] = clear + set, p[2 + i] = clear - set;
    }
}
#else
// Two rounds: the product with R, whose entries are even integers. mma's A operand has sixteen rows, a tile has eight, so a row gives
// two parts. With BYTES (when decoding; and encoding rows of 256 numbers of 16 bits, for which reading a matrix of 16 bits takes too
// long) these are the low and high bytes of integers, signed, and multiply R / 2, which is of bytes. Else they are 16-bit numbers and
// what float32 has beyond them; or, of rows that are 16-bit numbers, other inputs, and then the matrix is multiplied twice, for each
// part with its own inputs. A chunk is so many columns that there are 32 sums a lane or, of numbers and the rest, 16: [eight
// columns][two neighbours of the first part, two of the second].
//
// The matrix lies in shared memory in blocks of eight columns by 16 bytes of inputs (128 bytes, a column behind the other): all
// blocks of the first eight columns, then those of the next. Both mma (by ldmatrix) and wgmma (without swizzle) read such blocks.
#if BYTES
typedef int Sum;
#define BLOCKS (ORDER / 16)  // of eight columns
#define TILES 8              // of eight columns, of a chunk
#define MMA_SHAPE "m16n8k32.row.col.s32.s8.s8.s32"
#define WGMMA_SHAPE "m64n64k32.s32.s8.s8"
#define IN_OUT(x) "+r"(x)
#else
typedef float Sum;
#define BLOCKS (ORDER / 8)
#define TILES 4
#define BRAIN (DTYPE == 2 && !OFFSETS)  // the matrix is of bfloat16, as the rows are; else of float16
#if BRAIN
#define MMA_SHAPE "m16n8k16.row.col.f32.bf16.bf16.f32"
#define WGMMA_SHAPE "m64n32k16.f32.bf16.bf16"
#else
#define MMA_SHAPE "m16n8k16.row.col.f32.f16.f16.f32"
#define WGMMA_SHAPE "m64n32k16.f32.f16.f16"
#endif
#define IN_OUT(x) "+f"(x)
#endif
#if BYTES
// An integer v of 16 bits added to this, as bits: its high byte, and its low byte, signed, plus 128.
#define BYTES_MAGIC (12582912.0f + 128.0f)

// Of four such: the low bytes, and the high ones.
INLINE void split_bytes(const u32* v, u32* parts) {
    const u32 a = __byte_perm(v[0], v[1], 0x5140), b = __byte_perm(v[2], v[3], 0x5140);  // low, low, high, high
    parts[0] = __byte_perm(a, b, 0x5410) ^ 0x80808080u;
    parts[1] = __byte_perm(a, b, 0x7632);
}
#endif
#define CHUNKS (ORDER / (8 * TILES))
#define FOUR(s) IN_OUT((s)[0]), IN_OUT((s)[1]), IN_OUT((s)[2]), IN_OUT((s)[3])

INLINE u32 matrix_chunk(const u8* tables, int chunk) {
    return (u32)__cvta_generic_to_shared(tables + MATRIX_AT) + chunk * (TILES * BLOCKS * 128);
}

INLINE void mma_step(Sum* sums, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned." MMA_SHAPE " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : FOUR(sums)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

INLINE void four_blocks(u32 at, u32* b) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3]) : "r"(at));
}

// A chunk's sums, by a warp alone. ``a``: for two blocks each {first part, second part} of one and of the next; or, TWICE, for four
// blocks each {first part of one, second part of the next}, and so on, and then there are TILES sums of first parts before the others.
template <bool TWICE> INLINE void multiply(const u8* tables, int chunk, const u32 (*a)[4], Sum (*sums)[4]) {
    const u32 at = matrix_chunk(tables, chunk) + (threadIdx.x & 31) * 16;
#pragma unroll
    for (int i = 0; i < (TWICE ? 2 : 1) * TILES; i++) sums[i][0] = sums[i][1] = sums[i][2] = sums[i][3] = 0;
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
        for (int block = 0; block < BLOCKS; block += 4) {
            u32 b[4];
            four_blocks(at + (i * BLOCKS + block) * 128, b);
            if (TWICE) {
                mma_step(sums[i], a[block / 4], b[0], b[2]);
                mma_step(sums[TILES + i], a[block / 4], b[1], b[3]);
            } else {
                mma_step(sums[i], a[block / 2], b[0], b[1]);
                mma_step(sums[i], a[block / 2 + 1], b[2], b[3]);
            }
        }
}

#if WARPGROUPS
// Adds the products of two blocks, ``apart`` blocks apart, to TILES sums; of the first two they are the sums.
INLINE void wgmma_step(Sum (*sums)[4], const u32* a, u32 base, int block, int apart, u32 add) {
    const u64 b = base + (block * 128 / 16 | apart * 128 / 16 << 16) | (u64)(BLOCKS * 128 / 16) << 32;
#if BYTES
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %37, 0; wgmma.mma_async.sync.aligned." WGMMA_SHAPE
        " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},"
        " {%32,%33,%34,%35}, %36, p;}"
        : FOUR(sums[0]), FOUR(sums[1]), FOUR(sums[2]), FOUR(sums[3]), FOUR(sums[4]), FOUR(sums[5]), FOUR(sums[6]), FOUR(sums[7])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#else
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %21, 0; wgmma.mma_async.sync.aligned." WGMMA_SHAPE
        " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, p, 1, 1, 0;}"
        : FOUR(sums[0]), FOUR(sums[1]), FOUR(sums[2]), FOUR(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#endif
}

// multiply() by four warps, each of its own rows.
template <bool TWICE> INLINE void multiply_together(const u8* tables, int chunk, const u32 (*a)[4], Sum (*sums)[4]) {
    const u32 base = matrix_chunk(tables, 0) / 16;
    const int first = chunk * TILES * BLOCKS;
#pragma unroll
    for (int i = 0; i < BLOCKS / (TWICE ? 4 : 2); i++)  // operands are in their registers before the fence
        asm volatile("" : : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]));
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int block = 0; block < BLOCKS; block += TWICE ? 4 : 2) {
        wgmma_step(sums, a[block / (TWICE ? 4 : 2)], base, first + block, TWICE ? 2 : 1, block);
        if (TWICE) wgmma_step(sums + TILES, a[block / 4], base, first + block + 1, 2, block);
    }
    asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int i = 0; i < (TWICE ? 2 : 1) * TILES; i++) asm volatile("" : FOUR(sums[i]));  // nothing is read before
}

// Of a warpgroup: how many warps say yes to the first question, and 8 for each that says yes to the second.
INLINE u32 votes_of_four(bool first, bool second) {
    const u32 lane = threadIdx.x & 31, yes = lane ? lane <= 8 && second : first;
    u32 votes;
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; barrier.cta.red.popc.aligned.u32 %0, %1, 128, p;}"
                 : "=r"(votes)
                 : "r"(1 + (threadIdx.x >> 7)), "r"(yes)
                 : "memory");
    return votes;
}
#else
template <bool TWICE> INLINE void multiply_together(const u8* tables, int chunk, const u32 (*a)[4], Sum (*sums)[4]) {
    multiply<TWICE>(tables, chunk, a, sums);
}
#endif
#endif

// Address of the word that a bit lies in. (As C++ it would take three instructions instead of two.)
INLINE u32 word_of(u32 words, u32 bit) {
    u32 number;
    asm("shr.u32 %0, %1, 5;" : "=r"(number) : "r"(bit));
    return words + number * 4;
}

// -- the tree ----------------------------------------------------------------------------------------------------
template <int N> INLINE int width_of(int budget) {
    constexpr u32 factor = ((16u << 24) + 15 * N - 1) / (15 * N);  // exact for every budget (tables.py)
    return (int)min(min(max((u32)budget * factor, 1u << 24) >> 24, 7u), (u32)budget);
}

template <int M> INLINE int share_of(int rest, int shift) {
    return min(max((rest >> 1) + shift, max(rest - 7 * M, 0)), min(rest, 7 * M));
}

constexpr __device__ int place_in(int n) { return n == ORDER ? 0 : 1 + place_in(2 * n); }  // of a node's tables

// -- offsets (SPEC 8) --------------------------------------------------------------------------------------------
#if OFFSETS
template <int RUN> INLINE void offset_halves(const u32* from, float unit, float* o) {
#pragma unroll
    for (int u = 0; u < RUN; u += 2) {
        const u32 both = __ldg(from + u / 2);
        o[u] = half_value(both & 0xffff) * unit, o[u + 1] = half_value(both >> 16) * unit;
    }
}

// Offsets of RUN neighbouring channels at a token; every operation rounds.
template <int RUN> INLINE void offset_run(const u8* tables, const Block& b, int row, int first, float* o) {
    const i64 stream = __ldg(b.span + STREAM);
    const float unit = float_of((u32)(*reinterpret_cast<const short*>(stream + OFFSET_EXPONENT_AT) + 127) << 23);
    const u32* halves = reinterpret_cast<const u32*>(stream + __ldg(b.span + OFFSETS_AT) + b.lead * (2 * ORDER + 4));
    offset_halves<RUN>(halves + first / 2, unit, o);
#if PAIRS
    if (first >= 2 * PAIRS) return;
    const u32 position = (u32)(b.token + row + __ldg(b.span + POSITION));
    const u32* frequencies = reinterpret_cast<const u32*>(tables + FREQUENCIES_AT);
    const float2* phases = reinterpret_cast<const float2*>(tables + PHASES_AT);
    float other[RUN];
#if INTERLEAVED
#pragma unroll
    for (int u = 0; u < RUN; u++) other[u] = o[u ^ 1];
#else
    offset_halves<RUN>(halves + (first < PAIRS ? first + PAIRS : first - PAIRS) / 2, unit, other);
#endif
#pragma unroll
    for (int u = 0; u < RUN; u++) {
#if INTERLEAVED
        if (first + u >= 2 * PAIRS) continue;
        const u32 turn = position * frequencies[(first + u) / 2] >> 16;
        const bool upper = u & 1;
#else
        const u32 turn = position * frequencies[(first < PAIRS ? first : first - PAIRS) + u] >> 16;
        const bool upper = first >= PAIRS;
#endif
        const float2 h = phases[turn >> 8], l = phases[256 + (turn & 255)];
        const float cos = h.x * l.x - h.y * l.y, sin = h.y * l.x + h.x * l.y;
        const float own = o[u] * cos, cross = other[u] * sin;
        o[u] = upper ? own + cross : own - cross;
    }
#endif
}
#endif

// -- the loops of a warp -----------------------------------------------------------------------------------------
#if WARPGROUPS
// Four warps go round together, for as long as one of them has a block, and in it rows. The others code rows that nobody wants.
#define WORK_LEFT (index - (threadIdx.x >> 5 & 3) * gridDim.x < blocks)
#define IDLE (index >= blocks)
#define FOR_ROWS for (int row0 = 0, more = 1; more; row0 += ROWS)
#define PAST (row0 >= b.tokens)
#define READY for_wgmma(), __syncthreads()

INLINE void for_wgmma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }  // it reads what every thread wrote
#else
#define WORK_LEFT (index < blocks)
#define IDLE false
#define FOR_ROWS for (int row0 = 0; row0 < b.tokens; row0 += ROWS)
#define PAST false
#define READY __syncthreads()
#endif

#ifdef DECODER
// -- decoding ----------------------------------------------------------------------------------------------------
INLINE u32 pack_half(float even, float odd) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(odd), "f"(even));
    return r;
}

INLINE float2 halves_of(u32 x) {
    float2 r;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(r.x), "=f"(r.y) : "r"(x));
    return r;
}

#if DTYPE != 3
INLINE u32 pack_stored(float even, float odd) {
    u32 r;
#if DTYPE == 1
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(odd), "f"(even));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(odd), "f"(even));
#endif
    return r;
}
#endif

// A word of the stage, by its address in shared memory; volatile keeps it behind the barrier before it.
INLINE u32 word_at(u32 at) {
    u32 r;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(r) : "r"(at));
    return r;
}

INLINE u32 window(u32 words, u32 bit) {
    const u32 at = word_of(words, bit);
    return __funnelshift_r(word_at(at), word_at(at + 4), bit);
}

#if !PAPER
struct Entry {  // of a node's angle
    u32 factors;  // cos and sin, packed
    int shift;
    INLINE float cos() const { return halves_of(factors).x; }
    INLINE float sin() const { return halves_of(factors).y; }
};

template <int N> INLINE Entry node_entry(const u8* tables, u32 window, int width) {
    constexpr int place = place_in(N);
    const u32 one = 1u << width;
    const uint2 e = reinterpret_cast<const uint2*>(tables + NODES_AT)[place * 256 + ((window & (one - 1)) | one)];
    return {e.x, (int)e.y};
}

struct Run {  // a node: the bits that it owns, and its radius
    u32 bit;
    int budget;
    float radius;
};

// The child on the lane's side.
template <int N> INLINE void descend(const u8* tables, u32 words, Run& node, bool right) {
    const int width = width_of<N>(node.budget);
    const Entry e = node_entry<N>(tables, window(words, node.bit), width);
    const int rest = node.budget - width, share = share_of<N / 2>(rest, e.shift);
    node.radius *= right ? e.sin() : e.cos();
    node.budget = right ? rest - share : share;
    node.bit += right ? width + share : width;
}

// Both children of COUNT nodes, side by side because each waits for its look-ups.
template <int N, int COUNT> INLINE void split(const u8* tables, u32 words, const Run* nodes, Run* children) {
    int width[COUNT];
    Entry e[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        width[i] = width_of<N>(nodes[i].budget);
        e[i] = node_entry<N>(tables, window(words, nodes[i].bit), width[i]);
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const int rest = nodes[i].budget - width[i], share = share_of<N / 2>(rest, e[i].shift);
        const u32 bit = nodes[i].bit + width[i];
        children[2 * i] = {bit, share, nodes[i].radius * e[i].cos()};
        children[2 * i + 1] = {bit + share, rest - share, nodes[i].radius * e[i].sin()};
    }
}

// A quad's two pairs at radius 1 (SPEC 6.4, 6.5): a looked up sector of a circle each.
struct Pairs {
    float2 a, b;
};

template <int COUNT> INLINE void find_pairs(const u8* tables, const u32* codes, const int* budgets, Pairs* pairs) {
    u32 left[COUNT];
    uint4 r[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const uint4 g = reinterpret_cast<const uint4*>(tables + BUDGETS_AT)[budgets[i]];  // magic, shift and last cell, -codes a cell, first
        const u32 code = codes[i] & ((1u << budgets[i]) - 1);
        const u32 cell = min(__funnelshift_r(__umulhi(2 * code + 1, g.x), 0, g.y), g.y >> 16);
        r[i] = reinterpret_cast<const uint4*>(tables + RECORDS_AT)[g.w + cell];  // magic of n_b, steps with -n_b, factors
        left[i] = code + cell * g.z;
    }
    u32 circle[COUNT][2];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const u32 minus_n_b = __funnelshift_l(r[i].y, (int)r[i].z >> 27, 5), sector = __umulhi(2 * left[i] + 1, r[i].x);
        const u32 a = (2 * sector + 1) * r[i].y + (1u << 15), b = (2 * (left[i] + sector * minus_n_b) + 1) * r[i].z + (1u << 15);
        circle[i][0] = *reinterpret_cast<const u32*>(tables + CIRCLE_AT + (a >> 14 & (2047u << 2)));
        circle[i][1] = *reinterpret_cast<const u32*>(tables + CIRCLE_AT + (b >> 14 & (2047u << 2)));
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const float2 f = halves_of(r[i].w), a = halves_of(circle[i][0]), b = halves_of(circle[i][1]);
        pairs[i] = {make_float2(__fmul_rn(f.x, a.x), __fmul_rn(f.x, a.y)), make_float2(__fmul_rn(f.y, b.x), __fmul_rn(f.y, b.y))};
    }
}

#if TABLE_BITS
INLINE u32 table_entry(const u8* tables, u32 code, int budget) {  // of a larger budget: some other's
    const u32 one = 1u << budget;
    return reinterpret_cast<const u32*>(tables + CODES_AT)[min((code & (one - 1)) | one, (2u << TABLE_BITS) - 1)];
}
INLINE Pairs table_pairs(const u8* tables, u32 entry) {
    return {*reinterpret_cast<const float2*>(tables + POINTS_AT + (entry & 0xffff)),
            *reinterpret_cast<const float2*>(tables + POINTS_AT + (entry >> 16))};
}
#endif

// The coordinates on the grid, packed.
INLINE void put_quad(Pairs pairs, float radius, u32* packed) {
#if ROUNDS == 2
    const float magic = BYTES_MAGIC;
    const u32 v[4] = {bits_of(__fadd_rn(__fmul_rn(radius, pairs.a.x), magic)), bits_of(__fadd_rn(__fmul_rn(radius, pairs.a.y), magic)),
                      bits_of(__fadd_rn(__fmul_rn(radius, pairs.b.x), magic)), bits_of(__fadd_rn(__fmul_rn(radius, pairs.b.y), magic))};
    split_bytes(v, packed);
#else
    const float magic = 12582912.0f;  // rounds to an integer, ties to even
    packed[0] = pack_half(__fadd_rn(__fmul_rn(radius, pairs.a.x), magic) - magic, __fadd_rn(__fmul_rn(radius, pairs.a.y), magic) - magic);
    packed[1] = pack_half(__fadd_rn(__fmul_rn(radius, pairs.b.x), magic) - magic, __fadd_rn(__fmul_rn(radius, pairs.b.y), magic) - magic);
#endif
}

// Two nodes of eight coordinates: mma's operands, two registers a quad.
INLINE void eights(const u8* tables, u32 words, const Run* nodes, u32 (*a)[2]) {
    u32 low[2], high[2];
    int width[2];
    Entry e[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {  // the angle and its two quads are at most 56 bits side by side
        const u32 at = word_of(words, nodes[i].bit), middle = word_at(at + 4);
        low[i] = __funnelshift_r(word_at(at), middle, nodes[i].bit);
        high[i] = __funnelshift_r(middle, word_at(at + 8), nodes[i].bit);
        width[i] = width_of<8>(nodes[i].budget);
        e[i] = node_entry<8>(tables, low[i], width[i]);
    }
    u32 code[4];
    int budget[4];
    float radius[4];
    Pairs pairs[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int rest = nodes[i].budget - width[i];
        budget[2 * i] = share_of<4>(rest, e[i].shift), budget[2 * i + 1] = rest - budget[2 * i];
        code[2 * i] = __funnelshift_r(low[i], high[i], width[i]);
        code[2 * i + 1] = __funnelshift_r(code[2 * i], high[i] >> width[i], budget[2 * i]);
        radius[2 * i] = nodes[i].radius * e[i].cos(), radius[2 * i + 1] = nodes[i].radius * e[i].sin();
    }
#if TABLE_BITS
    u32 entry[4];
#pragma unroll
    for (int i = 0; i < 4; i++) entry[i] = table_entry(tables, code[i], budget[i]);
#pragma unroll
    for (int i = 0; i < 4; i++) pairs[i] = table_pairs(tables, entry[i]);
    if (max(max(budget[0], budget[1]), max(budget[2], budget[3])) > TABLE_BITS)
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (budget[i] > TABLE_BITS) find_pairs<1>(tables, code + i, budget + i, pairs + i);
#else
    find_pairs<4>(tables, code, budget, pairs);
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) put_quad(pairs[i], radius[i], a[i]);
}

// Everything below a lane's node.
template <int N> INLINE void subtree(const u8* tables, u32 words, const Run& node, u32 (*a)[2]) {
    if constexpr (N == 16) {
        Run nodes[2];
        split<16, 1>(tables, words, &node, nodes);
        eights(tables, words, nodes, a);
    } else if constexpr (N == 32) {
        Run sixteens[2], nodes[4];
        split<32, 1>(tables, words, &node, sixteens);
        split<16, 2>(tables, words, sixteens, nodes);
        eights(tables, words, nodes, a);
        eights(tables, words, nodes + 2, a + 4);
    } else {
        Run halves[2];
        split<N, 1>(tables, words, &node, halves);
        subtree<N / 2>(tables, words, halves[0], a);
        subtree<N / 2>(tables, words, halves[1], a + N / 8);
    }
}

#endif

// Factors of a row: mantissa 2^exponent (SPEC 6.1).
INLINE void split_factor(float mantissa, int exponent, float& first, float& second) {
    const bool small = exponent < RADIUS_SPLIT;
    first = float_of(bits_of(mantissa) + ((exponent + (small ? RADIUS_SHIFT : 0)) << 23));
    second = small ? SECOND_FACTOR : 1.0f;
}

#if !PAPER
INLINE void radius_factors(const u8* tables, u32 words, float& first, float& second) {
    u32 code = word_at(words) & ((1u << RADIUS_BITS) - 1);
    u32 step = max(code, 1u) - 1, octave = step / RADIUS_STEPS;
    const float mantissa = reinterpret_cast<const float*>(tables + MANTISSAS_AT)[step - octave * RADIUS_STEPS];
    split_factor(mantissa, (int)octave - RADIUS_BIAS, first, second);
    first = code ? first : 0.0f;
}
#else
// -- paper coding (SPEC 7) ---------------------------------------------------------------------------------------
INLINE u32 paper_radius(u32 low) {  // float16 bits: the sign is ignored, NaN counts as 0, infinity as the largest
    const u32 bits = low & 0x7fff;
    return bits > 0x7c00 ? 0 : min(bits, 0x7bffu);
}

INLINE float2 paper_angle(const u8* tables, int level, u32 code) {
    return reinterpret_cast<const float2*>(tables + ANGLES_AT)[4 * (level - 2) + (code & 3)];
}

// A lane's quarter of a row, which begins at a bit of the stage: mma's operands and the row's factors.
INLINE void paper_quarter(const u8* tables, u32 words, u32 bit, int radius_exponent, u32 (*a)[2], float& first, float& second) {
    constexpr int GROUPS = ORDER / 64;
    u32 low[GROUPS], high[GROUPS], largest = 0;
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        const u32 start = bit + 62 * i, at = word_of(words, start), middle = word_at(at + 4);
        low[i] = __funnelshift_r(word_at(at), middle, start), high[i] = __funnelshift_r(middle, word_at(at + 8), start);
        largest = max(largest, paper_radius(low[i]));
    }
    largest = max(largest, __shfl_xor_sync(ALL, largest, 1));
    largest = max(largest, __shfl_xor_sync(ALL, largest, 2));
    const int power = largest ? (int)(bits_of(half_value(largest)) >> 23) - 126 : 0;
    const float unit = float_of((u32)(11 - power + 127) << 23), magic = 12582912.0f;
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
        const float radius = half_value(paper_radius(low[i])) * unit;
        const float2 e4 = paper_angle(tables, 4, low[i] >> 16);
        const u32 sectors = __funnelshift_r(low[i], high[i], 30);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float2 e3 = paper_angle(tables, 3, low[i] >> (18 + 2 * j));
            const float r3 = radius * (j ? e4.y : e4.x);
#pragma unroll
            for (int k = 2 * j; k < 2 * j + 2; k++) {
                const float2 e2 = paper_angle(tables, 2, low[i] >> (22 + 2 * k));
                const float r2 = r3 * (k & 1 ? e3.y : e3.x);
#pragma unroll
                for (int l = 0; l < 2; l++) {
                    const float r1 = r2 * (l ? e2.y : e2.x);
                    const float2 d = reinterpret_cast<const float2*>(tables + DIRECTIONS_AT)[sectors >> (8 * k + 4 * l) & 15];
                    a[4 * i + k][l] = pack_half(__fadd_rn(__fmul_rn(r1, d.x), magic) - magic, __fadd_rn(__fmul_rn(r1, d.y), magic) - magic);
                }
            }
        }
    }
    split_factor(*reinterpret_cast<const float*>(tables + MANTISSAS_AT), power + radius_exponent, first, second);
}
#endif

// Words of the rows, a lane's share; zero behind the block's end.
INLINE void fetch(u32* fetched, const u32* payload, int row0, int tokens, int lane) {
    const int have = min(WORDS(tokens - row0), WORDS(ROWS));
#pragma unroll
    for (int i = 0; i < FETCHES; i++) {
        const int at = i * 32 + lane;
        fetched[i] = at < have ? __ldcs(payload + WORDS(row0) + at) : 0;
    }
}

#if BULK
// Rows leave shared memory by the bulk copy engine: as whole lines, and past the pipe that look-ups keep busy.
#define OUT_BYTES (ORDER * ITEM + 64)  // from row to row there; so much that neighbouring rows lie in different banks
#define STORE(type, at, value) *reinterpret_cast<type*>(at) = value

INLINE void bulk_wait() {  // until what was stored before has been read
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    __syncwarp();
}

INLINE void bulk_store(const u8* from, const Block& b, int row0, int lane) {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    const int row = row0 + lane;
    if (lane < ROWS && row >= b.first && row < b.last)
        asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(b.rows + (i64)row * b.stride),
                     "r"((u32)__cvta_generic_to_shared(from + lane * OUT_BYTES)), "r"(ORDER * ITEM)
                     : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
#else
#define STORE(type, at, value) \
    if (wanted) __stcs(reinterpret_cast<type*>(at), value)
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_stream_blocks(
    const i64* __restrict__ rows, const i64* __restrict__ firsts, const i64* __restrict__ starts, int* __restrict__ flags,
    const i64* __restrict__ keys, const uint4* __restrict__ blob, i64 blocks, int search) {
    extern __shared__ uint4 memory[];
    const int lane = threadIdx.x & 31, q = lane & 3, g = lane >> 2;
    const u8* tables = reinterpret_cast<const u8*>(memory);
    u32* stage = reinterpret_cast<u32*>(const_cast<u8*>(tables) + BLOB_BYTES + SIGNS_BYTES + (threadIdx.x >> 5) * WARP_BYTES);
    Block* stash = reinterpret_cast<Block*>(reinterpret_cast<u8*>(stage) + STAGE_BYTES);  // of the next block
#if BULK
    u8* rows_out = reinterpret_cast<u8*>(stash + 1) + (64 - sizeof(Block));
#endif
    u32 fetched[FETCHES];
    u32 index = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
    if (index < blocks) {
        const Block b = find_block(rows, firsts, starts, search, index);
        fetch(fetched, b.payload, 0, b.tokens, lane);
        if (lane == 0) *stash = b;
    }
#if WARPGROUPS
    else if (lane == 0) *stash = find_block(rows, firsts, starts, search, 0);
#endif
    for (int i = threadIdx.x; i < BLOB_BYTES / 16; i += THREADS) memory[i] = __ldg(blob + i);
#if ROUNDS == 1
    if (threadIdx.x < 32) reinterpret_cast<Signs*>(const_cast<u8*>(tables) + BLOB_BYTES)[lane].prepare(lane, 0x3c003c00u);
#endif
    READY;

    for (; WORK_LEFT; index += gridDim.x * WARPS) {
        Block b = *stash;
        if (IDLE) b.tokens = b.first = b.last = 0;
        const u32 stored = __ldcs(b.payload + WORDS(b.tokens));
        u64 sum = 0;
        FOR_ROWS {
#pragma unroll
            for (int i = 0; i < FETCHES; i++) {
                const int word = i * 32 + lane;
                if (FETCHES * 32 == WORDS(ROWS) || word < WORDS(ROWS)) {
                    if (!PAST) sum += folded((u64)fetched[i] * key_of(tables, keys, WORDS(b.tokens), WORDS(row0) + word));
                    stage[place_of_word(word)] = fetched[i];
                }
            }
            __syncwarp();
            if (PAST) {
            } else if (row0 + ROWS < b.tokens) {
                fetch(fetched, b.payload, row0 + ROWS, b.tokens, lane);
            } else if (index + gridDim.x * WARPS < blocks) {
                const Block next = find_block(rows, firsts, starts, search, index + gridDim.x * WARPS);
                fetch(fetched, next.payload, 0, next.tokens, lane);
                if (lane == 0) *stash = next;
            }
#if WARPGROUPS
            const u32 votes = votes_of_four(row0 + ROWS > b.first && row0 < b.last, row0 + ROWS < b.tokens);
            more = votes >> 3;
            if (!(votes & 7)) {
#else
            if (row0 + ROWS <= b.first || row0 >= b.last) {
#endif
                __syncwarp();
                continue;
            }

            u32 a[QUADS_LANE][2];
            float factor, second;
#if PAPER
            const int radius_exponent = *reinterpret_cast<const short*>(__ldg(b.span + STREAM) + RADIUS_EXPONENT_AT);
            const u32 words = (u32)__cvta_generic_to_shared(stage);
            paper_quarter(tables, words, g * ROW_BYTES * 8 + q * (ORDER / 64 * 62), radius_exponent, a, factor, second);
#else
            const u32 words = (u32)__cvta_generic_to_shared(stage + g * STRIDE_WORDS);
            radius_factors(tables, words, factor, second);
            Run node = {RADIUS_BITS, ROOT_BUDGET, GRID};
            descend<ORDER>(tables, words, node, q & 2);
            descend<ORDER / 2>(tables, words, node, q & 1);
            subtree<ORDER / 4>(tables, words, node, a);
#endif
            __syncwarp();

            // Ordinary rows neither leave float32's normal range nor the dtype's,
#if ROUNDS == 1
            const float bound = (PAPER ? 520.0f : 181.0f * 2) * ORDER;  // a sum's: > sqrt(ORDER) times the coordinates' norm
#else
            const float bound = 4096.0f * ORDER;
#endif
            // and no coordinate, an integer times the factor, is too small for it.
            const bool plain = __all_sync(ALL, second == 1.0f && factor * bound < LARGEST && (ROUNDS > 1 || factor >= SMALLEST || factor == 0.0f));
#if ROUNDS == 1
            const Signs signs = reinterpret_cast<const Signs*>(tables + BLOB_BYTES)[lane];
#else
            factor *= 2.0f;  // the matrix is R / 2; the largest factor is below 2^121
            Sum sums[TILES][4];
#endif
            const int row = row0 + g;
#if BULK
            bulk_wait();
            u8* target = rows_out + g * OUT_BYTES + q * 8 * ITEM;
#else
            const bool wanted = row >= b.first && row < b.last;
            const i64 target = b.rows + (i64)row * b.stride + q * 8 * ITEM;
#endif

#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
#if ROUNDS == 1
                float p[2][4];
                u32 operand[2][2][2];  // bit IN, negative, register
                signs.operands(q, 0, piece << 5, operand[0]);
                signs.operands(q, 1, piece << 5, operand[1]);
#pragma unroll
                for (int t = 0; t < STEPS; t++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                        const u32 k = STEP(t), n = piece << 5 | j << 2;
                        mma_half(p[j], a[k / 4][0], a[k / 4][1], a[k / 4 + 2][0], a[k / 4 + 2][1],
                                 operand[k >> IN & 1][parity(k & n & ~(1u << IN))], t ? p[j] : zero);
                    }
                join(p[0]);
                join(p[1]);
                const int first = piece * 32 + q * 8;
                float y[8];
#pragma unroll
                for (int u = 0; u < 8; u++) y[u] = p[u / 4][u % 4];
#else
                if (piece % 2 == 0) multiply_together<false>(tables, piece / 2, reinterpret_cast<u32 (*)[4]>(a), sums);
                const int first = piece * 32 + q * 8;
                float y[8];
#pragma unroll
                for (int u = 0; u < 8; u++) {
                    const Sum* both = sums[piece % 2 * 4 + u / 2];
                    y[u] = (float)(both[u % 2] + both[2 + u % 2] * 256);
                }
#endif
#if DTYPE != 3 && !OFFSETS && ROUNDS == 1
                const uint4 pairs = *reinterpret_cast<const uint4*>(tables + SIGNS_AT + first * 2);
                const u32 sign[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#endif
#if DTYPE == 3 || OFFSETS
#pragma unroll
                for (int u = 0; u < 8; u++) {
#if ROUNDS == 1
                    y[u] = float_of(bits_of(y[u]) ^ reinterpret_cast<const u32*>(tables + SIGNS_32_AT)[first + u]);
#endif
                    y[u] = y[u] * factor * second + 0.0f;
                }
#if OFFSETS
                float o[8];
                offset_run<8>(tables, b, row, first, o);
#pragma unroll
                for (int u = 0; u < 8; u++) y[u] += o[u];
#endif
#pragma unroll
                for (int u = 0; u < 8; u++) y[u] = fminf(fmaxf(y[u], -LARGEST), LARGEST);
#else
#pragma unroll
                for (int u = 0; u < 8; u++) y[u] = y[u] * factor;
                if (!plain)
#pragma unroll
                    for (int u = 0; u < 8; u++) {
#if ROUNDS == 1  // the sign comes before the 0 is added: what is too small for the dtype keeps it
                        y[u] = float_of(bits_of(y[u]) ^ reinterpret_cast<const u32*>(tables + SIGNS_32_AT)[first + u]);
#endif
                        y[u] = fminf(fmaxf(y[u] * second + 0.0f, -LARGEST), LARGEST);
                    }
#endif
#if DTYPE == 3
#pragma unroll
                for (int u = 0; u < 8; u += 4) STORE(float4, target + (piece * 32 + u) * ITEM, make_float4(y[u], y[u + 1], y[u + 2], y[u + 3]));
#else
                u32 packed[4];
#pragma unroll
                for (int u = 0; u < 4; u++) {
                    packed[u] = pack_stored(y[2 * u], y[2 * u + 1]);
#if !OFFSETS && ROUNDS == 1
                    if (plain) packed[u] = with_signs(packed[u], sign[u]);
#endif
                }
                STORE(uint4, target + piece * 32 * ITEM, make_uint4(packed[0], packed[1], packed[2], packed[3]));
#endif
            }
#if BULK
            bulk_store(rows_out, b, row0, lane);
#endif
        }
        const u32 good = reduced(sum, b.tokens * ROW_BYTES, KEY_0);
        if (lane == 0 && !IDLE) flags[index] = good != stored;
        __syncwarp();
    }
#if BULK
    bulk_wait();
#endif
}
#endif

#ifdef ENCODER
// -- encoding ----------------------------------------------------------------------------------------------------
INLINE float inverse(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// Angle of (x, y) in turns, -1/8 .. 7/8: a polynomial, good to 2e-8; negative angles are a turn too small. NaN at (0, 0).
INLINE float turns_of(float x, float y) {
    const bool steep = fabsf(y) > fabsf(x);
    const float top = steep ? -x : y, bottom = steep ? y : x;
    float s;  // where the divisor is too small to be normal, so is the dividend, and is 0 here
    asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(s) : "f"(top), "f"(inverse(bottom)));
    const float z = s * s;
    float t = fmaf(-0.00074305835f, z, 0.00384616872f);
    t = fmaf(t, z, -0.00944856755f);
    t = fmaf(t, z, 0.0157660429f);
    t = fmaf(t, z, -0.0223080879f);
    t = fmaf(t, z, 0.0317820252f);
    t = fmaf(t, z, -0.0530494615f);
    t = fmaf(t, z, 0.159154927f);
    t *= s;
    if (steep) t += 0.25f;
    if (bottom < 0.0f) t += 0.5f;
    return t;
}

// Sector of n that an angle in turns lies in; 0 if there is no angle.
INLINE u32 sector_of(float turn, u32 n) {
    const u32 sector = __float2int_rd(turn * (float)(u16)n);
    return min(sector, sector + n);  // a negative one gets a turn
}

// Place of b's share of the energy on a sin^2 grid; a is not 0. The product is rounded down as a subnormal number, whose bits are
// the integer.
INLINE u32 place_of(float a, float b, float grid) { return bits_of(__fmul_rd(b * inverse(a + b), grid * float_of(1))); }

struct Writer {  // a lane's run of bits; words that hold none of them are told to change nothing, which costs less than to ask
    u32 words;  // address in shared memory
    u32 bit;

    INLINE static void add(u32 at, u32 value) { asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(at), "r"(value) : "memory"); }

    INLINE void put(u32 value, int width) {  // up to 32 bits
        const u32 at = word_of(words, bit);
        add(at, __funnelshift_l(0, value, bit));
        add(at + 4, __funnelshift_l(value, 0, bit));
        bit += width;
    }
    INLINE void put(u32 low, u32 high, int width) {  // up to 64
        const u32 at = word_of(words, bit);
        add(at, __funnelshift_l(0, low, bit));
        add(at + 4, __funnelshift_l(low, high, bit));
        add(at + 8, __funnelshift_l(high, 0, bit));
        bit += width;
    }
};

#if !PAPER
struct Angle {
    u32 code;
    int width, left, right;  // budgets of the children
};

// Angles of COUNT nodes, side by side because each waits for its look-ups.
template <int N, int COUNT> INLINE void find_angles(const u8* tables, const float* a, const float* b, const int* budgets, Angle* angles) {
    constexpr int rows[] = LOOK_UP_ROWS, row = rows[place_in(N)];
    int shift[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        angles[i].width = width_of<N>(budgets[i]);
        const u8* look_up = tables + LOOK_UPS_AT + (row + angles[i].width) * LOOK_UP_BYTES;
        if constexpr (N <= 16) {
            const u32 where = place_of(a[i], b[i], 1024.0f);
            angles[i].code = look_up[where];
            shift[i] = reinterpret_cast<const signed char*>(look_up + (SHIFTS_16_AT - LOOK_UPS_AT - LOOK_UP_ROW_16 * LOOK_UP_BYTES))[where];
        } else {
            const u32 where = place_of(a[i], b[i], 16384.0f);
            u32 code = look_up[where >> 4];
            code += reinterpret_cast<const u16*>(tables + BOUNDS_AT)[(row + angles[i].width) * 130 + 1 + code] <= where;
            shift[i] = reinterpret_cast<const signed char*>(tables + SHIFTS_AT)[place_in(N) * 256 + (1 << angles[i].width) + code];
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

#endif

#define LEAST_ENERGY 1e-30f  // of a row that is not zero
#if !PAPER
// Code of the radius sqrt(energy / ORDER^ROUNDS) 2^-exponent (SPEC 6.1).
INLINE u32 radius_code(float energy, int exponent) {
    const u32 bits = bits_of(energy);
    const int power = (int)(bits >> 23) - 127 - ROUNDS * LOG2_ORDER;
    float doubled;  // twice log2 of the radius within its octave
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(doubled) : "f"(float_of((bits & 0x7fffff) + (127 + (power & 1) << 23))));
    const int code = ((power >> 1) - exponent + RADIUS_BIAS) * RADIUS_STEPS + __float2int_rd(doubled * (0.5f * RADIUS_STEPS) + 0.5f) + 1;
    return energy > LEAST_ENERGY ? min(max(code, 1), (1 << RADIUS_BITS) - 1) : 0;
}

#endif

struct Energies {  // of a lane's quarter: of the pairs of its quads, the first of which is never 0
    float a[QUADS_LANE], b[QUADS_LANE];

    template <int N> INLINE float of(int quad) const {
        if constexpr (N == 4) return a[quad] + b[quad];
        else return of<N / 2>(quad) + of<N / 2>(quad + N / 8);
    }
};

// Coordinate i of a lane's quarter.
#define AT(i) p[(i) >> 2][(i) & 3]

INLINE void find_energies(float (*p)[4], Energies& e) {
#pragma unroll
    for (int i = 0; i < QUADS_LANE; i++) {
        e.a[i] = fmaf(AT(4 * i), AT(4 * i), fmaf(AT(4 * i + 1), AT(4 * i + 1), 1e-37f));
        e.b[i] = fmaf(AT(4 * i + 2), AT(4 * i + 2), AT(4 * i + 3) * AT(4 * i + 3));
    }
}

#if !PAPER
// Codes of COUNT quads of a row, from the quad ``first`` on.
template <int COUNT> INLINE void find_codes(const u8* tables, float (*p)[4], const Energies& e, int first, const int* budgets, u32* codes) {
    u32 cell[COUNT], n[COUNT];
    uint2 have[COUNT];
    float turns[COUNT][2];
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        cell[i] = (tables + CELLS_AT)[budgets[i] * LOOK_UP_BYTES + place_of(e.a[first + i], e.b[first + i], 1024.0f)];
        have[i] = reinterpret_cast<const uint2*>(tables + BUDGETS_AT)[budgets[i]];  // codes a cell, first record
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const int at = 4 * (first + i);
        turns[i][0] = turns_of(AT(at), AT(at + 1)), turns[i][1] = turns_of(AT(at + 2), AT(at + 3));
    }
#pragma unroll
    for (int i = 0; i < COUNT; i++) n[i] = reinterpret_cast<const u32*>(tables + SECTORS_AT)[have[i].y + cell[i]];  // of both circles
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const u32 a = sector_of(turns[i][0], n[i] & 0xffff), b = sector_of(turns[i][1], n[i] >> 16);
        codes[i] = cell[i] * have[i].x + (a * (n[i] >> 16) + b);
    }
}

// Two nodes of eight coordinates; the first writes an angle that stands before it as well.
INLINE void eights(const u8* tables, Writer& out, float (*p)[4], const Energies& e, int quad, const int* budgets, u32 before,
                   int before_width) {
    const float a[2] = {e.of<4>(quad), e.of<4>(quad + 2)}, b[2] = {e.of<4>(quad + 1), e.of<4>(quad + 3)};
    Angle angle[2];
    find_angles<8, 2>(tables, a, b, budgets, angle);
    const int each[4] = {angle[0].left, angle[0].right, angle[1].left, angle[1].right};
    u32 codes[4];
    find_codes<4>(tables, p, e, quad, each, codes);
#pragma unroll
    for (int i = 0; i < 2; i++) {  // at most 56 bits, and seven before
        u32 low = codes[2 * i] | codes[2 * i + 1] << angle[i].left, high = __funnelshift_l(codes[2 * i + 1], 0, angle[i].left);
        high = __funnelshift_l(low, high, angle[i].width), low = low << angle[i].width | angle[i].code;
        if (i == 0) high = __funnelshift_l(low, high, before_width), low = low << before_width | before;
        out.put(low, high, budgets[i] + (i == 0 ? before_width : 0));
    }
}

// Everything below a lane's node.
template <int N> INLINE void subtree(const u8* tables, Writer& out, float (*p)[4], const Energies& e, int quad, int budget) {
    const float a = e.of<N / 2>(quad), b = e.of<N / 2>(quad + N / 8);
    Angle angle;
    find_angles<N, 1>(tables, &a, &b, &budget, &angle);
    if constexpr (N == 16) {
        const int budgets[2] = {angle.left, angle.right};
        eights(tables, out, p, e, quad, budgets, angle.code, angle.width);
    } else {
        out.put(angle.code, angle.width);
        if constexpr (N == 32) {
            const float as[2] = {e.of<8>(quad), e.of<8>(quad + 4)}, bs[2] = {e.of<8>(quad + 2), e.of<8>(quad + 6)};
            const int budgets[2] = {angle.left, angle.right};
            Angle sixteens[2];
            find_angles<16, 2>(tables, as, bs, budgets, sixteens);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int below[2] = {sixteens[i].left, sixteens[i].right};
                eights(tables, out, p, e, quad + 4 * i, below, sixteens[i].code, sixteens[i].width);
            }
        } else {
            subtree<N / 2>(tables, out, p, e, quad, angle.left);
            subtree<N / 2>(tables, out, p, e, quad + N / 8, angle.right);
        }
    }
}

#else
// -- paper coding (SPEC 7) ---------------------------------------------------------------------------------------
INLINE u32 paper_cell(int level, float a, float b) {
    constexpr float bounds[3][3] = PAPER_BOUNDS;  // squared tangents
    return (b >= bounds[level - 2][0] * a) + (b >= bounds[level - 2][1] * a) + (b >= bounds[level - 2][2] * a);
}

// Sector of sixteen: which half of its octant, then octants by swap and signs.
INLINE u32 paper_sector(float x, float y) {
    const float least = fminf(fabsf(x), fabsf(y)), most = fmaxf(fabsf(x), fabsf(y));
    u32 sector = (least >= 0.41421356f * most && most > 0.0f) ^ (fabsf(y) > fabsf(x) ? 3 : 0);
    sector ^= bits_of(x) >> 31 ? 7 : 0;
    return sector ^ (bits_of(y) >> 31 ? 15 : 0);
}

INLINE void paper_quarter(Writer& out, float (*p)[4], const Energies& e, int low_power) {
    const int half_power = low_power / 2;
#pragma unroll
    for (int i = 0; i < ORDER / 64; i++) {
        const float energy = e.of<16>(4 * i);
        const float root = sqrtf(energy * (1.0f / ORDER)) * float_of((u32)(half_power + 127) << 23) * float_of((u32)(low_power - half_power + 127) << 23);
        u32 low = energy > LEAST_ENERGY ? half_bits(fminf(root, 65504.0f)) : 0;
        low |= paper_cell(4, e.of<8>(4 * i), e.of<8>(4 * i + 2)) << 16;
        u32 sectors = 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int quad = 4 * i + j;
            if (j % 2 == 0) low |= paper_cell(3, e.of<4>(quad), e.of<4>(quad + 1)) << (18 + j);
            low |= paper_cell(2, e.a[quad], e.b[quad]) << (22 + 2 * j);
            sectors |= paper_sector(p[quad][0], p[quad][1]) << (8 * j) | paper_sector(p[quad][2], p[quad][3]) << (8 * j + 4);
        }
        out.put(low | sectors << 30, sectors >> 2, 62);
    }
}
#endif

#if DTYPE == 3
#define WORDS_8 8
#else
#define WORDS_8 4
#endif

// Eight channels as they are stored.
INLINE void load_8(i64 from, u32* x) {
#pragma unroll
    for (int i = 0; i < WORDS_8; i += 4) {
        uint4 got = __ldcs(reinterpret_cast<const uint4*>(from) + i / 4);
        x[i] = got.x, x[i + 1] = got.y, x[i + 2] = got.z, x[i + 3] = got.w;
    }
}

INLINE float value_of(const u32* x, int i) {
#if DTYPE == 3
    return float_of(x[i]);
#elif DTYPE == 1
    return half_value(x[i / 2] >> 16 * (i & 1));
#else
    return float_of(i & 1 ? x[i / 2] & 0xffff0000u : x[i / 2] << 16);
#endif
}

#if ROUNDS == 1
// The operand of a k-step and a quad.
#define OPERAND(operand, t, quad) operand[(quad) >> 1 & 3][parity(STEP(t) & (quad) << 2 & ~(1u << IN))]

#elif !BYTES
INLINE u32 pack_entries(float even, float odd) {
    u32 r;
#if BRAIN
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(odd), "f"(even));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(odd), "f"(even));
#endif
    return r;
}

INLINE float entry_value(u32 x) {  // of the low half
#if BRAIN
    return float_of(x << 16);
#else
    return half_value(x & 0xffff);
#endif
}

#endif
#if ROUNDS == 2
// A lane's coordinates, of operands as multiply() takes them; TOGETHER by four warps. With BYTES they are halved.
template <bool TWICE, bool TOGETHER> INLINE void rotate(const u8* tables, const u32 (*a)[4], float (*p)[4]) {
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        Sum sums[(TWICE ? 2 : 1) * TILES][4];
        if (TOGETHER) multiply_together<TWICE>(tables, chunk, a, sums);
        else multiply<TWICE>(tables, chunk, a, sums);
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                p[(chunk * TILES + i) / 2][2 * (i & 1) + j] = sums[i][j] + sums[TWICE ? TILES + i : i][2 + j] * (BYTES ? 256 : 1);
    }
}
#endif

#if BYTES
// A row of 16-bit numbers as operands: brought to integers of 15 bits, NaN and Inf found.
INLINE void bytes_row(const Block& b, const i64 from, int row, int lane, int& bad, int& exponent, u32 (*a)[4]) {
    u32 got[PIECES][4], most = 0;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        load_8(from + piece * 32 * ITEM, got[piece]);
#pragma unroll
        for (int i = 0; i < 4; i++) most = __vmaxu2(most, got[piece][i] & 0x7fff7fffu);
    }
    most = max(most & 0xffff, most >> 16);
    most = max(most, __shfl_xor_sync(ALL, most, 1));
    most = max(most, __shfl_xor_sync(ALL, most, 2));
    most = DTYPE == 2 ? most << 16 : bits_of(half_value(most));
    const bool wrong = most >= 0x7f800000u;
    bad += wrong && row < b.tokens && (lane & 3) == 0;
    // 32,639 at the most: what is above it in its octave counts as of the next.
    const u32 octave = most + (129 << 9);
    exponent = wrong ? 0 : 14 - (octave >> 23 ? (int)(octave >> 23) - 127 : -118 - __clz(octave));
    const int rest = max(exponent - 127, 0);  // what float32 cannot be multiplied by: it is rounded so much finer
    const float scale = float_of((u32)(exponent - rest + 127) << 23), magic = float_of(bits_of(BYTES_MAGIC) - ((u32)rest << 23));
    const u32 mask = wrong ? 0 : ~0u;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        u32 v[4];
#pragma unroll
        for (int u = 0; u < 4; u++) v[u] = bits_of(fmaf(value_of(got[i / 2], 4 * (i & 1) + u), scale, magic));
        u32* parts = a[i / 2] + 2 * (i & 1);
        split_bytes(v, parts);
        parts[0] &= mask, parts[1] &= mask;
    }
    exponent--;  // the matrix is R / 2
}
#else
// A row as float32: centred, NaN and Inf found, brought to where two float16 side by side hold 22 bits of the largest numbers.
// Makes accumulators for join(), or operands.
#if ROUNDS == 1
#define CAREFUL float (*p)[4]
#else
#define CAREFUL u32 (*a)[4]
#endif
INLINE void careful_row(const u8* tables, const Block& b, const i64 from, int row, int lane, int& bad,
                         int& exponent, CAREFUL) {
    const int q = lane & 3;
    float x[PIECES][8];
    u32 most = 0;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        u32 got[WORDS_8];
        load_8(from + piece * 32 * ITEM, got);
#pragma unroll
        for (int u = 0; u < 8; u++) {
            x[piece][u] = value_of(got, u);
            most = max(most, bits_of(x[piece][u]) & 0x7fffffffu);
        }
    }
    most = max(most, __shfl_xor_sync(ALL, most, 1));
    most = max(most, __shfl_xor_sync(ALL, most, 2));
    const bool wrong = most >= 0x7f800000u;
    bad += wrong && row < b.tokens && q == 0;
    const int channel = q * 8;
#if OFFSETS
    most = 0;
#pragma unroll
    for (int piece = 0; piece < PIECES; piece++) {
        float o[8];
        offset_run<8>(tables, b, row, channel + piece * 32, o);
#pragma unroll
        for (int u = 0; u < 8; u++) {
            x[piece][u] = fminf(fmaxf(x[piece][u] - o[u], -LARGEST_32), LARGEST_32);
            most = max(most, bits_of(x[piece][u]) & 0x7fffffffu);
        }
    }
    most = max(most, __shfl_xor_sync(ALL, most, 1));
    most = max(most, __shfl_xor_sync(ALL, most, 2));
#endif
    exponent = wrong ? 0 : min(13 - ((int)(most >> 23) - 127), 127);
    const float scale = float_of((u32)(exponent + 127) << 23);
#if ROUNDS == 2
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
        float even = wrong ? 0.0f : x[i / 4][2 * (i & 3)] * scale, odd = wrong ? 0.0f : x[i / 4][2 * (i & 3) + 1] * scale;
        u32* parts = a[i / 2] + 2 * (i & 1);
        parts[0] = pack_entries(even, odd);
        even -= entry_value(parts[0]), odd -= entry_value(parts[0] >> 16);
        parts[1] = pack_entries(even, odd);
    }
#else
    const Signs signs = reinterpret_cast<const Signs*>(tables + BLOB_BYTES)[lane];
    u32 operand[4][2][2];  // bits OUT, negative, register
#pragma unroll
    for (int quad = 0; quad < QUADS_LANE; quad++) p[quad][0] = p[quad][1] = p[quad][2] = p[quad][3] = 0.0f;
#pragma unroll
    for (int t = 0; t < STEPS; t++) {
        u32 a[2][4];  // term; bits HALF and 1 of the channels
        if (t == 0 || (t == STEPS / 2 && ORDER > 64))
#pragma unroll
            for (int out = 0; out < 4; out++) signs.operands(q, t > 0, out << 3, operand[out]);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int piece = t / 2 + (i >> 1) * PIECES / 2, u = 4 * (t & 1) + 2 * (i & 1);
            const u32* sign = reinterpret_cast<const u32*>(tables + SIGNS_32_AT) + channel + piece * 32 + u;
            float even = wrong ? 0.0f : float_of(bits_of(x[piece][u] * scale) ^ sign[0]);
            float odd = wrong ? 0.0f : float_of(bits_of(x[piece][u + 1] * scale) ^ sign[1]);
            asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(a[0][i]) : "f"(odd), "f"(even));
            even -= half_value(a[0][i] & 0xffff), odd -= half_value(a[0][i] >> 16);
            asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(a[1][i]) : "f"(odd), "f"(even));
        }
#pragma unroll
        for (int quad = 0; quad < QUADS_LANE; quad++)
#pragma unroll
            for (int term = 0; term < 2; term++)
                mma_half(p[quad], a[term][0], a[term][1], a[term][2], a[term][3], OPERAND(operand, t, quad), p[quad]);
    }
#endif
}
#endif

// Rows behind the block's end repeat its last.
INLINE i64 row_at(const Block& b, int row) { return b.rows + min(row, b.tokens - 1) * b.stride; }

// Rows of the tensor on their way to the L2 cache: 128 bytes a lane.
INLINE void fetch(const Block& b, int row0, int lane) {
    constexpr int LINES = ORDER * ITEM / 128;
#pragma unroll
    for (int i = 0; i < ROWS * LINES; i += 32) {
        const int line = i + lane;
        if (line < ROWS * LINES) asm volatile("prefetch.global.L2 [%0];" ::"l"(row_at(b, row0 + line / LINES) + line % LINES * 128));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) encode_stream_blocks(
    const i64* __restrict__ rows, const i64* __restrict__ firsts, const i64* __restrict__ starts, int* __restrict__ flags,
    const i64* __restrict__ keys, const uint4* __restrict__ blob, i64 blocks, int search) {
    extern __shared__ uint4 memory[];
    const int lane = threadIdx.x & 31, q = lane & 3, g = lane >> 2;
    const u8* tables = reinterpret_cast<const u8*>(memory);
    u32* stage = reinterpret_cast<u32*>(const_cast<u8*>(tables) + BLOB_BYTES + SIGNS_BYTES + (threadIdx.x >> 5) * WARP_BYTES);
    Block* stash = reinterpret_cast<Block*>(reinterpret_cast<u8*>(stage) + STAGE_BYTES);  // of the next block
    u32 index = (threadIdx.x >> 5) * gridDim.x + blockIdx.x;
    if (index < blocks) {
        const Block b = find_block(rows, firsts, starts, search, index);
        fetch(b, 0, lane);
        if (lane == 0) *stash = b;
    }
#if WARPGROUPS
    else if (lane == 0) *stash = find_block(rows, firsts, starts, search, 0);
#endif
    for (int i = threadIdx.x; i < BLOB_BYTES / 16; i += THREADS) memory[i] = __ldg(blob + i);
#if ROUNDS == 1
    if (threadIdx.x < 32) {  // of float16, then of bfloat16
        reinterpret_cast<Signs*>(const_cast<u8*>(tables) + BLOB_BYTES)[lane].prepare(lane, 0x3c003c00u);
        reinterpret_cast<Signs*>(const_cast<u8*>(tables) + BLOB_BYTES + SIGNS_BYTES / 2)[lane].prepare(lane, 0x3f803f80u);
    }
#endif
    READY;

    for (; WORK_LEFT; index += gridDim.x * WARPS) {
        const Block b = *stash;
        u64 sum = 0;
        int bad = 0;
        __syncwarp();
        FOR_ROWS {
#if WARPGROUPS
            more = votes_of_four(false, !IDLE && row0 + ROWS < b.tokens) >> 3;
#endif
            const int row = row0 + g;
            const i64 from = row_at(b, row) + q * 8 * ITEM;
            float p[QUADS_LANE][4];
            int exponent = 0;
#if PLAIN
            u32 x[PIECES][4];
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) load_8(from + piece * 32 * ITEM, x[piece]);
#pragma unroll
            for (int i = 0; i < (STAGE_BYTES + 511) / 512; i++)
                if (i * 512 + lane * 16 < STAGE_BYTES) reinterpret_cast<uint4*>(stage)[i * 32 + lane] = make_uint4(0, 0, 0, 0);
#if ROUNDS == 2
            rotate<true, WARPGROUPS>(tables, x, p);
#else
            const Signs signs = reinterpret_cast<const Signs*>(tables + BLOB_BYTES + (DTYPE == 2 ? SIGNS_BYTES / 2 : 0))[lane];
            u32 operand[4][2][2];  // bits OUT, negative, register
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
                const uint4 sign = *reinterpret_cast<const uint4*>(tables + SIGNS_AT + (q * 8 + piece * 32) * 2);
                x[piece][0] = with_signs(x[piece][0], sign.x), x[piece][1] = with_signs(x[piece][1], sign.y);
                x[piece][2] = with_signs(x[piece][2], sign.z), x[piece][3] = with_signs(x[piece][3], sign.w);
            }
#pragma unroll
            for (int t = 0; t < STEPS; t++) {
                const int one = t / 2, two = one + PIECES / 2, pair = 2 * (t & 1);
                if (t == 0 || (t == STEPS / 2 && ORDER > 64))
#pragma unroll
                    for (int out = 0; out < 4; out++) signs.operands(q, t > 0, out << 3, operand[out]);
#pragma unroll
                for (int quad = 0; quad < QUADS_LANE; quad++) {
                    const float zero[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                    const float* c = t ? p[quad] : zero;
#if DTYPE == 1
                    mma_half(p[quad], x[one][pair], x[one][pair + 1], x[two][pair], x[two][pair + 1], OPERAND(operand, t, quad), c);
#else
                    mma_brain(p[quad], x[one][pair], x[one][pair + 1], x[two][pair], x[two][pair + 1], OPERAND(operand, t, quad), c);
#endif
                }
            }
#endif
#else
#pragma unroll
            for (int i = 0; i < (STAGE_BYTES + 511) / 512; i++)
                if (i * 512 + lane * 16 < STAGE_BYTES) reinterpret_cast<uint4*>(stage)[i * 32 + lane] = make_uint4(0, 0, 0, 0);
#if ROUNDS == 2
            u32 a[BLOCKS / 2][4];
#if BYTES
            bytes_row(b, from, row, lane, bad, exponent, a);
#else
            careful_row(tables, b, from, row, lane, bad, exponent, a);
#endif
            rotate<false, WARPGROUPS>(tables, a, p);
#else
            careful_row(tables, b, from, row, lane, bad, exponent, p);
#endif
#endif
#if ROUNDS == 1
#pragma unroll
            for (int quad = 0; quad < QUADS_LANE; quad++) join(p[quad]);
#endif
            __syncwarp();
            if (row0 + ROWS < b.tokens) {
                fetch(b, row0 + ROWS, lane);
            } else if (!PAST && index + gridDim.x * WARPS < blocks) {
                const Block next = find_block(rows, firsts, starts, search, index + gridDim.x * WARPS);
                fetch(next, 0, lane);
                if (lane == 0) *stash = next;
            }
            Energies e;
            find_energies(p, e);
            float own = e.of<ORDER / 4>(0);
#if PLAIN
            if (!__all_sync(ALL, own > 1e-22f && own < 1e30f)) {
#if ROUNDS == 2
                u32 a[BLOCKS / 2][4];
                careful_row(tables, b, from, row, lane, bad, exponent, a);
                rotate<false, false>(tables, a, p);
#else
                careful_row(tables, b, from, row, lane, bad, exponent, p);
#pragma unroll
                for (int quad = 0; quad < QUADS_LANE; quad++) join(p[quad]);
#endif
                find_energies(p, e);
                own = e.of<ORDER / 4>(0);
            }
#endif
#if PAPER
            const int radius_exponent = *reinterpret_cast<const short*>(__ldg(b.span + STREAM) + RADIUS_EXPONENT_AT);
            Writer out = {(u32)__cvta_generic_to_shared(stage), (u32)(g * ROW_BYTES * 8 + q * (ORDER / 64 * 62))};
            paper_quarter(out, p, e, -exponent - radius_exponent);
#else
            const float other = __shfl_xor_sync(ALL, own, 1);
            const float pair = own + other;
            const float far = __shfl_xor_sync(ALL, pair, 2);
            const float above[2] = {q & 2 ? far : pair, q & 1 ? other : own};
            const float below[2] = {q & 2 ? pair : far, q & 1 ? own : other};
            const int root = ROOT_BUDGET;
            Angle top, next;
            find_angles<ORDER, 1>(tables, above, below, &root, &top);
            const int half = q & 2 ? top.right : top.left;
            find_angles<ORDER / 2, 1>(tables, above + 1, below + 1, &half, &next);
            // The first lane writes radius and both angles, the third one angle, the others nothing.
            Writer out = {(u32)__cvta_generic_to_shared(stage + g * STRIDE_WORDS), 0};
            const u32 head = radius_code(pair + far, exponent) | top.code << RADIUS_BITS;
            const int head_width = RADIUS_BITS + top.width;
            const u32 value = q & 1 ? 0 : q & 2 ? next.code : head | next.code << head_width;
            out.bit = q & 2 ? head_width + top.left : 0;
            out.put(value, q & 2 ? next.width : head_width + next.width);
            out.bit += q & 1 ? next.left : 0;
            subtree<ORDER / 4>(tables, out, p, e, 0, q & 1 ? next.right : next.left);
#endif
            __syncwarp();
            const int have = IDLE ? 0 : WORDS(min(b.tokens - row0, ROWS));
            u32* payload = b.payload + WORDS(row0);
#pragma unroll
            for (int i = 0; i < FETCHES; i++) {
                const int at_word = i * 32 + lane;
                const bool inside = at_word < have;
                const u32 word = inside ? stage[place_of_word(at_word)] : 0;
                sum += folded((u64)word * key_of(tables, keys, WORDS(b.tokens), WORDS(row0) + at_word));
                if (inside) __stcs(payload + at_word, word);
            }
            __syncwarp();
        }
        const u32 total = reduced(sum, b.tokens * ROW_BYTES, KEY_0);
        if (lane == 0 && !IDLE) b.payload[WORDS(b.tokens)] = total;
        if (bad && !IDLE) atomicAdd(flags + __ldg(b.span + FLAGS), bad);
    }
}
#endif
