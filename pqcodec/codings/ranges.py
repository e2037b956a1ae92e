"""Law: affine fields that a shared table has for all tokens (SPEC 13.4): those of each head, as they stand in blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.declared import Affine, table_name_problem
from pqcodec.errors import InvalidArgument
from pqcodec.stream.orders import whole_groups


@dataclass(frozen=True, eq=False)
class Ranges:
    """The fields of every head's groups of channels; read-only. Raises InvalidArgument.

    ``halves``: float16 [heads, fields, groups], the scales of all groups, then their zeros if they have any. ``width``: numbers
    of a row, of which ``channels`` are a group.
    """

    halves: np.ndarray
    width: int
    channels: int

    def __post_init__(self) -> None:
        if problem := _problem(self.halves, self.width, self.channels):
            raise InvalidArgument(f"ranges: {problem}")
        kept = np.ascontiguousarray(self.halves, "<f2").copy()
        kept.flags.writeable = False
        object.__setattr__(self, "halves", kept)

    @property
    def heads(self) -> int:
        """Heads, or other leading indices of rows, that have fields of their own."""
        return self.halves.shape[0]

    @property
    def fields(self) -> int:
        """Which fields: AFFINE_SCALE or AFFINE_SCALE_ZERO, which are how many, too."""
        return self.halves.shape[1]

    @property
    def bytes(self) -> np.ndarray:
        """All heads' fields as they stand in a block: uint8 [heads, bytes]."""
        return self.halves.reshape(self.heads, -1).view(np.uint8)


def _problem(halves: np.ndarray, width: int, channels: int) -> str:
    if halves.ndim != 3 or halves.dtype != np.float16:
        return f"{halves.dtype} {halves.shape}: float16 [heads, fields, groups] is expected"
    heads, fields, groups = halves.shape
    if not (1 <= heads <= c.MAX_RANGE_HEADS and 1 <= width <= c.MAX_HEAD_DIM and 1 <= channels <= c.MAX_HEAD_DIM):
        return f"{heads} heads, rows of {width} numbers, groups of {channels} channels: 1 .. 1024 of each are possible"
    if fields not in (c.AFFINE_SCALE, c.AFFINE_SCALE_ZERO) or groups != -(-whole_groups(width) // channels):
        return f"{fields} fields of {groups} groups, where rows of {width} numbers have groups of {channels} channels"
    return "" if np.isfinite(halves).all() else "a field is not finite"


@dataclass(frozen=True)
class SharedRanges:
    """The ranges that a header names for its coding: those of a shared table, which is here or not."""

    name: bytes  # SHA-256 of the shared table
    ranges: Ranges | None = field(default=None, compare=False)  # None: not here

    @property
    def here(self) -> bool:
        """Whether the table is."""
        return self.ranges is not None

    def problem(self, leading: int, width: int, affine: Affine) -> str:
        """What is wrong with it for rows of ``width`` numbers of so many leading indices, or an empty string."""
        if problem := table_name_problem(self.name):
            return problem
        if self.ranges is None:
            return ""
        there = (self.ranges.width, self.ranges.channels, self.ranges.fields)
        if there != (width, affine.channels, affine.fields):
            has, needs = (
                f"{numbers} numbers, groups of {channels} channels and {fields} fields"
                for numbers, channels, fields in (there, (width, affine.channels, affine.fields))
            )
            return f"ranges of rows of {has}, where rows have {needs}"
        if leading % self.ranges.heads:
            return f"ranges of {self.ranges.heads} heads, of which {leading} leading indices of rows are no multiple"
        return ""
