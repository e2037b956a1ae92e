"""Law: what ``rotation_in_factors.cuh`` multiplies with and looks up: two rounds of the rotation (SPEC 5), in factors.

Number c of a vector, channel or coordinate, is 16 i + 2 k + h. Of both rounds' Hadamard matrix H one factor goes over k, the
eight numbers of a butterfly, and one over {i, h}, a matrix of order / 8. A warp has ``order / 64`` strips of these: in strip m,
lane quarter q has as inputs the numbers of i = 4 m + q. As sums it has those of i = order / 64 q + m, for all m, of which two
neighbours are side by side: strip m, if even, has both of h = 0, and the next one both of h = 1. A last strip that has no
neighbour has both h of its own i.
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


def factor_tables(h: Header) -> dict[str, np.ndarray]:
    """MATRIX uint8 [strips, bricks, 8 columns, 16 bytes of inputs]: of float16; where strips are odd in number, with a brick of
        zeros behind, and the last brick once more behind that;
    FLIPS uint32 [2 rounds, 2, 4 quarters, words]: signs of a lane's numbers, those of 16 words of two numbers in each: E, and D
        (SPEC 5.3), for rows of even and of odd number. Odd rows begin with the last half of a butterfly, which turns over the
        last half of its sums; D turns them back.
    PUTS, TAKES uint16 [.., 32 lanes, 8]: where in the exchange a lane's row of each stmatrix and ldmatrix lies, in bytes.
    """
    order, strips = h.order, h.order // 64
    strip, column = columns_of(order)
    matrix = np.empty((order // BUTTERFLY,) * 2, np.float16)
    matrix[8 * strip + column] = rotation.hadamard(order // BUTTERFLY) * 2.0**-DOWN_SHIFT
    if strips % 2:
        matrix = np.hstack([matrix, np.zeros_like(matrix[:, -8:]), matrix[:, -8:]])
    first, second = rotation.signs(h.seed, order, first_round=True), rotation.signs(h.seed, order)
    turned = np.where(rotation.permutation(order) % 16 < BUTTERFLY, 1, -1)
    flips = np.stack([first, second, np.roll(first.reshape(-1, 2, BUTTERFLY), 1, 1).ravel(), second * turned])
    minus = flips.reshape(2, 2, strips, 4, BUTTERFLY, 2).transpose(1, 0, 3, 2, 4, 5).reshape(2, 2, 4, -1, 2) < 0
    minus = np.pad(minus, ((0, 0),) * 3 + ((0, -minus.shape[3] % FLIPPED), (0, 0))).reshape(2, 2, 4, -1, FLIPPED, 2)
    at = 15 - np.arange(FLIPPED)[:, None] + np.array([0, 16])  # the bit of each number
    puts, takes = _exchange(order)
    return {
        "FLIPS": (minus.astype(np.uint32) << at.astype(np.uint32)).sum((-1, -2), dtype=np.uint32),
        "PUTS": _by_eights(puts),
        "TAKES": _by_eights(takes),
        "MATRIX": matrix.view(np.uint8).reshape(strips, 8, -1, 16).swapaxes(1, 2),
    }


def in_factors(verb: str, h: Header) -> bool:
    """Whether a kernel rotates in factors: an encoder for which the matrix of two rounds is too large for shared memory."""
    return verb == "encode" and h.rounds == 2 and h.order > MOST_WHOLE


def columns_of(order: int) -> tuple[np.ndarray, np.ndarray]:
    """The strip that brings the sums of each of {i, h}, and the column in it: int [order / 8] each."""
    strips, each = order // 64, np.arange(order // BUTTERFLY)
    (quarter, m), h = divmod(each // 2, strips), each % 2
    paired = m < strips // 2 * 2
    return np.where(paired, m // 2 * 2 + h, m), 2 * quarter + np.where(paired, m % 2, h)


def _by_eights(places: np.ndarray) -> np.ndarray:
    """Places [.., 32 lanes] as uint16 [.. / 8, 32 lanes, 8]."""
    padded = np.pad(places, ((0, -len(places) % 8), (0, 0)))
    return padded.reshape(-1, 8, 32).swapaxes(1, 2).astype(np.uint16)


@lru_cache(maxsize=16)
def _exchange(order: int) -> tuple[np.ndarray, np.ndarray]:
    """Where numbers lie between the rounds, permuted by P: of [set, pair of strips] as they are put (where the last pair is one
    strip, it is there twice), and of [strip, half of the butterfly's numbers] as they are taken, each four matrices of eight
    rows, in bytes.

    Neither the eight rows that a matrix puts nor those that it takes meet in a bank.
    """
    strips, number = order // 64, np.arange(order)  # of the second round
    i, k = number // 16, number % 16 // 2
    taken_by, take = i // 4 * 8 + k, i % 4 * 2 + number % 2
    source = rotation.permutation(order)
    k = source % 16 // 2
    strip, put = (each[source // 16 * 2 + source % 2] for each in columns_of(order))
    put_by = k * strips + strip
    rows = LINE * taken_by + _colours(put_by, taken_by)
    puts, takes = np.empty((2, order // LINE, LINE), np.int64)
    puts[put_by, put] = takes[taken_by, take] = ROW * rows
    sets = puts.reshape(4, 2, strips, LINE).swapaxes(1, 2)  # of two of the butterfly's numbers
    sets = np.concatenate([sets, sets[:, -1:]], 1)[:, : strips + strips % 2]
    return sets.reshape(-1, 32), takes.reshape(-1, 32)


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
