"""Law: bytes to decode from, in memory or in a file; a read names its place, and nothing else is read."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Thread
from typing import Any, BinaryIO, Protocol

import numpy as np

from pqcodec.errors import InvalidArgument, TruncatedStream

_WORTH_A_HINT = 1 << 16  # bytes of a read that the system is told of beforehand
_AHEAD_BYTES = 4 << 20
_PIECE_BYTES = 16 << 20  # of what is copied at once, and of a mapped file's pages that stay in memory


class Source(Protocol):
    """A run of bytes that is read by place."""

    size: int

    def read(self, start: int, count: int) -> np.ndarray:
        """uint8 [count]; raises TruncatedStream where the bytes end earlier."""
        ...


Range = tuple[int, int]  # first byte, number of bytes


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raises InvalidArgument for a pipe, a socket or a device, which would be waited for or never end; OSError."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise InvalidArgument(
            f"{os.fspath(path)}: is no regular file, but a pipe, a socket or a device; copy its bytes into one"
        )


def read_many(source: Source, ranges: Sequence[Range]) -> list[np.ndarray]:
    """Several reads; at once where the source can (a store that answers many requests together has ``read_many``)."""
    many = getattr(source, "read_many", None)
    return many(list(ranges)) if many and len(ranges) > 1 else [source.read(*wanted) for wanted in ranges]


class MemorySource:
    """A bytes-like object; reads are views. ``header`` and ``seal``: of the stream that it is, where they are known.

    Raises InvalidArgument where its bytes do not lie side by side.
    """

    views = True

    def __init__(self, data: Any, header: Any = None, seal: int | None = None) -> None:
        try:
            self._data = np.frombuffer(data, np.uint8)
        except (BufferError, ValueError) as error:
            raise InvalidArgument(
                f"a {type(data).__name__} whose bytes do not lie side by side ({error}); pass a copy"
            ) from None
        self.size = self._data.size
        self.header, self.seal = header, seal

    def read(self, start: int, count: int) -> np.ndarray:
        """uint8 [count] from byte ``start``, a view; raises TruncatedStream."""
        check_range(start, count, self.size)
        return self._data[start : start + count]


class FileSource:
    """A seekable binary file, or a part of it that begins at ``base``."""

    def __init__(self, file: BinaryIO, base: int = 0, size: int | None = None) -> None:
        self._file, self._base = file, base
        self.size = file.seek(0, os.SEEK_END) - base if size is None else size

    def read(self, start: int, count: int) -> np.ndarray:
        """uint8 [count] from byte ``start`` of the part; raises TruncatedStream."""
        check_range(start, count, self.size)
        self._file.seek(self._base + start)
        data = self._file.read(count)
        if len(data) != count:
            raise TruncatedStream(f"bytes {start} .. {start + count} wanted, the file ends {count - len(data)} bytes earlier")
        return np.frombuffer(data, np.uint8)


class Extent:
    """A run of bytes of another source, such as one stream of many; offsets count from its first byte.

    ``header``: the stream's header, kept once it was read. ``seal``: the stream's order seal (SPEC 4.3), where the container
    holds one.
    """

    def __init__(self, source: Source, base: int, size: int, seal: int | None = None) -> None:
        self._source, self._base, self.size, self.seal = source, base, size, seal
        self.header: Any = None

    @property
    def views(self) -> bool:
        """Whether reads are views of memory."""
        return bool(getattr(self._source, "views", False))

    def read(self, start: int, count: int) -> np.ndarray:
        """uint8 [count] from byte ``start`` of the extent; raises TruncatedStream."""
        check_range(start, count, self.size)
        return self._source.read(self._base + start, count)

    def read_many(self, ranges: Sequence[Range]) -> list[np.ndarray]:
        """uint8 [count] of each (start, count), at once where the source can; raises TruncatedStream."""
        for start, count in ranges:
            check_range(start, count, self.size)
        return read_many(self._source, [(self._base + start, count) for start, count in ranges])


def owned(source: Source, start: int, count: int) -> np.ndarray:
    """Bytes as an array of their own, uint8 [count], read some at a time; raises TruncatedStream as reading does."""
    check_range(start, count, source.size)
    found = np.empty(count, np.uint8)
    for place in range(0, count, _PIECE_BYTES):
        piece = min(_PIECE_BYTES, count - place)
        found[place : place + piece] = source.read(start + place, piece)
    return found


def fetched(source: Source) -> Source:
    """All of a source, read at once into memory; a source itself whose reads are views."""
    if getattr(source, "views", False):
        return source
    return MemorySource(source.read(0, source.size), getattr(source, "header", None), getattr(source, "seal", None))


class MappedSource:
    """A file that is mapped into memory; reads are views of it, valid until it is closed. A context manager.

    Of what was read, 16 MiB and the last read stay in memory: other pages are given back, and come again if they are looked at.
    """

    views = True

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_regular(path)
        with open(path, "rb") as file:
            self.size = file.seek(0, os.SEEK_END)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        self._data = np.frombuffer(self._map if self._map is not None else b"", np.uint8)
        self._read_bytes = 0  # since pages were given back

    def read(self, start: int, count: int) -> np.ndarray:
        """uint8 [count] from byte ``start``, a view of the mapping; raises TruncatedStream."""
        check_range(start, count, self.size)
        self._read_bytes += count
        if self._map is not None and self._read_bytes > _PIECE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read_bytes = count
        if self._map is not None and count >= _WORTH_A_HINT and hasattr(mmap, "MADV_WILLNEED"):
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_WILLNEED, page, start + count - page)  # else each page waits for the disk by itself
        return self._data[start : start + count]

    def __enter__(self) -> MappedSource:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing can be read any more; the mapping ends with the last view."""
        self.size, self._map, self._data = 0, None, np.zeros(0, np.uint8)


@contextmanager
def reading_ahead(paths: Sequence[str | os.PathLike[str]]) -> Iterator[None]:
    """While the block runs, a thread takes local files from the disk into the system's cache, one behind the other."""
    stop = Event()

    def read() -> None:
        buffer = bytearray(_AHEAD_BYTES)
        with suppress(OSError):  # the real read reports the error
            for path in filter(os.path.isfile, paths):
                with open(path, "rb", buffering=0) as file:
                    while not stop.is_set() and file.readinto(buffer):
                        pass

    Thread(target=read, daemon=True).start()
    try:
        yield
    finally:
        stop.set()


def check_range(start: int, count: int, size: int) -> None:
    """Raises TruncatedStream where ``count`` bytes from ``start`` end beyond ``size``."""
    if start + count > size:
        raise TruncatedStream(f"bytes {start} .. {start + count} wanted, {size} are there; the stream is cut off")


def source_of(data: object) -> Source:
    """A Source of a bytes-like object or a seekable binary file; a Source is given back as it is."""
    if isinstance(data, (MemorySource, FileSource)):
        return data
    if isinstance(data, (bytes, bytearray, memoryview, np.ndarray, mmap.mmap)):
        return MemorySource(data)
    if hasattr(data, "seek") and hasattr(data, "read"):
        return FileSource(data)  # type: ignore[arg-type]
    if hasattr(data, "size") and hasattr(data, "read"):
        return data  # type: ignore[return-value]
    advice = ""
    if isinstance(data, (str, os.PathLike)):
        advice = "; of a path pass open(path, 'rb'), and a file of many tensors to pqcodec.formats.load_cache"
    raise InvalidArgument(f"bytes or a seekable binary file are expected, not {type(data).__name__}{advice}")
