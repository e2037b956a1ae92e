"""Law: a block of a pool: what it holds, where its bytes are, who needs them there, and how they lie on disk."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pqcodec.errors import CorruptStream
from pqcodec.formats.containers.pqkv.file import PQKVFile, PQKVWriter
from pqcodec.formats.offload.pieces import Layout
from pqcodec.formats.offload.pinned import PinnedSlice
from pqcodec.formats.offload.pipeline import Transfer


@dataclass
class Block:
    """``devices``: that of each tensor when it was put."""

    key: Hashable
    layout: Layout
    devices: tuple[Any, ...]
    single: bool  # one tensor was put, not a list
    slices: list[PinnedSlice] | None = None
    path: Path | None = None  # of its bytes on disk
    put: Transfer | None = None  # until it is known to be sound
    before: Block | None = None  # what it replaces, until then
    users: int = 0  # calls that need it where it is
    reads: list[Transfer] = field(default_factory=list)
    staged: list[Any] | None = None  # its pieces on the devices that they came from

    @property
    def hosts(self) -> list[Any]:
        return [part.tensor for part in self.slices or ()]

    def write(self, path: Path) -> None:
        """All streams to a .pqkv file; raises OSError."""
        number = 0
        with PQKVWriter(path, {"key": repr(self.key)}) as writer:
            for piece, host in zip(self.layout.pieces, self.hosts, strict=True):
                rows = host.numpy()
                for part in piece.parts:
                    stream = rows[part.place : part.place + part.header.stream_bytes]
                    writer.add_stream(str(number), stream)
                    number += 1

    def read(self, path: Path, slices: Sequence[PinnedSlice]) -> None:
        """All streams of its file into memory; raises OSError and CorruptStream."""
        number = 0
        with PQKVFile(path) as file:
            for piece, host in zip(self.layout.pieces, slices, strict=True):
                rows = host.tensor.numpy()
                for part in piece.parts:
                    source = file.stream(str(number))
                    if source.size != part.header.stream_bytes:
                        raise CorruptStream(f"{path}: stream {number} has {source.size} bytes, not {part.header.stream_bytes}")
                    rows[part.place : part.place + source.size] = np.asarray(source.read(0, source.size))
                    number += 1
