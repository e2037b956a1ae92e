"""Law: the stages that keep a side section, in the order of the sections; one table, an entry a stage.

How a stage changes the numbers that are coded is its own module's business, and the kernels': offsets are subtracted and added
there, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from pqcodec.stages import exact, keep
from pqcodec.stream import sections
from pqcodec.stream.header import Header
from pqcodec.stream.report import Damage
from pqcodec.stream.sections import SideSection
from pqcodec.stream.source import Source
from pqcodec.tensors.rows import Values

Place = Callable[[Source, Header, Values | None, tuple[int, int], tuple[int, int], list[Damage]], None]


@dataclass(frozen=True)
class Kept:
    """What an encoder on the host keeps beside the coded rows."""

    values: Values  # the tensor, or what is kept of it
    halves: np.ndarray  # float16 [leading, head_dim]: stored offsets, or [leading, 0]
    rows: np.ndarray  # int64 [n]: rows of exact vectors
    positions: np.ndarray  # uint32 [1 or leading, n]: keep lists, or [0, 0]


@dataclass(frozen=True)
class Stage:
    """A stage with a section of its own."""

    section: SideSection
    bodies: Callable[[Header, Kept], Iterable[bytes]]  # one an entry
    place: Place | None = None  # check the section, and copy it into the result; None: kernels need it
    over_rows: bool = False  # whether ``place`` overwrites what rows decode to, and so comes after them


STAGES = (
    Stage(sections.KEEP, lambda h, kept: keep.bodies(h, kept.positions)),
    Stage(sections.OFFSETS, lambda h, kept: (half.astype("<f2").tobytes() for half in kept.halves)),
    Stage(sections.EXACT_TOKENS, lambda h, kept: exact.first_bodies(h, kept.values), exact.place_first),
    Stage(sections.EXACT_LAST, lambda h, kept: exact.last_bodies(h, kept.values), exact.place_last),
    Stage(
        sections.EXACT_VECTORS,
        lambda h, kept: (exact.vectors_body(kept.rows, exact.vectors_of(h, kept.values, kept.rows)),),
        exact.place_vectors,
        over_rows=True,
    ),
)
