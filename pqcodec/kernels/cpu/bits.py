"""Law: fields of bits in rows of 64-bit words, little-endian, rows as bytes, and their checksum."""

from __future__ import annotations

import numpy as np

from pqcodec.constants import CHECKSUM_PRIME
from pqcodec.kernels.cpu.lane_memory import load, long_at, longs_of_words, set_long_at, word_at
from pqcodec.kernels.cpu.lanes import LANES, ints, low_half, sum_of_longs, to_long
from pqcodec.kernels.cpu.records import I32, U64, jit, leaf

_PRIME = np.uint64(CHECKSUM_PRIME)


@jit
def put_field(words, base, place, width, value):
    """OR one field into the row of words that begins at ``base``, from bit ``place`` on."""
    at = base + (place >> U64(6))
    shift = place & U64(63)
    words[at] |= value << shift
    words[at + U64(1)] |= (value >> U64(1)) >> (U64(63) - shift)


@jit
def get_field(words, base, place, width):
    """The field of ``width`` <= 32 bits at bit ``place`` of the row of words that begins at ``base``, uint64."""
    at = base + (place >> U64(6))
    shift = place & U64(63)
    value = (words[at] >> shift) | ((words[at + U64(1)] << U64(1)) << (U64(63) - shift))
    return value & ((U64(1) << width) - U64(1))


@leaf
def rows_to_bytes(words, stride, rows, row_bytes, out, start):
    """Rows of words, ``stride`` words apart -> rows of bytes side by side, out [start ...]."""
    whole = row_bytes >> 3
    for r in range(rows):
        base, target = r * stride, start + r * row_bytes
        for i in range(whole):
            set_long_at(out, target + 8 * i, words[base + i])
        for i in range(8 * whole, row_bytes):
            out[target + i] = np.uint8(words[base + whole] >> U64(8 * (i - 8 * whole)))


@leaf
def bytes_to_rows(data, start, rows, row_bytes, words, stride):
    """Rows of bytes side by side, data [start ...] -> rows of words, ``stride`` words apart; bits behind a row are 0."""
    whole = row_bytes >> 3
    for r in range(rows):
        base, source = r * stride, start + r * row_bytes
        for i in range(whole):
            words[base + i] = long_at(data, source + 8 * i)
        rest = U64(0)
        for i in range(8 * whole, row_bytes):
            rest |= U64(data[source + i]) << U64(8 * (i - 8 * whole))
        words[base + whole] = rest


@leaf
def checksum(data, start, size, keys):
    """Checksum of ``size`` bytes from data [start] on (SPEC 4.2), uint64.

    Keys and words are known to have 32 bits, so eight of their products are one multiplication of the CPU.
    """
    whole = size >> 2
    lows, half = to_long(ints(I32(0))), to_long(ints(I32(32)))
    highs = lows
    for i in range(0, whole - LANES + 1, LANES):
        product = longs_of_words(data, start + 4 * i) * to_long(low_half(load(keys, i + 1)))
        lows = lows + to_long(low_half(product))
        highs = highs + (product >> half)
    low, high = sum_of_longs(lows), sum_of_longs(highs)
    for i in range(whole - whole % LANES, whole):
        product = word_at(data, start + 4 * i) * keys[i + 1]
        low += product & U64(0xFFFFFFFF)
        high += product >> U64(32)
    rest = U64(0)
    for j in range(4 * whole, size):
        rest |= U64(data[start + j]) << U64(8 * (j - 4 * whole))
    if size & 3:
        product = rest * keys[whole + 1]
        low += product & U64(0xFFFFFFFF)
        high += product >> U64(32)
    total = ((high % _PRIME) << U64(32)) % _PRIME + low % _PRIME + (U64(size) % _PRIME) * keys[0] % _PRIME
    return total % _PRIME
