// Law: the CUDA kernels of split coding for orders 64, 128 and 256, compiled at run time for one kind of stream.
//
// A warp codes one block (a chunk of tokens of one leading index), sixteen rows at a time, and shares nothing with other
// warps but read-only tables. Four lanes hold a row: each owns a quarter of its tree, so no lane waits for another but at the
// two nodes above. The rotation is H = H_16 (x) H_k: H_16 is one mma with a constant +-1 operand, whose rows and columns are
// permuted so that what the tree makes is what mma reads (and the other way round when encoding), and H_k are additions
// inside a lane. All sums of the decoder are integers below 2^24, so they are exact. Nothing may be fused that decides output
// bits: this file is compiled with --fmad=false, and the encoder, which is free, says fmaf where it wants one.
//
// Compiled with: ORDER, DTYPE (1 float16, 2 bfloat16, 3 float32), ROOT_BUDGET, RADIUS_BITS, RADIUS_STEPS, ROW_WORDS, CHUNK,
// OFFSETS, TABLE_BITS, the numbers of constants.py and device.py, and the places of the tables in the blob.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
typedef unsigned short u16;
typedef unsigned char u8;

#define LANE_COORDINATES (ORDER / 4)
#define NODES_8 (LANE_COORDINATES / 8)
#define STEPS_T (LANE_COORDINATES / 4)  // k-steps of mma: sixteen coordinates each
#define STAGE_WORDS (16 * ROW_WORDS + 4)
#define ALL 0xffffffffu
#define INLINE __device__ __forceinline__

INLINE u32 bits_of(float x) { return __float_as_uint(x); }
INLINE float float_of(u32 x) { return __uint_as_float(x); }

// Which sign H has between the k-th input and the n-th output of one mma, and the output's variant bit.
INLINE u32 parity(u32 x) { return __popc(x) & 1; }

// -- blocks ------------------------------------------------------------------------------------------------------
struct Block {
    const i64* span;
    i64 chunk, lead, address;
    int tokens;
};

INLINE Block find_block(const i64* rows, const i64* firsts, int search, i64 index) {
    i64 low = 0;
    for (int bit = search - 1; bit >= 0; bit--)
        if (firsts[low + (1 << bit)] <= index) low += 1 << bit;
    Block b;
    b.span = rows + low * FIELDS;
    i64 local = index - firsts[low], leads = b.span[LEADS];
    i64 chunk = local / leads;
    b.chunk = b.span[FIRST_CHUNK] + chunk;
    b.lead = b.span[FIRST_LEAD] + local - chunk * leads;
    i64 left = b.span[CODED] - b.chunk * CHUNK;
    b.tokens = left < CHUNK ? (int)left : CHUNK;
    b.address = b.span[PAYLOAD] + b.chunk * b.span[LEADING] * (CHUNK * ROW_WORDS * 4 + 4) + b.lead * (b.tokens * ROW_WORDS * 4 + 4);
    return b;
}

// -- checksum (SPEC 4.2): sums of products, folded below 2^36 by 2^32 = 5 (mod p) -----------------------------------
INLINE u64 folded(u64 x) { return (x & 0xffffffffull) + (x >> 32) * PRIME_GAP; }

INLINE u32 reduced(u64 sum, u32 bytes, u32 key) {
    for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(ALL, sum, i);
    return (u32)((sum + folded((u64)bytes * key)) % PRIME);
}

// -- the tree ----------------------------------------------------------------------------------------------------
template <int N> INLINE int width_of(int budget) {
    constexpr u32 factor = ((16u << 24) + 15 * N - 1) / (15 * N);  // exact for every budget (tables.py)
    return min(min(max((int)((u32)budget * factor >> 24), 1), 7), budget);
}

template <int M> INLINE int share_of(int rest, int shift) {
    return min(max((rest >> 1) + shift, max(rest - 7 * M, 0)), min(rest, 7 * M));
}

INLINE u32 mma_signs(u32 even, u32 odd) {  // two operands of +-1
#if DTYPE == 1 || defined(DECODER)
    return 0x3c003c00u ^ even << 15 ^ odd << 31;
#else
    return 0x3f803f80u ^ even << 15 ^ odd << 31;
#endif
}

INLINE void mma_half(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

INLINE void mma_brain(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Walsh-Hadamard over COUNT accumulators of four.
template <int COUNT> INLINE void hadamard(float (*p)[4]) {
#pragma unroll
    for (int half = 1; half < COUNT; half *= 2)
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (!(i & half))
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float a = p[i][j], b = p[i + half][j];
                    p[i][j] = a + b;
                    p[i + half][j] = a - b;
                }
}

// -- offsets (SPEC 8) --------------------------------------------------------------------------------------------
#if OFFSETS
INLINE float half_value(u32 bits) {
    float r;
    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(r) : "r"(bits));
    return r;
}

// Offsets of RUN neighbouring channels at a token; every operation rounds.
template <int RUN> INLINE void offset_run(const u8* tables, const Block& b, i64 token, int first, float* o) {
    const i64 stream = b.span[STREAM];
    const float unit = float_of((u32)(*reinterpret_cast<const short*>(stream + OFFSET_EXPONENT_AT) + 127) << 23);
    const u16* halves = reinterpret_cast<const u16*>(stream + b.span[OFFSETS_AT] + b.lead * (2 * ORDER + 4));
#pragma unroll
    for (int u = 0; u < RUN; u++) o[u] = half_value(__ldg(halves + first + u)) * unit;
#if PAIRS
    if (first >= 2 * PAIRS) return;
    const u32 position = (u32)(token + b.span[POSITION]);
    const u32* frequencies = reinterpret_cast<const u32*>(tables + FREQUENCIES_AT);
    const float2* phases = reinterpret_cast<const float2*>(tables + PHASES_AT);
    float other[RUN];
#pragma unroll
    for (int u = 0; u < RUN; u++)
#if INTERLEAVED
        other[u] = o[u ^ 1];
#else
        other[u] = half_value(__ldg(halves + (first < PAIRS ? first + PAIRS : first - PAIRS) + u)) * unit;
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

#ifdef DECODER
// -- decoding ----------------------------------------------------------------------------------------------------
INLINE u32 pack_half(float even, float odd) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(odd), "f"(even));
    return r;
}

INLINE u32 pack_stored(float even, float odd) {
    u32 r;
#if DTYPE == 1
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(odd), "f"(even));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(odd), "f"(even));
#endif
    return r;
}

INLINE u32 positive_zero(u32 x) {  // -0 -> 0 in both halves
    u32 r;
#if DTYPE == 1
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(x), "r"(0u));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(x), "r"(0x3f803f80u), "r"(0u));
#endif
    return r;
}

INLINE u32 window(const u32* words, int bit) {
    const u32* at = words + (bit >> 5);
    return __funnelshift_r(at[0], at[1], bit);
}

// The entry of a node: cos with the shift in its low 13 bits, sin.
template <int N> INLINE uint2 node_entry(const u8* tables, const u32* words, int bit, int width) {
    constexpr int place = ORDER == N ? 0 : ORDER == 2 * N ? 1 : ORDER == 4 * N ? 2 : ORDER == 8 * N ? 3 : ORDER == 16 * N ? 4 : 5;
    u32 one = 1u << width;
    u32 index = (window(words, bit) & (one - 1)) | one;
    return reinterpret_cast<const uint2*>(tables + NODES_AT)[place * 256 + index];
}
INLINE float cos_of(uint2 e) { return float_of(e.x & ~0x1fffu); }
INLINE int shift_of(uint2 e) { return (int)(e.x << 19) >> 19; }

// A node of which only the child on the lane's side is wanted.
template <int N> INLINE void descend(const u8* tables, const u32* words, int& bit, int& budget, float& radius, bool right) {
    int width = width_of<N>(budget);
    uint2 e = node_entry<N>(tables, words, bit, width);
    int rest = budget - width, share = share_of<N / 2>(rest, shift_of(e));
    radius *= right ? float_of(e.y) : cos_of(e);
    budget = right ? rest - share : share;
    bit += right ? width + share : width;
}

INLINE u32 phase_at(u32 sector, u32 step) { return ((2 * sector + 1) * step + (1u << 15)) >> 13 & (2047u << 3); }

// A quad's four coordinates on the grid (SPEC 6.4, 6.5); ``code`` may hold more bits above its ``budget``.
INLINE void quad(const u8* tables, u32 code, int budget, float radius, float* v) {
    u32 one = 1u << budget;
    code &= one - 1;
    u32 record, at_a, at_b;
#if TABLE_BITS
    if (budget <= TABLE_BITS) {
        u32 entry = reinterpret_cast<const u32*>(tables + QUADS_AT)[one | code];
        record = entry & 1023, at_a = entry >> 21 << 3, at_b = entry >> 7 & (2047u << 3);
    } else
#endif
    {
        uint4 b = reinterpret_cast<const uint4*>(tables + BUDGETS_AT)[budget];  // magic, shift, codes a cell, first and last
        u32 cell = min(__umulhi(2 * code + 1, b.x) >> b.y, b.w >> 16);
        record = (b.w & 0xffff) + cell;
        u32 left = code - cell * b.z;
        uint4 r = reinterpret_cast<const uint4*>(tables + RECORDS_AT)[record];  // n_b, its magic, K_a, K_b
        u32 sector = __umulhi(2 * left + 1, r.y);
        at_a = phase_at(sector, r.z), at_b = phase_at(left - sector * r.x, r.w);
    }
    float2 means = reinterpret_cast<const float2*>(tables + MEANS_AT)[record];
    float2 a = *reinterpret_cast<const float2*>(tables + CIRCLE_AT + at_a);
    float2 b = *reinterpret_cast<const float2*>(tables + CIRCLE_AT + at_b);
    const float magic = 12582912.0f;  // rounds to an integer, ties to even
    v[0] = __fadd_rn(__fmul_rn(radius, __fmul_rn(means.x, a.x)), magic) - magic;
    v[1] = __fadd_rn(__fmul_rn(radius, __fmul_rn(means.x, a.y)), magic) - magic;
    v[2] = __fadd_rn(__fmul_rn(radius, __fmul_rn(means.y, b.x)), magic) - magic;
    v[3] = __fadd_rn(__fmul_rn(radius, __fmul_rn(means.y, b.y)), magic) - magic;
}

// An 8-node: its angle and its two quads are at most 63 bits side by side.
INLINE void node_8(const u8* tables, const u32* words, int bit, int budget, float radius, float* v) {
    const u32* at = words + (bit >> 5);
    u32 w0 = at[0], w1 = at[1], w2 = at[2];
    u32 low = __funnelshift_r(w0, w1, bit), high = __funnelshift_r(w1, w2, bit);
    int width = width_of<8>(budget);
    u32 one = 1u << width;
    constexpr int place = ORDER == 64 ? 3 : ORDER == 128 ? 4 : 5;
    uint2 e = reinterpret_cast<const uint2*>(tables + NODES_AT)[place * 256 + ((low & (one - 1)) | one)];
    int rest = budget - width, share = share_of<4>(rest, shift_of(e));
    u32 first = __funnelshift_r(low, high, width);
    high >>= width;
    quad(tables, first, share, radius * cos_of(e), v);
    quad(tables, __funnelshift_r(first, high, share), rest - share, radius * float_of(e.y), v + 4);
}

INLINE void node_16(const u8* tables, const u32* words, int bit, int budget, float radius, float* v) {
    int width = width_of<16>(budget);
    uint2 e = node_entry<16>(tables, words, bit, width);
    int rest = budget - width, share = share_of<8>(rest, shift_of(e));
    node_8(tables, words, bit + width, share, radius * cos_of(e), v);
    node_8(tables, words, bit + width + share, rest - share, radius * float_of(e.y), v + 8);
}

// The operands of one row's quarter: k-step t holds, in its two registers, coordinates whose index differs in two bits.
INLINE void row_operands(const u8* tables, const u32* words, int q, u32 (*a)[2]) {
    int bit = RADIUS_BITS, budget = ROOT_BUDGET;
    float radius = GRID;
    descend<ORDER>(tables, words, bit, budget, radius, q & 2);
    descend<ORDER / 2>(tables, words, bit, budget, radius, q & 1);
    float v[16];
#if ORDER == 64
    node_16(tables, words, bit, budget, radius, v);
#pragma unroll
    for (int t = 0; t < 4; t++) {
        a[t][0] = pack_half(v[t], v[t + 8]);
        a[t][1] = pack_half(v[t + 4], v[t + 12]);
    }
#else
#if ORDER == 256
    int width64 = width_of<64>(budget);
    uint2 e64 = node_entry<64>(tables, words, bit, width64);
    int rest64 = budget - width64, share64 = share_of<32>(rest64, shift_of(e64));
    int bit_a = bit + width64;
    float radius_a = radius;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        bit = half ? bit_a + share64 : bit_a;
        budget = half ? rest64 - share64 : share64;
        radius = radius_a * (half ? float_of(e64.y) : cos_of(e64));
#else
    {
        const int half = 0;
#endif
        int width = width_of<32>(budget);
        uint2 e = node_entry<32>(tables, words, bit, width);
        int rest = budget - width, share = share_of<16>(rest, shift_of(e));
        node_16(tables, words, bit + width, share, radius * cos_of(e), v);
#pragma unroll
        for (int t = 0; t < 8; t++) a[8 * half + t][0] = pack_half(v[t], v[t + 8]);
        node_16(tables, words, bit + width + share, rest - share, radius * float_of(e.y), v);
#pragma unroll
        for (int t = 0; t < 8; t++) a[8 * half + t][1] = pack_half(v[t], v[t + 8]);
    }
#endif
}

// Radius factors of a row (SPEC 6.1).
INLINE void radius_factors(const u8* tables, const u32* words, float& first, float& second) {
    u32 code = words[0] & ((1u << RADIUS_BITS) - 1);
    u32 step = max(code, 1u) - 1, octave = step / RADIUS_STEPS;
    int exponent = (int)octave - RADIUS_BIAS;
    bool small = exponent < RADIUS_SPLIT;
    u32 mantissa = reinterpret_cast<const u32*>(tables + MANTISSAS_AT)[step - octave * RADIUS_STEPS];
    first = code ? float_of(mantissa + ((exponent + (small ? RADIUS_SHIFT : 0)) << 23)) : 0.0f;
    second = small ? SECOND_FACTOR : 1.0f;
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) decode_blocks(
    const i64* rows, const i64* firsts, const i64* starts, int* flags, const i64* keys, const uint4* blob,
    i64 blocks, int search) {
    extern __shared__ uint4 memory[];
    for (int i = threadIdx.x; i < BLOB_BYTES / 16; i += THREADS) memory[i] = blob[i];
    __syncthreads();
    const u8* tables = reinterpret_cast<const u8*>(memory);
    const int lane = threadIdx.x & 31, q = lane & 3, g = lane >> 2;
    u32* stage = reinterpret_cast<u32*>(const_cast<u8*>(tables) + BLOB_BYTES) + (threadIdx.x >> 5) * STAGE_WORDS;

    // The constant operand: k = 2 q + e' (+ 8 where h) is an input, n = 2 q_out + e an output coordinate.
    const u32 qo = lane >> 3, e = lane >> 2 & 1;
    u32 operand[2][2];
#pragma unroll
    for (u32 variant = 0; variant < 2; variant++)
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            u32 signs[2];
#pragma unroll
            for (u32 odd = 0; odd < 2; odd++) {
#if ORDER == 64  // inputs 5, 4 | 2 | 3; outputs 4, 3 | 5, variant 2
                signs[odd] = parity(((u32)q << 4 | h << 2 | odd << 3) & (qo << 3 | e << 5 | variant << 2));
#elif ORDER == 128  // inputs 6, 5 | 4 | 3; outputs 4, 3 | 5, variant 6
                signs[odd] = parity(((u32)q << 5 | h << 4 | odd << 3) & (qo << 3 | e << 5 | variant << 6));
#else  // inputs 7, 6 | 4 | 3; outputs 4, 3 | 6, variant 7
                signs[odd] = parity(((u32)q << 6 | h << 4 | odd << 3) & (qo << 3 | e << 6 | variant << 7));
#endif
            }
            operand[variant][h] = mma_signs(signs[0], signs[1]);
        }

    for (i64 index = (i64)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5); index < blocks; index += (i64)gridDim.x * (THREADS / 32)) {
        Block b = find_block(rows, firsts, search, index);
        const u32* payload = reinterpret_cast<const u32*>(b.address);
        const i64 begin = b.span[EXACT] + b.chunk * CHUNK;
        const i64 first_token = b.span[FIRST_TOKEN], last_token = b.span[LAST_TOKEN];
        const i64 start = starts[b.span[STARTS] + b.lead - b.span[FIRST_LEAD]], stride = b.span[STRIDE];
        const u32 stored = payload[b.tokens * ROW_WORDS];
        u64 sum = 0;
        for (int row0 = 0; row0 < b.tokens; row0 += 16) {
            const int left = min(b.tokens - row0, 16) * ROW_WORDS;
#pragma unroll
            for (int i = 0; i < (16 * ROW_WORDS + 31) / 32; i++) {
                int at = i * 32 + lane;
                if (at < left) {
                    u32 word = __ldcs(payload + row0 * ROW_WORDS + at);
                    sum += folded((u64)word * (u32)keys[1 + row0 * ROW_WORDS + at]);
                    stage[at] = word;
                }
            }
            __syncwarp();
            if (begin + row0 + 16 <= first_token || begin + row0 >= last_token) continue;

            u32 a[2][STEPS_T][2];
            float factor[2], second[2];
#pragma unroll
            for (int set = 0; set < 2; set++) {
                const u32* words = stage + (8 * set + g) * ROW_WORDS;
                radius_factors(tables, words, factor[set], second[set]);
                row_operands(tables, words, q, a[set]);
            }
            __syncwarp();

            // Ordinary rows neither leave float32's normal range nor the dtype's.
            const float bound = 181.0f * ORDER;  // > sqrt(ORDER) (2048 + sqrt(ORDER) / 2) for these orders
            bool plain = true;
#pragma unroll
            for (int set = 0; set < 2; set++) plain &= second[set] == 1.0f && factor[set] * bound * 2.0f < LARGEST;
            plain = __all_sync(ALL, plain);

#pragma unroll
            for (int variant = 0; variant < 2; variant++) {
                float p[STEPS_T][4];
#pragma unroll
                for (int t = 0; t < STEPS_T; t++) {
                    p[t][0] = p[t][1] = p[t][2] = p[t][3] = 0.0f;
                    mma_half(p[t], a[0][t][0], a[1][t][0], a[0][t][1], a[1][t][1], operand[variant][0], operand[variant][1]);
                }
#if ORDER == 64  // t and u are two bits; the outputs' bit 2 is the variant: four coordinates of a run of eight
                hadamard<4>(p);
#else
                hadamard<STEPS_T>(p);
#endif
#pragma unroll
                for (int set = 0; set < 2; set++) {
                    const i64 token = begin + row0 + 8 * set + g;
                    const bool wanted = row0 + 8 * set + g < b.tokens && token >= first_token && token < last_token;
                    const i64 target = start + (token - first_token) * stride * ITEM;
#pragma unroll
                    for (int high = 0; high < (ORDER == 256 ? 2 : 1); high++)  // the outputs' bit 5 of order 256
#pragma unroll
                        for (int bit_e = 0; bit_e < 2; bit_e++) {
                            constexpr int RUN = ORDER == 64 ? 4 : 8;
#if ORDER == 64
                            const int first = bit_e * 32 + q * 8 + variant * 4;
#elif ORDER == 128
                            const int first = variant * 64 + bit_e * 32 + q * 8;
#else
                            const int first = variant * 128 + bit_e * 64 + high * 32 + q * 8;
#endif
                            float y[RUN];
#pragma unroll
                            for (int u = 0; u < RUN; u++) y[u] = p[high * 8 + u][2 * set + bit_e];
#if DTYPE == 3 || OFFSETS
#pragma unroll
                            for (int u = 0; u < RUN; u++) {
                                y[u] = float_of(bits_of(y[u]) ^ reinterpret_cast<const u32*>(tables + SIGNS_32_AT)[first + u]);
                                y[u] = y[u] * factor[set] * second[set] + 0.0f;
                            }
#if OFFSETS
                            float o[RUN];
                            offset_run<RUN>(tables, b, token, first, o);
#pragma unroll
                            for (int u = 0; u < RUN; u++) y[u] += o[u];
#endif
#pragma unroll
                            for (int u = 0; u < RUN; u++) y[u] = fminf(fmaxf(y[u], -LARGEST), LARGEST);
#if DTYPE == 3
                            if (wanted)
#pragma unroll
                                for (int u = 0; u < RUN; u += 4)
                                    *reinterpret_cast<float4*>(target + (first + u) * ITEM) = make_float4(y[u], y[u + 1], y[u + 2], y[u + 3]);
#else
                            u32 packed[RUN / 2];
#pragma unroll
                            for (int u = 0; u < RUN; u += 2) packed[u / 2] = pack_stored(y[u], y[u + 1]);
#endif
#else
#pragma unroll
                            for (int u = 0; u < RUN; u++) y[u] = y[u] * factor[set];
                            if (!plain)
#pragma unroll
                                for (int u = 0; u < RUN; u++) y[u] = fminf(fmaxf(y[u] * second[set], -LARGEST), LARGEST);
                            u32 packed[RUN / 2];
                            const u32* signs = reinterpret_cast<const u32*>(tables + SIGNS_AT) + first / 2;
#pragma unroll
                            for (int u = 0; u < RUN; u += 2)
                                packed[u / 2] = positive_zero(pack_stored(y[u], y[u + 1]) ^ signs[u / 2]);
#endif
#if DTYPE != 3
                            if (wanted) {
#if ORDER == 64
                                *reinterpret_cast<uint2*>(target + first * ITEM) = make_uint2(packed[0], packed[1]);
#else
                                __stcs(reinterpret_cast<uint4*>(target + first * ITEM), make_uint4(packed[0], packed[1], packed[2], packed[3]));
#endif
                            }
#endif
                        }
                }
            }
        }
        const u32 good = reduced(sum, b.tokens * ROW_WORDS * 4, (u32)keys[0]);
        if (lane == 0) flags[index] = good != stored;
    }
}
#endif

#ifdef ENCODER
// -- encoding ----------------------------------------------------------------------------------------------------
// Angle of (x, y) in turns, -1/8 .. 7/8: a polynomial, good to 2e-8; negative angles are a turn too small.
INLINE float turns_of(float x, float y) {
    bool steep = fabsf(y) > fabsf(x);
    float top = steep ? -x : y, bottom = steep ? y : x;
    float s = __fdividef(top, fabsf(bottom) < 1e-37f ? 1e-37f : bottom);
    float z = s * s;
    float t = fmaf(-0.00074305835f, z, 0.00384616872f);
    t = fmaf(t, z, -0.00944856755f);
    t = fmaf(t, z, 0.0157660429f);
    t = fmaf(t, z, -0.0223080879f);
    t = fmaf(t, z, 0.0317820252f);
    t = fmaf(t, z, -0.0530494615f);
    t = fmaf(t, z, 0.159154927f);
    float base = (steep ? 0.25f : 0.0f) + (bottom < 0.0f ? 0.5f : 0.0f);
    return fmaf(t, s, base);
}

// Sector of n that an angle in turns lies in, as a float.
INLINE float sector_of(float turn, float n) {
    const float magic = 12582912.0f;
    float i = __fadd_rd(turn * n, magic) - magic;
    i = i < 0.0f ? i + n : i;
    return fminf(i, n - 1.0f);
}

// Place of b's share of the energy on a sin^2 grid.
INLINE u32 place_of(float a, float b, float grid) {
    float share = __fdividef(b, a + b + 1e-37f) * grid;
    return bits_of(__fadd_rd(fminf(share, grid - 1.0f), 8388608.0f)) & 0x7fffff;
}

struct Writer {  // a lane's run of bits, filled from its first bit on
    u32 words;  // address in shared memory
    u32 bit, held;
    INLINE void put(u32 value, int width) {
        u32 shift = bit & 31, at = bit >> 5;
        held |= value << shift;
        u32 over = __funnelshift_l(value, 0, shift);
        bit += width;
        const bool full = bit >> 5 != at;  // predicated by hand: as a branch it would cost the warp two synchronisations
        asm volatile("{.reg .pred p; setp.ne.u32 p, %0, 0; @p red.shared.or.b32 [%1], %2;}" ::
                     "r"((u32)full), "r"(words + 4 * at), "r"(held) : "memory");
        held = full ? over : held;
    }
    INLINE void flush() {
        if (bit & 31) asm volatile("red.shared.or.b32 [%0], %1;" :: "r"(words + 4 * (bit >> 5)), "r"(held) : "memory");
    }
};

template <int N> INLINE int node_code(const u8* tables, float a, float b, int width) {
    constexpr int place = ORDER == N ? 0 : ORDER == 2 * N ? 1 : ORDER == 4 * N ? 2 : ORDER == 8 * N ? 3 : ORDER == 16 * N ? 4 : 5;
    const u8* look_up = tables + LOOK_UPS_AT + (place * 8 + width) * 1024;
    if (N <= 16) return look_up[place_of(a, b, 1024.0f)];
    u32 where = place_of(a, b, 16384.0f);
    int code = look_up[where >> 4];
    return code + (reinterpret_cast<const u16*>(tables + BOUNDS_AT)[(place * 8 + width) * 130 + 1 + code] <= where);
}

template <int N> INLINE int node_shift(const u8* tables, int width, int code) {
    constexpr int place = ORDER == N ? 0 : ORDER == 2 * N ? 1 : ORDER == 4 * N ? 2 : ORDER == 8 * N ? 3 : ORDER == 16 * N ? 4 : 5;
    return reinterpret_cast<const signed char*>(tables + SHIFTS_AT)[place * 256 + (1 << width) + code];
}

template <int N> INLINE void encode_node(const u8* tables, Writer& out, float a, float b, int budget, int& left, int& right) {
    int width = width_of<N>(budget), code = node_code<N>(tables, a, b, width);
    out.put(code, width);
    int rest = budget - width;
    left = share_of<N / 2>(rest, node_shift<N>(tables, width, code));
    right = rest - left;
}

// A node above the lane's: ``first`` lanes write its angle.
template <int N> INLINE void encode_above(const u8* tables, Writer& out, float a, float b, int& budget, bool right, bool writes) {
    int width = width_of<N>(budget), code = node_code<N>(tables, a, b, width);
    if (writes) out.put(code, width); else out.bit += width;
    int rest = budget - width, share = share_of<N / 2>(rest, node_shift<N>(tables, width, code));
    budget = right ? rest - share : share;
    out.bit += right ? share : 0;
}

INLINE void encode_quad(const u8* tables, Writer& out, float p, float q, float r, float s, float a, float b, int budget) {
    u32 cell = (tables + CELLS_AT)[budget * 1024 + place_of(a, b, 1024.0f)];
    uint2 have = reinterpret_cast<const uint2*>(tables + BUDGETS_AT)[budget];  // codes a cell, first record
    float2 n = reinterpret_cast<const float2*>(tables + SECTORS_AT)[have.y + cell];
    float sectors = fmaf(sector_of(turns_of(p, q), n.x), n.y, sector_of(turns_of(r, s), n.y));
    out.put(cell * have.x + (u32)sectors, budget);
}

// Code of the radius sqrt(energy / ORDER) 2^-exponent (SPEC 6.1).
INLINE u32 radius_code(float energy, int exponent) {
    if (!(energy > 0.0f)) return 0;
    u32 bits = bits_of(energy);
    int power = (int)(bits >> 23) - 127 - LOG2_ORDER;
    float fraction = 0.5f * log2f(float_of((bits & 0x7fffff) | 0x3f800000)) + 0.5f * (power & 1);
    int code = ((power >> 1) - exponent + RADIUS_BIAS) * RADIUS_STEPS + (int)floorf(fraction * RADIUS_STEPS + 0.5f) + 1;
    return min(max(code, 1), (1 << RADIUS_BITS) - 1);
}

#define AT(i) p[(i) >> 4 & 1][(i) & 7][2 * set + ((i) >> 3 & 1)]

// A lane's 32-node.
INLINE void encode_quarter(const u8* tables, Writer& out, float (*p)[8][4], int set, int budget) {
    float a[8], b[8], eights[4];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        a[i] = fmaf(AT(4 * i), AT(4 * i), AT(4 * i + 1) * AT(4 * i + 1));
        b[i] = fmaf(AT(4 * i + 2), AT(4 * i + 2), AT(4 * i + 3) * AT(4 * i + 3));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) eights[i] = (a[2 * i] + b[2 * i]) + (a[2 * i + 1] + b[2 * i + 1]);
    int sixteens[2], pair[2], quads[2];
    encode_node<32>(tables, out, eights[0] + eights[1], eights[2] + eights[3], budget, sixteens[0], sixteens[1]);
#pragma unroll
    for (int m = 0; m < 2; m++) {
        encode_node<16>(tables, out, eights[2 * m], eights[2 * m + 1], sixteens[m], pair[0], pair[1]);
#pragma unroll
        for (int k = 2 * m; k < 2 * m + 2; k++) {
            encode_node<8>(tables, out, a[2 * k] + b[2 * k], a[2 * k + 1] + b[2 * k + 1], pair[k & 1], quads[0], quads[1]);
#pragma unroll
            for (int i = 2 * k; i < 2 * k + 2; i++)
                encode_quad(tables, out, AT(4 * i), AT(4 * i + 1), AT(4 * i + 2), AT(4 * i + 3), a[i], b[i], quads[i & 1]);
        }
    }
}

// Rows as float32: centred, NaN and Inf found, far magnitudes scaled; a float32 is the sum of three bfloat16, so the products
// with +-1 are exact.
INLINE void careful_rows(const u8* tables, const Block& b, i64 first_token, i64 start, i64 stride, int q, int g, int left,
                         u32 (*operand)[2], int& bad, int* exponent, float (*p)[8][4]) {
#pragma unroll 1
    for (int set = 0; set < 2; set++) {
        const bool have = 8 * set + g < left;
        const i64 token = first_token + 8 * set + g;
        float x[4][8];
        u32 most = 0;
#pragma unroll
        for (int piece = 0; piece < 4; piece++) {
            const i64 from = start + (token * stride + piece * 32 + q * 8) * ITEM;
#pragma unroll
            for (int u = 0; u < 8; u++) x[piece][u] = 0.0f;
            if (have) {
#if DTYPE == 3
                float4 low = *reinterpret_cast<const float4*>(from), high = *reinterpret_cast<const float4*>(from + 16);
                x[piece][0] = low.x, x[piece][1] = low.y, x[piece][2] = low.z, x[piece][3] = low.w;
                x[piece][4] = high.x, x[piece][5] = high.y, x[piece][6] = high.z, x[piece][7] = high.w;
#else
                uint4 got = *reinterpret_cast<const uint4*>(from);
                u32 pairs[4] = {got.x, got.y, got.z, got.w};
#pragma unroll
                for (int u = 0; u < 8; u++) {
#if DTYPE == 1
                    asm("{.reg .b16 h; cvt.u16.u32 h, %1; cvt.f32.f16 %0, h;}" : "=f"(x[piece][u]) : "r"(pairs[u / 2] >> 16 * (u & 1)));
#else
                    x[piece][u] = float_of(u & 1 ? pairs[u / 2] & 0xffff0000u : pairs[u / 2] << 16);
#endif
                }
#endif
            }
#pragma unroll
            for (int u = 0; u < 8; u++) most = max(most, bits_of(x[piece][u]) & 0x7fffffffu);
        }
        most = max(most, __shfl_xor_sync(ALL, most, 1));
        most = max(most, __shfl_xor_sync(ALL, most, 2));
        const bool wrong = most >= 0x7f800000u;
        bad += wrong && q == 0;
#if OFFSETS
        most = 0;
        if (have && !wrong)
#pragma unroll
            for (int piece = 0; piece < 4; piece++) {
                float o[8];
                offset_run<8>(tables, b, token, piece * 32 + q * 8, o);
#pragma unroll
                for (int u = 0; u < 8; u++) {
                    x[piece][u] = fminf(fmaxf(x[piece][u] - o[u], -LARGEST_32), LARGEST_32);
                    most = max(most, bits_of(x[piece][u]) & 0x7fffffffu);
                }
            }
        most = max(most, __shfl_xor_sync(ALL, most, 1));
        most = max(most, __shfl_xor_sync(ALL, most, 2));
#endif
        int power = (int)(most >> 23) - 127;
        power = wrong || abs(power) <= FAR_POWER ? 0 : -min(max(power, -126), 126);
        exponent[set] = power;
        const float scale = wrong ? 0.0f : float_of((u32)(power + 127) << 23);
#pragma unroll
        for (int piece = 0; piece < 4; piece++)
#pragma unroll
            for (int u = 0; u < 8; u++) {
                u32 sign = reinterpret_cast<const u32*>(tables + SIGNS_32_AT)[piece * 32 + q * 8 + u];
                x[piece][u] = wrong ? 0.0f : float_of(bits_of(x[piece][u] * scale) ^ sign);
            }
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int term = 0; term < 3; term++) {
                u32 a0 = __byte_perm(bits_of(x[0][t]), bits_of(x[1][t]), 0x7632);
                u32 a2 = __byte_perm(bits_of(x[2][t]), bits_of(x[3][t]), 0x7632);
#pragma unroll
                for (int v = 0; v < 2; v++)
                    if (set) mma_brain(p[v][t], 0, a0, 0, a2, operand[v][0], operand[v][1]);
                    else mma_brain(p[v][t], a0, 0, a2, 0, operand[v][0], operand[v][1]);
#pragma unroll
                for (int piece = 0; piece < 4; piece++) x[piece][t] -= float_of(bits_of(x[piece][t]) & 0xffff0000u);
            }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) encode_blocks(
    const i64* rows, const i64* firsts, const i64* starts, int* flags, const i64* keys, const uint4* blob,
    i64 blocks, int search) {
    extern __shared__ uint4 memory[];
    for (int i = threadIdx.x; i < BLOB_BYTES / 16; i += THREADS) memory[i] = blob[i];
    __syncthreads();
    const u8* tables = reinterpret_cast<const u8*>(memory);
    const int lane = threadIdx.x & 31, q = lane & 3, g = lane >> 2;
    u32* stage = reinterpret_cast<u32*>(const_cast<u8*>(tables) + BLOB_BYTES) + (threadIdx.x >> 5) * STAGE_WORDS;
    const u32 qo = lane >> 3, e = lane >> 2 & 1;
    u32 operand[2][2], brain[2][2];
#pragma unroll
    for (u32 variant = 0; variant < 2; variant++)
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            u32 signs[2];
#pragma unroll
            for (u32 odd = 0; odd < 2; odd++)  // inputs 4, 3 | 6 | 5; outputs 6, 5 | 3, variant 4
                signs[odd] = parity(((u32)q << 3 | h << 6 | odd << 5) & (qo << 5 | e << 3 | variant << 4));
            operand[variant][h] = mma_signs(signs[0], signs[1]);
            brain[variant][h] = 0x3f803f80u ^ signs[0] << 15 ^ signs[1] << 31;
        }

    for (i64 index = (i64)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5); index < blocks; index += (i64)gridDim.x * (THREADS / 32)) {
        Block b = find_block(rows, firsts, search, index);
        u32* payload = reinterpret_cast<u32*>(b.address);
        const i64 begin = b.span[EXACT] + b.chunk * CHUNK;
        const i64 start = starts[b.span[STARTS] + b.lead], stride = b.span[STRIDE];
        u64 sum = 0;
        int bad = 0;
        for (int row0 = 0; row0 < b.tokens; row0 += 16) {
            for (int i = lane; i < STAGE_WORDS; i += 32) stage[i] = 0;
            float p[2][8][4];
            int exponent[2] = {0, 0};
            bool careful = DTYPE == 3 || OFFSETS;
            float energy[2];  // of the lane's quarter
            while (true) {
#pragma unroll
                for (int v = 0; v < 2; v++)
#pragma unroll
                    for (int t = 0; t < 8; t++) p[v][t][0] = p[v][t][1] = p[v][t][2] = p[v][t][3] = 0.0f;
#if DTYPE != 3 && !OFFSETS
                if (!careful) {
                    u32 x[2][4][4];  // set, piece, pairs of elements
#pragma unroll
                    for (int set = 0; set < 2; set++)
#pragma unroll
                        for (int piece = 0; piece < 4; piece++) {
                            int row = min(row0 + 8 * set + g, b.tokens - 1);
                            const uint4* from = reinterpret_cast<const uint4*>(start + ((begin + row) * stride + piece * 32 + q * 8) * ITEM);
                            uint4 got = __ldcs(from);
                            uint4 sign = reinterpret_cast<const uint4*>(tables + SIGNS_AT)[piece * 4 + q];
                            x[set][piece][0] = got.x ^ sign.x, x[set][piece][1] = got.y ^ sign.y;
                            x[set][piece][2] = got.z ^ sign.z, x[set][piece][3] = got.w ^ sign.w;
                        }
#pragma unroll
                    for (int t = 0; t < 8; t++) {
                        const u32 pick = t & 1 ? 0x7632 : 0x5410;
                        u32 a0 = __byte_perm(x[0][0][t / 2], x[0][1][t / 2], pick), a2 = __byte_perm(x[0][2][t / 2], x[0][3][t / 2], pick);
                        u32 a1 = __byte_perm(x[1][0][t / 2], x[1][1][t / 2], pick), a3 = __byte_perm(x[1][2][t / 2], x[1][3][t / 2], pick);
#pragma unroll
                        for (int v = 0; v < 2; v++)
#if DTYPE == 1
                            mma_half(p[v][t], a0, a1, a2, a3, operand[v][0], operand[v][1]);
#else
                            mma_brain(p[v][t], a0, a1, a2, a3, operand[v][0], operand[v][1]);
#endif
                    }
                } else
#endif
                    careful_rows(tables, b, begin + row0, start, stride, q, g, b.tokens - row0, brain, bad, exponent, p);
                hadamard<8>(p[0]);
                hadamard<8>(p[1]);
                bool sane = true;
#pragma unroll
                for (int set = 0; set < 2; set++) {
                    energy[set] = 0.0f;
#pragma unroll
                    for (int i = 0; i < 32; i += 8) {  // as the tree adds them
                        float quads[2];
#pragma unroll
                        for (int j = 0; j < 2; j++)
                            quads[j] = fmaf(AT(i + 4 * j), AT(i + 4 * j), AT(i + 4 * j + 1) * AT(i + 4 * j + 1)) +
                                       fmaf(AT(i + 4 * j + 2), AT(i + 4 * j + 2), AT(i + 4 * j + 3) * AT(i + 4 * j + 3));
                        energy[set] += quads[0] + quads[1];
                    }
                    sane &= energy[set] > 1e-22f && energy[set] < 1e30f;
                }
                if (careful || __all_sync(ALL, sane)) break;
                careful = true;
            }

            const int have = min(b.tokens - row0, 16);
            __syncwarp();
#pragma unroll
            for (int set = 0; set < 2; set++) {
                const float other = __shfl_xor_sync(ALL, energy[set], 1);
                const float pair = energy[set] + other;
                const float far = __shfl_xor_sync(ALL, pair, 2);
                const float whole = pair + far;
                if (8 * set + g < have) {
                    Writer out = {(u32)__cvta_generic_to_shared(stage + (8 * set + g) * ROW_WORDS), RADIUS_BITS, 0};
                    int budget = ROOT_BUDGET;
                    if (q == 0) {
                        out.bit = 0;
                        out.put(radius_code(whole, exponent[set]), RADIUS_BITS);
                    }
                    encode_above<ORDER>(tables, out, q & 2 ? far : pair, q & 2 ? pair : far, budget, q & 2, q == 0);
                    encode_above<ORDER / 2>(tables, out, q & 1 ? other : energy[set], q & 1 ? energy[set] : other, budget, q & 1, !(q & 1));
                    encode_quarter(tables, out, p, set, budget);
                    out.flush();
                }
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < (16 * ROW_WORDS + 31) / 32; i++) {
                int at = i * 32 + lane;
                if (at < have * ROW_WORDS) {
                    u32 word = stage[at];
                    sum += folded((u64)word * (u32)keys[1 + row0 * ROW_WORDS + at]);
                    __stcs(payload + row0 * ROW_WORDS + at, word);
                }
            }
            __syncwarp();
        }
        const u32 total = reduced(sum, b.tokens * ROW_WORDS * 4, (u32)keys[0]);
        if (lane == 0) payload[b.tokens * ROW_WORDS] = total;
        if (bad) atomicAdd(flags + b.span[FLAGS], bad);
    }
}
#endif
