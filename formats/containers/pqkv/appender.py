"""Law: growing a .pqkv file in place: frames, an index and a footer are appended, all or nothing (SPEC II.6)."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, BinaryIO

from pqcodec import codec
from pqcodec import constants as c
from pqcodec.errors import InvalidArgument
from pqcodec.formats.containers.pqkv.file import Body, PQKVFile, PQKVWriter
from pqcodec.formats.containers.pqkv.frames import head
from pqcodec.formats.containers.reader import Entry, named
from pqcodec.formats.containers.writer import encoded_source
from pqcodec.formats.places import remote
from pqcodec.stages.centre import Rope, check_rope, rope_from_field
from pqcodec.stream.header import Header, read_header
from pqcodec.stream.report import StreamInfo
from pqcodec.stream.source import Source

_LINEAR = {"channels", "basis", "block_basis"}  # options of a linear stage


class PQKVAppender(PQKVWriter):
    """Adds new tensors, and new tokens of tensors in the file, to a file in place; a context manager.

    Committed bytes never change. ``commit``, and the end of the block, make what was added part of the file; where the block
    fails, the file is cut back to its last commit, and so are the leftovers of a killed writer when the file is opened. A
    second appender at the same time is refused (BlockingIOError). Raises InvalidArgument for a URL, OSError, and as
    ``PQKVFile`` does.

    >>> import tempfile, numpy as np
    >>> x = np.ones((2, 40, 64), np.float16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with PQKVWriter(folder + "/chat.pqkv") as writer:
    ...         info = writer.add("layers.0.key", x, layer=0, role="key", backend="reference")
    ...     with PQKVAppender(folder + "/chat.pqkv") as writer:
    ...         info = writer.extend("layers.0.key", x[:, :8], backend="reference")
    ...     with PQKVFile(folder + "/chat.pqkv") as file:
    ...         file.entry("layers.0.key").shape, file.entry("layers.0.key").parts
    ((2, 48, 64), 2)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self._entries: dict[str, Entry] = {}
        self._first: dict[str, Header] = {}  # of the tensors' first streams, where they were asked for

    def __enter__(self) -> PQKVAppender:
        path = os.fspath(self._target)  # type: ignore[arg-type]
        if remote.is_url(path):
            raise InvalidArgument(f"{path}: files of a store do not grow in place; download it, append, and upload it again")
        with ExitStack() as stack:
            self._file = stack.enter_context(open(path, "r+b", buffering=0))
            _lock(self._file, path)
            self._there = there = stack.enter_context(PQKVFile(path))
            self._entries = {name: there.entry(name) for name in there.names}
            self._names = set(there.names)
            self._tables = {table.name for table in there.tables.values()}
            self.bytes_written = self._previous = there.committed_bytes
            self._file.truncate(self.bytes_written)
            if there.version == c.FILE_VERSION:
                self._file.seek(0)
                self._file.write(head(c.GROWN_VERSION))  # one write of 16 bytes: the file is whole before it and after it
            self._file.seek(self.bytes_written)
            stack.push(self._finish)
            self._stack = stack.pop_all()
        return self

    def commit(self) -> None:
        """Make what was added so far part of the file, on the disk, and go on; raises OSError."""
        if self._items:
            self._commit()
            assert self._file is not None
            os.fsync(self._file.fileno())
            self._items, self._previous = [], self.bytes_written

    def extend(self, name: str, tensor: Any, **encode_options: Any) -> StreamInfo:
        """Add tokens to a coded tensor of the file: ``tensor`` [..., new tokens, head_dim], all else as in the file.

        ``encode_options`` are those of ``pqcodec.encode``; those that the first tokens' stream tells need not be given (all
        but ``effort`` and ``nonfinite``). ``rope``, with ``center="rope"`` or ``before_rope``: that of the tensor's first
        tokens, since its first position is moved on here (None: the one that the file holds). Returns the header fields of the
        new stream. Raises InvalidArgument, also for another rope than the file's, and as ``pqcodec.encode`` does.
        """
        entry = self._entries.get(name)
        if entry is None or not entry.coded:
            some = "kept exactly" if entry else "not in the file"
            raise InvalidArgument(f"tensor {name!r} is {some}: only coded tensors that are there are extended; use add()")
        there = entry.tokens
        with named(f"tensor {name!r}"):
            encode_options = self._as_first(name, encode_options)
            turned = encode_options.get("center") == "rope" or bool(encode_options.get("before_rope"))
            rope = self._rope(name, entry, encode_options.get("rope"), turned)
            if rope is not None:
                encode_options["rope"] = replace(rope, first_position=rope.first_position + there)
            stream = encoded_source(tensor, encode_options)
            info = codec.inspect(stream)
            if info.kept_of is not None:
                raise InvalidArgument("a stream of kept tokens is a tensor of its own; use add()")
            if not entry.continued_by(info.shape, info.dtype):
                raise InvalidArgument(
                    f"{info.dtype} {info.shape} does not continue {entry.dtype} {entry.shape}: only tokens may differ"
                )
        self._stream(name, entry.layer, entry.role, info, stream, there, None)
        self._entries[name] = entry.with_tokens(there + info.shape[-2], entry.parts + 1, entry.body_bytes + stream.size)
        return info

    def _as_first(self, name: str, given: dict[str, Any]) -> dict[str, Any]:
        """Options of ``pqcodec.encode``: those that are given, and of the others what the tensor's first tokens have."""
        if name not in self._first:
            self._first[name] = read_header(self._there.stream(name))
        info = codec.inspect_header(self._first[name])
        own: dict[str, Any] = {"preset": info.preset, "seed": info.seed, "chunk_tokens": info.chunk_tokens}
        own |= {"center": info.centered, "before_rope": info.before_rope, "join_heads": info.joined_heads is not None}
        if given.get("preset", info.preset) == info.preset:
            if info.preset is None:
                raise InvalidArgument("its first tokens are of no preset; say which new ones get")
            if info.linear is not None and info.basis_table is None and not _LINEAR & given.keys():
                raise InvalidArgument(
                    "has a linear stage of its own; say which to PQKVAppender.extend: channels, basis or block_basis"
                )
            own |= {"pairing": info.pairing}
            tables = self._there.tables
            own |= {tables[each].option: tables[each] for each in map(bytes.fromhex, info.tables) if each in tables}
        return own | given

    def _rope(self, name: str, entry: Entry, given: Rope | None, turned: bool) -> Rope | None:
        """The rope of a tensor's first tokens: as it is given, or out of the file; raises InvalidArgument where they differ."""
        if given is None and not turned:
            return None
        own = self._first[name].rope
        if own is None or given is None:
            return given if own is None else rope_from_field(own)
        check_rope(given)
        if given.field(entry.shape[-1]) != own:
            raise InvalidArgument("rope is not that of the tensor's first tokens, which the file holds; leave rope out")
        return given

    def _stream(self, name: str, layer: int | None, role: str, info: StreamInfo, stream: Source, *more: Any) -> None:
        if name not in self._entries:
            self._first[name] = read_header(stream)
        super()._stream(name, layer, role, info, stream, *more)

    def _tensor(self, kind: int, name: str, layer: int | None, role: str, meta: dict[str, Any], body: Body) -> None:
        super()._tensor(kind, name, layer, role, meta, body)
        if name not in self._entries:
            shape = tuple(int(n) for n in meta["shape"])
            coded = kind == c.FRAME_CODED
            self._entries[name] = Entry(name, coded, layer, role, shape, meta["dtype"], meta["layout"], 0, 0)

    def _finish(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._file is not None
        assert self._previous is not None
        try:
            if kind is None:
                self.commit()
        finally:
            self._file.truncate(self._previous)
            self._file = None


def _lock(file: BinaryIO, path: str) -> None:
    """Lock a file against other appenders until it is closed, where the system has such locks; raises BlockingIOError."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another process appends to the file; wait for it", path) from None
