"""Law: affine fields (SPEC 13) between bytes and numbers, and the codes of eight numbers as bytes."""

from __future__ import annotations

import numpy as np

from pqcodec.kernels.cpu.lane_halves import load_half, rounded_half
from pqcodec.kernels.cpu.lane_look_ups import words_of_rows
from pqcodec.kernels.cpu.lane_memory import load, load_short, set_long_at, store_short
from pqcodec.kernels.cpu.lanes import LANES, floats, ints, select, sum_of_longs, to_long, truncate
from pqcodec.kernels.cpu.records import F32, I32, U64, inlined, leaf

_SIZE, _SIGN, _LARGEST, _INFINITE = 0x7FFF, 0x8000, 0x7BFF, 0x7C00  # bits of float16
_BYTE = np.uint16(8)


# -- fields --------------------------------------------------------------------------------------------------------
@leaf
def shorts_of(payload, at, count, shorts):
    """``count`` numbers of 16 bits from payload [at ...] on."""
    for i in range(count):
        shorts[i] = np.uint16(payload[at + 2 * i]) | np.uint16(payload[at + 2 * i + 1]) << _BYTE


@leaf
def put_shorts(shorts, count, payload, at):
    """``count`` numbers of 16 bits to payload [at ...]."""
    for i in range(count):
        payload[at + 2 * i] = np.uint8(shorts[i] & np.uint16(255))
        payload[at + 2 * i + 1] = np.uint8(shorts[i] >> _BYTE)


@inlined
def halves_at(shorts, at):
    """Eight float16, float lanes: NaN counts as 0, an infinity as the largest finite number of its sign."""
    bits = load_short(shorts, at)
    size = bits & ints(I32(_SIZE))
    size = select(size > ints(I32(_INFINITE)), ints(I32(0)), min(size, ints(I32(_LARGEST))))
    store_short(shorts, at, size | bits & ints(I32(_SIGN)))
    return load_half(shorts, at)


@inlined
def as_halves(value, shorts, at):
    """Float lanes rounded to float16: stored in ``shorts`` [at ...], and returned as float lanes."""
    store_short(shorts, at, rounded_half(value))
    return load_half(shorts, at)


# -- codes ---------------------------------------------------------------------------------------------------------
@leaf
def fill_steps(width, steps, shifts):
    """Where the codes of eight numbers of ``width`` bits begin: bytes, and bits of that byte before them."""
    for l in range(8):
        steps[l] = I32(l * width >> 3)
        shifts[l] = I32(l * width & 7)


@inlined
def codes_at(payload, at, steps, shifts):
    """The codes of eight numbers that begin at payload [at], int lanes; bits of later ones stand above each."""
    return words_of_rows(payload, at, steps, 0) >> load(shifts, 0)


@inlined
def code_shifts(width, places):
    """How far ``put_codes`` shifts each of eight codes of ``width`` bits: long lanes; of wider ones four are a word."""
    lane = load(places, 0) & ints(I32(7 if width <= 8 else 3))
    return to_long(lane * ints(I32(width)))


@leaf
def put_codes(codes, count, width, shifts, places, payload, at):
    """A row's ``count`` codes, of ``width`` bits, to payload from [at] on; up to seven bytes behind become zeros.

    Of a row at once: a CPU works on as many rows of lanes side by side as the way from numbers to their bytes is short.
    """
    for k in range(0, count, LANES):
        code = load(codes, k)
        if width <= 8:
            set_long_at(payload, at, sum_of_longs(to_long(code) << shifts))
        else:
            first = load(places, 0) < ints(I32(4))
            low = sum_of_longs(to_long(select(first, code, ints(I32(0)))) << shifts)
            high = sum_of_longs(to_long(select(first, ints(I32(0)), code)) << shifts)
            set_long_at(payload, at, low | (high << U64(4 * width - 1)) << U64(1))
            set_long_at(payload, at + 8, high >> U64(64 - 4 * width))
        at += width


@inlined
def cell_of(ahead, step, count):
    """The cell of numbers so far behind the beginning of the first of ``count`` cells, int lanes; 0 where the step is 0."""
    there = step > floats(F32(0))
    at = ahead / select(there, step, floats(F32(1)))
    at = min(max(at, floats(F32(0))), floats(F32(count - 1)))
    return select(there, truncate(at), ints(I32(0)))


@leaf
def put_last(exponent, payload, at):
    """A block's exponent to payload [at ...]."""
    payload[at] = np.uint8(exponent & 255)
    payload[at + 1] = np.uint8((exponent >> 8) & 255)
