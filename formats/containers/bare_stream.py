"""Law: a file that is one single stream, read as a file of one tensor, which has the file's name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pqcodec import codec
from pqcodec.formats.containers.reader import LAYOUT, Check, Entry, StreamPart, TensorFile, named
from pqcodec.formats.places import remote
from pqcodec.stream.header import read_header
from pqcodec.stream.source import Extent, FileSource, Source
from pqcodec.stream.tables import Tables, tables_by_name, tables_in, with_tables


class SingleStream(TensorFile):
    """Reads a stream that ``pqcodec.encode`` returned, from a path or a URL; it holds no shared tables, they are ``given``."""

    names: tuple[str, ...] = ()
    metadata: dict[str, Any] = {}  # noqa: RUF012 (never written to)
    size = 0

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(os.fspath(path))
        if remote.is_url(path):
            source: Any = remote.RemoteSource(self._label)
        else:
            source = FileSource(self._stack.enter_context(open(path, "rb")))  # noqa: SIM115 (the stack closes it)
        self._part: Source = Extent(source, 0, source.size)
        self.size, self.names = source.size, (Path(path).stem,)
        try:
            with named(self._label):
                self._info = codec.inspect(self._part)
        except BaseException:
            self.close()
            raise

    @property
    def tables(self) -> Tables:
        """Those of the given tables that the stream names."""
        with named(self._label):
            return tables_by_name(tables_in(read_header(with_tables(self._part, self.given))))

    def _read_entry(self, name: str) -> Entry:
        return Entry(name, True, None, "other", self._info.shape, self._info.dtype, LAYOUT, 0, self.size)

    def _read_parts(self, entry: Entry) -> list[StreamPart]:
        return [StreamPart(entry.tokens, lambda whole: with_tables(self._part, self.given))]

    def _has_order_seal(self, entry: Entry) -> bool:
        return False

    def _read_exact(self, entry: Entry) -> Any:
        raise AssertionError("a stream is coded")

    def _checks(self) -> Iterator[Check]:
        def damage(backend: str, progress: codec.Progress) -> Any:
            return codec.verify(self._part, backend=backend, progress=progress)

        yield Check(self.names[0], 0, self.size, damage)
