"""Law: what ``rotation_in_factors.cuh`` multiplies with and looks up: two rounds of the rotation (SPEC 5), in factors.

Number c of a vector, channel or coordinate, is 16 i + 2 k + h. Of both rounds' Hadamard matrix H one factor goes over k, the
eight numbers of a butterfly, and one over {i, h}, a matrix of order / 8. A warp has ``order / 64`` strips of these: in strip m,
lane quarter q has as inputs the numbers of i = 4 m + q, and as sums those of i = order / 64 q + m.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from pqcodec.stages import rotation
from pqcodec.stream.header import Header

MOST_WHOLE = 256  # the largest order whose matrix an encoder keeps whole
BUTTERFLY = 8  # numbers
FLIPPED = 16  # words whose signs one word has
DOWN_SHIFT = 4  # of sums of float16, a round, so that they stay finite: the matrix's entries are 2^-DOWN_SHIFT
ROW = 16  # bytes of shared memory: a number of each of a tile's eight rows
LINE = 8  # rows that lie in different banks


def factor_tables(h: Header, brain: bool) -> dict[str, np.ndarray]:
    """MATRIX uint8 [strips, bricks, 8 columns, 16 bytes of inputs]: of bfloat16 (``brain``) or float16, with zeros behind;
    FLIPS uint32 [2 rounds, 2, 4 quarters, words]: signs of a lane's numbers, those of 16 words of two numbers in each: E, and D
        (SPEC 5.3), for rows of even and of odd number. Odd rows begin with the last half of a butterfly, which turns over the
        last half of its sums; D turns them back.
    PUTS, TAKES uint32 [.., 32 lanes, 4]: where in the exchange a lane's row of each stmatrix and ldmatrix lies, in bytes.
    """
    order, strips = h.order, h.order // 64
    columns = np.arange(order // BUTTERFLY)
    own = 2 * (strips * (columns % 8 // 2) + columns // 8) + columns % 2
    matrix = rotation.hadamard(order // BUTTERFLY)[own].astype(np.float32) * (1 if brain else 2.0**-DOWN_SHIFT)
    padded = np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % 16)))
    first, second = rotation.signs(h.seed, order, first_round=True), rotation.signs(h.seed, order)
    turned = np.where(rotation.permutation(order) % 16 < BUTTERFLY, 1, -1)
    flips = np.stack([first, second, np.roll(first.reshape(-1, 2, BUTTERFLY), 1, 1).ravel(), second * turned])
    minus = flips.reshape(2, 2, strips, 4, BUTTERFLY, 2).transpose(1, 0, 3, 2, 4, 5).reshape(2, 2, 4, -1, 2) < 0
    minus = np.pad(minus, ((0, 0),) * 3 + ((0, -minus.shape[3] % FLIPPED), (0, 0))).reshape(2, 2, 4, -1, FLIPPED, 2)
    at = 15 - np.arange(FLIPPED)[:, None] + np.array([0, 16])  # the bit of each number
    puts, takes = _exchange(order)
    return {
        "FLIPS": (minus.astype(np.uint32) << at.astype(np.uint32)).sum((-1, -2), dtype=np.uint32),
        "PUTS": _by_fours(puts),
        "TAKES": _by_fours(takes),
        "MATRIX": _packed(padded, brain).view(np.uint8).reshape(strips, 8, -1, 16).swapaxes(1, 2),
    }


def in_factors(verb: str, h: Header) -> bool:
    """Whether a kernel rotates in factors: an encoder for which the matrix of two rounds is too large for shared memory."""
    return verb == "encode" and h.rounds == 2 and h.order > MOST_WHOLE


def _packed(numbers: np.ndarray, brain: bool) -> np.ndarray:
    """Numbers that 16 bits hold exactly, two of them in one word: uint32 [.., half as many]."""
    halves = (numbers.view(np.uint32) >> 16).astype(np.uint16) if brain else numbers.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(halves).view(np.uint32).reshape(*numbers.shape[:-2], -1)


def _by_fours(places: np.ndarray) -> np.ndarray:
    """Places [.., 32 lanes] as uint32 [.. / 4, 32 lanes, 4]."""
    padded = np.pad(places, ((0, -len(places) % 4), (0, 0)))
    return padded.reshape(-1, 4, 32).swapaxes(1, 2).astype(np.uint32)


@lru_cache(maxsize=16)
def _exchange(order: int) -> tuple[np.ndarray, np.ndarray]:
    """Where numbers lie between the rounds, permuted by P: of [half of the butterfly's numbers, strip] as they are put, and of
    [strip, half] as they are taken, each four matrices of eight rows, in bytes.

    Neither the eight rows that a matrix puts nor those that it takes meet in a bank.
    """
    strips, number = order // 64, np.arange(order)  # of the second round
    i, k = number // 16, number % 16 // 2
    taken_by, take = i // 4 * 8 + k, i % 4 * 2 + number % 2
    source = rotation.permutation(order)
    i, k = source // 16, source % 16 // 2
    put_by, put = k * strips + i % strips, i // strips * 2 + source % 2
    rows = LINE * taken_by + _colours(put_by, taken_by)
    puts, takes = np.empty((2, order // LINE, LINE), np.int64)
    puts[put_by, put] = takes[taken_by, take] = ROW * rows
    puts = puts.reshape(2, 4, strips, LINE).swapaxes(1, 2)  # four of the butterfly's numbers side by side
    return puts.reshape(-1, 32), takes.reshape(-1, 32)


def _colours(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A colour below LINE for each edge {left, right} of a graph, of which no two at the same end are alike.

    Every end has LINE edges, so there are such colours (König); where the free ones of both ends differ, those of a path that
    has the two in turns are exchanged.
    """
    ends = np.full((2, max(left.max(), right.max()) + 1, LINE), -1)  # edges
    colours = np.empty(len(left), np.int64)
    sides = np.stack([left, right])
    for edge in range(len(left)):
        free, other = (int(np.flatnonzero(ends[side, sides[side, edge]] < 0)[0]) for side in (0, 1))
        path, side, colour = [], 1, free
        at = ends[1, right[edge], free]
        while at >= 0:  # from the right end on, edges of ``free`` and ``other`` in turns
            path.append(int(at))
            side, colour = 1 - side, free + other - colour
            at = ends[side, sides[side, at], colour]
        for each in path:
            ends[0, left[each], colours[each]] = ends[1, right[each], colours[each]] = -1
        for each in path:
            colours[each] = free + other - colours[each]
            ends[0, left[each], colours[each]] = ends[1, right[each], colours[each]] = each
        colours[edge] = free
        ends[0, left[edge], free] = ends[1, right[edge], free] = edge
    return colours
