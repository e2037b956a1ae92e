"""Law: what ``quads_encoder.cuh`` searches: the representatives of a table of quads, as macros and as arrays."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import quads
from pqcodec.codings.plan import Plan, plan_for
from pqcodec.stream.header import Header

# Magnitudes are whole numbers of STEPS, which stands for all that are larger than REACH radii. MOST: the largest of each of a
# quad's sorted ones that cells tell apart.
STEPS, REACH, MOST = 128, 3.4, (128, 128, 63, 31)
# Of a cell, by the bits of a table. Two are a group: one look-up, behind the cell's, brings all that decides between them.
CANDIDATES = {4: 2, 5: 2, 6: 2, 7: 2, 8: 2, 9: 3, 10: 4}


class Cells(NamedTuple):
    """How wide a cell is, in steps of each sorted magnitude, and how many places lie from one level of it to the next.

    Strides are such that no two cells of magnitudes that descend lie in one place, few places are left between them, and lanes
    meet in few banks. The kernel takes for granted what ``weights`` asserts.
    """

    widths: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]

    def places(self, steps: np.ndarray) -> np.ndarray:
        """Of quads' magnitudes [..., 4] in steps, the largest first."""
        return np.minimum(steps, MOST).astype(np.int64) // self.widths @ np.array(self.strides)

    def weights(self, size: int) -> tuple[int, ...]:
        """What each magnitude's level, in steps, counts in the place of a cell of ``size`` bytes; the third's, in levels."""
        units = (*self.widths[:2], size, self.widths[3])
        assert self.widths[2:] == (8, 8)
        assert self.strides[2] == 1
        assert all(size * stride % unit == 0 for stride, unit in zip(self.strides, units, strict=True))
        return tuple(size * stride // unit for stride, unit in zip(self.strides, units, strict=True))

    def taken(self) -> np.ndarray:
        """Which places cells of magnitudes that descend have, bool."""
        levels = np.indices([most // width + 1 for most, width in zip(MOST, self.widths, strict=True)]).reshape(4, -1).T
        low = levels * self.widths
        descends = (low[:, 1:] <= (low + self.widths)[:, :-1] - 1).all(1)
        places = self.places(low[descends])
        assert len(np.unique(places)) == len(places)
        return np.bincount(places) > 0


CELLS = (
    Cells((4, 8, 8, 8), (29, 736, 1, 36)),
    Cells((8, 8, 8, 8), (14, 350, 1, 178)),
    Cells((8, 8, 8, 8), (8, 136, 1, 2312)),  # two bytes a cell ask for strides that four divides, but for the third
)
FINE, COARSE, SHORT = range(len(CELLS))


class Copies(NamedTuple):
    """How many copies there are of what lanes look up at random places: with as many as lanes that read at once, none meet."""

    own: int  # of rows of ranks, and of corners
    groups: int
    cells: int  # which of CELLS there is one copy of


ONE_COPY = Copies(1, 1, SHORT)
COPIES = (
    *(Copies(*both, cells) for both in ((32, 16), (16, 16)) for cells in (FINE, COARSE)),
    *(Copies(*both, COARSE) for both in ((8, 8), (16, 4), (8, 4), (4, 4), (2, 2))),
    ONE_COPY,
)
FEW_COPIES = (ONE_COPY,)  # for few blocks: what is copied into shared memory first takes longer than what it then saves
COPY_MACROS = ("COPIES", "GROUP_COPIES", "CELLS_KIND")
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
    search = _grouped if CANDIDATES[table.bits] == 2 else _apart
    return {
        **search(table, half, pattern << pattern_at(table.bits, copies) | first, copies),
        "RANKS": np.repeat(ranks.reshape(-1, 1, c.QUAD), copies.own, 1),
        **({"POINTS": table.points.view(np.uint8)} if len(c.QUADS_EFFORTS[effort]) > 1 else {}),
    }


def _grouped(table: quads.Table, half: np.ndarray, words: np.ndarray, copies: Copies) -> dict[str, np.ndarray]:
    """CELLS uint32 [places]: where the cell's group of two candidates begins, and the word of the first one; or, with one copy,
    which takes less room, uint16 [places]: where in HEADS uint32 [groups] the same is; and GROUPS int32 [groups, copies, 2]: of
    the second one, magnitudes less those of the first, a signed byte each, the largest first, and its word with its score.
    Where they are not too many, groups lie among the cells that no quad has, and behind them, without GROUPS.

    Of representatives: ``half`` their squares, as steps of magnitudes are scored; ``words``: {pattern, first point}.
    """
    cells = np.sort(cells_of(table.bits, CELLS[copies.cells])[:, :2].astype(np.int64), axis=1)
    groups, which = np.unique(cells, axis=0, return_inverse=True)
    one, two = groups.T
    fields = _scored(table.representatives[two] - table.representatives[one], half[two] - half[one], words[two])
    first, stored = words[one] << 16, np.repeat(fields[:, None], copies.groups, 1)
    begins = np.arange(len(groups)) * stored[0].nbytes
    if copies.own == 1:
        assert begins[-1] < FARTHEST
        heads = (begins | first).astype(np.uint32)
        return {"CELLS": (4 * which.ravel()).astype(np.uint16), "HEADS": heads, "GROUPS": stored}
    among = _places_among_cells(CELLS[copies.cells], stored[0].nbytes, len(groups))
    if among[-1] >= FARTHEST:
        assert begins[-1] < FARTHEST
        return {"CELLS": (begins | first).astype(np.uint32)[which.ravel()], "GROUPS": stored}
    found = np.zeros(max(4 * which.size, among[-1] + stored[0].nbytes), np.uint8).view(np.uint32)
    found[: which.size] = (among | first).astype(np.uint32)[which.ravel()]
    found[among[:, None] // 4 + np.arange(stored[0].nbytes // 4)] = stored.reshape(len(groups), -1).view(np.uint32)
    return {"CELLS": found}


def _places_among_cells(cells: Cells, size: int, count: int) -> np.ndarray:
    """Bytes, ascending, at which ``count`` entries of ``size`` fit between cells that quads have, or behind all cells."""
    taken, apart = cells.taken(), size // 4
    places = np.pad(taken, (0, -len(taken) % apart)).reshape(-1, apart)
    free = np.concatenate([np.flatnonzero(~places.any(axis=1)), len(places) + np.arange(count)])
    return free[:count] * size


def _apart(table: quads.Table, half: np.ndarray, words: np.ndarray, copies: Copies) -> dict[str, np.ndarray]:
    """CELLS uint8 [places, 4 candidates], and CORNERS int32 [representatives, copies, 2]: magnitudes and words as in groups."""
    fields = _scored(table.representatives, half, words)
    return {"CELLS": cells_of(table.bits, CELLS[copies.cells]), "CORNERS": np.repeat(fields[:, None], copies.own, 1)}


def _scored(magnitudes: np.ndarray, score: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Magnitudes int8 [..., 4], and a score and a word of each -> int32 [..., 2]."""
    most = np.abs(score) + STEPS * np.abs(magnitudes.astype(np.int64)).sum(-1)
    assert most.max() < 1 << 31 - SCORE_AT
    return np.stack([magnitudes.astype(np.int8).view(np.int32)[..., 0], score << SCORE_AT | words], -1).astype(np.int32)


def pattern_at(bits: int, copies: Copies) -> int:
    """Where a candidate's word has the pattern: where it is a place among the ranks, in bytes, if ``bits`` have room below."""
    place = (16 * c.QUAD * copies.own).bit_length() - 1
    return place if place >= bits else FIRST_BITS + 1


def own_copies(few: bool) -> tuple[Copies, ...]:
    """How many copies of a lane's own tables are tried, from the quickest and most exact on."""
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


@lru_cache(maxsize=32)
def cells_of(bits: int, cells: Cells) -> np.ndarray:
    """The candidates of the cell in every place: those representatives that are nearest most often, uint8 [places, 4].

    Found for sorted magnitudes two steps apart, the large ones further, with the density that the rotation gives them.
    """
    table = quads.points_of(bits)
    steps = np.concatenate([np.arange(1.0, STEPS, 2), np.arange(18.0, 32, 4) * 8])
    grid, spacing = steps * (REACH / STEPS * table.aim), np.gradient(steps)  # in units of the table
    count, size = len(table.representatives), len(cells.taken())
    half, weight = (table.representatives**2).sum(1) / 2, np.zeros(size * count)
    third, last = np.tril_indices(len(grid))
    for second in range(len(grid)):  # all magnitudes that descend
        smaller = third <= second
        pairs = np.stack([third[smaller], last[smaller]], 1)
        larger = np.arange(second, len(grid))
        each = np.empty((len(larger), len(pairs), c.QUAD), np.int64)
        each[..., 0], each[..., 1], each[..., 2:] = larger[:, None], second, pairs
        x = grid[each].reshape(-1, c.QUAD)
        nearest = (x @ table.representatives.T - half).argmax(1)
        weights = spacing[each].prod(-1).ravel() * np.exp(-(x * x).sum(1) / (2 * table.aim**2))
        weight += np.bincount(cells.places(steps[each].reshape(-1, c.QUAD)) * count + nearest, weights, size * count)
    total = weight.reshape(size, count)
    best = np.argsort(-total, axis=1, kind="stable")[:, :4]
    found = np.take_along_axis(total, best, 1) > 0
    return np.where(found, best, best[:, :1]).astype(np.uint8)  # where there are fewer, the first again


def encoder_definitions(h: Header, effort: str, copies: Copies) -> dict[str, Any]:
    """The macros of ``quads_encoder.cuh`` and ``planes.cuh``; ``copies``: of a lane's own tables."""
    table, cells = quads.table_of(plan_for(h)), CELLS[copies.cells]
    least, most = c.QUADS_RADII
    size = 2 if copies.own == 1 and CANDIDATES[table.bits] == 2 else 4  # bytes of a cell
    largest, second, third, last = cells.weights(size)
    return {
        "INDEX_BITS": table.bits,
        "INDEX_BYTES": quads.plane_bytes(h.order, table.bits)[1],
        "CANDIDATES": CANDIDATES[table.bits],
        "GROUP_COPIES": copies.groups,
        "STEPS": STEPS,
        "CELL_BYTES": size,
        "LARGER_LEVELS": f"{(256 - cells.widths[0] | (256 - cells.widths[1]) << 8) * 0x10001:#x}u",
        "LARGEST_WEIGHT": largest,
        "SECOND_WEIGHT": second,
        "THIRD_WEIGHT": third,
        "LAST_WEIGHT": last,
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
