// Law: barriers in shared memory (mbarrier) that count what the bulk copy engine brings.
//
// Addresses are those of shared memory. Needs no macros.
#pragma once

#include "numbers.cuh"

INLINE void prepare_barrier(u32 barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Lets the engine see the barriers that lanes of a warp have prepared.
INLINE void barriers_are_prepared() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncwarp();
}

INLINE void arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

// Arrives, and has the barrier wait for so many bytes.
INLINE void expect_bytes(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Has the engine bring bytes, which a barrier counts; both addresses and the number are multiples of 16.
INLINE void send_for_bytes(u32 to, i64 from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

// Whether a barrier is complete. ``parity``: of how often it was before.
INLINE bool is_complete(u32 barrier, u32 parity) {
    u32 complete;
    asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(complete)
                 : "r"(barrier), "r"(parity)
                 : "memory");
    return complete;
}

INLINE void wait_until_complete(u32 barrier, u32 parity) {
    asm volatile(
        "{.reg .pred p; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra THERE; bra AGAIN; THERE: }" ::"r"(
            barrier),
        "r"(parity)
        : "memory");
}
