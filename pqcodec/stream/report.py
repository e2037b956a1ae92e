"""Law: what is said of a stream: what ``inspect`` tells of it, and which of its parts are damaged."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pqcodec.errors import CorruptStream


@dataclass(frozen=True)
class StreamInfo:
    """What ``inspect`` tells of a stream; sizes in bytes.

    >>> import numpy as np, pqcodec
    >>> data = pqcodec.encode(np.ones((8, 100, 128), np.float16), preset="pq2.5", center="mean", backend="reference")
    >>> info = pqcodec.inspect(data)
    >>> info.preset, info.shape, info.centered, round(info.ratio, 2)
    ('pq2.5', (8, 100, 128), 'mean', 5.98)
    """

    version: int
    preset: str | None
    coding: str
    dtype: str
    shape: tuple[int, ...]  # with a keep list that of the kept tokens
    seed: int
    rounds: int  # of the rotation
    centered: str | None
    exact_tokens: int
    exact_last: int
    exact_vectors: int
    chunk_tokens: int
    order: int
    stream_bytes: int
    header_bytes: int
    side_bytes: int  # keep lists, offsets, exact first and last tokens, exact vectors
    payload_bytes: int
    tensor_bytes: int
    group: tuple[int, int] | None = None  # tokens and channels that share affine fields
    pairing: str | None = None  # of the channels of pair polar coding
    kept_of: int | None = None  # tokens of the tensor of which ``shape`` holds some; None: it holds all
    outliers: int = 0  # numbers at each end of a whole group's range that are kept apart
    levels: tuple[float, ...] | None = None  # of the codes, where the stream brings them or its shared table is here
    table: str | None = None  # SHA-256 of the shared table that holds levels or codebooks, as hexadecimal digits
    before_rope: bool = False  # whether vectors are coded as they were before RoPE
    joined_heads: int | None = None  # heads whose vectors are coded as one
    linear: str | None = None  # "channels", "blocks", "basis" or "shared basis": how rows are made of vectors
    basis_table: str | None = None  # likewise of that which holds the basis
    range_table: str | None = None  # of that which holds scales and zeros
    width: int = 0  # numbers of a row
    estimate_error: float | None = None  # of a sketch, which tells inner products only: about the relMSE of a decoded vector

    @property
    def tables(self) -> tuple[str, ...]:
        """SHA-256 of all shared tables that it needs, as hexadecimal digits."""
        return tuple(name for name in (self.table, self.basis_table, self.range_table) if name)

    @property
    def ratio(self) -> float:
        """How many times smaller the stream is than the tensor, tokens that were not kept included."""
        return self.tensor_bytes / self.stream_bytes

    @property
    def bits_per_coordinate(self) -> float:
        """All bytes of the stream over all coordinates of ``shape``."""
        return 8 * self.stream_bytes / max(math.prod(self.shape), 1)


@dataclass(frozen=True)
class Damage:
    """A part of a stream whose checksum does not hold; ``leading`` and ``tokens`` are None where all are concerned.

    >>> print(Damage("payload", 3, (64, 128)))
    payload, leading index 3, tokens 64 .. 127
    """

    part: str  # "keep list", "offset", "exact tokens", "exact last tokens", "exact vectors" or "payload"
    leading: int | None
    tokens: tuple[int, int] | None

    def __str__(self) -> str:
        lead = "" if self.leading is None else f", leading index {self.leading}"
        tokens = "" if self.tokens is None else f", tokens {self.tokens[0]} .. {self.tokens[1] - 1}"
        return f"{self.part}{lead}{tokens}"


def damage_error(damage: list[Damage]) -> CorruptStream:
    """The error for damaged parts: it names the first one and counts the others."""
    more = f" and {len(damage) - 1} more places" if damage[1:] else ""
    return CorruptStream(f"checksum does not hold: {damage[0]}{more}")
