"""Law: sums over all bytes of tensors of a GPU, in one launch; tensors are told by their addresses."""

from __future__ import annotations

import triton
import triton.language as tl

LANES = 1024  # words that a program loads at once
STEPS = 64  # loads of a program
CHUNK_BYTES = 8 * LANES * STEPS  # of a tensor, of which one sum is made
WARPS = 8


@triton.jit
def sum_words(chunks, weights, sums, LANES: tl.constexpr, STEPS: tl.constexpr):
    """One chunk's sum modulo 2^64, int64: the word of lane l and step s counts weights[l] * FACTOR^(last step - s) times.

    ``chunks``: int64 [chunks, 2], address (a multiple of 8) and bytes of each; ``weights``: odd int64 [LANES]. All factors are
    odd, so that a word that changes always changes the sum.
    """
    FACTOR: tl.constexpr = -7046029254386353131
    chunk = tl.program_id(0).to(tl.int64)
    address = tl.load(chunks + 2 * chunk)
    size = tl.load(chunks + 2 * chunk + 1)
    lanes = tl.arange(0, LANES)
    words = address.to(tl.pointer_type(tl.int64))
    total = tl.zeros([LANES], tl.int64)
    for step in range(STEPS):
        place = step * LANES + lanes
        total = total * FACTOR + tl.load(words + place, mask=place < size // 8, other=0)
    tail = size // 8 * 8 + lanes  # bytes behind the last whole word
    rest = tl.load(address.to(tl.pointer_type(tl.uint8)) + tail, mask=tail < size, other=0).to(tl.int64)
    total = total * FACTOR + rest
    tl.store(sums + chunk, tl.sum(total * tl.load(weights + lanes), 0))
