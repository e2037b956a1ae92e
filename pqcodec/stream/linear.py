"""Law: what a header says of the linear stage (SPEC 18.2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.declared import table_name_problem
from pqcodec.errors import InvalidArgument, UnsupportedStream
from pqcodec.tensors.numbers import is_torch

LINEAR_NAMES = {
    c.LINEAR_CHANNELS: "channels",
    c.LINEAR_BLOCKS: "blocks",
    c.LINEAR_BASIS: "basis",
    c.LINEAR_SHARED: "shared basis",
}


@dataclass(frozen=True)
class LinearField:
    """The linear stage of a stream; its lists of channels, or its matrix, are a side section, unless a shared table has it."""

    kind: int
    width: int  # numbers of a row

    def to_bytes(self) -> bytes:
        """What stands in the header."""
        return c.LINEAR_STRUCT.pack(self.width, bytes(6))

    @classmethod
    def from_bytes(cls, kind: int, body: bytes, at: int) -> LinearField:
        """The stage from its bytes in a header; raises UnsupportedStream and struct.error."""
        width, reserved = c.LINEAR_STRUCT.unpack_from(body, at)
        if any(reserved):
            raise UnsupportedStream("header: the linear stage is such as this release does not know: install a newer pqcodec")
        return cls(kind, width)

    def body_bytes(self, numbers: int) -> int:
        """Bytes of a list of channels, or of the matrix, where the vectors of a row have so many numbers."""
        return {
            c.LINEAR_CHANNELS: 2 * self.width,
            c.LINEAR_BLOCKS: 2 * c.LINEAR_BLOCK**2,
            c.LINEAR_BASIS: 2 * self.width * numbers,
            c.LINEAR_SHARED: 0,
        }[self.kind]

    def problem(self, numbers: int) -> str:
        """What is wrong where the vectors of a row have so many numbers, or an empty string."""
        if not 1 <= self.width <= min(numbers, c.MAX_HEAD_DIM):
            return f"rows of {self.width} numbers of vectors of {numbers}; 1 .. {min(numbers, c.MAX_HEAD_DIM)} are possible"
        if self.kind == c.LINEAR_BLOCKS and (numbers % c.LINEAR_BLOCK or self.width != numbers):
            return f"blocks of {c.LINEAR_BLOCK} channels do not make rows of {self.width} numbers of vectors of {numbers}"
        return ""


@dataclass(frozen=True)
class SharedBasis:
    """The basis that a header names for its linear stage: that of a shared table, which is here or not."""

    name: bytes  # SHA-256 of the shared table
    matrix: np.ndarray | None = field(default=None, compare=False)  # float64 [width, numbers] of float16; None: not here

    @property
    def here(self) -> bool:
        """Whether the table is."""
        return self.matrix is not None

    def problem(self, width: int, numbers: int) -> str:
        """What is wrong with it for rows of ``width`` numbers of vectors of ``numbers``, or an empty string."""
        if problem := table_name_problem(self.name):
            return problem
        if self.matrix is not None and self.matrix.shape != (width, numbers):
            return f"a basis {self.matrix.shape}, where rows of {width} numbers are made of vectors of {numbers}"
        return ""


def half_matrix(name: str, given: Any) -> np.ndarray:
    """A matrix of numbers rounded to float16: float64 [rows, columns]; raises InvalidArgument."""
    found = np.asarray(given.detach().cpu().float() if is_torch(given) else given)
    if found.ndim != 2 or found.dtype.kind not in "fiu":
        raise InvalidArgument(f"{name} {found.dtype} {found.shape}: a matrix of numbers is expected")
    with np.errstate(over="ignore"):
        found = found.astype(np.float16).astype(np.float64)
    if not np.isfinite(found).all():
        raise InvalidArgument(f"{name} holds numbers that are not finite in float16")
    return found
