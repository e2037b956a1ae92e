"""Law: the objects of a zarr store, by key and by place; a store is a path, a URL, or one of zarr's own."""

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
_MOST_DOCUMENT_BYTES = 4 * c.MAX_INDEX_BYTES  # a list of tensors and metadata, as text within text
_WHOLE_BYTES = 1 << 20  # objects of a store up to this size come in one request


def store_of(place: Any, read_only: bool) -> Store:
    """A store of zarr, from itself, a path or a URL."""
    if isinstance(place, Store):
        return sync(StorePath.open(place, "", None)).store  # a ZipStore opens its file here
    if remote.is_url(place):
        remote.check_url(str(place))
        with _transport(str(place)):
            return FsspecStore.from_url(str(place), read_only=read_only)
    return LocalStore(os.fspath(place), read_only=read_only)


@contextmanager
def _transport(label: str) -> Iterator[None]:
    """Errors of a store's connection become OSError and name the store."""
    try:
        yield
    except (OSError, InvalidArgument, CorruptStream):
        raise
    except Exception as error:
        raise OSError(f"{label}: the store cannot be read: {error!r}") from error


def get(store: Store, key: str, most: int | None = None) -> bytes | None:
    """All bytes of an object, None where there is none; raises CorruptStream for one of more than ``most`` bytes, or a pipe."""
    if isinstance(store, LocalStore):
        _check_local(store, key, most)
    with _transport(str(store)):
        data = sync(store.get(key, default_buffer_prototype()))
    return None if data is None else data.to_bytes()


def document(store: Store, key: str) -> Any:
    """What zarr says of a group or an array, None where it says nothing; raises CorruptStream."""
    data = get(store, key, _MOST_DOCUMENT_BYTES)
    return None if data is None else json_value(data, key)


def _check_local(store: LocalStore, key: str, most: int | None) -> None:
    """Links are followed, as the caches of hubs are made of them, but what is read is a file that ends."""
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
    """An object of a store that is no local file."""

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
    return CorruptStream(f"{key} is not in the store; copy the whole cache again")


def put(store: Store, key: str, data: bytes) -> None:
    sync(store.set(key, default_buffer_prototype().buffer.from_bytes(data)))


def total_bytes(store: Store) -> int:
    return int(sync(store.getsize_prefix("")))


def object_source(store: Store, key: str, size: int) -> Source:
    """An object that is as long as it was written, to be read by place; a local file is mapped.

    Raises CorruptStream.
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
