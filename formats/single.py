"""Law: a file that is one single stream, seen as a .pqkv file of one tensor; so readers need not tell them apart."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pqcodec import codec
from pqcodec import constants as c
from pqcodec.errors import InvalidArgument
from pqcodec.formats.pqkv import LAYOUT, Entry, PQKVFile, Progress, named
from pqcodec.formats.tensors import file_kind
from pqcodec.source import FileSource
from pqcodec.stream import Damage, StreamInfo


class SingleStream:
    """The part of ``PQKVFile``'s interface that one stream can fill; its tensor is called as the file is."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._stack = ExitStack()
        self._label = os.fspath(path)
        self._source = FileSource(self._stack.enter_context(open(path, "rb")))  # noqa: SIM115 (the stack closes it)
        self.size = self._source.size
        self.names = (Path(path).stem,)
        self.metadata: dict[str, Any] = {}

    def __enter__(self) -> SingleStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def entry(self, name: str) -> Entry:
        info = self.inspect(name)
        return Entry(name, True, None, "other", info.shape, info.dtype, LAYOUT, 0, info.stream_bytes)

    def inspect(self, name: str) -> StreamInfo:
        self._check(name)
        with named(self._label):
            return codec.inspect(self._source)

    def decode(self, name: str, **options: Any) -> Any:
        self._check(name)
        with named(self._label):
            return codec.decode(self._source, **options)

    def verify(self, progress: Progress | None = None, *, backend: str = "auto") -> list[tuple[str | None, Damage | str]]:
        def advance(done: int, total: int) -> None:
            if progress:
                progress(self.size * done // max(total, 1), self.size)

        with named(self._label):
            return [(self.names[0], damage) for damage in codec.verify(self._source, backend=backend, progress=advance)]

    def _check(self, name: str) -> None:
        if name != self.names[0]:
            raise InvalidArgument(f"{self._label}: no tensor is called {name!r}; there is {self.names[0]!r}")


def open_encoded(path: str | os.PathLike[str]) -> PQKVFile | SingleStream:
    """Open a .pqkv file or a single stream, whichever it is. Raises InvalidArgument for anything else."""
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == c.STREAM_MAGIC:
        return SingleStream(path)
    if magic and c.FILE_MAGIC.startswith(magic):
        return PQKVFile(path)
    raise InvalidArgument(f"{path}: is a {file_kind(path)} file; a .pqkv file or a single stream is expected")
