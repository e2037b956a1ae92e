"""Law: access to the objects of a zarr store, whole or by byte range; a store is a path, a URL, or a Store of zarr."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from zarr.abc.store import RangeByteRequest, Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import FsspecStore, LocalStore, StorePath

from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument, TruncatedStream
from pqcodec.formats.places import remote
from pqcodec.formats.plain.documents import json_value
from pqcodec.stream.source import MappedSource, MemorySource, Source, check_range, check_regular

DOCUMENT = "zarr.json"
_MOST_DOCUMENT_BYTES = 4 * c.MAX_INDEX_BYTES  # the listing, whose JSON is escaped within JSON
_WHOLE_BYTES = 1 << 20  # remote objects up to this size are read by one request


def store_of(target: Any, read_only: bool) -> Store:
    """zarr's store for a path, a URL or a Store; raises InvalidArgument for a URL of an unknown scheme, or OSError."""
    if isinstance(target, Store):
        return sync(StorePath.open(target, "", None)).store  # opens a ZipStore's file
    if remote.is_url(target):
        remote.check_url(str(target))
        with _transport(str(target)):
            return FsspecStore.from_url(str(target), read_only=read_only)
    remote.check_path(target, "store")
    return LocalStore(os.fspath(target), read_only=read_only)


@contextmanager
def _transport(label: str) -> Iterator[None]:
    """A context that turns other errors of a store into OSError with the store's name."""
    try:
        yield
    except (OSError, InvalidArgument, CorruptStream):
        raise
    except Exception as error:
        raise OSError(f"{label}: the store cannot be read: {error!r}") from error


def get(store: Store, key: str, most: int | None = None) -> bytes | None:
    """All bytes of an object; None where it is missing.

    Raises CorruptStream for a local object of more than ``most`` bytes or that is no regular file, and OSError.
    """
    if isinstance(store, LocalStore):
        _check_local(store, key, most)
    with _transport(str(store)):
        data = sync(store.get(key, default_buffer_prototype()))
    return None if data is None else data.to_bytes()


def document(store: Store, key: str) -> Any:
    """The parsed zarr.json of a group or an array; None where it is missing. Raises CorruptStream or OSError."""
    data = get(store, key, _MOST_DOCUMENT_BYTES)
    return None if data is None else json_value(data, key)


def _check_local(store: LocalStore, key: str, most: int | None) -> None:
    """Raises CorruptStream for a local object that is too large or no regular file; links, as in hub caches, are followed."""
    try:
        check_regular(store.root / key)
        size = os.path.getsize(store.root / key)
    except (FileNotFoundError, NotADirectoryError):
        return
    except InvalidArgument as error:
        raise CorruptStream(str(error)) from error
    if most is not None and size > most:
        raise CorruptStream(f"{key}: {size} bytes, at most {most} are read")


class _Object:
    """A remote object as a ``Source``; raises TruncatedStream, CorruptStream where it is missing, or OSError."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        self._store, self._key, self.size = store, key, size
        self._whole: MemorySource | None = None

    def read(self, start: int, count: int) -> np.ndarray:
        return self.read_many([(start, count)])[0]

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        for start, count in ranges:
            check_range(start, count, self.size)
        if self._whole is None and self.size <= _WHOLE_BYTES:
            self._whole = MemorySource(self._asked([(0, self.size)])[0])
        if self._whole is not None:
            return [self._whole.read(*wanted) for wanted in ranges]
        return self._asked(ranges)

    def _asked(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        async def ask() -> list[Any]:
            prototype = default_buffer_prototype()
            wanted = (RangeByteRequest(start, start + count) for start, count in ranges)
            return await asyncio.gather(*(self._store.get(self._key, prototype, one) for one in wanted))

        found = []
        with _transport(str(self._store)):
            came = sync(ask())
        for data, (start, count) in zip(came, ranges, strict=True):
            if data is None:
                raise lost(self._key)
            if len(data) != count:
                raise TruncatedStream(f"{self._key}: bytes {start} .. {start + count} wanted, {len(data)} came; it was cut off")
            found.append(np.frombuffer(data.to_bytes(), np.uint8))
        return found


def lost(key: str) -> CorruptStream:
    """The error for an object that is missing."""
    return CorruptStream(f"{key} is not in the store; copy the whole cache again")


def put(store: Store, key: str, data: bytes) -> None:
    """Write an object."""
    sync(store.set(key, default_buffer_prototype().buffer.from_bytes(data)))


def total_bytes(store: Store) -> int:
    """Bytes of all objects of a store."""
    return int(sync(store.getsize_prefix("")))


def object_source(store: Store, key: str, size: int) -> Source:
    """An object of ``size`` bytes as a ``Source``; a local file is mapped.

    Raises CorruptStream where a local object is missing or too long, TruncatedStream where it is too short; a remote object
    is checked when it is read.
    """
    if not isinstance(store, LocalStore):
        return _Object(store, key, size)
    _check_local(store, key, None)
    try:
        source = MappedSource(store.root / key)
    except (FileNotFoundError, NotADirectoryError):
        raise lost(key) from None
    if source.size != size:
        kind = TruncatedStream if source.size < size else CorruptStream
        raise kind(f"{key}: {source.size} bytes, {size} were written; copy it again")
    return source
