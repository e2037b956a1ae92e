"""Law: what ``quads_encoder.cuh`` searches: the representatives of a table of quads, as macros and as arrays."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import quads
from pqcodec.codings.plan import Plan, plan_for
from pqcodec.stream.header import Header

# Levels of a quad's sorted magnitudes, by which cells are told apart; the last level has no end. STEPS stands for all
# magnitudes that are larger than REACH radii.
LEVELS, STEPS, REACH = (17, 17, 8, 4), 128, 3.4
WIDTH = REACH / STEPS * 8  # of a level, in radii
CANDIDATES = {4: 2, 5: 2, 6: 2, 7: 3, 8: 3, 9: 3, 10: 4}  # of a cell, by the bits of a table
GROUPED = 8  # bits up to which a cell's candidates are looked up together; more of them would make too many groups


class Copies(NamedTuple):
    """How many copies there are of what lanes look up at random places: with as many as lanes that read at once, none meet."""

    own: int  # of rows of ranks, and of corners
    groups: int  # of groups, at the most


ONE_COPY = Copies(1, 1)
COPIES = (Copies(32, 16), Copies(16, 16), Copies(8, 8), Copies(16, 4), Copies(8, 4), Copies(4, 4), Copies(2, 2), ONE_COPY)
FEW_COPIES = (ONE_COPY,)  # for few blocks: what is copied into shared memory first takes longer than what it then saves
COPY_MACROS = ("COPIES", "GROUP_COPIES")
FARTHEST = 1 << 16  # bytes from the first cell on, or from the first group, at which groups may begin
PATTERNS = 1 << (c.QUAD - 1)  # which neighbours of a representative's magnitudes are equal
FIRST_BITS, SCORE_AT = 10, 14  # fields of a candidate's word: at most so many bits of the first point; the pattern; the score


def encoder_tables(plan: Plan, copies: Copies = ONE_COPY, effort: str = "best") -> dict[str, np.ndarray]:
    """What the kernel looks up, as ``_grouped`` or ``_apart`` says, and

    RANKS uint8 [patterns, 16 places of the second and the third, copies, 4 places of the largest]: of a point behind the first;
    POINTS uint8 [points, 4]: where several radii are tried.
    """
    table = quads.table_of(plan)
    pattern, first, ranks = _ranks(table)
    half = np.rint((table.representatives**2).sum(1) / (2 * table.aim * REACH / STEPS)).astype(np.int64)
    search = _grouped if table.bits <= GROUPED else _apart
    return {
        **search(table, half, pattern << pattern_at(table.bits, copies) | first, copies),
        "RANKS": np.repeat(ranks.reshape(-1, 1, c.QUAD), copies.own, 1),
        **({"POINTS": table.points.view(np.uint8)} if len(c.QUADS_EFFORTS[effort]) > 1 else {}),
    }


def _grouped(table: quads.Table, half: np.ndarray, words: np.ndarray, copies: Copies) -> dict[str, np.ndarray]:
    """CELLS uint32 [cells]: where the cell's group of candidates begins, and the word of its first candidate; or, with one
    copy, which takes less room, uint16 [cells]: where in HEADS uint32 [groups] the same is; and GROUPS int32 [groups, copies,
    other candidates, 2]: magnitudes less those of the first, a signed byte each, the largest first, and the candidate's word
    with its score. Where they are not too many, groups lie among the cells that no quad has, and behind them, without GROUPS.

    Of representatives: ``half`` their squares, as steps of magnitudes are scored; ``words``: {pattern, first point}.
    """
    cells = cells_of(table.bits)[:, : CANDIDATES[table.bits]].astype(np.int64)
    groups, which = np.unique(cells, axis=0, return_inverse=True)
    apart = table.representatives[groups[:, 1:]] - table.representatives[groups[:, :1]]
    fields = _scored(apart, half[groups[:, 1:]] - half[groups[:, :1]], words[groups[:, 1:]])
    first, stored = words[groups[:, 0]] << 16, np.repeat(fields[:, None], group_copies(table.bits, copies), 1)
    begins = np.arange(len(groups)) * stored[0].nbytes
    if copies.own == 1:
        heads = (begins | first).astype(np.uint32)
        return {"CELLS": (4 * which.ravel()).astype(np.uint16), "HEADS": heads, "GROUPS": stored}
    among = _places_among_cells(stored[0].nbytes, len(groups))
    if among[-1] >= FARTHEST:
        assert begins[-1] < FARTHEST
        return {"CELLS": (begins | first).astype(np.uint32)[which.ravel()], "GROUPS": stored}
    found = np.zeros(max(4 * which.size, among[-1] + stored[0].nbytes), np.uint8).view(np.uint32)
    found[: which.size] = (among | first).astype(np.uint32)[which.ravel()]
    found[among[:, None] // 4 + np.arange(stored[0].nbytes // 4)] = stored.reshape(len(groups), -1).view(np.uint32)
    return {"CELLS": found}


def _places_among_cells(size: int, count: int) -> np.ndarray:
    """Bytes, ascending, at which ``count`` entries of ``size`` fit between cells that quads have, or behind all cells."""
    last, second, largest, third = np.indices((LEVELS[3], LEVELS[1], LEVELS[0], LEVELS[2]))
    taken = ((second <= largest) & (third <= second) & (last <= third)).ravel()
    apart = size // 4
    places = np.pad(taken, (0, -len(taken) % apart)).reshape(-1, apart)
    free = np.concatenate([np.flatnonzero(~places.any(axis=1)), len(places) + np.arange(count)])
    return free[:count] * size


def _apart(table: quads.Table, half: np.ndarray, words: np.ndarray, copies: Copies) -> dict[str, np.ndarray]:
    """CELLS uint8 [cells, 4 candidates], and CORNERS int32 [representatives, copies, 2]: magnitudes and words as in groups."""
    fields = _scored(table.representatives, half, words)
    return {"CELLS": cells_of(table.bits), "CORNERS": np.repeat(fields[:, None], copies.own, 1)}


def _scored(magnitudes: np.ndarray, score: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Magnitudes int8 [..., 4], and a score and a word of each -> int32 [..., 2]."""
    most = np.abs(score) + STEPS * np.abs(magnitudes.astype(np.int64)).sum(-1)
    assert most.max() < 1 << 31 - SCORE_AT
    return np.stack([magnitudes.astype(np.int8).view(np.int32)[..., 0], score << SCORE_AT | words], -1).astype(np.int32)


def group_copies(bits: int, copies: Copies) -> int:
    """Copies of a group's words: no more than there are lanes whose words are read at once."""
    return min(copies.groups, 16 // (CANDIDATES[bits] - 1))


def pattern_at(bits: int, copies: Copies) -> int:
    """Where a candidate's word has the pattern: where it is a place among the ranks, in bytes, if ``bits`` have room below."""
    place = (16 * c.QUAD * copies.own).bit_length() - 1
    return place if place >= bits else FIRST_BITS + 1


def own_copies(few: bool) -> tuple[Copies, ...]:
    """How many copies of a lane's own tables are tried, from the quickest on."""
    return FEW_COPIES if few else COPIES


def _ranks(table: quads.Table) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each representative's pattern and first point, and how far behind it a point is, uint8 [patterns, 64 places].

    Points stand in the order of their coordinates, so that the pattern tells it.
    """
    equal = np.diff(table.representatives, axis=1) == 0
    pattern = equal @ (1 << np.arange(c.QUAD - 1))
    key = np.arange(4 ** (c.QUAD - 1))
    three = key[:, None] >> np.array([0, 2, 4]) & 3
    apart = (three[:, 0] != three[:, 1]) & (three[:, 1] != three[:, 2]) & (three[:, 0] != three[:, 2])
    numbers = table.numbers_by_three.astype(np.int64)
    first = np.where(apart, numbers, 1 << FIRST_BITS).min(1)
    ranks = np.zeros((PATTERNS, len(key)), np.uint8)
    ranks[pattern] = np.where(apart, numbers - first[:, None], 0)
    return pattern, first, ranks


@lru_cache(maxsize=16)
def cells_of(bits: int) -> np.ndarray:
    """The candidates of every cell: those representatives that are nearest most often, uint8 [cells, 4].

    Found for sorted magnitudes a quarter of a level apart, the large ones further, with the density that the rotation gives
    them. Levels count in the order third, largest, second, last: the first two spread over most banks.
    """
    table = quads.points_of(bits)
    grid = np.concatenate([np.arange(0.125, 16, 0.25), np.arange(18.0, 32, 4)]) * WIDTH * table.aim  # in units of the table
    spacing = np.gradient(grid)
    count, size = len(table.representatives), int(np.prod(LEVELS))
    half, weight = (table.representatives**2).sum(1) / 2, np.zeros(size * count)
    third, last = np.tril_indices(len(grid))
    for second in range(len(grid)):  # all magnitudes that descend
        smaller = third <= second
        pairs = np.stack([third[smaller], last[smaller]], 1)
        larger = np.arange(second, len(grid))
        places = np.empty((len(larger), len(pairs), c.QUAD), np.int64)
        places[..., 0], places[..., 1], places[..., 2:] = larger[:, None], second, pairs
        x = grid[places].reshape(-1, c.QUAD)
        level = np.minimum(x // (WIDTH * table.aim), np.array(LEVELS) - 1).astype(np.int64)
        nearest = (x @ table.representatives.T - half).argmax(1)
        weights = spacing[places].prod(-1).ravel() * np.exp(-(x * x).sum(1) / (2 * table.aim**2))
        weight += np.bincount(np.ravel_multi_index(tuple(level.T), LEVELS) * count + nearest, weights, size * count)
    total = weight.reshape(size, count)
    total = total.reshape(*LEVELS, count).transpose(3, 1, 0, 2, 4).reshape(size, count)  # the third's level is the lowest
    best = np.argsort(-total, axis=1, kind="stable")[:, :4]
    found = np.take_along_axis(total, best, 1) > 0
    return np.where(found, best, best[:, :1]).astype(np.uint8)  # where there are fewer, the first again


def encoder_definitions(h: Header, effort: str, copies: Copies) -> dict[str, Any]:
    """The macros of ``quads_encoder.cuh`` and ``planes.cuh``; ``copies``: of a lane's own tables."""
    table = quads.table_of(plan_for(h))
    least, most = c.QUADS_RADII
    return {
        "INDEX_BITS": table.bits,
        "INDEX_BYTES": quads.plane_bytes(h.order, table.bits)[1],
        "CANDIDATES": CANDIDATES[table.bits],
        "GROUP_COPIES": group_copies(table.bits, copies),
        "GROUPED": int(table.bits <= GROUPED),
        "STEPS": STEPS,
        "CELL_BYTES": 2 if copies.own == 1 and table.bits <= GROUPED else 4,
        "LARGEST_LEVEL": LEVELS[2],  # cells from one level to the next
        "SECOND_LEVEL": LEVELS[2] * LEVELS[0],
        "LAST_LEVEL": LEVELS[2] * LEVELS[0] * LEVELS[1],
        "FIRST_BITS": min(FIRST_BITS, pattern_at(table.bits, copies)),
        "PATTERN_AT": pattern_at(table.bits, copies),
        "SCORE_AT": SCORE_AT,
        "INVERSE": f"{1 / (2 * h.order * REACH)!r}f",
        "UNIT": f"{1 / (2 * table.aim * REACH)!r}f",
        "CHOICES": len(c.QUADS_EFFORTS[effort]),
        "LEAST": f"({least})",
        "MOST_RADIUS": most - least + 1,
        "ENERGY_ORDERS": 3,  # a radius is a root of a mean square
        "ENERGY_SCALE": f"{(2.0 ** (h.order.bit_length() - 1) / h.order) ** 3!r}f",
        "RADIUS_BIAS": -least // c.QUADS_RADIUS_STEPS,
        "RADIUS_BITS": (most - least + 1).bit_length(),
        "RADIUS_STEPS": c.QUADS_RADIUS_STEPS,
    }
