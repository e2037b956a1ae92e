// Law: where a block lies: its words in the stream, and its rows in the tensor.
//
// Needs AHEAD (blocks that a warp looks for at once, 32 at most), FIELDS and the places of a span's numbers (LEADS, STREAM ...,
// as SpanRow in spans.py names them), CHUNK (tokens), ROW_BYTES, BESIDE and ALIGN (of a block's bytes, as Blocks in
// stream/index.py says), ITEM (bytes of a stored number), OFFSETS, and with these CHECKSUM_BYTES and OFFSET_EXPONENT_AT.
#pragma once

#include "lanes.cuh"
#include "spans.cuh"

// Bytes of a block of so many tokens, its checksum included.
constexpr __device__ int block_bytes(int tokens) { return (tokens * ROW_BYTES + BESIDE + ALIGN - 1) / ALIGN * ALIGN; }

struct Block {
    const i64* span;  // the row of the block's span: FIELDS numbers
    u32* payload;     // the block's first word in the stream
    i64 rows;         // address of the block's first row in the tensor
#if OFFSETS
    const u32* means;  // of the block's leading index, float16 [ORDER], two by two
    u32 position;      // of the first row, under RoPE
    int exponent;      // of what numbers stored as means are multiplied with
#endif
    int row_stride;   // bytes from one row of the tensor to the next
    int tokens;       // rows of the block
    int first, last;  // the rows that are wanted: from first on, before last
};

// Block ``index`` of a launch, which span ``which`` holds. ``spans`` [spans, FIELDS]; ``firsts``: the first block of each span,
// and behind them numbers that no index reaches, 2^search + 1 in all; ``starts``: the addresses of each span's rows, one a
// leading index.
INLINE Block block_of_span(const i64* __restrict__ spans, const i64* __restrict__ firsts, const i64* __restrict__ starts,
                           int which, u32 index) {
    Block block;
    block.span = spans + which * FIELDS;
    const u32 of_span = index - (u32)__ldg(firsts + which);  // blocks of a chunk stand together, one a leading index
    const u32 leads = (u32)__ldg(block.span + LEADS), chunk_of_span = of_span / leads;
    const i64 chunk = __ldg(block.span + FIRST_CHUNK) + chunk_of_span, left = __ldg(block.span + CODED) - chunk * CHUNK;
    const i64 first_token = __ldg(block.span + FIRST_TOKEN);
    const i64 lead = __ldg(block.span + FIRST_LEAD) + (of_span - chunk_of_span * leads);  // leading index
    block.tokens = left < CHUNK ? (int)left : CHUNK;
    const i64 token = __ldg(block.span + EXACT) + chunk * CHUNK;  // of the tensor, that the block's first row codes
    block.payload = reinterpret_cast<u32*>(__ldg(block.span + PAYLOAD) +
                                           chunk * __ldg(block.span + LEADING) * block_bytes(CHUNK) +
                                           lead * block_bytes(block.tokens));
#if OFFSETS
    const i64 stream = __ldg(block.span + STREAM);
    block.means = reinterpret_cast<const u32*>(stream + __ldg(block.span + OFFSETS_AT) + lead * (2 * ORDER + CHECKSUM_BYTES));
    block.position = (u32)(token + __ldg(block.span + POSITION));
    block.exponent = *reinterpret_cast<const short*>(stream + OFFSET_EXPONENT_AT);
#endif
    block.row_stride = (int)__ldg(block.span + STRIDE) * ITEM;
    block.rows = __ldg(starts + __ldg(block.span + STARTS) + (of_span - chunk_of_span * leads)) +
                 (token - first_token) * block.row_stride;
    block.first = (int)max(first_token - token, 0ll);
    block.last = (int)min(__ldg(block.span + LAST_TOKEN) - token, (i64)block.tokens);
    return block;
}

// A block that a whole warp looks for.
INLINE Block find_block(const i64* __restrict__ spans, const i64* __restrict__ firsts, const i64* __restrict__ starts,
                        int search, u32 index) {
    return block_of_span(spans, firsts, starts, span_of(firsts, search, index), index);
}

// The same for one lane's own block, a bit at a time.
INLINE Block find_own_block(const i64* __restrict__ spans, const i64* __restrict__ firsts, const i64* __restrict__ starts,
                            int search, u32 index) {
    int which = 0;
#pragma unroll 1
    for (int bit = search - 1; bit >= 0; bit--)
        if (__ldg(firsts + which + (1 << bit)) <= index) which += 1 << bit;
    return block_of_span(spans, firsts, starts, which, index);
}

// Goes on to ``upcoming`` [AHEAD]'s next block of a warp: block ``index``, behind which its others follow ``apart`` from each
// other. Returns its place; where all of them were used, the next ones are found first, each by one lane.
INLINE u32 next_place(const i64* __restrict__ spans, const i64* __restrict__ firsts, const i64* __restrict__ starts, int search,
                      u32 index, u32 apart, i64 blocks, int lane, Block* upcoming, u32 place) {
    if (place + 1 < AHEAD) return place + 1;
    if (AHEAD > 1) {
        const i64 own = index + (i64)lane * apart;
        if (lane < AHEAD && own < blocks) upcoming[lane] = find_own_block(spans, firsts, starts, search, own);
    } else {
        const Block next = find_block(spans, firsts, starts, search, index);
        if (lane == 0) *upcoming = next;
    }
    __syncwarp();
    return 0;
}
