"""Law: the range of each group of numbers of scalar coding, without the outliers at its ends (SPEC 16.4).

A list holds the farthest numbers of a group at one end, the nearest of them first, and one more than the group may have
outliers: the first is the end of the range. Eight lanes have lists of their own, so that eight numbers are taken at a time.
They are channels, or where rows are groups eight numbers of a row, whose lists are then merged with eight rows as lanes.
"""

from __future__ import annotations

import numpy as np

from pqcodec.kernels.cpu.lane_memory import load, store
from pqcodec.kernels.cpu.lane_rows import transpose
from pqcodec.kernels.cpu.lanes import LANES, any_lane, floats, ints, select
from pqcodec.kernels.cpu.records import F32, I32, I64, inlined, jit, leaf

NONE = np.float32(3e38)  # beyond every number
_RUNS = 6  # of rows, for each number of a list, whose farthest numbers tell what is near
_TILE = LANES * LANES
_FEW = 2  # numbers of a list that a row finds in registers


@inlined
def rows_are_groups(groups):
    """Whether each row has groups of its own, of whole lanes; eight rows are then coded together."""
    return groups.tokens == 1 and groups.channels % LANES == 0


@jit
def list_numbers(kind, groups):
    """Numbers that the lists of one end take."""
    if groups.shared_bytes:
        return 0
    each = _TILE + LANES if rows_are_groups(groups) else kind.order + 1
    return each * (groups.outliers + 2)


@leaf
def find_ranges(x, rows, kind, groups, scale, bad, work):
    """``work.low`` and ``work.high`` of every group of ``rows`` rows, times ``scale``: an empty range where no number is.

    Of group g at [g]; where rows are groups, row r's at [g * lanes + r]. Bad rows count nowhere.
    """
    if rows_are_groups(groups):
        _ranges_of_rows(x, rows, kind, groups, scale, bad, work)
    else:
        _ranges_of_channels(x, rows, kind, groups, scale, bad, work)


@leaf
def _ranges_of_rows(x, rows, kind, groups, scale, bad, work):
    order, head_dim, channels, deep = kind.order, kind.head_dim, groups.channels, groups.outliers + 1
    merged = (deep + 1) * _TILE
    for first in range(0, order, channels):
        last = min(first + channels, head_dim)
        _empty(0, _TILE, deep, work)
        _empty(merged, LANES, deep, work)
        for row in range(rows):
            least, second_least, most, second_most = floats(NONE), floats(NONE), floats(-NONE), floats(-NONE)
            for k in range(first, last, LANES):
                number = load(x, row * order + k) * floats(scale)
                there = load(work.places, k) < ints(I32(head_dim))
                low, high = select(there, number, floats(NONE)), select(there, number, floats(-NONE))
                if deep > _FEW:
                    _insert_lanes(low, high, row * LANES, _TILE, deep, work)
                else:
                    second_least, second_most = min(second_least, max(least, low)), max(second_most, min(most, high))
                    least, most = min(least, low), max(most, high)
            if deep <= _FEW:
                _insert_lanes(least, most, row * LANES, _TILE, deep, work)
                _insert_lanes(second_least, second_most, row * LANES, _TILE, deep, work)
        for k in range(0, deep * _TILE, _TILE):
            transpose(work.least, k)
            transpose(work.most, k)
        for k in range(0, deep * _TILE, LANES):
            _insert_lanes(load(work.least, k), load(work.most, k), merged, LANES, deep, work)
        end = merged + _end_of(last - first, deep) * LANES
        store(work.low, first // channels * LANES, load(work.least, end))
        store(work.high, first // channels * LANES, load(work.most, end))
        for row in range(rows):
            if bad[row]:
                work.low[first // channels * LANES + row], work.high[first // channels * LANES + row] = NONE, -NONE


@leaf
def _ranges_of_channels(x, rows, kind, groups, scale, bad, work):
    order, head_dim, channels = kind.order, kind.head_dim, groups.channels
    deep, finite = rows * groups.outliers // groups.tokens + 1, I64(0)
    _fill_lists(x, rows, deep, kind, scale, bad, work)
    for row in range(rows):
        if not bad[row]:
            finite += 1
            for k in range(0, head_dim if deep > 1 else 0, LANES):
                number = load(x, row * order + k) * floats(scale)
                if any_lane((number < load(work.least, k)) | (number > load(work.most, k))):
                    _insert_lanes(number, number, k, order, deep, work)
    if channels == 1:
        end = _end_of(finite, deep) * order
        for k in range(0, order, LANES):
            there = load(work.places, k) < ints(I32(head_dim))
            store(work.low, k, select(there, load(work.least, end + k), floats(NONE)))
            store(work.high, k, select(there, load(work.most, end + k), floats(-NONE)))
        return
    for group in range((order + channels - 1) // channels):
        first, last = group * channels, min((group + 1) * channels, head_dim)
        one = order * (deep + 1)
        for k in range(one, one + deep):
            work.least[k], work.most[k] = NONE, -NONE
        for channel in range(first, last):
            for k in range(channel, order * deep, order):
                _insert(work.most[k], one, deep, work.most, F32(1))
                _insert(work.least[k], one, deep, work.least, F32(-1))
        end = one + _end_of(finite * max(last - first, 0), deep)
        work.low[group], work.high[group] = work.least[end], work.most[end]


@leaf
def _fill_lists(x, rows, deep, kind, scale, bad, work):
    """Fill each list with a number that ``deep`` of its numbers are as far as, so that few are left that are farther.

    It is the farthest number of a run of rows, of ``deep`` whose farthest numbers are beyond those of others; the farthest of
    all where a list is of one.
    """
    _empty(0, kind.order, deep, work)
    run = max(rows // max(_RUNS * (deep - 1), 1), 1)
    for first in range(0, rows, run):
        for k in range(0, kind.head_dim, LANES):
            low, high = floats(NONE), floats(-NONE)
            for row in range(first, min(first + run, rows)):
                if not bad[row]:
                    number = load(x, row * kind.order + k) * floats(scale)
                    low, high = min(low, number), max(high, number)
            _insert_lanes(low, high, k, kind.order, deep, work)
    for k in range(0, kind.head_dim, LANES):
        for at in range(k, k + deep * kind.order, kind.order):
            store(work.least, at, load(work.least, k))
            store(work.most, at, load(work.most, k))


@inlined
def _end_of(numbers, deep):
    """The place of a range's end in lists of ``deep``: the nearest number's, or the farthest's where all numbers stay."""
    return deep - 1 if numbers <= 2 * (deep - 1) else 0


@leaf
def _empty(at, step, deep, work):
    """Lists with no number in them at [at ...], and behind the farthest numbers what is farther than all."""
    for k in range(at, at + deep * step, LANES):
        store(work.least, k, floats(NONE))
        store(work.most, k, floats(-NONE))
    for k in range(at + deep * step, at + (deep + 1) * step, LANES):
        store(work.least, k, floats(-NONE))
        store(work.most, k, floats(NONE))


@leaf
def _insert_lanes(low, high, at, step, deep, work):
    """Numbers into eight lists of the smallest ones and eight of the largest ones, ``step`` from each to its next."""
    if any_lane(low < load(work.least, at)):
        for k in range(at, at + deep * step, step):
            store(work.least, k, max(min(load(work.least, k), low), load(work.least, k + step)))
    if any_lane(high > load(work.most, at)):
        for k in range(at, at + deep * step, step):
            store(work.most, k, min(max(load(work.most, k), high), load(work.most, k + step)))


@leaf
def _insert(value, at, deep, numbers, sign):
    """A number into the ``deep`` largest ones (sign -1: smallest) at [at ...], if it is beyond the nearest of them."""
    if value * sign <= numbers[at] * sign:
        return
    k = at
    while k + 1 < at + deep and numbers[k + 1] * sign < value * sign:
        numbers[k] = numbers[k + 1]
        k += 1
    numbers[k] = value
