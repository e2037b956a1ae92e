// Law: a GPU on a CPU, for kernels that were translated from PTX to C++ (ptx_machine.py): one thread block at a time.
//
// Each thread is a fiber, and goes on until it meets others: lanes of its warp, threads at a barrier, or what it waits for.
// What is asynchronous comes as late as it may: words that cp.async sends for when they are waited for, rows that the bulk
// copy engine stores when they are waited for, and its copies into shared memory some turns later. Reads and writes are within
// bounds and where they must begin, and lanes that meet do the same, or the launch ends with a message. Registers hold bits:
// u32 for float32, too. What it does not know: that wgmma's sums are there only when they are waited for, and which memory
// fences a GPU needs.

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <vector>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
#define ON static inline

// -- the machine ----------------------------------------------------------------------------------------------------
constexpr u32 SHARED = 1024;  // the first address of shared memory
constexpr int LANES = 32, MOST = 24;  // numbers that a lane gives others at once
constexpr size_t STACK = 1 << 18;     // bytes of a thread, which has all registers there

struct Range {
    u64 first, last;
    u64 writable;
};

struct Copy {
    u32 shared;
    u64 global;
    u32 bytes, zeros;  // read, and put behind them
};

struct Groups {  // of copies of a thread
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> closed;
};

struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int number = 0;
    bool over = false;
    Groups loads, stores;
};

struct Warp {
    u32 given[2][LANES][MOST];
    u64 meetings = 0;
    int arrived = 0, lanes = 0;
    const char* what = nullptr;
};

struct Barrier {
    u64 meetings = 0;
    u32 arrived = 0, yes = 0, answer[2];
};

struct Transactions {  // an mbarrier
    u32 count, pending, phase = 0;
    s64 bytes = 0;
};

struct Arrival {
    Copy copy;
    u32 barrier;
};

static struct {
    std::vector<Range> ranges;
    std::vector<u8> shared;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Barrier barriers[16];
    std::map<u32, Transactions> transactions;
    std::vector<Arrival> arriving;
    u32 block, blocks, random;
    Thread* me;
    ucontext_t scheduler;
    char message[400];
} gpu;

ON void yield() { swapcontext(&gpu.me->context, &gpu.scheduler); }

[[noreturn]] ON void fail(const char* format, ...) {
    va_list told;
    va_start(told, format);
    if (!gpu.message[0]) {
        const int thread = gpu.me ? gpu.me->number : -1;
        const int used = snprintf(gpu.message, sizeof gpu.message, "block %u, thread %d: ", gpu.block, thread);
        vsnprintf(gpu.message + used, sizeof gpu.message - used, format, told);
    }
    va_end(told);
    while (true) yield();
}

ON u32 random_number() { return gpu.random = gpu.random * 1664525u + 1013904223u, gpu.random >> 8; }

// -- memory ---------------------------------------------------------------------------------------------------------
ON u8* global_bytes(u64 at, u32 bytes, u32 align, bool write) {
    if (at % align) fail("%u bytes of global memory at %llx, which is no multiple of %u", bytes, (unsigned long long)at, align);
    for (const Range& each : gpu.ranges)
        if (each.first <= at && at + bytes <= each.last && (each.writable || !write)) return (u8*)at;
    fail("%s %u bytes of global memory at %llx", write ? "writes" : "reads", bytes, (unsigned long long)at);
}

ON u8* shared_bytes(u64 at, u32 bytes, u32 align) {
    if (at % align) fail("%u bytes of shared memory at %llu, which is no multiple of %u", bytes, (unsigned long long)at, align);
    if (at < SHARED || at + bytes > SHARED + gpu.shared.size()) fail("%u bytes of shared memory at %lld", bytes, (long long)at);
    return gpu.shared.data() + (at - SHARED);
}

ON u64 cvta_shared_u64(u64 at) { return (u64)gpu.shared.data() + (at - SHARED); }
ON u8* bytes_anywhere(u64 at, u32 bytes, u32 align, bool write) {  // of an address that may be of either memory
    const u64 shared = at - (u64)gpu.shared.data() + SHARED;
    const bool within = shared >= SHARED && shared < SHARED + gpu.shared.size();
    return within ? shared_bytes(shared, bytes, align) : global_bytes(at, bytes, align, write);
}

template <class T, int N> ON void load(const u8* from, T* found) { memcpy(found, from, sizeof(T) * N); }
template <class T, int N> ON void load_global(u64 at, T* found) {
    load<T, N>(global_bytes(at, sizeof(T) * N, sizeof(T) * N, false), found);
}
template <class T, int N> ON void load_shared(u64 at, T* found) {
    load<T, N>(shared_bytes(at, sizeof(T) * N, sizeof(T) * N), found);
}
template <class T, int N> ON void store_global(u64 at, const T* given) {
    memcpy(global_bytes(at, sizeof(T) * N, sizeof(T) * N, true), given, sizeof(T) * N);
}
template <class T, int N> ON void load_anywhere(u64 at, T* found) {
    load<T, N>(bytes_anywhere(at, sizeof(T) * N, sizeof(T) * N, false), found);
}
template <class T, int N> ON void store_anywhere(u64 at, const T* given) {
    memcpy(bytes_anywhere(at, sizeof(T) * N, sizeof(T) * N, true), given, sizeof(T) * N);
}
template <class T, int N> ON void load_local(u64 at, T* found) { load<T, N>((const u8*)at, found); }
template <class T, int N> ON void store_local(u64 at, const T* given) { memcpy((u8*)at, given, sizeof(T) * N); }
template <class T, int N> ON void store_shared(u64 at, const T* given) {
    memcpy(shared_bytes(at, sizeof(T) * N, sizeof(T) * N), given, sizeof(T) * N);
}
ON u32 atom_global_add_u32(u64 at, u32 more) {
    u32 before, *to = (u32*)global_bytes(at, 4, 4, true);
    before = *to, *to += more;
    return before;
}
ON void red_shared_or_b32(u64 at, u32 bits) {
    u32 now;
    load_shared<u32, 1>(at, &now);
    now |= bits;
    store_shared<u32, 1>(at, &now);
}

ON void bring(const Copy& copy) {
    u8* to = shared_bytes(copy.shared, copy.bytes + copy.zeros, 4);
    memcpy(to, (const u8*)copy.global, copy.bytes);
    memset(to + copy.bytes, 0, copy.zeros);
}
ON void take(const Copy& copy) { memcpy((u8*)copy.global, shared_bytes(copy.shared, copy.bytes, 16), copy.bytes); }
template <class Do> ON void finish(Groups& groups, size_t left, const Do& how) {
    for (; groups.closed.size() > left; groups.closed.pop_front())
        for (const Copy& copy : groups.closed.front()) how(copy);
}
ON void close(Groups& groups) { groups.closed.push_back(std::move(groups.open)), groups.open.clear(); }

ON void cp_async(u64 to, u64 from, u32 bytes, u32 read) {
    shared_bytes(to, bytes, bytes);
    if (read) global_bytes(from, read, bytes, false);
    gpu.me->loads.open.push_back({(u32)to, from, read, bytes - read});
}
ON void cp_async_ca_shared_global(u64 to, u64 from, u32 bytes, u32 read) { cp_async(to, from, bytes, read); }
ON void cp_async_ca_shared_global(u64 to, u64 from, u32 bytes) { cp_async(to, from, bytes, bytes); }
ON void cp_async_cg_shared_global(u64 to, u64 from, u32 bytes) { cp_async(to, from, bytes, bytes); }
ON void cp_async_commit_group() { close(gpu.me->loads); }
ON void cp_async_wait_group(u32 left) { finish(gpu.me->loads, left, bring); }
ON void cp_async_wait_all() { close(gpu.me->loads), cp_async_wait_group(0); }
ON void cp_async_bulk_commit_group() { close(gpu.me->stores); }
ON void cp_async_bulk_wait_group_read(u32 left) { finish(gpu.me->stores, left, take); }
ON void cp_async_bulk_global_shared_cta_bulk_group(u64 to, u64 from, u32 bytes) {
    if (bytes % 16) fail("a bulk copy of %u bytes", bytes);
    shared_bytes(from, bytes, 16), global_bytes(to, bytes, 16, true);
    gpu.me->stores.open.push_back({(u32)from, to, bytes, 0});
}
ON void cp_async_bulk_global_shared_cta_bulk_group_L2_cache_hint(u64 to, u64 from, u32 bytes, u64) {
    cp_async_bulk_global_shared_cta_bulk_group(to, from, bytes);
}

// -- mbarriers ------------------------------------------------------------------------------------------------------
ON Transactions& barrier_at(u32 at) {
    const auto found = gpu.transactions.find(at);
    if (found == gpu.transactions.end()) fail("no barrier is at %u", at);
    return found->second;
}
ON void settle(Transactions& barrier) {
    if (barrier.pending == 0 && barrier.bytes == 0) barrier.phase++, barrier.pending = barrier.count;
}
ON void mbarrier_init_shared_cta_b64(u32 at, u32 count) {
    shared_bytes(at, 8, 8);
    gpu.transactions[at] = {count, count};
}
ON void arrive(u32 at, u32 bytes) {
    Transactions& barrier = barrier_at(at);
    if (!barrier.pending) fail("one too many arrives at the barrier at %u", at);
    barrier.bytes += bytes, barrier.pending--;
    settle(barrier);
}
ON bool is_complete(u32 at, u32 parity) {
    const bool complete = (barrier_at(at).phase & 1) != parity;
    if (!complete) yield();
    return complete;
}
ON void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(u64 to, u64 from, u32 bytes, u32 barrier) {
    if (bytes % 16) fail("a bulk copy of %u bytes", bytes);
    shared_bytes(to, bytes, 16);
    for (u64 at = from; at < from + bytes; at += 16) {  // what shares 16 bytes with a range can be read
        const auto meets = [at](const Range& each) { return each.first < at + 16 && at < each.last; };
        if (at % 16 || !std::any_of(gpu.ranges.begin(), gpu.ranges.end(), meets))
            fail("a bulk copy reads 16 bytes at %llx", (unsigned long long)at);
    }
    gpu.arriving.push_back({{(u32)to, from, bytes, 0}, barrier});
}

// -- meetings -------------------------------------------------------------------------------------------------------
ON int lane() { return gpu.me->number % LANES; }
ON Warp& warp() { return gpu.warps[gpu.me->number / LANES]; }

typedef const u32 (*Given)[MOST];
ON Given meet(const char* what, const u32* given, int count) {  // what all lanes gave, until the meeting after the next
    Warp& own = warp();
    const u64 meeting = own.meetings;
    if (own.arrived && own.what != what) fail("%s, where another lane of the warp is at %s", what, own.what);
    own.what = what;
    std::copy(given, given + count, own.given[meeting & 1][lane()]);
    if (++own.arrived == own.lanes) own.arrived = 0, own.meetings++;
    while (own.meetings == meeting) yield();
    return own.given[meeting & 1];
}

ON void bar_warp_sync(u32) { meet("bar.warp.sync", nullptr, 0); }
ON u32 vote_ballot(const char* what, bool yes) {
    const u32 given[] = {yes};
    const Given all = meet(what, given, 1);
    u32 found = 0;
    for (int i = 0; i < LANES; i++)
        if (i < warp().lanes) found |= all[i][0] << i;
    return found;
}
ON u32 vote_sync_ballot_b32(bool yes, u32) { return vote_ballot("vote.ballot", yes); }
ON bool vote_sync_any_pred(bool yes, u32) { return vote_ballot("vote.any", yes); }
ON bool vote_sync_all_pred(bool yes, u32) { return vote_ballot("vote.all", yes) == ~0u >> (LANES - warp().lanes); }
template <class Source> ON u32 shuffled(const char* what, u32 x, const Source& source) {
    const Given all = meet(what, &x, 1);
    return all[source() & 31][0];
}
ON u32 shfl_sync_bfly_b32(u32 x, u32 by, u32, u32) { return shuffled("shfl.bfly", x, [=] { return lane() ^ by; }); }
ON u32 shfl_sync_idx_b32(u32 x, u32 from, u32, u32) { return shuffled("shfl.idx", x, [=] { return from; }); }
template <class Both> ON u32 reduced(const char* what, u32 x, const Both& both) {
    const Given all = meet(what, &x, 1);
    u32 found = all[0][0];
    for (int i = 1; i < LANES; i++) found = both(found, all[i][0]);
    return found;
}
ON u32 redux_sync_add_u32(u32 x, u32) { return reduced("redux.add", x, [](u32 a, u32 b) { return a + b; }); }
ON u32 redux_sync_add_s32(u32 x, u32) { return redux_sync_add_u32(x, 0); }
ON u32 redux_sync_max_u32(u32 x, u32) { return reduced("redux.max", x, [](u32 a, u32 b) { return std::max(a, b); }); }

ON u32 meet_at(u32 number, u32 threads, bool yes) {  // how many of them say yes
    Barrier& barrier = gpu.barriers[number];
    const u64 meeting = barrier.meetings;
    barrier.yes += yes;
    if (++barrier.arrived == threads) {
        barrier.answer[meeting & 1] = barrier.yes, barrier.arrived = barrier.yes = 0, barrier.meetings++;
    }
    while (barrier.meetings == meeting) yield();
    return barrier.answer[meeting & 1];
}
ON void bar_sync(u32 number, u32 threads) { meet_at(number, threads, false); }
ON void bar_sync(u32 number) { meet_at(number, gpu.threads.size(), false); }
ON bool bar_red_or_pred(u32 number, bool yes) { return meet_at(number, gpu.threads.size(), yes); }
ON u32 bar_red_popc_u32(u32 number, u32 threads, bool yes) { return meet_at(number, threads, yes); }

// -- matrices -------------------------------------------------------------------------------------------------------
ON float f(u32 bits) { return std::bit_cast<float>(bits); }
ON u32 bits(float x) { return std::bit_cast<u32>(x); }
struct Bytes {
    typedef s32 Sum;
    static constexpr int OF_WORD = 4;
    static s32 of(u32 word, int i) { return (s8)(word >> 8 * i); }
    static s32 sum(u32 bits) { return (s32)bits; }
    static u32 bits_of(s32 x) { return x; }
};
struct Halves {
    typedef double Sum;
    static constexpr int OF_WORD = 2;
    static double of(u32 word, int i) { return (double)std::bit_cast<_Float16>((u16)(word >> 16 * i)); }
    static double sum(u32 bits) { return f(bits); }
    static u32 bits_of(double x) { return bits((float)x); }
};
struct Brains : Halves {
    static double of(u32 word, int i) { return f(word >> 16 * i << 16); }
};

// Row ``row`` of a (registers ``a`` of all lanes, words 4 apart in k), times column: ``b`` gives its words.
template <class Kind, class B> ON u32 product(Given a, int row, int words, u32 add, const B& b) {
    typename Kind::Sum sum = Kind::sum(add);
    for (int word = 0; word < words; word++) {  // four lanes have words of a row, then the second register of each
        const u32 own = a[4 * (row % 8) + word % 4][row / 8 + 2 * (word / 4)], other = b(word);
        for (int i = 0; i < Kind::OF_WORD; i++) sum += Kind::of(own, i) * Kind::of(other, i);
    }
    return Kind::bits_of(sum);
}

// mma m16n8: ``words`` of 32 bits in k, 8 or 4.
template <class Kind, int WORDS> ON void mma(const char* what, u32* d, const u32* a, const u32* b, const u32* c) {
    constexpr int A = WORDS / 2, B = WORDS / 4;
    u32 given[A + B];
    std::copy(a, a + A, given), std::copy(b, b + B, given + A);
    const Given all = meet(what, given, A + B);
    u32 found[4];
    for (int i = 0; i < 4; i++) {
        const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
        found[i] = product<Kind>(all, row, WORDS, c[i], [&](int word) { return all[4 * column + word % 4][A + word / 4]; });
    }
    std::copy(found, found + 4, d);
}

// wgmma m64n(8 STRIPS), of which a warp has 16 rows: a in registers, b in shared memory, without swizzle.
template <class Kind, int STRIPS> ON void wgmma(const char* what, u32* d, const u32* a, u64 descriptor, bool add) {
    const Given all = meet(what, a, 4);
    const auto field = [=](int bit) { return (u32)(descriptor >> bit & 0x3fff) * 16; };
    const u32 first = field(0), next_k = field(16), next_strip = field(32);
    for (int i = 0; i < 4 * STRIPS; i++) {
        const int row = lane() / 4 + i / 2 % 2 * 8, column = lane() % 4 * 2 + i % 2;
        const u8* brick = shared_bytes(first + i / 4 * next_strip + column * 16, 16, 16);
        const u8* next = shared_bytes(first + i / 4 * next_strip + next_k + column * 16, 16, 16);
        d[i] = product<Kind>(all, row, 8, add ? d[i] : 0, [&](int word) {
            u32 found;
            memcpy(&found, (word < 4 ? brick : next) + word % 4 * 4, 4);
            return found;
        });
    }
}

// The same with sums of float16, two in a word.
ON u32 packed(const u32* sums) { return std::bit_cast<u16>((_Float16)f(sums[0])) | std::bit_cast<u16>((_Float16)f(sums[1])) << 16; }
ON void unpacked(u32 word, u32* sums) {
    for (int i = 0; i < 2; i++) sums[i] = bits((float)std::bit_cast<_Float16>((u16)(word >> 16 * i)));
}
template <int WORDS> ON void mma_halves(const char* what, u32* d, const u32* a, const u32* b, const u32* c) {
    u32 sums[4];
    for (int i = 0; i < 2; i++) unpacked(c[i], sums + 2 * i);
    mma<Halves, WORDS>(what, sums, a, b, sums);
    for (int i = 0; i < 2; i++) d[i] = packed(sums + 2 * i);
}
template <int STRIPS> ON void wgmma_halves(const char* what, u32* d, const u32* a, u64 descriptor, bool add) {
    u32 sums[4 * STRIPS];
    for (int i = 0; i < 2 * STRIPS; i++) unpacked(d[i], sums + 2 * i);
    wgmma<Halves, STRIPS>(what, sums, a, descriptor, add);
    for (int i = 0; i < 2 * STRIPS; i++) d[i] = packed(sums + 2 * i);
}

template <int N, bool TURNED> ON void ldmatrix(u32* found, u32 address) {
    const Given all = meet("ldmatrix", &address, 1);
    for (int i = 0; i < N; i++) {
        const u32* rows = &all[8 * i][0];
        if (TURNED) {  // a number each of two rows
            u16 two[2];
            for (int k = 0; k < 2; k++)
                memcpy(two + k, shared_bytes(rows[(lane() % 4 * 2 + k) * MOST], 16, 16) + lane() / 4 * 2, 2);
            found[i] = two[0] | two[1] << 16;
        } else {
            memcpy(found + i, shared_bytes(rows[lane() / 4 * MOST], 16, 16) + lane() % 4 * 4, 4);
        }
    }
}
template <int N> ON void stmatrix_trans(u32 address, const u32* words) {
    const Given all = meet("stmatrix", &address, 1);
    for (int i = 0; i < N; i++)
        for (int k = 0; k < 2; k++) {
            const u16 one = words[i] >> 16 * k;
            memcpy(shared_bytes(all[8 * i + lane() % 4 * 2 + k][0], 16, 16) + lane() / 4 * 2, &one, 2);
        }
}
ON u32 movmatrix_sync_m8n8_trans_b16(u32 word) {
    const Given all = meet("movmatrix", &word, 1);
    u32 found = 0;
    for (int k = 0; k < 2; k++) {
        const u32 both = all[4 * (lane() % 4 * 2 + k) + lane() / 8][0];
        found |= (both >> lane() / 4 % 2 * 16 & 0xffff) << 16 * k;
    }
    return found;
}

// -- arithmetic -----------------------------------------------------------------------------------------------------
#define FLOATS(name, args, value) \
    ON u32 name args { return bits(value); }
FLOATS(add_rn_f32, (u32 a, u32 b), f(a) + f(b))
FLOATS(sub_rn_f32, (u32 a, u32 b), f(a) - f(b))
FLOATS(mul_rn_f32, (u32 a, u32 b), f(a) * f(b))
FLOATS(div_rn_f32, (u32 a, u32 b), f(a) / f(b))
FLOATS(sqrt_rn_f32, (u32 a), std::sqrt(f(a)))
FLOATS(fma_rn_f32, (u32 a, u32 b, u32 c), std::fmaf(f(a), f(b), f(c)))
FLOATS(abs_f32, (u32 a), std::fabs(f(a)))
ON u32 neg_f32(u32 a) { return a ^ 0x80000000u; }
ON double d(u64 bits) { return std::bit_cast<double>(bits); }
ON u64 bits(double x) { return std::bit_cast<u64>(x); }
ON u64 add_rn_f64(u64 a, u64 b) { return bits(d(a) + d(b)); }
ON u64 mul_rn_f64(u64 a, u64 b) { return bits(d(a) * d(b)); }
ON u64 fma_rn_f64(u64 a, u64 b, u64 c) { return bits(std::fma(d(a), d(b), d(c))); }
ON u64 neg_f64(u64 a) { return a ^ 1ull << 63; }
ON u64 cvt_f64_f32(u32 a) { return bits((double)f(a)); }
ON float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
FLOATS(mul_rn_ftz_f32, (u32 a, u32 b), flushed(flushed(f(a)) * flushed(f(b))))
FLOATS(mul_rm_f32, (u32 a, u32 b), [](double exact) {
    const float nearest = (float)exact;
    return nearest > exact ? std::nextafterf(nearest, -INFINITY) : nearest;
}((double)f(a) * f(b)))
FLOATS(max_f32, (u32 a, u32 b), std::fmax(f(a), f(b)))
FLOATS(min_f32, (u32 a, u32 b), std::fmin(f(a), f(b)))
FLOATS(rcp_approx_ftz_f32, (u32 a), flushed(1.0f / flushed(f(a))))
FLOATS(ex2_approx_ftz_f32, (u32 a), flushed(std::exp2(flushed(f(a)))))
FLOATS(sin_approx_f32, (u32 a), std::sin(f(a)))
FLOATS(cos_approx_f32, (u32 a), std::cos(f(a)))
FLOATS(lg2_approx_ftz_f32, (u32 a), std::log2(flushed(f(a))))
FLOATS(sqrt_approx_ftz_f32, (u32 a), std::sqrt(flushed(f(a))))
FLOATS(cvt_sat_f32_f32, (u32 a), f(a) > 0 ? std::min(f(a), 1.0f) : 0.0f)
FLOATS(cvt_rn_f32_s32, (u32 a), (float)(s32)a)
FLOATS(cvt_rn_f32_u32, (u32 a), (float)a)
FLOATS(cvt_rn_f32_s16, (u16 a), (float)(s16)a)
FLOATS(cvt_rn_f32_u16, (u16 a), (float)a)
FLOATS(cvt_f32_f16, (u16 a), (float)std::bit_cast<_Float16>(a))
ON u32 half(float x) { return std::bit_cast<u16>((_Float16)x); }
ON u32 brain(float x) {
    const u32 a = bits(x);
    return x != x ? 0x7fff : (a + 0x7fff + (a >> 16 & 1)) >> 16;
}
ON u16 cvt_rn_f16_f32(u32 a) { return half(f(a)); }
ON u32 cvt_rn_f16x2_f32(u32 high, u32 low) { return half(f(high)) << 16 | half(f(low)); }
ON u32 cvt_rn_bf16x2_f32(u32 high, u32 low) { return brain(f(high)) << 16 | brain(f(low)); }
ON u32 fma_rn_bf16x2(u32 a, u32 b, u32 c) {
    const auto one = [&](int by) { return brain((float)((double)f(a >> by << 16) * f(b >> by << 16) + f(c >> by << 16))); };
    return one(0) | one(16) << 16;
}
ON u32 neg_bf16x2(u32 a) { return a ^ 0x80008000u; }
ON u32 neg_f16x2(u32 a) { return a ^ 0x80008000u; }
ON double half_of(u32 packed, int by) { return (double)std::bit_cast<_Float16>((u16)(packed >> by)); }
ON u32 fma_rn_f16x2(u32 a, u32 b, u32 c) {
    const auto one = [&](int by) { return (u32)std::bit_cast<u16>((_Float16)(half_of(a, by) * half_of(b, by) + half_of(c, by))); };
    return one(0) | one(16) << 16;
}
ON u32 fma_rn_sat_f16x2(u32 a, u32 b, u32 c) {
    const u32 found = fma_rn_f16x2(a, b, c);
    const auto one = [&](int by) {
        return (u32)std::bit_cast<u16>((_Float16)(half_of(found, by) > 0 ? std::min(half_of(found, by), 1.0) : 0.0));
    };
    return one(0) | one(16) << 16;
}
ON u32 add_rn_f16x2(u32 a, u32 b) { return fma_rn_f16x2(a, 0x3c003c00u, b); }
ON u32 abs_f16x2(u32 a) { return a & 0x7fff7fffu; }
ON u32 mul_rn_f16x2(u32 a, u32 b) { return fma_rn_f16x2(a, b, 0x80008000u); }
ON u32 to_whole(double x) { return x != x ? 0 : (u32)(s32)std::min(std::max(x, -2147483648.0), 2147483647.0); }
ON u32 cvt_rmi_s32_f32(u32 a) { return to_whole(std::floor(f(a))); }
ON u32 cvt_rni_s32_f32(u32 a) { return to_whole(std::nearbyint(f(a))); }
ON u32 cvt_rzi_s32_f32(u32 a) { return to_whole(std::trunc(f(a))); }

ON u32 mul_hi_u32(u32 a, u32 b) { return (u64)a * b >> 32; }
ON u32 mul_hi_s32(u32 a, u32 b) { return (s64)(s32)a * (s32)b >> 32; }
ON u64 mul_hi_u64(u64 a, u64 b) { return (unsigned __int128)a * b >> 64; }
ON u64 mul_hi_s64(u64 a, u64 b) { return (__int128)(s64)a * (s64)b >> 64; }
ON u16 mul_hi_u16(u16 a, u16 b) { return (u32)a * b >> 16; }
ON u16 mul_hi_s16(u16 a, u16 b) { return (s16)a * (s16)b >> 16; }
ON u64 mul_wide_u32(u32 a, u32 b) { return (u64)a * b; }
ON u64 mul_wide_s32(u32 a, u32 b) { return (s64)(s32)a * (s32)b; }
ON u32 mul_wide_u16(u16 a, u16 b) { return (u32)a * b; }
ON u32 mul_wide_s16(u16 a, u16 b) { return (s32)(s16)a * (s16)b; }
ON u32 mad_lo_s32(u32 a, u32 b, u32 c) { return a * b + c; }
ON u64 mad_wide_u32(u32 a, u32 b, u64 c) { return (u64)a * b + c; }
ON u64 mad_wide_s32(u32 a, u32 b, u64 c) { return (s64)(s32)a * (s32)b + c; }
ON u32 popc_b32(u32 a) { return std::popcount(a); }
ON u32 clz_b32(u32 a) { return std::countl_zero(a); }
ON u32 brev_b32(u32 a) {
    u32 found = 0;
    for (int i = 0; i < 32; i++) found |= (a >> i & 1) << (31 - i);
    return found;
}
ON u32 bfind_shiftamt_u32(u32 a) { return a ? std::countl_zero(a) : ~0u; }
ON u32 bfind_u32(u32 a) { return a ? 31 - std::countl_zero(a) : ~0u; }
template <class T> ON T with_field(T from, T into, u32 at, u32 count) {
    constexpr u32 BITS = 8 * sizeof(T);
    at &= 255, count &= 255;
    if (at >= BITS || !count) return into;
    const T mask = (count >= BITS ? ~(T)0 : ((T)1 << count) - 1) << at;
    return (into & ~mask) | (from << at & mask);
}
ON u32 bfi_b32(u32 from, u32 into, u32 at, u32 count) { return with_field(from, into, at, count); }
ON u64 bfi_b64(u64 from, u64 into, u32 at, u32 count) { return with_field(from, into, at, count); }
ON u32 bfe_u32(u32 a, u32 at, u32 count) {
    at &= 255, count &= 255;
    return at > 31 ? 0 : a >> at & (count > 31 ? ~0u : (1u << count) - 1);
}
ON u32 shl_b32(u32 a, u32 by) { return by > 31 ? 0 : a << by; }
ON u64 shl_b64(u64 a, u32 by) { return by > 63 ? 0 : a << by; }
ON u16 shl_b16(u16 a, u32 by) { return by > 15 ? 0 : a << by; }
ON u32 shr_u32(u32 a, u32 by) { return by > 31 ? 0 : a >> by; }
ON u32 shr_b32(u32 a, u32 by) { return shr_u32(a, by); }
ON u64 shr_u64(u64 a, u32 by) { return by > 63 ? 0 : a >> by; }
ON u16 shr_u16(u16 a, u32 by) { return by > 15 ? 0 : a >> by; }
ON u32 shr_s32(u32 a, u32 by) { return (s32)a >> std::min(by, 31u); }
ON u64 shr_s64(u64 a, u32 by) { return (s64)a >> std::min(by, 63u); }
ON u16 shr_s16(u16 a, u32 by) { return (s16)a >> std::min(by, 15u); }
ON u32 shf_r_wrap_b32(u32 low, u32 high, u32 by) { return ((u64)high << 32 | low) >> (by & 31); }
ON u32 shf_l_wrap_b32(u32 low, u32 high, u32 by) { return (((u64)high << 32 | low) << (by & 31)) >> 32; }
ON u32 prmt_b32(u32 a, u32 b, u32 choice) {
    const u64 both = (u64)b << 32 | a;
    u32 found = 0;
    for (int i = 0; i < 4; i++) {
        const u32 which = choice >> 4 * i & 15, byte = both >> 8 * (which & 7) & 255;
        found |= (which & 8 ? (byte & 128 ? 255u : 0u) : byte) << 8 * i;
    }
    return found;
}
template <class A, class B> ON u32 dot_4(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 4; i++) c += (u32)((s32)(A)(a >> 8 * i) * (s32)(B)(b >> 8 * i));
    return c;
}
template <class A, class B, int HIGH> ON u32 dot_2(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 2; i++) c += (u32)((s32)(A)(a >> 16 * i) * (s32)(B)(b >> 8 * (i + 2 * HIGH)));
    return c;
}
ON u32 dp4a_s32_u32(u32 a, u32 b, u32 c) { return dot_4<s8, u8>(a, b, c); }
ON u32 dp4a_u32_u32(u32 a, u32 b, u32 c) { return dot_4<u8, u8>(a, b, c); }
ON u32 dp4a_u32_s32(u32 a, u32 b, u32 c) { return dot_4<u8, s8>(a, b, c); }
ON u32 dp4a_s32_s32(u32 a, u32 b, u32 c) { return dot_4<s8, s8>(a, b, c); }
ON u32 dp2a_lo_u32_u32(u32 a, u32 b, u32 c) { return dot_2<u16, u8, 0>(a, b, c); }
ON u32 dp2a_hi_u32_u32(u32 a, u32 b, u32 c) { return dot_2<u16, u8, 1>(a, b, c); }
ON u32 dp2a_lo_u32_s32(u32 a, u32 b, u32 c) { return dot_2<u16, s8, 0>(a, b, c); }
ON u32 dp2a_hi_u32_s32(u32 a, u32 b, u32 c) { return dot_2<u16, s8, 1>(a, b, c); }
template <class Both> ON u32 two_of_16(u32 a, u32 b, const Both& both) {
    return both((u16)a, (u16)b) | (u32)both((u16)(a >> 16), (u16)(b >> 16)) << 16;
}
ON u32 max_u16x2(u32 a, u32 b) { return two_of_16(a, b, [](u16 x, u16 y) { return std::max(x, y); }); }
ON u32 min_u16x2(u32 a, u32 b) { return two_of_16(a, b, [](u16 x, u16 y) { return std::min(x, y); }); }

// -- launches -------------------------------------------------------------------------------------------------------
typedef void (*Kernel)();
static Kernel kernel_of_launch;

static void run_thread() {
    kernel_of_launch();
    Thread& me = *gpu.me;
    close(me.stores), finish(me.stores, 0, take);
    me.over = true;
    Warp& own = warp();
    if (own.arrived) fail("the thread ends, where another lane of the warp is at %s", own.what);
    own.lanes--;
    while (true) yield();
}

// Runs thread blocks one after another; returns a message, which is empty if all went well. Threads take turns in an order that
// ``seed`` tells.
static const char* launch(Kernel kernel, u32 blocks, u32 threads, u32 shared, const Range* ranges, u32 count, u32 seed) {
    kernel_of_launch = kernel, gpu.message[0] = 0, gpu.random = seed, gpu.blocks = blocks;
    gpu.ranges.assign(ranges, ranges + count);
    std::vector<Thread> all(threads);
    gpu.threads.swap(all);
    for (u32 i = 0; i < threads; i++) gpu.threads[i].stack.reset(new char[STACK]), gpu.threads[i].number = i;
    std::vector<u32> order(threads);
    for (u32 i = 0; i < threads; i++) order[i] = i;
    for (gpu.block = 0; gpu.block < blocks && !gpu.message[0]; gpu.block++) {
        gpu.shared.assign(shared, 0xa5);  // so that nothing depends on zeros
        gpu.warps.assign((threads + LANES - 1) / LANES, Warp());
        for (u32 i = 0; i < threads; i++) gpu.warps[i / LANES].lanes++;
        std::fill(std::begin(gpu.barriers), std::end(gpu.barriers), Barrier());
        gpu.transactions.clear(), gpu.arriving.clear();
        for (Thread& each : gpu.threads) {
            each.over = false, each.loads = each.stores = Groups();
            getcontext(&each.context);
            each.context.uc_stack.ss_sp = each.stack.get(), each.context.uc_stack.ss_size = STACK;
            each.context.uc_link = nullptr;
            makecontext(&each.context, run_thread, 0);
        }
        for (u64 turn = 0, left = threads; left && !gpu.message[0]; turn++) {
            if (turn > 20000000) snprintf(gpu.message, sizeof gpu.message, "block %u: threads wait for ever", gpu.block);
            const u32 first = turn % 8 ? 0 : random_number() % (threads / LANES + 1) * LANES;
            left = 0;
            for (u32 i = 0; i < threads && !gpu.message[0]; i++) {
                gpu.me = &gpu.threads[(i + first) % threads];
                if (gpu.me->over) continue;
                swapcontext(&gpu.scheduler, &gpu.me->context);
                left += !gpu.me->over;
            }
            gpu.me = nullptr;
            for (size_t i = 0; i < gpu.arriving.size() && !gpu.message[0];) {
                if (random_number() % 4) {
                    i++;
                    continue;
                }
                const Arrival arrival = gpu.arriving[i];
                gpu.arriving.erase(gpu.arriving.begin() + i);
                bring(arrival.copy);
                Transactions& barrier = gpu.transactions[arrival.barrier];
                barrier.bytes -= arrival.copy.bytes;
                settle(barrier);
            }
        }
        if (!gpu.message[0] && !gpu.arriving.empty()) snprintf(gpu.message, sizeof gpu.message, "copies are not waited for");
    }
    return gpu.message;
}
