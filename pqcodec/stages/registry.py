"""Law: the stages that keep a side section, in the order of the sections; one table, an entry a stage.

How a stage changes the numbers that are coded is its own module's business, and the kernels': offsets are subtracted and added
there, row by row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from pqcodec.stages import exact, keep
from pqcodec.stages.linear import Linear
from pqcodec.stream import sections
from pqcodec.stream.header import Header
from pqcodec.stream.report import Damage
from pqcodec.stream.sections import SideSection
from pqcodec.stream.source import Source
from pqcodec.tensors.rows import Values

Together = Callable[[Sequence[Source], Sequence[Header], Sequence[Values], list[Damage]], None]
Place = Callable[[Source, Header, Values | None, tuple[int, int], tuple[int, int], list[Damage]], None]


@dataclass(frozen=True)
class Kept:
    """What an encoder on the host keeps beside the coded rows."""

    values: Values  # the tensor, or what is kept of it
    halves: np.ndarray  # float16 [leading, head_dim]: stored offsets, or [leading, 0]
    rows: np.ndarray  # int64 [n]: rows of exact vectors
    positions: np.ndarray  # uint32 [1 or leading, n]: keep lists, or [0, 0]
    linear: Linear | None = None


@dataclass(frozen=True)
class Stage:
    """A stage with a section of its own."""

    section: SideSection
    bodies: Callable[[Header, Kept], Iterable[bytes]]  # one an entry
    place: Place | None = None  # check the section, and copy it into the result; None: kernels need it
    over_rows: bool = False  # whether ``place`` overwrites what rows decode to, and so comes after them
    together: Together | None = None  # ``place`` of many whole streams, where that is quicker at once

    def place_all(
        self, sources: Sequence[Source], headers: Sequence[Header], outs: Sequence[Values], damage: list[Damage]
    ) -> None:
        """``place`` of many whole streams."""
        if self.together:
            return self.together(sources, headers, outs, damage)
        for source, h, out in zip(sources, headers, outs, strict=True):
            if self.place and self.section.there(h):
                self.place(source, h, out, (0, h.tokens), (0, h.leading), damage)
        return None


STAGES = (
    Stage(sections.KEEP, lambda h, kept: keep.bodies(h, kept.positions)),
    Stage(sections.LINEAR, lambda h, kept: kept.linear.bodies() if kept.linear else ()),
    Stage(sections.OFFSETS, lambda h, kept: (half.astype("<f2").tobytes() for half in kept.halves)),
    Stage(
        sections.EXACT_TOKENS,
        lambda h, kept: exact.first_bodies(h, kept.values),
        exact.place_first,
        together=exact.place_first_together,
    ),
    Stage(sections.EXACT_LAST, lambda h, kept: exact.last_bodies(h, kept.values), exact.place_last),
    Stage(
        sections.EXACT_VECTORS,
        lambda h, kept: (exact.vectors_body(kept.rows, exact.vectors_of(h, kept.values, kept.rows)),),
        exact.place_vectors,
        over_rows=True,
    ),
)
