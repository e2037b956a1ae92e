// Law: a warp on a CPU: 32 threads, which meet wherever lanes give each other numbers.
//
// It stands for halves.cuh, and for numbers.cuh within it, where a kernel whose thread blocks are single warps is compiled as C++
// (test_pair_scores.py). What it reads is within bounds and where it must begin, or the process ends.

#include <algorithm>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

typedef unsigned int u32;
typedef long long i64;
typedef unsigned short u16;

#define INLINE static inline
#define __global__
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define BIAS 127
#define MANTISSA_BITS 23
#define MAGNITUDE 0x7fffffffu
#define HALF_INFINITY 0x7c00u

using std::max;
using std::min;
struct float2 {
    float x, y;
};
struct uint4 {
    u32 x, y, z, w;
};
INLINE uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

// -- numbers --------------------------------------------------------------------------------------------------------
INLINE u32 bits_of(float x) { return std::bit_cast<u32>(x); }
INLINE float float_of(u32 bits) { return std::bit_cast<float>(bits); }
INLINE float power_of_two(int exponent) { return float_of((u32)(exponent + BIAS) << MANTISSA_BITS); }
INLINE u32 half_bits(double x) { return std::bit_cast<u16>((_Float16)x); }
INLINE float half_value(u32 bits) { return (float)std::bit_cast<_Float16>((u16)bits); }
INLINE u32 pack_halves(double even, double odd) { return half_bits(even) | half_bits(odd) << 16; }
#define __cosf cosf
#define __sinf sinf

INLINE u32 __dp4a(u32 a, u32 b, u32 sum) {
    for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
    return sum;
}

INLINE u32 __funnelshift_r(u32 low, u32 high, u32 bits) { return (u32)(((unsigned long long)high << 32 | low) >> (bits & 31)); }

INLINE double second(u32 packed) { return half_value(packed >> 16); }

INLINE u32 multiply_add(u32 a, u32 b, u32 c) {
    return pack_halves((double)half_value(a) * half_value(b) + half_value(c), second(a) * second(b) + second(c));
}

template <bool SECOND> INLINE u32 times_one(u32 packed, u32 factors) {
    const double factor = SECOND ? second(factors) : half_value(factors);
    return pack_halves(half_value(packed) * factor, second(packed) * factor);
}

// -- memory ---------------------------------------------------------------------------------------------------------
struct Bounds {
    i64 first, last;
};
static std::vector<Bounds> readable;  // addresses

template <class T> INLINE T __ldg(const T* from) {
    const i64 at = (i64)from;
    const auto within = [at](const Bounds& each) { return each.first <= at && at + (i64)sizeof(T) <= each.last; };
    if (at % sizeof(T) || !std::any_of(readable.begin(), readable.end(), within)) {
        fprintf(stderr, "%d bytes are read at %lld\n", (int)sizeof(T), at);
        abort();
    }
    return *from;
}

INLINE void __stcs(float* to, float x) { *to = x; }

alignas(1024) static char shared_memory;  // addresses in shared memory count from here
INLINE u32 __cvta_generic_to_shared(const void* at) { return (u32)((const char*)at - &shared_memory); }
INLINE const void* __cvta_shared_to_generic(u32 at) { return &shared_memory + (int)at; }

// -- lanes ----------------------------------------------------------------------------------------------------------
static struct {
    int x;
} blockIdx;
static thread_local struct {
    int x;
} threadIdx;
static u32 given[32][6];  // by each lane
static std::barrier meeting(32);

INLINE void __syncwarp() { meeting.arrive_and_wait(); }

// What a lane makes of the numbers that all of them give.
template <class Made> INLINE auto made_of(std::initializer_list<u32> numbers, const Made& made) {
    std::copy(numbers.begin(), numbers.end(), given[threadIdx.x]);
    __syncwarp();
    const auto found = made();
    __syncwarp();
    return found;
}

INLINE u32 __reduce_max_sync(u32, u32 x) {
    return made_of({x}, [] {
        u32 most = 0;
        for (const auto& lane : given) most = max(most, lane[0]);
        return most;
    });
}

INLINE float __shfl_sync(u32, float x, int from) {
    return made_of({bits_of(x)}, [from] { return float_of(given[from & 31][0]); });
}

INLINE void multiply(float* sums, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const int g = threadIdx.x >> 2, t = threadIdx.x & 3;
    const auto half = [](u32 packed, int i) { return i & 1 ? second(packed) : half_value(packed); };
    const auto product = [&](int i) {  // of a row and a column
        const int row = 4 * g, column = 4 * (2 * t + (i & 1));
        double sum = 0;
        for (int k = 0; k < 16; k++) {
            const int quarter = (k & 7) / 2, later = k >> 3;
            sum += half(given[row + quarter][(i >> 1) + 2 * later], k) * half(given[column + quarter][4 + later], k);
        }
        return (float)(sums[i] + sum);
    };
    const auto found = made_of({a0, a1, a2, a3, b0, b1}, [&] {
        return std::vector<float>{product(0), product(1), product(2), product(3)};
    });
    std::copy(found.begin(), found.end(), sums);
}

// Runs thread blocks one after another: a function of a lane.
template <class Lane> INLINE void run_blocks(int blocks, const Lane& lane) {
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        std::vector<std::thread> threads;
        for (int i = 0; i < 32; i++)
            threads.emplace_back([&, i] {
                threadIdx.x = i;
                lane();
            });
        for (auto& thread : threads) thread.join();
    }
}
