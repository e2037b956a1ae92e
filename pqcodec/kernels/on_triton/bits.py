"""Law: fields of bits in 32-bit words, and checksums of bytes, by one program for its block."""

from __future__ import annotations

import triton
import triton.language as tl

from pqcodec import constants as c

PRIME = tl.constexpr(c.CHECKSUM_PRIME)
PRIME_GAP = tl.constexpr((1 << 32) - c.CHECKSUM_PRIME)  # 2^32 modulo the prime


@triton.jit
def find_span(firsts, index, SEARCH: tl.constexpr):
    """Number of the span that holds block (or lead) ``index``; firsts [1 + 2^SEARCH] are each span's first, ascending."""
    low = 0
    for i in tl.static_range(SEARCH):
        step = 1 << (SEARCH - 1 - i)
        low = tl.where(tl.load(firsts + low + step) <= index, low + step, low)
    return low


@triton.jit
def get_field(words, bit, width, mask):
    """Fields of ``width`` <= 28 bits that begin at ``bit``, int32. Only words that a field touches are read."""
    shift = (bit & 31).to(tl.uint32)
    at = words + (bit >> 5)
    low = tl.load(at, mask=mask & (width > 0), other=0)
    high = tl.load(at + 1, mask=mask & ((bit & 31) + width > 32), other=0)
    value = (low >> shift) | ((high << 1) << (31 - shift))
    return (value & ((tl.full(width.shape, 1, tl.uint32) << width.to(tl.uint32)) - 1)).to(tl.int32)


@triton.jit
def get_word(words, bit, mask):
    """32 bits that begin at ``bit``, uint32; the second word is read unless the first holds them all."""
    shift = (bit & 31).to(tl.uint32)
    at = words + (bit >> 5)
    low = tl.load(at, mask=mask, other=0)
    high = tl.load(at + 1, mask=mask & ((bit & 31) > 0), other=0)
    return (low >> shift) | ((high << 1) << (31 - shift))


@triton.jit
def put_field(words, bit, value, mask):
    """OR fields of up to 32 bits into words that held zeros there, beginning at ``bit``."""
    shift = (bit & 31).to(tl.uint32)
    at = words + (bit >> 5)
    bits = value.to(tl.uint32)
    high = (bits >> 1) >> (31 - shift)
    tl.atomic_or(at, bits << shift, mask=mask, sem="relaxed")
    tl.atomic_or(at + 1, high, mask=mask & (high != 0), sem="relaxed")


@triton.jit
def word_sum(words, skew, count, keys, TILE: tl.constexpr):
    """Checksum (SPEC 4.2) of ``count`` bytes that begin ``skew`` bytes (0 .. 3) after ``words``; TILE words at a time."""
    total = tl.zeros([TILE], tl.uint64)
    shift = (skew * 8).to(tl.uint32)
    for first in range(0, (count + 3) // 4, TILE):
        i = first + tl.arange(0, TILE)
        left = count - 4 * i
        low = tl.load(words + i, mask=left > 0, other=0, volatile=True)
        high = tl.load(words + i + 1, mask=left > 4 - skew, other=0, volatile=True)
        word = tl.where(skew == 0, low, (low >> shift) | ((high << 1) << (31 - shift)))
        kept = tl.where(left >= 4, 0, 32 - 8 * tl.maximum(left, 0)).to(tl.uint32)
        word = tl.where(left > 0, (word << (kept & 31)) >> (kept & 31), 0)
        product = word.to(tl.uint64) * tl.load(keys + 1 + i, mask=left > 0, other=0).to(tl.uint64)
        total += (product & 0xFFFFFFFF) + (product >> 32) * PRIME_GAP
    return reduced(total, count, keys)


@triton.jit
def reduced(total, count, keys):
    """Partial sums below 2^53 [TILE] and the number of bytes -> the checksum, uint32."""
    total = (total & 0xFFFFFFFF) + (total >> 32) * PRIME_GAP
    length = tl.load(keys).to(tl.uint64) * count.to(tl.uint64)
    length = (length & 0xFFFFFFFF) + (length >> 32) * PRIME_GAP
    return ((tl.sum(total) + length) % PRIME).to(tl.uint32)
