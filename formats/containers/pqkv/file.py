"""Law: writing and reading a .pqkv file (SPEC Part II): coded and exact tensors as frames, then an index and a footer.

Frames are written one by one and read by offset, so that neither side holds more than one tensor. ``appender`` lets a file
grow; it never rewrites committed frames.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from types import TracebackType
from typing import Any, BinaryIO

from pqcodec import codec
from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats.containers.pqkv.frames import Frame, frame_header, head, sealed
from pqcodec.formats.containers.pqkv.log import Log
from pqcodec.formats.containers.reader import (
    LAYOUT,
    NO_LAYOUT,
    Check,
    Entry,
    Progress,
    StreamPart,
    TensorFile,
    named,
    stream_of,
)
from pqcodec.formats.containers.writer import Coded, Piece, carried, check_pieces, encoded_source, read_in_pieces, rel_mse_of
from pqcodec.formats.places import remote
from pqcodec.formats.plain import numbers as exact
from pqcodec.formats.plain.documents import (
    checksum_bytes,
    checksum_of_text,
    checksum_text,
    json_bytes,
    metadata_bytes,
    natural,
    shape_problem,
    tensor_problem,
)
from pqcodec.stream.magic import check_no_folder
from pqcodec.stream.report import Damage, StreamInfo
from pqcodec.stream.seal import with_seal
from pqcodec.stream.source import Extent, FileSource, MappedSource, MemorySource, Source, fetched
from pqcodec.stream.tables import SharedTable, Tables, tables_by_name

PathOrFile = str | os.PathLike[str] | BinaryIO
Body = list[Any]  # bytes-like objects and Sources, written one after the other


# -- writing -----------------------------------------------------------------------------------------------------
class PQKVWriter:
    """Writes a file of coded and exact tensors; a context manager.

    A path or URL appears complete when the block succeeds, in place of what was there; if it fails, nothing is left. A
    binary file is written from its current position and needs no seek. ``metadata``: a JSON object for the file to hold.
    ``parts``: a tensor may have several streams (``add_streams``), as in a file that has grown. ``digest``: an object of
    hashlib that is updated with every byte. Raises InvalidArgument or OSError.

    >>> import io, numpy as np
    >>> file = io.BytesIO()
    >>> with PQKVWriter(file, {"model": "tiny"}) as writer:
    ...     info = writer.add("layers.0.key", np.ones((1, 4, 64), np.float16), layer=0, role="key", backend="reference")
    ...     writer.add_exact("positions", np.arange(4))
    >>> with PQKVFile(file) as cache:
    ...     cache.names, cache.metadata, cache.decode("positions").tolist()
    (('layers.0.key', 'positions'), {'model': 'tiny'}, [0, 1, 2, 3])
    """

    def __init__(
        self, target: PathOrFile, metadata: dict[str, Any] | None = None, *, parts: bool = False, digest: Any = None
    ) -> None:
        if not isinstance(target, (str, os.PathLike)) and not hasattr(target, "write"):
            raise InvalidArgument(f"target is a {type(target).__name__}; a path, a URL or a binary file is expected")
        self._target, self._metadata, self._digest = target, metadata, digest
        self._version = c.GROWN_VERSION if parts else c.FILE_VERSION
        self._previous: int | None = None  # end of the last commit of a file that grows
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        self._failed = False
        self._items: list[Frame] = []
        self._names: set[str] = set()
        self._tables: set[str] = set()  # names of the shared tables that the file carries
        self.bytes_written = 0  # of the whole file, so far

    def __enter__(self) -> PQKVWriter:
        meta = None if self._metadata is None else metadata_bytes(self._metadata, c.MAX_META_BYTES)
        with ExitStack() as stack:
            if isinstance(self._target, (str, os.PathLike)):
                path = stack.enter_context(remote.placing(self._target))
                self._file = stack.enter_context(open(path, "wb", buffering=0))
            else:
                self._file = self._target
            stack.push(self._finish)
            self._write(head(self._version))
            if meta is not None:
                self._frame(c.FRAME_METADATA, meta, [])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(
        self, name: str, tensor: Any, *, layer: int | None = None, role: str = "other", **encode_options: Any
    ) -> StreamInfo:
        """Encode a tensor [..., tokens, head_dim] and write it; returns the header fields of its stream.

        ``encode_options`` are those of ``pqcodec.encode``. Raises InvalidArgument, OSError, and as ``pqcodec.encode`` does.
        """
        self._check(name, layer, role)
        with named(f"tensor {name!r}"):
            stream = encoded_source(tensor, encode_options)
        return self.add_streams(name, Coded([stream]), layer=layer, role=role)

    def add_stream(
        self, name: str, stream: Any, *, layer: int | None = None, role: str = "other", rel_mse: float | None = None
    ) -> StreamInfo:
        """Write a stream that ``pqcodec.encode`` returned; ``rel_mse``: its measured error, squared over squared norm.

        One that names a shared table goes through ``pqcodec.given_tables`` before, unless the file carries the table already;
        else MissingTable is raised.
        """
        return self.add_streams(name, Coded.of(stream, rel_mse), layer=layer, role=role)

    def add_streams(self, name: str, coded: Coded, *, layer: int | None = None, role: str = "other") -> StreamInfo:
        """Write a tensor that is coded already; returns the header fields of its first stream.

        Raises InvalidArgument for several streams without ``parts``, or streams that do not continue each other.
        """
        self._check(name, layer, role)
        if len(coded.streams) != 1 and self._version != c.GROWN_VERSION:
            raise InvalidArgument(f"tensor {name!r}: {len(coded.streams)} streams; open the writer with parts=True")
        with named(f"tensor {name!r}"):
            infos = [codec.inspect(stream) for stream in coded.streams]
        first = Entry(name, True, layer, role, infos[0].shape, infos[0].dtype, LAYOUT, 0, 0)
        tokens = 0
        for number, (info, stream) in enumerate(zip(infos, coded.streams, strict=True)):
            if len(infos) > 1 and info.kept_of is not None:
                raise InvalidArgument(
                    f"tensor {name!r}: a stream of kept tokens is a tensor of its own, and no part of another"
                )
            if number and not first.continued_by(info.shape, info.dtype):
                raise InvalidArgument(
                    f"tensor {name!r}: {info.dtype} {info.shape} does not continue {first.dtype} {first.shape}"
                )
            self._stream(name, layer, role, info, stream, tokens if number else None, coded.rel_mse)
            tokens += info.shape[-2] if len(info.shape) > 1 else 1
        return infos[0]

    def add_exact(self, name: str, array: Any, *, layer: int | None = None, role: str = "other") -> None:
        """Write a torch or numpy tensor of any shape exactly; raises InvalidArgument for a dtype that cannot be stored."""
        self._check(name, layer, role)
        with named(f"tensor {name!r}"):
            raw = exact.to_bytes(array)
        layout = LAYOUT if role != "other" and array.ndim > 1 else NO_LAYOUT
        shape, dtype, numpy = [int(n) for n in array.shape], exact.dtype_name(array), not exact.is_torch(array)
        seal = checksum_bytes(raw)
        meta = {"shape": shape, "dtype": dtype, "layout": layout, "numpy": numpy, "seal": seal.hex()}
        self._tensor(c.FRAME_EXACT, name, layer, role, meta, [raw.data, seal])

    def _stream(
        self,
        name: str,
        layer: int | None,
        role: str,
        info: StreamInfo,
        stream: Source,
        first_token: int | None,
        rel_mse: float | None,
    ) -> None:
        with named(f"tensor {name!r}"):
            tables = carried([stream], self._tables)
        for table in tables:
            self._carry(table)
        stream, seal = with_seal(stream)
        meta: dict[str, Any] = {"shape": info.shape, "dtype": info.dtype, "layout": LAYOUT, "seal": checksum_text(seal)}
        meta |= {} if first_token is None else {"first_token": first_token}
        meta |= {} if rel_mse is None else {"rel_mse": rel_mse}
        self._tensor(c.FRAME_CODED, name, layer, role, meta, [stream])

    def _carry(self, table: SharedTable) -> None:
        """Write a shared table, unless the file has it."""
        if table.name not in self._tables:
            raw, meta = table.to_bytes(), json_bytes({"table": table.name}, "a shared table", c.MAX_META_BYTES)
            self._frame(c.FRAME_TABLE, meta, [raw, checksum_bytes(raw)])
            self._tables.add(table.name)

    def _check(self, name: str, layer: int | None, role: str) -> None:
        if self._file is None:
            raise InvalidArgument("the writer is not open; use it as `with PQKVWriter(path) as writer:`")
        problem = tensor_problem(name, layer, role)
        if problem:
            raise InvalidArgument(f"tensor {name!r}: {problem}")
        if name in self._names:
            raise InvalidArgument(f"tensor {name!r} is in the file already; names are unique")

    def _tensor(self, kind: int, name: str, layer: int | None, role: str, meta: dict[str, Any], body: Body) -> None:
        meta = {"name": name, "layer": layer, "role": role, **meta}
        self._frame(kind, json_bytes(meta, f"tensor {name!r}", c.MAX_META_BYTES), body, name, layer, role)
        self._names.add(name)

    def _frame(
        self,
        kind: int,
        meta: bytes,
        body: Body,
        name: str | None = None,
        layer: int | None = None,
        role: str | None = None,
    ) -> None:
        item = Frame(self.bytes_written, kind, name, layer, role, len(meta), sum(map(_size, body)))
        self._write(frame_header(kind, meta, item.body_bytes))
        for piece in (meta, *body):
            for data in read_in_pieces(piece) if hasattr(piece, "read") else (piece,):
                self._write(data)
        self._items.append(item)

    def _write(self, data: Any) -> None:
        assert self._file is not None
        rest = memoryview(data)
        try:
            while rest:
                done = self._file.write(rest)
                rest = rest[len(rest) if done is None else done :]
        except BaseException as error:
            self._failed = True
            if isinstance(error, OSError) and isinstance(self._target, (str, os.PathLike)):
                error.filename = os.fspath(self._target)
            raise
        if self._digest is not None:
            self._digest.update(data)
        self.bytes_written += memoryview(data).nbytes

    def _finish(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._commit()
        self._file = None

    def _commit(self) -> None:
        """Write the index of the frames since the last commit, and the footer; raises OSError after a failed write."""
        if self._failed:
            raise OSError(errno.EIO, "an earlier write failed, the file is not complete", str(self._target))
        frames = [item.__dict__ for item in self._items]
        listed = frames if self._previous is None else {"previous": self._previous, "frames": frames}
        index = json_bytes(listed, "index", c.MAX_INDEX_BYTES)
        start = self.bytes_written
        self._frame(c.FRAME_INDEX, b"{}", [index, checksum_bytes(index)])
        footer = c.FOOTER_STRUCT.pack(c.FOOTER_MAGIC, start, self.bytes_written + c.FOOTER_STRUCT.size, 0)
        self._write(sealed(footer))
        assert self._file is not None
        self._file.flush()


def _size(body: Any) -> int:
    return body.size if hasattr(body, "read") else len(body)


def write_pieces(
    target: PathOrFile,
    pieces: Sequence[Piece],
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
    digest: Any = None,
) -> int:
    """Write tensors into a file and return its size in bytes; ``progress`` is called with (tensors done, tensors in all).

    ``digest``: as for ``PQKVWriter``. A tensor of several streams makes the file one of version 2. Raises InvalidArgument,
    OSError, and what a ``body`` raises.

    >>> import io, numpy as np
    >>> file = io.BytesIO()
    >>> piece = Piece("positions", False, None, "other", (4,), "int64", NO_LAYOUT, lambda: np.arange(4))
    >>> write_pieces(file, [piece]) == len(file.getvalue())
    True
    """
    check_pieces(pieces)
    with PQKVWriter(target, metadata, parts=any(piece.parts > 1 for piece in pieces), digest=digest) as writer:
        for done, piece in enumerate(pieces, 1):
            if piece.coded:
                writer.add_streams(piece.name, piece.body(), layer=piece.layer, role=piece.role)
            else:
                writer.add_exact(piece.name, piece.plain(), layer=piece.layer, role=piece.role)
            if progress:
                progress(done, len(pieces))
    return writer.bytes_written


# -- reading -----------------------------------------------------------------------------------------------------
class PQKVFile(TensorFile):
    """Reads a .pqkv file from a path, a bytes-like object or a seekable binary file; a context manager.

    Opening reads head, footers and indexes; the bytes of a tensor are read when it is decoded. Every length is checked
    against the file's real size before it is used. A file that has grown opens at its last commit; ``torn_bytes`` follow it
    if a writer was killed. Raises InvalidArgument, TruncatedStream, CorruptStream or UnsupportedStream.

    >>> import io, numpy as np
    >>> file = io.BytesIO()
    >>> with PQKVWriter(file) as writer:
    ...     info = writer.add("layers.0.key", np.ones((2, 40, 64), np.float16), layer=0, role="key", backend="reference")
    >>> with PQKVFile(file.getvalue()) as cache:
    ...     part = cache.decode("layers.0.key", tokens=(8, 12), backend="reference")
    ...     cache.entry("layers.0.key").shape, part.shape, cache.verify(backend="reference")
    ((2, 40, 64), (2, 4, 64), [])
    """

    def __init__(self, source: PathOrFile | bytes | bytearray | memoryview) -> None:
        super().__init__("<bytes>")
        self._path: str | None = None
        self._source: Source
        if isinstance(source, (bytes, bytearray, memoryview)):
            self._source = MemorySource(source)
        elif remote.is_url(source):
            self._label, self._source = str(source), remote.RemoteSource(str(source))
        elif isinstance(source, (str, os.PathLike)):
            self._label = self._path = os.fspath(source)
            check_no_folder(source)
            self._source = self._stack.enter_context(MappedSource(source))
        elif hasattr(source, "seek") and hasattr(source, "read"):
            self._label = str(getattr(source, "name", "<file>"))
            self._source = FileSource(source)
        else:
            raise InvalidArgument(f"a path, bytes or a seekable binary file are expected, not {type(source).__name__}")
        try:
            with named(self._label):
                self._log = Log(self._source)
        except BaseException:
            self.close()
            raise
        self._tensors: dict[str, list[Frame]] = {}  # a tensor's parts, in the order of their tokens
        for item in self._log.items:
            if item.name is not None:
                self._tensors.setdefault(item.name, []).append(item)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._log.size

    @property
    def version(self) -> int:
        """The file's version (SPEC II.1): 1, or 2 for a file that may grow."""
        return self._log.version

    @property
    def committed_bytes(self) -> int:
        """Bytes up to the end of the last complete write or append."""
        return self._log.committed

    @property
    def torn_bytes(self) -> int:
        """Bytes after the last commit, of an append that was cut off; they are not part of the file."""
        return self.size - self._log.committed

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in writing order."""
        return tuple(self._tensors)

    def all_bytes(self) -> bytes:
        """All bytes of the file, read now."""
        return bytes(self._source.read(0, self._source.size))

    def sha256(self) -> str:
        """The SHA-256 of all bytes, in hexadecimal; raises InvalidArgument for a URL, whose next read may return others."""
        if isinstance(self._source, remote.RemoteSource):
            raise InvalidArgument(
                f"{self._label}: a file that lies here is expected, for its digest has to be that of what is read"
            )
        digest = hashlib.sha256()
        for piece in read_in_pieces(self._source):
            digest.update(piece)
        return digest.hexdigest()

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The writer's ``metadata``; empty without any. Raises CorruptStream."""
        item = next((item for item in self._log.items if item.kind == c.FRAME_METADATA), None)
        with named(f"{self._label}: file metadata"):
            return {} if item is None else self._log.meta(item)

    @cached_property
    def tables(self) -> Tables:  # type: ignore[override]
        """The shared tables that the file carries, by the bytes of their names; raises CorruptStream or UnsupportedStream."""
        with named(self._label):
            return tables_by_name(self._log.table(item) for item in self._log.items if item.kind == c.FRAME_TABLE)

    def bare_stream(self, name: str) -> Source | None:
        """The stream of a tensor, located by the index alone; its frame's checksum is checked, its meta is not parsed.

        None for an unknown or exact tensor, one of several parts, and in a file with shared tables. Raises CorruptStream.
        """
        items = self._tensors.get(name, [])
        if len(items) != 1 or items[0].kind != c.FRAME_CODED or self._log.has_tables:
            return None
        with named(self._label):
            self._log.check(items[0])
        return Extent(self._source, items[0].body_start, items[0].body_bytes)

    def _local_files(self) -> list[str]:
        return [] if self._path is None else [self._path]

    # -- tensors -------------------------------------------------------------------------------------------------
    def _read_entry(self, name: str) -> Entry:
        """The entry of a tensor; the tokens of its parts have to follow each other. Raises CorruptStream."""
        items = self._tensors[name]
        entry = self._frame_entry(items[0])
        tokens, rel_mse = entry.tokens, entry.rel_mse
        for item in items[1:]:
            part = self._frame_entry(item)
            if not entry.continued_by(part.shape, part.dtype):
                raise CorruptStream(
                    f"the part at byte {item.offset} is {part.dtype} {part.shape}, the first {entry.dtype} {entry.shape}"
                )
            first = self._log.meta(item).get("first_token")
            if not natural(first) or first != tokens:
                raise CorruptStream(f"the part at byte {item.offset} begins with token {first!r}, {tokens} is expected")
            tokens += part.shape[-2]
            rel_mse = rel_mse if part.rel_mse == rel_mse else None  # of appended tokens it was not measured
        if len(items) == 1:
            return entry
        return entry.with_tokens(tokens, len(items), sum(item.body_bytes for item in items), rel_mse)

    def _frame_entry(self, item: Frame) -> Entry:
        """The entry of one part, from the meta of its frame."""
        meta = self._log.meta(item)
        shape: Any = meta.get("shape")
        dtype, layout, numpy = (meta.get(key) for key in ("dtype", "layout", "numpy"))
        if problem := shape_problem(shape):
            raise CorruptStream(problem)
        if not isinstance(layout, str):
            raise CorruptStream(f"layout {layout!r}: a string is expected")
        if not isinstance(dtype, str) or dtype not in c.EXACT_ITEM_BYTES:
            raise UnsupportedStream(f"dtype {dtype!r} is unknown to this release: install a newer pqcodec")
        if "numpy" in meta and type(numpy) is not bool:
            raise CorruptStream(f"numpy is {numpy!r}; true or false is expected")
        if "first_token" in meta and item is self._tensors[str(item.name)][0]:
            raise CorruptStream(f"the part at byte {item.offset} has a first_token, and no part before it")
        coded = item.kind == c.FRAME_CODED
        entry = Entry(
            str(item.name),
            coded,
            item.layer,
            str(item.role),
            tuple(shape),
            dtype,
            layout,
            item.body_start,
            item.body_bytes,
            numpy=bool(numpy),
            rel_mse=rel_mse_of(meta),
            seal=checksum_of_text(meta["seal"]) if "seal" in meta else None,
        )
        if not coded and entry.tensor_bytes + c.CHECKSUM_BYTES != item.body_bytes:
            raise CorruptStream(f"shape {shape} of {dtype} does not go with a body of {item.body_bytes} bytes")
        return entry

    def _read_parts(self, entry: Entry) -> list[StreamPart]:
        items = self._tensors[entry.name]
        if len(items) == 1:
            return [self._part(items[0], entry)]
        return [self._part(item, self._frame_entry(item)) for item in items]

    def _part(self, item: Frame, entry: Entry) -> StreamPart:
        source = Extent(self._source, item.body_start, item.body_bytes, entry.seal)
        return StreamPart(
            entry.tokens, lambda whole: stream_of(fetched(source) if whole else source, entry, self._known_tables)
        )

    def _has_order_seal(self, entry: Entry) -> bool:
        return all(self._frame_entry(item).seal is not None for item in self._tensors[entry.name])

    def _read_exact(self, entry: Entry) -> Any:
        return self._log.sealed_part(entry.body_start, entry.body_bytes, entry.seal)

    def _checks(self) -> Iterator[Check]:
        if self.torn_bytes:
            torn = f"{self.torn_bytes} bytes of an append that was cut off; appending again removes them"
            yield Check(None, 0, 0, lambda backend, progress: [torn])
        for item in self._log.items:
            yield Check(item.name, item.body_start, item.body_bytes, self._damage(item))
        for name, items in self._tensors.items():
            if len(items) > 1:
                yield Check(name, self.size, 0, self._follow(name))

    def _damage(self, item: Frame) -> Callable[[str, codec.Progress], Sequence[Damage | str]]:
        def found(backend: str, progress: codec.Progress) -> Sequence[Damage | str]:
            if item.kind == c.FRAME_METADATA:
                self._log.meta(item)
            elif item.kind == c.FRAME_TABLE:
                self._log.table(item)
            elif item.kind == c.FRAME_CODED:
                return self._part(item, self._frame_entry(item)).damage(backend, progress)
            else:
                self._read_exact(self._frame_entry(item))
            return []

        return found

    def _follow(self, name: str) -> Callable[[str, codec.Progress], Sequence[Damage | str]]:
        def found(backend: str, progress: codec.Progress) -> Sequence[Damage | str]:
            self._read_entry(name)  # raises where the parts of a tensor do not follow each other
            return []

        return found
