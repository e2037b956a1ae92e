"""Law: one block of a pool: what it holds, where its bytes are, which transfers use them, and how they are stored on disk."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pqcodec.errors import CorruptStream
from pqcodec.formats.containers.pqkv.file import PQKVFile, PQKVWriter
from pqcodec.formats.offload.pieces import BlockLayout
from pqcodec.formats.offload.pinned import PinnedSlice, free_all
from pqcodec.formats.offload.pipeline import Transfer


@dataclass
class Block:
    """The tensors that were put under one key, encoded: in host memory (``slices``), in a file (``path``), or in both."""

    key: Hashable
    layout: BlockLayout
    single: bool  # one tensor was put, not a list
    slices: list[PinnedSlice] | None = None  # host memory, one slice for each piece
    path: Path | None = None  # the file of its bytes
    put: Transfer | None = None  # the transfer to host memory, until it is known to be sound
    before: Block | None = None  # the block that this one replaces, until then
    users: int = 0  # calls that need its bytes to stay where they are
    reads: list[Transfer] = field(default_factory=list)  # transfers out of its host memory
    staged: list[Any] | None = None  # copies of its pieces on the devices that they came from

    @property
    def devices(self) -> tuple[Any, ...]:
        """The device of each tensor when it was put."""
        return self.layout.devices

    @property
    def hosts(self) -> list[Any]:
        """The bytes of each piece in host memory: uint8 tensors [piece.nbytes]; empty while the block is only on disk."""
        return [part.tensor for part in self.slices or ()]

    def write(self, path: Path) -> None:
        """Write all streams from host memory to a .pqkv file; raises OSError."""
        number = 0
        with PQKVWriter(path, {"key": repr(self.key)}) as writer:
            for piece, host in zip(self.layout.pieces, self.hosts, strict=True):
                rows = host.numpy()
                for stream in piece.streams:
                    writer.add_stream(str(number), rows[stream.offset : stream.offset + stream.header.stream_bytes])
                    number += 1

    def read(self, path: Path, slices: Sequence[PinnedSlice]) -> None:
        """Read all streams of a file that ``write`` made into ``slices``, one for each piece.

        Raises OSError, and CorruptStream where a stream has another size than the one that was put.
        """
        number = 0
        with PQKVFile(path) as file:
            for piece, host in zip(self.layout.pieces, slices, strict=True):
                rows = host.tensor.numpy()
                for stream in piece.streams:
                    source, expected = file.stream(str(number)), stream.header.stream_bytes
                    if source.size != expected:
                        raise CorruptStream(f"{path}: stream {number} has {source.size} bytes, not {expected}")
                    rows[stream.offset : stream.offset + expected] = np.asarray(source.read(0, expected))
                    number += 1

    def give_back(self) -> None:
        """Free the memory and delete the file, which nobody uses any more.

        A file that stays costs the pool nothing, but may hold a prompt: a warning tells of it.
        """
        free_all(self.slices or ())
        path, self.slices, self.path, self.staged = self.path, None, None, None
        try:
            if path is not None:
                path.unlink(missing_ok=True)
        except OSError as error:
            text = f"{path}: the file of a block that is gone cannot be deleted ({error.strerror})"
            warnings.warn(f"{text}; delete it, it may hold a prompt", RuntimeWarning, stacklevel=2)


def unlink(blocks: MutableMapping[Hashable, Block], block: Block, before: Block | None) -> bool:
    """Put ``before`` where a block is: under its key in ``blocks``, or behind one that was put there since.

    False, and nothing is done, if it is at neither place, for it was let go.
    """
    above = blocks.get(block.key)
    if above is block:
        del blocks[block.key]
        if before is not None:
            blocks[block.key] = before
        return True
    while above is not None and above.before is not block:
        above = above.before
    if above is not None:
        above.before = before
    return above is not None
