"""Law: the .pqkv file (SPEC Part II): many coded and exact tensors in one log of frames, an index and a footer behind them.

Frames are written as they come and read by place, so neither side holds more than one tensor.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

import numpy as np

from pqcodec import arrays, codec
from pqcodec import constants as c
from pqcodec.checksum import checksum
from pqcodec.errors import CorruptStream, InvalidArgument, PQError, TruncatedStream, UnsupportedStream
from pqcodec.formats import exact
from pqcodec.formats.atomic import replacing
from pqcodec.formats.frames import (
    KINDS,
    Frame,
    checksum_bytes,
    frame_header,
    frame_of,
    head,
    json_bytes,
    json_value,
    natural,
    sealed,
    tensor_problem,
)
from pqcodec.source import FileSource, MemorySource, Source, check_range
from pqcodec.stream import Damage, StreamInfo

LAYOUT = "..., tokens, head_dim"
Progress = Callable[[int, int], None]  # bytes done, bytes in all
PathOrFile = str | os.PathLike[str] | BinaryIO


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: what its frame says of it and where its body lies."""

    name: str
    coded: bool  # False: kept exactly, as plain numbers
    layer: int | None
    role: str  # "key", "value" or "other"
    shape: tuple[int, ...]
    dtype: str
    layout: str  # what the dimensions are
    body_start: int  # byte of the file
    body_bytes: int

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self.shape) * c.EXACT_ITEM_BYTES[self.dtype]


@contextmanager
def named(place: str) -> Iterator[None]:
    """Errors of pqcodec inside the block say first where they arose."""
    try:
        yield
    except PQError as error:
        raise type(error)(f"{place}: {error}") from error


# -- writing -----------------------------------------------------------------------------------------------------
class PQKVWriter:
    """Writes a file of coded and exact tensors; a context manager.

    A path appears when the block ends well, complete, in place of what was there; otherwise nothing is left. A binary
    file is written from where it stands and needs no seek. ``metadata``: a JSON object that the file carries.

    >>> import io, numpy as np
    >>> file = io.BytesIO()
    >>> with PQKVWriter(file, {"model": "tiny"}) as writer:
    ...     info = writer.add("layers.0.key", np.ones((1, 4, 64), np.float16), layer=0, role="key", backend="reference")
    ...     writer.add_exact("positions", np.arange(4))
    >>> with PQKVFile(file) as cache:
    ...     cache.names, cache.metadata, cache.decode("positions").tolist()
    (('layers.0.key', 'positions'), {'model': 'tiny'}, [0, 1, 2, 3])
    """

    def __init__(self, target: PathOrFile, metadata: dict[str, Any] | None = None) -> None:
        self._target, self._metadata = target, metadata
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        self._failed = False
        self._items: list[Frame] = []
        self._names: set[str] = set()
        self.bytes_written = 0

    def __enter__(self) -> PQKVWriter:
        meta = None if self._metadata is None else json_bytes(self._metadata, "metadata", c.MAX_META_BYTES)
        with ExitStack() as stack:
            if isinstance(self._target, (str, os.PathLike)):
                self._file = stack.enter_context(open(stack.enter_context(replacing(self._target)), "wb", buffering=0))
            else:
                self._file = self._target
            stack.push(self._finish)
            self._write(head())
            if meta is not None:
                self._frame(c.FRAME_METADATA, meta, [])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(
        self, name: str, tensor: Any, *, layer: int | None = None, role: str = "other", **encode_options: Any
    ) -> StreamInfo:
        """Encode a tensor [..., tokens, head_dim] and write it; ``encode_options`` are those of ``pqcodec.encode``."""
        self._check(name, layer, role)
        with named(f"tensor {name!r}"):
            stream = codec.encode(tensor, **encode_options)
        return self.add_stream(name, stream, layer=layer, role=role)

    def add_stream(self, name: str, stream: bytes, *, layer: int | None = None, role: str = "other") -> StreamInfo:
        """Write a stream that ``pqcodec.encode`` returned."""
        self._check(name, layer, role)
        with named(f"tensor {name!r}"):
            info = codec.inspect(stream)
        self._tensor(c.FRAME_CODED, name, layer, role, {"shape": info.shape, "dtype": info.dtype, "layout": LAYOUT}, [stream])
        return info

    def add_exact(self, name: str, array: Any, *, layer: int | None = None, role: str = "other") -> None:
        """Write a torch or numpy tensor of any shape and dtype as it is."""
        self._check(name, layer, role)
        with named(f"tensor {name!r}"):
            raw = exact.to_bytes(array)
        layout = LAYOUT if role != "other" and array.ndim > 1 else "..."
        shape, dtype, numpy = [int(n) for n in array.shape], exact.dtype_name(array), not exact.is_torch(array)
        meta = {"shape": shape, "dtype": dtype, "layout": layout, "numpy": numpy}
        self._tensor(c.FRAME_EXACT, name, layer, role, meta, [raw.data, checksum_bytes(raw)])

    def _check(self, name: str, layer: int | None, role: str) -> None:
        if self._file is None:
            raise InvalidArgument("the writer is not open; use it as `with PQKVWriter(path) as writer:`")
        problem = tensor_problem(name, layer, role)
        if problem:
            raise InvalidArgument(f"tensor {name!r}: {problem}")
        if name in self._names:
            raise InvalidArgument(f"tensor {name!r} is in the file already; names are unique")

    def _tensor(self, kind: int, name: str, layer: int | None, role: str, meta: dict[str, Any], body: list[Any]) -> None:
        meta = {"name": name, "layer": layer, "role": role, **meta}
        self._frame(kind, json_bytes(meta, f"tensor {name!r}", c.MAX_META_BYTES), body, name, layer, role)
        self._names.add(name)

    def _frame(
        self,
        kind: int,
        meta: bytes,
        body: list[Any],
        name: str | None = None,
        layer: int | None = None,
        role: str | None = None,
    ) -> None:
        item = Frame(self.bytes_written, kind, name, layer, role, len(meta), sum(len(piece) for piece in body))
        self._write(frame_header(kind, meta, item.body_bytes))
        for piece in (meta, *body):
            self._write(piece)
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
        self.bytes_written += memoryview(data).nbytes

    def _finish(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            if self._failed:
                raise OSError(errno.EIO, "an earlier write failed, the file is not complete", str(self._target))
            index = json_bytes([item.__dict__ for item in self._items], "index", c.MAX_INDEX_BYTES)
            start = self.bytes_written
            self._frame(c.FRAME_INDEX, b"{}", [index, checksum_bytes(index)])
            footer = c.FOOTER_STRUCT.pack(c.FOOTER_MAGIC, start, self.bytes_written + c.FOOTER_STRUCT.size, 0)
            self._write(sealed(footer))
            assert self._file is not None
            self._file.flush()
        self._file = None


# -- reading -----------------------------------------------------------------------------------------------------
class _Part:
    """A run of bytes of another source."""

    def __init__(self, source: Source, base: int, size: int) -> None:
        self._source, self._base, self.size = source, base, size

    def read(self, start: int, count: int) -> np.ndarray:
        check_range(start, count, self.size)
        return self._source.read(self._base + start, count)


class PQKVFile:
    """Reads a .pqkv file from a path, a bytes-like object or a seekable binary file; a context manager.

    Opening reads head, footer and index; a tensor's bytes are read when it is asked for. Every length is held against
    the file's real size before it is used. Raises TruncatedStream, CorruptStream or UnsupportedStream.
    """

    def __init__(self, source: PathOrFile | bytes | bytearray | memoryview) -> None:
        self._stack = ExitStack()
        self._source: Source
        if isinstance(source, (bytes, bytearray, memoryview)):
            self._label, self._source = "<bytes>", MemorySource(source)
        elif isinstance(source, (str, os.PathLike)):
            self._label = os.fspath(source)
            self._source = FileSource(self._stack.enter_context(open(source, "rb")))  # noqa: SIM115 (the stack closes it)
        elif hasattr(source, "seek") and hasattr(source, "read"):
            self._label = str(getattr(source, "name", "<file>"))
            self._source = FileSource(source)
        else:
            raise InvalidArgument(f"a path, bytes or a seekable binary file are expected, not {type(source).__name__}")
        try:
            with named(self._label):
                self._items = self._open()
        except BaseException:
            self.close()
            raise
        self._tensors = {item.name: item for item in self._items if item.name is not None}
        self._entries: dict[str, Entry] = {}
        self._numpy: dict[str, bool] = {}

    def __enter__(self) -> PQKVFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file if this object opened it."""
        self._stack.close()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._source.size

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order in which they were written."""
        return tuple(self._tensors)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """What the writer was given as ``metadata``; empty if nothing was."""
        item = next((item for item in self._items if item.kind == c.FRAME_METADATA), None)
        with named(f"{self._label}: file metadata"):
            return {} if item is None else self._meta(item)

    def entry(self, name: str) -> Entry:
        """Role, layer, shape, dtype and place of a tensor."""
        if name not in self._tensors:
            some = ", ".join(repr(n) for n in self.names[:5]) + (" ..." if len(self.names) > 5 else "")
            raise InvalidArgument(f"{self._label}: no tensor is called {name!r}; there are {some or 'none'}")
        if name not in self._entries:
            with self._named(name):
                self._entries[name], self._numpy[name] = self._read_entry(self._tensors[name])
        return self._entries[name]

    def inspect(self, name: str) -> StreamInfo:
        """What the stream of a coded tensor says of itself; reads only its header."""
        entry = self.entry(name)
        with self._named(name):
            if not entry.coded:
                raise InvalidArgument("is kept exactly, no stream is there to inspect; see entry(name)")
            return codec.inspect(self._stream(entry))

    def decode(
        self,
        name: str,
        *,
        tokens: tuple[int, int] | None = None,
        leading: tuple[int, int] | None = None,
        device: Any = None,
        backend: str = "auto",
        progress: codec.Progress | None = None,
    ) -> Any:
        """The tensor ``name``; arguments and result are those of ``pqcodec.decode``.

        Of a coded tensor only the blocks that are wanted are read, of an exact one all bytes.
        """
        entry = self.entry(name)
        with self._named(name):
            if entry.coded:
                stream = self._stream(entry)
                return codec.decode(stream, device=device, backend=backend, tokens=tokens, leading=leading, progress=progress)
            x = exact.from_bytes(self._exact_bytes(entry), entry.shape, entry.dtype, self._numpy[name])
            x = _cut(x, tokens, leading)
            return x if device is None else arrays.to_device(x, device)

    def verify(self, progress: Progress | None = None, *, backend: str = "auto") -> list[tuple[str | None, Damage | str]]:
        """Check every byte; an empty list is a sound file. The name is None where the file's metadata are damaged."""
        found: list[tuple[str | None, Damage | str]] = []
        for item in self._items:

            def advance(done: int, total: int, item: Frame = item) -> None:
                if progress:
                    progress(item.body_start + item.body_bytes * done // max(total, 1), self.size)

            try:
                found += [(item.name, damage) for damage in self._damage(item, backend, advance)]
            except (CorruptStream, UnsupportedStream) as error:
                found.append((item.name, str(error)))
            advance(1, 1)
        return found

    def _damage(self, item: Frame, backend: str, progress: codec.Progress) -> list[Damage]:
        if item.name is None:
            self._meta(item)
            return []
        entry, _ = self._read_entry(item)
        if entry.coded:
            return codec.verify(self._stream(entry), backend=backend, progress=progress)
        self._exact_bytes(entry)
        return []

    # -- opening -------------------------------------------------------------------------------------------------
    def _open(self) -> list[Frame]:
        """The frames before the index, from a head, a footer and an index that hold."""
        self._check_head()
        footer = self._footer(self.size - c.FOOTER_STRUCT.size)
        if footer is None or footer[1] != self.size:
            self._explain_missing_footer()
        start, end = footer[0], self.size - c.FOOTER_STRUCT.size
        if not c.FILE_HEAD_STRUCT.size <= start <= end:
            raise CorruptStream(f"footer: the index is at byte {start}, outside the file")
        index, _ = self._frame(start, end)
        if index.kind != c.FRAME_INDEX or index.end != end or index.body_bytes > c.MAX_INDEX_BYTES + c.CHECKSUM_BYTES:
            raise CorruptStream(f"the frame at byte {start} is not an index that ends at the footer")
        listed = json_value(self._sealed_body(index).tobytes(), "index")
        if not isinstance(listed, list):
            raise CorruptStream("index: a JSON list is expected")
        items = [frame_of(place, fields) for place, fields in enumerate(listed)]
        expected = c.FILE_HEAD_STRUCT.size
        for place, item in enumerate(items):
            if item.offset != expected:
                raise CorruptStream(f"index: frame {place} is at byte {item.offset}, the one before it ends at {expected}")
            expected = item.end
        if expected != start:
            raise CorruptStream(f"index: its frames end at byte {expected}, the index is at {start}")
        seen: set[str | None] = set()
        for item in items:
            if item.name in seen:
                raise CorruptStream(f"index: two tensors are called {item.name!r}" if item.name else "index: two file metadata")
            seen.add(item.name)
        return items

    def _check_head(self) -> None:
        head = self._source.read(0, min(self.size, c.FILE_HEAD_STRUCT.size)).tobytes()
        magic = head[: len(c.FILE_MAGIC)]
        if magic == c.STREAM_MAGIC:
            raise InvalidArgument("is a single stream, not a .pqkv file; use pqcodec.decode")
        if magic != c.FILE_MAGIC[: len(magic)]:
            raise CorruptStream(f"magic is {magic!r}, a .pqkv file begins with {c.FILE_MAGIC!r}; is this the right file?")
        if len(head) < c.FILE_HEAD_STRUCT.size:
            raise TruncatedStream(f"{len(head)} bytes, a head takes {c.FILE_HEAD_STRUCT.size}; the file is cut off")
        _, version, reserved, _ = c.FILE_HEAD_STRUCT.unpack(head)
        if version != c.FILE_VERSION:
            raise UnsupportedStream(f"file version {version}; this release reads {c.FILE_VERSION}: install a newer pqcodec")
        if head != sealed(head):
            raise CorruptStream("head: checksum does not hold; fetch the file again")
        if any(reserved):
            raise UnsupportedStream("head: reserved bytes are not zero: install a newer pqcodec")

    def _footer(self, place: int) -> tuple[int, int] | None:
        """Index offset and file size of a footer that holds at a byte, or None."""
        if place < c.FILE_HEAD_STRUCT.size:
            return None
        data = self._source.read(place, c.FOOTER_STRUCT.size).tobytes()
        magic, index, size, _ = c.FOOTER_STRUCT.unpack(data)
        return (index, size) if magic == c.FOOTER_MAGIC and data == sealed(data) else None

    def _explain_missing_footer(self) -> NoReturn:
        """Walk the frames to tell a file that was cut off from one that is damaged."""
        place, tensors = c.FILE_HEAD_STRUCT.size, 0
        head, footer = c.FRAME_STRUCT.size, c.FOOTER_STRUCT.size
        while self.size - place >= head and self._source.read(place, 4).tobytes() == c.FRAME_MAGIC:
            with named(f"{tensors} whole tensors, then"):
                item, _ = self._frame(place, self.size, TruncatedStream)
            place, tensors = item.end, tensors + (item.kind in (c.FRAME_CODED, c.FRAME_EXACT))
        if self.size - place < max(head, footer):
            raise TruncatedStream(f"the file is cut off at byte {self.size}; {tensors} whole tensors are before it")
        if self._footer(place):
            raise CorruptStream(f"{self.size - place - footer} bytes behind the end of the file; cut them off")
        raise CorruptStream(
            f"at byte {place} is neither a frame nor a footer that holds; {tensors} whole tensors are before it"
        )

    # -- frames --------------------------------------------------------------------------------------------------
    def _frame(self, place: int, end: int, beyond: type[PQError] = CorruptStream) -> tuple[Frame, dict[str, Any]]:
        """The frame at a byte, and its meta; raises ``beyond`` where the frame does not end at ``end`` or before."""
        if end - place < c.FRAME_STRUCT.size:
            raise beyond(f"frame at byte {place}: {end - place} bytes are there, its header takes {c.FRAME_STRUCT.size}")
        header = self._source.read(place, c.FRAME_STRUCT.size).tobytes()
        magic, kind, reserved, meta_bytes, body_bytes, stored = c.FRAME_STRUCT.unpack(header)
        if magic != c.FRAME_MAGIC:
            raise CorruptStream(f"frame at byte {place}: magic is {magic!r}, {c.FRAME_MAGIC!r} is expected")
        if meta_bytes > c.MAX_META_BYTES:
            raise CorruptStream(f"frame at byte {place}: {meta_bytes} bytes of meta, at most {c.MAX_META_BYTES} are allowed")
        body = place + c.FRAME_STRUCT.size + meta_bytes
        if body + body_bytes > end:
            raise beyond(f"frame at byte {place}: it takes {body + body_bytes - place} bytes, {end - place} are there")
        meta = self._source.read(place + c.FRAME_STRUCT.size, meta_bytes).tobytes()
        if stored != checksum(header[: c.FRAME_CHECKED] + meta):
            raise CorruptStream(f"frame at byte {place}: checksum does not hold; fetch the file again")
        if kind not in KINDS or any(reserved):
            raise UnsupportedStream(f"frame at byte {place}: kind {kind}, reserved {reserved!r}: install a newer pqcodec")
        fields = json_value(meta, f"frame at byte {place}")
        if not isinstance(fields, dict):
            raise CorruptStream(f"frame at byte {place}: a JSON object is expected")
        if kind == c.FRAME_METADATA and body_bytes:
            raise CorruptStream(f"frame at byte {place}: file metadata have a body of {body_bytes} bytes")
        tensor = kind in (c.FRAME_CODED, c.FRAME_EXACT)
        name, layer, role = (fields.get(key) if tensor else None for key in ("name", "layer", "role"))
        return Frame(place, kind, name, layer, role, meta_bytes, body_bytes), fields

    def _meta(self, item: Frame) -> dict[str, Any]:
        """The meta of a frame that the index lists, and that says the same."""
        found, meta = self._frame(item.offset, item.end)
        if found != item:
            raise CorruptStream(f"frame at byte {item.offset}: the index says {item}, the frame {found}")
        return meta

    def _read_entry(self, item: Frame) -> tuple[Entry, bool]:
        """A tensor's entry, and whether it was given as numpy's."""
        meta = self._meta(item)
        shape, dtype, layout = meta.get("shape"), meta.get("dtype"), meta.get("layout")
        if not isinstance(shape, list) or not all(natural(n) for n in shape) or not isinstance(layout, str):
            raise CorruptStream(f"shape {shape!r}, layout {layout!r}: a list of numbers from 0 and a string are expected")
        if not isinstance(dtype, str) or dtype not in c.EXACT_ITEM_BYTES:
            raise UnsupportedStream(f"dtype {dtype!r} is unknown to this release: install a newer pqcodec")
        coded = item.kind == c.FRAME_CODED
        entry = Entry(
            str(item.name), coded, item.layer, str(item.role), tuple(shape), dtype, layout, item.body_start, item.body_bytes
        )
        elements = math.prod(max(n, 1) for n in shape)
        if len(shape) > c.MAX_EXACT_NDIM or elements > c.MAX_ELEMENTS:
            caps = f"{c.MAX_EXACT_NDIM} dimensions and {c.MAX_ELEMENTS} elements"
            raise CorruptStream(f"shape {shape} is outside the caps of {caps}")
        if not coded and entry.tensor_bytes + c.CHECKSUM_BYTES != item.body_bytes:
            raise CorruptStream(f"shape {shape} of {dtype} does not go with a body of {item.body_bytes} bytes")
        numpy = meta.get("numpy", False)
        if type(numpy) is not bool:
            raise CorruptStream(f"numpy is {numpy!r}; true or false is expected")
        return entry, numpy

    def _stream(self, entry: Entry) -> _Part:
        """The stream of a coded tensor, which says the same as its frame."""
        part = _Part(self._source, entry.body_start, entry.body_bytes)
        info = codec.inspect(part)
        if (info.shape, info.dtype) != (entry.shape, entry.dtype):
            raise CorruptStream(f"the frame says {entry.shape} of {entry.dtype}, the stream {info.shape} of {info.dtype}")
        return part

    def _exact_bytes(self, entry: Entry) -> np.ndarray:
        return self._sealed_part(entry.body_start, entry.body_bytes)

    def _sealed_body(self, item: Frame) -> np.ndarray:
        return self._sealed_part(item.body_start, item.body_bytes)

    def _sealed_part(self, start: int, count: int) -> np.ndarray:
        """Bytes whose last four are the checksum of those before them, without these four."""
        if count < c.CHECKSUM_BYTES:
            raise CorruptStream(f"body at byte {start}: {count} bytes, the checksum alone takes {c.CHECKSUM_BYTES}")
        raw = self._source.read(start, count)
        if raw[-c.CHECKSUM_BYTES :].tobytes() != checksum_bytes(raw[: -c.CHECKSUM_BYTES]):
            raise CorruptStream(f"body at byte {start}: checksum does not hold")
        return raw[: -c.CHECKSUM_BYTES]

    def _named(self, name: str) -> Any:
        return named(f"{self._label}: tensor {name!r}")


def _cut(x: Any, tokens: tuple[int, int] | None, leading: tuple[int, int] | None) -> Any:
    """``tokens`` and ``leading`` of an exact tensor, as ``pqcodec.decode`` cuts a coded one."""
    if tokens is None and leading is None:
        return x
    if x.ndim < 2:
        raise InvalidArgument(f"shape {tuple(x.shape)}: tokens and leading need [..., tokens, head_dim]")
    if leading is not None:
        x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    for name, wanted, count in (("tokens", tokens, x.shape[-2]), ("leading", leading, x.shape[0])):
        if wanted is not None and not 0 <= wanted[0] <= wanted[1] <= count:
            raise InvalidArgument(f"{name} {wanted[0]} .. {wanted[1]} is outside 0 .. {count} of the tensor")
    if tokens is not None:
        x = x[..., tokens[0] : tokens[1], :]
    return x if leading is None else x[leading[0] : leading[1]]
