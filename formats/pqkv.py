"""Law: the .pqkv file (SPEC Part II): many coded and exact tensors in one log of frames, an index and a footer behind them.

Frames are written as they come and read by place, so neither side holds more than one tensor. A file grows by frames, an
index and a footer behind what is there (``appender``): nothing that was committed is written again.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

import numpy as np

from pqcodec import arrays, codec
from pqcodec import constants as c
from pqcodec.checksum import checksum
from pqcodec.errors import CorruptStream, InvalidArgument, PQError, TruncatedStream, UnsupportedStream
from pqcodec.formats import exact, remote
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
from pqcodec.source import FileSource, MappedSource, MemorySource, Source, check_range
from pqcodec.stream import Damage, StreamInfo, checked_range

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
    body_start: int  # byte of the file; of the first part
    body_bytes: int  # of all parts
    parts: int = 1  # streams that hold its tokens one behind the other

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self.shape) * c.EXACT_ITEM_BYTES[self.dtype]

    @property
    def tokens(self) -> int:
        return self.shape[-2] if len(self.shape) > 1 else 1

    def continued_by(self, shape: tuple[int, ...], dtype: str) -> bool:
        """Whether tokens of a shape and dtype can stand behind these."""
        whole = min(len(shape), len(self.shape)) > 1
        return whole and (shape[:-2], shape[-1], dtype) == (self.shape[:-2], self.shape[-1], self.dtype)

    def with_tokens(self, tokens: int, parts: int, body_bytes: int) -> Entry:
        return replace(self, shape=(*self.shape[:-2], tokens, self.shape[-1]), parts=parts, body_bytes=body_bytes)


@contextmanager
def named(place: str) -> Iterator[None]:
    """Errors of pqcodec inside the block say first where they arose."""
    try:
        yield
    except PQError as error:
        raise type(error)(f"{place}: {error}") from error


def unknown(label: str, name: str, names: tuple[str, ...]) -> InvalidArgument:
    """The error for a tensor that is not in a file."""
    some = ", ".join(repr(n) for n in names[:5]) + (" ..." if len(names) > 5 else "")
    return InvalidArgument(f"{label}: no tensor is called {name!r}; there are {some or 'none'}")


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
        self._previous: int | None = None  # where the frames end that were there before
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        self._failed = False
        self._items: list[Frame] = []
        self._names: set[str] = set()
        self.bytes_written = 0  # of the whole file

    def __enter__(self) -> PQKVWriter:
        meta = None if self._metadata is None else json_bytes(self._metadata, "metadata", c.MAX_META_BYTES)
        with ExitStack() as stack:
            if isinstance(self._target, (str, os.PathLike)):
                url = remote.is_url(self._target)
                path = stack.enter_context(remote.uploading(str(self._target)) if url else replacing(self._target))
                self._file = stack.enter_context(open(path, "wb", buffering=0))
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
            self._commit()
        self._file = None

    def _commit(self) -> None:
        """Index and footer of the frames since the last ones."""
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

    Opening reads head, footers and indexes; a tensor's bytes are read when it is asked for. Every length is held against
    the file's real size before it is used. A file that has grown opens at its last complete append: ``torn_bytes`` lie
    behind it if a writer was killed. Raises TruncatedStream, CorruptStream or UnsupportedStream.
    """

    def __init__(self, source: PathOrFile | bytes | bytearray | memoryview) -> None:
        self._stack = ExitStack()
        self._source: Source
        if isinstance(source, (bytes, bytearray, memoryview)):
            self._label, self._source = "<bytes>", MemorySource(source)
        elif remote.is_url(source):
            self._label, self._source = str(source), remote.RemoteSource(str(source))
        elif isinstance(source, (str, os.PathLike)):
            self._label, self._source = os.fspath(source), self._stack.enter_context(MappedSource(source))
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
        self._tensors: dict[str, list[Frame]] = {}  # a tensor's parts, in the order of their tokens
        for item in self._items:
            if item.name is not None:
                self._tensors.setdefault(item.name, []).append(item)
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
    def committed_bytes(self) -> int:
        """Bytes up to the end of the last complete write or append."""
        return self._committed

    @property
    def torn_bytes(self) -> int:
        """Bytes of an append that was cut off; they are not part of the file."""
        return self.size - self._committed

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
            raise unknown(self._label, name, self.names)
        if name not in self._entries:
            with self._named(name):
                self._entries[name], self._numpy[name] = self._whole(self._tensors[name])
        return self._entries[name]

    def stream(self, name: str, part: int = 0) -> Source:
        """The stream of a coded tensor (or of one part of a grown one), to be read by place or moved as it is."""
        entry = self.entry(name)
        with self._named(name):
            if not entry.coded or not 0 <= part < entry.parts:
                raise InvalidArgument("is kept exactly, it has no stream" if not entry.coded else f"has no part {part}")
            return self._stream(self._read_entry(self._tensors[name][part])[0])

    def inspect(self, name: str) -> StreamInfo:
        """What the stream of a coded tensor says of itself; reads only its header."""
        entry = self.entry(name)
        with self._named(name):
            if not entry.coded:
                raise InvalidArgument("is kept exactly, no stream is there to inspect; see entry(name)")
            parts = [codec.inspect(self._stream(self._read_entry(item)[0])) for item in self._tensors[name]]
            sizes = ("stream_bytes", "header_bytes", "side_bytes", "payload_bytes", "tensor_bytes")
            return replace(parts[0], shape=entry.shape, **{key: sum(getattr(part, key) for part in parts) for key in sizes})

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
                options = {"device": device, "backend": backend, "leading": leading, "progress": progress}
                if entry.parts == 1:
                    return codec.decode(self._stream(entry), tokens=tokens, **options)
                return arrays.joined(self._decoded_parts(entry, tokens, options))
            x = exact.from_bytes(self._exact_bytes(entry), entry.shape, entry.dtype, self._numpy[name])
            x = exact.cut(x, tokens, leading)
            return x if device is None else arrays.to_device(x, device)

    def _decoded_parts(self, entry: Entry, tokens: tuple[int, int] | None, options: dict[str, Any]) -> Iterator[Any]:
        """What each part of a grown tensor that is wanted gives; at least one."""
        first, last = checked_range("tokens", tokens, entry.shape[-2])
        begin = given = 0
        for number, item in enumerate(self._tensors[entry.name]):
            part, _ = self._read_entry(item)
            end = begin + part.shape[-2]
            wanted = max(first, begin), min(last, end)
            if wanted[0] < wanted[1] or (number == entry.parts - 1 and not given):
                wanted = wanted if wanted[0] < wanted[1] else (end, end)
                given += 1
                yield codec.decode(self._stream(part), tokens=(wanted[0] - begin, wanted[1] - begin), **options)
            begin = end

    def verify(self, progress: Progress | None = None, *, backend: str = "auto") -> list[tuple[str | None, Damage | str]]:
        """Check every byte; an empty list is a sound file. The name is None where the file's metadata are damaged."""
        found: list[tuple[str | None, Damage | str]] = []
        if self.torn_bytes:
            found.append((None, f"{self.torn_bytes} bytes of an append that was cut off; appending again removes them"))
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
        """The frames that the indexes list, from a head, footers and indexes that hold."""
        self.version = self._check_head()
        grown = self.version == c.GROWN_VERSION
        footer = self._footer(self.size - c.FOOTER_STRUCT.size)
        whole = footer is not None and footer[1] == self.size
        if not whole and not grown:
            self._explain_missing_footer()
        end = self._committed = self.size if whole else self._last_commit()
        runs: list[list[Frame]] = []
        first: int | None = end
        while first is not None:
            items, first = self._listed(end, grown)
            runs.append(items)
            end = first or 0
        items = [item for run in reversed(runs) for item in run]
        seen: dict[str | None, Frame] = {}
        for item in items:
            before = seen.get(item.name)
            continues = grown and before is not None and before.kind == item.kind == c.FRAME_CODED
            if before is not None and not (continues and (before.layer, before.role) == (item.layer, item.role)):
                raise CorruptStream(f"index: two tensors are called {item.name!r}" if item.name else "index: two file metadata")
            seen[item.name] = item
        return items

    def _listed(self, size: int, grown: bool) -> tuple[list[Frame], int | None]:
        """The frames of the index whose footer ends at a byte, and where the footer before them ends (None: no other is)."""
        footer = self._footer(size - c.FOOTER_STRUCT.size)
        if footer is None or footer[1] != size:
            raise CorruptStream(f"no footer that holds ends at byte {size}")
        start, end = footer[0], size - c.FOOTER_STRUCT.size
        if not c.FILE_HEAD_STRUCT.size <= start <= end:
            raise CorruptStream(f"footer: the index is at byte {start}, outside the file")
        index, _ = self._frame(start, end)
        if index.kind != c.FRAME_INDEX or index.end != end or index.body_bytes > c.MAX_INDEX_BYTES + c.CHECKSUM_BYTES:
            raise CorruptStream(f"the frame at byte {start} is not an index that ends at the footer")
        listed = json_value(self._sealed_body(index).tobytes(), "index")
        previous = None
        if grown and isinstance(listed, dict):
            told, listed = listed.get("previous"), listed.get("frames")
            previous = told if isinstance(told, int) and natural(told) else 0
            if not c.FILE_HEAD_STRUCT.size < previous <= start:
                raise CorruptStream(
                    f"index at byte {start}: the footer before it ends at {told!r}, a byte before it is expected"
                )
        if not isinstance(listed, list):
            raise CorruptStream("index: a JSON list is expected")
        items = [frame_of(place, fields) for place, fields in enumerate(listed)]
        expected = c.FILE_HEAD_STRUCT.size if previous is None else previous
        for place, item in enumerate(items):
            if item.offset != expected:
                raise CorruptStream(f"index: frame {place} is at byte {item.offset}, the one before it ends at {expected}")
            expected = item.end
        if expected != start:
            raise CorruptStream(f"index: its frames end at byte {expected}, the index is at {start}")
        return items, previous

    def _check_head(self) -> int:
        """The file's version."""
        head = self._source.read(0, min(self.size, c.FILE_HEAD_STRUCT.size)).tobytes()
        magic = head[: len(c.FILE_MAGIC)]
        if magic == c.STREAM_MAGIC:
            raise InvalidArgument("is a single stream, not a .pqkv file; use pqcodec.decode")
        if magic != c.FILE_MAGIC[: len(magic)]:
            raise CorruptStream(f"magic is {magic!r}, a .pqkv file begins with {c.FILE_MAGIC!r}; is this the right file?")
        if len(head) < c.FILE_HEAD_STRUCT.size:
            raise TruncatedStream(f"{len(head)} bytes, a head takes {c.FILE_HEAD_STRUCT.size}; the file is cut off")
        _, version, reserved, _ = c.FILE_HEAD_STRUCT.unpack(head)
        if version not in (c.FILE_VERSION, c.GROWN_VERSION):
            known = f"{c.FILE_VERSION} and {c.GROWN_VERSION}"
            raise UnsupportedStream(f"file version {version}; this release reads {known}: install a newer pqcodec")
        if head != sealed(head):
            raise CorruptStream("head: checksum does not hold; fetch the file again")
        if any(reserved):
            raise UnsupportedStream("head: reserved bytes are not zero: install a newer pqcodec")
        return int(version)

    def _footer(self, place: int) -> tuple[int, int] | None:
        """Index offset and file size of a footer that holds at a byte, or None."""
        if place < c.FILE_HEAD_STRUCT.size:
            return None
        data = self._source.read(place, c.FOOTER_STRUCT.size).tobytes()
        magic, index, size, _ = c.FOOTER_STRUCT.unpack(data)
        return (index, size) if magic == c.FOOTER_MAGIC and data == sealed(data) else None

    def _explain_missing_footer(self) -> NoReturn:
        """Walk the frames to tell a file that was cut off from one that is damaged."""
        place, tensors, footers = self._walk()
        if self.size - place < max(c.FRAME_STRUCT.size, c.FOOTER_STRUCT.size) and not footers:
            raise TruncatedStream(f"the file is cut off at byte {self.size}; {tensors} whole tensors are before it")
        if footers:
            raise CorruptStream(f"{self.size - footers[0]} bytes behind the end of the file; cut them off")
        raise CorruptStream(
            f"at byte {place} is neither a frame nor a footer that holds; {tensors} whole tensors are before it"
        )

    def _last_commit(self) -> int:
        """Where the last footer of a grown file ends, if what lies behind it was cut off; raises where it was not."""
        place, tensors, footers = self._walk()
        rest = self.size - place
        if not footers:
            raise TruncatedStream(f"the file is cut off at byte {self.size}; {tensors} whole tensors are before it")
        if rest >= max(c.FRAME_STRUCT.size, c.FOOTER_STRUCT.size) and not self._runs_out(place):
            raise CorruptStream(
                f"at byte {place} is neither a frame nor a footer that holds; {tensors} whole tensors are before it"
            )
        return footers[-1]

    def _walk(self) -> tuple[int, int, list[int]]:
        """Frames and footers from the head on: where the first begins that is not whole, tensors before it, ends of footers."""
        place, tensors, footers = c.FILE_HEAD_STRUCT.size, 0, []
        while self.size - place >= c.FRAME_STRUCT.size:
            magic = self._source.read(place, 4).tobytes()
            if magic == c.FRAME_MAGIC and not (self.version == c.GROWN_VERSION and self._runs_out(place)):
                with named(f"{tensors} whole tensors, then"):
                    item, _ = self._frame(place, self.size, TruncatedStream)
                place, tensors = item.end, tensors + (item.kind in (c.FRAME_CODED, c.FRAME_EXACT))
            elif (footer := self._footer(place)) and footer[1] == place + c.FOOTER_STRUCT.size:
                place += c.FOOTER_STRUCT.size
                footers.append(place)
                if self.version == c.FILE_VERSION:
                    break
            else:
                break
        return place, tensors, footers

    def _runs_out(self, place: int) -> bool:
        """Whether a frame begins at a byte whose header holds and which ends behind the file."""
        header = self._source.read(place, c.FRAME_STRUCT.size).tobytes()
        magic, _, _, meta_bytes, body_bytes, stored = c.FRAME_STRUCT.unpack(header)
        meta = place + c.FRAME_STRUCT.size
        if magic != c.FRAME_MAGIC or meta_bytes > c.MAX_META_BYTES:
            return False
        if meta + meta_bytes > self.size:
            return True  # the checksum is of the meta, too, which is not there
        holds = stored == checksum(header[: c.FRAME_CHECKED] + self._source.read(meta, meta_bytes).tobytes())
        return bool(holds) and meta + meta_bytes + body_bytes > self.size

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

    def _whole(self, items: list[Frame]) -> tuple[Entry, bool]:
        """The entry of a tensor of one part or of many, whose tokens follow each other."""
        entry, numpy = self._read_entry(items[0])
        tokens = entry.tokens
        for item in items[1:]:
            part, _ = self._read_entry(item)
            if not entry.continued_by(part.shape, part.dtype):
                raise CorruptStream(
                    f"the part at byte {item.offset} is {part.dtype} {part.shape}, the first {entry.dtype} {entry.shape}"
                )
            first = self._meta(item).get("first_token")
            if first != tokens:
                raise CorruptStream(f"the part at byte {item.offset} begins with token {first!r}, {tokens} is expected")
            tokens += part.shape[-2]
        if len(items) == 1:
            return entry, numpy
        return entry.with_tokens(tokens, len(items), sum(item.body_bytes for item in items)), numpy

    def _read_entry(self, item: Frame) -> tuple[Entry, bool]:
        """The entry of a tensor's part, and whether it was given as numpy's."""
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
