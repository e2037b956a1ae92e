// Law: the CUDA kernel that sums up the sampled tokens of leads, of which Triton's ``find_means`` makes means (kernels/job.py).
//
// A thread block sums one part of the tokens of TOGETHER leads of a span, whose vectors turn back by the same turns. A thread has
// eight channels of each SLOTS-th token: four, and the four that they turn with under RoPE. Vectors with NaN or Inf count as
// zeros: where a thread block met one, it begins anew, and looks at each vector whole before it is added.
//
// Needs HEAD_DIM (a multiple of 8), COLUMNS (of a part's sums), DTYPE (FLOAT16, BFLOAT16 or FLOAT32), ITEM, PAIRS (a multiple
// of 4), INTERLEAVED, THREADS, TOGETHER, STAGES (vectors of a lead that a thread has on their way, and one more), MEAN_TOKENS
// (of a lead, at the most), PARTS, PART_TOKENS (of a part), FIELDS and the places of a span's numbers (CODED, EXACT ..., as
// SpanRow in spans.py names them), and with PAIRS the tables FREQUENCIES (of each) and PHASES (cos and sin of 256 coarse turns,
// then of fine ones), where ``blob`` has them.

#include "spans.cuh"
#include "stored_numbers.cuh"
#include "turns.cuh"

#define UNITS (HEAD_DIM / 8)     // of a vector, each a thread's
#define SLOTS (THREADS / UNITS)  // vectors at once, of each lead
#define TURNED_UNITS (PAIRS / 4)
#define WORDS ITEM               // of four channels
#define ROW (THREADS + 4)        // numbers from one row to the next of what threads leave for each other; it begins in other banks

#if DTYPE == BFLOAT16
// A number over STRETCH, as float64 has it: a float32's bits stand three further down there, and exponents 896 lower.
#define STRETCH 0x1p896
INLINE double wide_value_of(const u32* stored, int i) {
    const int bits = i & 1 ? stored[i / 2] : stored[i / 2] << 16;
    return __hiloint2double(bits >> 3 & 0x8fffe000, 0);
}
#else
#define STRETCH 1.0
INLINE double wide_value_of(const u32* stored, int i) { return value_of(stored, i); }
#endif

// What a thread block has in shared memory.
struct Shared {
    float2 phases[512];  // coarse turns, then fine ones
    union {
        uint2 stages[STAGES][TOGETHER * WORDS][THREADS];  // vectors on their way
        double sums[8 * ROW];                             // then, of one lead: of a thread's channels, a row each
    };
    int wrong[TOGETHER * SLOTS];
};

// A thread's part in a thread block's work.
struct Reader {
    i64 rows[TOGETHER];  // addresses of each lead's first channel of the thread's, of token 0
    i64 stride;          // bytes from one token to the next
    i64 exact, step;     // of samples: the first token, and how far the next one is
    int slot, apart;     // apart: bytes from the first four channels to the others
    bool turns;
    u32 position, frequencies[4];

    // The turns of a token, of the four pairs, times STRETCH.
    INLINE void turns_at(const Shared& shared, i64 token, double* cos, double* sin) const {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            cos[i] = STRETCH, sin[i] = 0.0;
#if PAIRS
            if (!turns) continue;
            const u32 phase = ((u32)token + position) * frequencies[i];
            const Turn turn = {shared.phases[phase >> 24], shared.phases[256 + (phase >> 16 & 255)]};
            cos[i] = turn.cos() * STRETCH, sin[i] = turn.sin() * STRETCH;
#endif
        }
    }

    // The thread's vector of those from sample ``first`` on, and whether it is before ``end``.
    INLINE i64 token_of(int first) const { return exact + (first + slot) * step; }
    INLINE bool is_there(int first, int end) const { return slot < SLOTS && first + slot < end; }

    // Sends for it of all leads, if it is there, into a stage.
    INLINE void send_for(Shared& shared, int stage, int first, int end) const {
        if (is_there(first, end)) {
            const u32 to = (u32)__cvta_generic_to_shared(shared.stages[stage][0] + threadIdx.x);
            const i64 token = token_of(first) * stride;
#pragma unroll
            for (int i = 0; i < TOGETHER * WORDS; i++) {
                const i64 from = rows[i / WORDS] + token + (i % WORDS >= WORDS / 2 ? apart : 0) + i % (WORDS / 2) * 8;
                asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to + i * (THREADS * 8)), "l"(from) : "memory");
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }

    // Adds the vectors of samples from ``sample`` to ``end`` to ``sums``, a thread's channels; returns whether one of them held
    // NaN or Inf, where these are not looked for first (CAREFUL, by all threads).
    template <bool CAREFUL> INLINE bool add(Shared& shared, int sample, int end, double (*sums)[8]) const {
        bool wrong = false;
#pragma unroll
        for (int i = 0; i < STAGES - 1; i++) send_for(shared, i, sample + i * SLOTS, end);
        int stage = 0;
#pragma unroll 1
        for (int first = sample; first < end; first += SLOTS, stage = (stage + 1) % STAGES) {
            const bool there = is_there(first, end);
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2) : "memory");
            u32 stored[TOGETHER][2 * WORDS];  // a thread reads what it sent for itself
#pragma unroll
            for (int i = 0; i < TOGETHER * WORDS; i++) {
                const uint2 two = shared.stages[stage][i][threadIdx.x];
                stored[i / WORDS][i % WORDS * 2] = two.x, stored[i / WORDS][i % WORDS * 2 + 1] = two.y;
            }
            send_for(shared, (stage + STAGES - 1) % STAGES, first + (STAGES - 1) * SLOTS, end);
            if (!CAREFUL && !there) break;
            const i64 token = token_of(first);
            if (CAREFUL) {
                __syncthreads();
                for (int i = threadIdx.x; i < TOGETHER * SLOTS; i += THREADS) shared.wrong[i] = 0;
                __syncthreads();
#pragma unroll
                for (int lead = 0; lead < TOGETHER; lead++)
                    if (there && holds_wrong<2 * WORDS>(stored[lead])) shared.wrong[lead * SLOTS + slot] = 1;
                __syncthreads();
                if (!there) continue;
            }
            double cos[4], sin[4];
            turns_at(shared, token, cos, sin);
#pragma unroll
            for (int lead = 0; lead < TOGETHER; lead++) {
                wrong = wrong || holds_wrong<2 * WORDS>(stored[lead]);
                if (CAREFUL && shared.wrong[lead * SLOTS + slot]) continue;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int one = INTERLEAVED ? 2 * i : i, two = INTERLEAVED ? 2 * i + 1 : 4 + i;  // of eight
                    const double x = wide_value_of(stored[lead], one), y = wide_value_of(stored[lead], two);
                    sums[lead][one] = fma(x, cos[i], fma(y, sin[i], sums[lead][one]));
                    sums[lead][two] = fma(y, cos[i], fma(-x, sin[i], sums[lead][two]));
                }
            }
        }
        return wrong;
    }
};

// ``spans``, ``firsts``, ``starts`` and ``search`` as find_block takes them, of leads; ``sums`` [leads, PARTS, COLUMNS]: a thread
// block for each TOGETHER leads, and each part.
extern "C" __global__ void __launch_bounds__(THREADS)
    sum_tokens(const i64* __restrict__ spans, const i64* __restrict__ firsts, const i64* __restrict__ starts,
               double* __restrict__ sums, const u8* __restrict__ blob, int search) {
    __shared__ Shared shared;
    const u32 index = blockIdx.x / PARTS * TOGETHER, part = blockIdx.x % PARTS;
    const int which = span_of(firsts, search, index);
    const i64* span = spans + which * FIELDS;
    const i64 coded = __ldg(span + CODED), step = max((coded + MEAN_TOKENS - 1) / MEAN_TOKENS, 1ll);
    const int count = (int)((coded + step - 1) / step);
    const i64* of_leads = starts + __ldg(span + STARTS) + (index - __ldg(firsts + which));

    const int unit = threadIdx.x % UNITS, others = unit - TURNED_UNITS;
    Reader reader;
    reader.slot = threadIdx.x / UNITS;
    reader.exact = __ldg(span + EXACT), reader.step = step;
    reader.stride = __ldg(span + STRIDE) * ITEM, reader.position = (u32)__ldg(span + POSITION);
    reader.turns = others < 0;
    const bool apart = reader.turns && !INTERLEAVED;  // channels that turn together are
    const int one = apart ? 4 * unit : 8 * unit, two = one + (apart ? PAIRS : 4);
    reader.apart = (two - one) * ITEM;
#pragma unroll
    for (int lead = 0; lead < TOGETHER; lead++) reader.rows[lead] = __ldg(of_leads + lead) + one * ITEM;
#if PAIRS
#pragma unroll
    for (int i = 0; i < 4; i++)
        reader.frequencies[i] = __ldg(reinterpret_cast<const u32*>(blob + FREQUENCIES_AT) + (reader.turns ? 4 * unit + i : 0));
    for (int i = threadIdx.x; i < 512; i += THREADS)
        shared.phases[i] = __ldg(reinterpret_cast<const float2*>(blob + PHASES_AT) + i);
    __syncthreads();
#endif

    const int first = part * PART_TOKENS, end = min(count, first + PART_TOKENS);
    double own[TOGETHER][8] = {};
    if (__syncthreads_or(reader.add<false>(shared, first, end, own))) {
#pragma unroll
        for (int i = 0; i < 8 * TOGETHER; i++) own[i / 8][i % 8] = 0.0;
        reader.add<true>(shared, first, end, own);
    }
#pragma unroll
    for (int lead = 0; lead < TOGETHER; lead++) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; i++) shared.sums[i * ROW + threadIdx.x] = own[lead][i];
        __syncthreads();
        double* to = sums + ((i64)(index + lead) * PARTS + part) * COLUMNS;
        for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
            const int its_unit = i % UNITS, channel = i / UNITS;  // of the unit's eight
            double sum = 0.0;
#pragma unroll
            for (int slot = 0; slot < SLOTS; slot++) sum += shared.sums[channel * ROW + slot * UNITS + its_unit];
            const bool its_apart = its_unit < TURNED_UNITS && !INTERLEAVED;
            to[its_apart ? 4 * its_unit + channel % 4 + channel / 4 * PAIRS : 8 * its_unit + channel] = sum;
        }
    }
}
