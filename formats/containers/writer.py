"""Law: a tensor that is to be written, whatever the container: said beforehand, made when its turn comes.

Containers write pieces and ask no more; so a cache that is encoded, one that is converted and one that is both look alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pqcodec.errors import InvalidArgument
from pqcodec.formats.containers.reader import Entry, TensorFile
from pqcodec.formats.plain import numbers as exact
from pqcodec.formats.plain.documents import tensor_problem
from pqcodec.stream.source import MemorySource, Source

COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class Coded:
    """The body of a coded tensor: its streams, one behind the other along the tokens."""

    streams: Sequence[Source]
    rel_mse: float | None = None  # where it was measured: squared error over squared norm

    @classmethod
    def of(cls, stream: bytes | bytearray | memoryview | np.ndarray, rel_mse: float | None = None) -> Coded:
        return cls([MemorySource(stream)], rel_mse)


@dataclass(frozen=True)
class Piece:
    """A tensor to write. ``body`` is called once, when its turn comes: it gives a ``Coded``, or the tensor itself."""

    name: str
    coded: bool
    layer: int | None
    role: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    body: Callable[[], Any]
    parts: int = 1  # streams of a coded tensor

    def plain(self) -> Any:
        """The body of an exact tensor; raises InvalidArgument where it is not what was said."""
        x = self.body()
        if (tuple(x.shape), exact.dtype_name(x)) != (self.shape, self.dtype):
            raise InvalidArgument(f"is {exact.dtype_name(x)} {tuple(x.shape)}, not {self.dtype} {self.shape}")
        return x


def check_pieces(pieces: Sequence[Piece]) -> None:
    """Raises InvalidArgument for a name, layer or role that no file may hold."""
    seen: set[str] = set()
    for piece in pieces:
        twice = "is given twice; names are unique" if piece.name in seen else ""
        if problem := twice or tensor_problem(piece.name, piece.layer, piece.role):
            raise InvalidArgument(f"tensor {piece.name!r}: {problem}")
        seen.add(piece.name)


def pieces_of(file: TensorFile) -> list[Piece]:
    """The tensors of an open file as they are: streams move byte for byte, exact tensors bit for bit."""
    return [_moved(file, file.entry(name)) for name in file.names]


def _moved(file: TensorFile, entry: Entry) -> Piece:
    def streams() -> Coded:
        return Coded([file.stream(entry.name, part) for part in range(entry.parts)], entry.rel_mse)

    body: Callable[[], Any] = streams if entry.coded else lambda: file.decode(entry.name)
    about = (entry.layer, entry.role, entry.shape, entry.dtype, entry.layout)
    return Piece(entry.name, entry.coded, *about, body, entry.parts)


def read_in_pieces(source: Source) -> Iterator[memoryview]:
    """All bytes of a source, some at a time."""
    for start in range(0, source.size, COPY_BYTES):
        yield source.read(start, min(COPY_BYTES, source.size - start)).data


def checked_rel_mse(value: object) -> float | None:
    """What a file says of an error that was measured; anything but a number from 0 is as if nothing was said."""
    return value if type(value) is float and math.isfinite(value) and value >= 0 else None
