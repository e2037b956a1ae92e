// Law: the CUDA kernel that decodes quads (SPEC 8) by teams: four warps, which wgmma multiplies for at once, share a block.
//
// A team takes STEP rows of its block at a time, sixteen a warp, as quads_rows.cuh says. Their words come by the bulk copy
// engine into one of SLOTS slots, while steps before are decoded: as one stretch, where a block is one step, else as three
// (signs, indices, and radii with what lies behind them). As they are copied from multiples of 16 bytes on, a stretch begins up
// to 12 bytes behind its place in the slot. With BULK decoded rows leave by the engine, too, from whole lines of shared memory:
// what begins elsewhere it stores in more pieces, for which the way to the L2 cache has no room.
//
// A last warp, the courier, does the rest for all teams, one lane a team: it sends for the tables; finds the blocks, several of
// each team at once, each by one lane; sends for their words as soon as a slot is free; and says from the sums of words that a
// team leaves whether a block is good. Of the PARTS thread blocks that decode the same rows, each sums up every PARTS-th block.
//
// Keys that turn run by run (SPEC 9.5) have turners besides, warps behind the courier that turn means to the steps ahead.
//
// Large orders need more registers than four warps leave each other of a quarter of a multiprocessor's. There the courier is one
// of four warps, of which the others have nothing to do, and these leave most of their registers to the teams.
//
// Needs AHEAD (blocks of a team that are looked for at once), the sizes of shared memory (BLOB_BYTES, and TEAM_BYTES of each
// team: SLOTS slots of SLOT_BYTES, in which indices and radii have stretches from INDICES_AT and RADII_AT on; then two
// barriers of each slot from BARRIERS_AT on, and one more; the sums of four warps' words of each slot from SUMS_AT on, where
// PLACES blocks lie from PLACES_AT on, and with BULK each warp's decoded rows from ROWS_AT on; with OFFSETS one more barrier
// of each slot from SENT_AT on, and SLOTS + 1 runs of RUN_BYTES from RUNS_AT on), COURIERS (warps behind the teams; with
// OFFSETS a turner for each two teams; four where registers change hands, so that a thread has TEAM_REGISTERS or
// COURIER_REGISTERS), CLAIMED (rounds of blocks from which on some are claimed; 0 if none are, as with PARTS), and what the other
// files need. OFFSETS needs IN_RUNS and RUN_PRODUCTS.

#define INDICES_BEHIND 0
#define EVEN 0  // as words begin at any
#define EVICTED_FIRST
#include "barriers.cuh"
#include "checksum.cuh"
#include "quads_radii.cuh"
#include "quads_rows.cuh"
#include "warpgroups.cuh"

#define TEAM 128                                  // threads
#define TEAMS ((THREADS - 32 * COURIERS) / TEAM)  // behind which the courier comes
#define STEP 64                                   // rows
#define ONE_BY_ONE 8                              // rounds before the last, from which on blocks are claimed one by one
#define TURNERS (TEAMS / 2)                       // where there are offsets: warps behind the courier, of two teams each
#define STRETCHES (CHUNK <= STEP ? 1 : 3)         // of a step's words

// -- words ----------------------------------------------------------------------------------------------------------
// A stretch of a step's words: where it begins in its block, and how many there are, in bytes.
struct Stretch {
    int first, bytes;
};

// Bytes of a block before its signs, indices or radii.
INLINE int bytes_before(const Block& block, int which) {
    return block.tokens * (which == 0 ? 0 : which == 1 ? ORDER / 8 : ORDER / 8 + INDEX_BYTES);
}

// The step's stretch, from row ``first_row`` of the block on; the last one goes on to the block's end.
INLINE Stretch stretch_of(const Block& block, int first_row, int which) {
    if (STRETCHES == 1) return {0, block_bytes(block.tokens)};
    const int row_bytes = which == 0 ? ORDER / 8 : which == 1 ? INDEX_BYTES : 1;
    const int first = bytes_before(block, which) + first_row * row_bytes;
    const bool rest = which == 2 && first_row + STEP >= block.tokens;
    return {first, rest ? block_bytes(block.tokens) - first : min(block.tokens - first_row, STEP) * row_bytes};
}

// Where stretches have their places in a slot, and how many bytes there are for each.
constexpr __device__ int place_of_stretch(int which) {
    return which == STRETCHES ? SLOT_BYTES : which == 0 ? 0 : which == 1 ? INDICES_AT : RADII_AT;
}

// How far behind its place a stretch begins.
INLINE int skew_of(const Block& block, const Stretch& stretch) {
    return (u32)reinterpret_cast<i64>(block.payload) + stretch.first & 15;
}

// Sends for the words of the step from ``first_row`` on; ``barrier`` counts them. By one thread; addresses of shared memory.
INLINE void send_for_step(const Block& block, int first_row, u32 slot, u32 barrier) {
    u32 bytes[STRETCHES], all = 0;
    i64 from[STRETCHES];
#pragma unroll
    for (int which = 0; which < STRETCHES; which++) {
        const Stretch stretch = stretch_of(block, first_row, which);
        const int skew = skew_of(block, stretch);
        from[which] = reinterpret_cast<i64>(block.payload) + (stretch.first - skew);
        bytes[which] = (skew + stretch.bytes + 15) / 16 * 16, all += bytes[which];
    }
    expect_bytes(barrier, all);
#pragma unroll
    for (int which = 0; which < STRETCHES; which++)
        send_for_bytes(slot + place_of_stretch(which), from[which], bytes[which], barrier);
}

// A step's words in a slot.
struct Step {
    Stretch stretches[STRETCHES];
    const u32* words[STRETCHES];
    Words coded;
    const u8* radii;

    INLINE Step(const Block& block, int first_row, const u8* slot) {
#pragma unroll
        for (int which = 0; which < STRETCHES; which++) {
            stretches[which] = stretch_of(block, first_row, which);
            words[which] = reinterpret_cast<const u32*>(slot + place_of_stretch(which) + skew_of(block, stretches[which]));
        }
        coded = {words[0], STRETCHES == 1 ? words[0] + bytes_before(block, 1) / 4 : words[STRETCHES / 2]};
        radii = reinterpret_cast<const u8*>(words[STRETCHES - 1]) + (STRETCHES == 1 ? bytes_before(block, 2) : 0);
    }

    // Adds a stretch's words to the checksum's sum: those of number ``thread``, ``thread`` + 128 ... before ``count``. SURE: there
    // are so many at the least, ROOM at the most.
    template <int SURE, int ROOM>
    INLINE void sum_stretch(const u8* tables, const i64* __restrict__ keys, int which, int count, int thread, int block_words,
                        WordSum<true>& sum) const {
#pragma unroll
        for (int i = 0; i < ROOM; i += TEAM)
            if (i + TEAM <= SURE || i + thread < count)
                sum.add(words[which][i + thread],
                        key_of(tables, keys, block_words, stretches[which].first / 4 + i + thread));
    }

    // The sum of a thread's words. ALL: the step has STEP rows, or is a whole block of CHUNK. ``last``: the block's checksum is
    // the last word.
    template <bool ALL>
    INLINE u64 sum_up(const u8* tables, const i64* __restrict__ keys, int block_words, int thread, bool last) const {
        constexpr int ROOM = (place_of_stretch(1) - place_of_stretch(0)) / 4, WHOLE = block_bytes(CHUNK) / 4 - 1;
        WordSum<true> sum;
        if (STRETCHES == 1) {
            sum_stretch<ALL ? WHOLE : 0, ALL ? WHOLE : ROOM>(tables, keys, 0, block_words, thread, block_words, sum);
        } else {
            constexpr int SIGNS = STEP * ORDER / 32, INDICES = STEP * INDEX_BYTES / 4;
            sum_stretch<ALL ? SIGNS : 0, SIGNS>(tables, keys, 0, stretches[0].bytes / 4, thread, block_words, sum);
            const int indices = stretches[STRETCHES / 2].bytes / 4, rest = stretches[STRETCHES - 1].bytes / 4 - last;
            sum_stretch<ALL ? INDICES : 0, INDICES>(tables, keys, STRETCHES / 2, indices, thread, block_words, sum);
            sum_stretch<0, TEAM>(tables, keys, STRETCHES - 1, rest, thread ^ 96, block_words, sum);
        }
        return sum.folded();
    }

    INLINE u64 sum(const u8* tables, const i64* __restrict__ keys, const Block& block, int first_row, int thread,
                   bool last) const {
        const int words = block_bytes(block.tokens) / 4 - 1;
        if (STRETCHES == 1 ? block.tokens == CHUNK : first_row + STEP <= block.tokens)
            return sum_up<true>(tables, keys, words, thread, last);
        return sum_up<false>(tables, keys, words, thread, last);
    }

    INLINE u32 last_word() const { return words[STRETCHES - 1][stretches[STRETCHES - 1].bytes / 4 - 1]; }
};

// -- teams ----------------------------------------------------------------------------------------------------------
// Where a block lies, and its number among all; one without tokens stands behind a team's last.
struct Place {
    Block block;
    u32 index;
};
static_assert(sizeof(Place) <= UPCOMING_BYTES);

// What a team has in shared memory, and which blocks are its own: neighbouring teams take neighbouring blocks, round by round;
// but in a last round that is not for all teams, blocks are dealt to thread blocks in turn. With CLAIMED rounds only half of them
// are dealt: of the blocks behind these a team claims some when it has used its own, for not all multiprocessors are as quick.
struct Team {
    u8* shelf;
    u32 address;  // of the shelf
    u32 team, thread_block, thread_blocks, all, whole, blocks;  // of those PARTS that decode the same rows, one counts
    u32 dealt;    // rounds

    INLINE Team(u8* tables, int team, i64 blocks)
        : shelf(tables + BLOB_BYTES + team * TEAM_BYTES), address((u32)__cvta_generic_to_shared(shelf)), team(team),
          thread_block(blockIdx.x / PARTS), thread_blocks(gridDim.x / PARTS), all(thread_blocks * TEAMS),
          whole((u32)blocks / all), blocks((u32)blocks),
          dealt(CLAIMED && whole >= CLAIMED ? whole / 2 / AHEAD * AHEAD : ~0u) {}
    INLINE u32 block(u32 round) const {
        return round * all + (round < whole ? thread_block * TEAMS + team : team * thread_blocks + thread_block);
    }
    // Whether this thread block finds the checksum of the round's block.
    INLINE bool sums_up(u32 round) const { return PARTS == 1 || (round + team) % PARTS == blockIdx.x % PARTS; }
    INLINE Place& place(u32 round) const {
        return *reinterpret_cast<Place*>(shelf + PLACES_AT + round % PLACES * UPCOMING_BYTES);
    }
    INLINE u32 slot(u32 turn) const { return address + turn * SLOT_BYTES; }
    INLINE u32 full(u32 turn) const { return address + BARRIERS_AT + turn * 16; }
    INLINE u32 free(u32 turn) const { return full(turn) + 8; }
    INLINE u8* run(u32 turn) const { return shelf + RUNS_AT + turn * RUN_BYTES; }
    INLINE u32 sent(u32 turn) const { return address + SENT_AT + turn * 8; }  // that a step is sent for, for turners
    INLINE u32 tables() const { return full(SLOTS); }  // the first team's barrier: that tables have come
    INLINE u64* sums(u32 turn) const { return reinterpret_cast<u64*>(shelf + SUMS_AT) + turn * 4; }
};

// A step of a team's: the round of its block, its first row, its slot, how often that slot was used before, and where its run
// is: a warp may read a run when its step's slot is already free, so there is one place more than there are slots.
struct Cursor {
    u32 round = 0, turn = 0, parity = 0, run = 0;
    int first_row = 0;

    INLINE bool is_last(const Block& block) const { return STRETCHES == 1 || first_row + STEP >= block.tokens; }
    INLINE void next(bool last) {
        if (STRETCHES > 1) first_row = last ? 0 : first_row + STEP;
        if (last) round++;
        if (++turn == SLOTS) turn = 0, parity ^= 1;
        if (run++ == SLOTS) run = 0;
    }
};

// What the courier does for the teams.
struct Courier {
    const int lane;
    const Team team;  // the lane's; lanes of no team have nothing to do
    const bool works;
    Cursor sent, done;
    u32 found = 0, steps = 0;  // rounds whose places are known; steps that are sent for and not done
    u32 claimed = 0;           // blocks behind those that are dealt, by all teams, when the team last claimed some
    bool ended = false;        // the team's last block is sent for
    u64 sum = 0;               // of the words of the block's steps that are done

    INLINE Courier(u8* tables, i64 blocks)
        : lane(threadIdx.x & 31), team(tables, lane < TEAMS ? lane : 0, blocks), works(lane < TEAMS) {}

    INLINE void prepare() {
        for (int turn = 0; works && turn < SLOTS; turn++) {
            prepare_barrier(team.full(turn), 1 + OFFSETS);
            prepare_barrier(team.free(turn), TEAM / 32);
            if (OFFSETS) prepare_barrier(team.sent(turn), 1);
        }
        if (lane == 0) prepare_barrier(team.tables(), 1);
        barriers_are_prepared();
    }

    // Sends for the tables: what lies before the matrix, and the thread block's part of that.
    INLINE void send_for_tables(u8* tables, const uint4* blob) const {
        if (lane) return;
        const u32 to = (u32)__cvta_generic_to_shared(tables);
        const i64 from = reinterpret_cast<i64>(blob);
        expect_bytes(team.tables(), MATRIX_AT + PART_BYTES);
        send_for_bytes(to, from, MATRIX_AT, team.tables());
        send_for_bytes(to + MATRIX_AT, from + MATRIX_AT + blockIdx.x % PARTS * PART_BYTES, PART_BYTES, team.tables());
    }

    INLINE bool has_more() const { return works && (steps || !ended); }

    // Finds the next places of teams that have used theirs, each by one lane. They take the room of those at which no warp
    // looks any more: of the last blocks that were sent for SLOTS may wait, and warps may still store rows of the one before.
    INLINE void find(u8* tables, const i64* spans, const i64* firsts, const i64* starts, int search, u32* claims) {
        static_assert(TEAMS * AHEAD <= 32 && SLOTS + 1 + AHEAD <= PLACES, "a lane for each, and room for those in use");
        const bool needs = works && !ended && sent.round == found;
        const u32 needed = __ballot_sync(ALL_LANES, needs);
        if (!needed) return;
        const int which = min(lane / AHEAD, TEAMS - 1);
        const Team its(tables, which, team.blocks);
        const u32 round = __shfl_sync(ALL_LANES, found, which) + lane % AHEAD;
        u32 index = its.block(round), many = AHEAD;
#if CLAIMED
        if (needs && found >= team.dealt) {
            if (team.all * (team.dealt + ONE_BY_ONE) + claimed > team.blocks) many = 1;
            claimed = atomicAdd(claims, many);
        }
        const u32 first = __shfl_sync(ALL_LANES, claimed, which);
        if (round >= its.dealt) index = its.all * its.dealt + first + lane % AHEAD;
#endif
        const bool wanted = lane % AHEAD < __shfl_sync(ALL_LANES, many, which);
        if (lane < TEAMS * AHEAD && needed >> which & 1 && wanted) {
            Place& place = its.place(round);
            if (index < its.blocks) place.block = find_own_block(spans, firsts, starts, search, index);
            else place.block.tokens = 0;
            place.index = index;
        }
        if (needs) found += many;
        __syncwarp();
    }

    // Says that a team has claimed its last block. The last team to say so leaves the next launch zeros.
    INLINE void end(u32* claims) {
        ended = true;
#if CLAIMED
        if (team.dealt == ~0u || atomicAdd(claims + 1, 1) + 1 < team.all) return;
        claims[0] = claims[1] = 0;
#endif
    }

    // Sends for steps as long as there are free slots.
    INLINE void send(u32* claims) {
        while (works && !ended && steps < SLOTS && sent.round < found) {
            const Block& block = team.place(sent.round).block;
            if (OFFSETS) arrive(team.sent(sent.turn));
            if (block.tokens) {
                send_for_step(block, sent.first_row, team.slot(sent.turn), team.full(sent.turn));
                sent.next(sent.is_last(block)), steps++;
            } else {
                end(claims);
                arrive(team.full(sent.turn));
            }
        }
    }

    // Takes the sums of a step that a team has read, and tells of a whole block whether it is good.
    INLINE void judge(int* flags) {
        if (!works || !steps || !is_complete(team.free(done.turn), done.parity)) return;
        const Place& place = team.place(done.round);
        const Block& block = place.block;
        const bool last = done.is_last(block);
        for (int i = 0; i < 4; i++) sum += team.sums(done.turn)[i];
        if (last && team.sums_up(done.round)) {
            const u32 stored = Step(block, done.first_row, team.shelf + done.turn * SLOT_BYTES).last_word();
            flags[place.index] = checksum_of(sum, block_bytes(block.tokens) - CHECKSUM_BYTES) != stored;
        }
        if (last) sum = 0;
        done.next(last), steps--;
    }

    INLINE void work(u8* tables, const i64* spans, const i64* firsts, const i64* starts, int search, int* flags, u32* claims) {
        while (__any_sync(ALL_LANES, has_more())) {
            find(tables, spans, firsts, starts, search, claims);
            send(claims);
            judge(flags);
            __nanosleep(100);
            __syncwarp();
        }
    }
};

#if OFFSETS
// What a turner leaves a step's warps beside its means.
struct alignas(16) BehindRun {
    float unit;  // of the block's means
    float room;  // for numbers before their offsets are added, each of which is below twice the largest mean
    int base;    // of the block's radii
};
static_assert(sizeof(BehindRun) <= BEHIND_RUN && UNIT_AT % 16 == 0);
INLINE BehindRun& behind_run(u8* run) { return *reinterpret_cast<BehindRun*>(run + UNIT_AT); }

// What a turner does for one of its teams: it turns the means to each step that the courier has sent for. A step is a run.
struct Turner {
    const Team team;
    Cursor at;
    BehindRun behind;
    bool ended = false;

    INLINE Turner(u8* tables, int team, i64 blocks) : team(tables, team, blocks) {}

    INLINE void work(const u8* tables, int lane) {
        if (ended) return;
        wait_until_complete(team.sent(at.turn), at.parity);
        const Block& block = team.place(at.round).block;
        if (!block.tokens) {
            if (lane == 0) arrive(team.full(at.turn));
            ended = true;
            return;
        }
        const bool is_first = at.first_row == 0;
        const u32* codes_end = block.payload + (bytes_before(block, 2) + block.tokens) / 4;
        const u32 base[2] = {is_first ? __ldg(codes_end) : 0, is_first ? __ldg(codes_end + 1) : 0};  // on its way meanwhile
        RunMeans means;
        means.load(block, lane);
        u8* run = team.run(at.run);
        if (is_first) behind.unit = unit_of_means(block), behind.room = LARGEST - 2.0f * (means.largest() * behind.unit);
        means.turn(tables, block.position + at.first_row, lane, run);
        if (is_first) behind.base = base_of(base, block);
        if (lane == 0) behind_run(run) = behind;
        __syncwarp();
        if (lane == 0) arrive(team.full(at.turn));
        at.next(at.is_last(block));
    }
};

INLINE void turn_runs(u8* tables, i64 blocks, int first, int lane) {
    wait_until_complete(Team(tables, 0, blocks).tables(), 0);
    Turner one(tables, first, blocks), two(tables, first + TURNERS, blocks);
    while (!one.ended || !two.ended) one.work(tables, lane), two.work(tables, lane);
}
#endif

// What a team's warps do: they decode its blocks.
INLINE void decode_blocks(u8* tables, const i64* __restrict__ keys, i64 blocks) {
    const int thread = threadIdx.x % TEAM, warp = thread / 32, lane = threadIdx.x & 31;
    const Team team(tables, threadIdx.x / TEAM, blocks);
    wait_until_complete(Team(tables, 0, blocks).tables(), 0);
    u8* rows_out = team.shelf + ROWS_AT + warp * (BULK * 16 * OUT_BYTES);
    int base = 0;  // of the block
    for (Cursor at;;) {
        wait_until_complete(team.full(at.turn), at.parity);
        const Block& block = team.place(at.round).block;
        if (!block.tokens) break;
        const bool last = at.is_last(block);
        const Step step(block, at.first_row, team.shelf + at.turn * SLOT_BYTES);
#if OFFSETS
        u8* run = team.run(at.run);
        const BehindRun behind = behind_run(run);
        base = behind.base;
        const float room = behind.room;
#else
        const float room = LARGEST;
        if (at.first_row == 0) {
            const u8* radii = last ? step.radii : reinterpret_cast<const u8*>(block.payload) + bytes_before(block, 2);
            base = base_of(reinterpret_cast<const u32*>(radii) + block.tokens / 4, block);
        }
#endif
        const bool wanted = at.first_row + STEP > block.first && at.first_row < block.last;  // by all four warps
        const int first_row = at.first_row + 16 * warp, row = lane % 16;  // of the warp's tile
        const u32 code = first_row + row < block.tokens ? step.radii[16 * warp + row] : 0;
        float factor, second_factor;
        quad_factors(tables, code, base, factor, second_factor);
        const bool ordinary = __all_sync(ALL_LANES, is_ordinary(factor, second_factor, room));
        if (team.sums_up(at.round)) {
            const u64 sum = sum_of_lanes(step.sum(tables, keys, block, at.first_row, thread, last));
            if (lane == 0) team.sums(at.turn)[warp] = sum;
        }
        u32 operands[TILES][GROUPS][4];
        if (wanted) quad_operands(tables, step.coded, lane, 16 * warp, operands[0]);
        __syncwarp();
        if (lane == 0) arrive(team.free(at.turn));
        if (wanted) {
            LaneRows rows(block, first_row, lane, factor, second_factor, rows_out);
#if OFFSETS
            rows.turn_with(tables, run, behind.unit, first_row, lane);
#endif
            wait_for_bulk();
            decode_rows(tables, operands, rows, ordinary, lane & 3, blockIdx.x % PARTS);
            store_bulk(rows_out, block, first_row, lane);
        }
        at.next(last);
    }
    wait_for_bulk();
}

// Checks every block (flags [blocks]: 1 where it is damaged), and fills the rows that its span wants; arguments as in
// blocks.cu. ``claims`` [2]: zeros, which launches at the same time may not share.
extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_stream_blocks(
    const i64* __restrict__ spans, const i64* __restrict__ firsts, const i64* __restrict__ starts, int* __restrict__ flags,
    const i64* __restrict__ keys, const uint4* __restrict__ blob, i64 blocks, int search, u32* __restrict__ claims) {
    extern __shared__ __align__(128) uint4 memory[];
    u8* tables = reinterpret_cast<u8*>(memory);
    const bool is_courier = threadIdx.x / 32 == TEAMS * TEAM / 32;
    Courier courier(tables, blocks);
    if (is_courier) {
        courier.prepare();
        courier.send_for_tables(tables, blob);
    }
    __syncthreads();  // the barriers are there
    if (threadIdx.x < TEAMS * TEAM) {
#ifdef TEAM_REGISTERS
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(TEAM_REGISTERS));
#endif
        decode_blocks(tables, keys, blocks);
    } else {
#ifdef TEAM_REGISTERS
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COURIER_REGISTERS));
#endif
        if (is_courier) courier.work(tables, spans, firsts, starts, search, flags, claims);
#if OFFSETS
        else turn_runs(tables, blocks, threadIdx.x / 32 - TEAMS * TEAM / 32 - 1, threadIdx.x & 31);
#endif
    }
}
