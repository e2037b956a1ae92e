"""Law: reading a cache from a zarr store by its listing (SPEC III.3), without zarr's arrays.

zarr reads and slices the arrays by itself; this reader takes the streams from the store's objects. The listing, in the
attributes of the group ``complete``, gives their sizes and seals. It is written last: a store without it was not written to its
end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from zarr.storage import LocalStore

from pqcodec import codec
from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.formats.containers import listing
from pqcodec.formats.containers.reader import Check, Entry, StreamPart, TensorFile, named
from pqcodec.formats.containers.zarr.objects import DOCUMENT, document, get, lost, object_source, store_of, total_bytes
from pqcodec.formats.containers.zarr.writer import CRC_BYTES, SAFE, document_seal, shard_index, with_crc
from pqcodec.formats.plain.documents import checksum_bytes, natural
from pqcodec.stream.magic import whose_file
from pqcodec.stream.report import Damage
from pqcodec.stream.source import Extent, Source, owned
from pqcodec.stream.tables import Tables

MOST_IN_SHARD = 1 << 20  # chunks of zarr


class ZarrCache(TensorFile):
    """Reads a cache that ``save_zarr`` or ``convert`` wrote, from a path, a URL or a store of zarr; a context manager.

    Raises InvalidArgument for a store without a complete cache, FileNotFoundError, TruncatedStream, CorruptStream or
    UnsupportedStream.

    >>> import numpy as np
    >>> from zarr.storage import MemoryStore
    >>> from pqcodec.formats.containers.writer import Piece
    >>> from pqcodec.formats.containers.zarr.writer import write_pieces
    >>> store = MemoryStore()
    >>> size = write_pieces(store, [Piece("positions", False, None, "other", (4,), "int64", "...", lambda: np.arange(4))])
    >>> with ZarrCache(store) as file:
    ...     file.names, file.decode("positions").tolist()
    (('positions',), [0, 1, 2, 3])
    """

    def __init__(self, store: Any) -> None:
        super().__init__(str(store))
        self._store = store_of(store, True)
        with named(self._label):
            values = self._open()
            self._metadata, listed = listing.read_listing(values)
            for number, fields in enumerate(listed):
                if problem := _problem(fields):
                    raise CorruptStream(f"{c.ZARR_COMPLETE}: tensor {number}: {problem}")
            self._tensors = {fields["name"]: fields for fields in listed}
            if len(self._tensors) != len(listed):
                raise CorruptStream(f"{c.ZARR_COMPLETE}: a name stands twice")
            listing.check_listing(values, None)
        self._values = values

    @cached_property
    def tables(self) -> Tables:  # type: ignore[override]
        """The shared tables that the store carries, by the bytes of their names; raises CorruptStream or UnsupportedStream."""
        with named(self._label):
            return listing.read_tables(self._values)

    @cached_property
    def size(self) -> int:
        """Bytes of all objects."""
        return total_bytes(self._store)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order of the listing."""
        return tuple(self._tensors)

    @property
    def metadata(self) -> dict[str, Any]:
        """The writer's ``metadata``; empty without any."""
        return self._metadata

    def _open(self) -> dict[str, Any]:
        """The attributes of the group ``complete``; raises InvalidArgument where it is missing."""
        root = self._attributes(DOCUMENT)
        if root is None and isinstance(self._store, LocalStore) and not self._store.root.exists():
            raise FileNotFoundError(2, "no such folder", str(self._store.root))
        if root is None or root.get("format") != c.ZARR_FORMAT:
            raise InvalidArgument(f"holds no cache of save_zarr{self._advice()}")
        values = self._attributes(f"{c.ZARR_COMPLETE}/{DOCUMENT}")
        if values is None:
            raise InvalidArgument(
                "holds a cache that was not written to its end; write it again with save_zarr(..., overwrite=True)"
            )
        return values

    def _advice(self) -> str:
        """The end of the message about a place that is no cache in zarr: what else it is, or what to do."""
        if isinstance(self._store, LocalStore) and not self._store.root.is_dir():
            return whose_file(self._store.root)
        return "; write it again with save_zarr(..., overwrite=True)"

    def _attributes(self, key: str) -> dict[str, Any] | None:
        parsed = document(self._store, key)
        if parsed is None:
            return None
        values = parsed.get("attributes", {}) if isinstance(parsed, dict) else None
        if not isinstance(values, dict):
            raise CorruptStream(f"{key}: a group of zarr with attributes is expected")
        return values

    def _local_files(self) -> list[str]:
        if not isinstance(self._store, LocalStore):
            return []
        found = self._tensors.values()
        keys = [_key(fields, number) for fields in found for number in range(len(fields.get("objects", [1])))]
        return [str(self._store.root / key) for key in keys]

    # -- tensors -------------------------------------------------------------------------------------------------
    def _read_entry(self, name: str) -> Entry:
        fields = self._tensors[name]
        size = sum(n for n, _ in fields["streams"]) if fields["coded"] else _exact_bytes(fields)
        return listing.entry_of(fields, fields["shape"], fields["dtype"], 0, size)

    def _read_parts(self, entry: Entry) -> list[StreamPart]:
        fields = self._tensors[entry.name]
        return listing.parts_of(
            entry, fields, [stream for found in self._objects(fields) for stream in found], self._known_tables
        )

    def _objects(self, fields: listing.Fields) -> Iterator[list[Extent]]:
        """The streams of each object of a coded tensor."""
        sizes = iter(n for n, _ in fields["streams"])
        for number, count in enumerate(fields.get("objects", [1])):
            here = [next(sizes) for _ in range(count)]
            source = self._object(fields, number, sum(here) + _index_bytes(fields))
            starts = np.cumsum([0, *here]).tolist()
            yield [Extent(source, start, size) for start, size in zip(starts, here, strict=False)]

    def _object(self, fields: listing.Fields, number: int, size: int) -> Source:
        return object_source(self._store, _key(fields, number), size)

    def _has_order_seal(self, entry: Entry) -> bool:
        return "order" in self._tensors[entry.name]

    def _read_exact(self, entry: Entry) -> Any:
        fields = self._tensors[entry.name]
        size = _exact_bytes(fields)
        if not size:
            return np.zeros(0, np.uint8)
        raw = owned(self._object(fields, 0, size + CRC_BYTES), 0, size)
        if checksum_bytes(raw).hex() != fields["seal"]:
            raise CorruptStream("checksum does not hold; fetch the object again")
        return raw

    def _checks(self) -> Iterator[Check]:
        start = 0
        for name in self.names:
            size = self._read_entry(name).body_bytes
            yield Check(name, start, size, self._damage(name))
            start += size

    def _damage(self, name: str) -> Callable[[str, codec.Progress], Sequence[Damage | str]]:
        def found(backend: str, progress: codec.Progress) -> Sequence[Damage | str]:
            entry, fields = self._read_entry(name), self._tensors[name]
            key = f"{fields['path']}/{DOCUMENT}"
            parsed = document(self._store, key)
            if not isinstance(parsed, dict) or document_seal(parsed) != fields["document"]:
                raise CorruptStream(f"{key} is not what was written; zarr would read the array in another way")
            if not entry.coded:
                raw = self._read_exact(entry)
                if raw.size and self._whole(fields, 0) != with_crc(raw.tobytes()):
                    raise CorruptStream("zarr's own checksum does not hold")
                return []
            self._check_shards(fields)
            return [damage for part in self._read_parts(entry) for damage in part.damage(backend, progress)]

        return found

    def _check_shards(self, fields: listing.Fields) -> None:
        """Raises CorruptStream where a tensor's objects have another length, or shards another index, than was written."""
        sizes = [n for n, _ in fields["streams"]]
        for number, count in enumerate(fields.get("objects", [1])):
            here, sizes = sizes[:count], sizes[count:]
            data = self._whole(fields, number)
            index = shard_index(here, fields["per_shard"]) if fields.get("per_shard") else b""
            if len(data) != sum(here) + len(index) or data[sum(here) :] != index:
                raise CorruptStream(f"object {number}: its length or its index is not what was written")

    def _whole(self, fields: listing.Fields, number: int) -> bytes:
        key = _key(fields, number)
        data = get(self._store, key)
        if data is None:
            raise lost(key)
        return data


def _key(fields: listing.Fields, number: int) -> str:
    """The key of object ``number`` along the tokens of a tensor's array."""
    index = [0] * len(fields["shape"])
    if len(index) > 1:
        index[-2] = number
    return "/".join([fields["path"], "c", *map(str, index)])


def _exact_bytes(fields: listing.Fields) -> int:
    return math.prod(fields["shape"]) * c.EXACT_ITEM_BYTES[fields["dtype"]]


def _index_bytes(fields: listing.Fields) -> int:
    per_shard = fields.get("per_shard", 0)
    return 16 * per_shard + CRC_BYTES if per_shard else 0


def _problem(fields: listing.Fields) -> str:
    """What is wrong with the fields that locate a tensor in the store, or an empty string."""
    path, document = fields.get("path"), fields.get("document")
    if not isinstance(path, str) or not all(SAFE.fullmatch(part) for part in path.split("/")) or not isinstance(document, str):
        return f"path is {path!r:.60}, document {document!r:.20}; the name of an array in the group and a checksum are expected"
    if problem := listing.numbers_problem(fields):
        return problem
    if not fields["coded"]:
        return ""
    streams, objects = fields.get("streams"), fields.get("objects", [1])
    if streams is None or not isinstance(objects, list) or not all(map(natural, objects)) or sum(objects) != len(streams):
        return f"objects is {objects!r:.60}; the number of streams in each is expected"
    per_shard = fields.get("per_shard", 0)
    whole = natural(per_shard) and per_shard <= MOST_IN_SHARD and (not per_shard or max(objects) <= per_shard)
    if not whole:
        return f"per_shard is {per_shard!r:.20}; a number from 0 to {MOST_IN_SHARD}, enough for its objects, is expected"
    return ""
