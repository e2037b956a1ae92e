"""Law: codebooks of vectors (SPEC 20.2): entries of every stage, the channels of groups, what a header knows of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.declared import table_name_problem
from pqcodec.errors import InvalidArgument

LANES = 16  # entries side by side in ``Book.by_lanes``


@dataclass(frozen=True, eq=False)
class Book:
    """The entries of one stage, in the forms that a search takes: float32 [2^bits, channels of a group]."""

    entries: np.ndarray

    @cached_property
    def halves(self) -> np.ndarray:
        """Half the squared norm of each entry, float32 [2^bits]."""
        return np.cumsum(self.entries.astype(np.float64) ** 2, 1)[:, -1].astype(np.float32) * np.float32(0.5)

    @cached_property
    def by_lanes(self) -> np.ndarray:
        """Sixteen entries at a time, coordinate by coordinate: float32, flat [2^bits / 16, channels, 16]."""
        return np.ascontiguousarray(self.entries.reshape(-1, LANES, self.entries.shape[1]).swapaxes(1, 2)).reshape(-1)


@dataclass(frozen=True, eq=False)
class Vectors:
    """The codebooks of all stages of residual VQ, and the channels of groups; read-only. Raises InvalidArgument.

    ``entries``: float16 [stages, 2^bits, channels of a group]. ``channels``: uint16 [head_dim], the channels of group 0, then
    those of group 1, and so on: each channel once.
    """

    entries: np.ndarray
    channels: np.ndarray

    def __post_init__(self) -> None:
        if problem := _problem(self.entries, self.channels):
            raise InvalidArgument(f"codebooks: {problem}")
        for name in ("entries", "channels"):
            kept = getattr(self, name).copy()
            kept.flags.writeable = False
            object.__setattr__(self, name, kept)

    @property
    def stages(self) -> int:
        """Stages, each with a codebook of its own."""
        return len(self.entries)

    @property
    def index_bits(self) -> int:
        """Bits of an index: a codebook has 2 to the power of them entries."""
        return self.entries.shape[1].bit_length() - 1

    @property
    def head_dim(self) -> int:
        """Numbers of a vector that they code."""
        return len(self.channels)

    @property
    def groups(self) -> int:
        """Groups of a vector's channels."""
        return self.head_dim // self.entries.shape[2]

    def row_bits(self, stages: int) -> int:
        """Bits of a row that is coded by the first ``stages`` stages."""
        return c.RESIDUAL_SCALE_BITS + stages * self.groups * self.index_bits

    @cached_property
    def books(self) -> tuple[Book, ...]:
        """The codebook of each stage."""
        return tuple(Book(entries.astype(np.float32)) for entries in self.entries)

    @cached_property
    def flat(self) -> np.ndarray:
        """All entries one behind the other: float32 [stages * 2^bits * channels of a group]."""
        return self.entries.astype(np.float32).reshape(-1)


def _problem(entries: np.ndarray, channels: np.ndarray) -> str:
    if entries.ndim != 3 or entries.dtype != np.float16 or channels.ndim != 1 or channels.dtype != np.uint16:
        return f"entries {entries.dtype} {entries.shape}: float16 [stages, entries, channels of a group] is expected"
    stages, count, width = entries.shape
    if stages not in c.RESIDUAL_STAGES or count not in [1 << bits for bits in c.RESIDUAL_INDEX_BITS]:
        return f"{stages} stages of {count} entries: 1 .. 8 stages of 16, 32 .. or 4096 entries are possible"
    if width not in c.RESIDUAL_GROUPS or len(channels) % width or not 0 < len(channels) <= c.MAX_HEAD_DIM:
        return f"groups of {width} channels at head_dim {len(channels)}: 8, 16, 32 or 64 that divide it are possible"
    if not np.array_equal(np.sort(channels), np.arange(len(channels))):
        return f"groups do not hold each of {len(channels)} channels once"
    return "" if np.isfinite(entries).all() else "an entry is not finite"


@dataclass(frozen=True)
class VectorCodebook:
    """The codebooks that a header names for its coding: those of a shared table, which is here or not."""

    name: bytes  # SHA-256 of the shared table
    vectors: Vectors | None = field(default=None, compare=False)  # None: not here

    @property
    def here(self) -> bool:
        """Whether the table is."""
        return self.vectors is not None

    @property
    def header_bytes(self) -> int:
        """What it takes in a header."""
        return len(self.name)

    def problem(self, head_dim: int, row_bits: int, stages: int) -> str:
        """What is wrong with it for rows of so many bits and stages, or an empty string."""
        if problem := table_name_problem(self.name):
            return problem
        if self.vectors is None:
            return ""
        if self.vectors.head_dim != head_dim:
            return f"codebooks for head_dim {self.vectors.head_dim}, where vectors have {head_dim} numbers"
        if self.vectors.stages < stages or self.vectors.row_bits(stages) != row_bits:
            has = f"{self.vectors.stages} stages, {self.vectors.groups} groups and indices of {self.vectors.index_bits} bits"
            return f"codebooks of {has}, where rows of {stages} stages have {row_bits} bits"
        return ""
