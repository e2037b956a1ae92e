// Law: offsets (SPEC 8): each channel's stored mean, turned by its token's position under RoPE.
//
// Every operation rounds by itself, for decoders' results depend on it.
//
// Needs OFFSETS, ORDER, CHECKSUM_BYTES, OFFSET_EXPONENT_AT; PAIRS (of channels that turn; 0 without RoPE), INTERLEAVED (how
// channels are paired), and with RoPE the tables FREQUENCIES (of each pair) and PHASES (cos and sin of 256 coarse and 256 fine
// turns).
#pragma once

#include "block_place.cuh"

#if OFFSETS
// The stored offsets of eight neighbouring channels; ``unit``: the power of two that they count.
INLINE void stored_offsets(const u32* from, float unit, float* offsets) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        const u32 both = __ldg(from + i / 2);
        offsets[i] = half_value(both & 0xffff) * unit, offsets[i + 1] = half_value(both >> 16) * unit;
    }
}

// The offsets of eight neighbouring channels, from ``first`` on, at the token of a block's row.
INLINE void offsets_at(const u8* tables, const Block& block, int row, int first, float* offsets) {
    const i64 stream = __ldg(block.span + STREAM);
    const float unit = power_of_two(*reinterpret_cast<const short*>(stream + OFFSET_EXPONENT_AT));
    const u32* halves =
        reinterpret_cast<const u32*>(stream + __ldg(block.span + OFFSETS_AT) + block.lead * (2 * ORDER + CHECKSUM_BYTES));
    stored_offsets(halves + first / 2, unit, offsets);
#if PAIRS
    if (first >= 2 * PAIRS) return;
    const u32 position = (u32)(block.token + row + __ldg(block.span + POSITION));
    const u32* frequencies = reinterpret_cast<const u32*>(tables + FREQUENCIES_AT);
    const float2* phases = reinterpret_cast<const float2*>(tables + PHASES_AT);
    float partners[8];  // the offsets of the channels that these turn with
#if INTERLEAVED
#pragma unroll
    for (int i = 0; i < 8; i++) partners[i] = offsets[i ^ 1];
#else
    stored_offsets(halves + (first < PAIRS ? first + PAIRS : first - PAIRS) / 2, unit, partners);
#endif
#pragma unroll
    for (int i = 0; i < 8; i++) {
#if INTERLEAVED
        if (first + i >= 2 * PAIRS) continue;
        const u32 phase = position * frequencies[(first + i) / 2] >> 16;  // turns / 2^16
        const bool second = i & 1;  // of its pair
#else
        const u32 phase = position * frequencies[(first < PAIRS ? first : first - PAIRS) + i] >> 16;
        const bool second = first >= PAIRS;
#endif
        const float2 coarse = phases[phase >> 8], fine = phases[256 + (phase & 255)];  // cos and sin
        const float cos = coarse.x * fine.x - coarse.y * fine.y, sin = coarse.y * fine.x + coarse.x * fine.y;
        const float own = offsets[i] * cos, cross = partners[i] * sin;
        offsets[i] = second ? own + cross : own - cross;
    }
#endif
}
#endif
