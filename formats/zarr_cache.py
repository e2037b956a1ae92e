"""Law: a whole cache as a group of zarr arrays: a coded tensor is one of the codec ``pqcodec``, an exact one a plain array.

zarr reads and slices the arrays by itself; this reader takes the streams as they lie in the store. What was written, in which
pieces, and what each of them must look like is told by the attributes of the group ``complete`` (``listing``), which is written
last: a store without it was not written to its end.

A tensor of one stream is an array of one chunk; streams of one size (``save_zarr``) are a chunk each, or a shard of several;
any others are one chunk, one behind the other.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import RangeByteRequest, Store
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.errors import ContainsArrayError, ContainsGroupError
from zarr.storage import FsspecStore, LocalStore, StorePath

from pqcodec import __version__, codec
from pqcodec import constants as c
from pqcodec.centre import PAIRINGS, Rope
from pqcodec.errors import CorruptStream, InvalidArgument, TruncatedStream
from pqcodec.formats import exact, listing, remote
from pqcodec.formats.atomic import replacing_folder
from pqcodec.formats.cache import layers_of, recipe_of
from pqcodec.formats.frames import checksum_bytes, json_bytes, json_value, natural
from pqcodec.formats.pieces import Coded, Piece, check_pieces
from pqcodec.formats.recipe import CHUNK_TOKENS, EXACT_TOKENS, layers_by_name
from pqcodec.formats.tensor_file import LAYOUT, Check, Entry, Progress, StreamPart, TensorFile, named
from pqcodec.formats.zarr_codec import TOKENS_PER_CHUNK, PQCodec
from pqcodec.header import Header
from pqcodec.source import MappedSource, MemorySource, Part, Source, check_range
from pqcodec.stream import Damage, read_header

_DOCUMENT = "zarr.json"
_STORED_AS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e4m3fnuz": "uint8", "float8_e5m2": "uint8"}
_STORED_AS |= {"float8_e5m2fnuz": "uint8"}  # numbers that zarr lacks, as they lie in memory
_SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}")  # a name that can be that of a folder
_CRC_BYTES = 4
_WHOLE_BYTES = 1 << 20  # objects of a store up to this size come in one request
_MOST_IN_SHARD = 1 << 20  # chunks
_MISSING = (1 << 64) - 1  # in the index of a shard


# -- stores ------------------------------------------------------------------------------------------------------
def _store_of(place: Any, read_only: bool) -> Store:
    """A store of zarr, from itself, a path or a URL."""
    if isinstance(place, Store):
        return sync(StorePath.open(place, "", None)).store  # a ZipStore opens its file here
    if remote.is_url(place):
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


def _get(store: Store, key: str) -> bytes | None:
    with _transport(str(store)):
        data = sync(store.get(key, default_buffer_prototype()))
    return None if data is None else data.to_bytes()


class _Object:
    """An object of a store that is no local file."""

    costly = True

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
                raise _lost(self._key)
            if len(data) != count:
                raise TruncatedStream(f"{self._key}: bytes {start} .. {start + count} wanted, {len(data)} came; it was cut off")
            found.append(np.frombuffer(data.to_bytes(), np.uint8))
        return found


def _lost(key: str) -> CorruptStream:
    return CorruptStream(f"{key} is not in the store; copy the whole cache again")


# -- writing -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Grid:
    """How the streams of a tensor lie in objects: tokens of a chunk, chunks of a shard (0: no shards), streams an object."""

    chunk_tokens: int
    per_shard: int
    objects: tuple[int, ...]

    @classmethod
    def of(cls, tokens: Sequence[int], per_shard: int | None) -> _Grid:
        regular = len(tokens) > 1 and len(set(tokens[:-1])) == 1 and 0 < tokens[-1] <= tokens[0]
        if not regular and not (per_shard and len(tokens) == 1):
            return cls(max(sum(tokens), 1), 0, (len(tokens),))
        if not per_shard:
            return cls(tokens[0], 0, (1,) * len(tokens))
        whole, rest = divmod(len(tokens), per_shard)
        return cls(tokens[0], per_shard, (per_shard,) * whole + ((rest,) if rest else ()))


def write_pieces(
    target: Any,
    pieces: Sequence[Piece],
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
    *,
    overwrite: bool = True,
    chunks_per_shard: int | None = None,
) -> int:
    """Write tensors into a store and return its bytes. A local folder appears when it is complete; any other store holds a
    cache when the last object is written.

    ``progress`` is told (tensors done, tensors in all). Raises InvalidArgument, OSError, and what a ``body`` raises.
    """
    check_pieces(pieces)
    meta = json_bytes(metadata or {}, "metadata", c.MAX_META_BYTES).decode()
    if isinstance(target, (str, os.PathLike)) and not remote.is_url(target):
        if not overwrite and os.path.exists(target):
            raise InvalidArgument(f"{os.fspath(target)}: exists; pass overwrite=True to replace it, or choose another place")
        with replacing_folder(target, _DOCUMENT) as folder:
            return _write(LocalStore(folder), pieces, meta, progress, False, chunks_per_shard)
    return _write(_store_of(target, False), pieces, meta, progress, overwrite, chunks_per_shard)


def _write(
    store: Store, pieces: Sequence[Piece], meta: str, progress: Progress | None, overwrite: bool, per_shard: int | None
) -> int:
    about = {"format": c.ZARR_FORMAT, "pqcodec": __version__, "metadata": json.loads(meta)}
    try:
        root = zarr.create_group(store, attributes=about, overwrite=overwrite)
    except (ContainsGroupError, ContainsArrayError) as error:
        raise InvalidArgument(f"{error} Pass overwrite=True to replace it, or choose another place.") from None
    writer = _Writer(store, root)
    paths = _paths(pieces)
    for done, piece in enumerate(pieces, 1):
        with named(f"tensor {piece.name!r}"):
            writer.add(piece, paths[piece.name], per_shard)
        if progress:
            progress(done, len(pieces))
    root.create_group(c.ZARR_COMPLETE, attributes=dict(listing.sealed_listing(writer.listed, meta, None)))
    return int(sync(store.getsize_prefix("")))


class _Writer:
    """Writes tensors as arrays and keeps what the list is to say of them."""

    def __init__(self, store: Store, root: zarr.Group) -> None:
        self._store, self._root = store, root
        self.listed: list[listing.Fields] = []

    def add(self, piece: Piece, path: str, per_shard: int | None) -> None:
        body: Any = piece.body() if piece.coded else piece.plain()
        if piece.coded and not math.prod(piece.shape):  # zarr has no chunk to put the stream into
            body = codec.decode(body.streams[0])
        fields = self._coded(piece, path, body, per_shard) if isinstance(body, Coded) else self._exact(piece, path, body)
        document = json_value(_get(self._store, f"{path}/{_DOCUMENT}") or b"", path)
        self.listed.append({**fields, "path": path, "document": _seal(document)})

    def _coded(self, piece: Piece, path: str, body: Coded, per_shard: int | None) -> listing.Fields:
        headers = [read_header(stream) for stream in body.streams]
        h = headers[0]
        grid = _Grid.of([header.tokens for header in headers], per_shard)
        shape, chunks = piece.shape, list(piece.shape)
        if len(shape) > 1:
            chunks[-2] = grid.chunk_tokens
        shards = (*chunks[:-2], chunks[-2] * grid.per_shard, chunks[-1]) if grid.per_shard else None
        dtype = np.float16 if h.dtype == c.DTYPE_FLOAT16 else np.float32
        array = self._create(piece, path, shape, dtype, chunks, shards=shards, serializer=_codec_of(h), compressors=None)
        place = 0
        for number, count in enumerate(grid.objects):
            streams = body.streams[place : place + count]
            data = b"".join(stream.read(0, stream.size).tobytes() for stream in streams)
            if grid.per_shard:
                data += _shard_index([stream.size for stream in streams], grid.per_shard)
            self._put(array, (*[0] * len(shape[:-2]), number, 0)[-len(shape) :], data)
            place += count
        more = listing.coded_fields(body.streams, body.rel_mse)
        more |= {"objects": list(grid.objects), "per_shard": grid.per_shard} if len(headers) > 1 or grid.per_shard else {}
        sizes = {} if "streams" in more else {"streams": [[body.streams[0].size, headers[0].tokens]]}
        return listing.fields_of(piece, listing.seal_of(body.streams), **more, **sizes)

    def _exact(self, piece: Piece, path: str, x: Any) -> listing.Fields:
        raw = exact.to_bytes(x)
        stored = np.dtype(_STORED_AS.get(piece.dtype, piece.dtype))
        how: dict[str, Any] = {"serializer": BytesCodec(endian="little"), "compressors": [Crc32cCodec()]}
        array = self._create(piece, path, piece.shape, stored, [max(n, 1) for n in piece.shape], **how)
        if raw.size:
            self._put(array, (0,) * len(piece.shape), _with_crc(raw.tobytes()))
        plain = Piece(**{**vars(piece), "coded": False})
        about = {"numpy": not exact.is_torch(x), "shape": list(piece.shape), "dtype": piece.dtype}
        return listing.fields_of(plain, checksum_bytes(raw).hex(), **about)

    def _create(self, piece: Piece, path: str, shape: Sequence[int], dtype: Any, chunks: Sequence[int], **how: Any) -> Any:
        attributes = {"name": piece.name, "layout": piece.layout, "layer": piece.layer, "role": piece.role}
        tokens = piece.layout == LAYOUT and len(shape) > 1
        return self._root.create_array(
            path,
            shape=tuple(shape),
            dtype=dtype,
            chunks=tuple(max(n, 1) for n in chunks),
            fill_value=0,
            dimension_names=(*(None,) * (len(shape) - 2), "tokens", "head_dim") if tokens else None,
            attributes={**attributes, "dtype": piece.dtype, "pqcodec": __version__},
            **how,
        )

    def _put(self, array: Any, place: Sequence[int], data: bytes) -> None:
        key = f"{array.path}/{array.metadata.encode_chunk_key(tuple(place))}"
        sync(self._store.set(key, default_buffer_prototype().buffer.from_bytes(data)))


def _paths(pieces: Sequence[Piece]) -> dict[str, str]:
    """Where each tensor's array lies: layers.3.key at layers/3/key; names that folders cannot have are numbered."""
    found: dict[str, str] = {}
    nodes, leaves = {c.ZARR_COMPLETE}, {c.ZARR_COMPLETE}  # folders that are taken, and those that are arrays
    for number, piece in enumerate(pieces):
        parts = re.split(r"[./]", piece.name)
        above = {"/".join(parts[:i]).lower() for i in range(1, len(parts))}
        path = "/".join(parts)
        taken = path.lower() in nodes or above & leaves
        if taken or not all(_SAFE.fullmatch(part) for part in parts):
            path, above = f"tensors/{number}", {"tensors"}
        nodes |= {path.lower(), *above}
        leaves.add(path.lower())
        found[piece.name] = path
    return found


def _codec_of(h: Header) -> PQCodec:
    """The codec that chunks to come are written with, as those that are there were."""
    info = codec.inspect_header(h)
    rope = None
    if h.rope is not None:
        style = next(style for style, pairing in PAIRINGS.items() if pairing == h.rope.pairing)
        turns = tuple(2 * math.pi * f / (1 << c.PHASE_BITS) for f in h.rope.frequencies)
        rope = Rope(style=style, first_position=h.rope.first_position, frequencies=turns)
    return PQCodec(info.preset or "pq3", h.seed, info.centered, rope, chunk_tokens=h.chunk_tokens)


def _shard_index(sizes: Sequence[int], per_shard: int) -> bytes:
    """The end of a shard: (offset, size) of each chunk, and the checksum of zarr's own codec."""
    starts = np.cumsum([0, *sizes])[:-1]
    pairs = [*zip(starts.tolist(), sizes, strict=True), *[(_MISSING, _MISSING)] * (per_shard - len(sizes))]
    return _with_crc(b"".join(struct.pack("<QQ", *pair) for pair in pairs))


def _with_crc(data: bytes) -> bytes:
    prototype = default_buffer_prototype()
    spec: Any = SimpleNamespace(prototype=prototype)  # all that this codec asks of an array
    (found,) = sync(Crc32cCodec().encode([(prototype.buffer.from_bytes(data), spec)]))
    assert found is not None
    return found.to_bytes()


def _seal(document: Any) -> str:
    """Of what zarr says of an array, people's attributes left out."""
    said = {key: value for key, value in document.items() if key != "attributes"}
    text = json.dumps(said, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return checksum_bytes(text.encode("utf-8", "surrogatepass")).hex()


# -- reading -----------------------------------------------------------------------------------------------------
class ZarrCache(TensorFile):
    """Reads a cache that ``save_zarr`` or a conversion wrote, from a path, a URL or a store of zarr; a context manager.

    Raises InvalidArgument where there is none, TruncatedStream, CorruptStream or UnsupportedStream.
    """

    def __init__(self, store: Any) -> None:
        super().__init__(str(store))
        self._store = _store_of(store, True)
        with named(self._label):
            values = self._open()
            self._metadata, listed = listing.read_listing(values)
            for place, fields in enumerate(listed):
                if problem := _problem(fields):
                    raise CorruptStream(f"{c.ZARR_COMPLETE}: tensor {place}: {problem}")
            self._tensors = {fields["name"]: fields for fields in listed}
            if len(self._tensors) != len(listed):
                raise CorruptStream(f"{c.ZARR_COMPLETE}: a name stands twice")
            listing.check_listing(values, None)

    @cached_property
    def size(self) -> int:
        """Bytes of all objects."""
        return int(sync(self._store.getsize_prefix("")))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    @property
    def metadata(self) -> dict[str, Any]:
        return self._metadata

    def _open(self) -> dict[str, Any]:
        """The attributes of the group that is written last."""
        root = self._attributes(_DOCUMENT)
        if root is None and isinstance(self._store, LocalStore) and not self._store.root.exists():
            raise FileNotFoundError(2, "no such folder", str(self._store.root))
        if root is None or root.get("format") != c.ZARR_FORMAT:
            raise InvalidArgument("holds no cache of save_zarr; write it again with save_zarr(..., overwrite=True)")
        values = self._attributes(f"{c.ZARR_COMPLETE}/{_DOCUMENT}")
        if values is None:
            raise InvalidArgument(
                "holds a cache that was not written to its end; write it again with save_zarr(..., overwrite=True)"
            )
        return values

    def _attributes(self, key: str) -> dict[str, Any] | None:
        data = _get(self._store, key)
        if data is None:
            return None
        document = json_value(data, key)
        values = document.get("attributes", {}) if isinstance(document, dict) else None
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
        return listing.parts_of(entry, fields, [stream for found in self._objects(fields) for stream in found])

    def _objects(self, fields: listing.Fields) -> Iterator[list[Part]]:
        """The streams of each object of a coded tensor."""
        sizes = iter(n for n, _ in fields["streams"])
        for number, count in enumerate(fields.get("objects", [1])):
            here = [next(sizes) for _ in range(count)]
            source = self._object(fields, number, sum(here) + _index_bytes(fields))
            starts = np.cumsum([0, *here]).tolist()
            yield [Part(source, start, size) for start, size in zip(starts, here, strict=False)]

    def _object(self, fields: listing.Fields, number: int, size: int) -> Source:
        key = _key(fields, number)
        if not isinstance(self._store, LocalStore):
            return _Object(self._store, key, size)
        try:
            source = self._stack.enter_context(MappedSource(self._store.root / key))
        except FileNotFoundError:
            raise _lost(key) from None
        if source.size != size:
            kind = TruncatedStream if source.size < size else CorruptStream
            raise kind(f"{key}: {source.size} bytes, {size} were written; copy it again")
        return source

    def _read_exact(self, entry: Entry) -> Any:
        fields = self._tensors[entry.name]
        size = _exact_bytes(fields)
        if not size:
            return np.zeros(0, np.uint8)
        raw = self._object(fields, 0, size + _CRC_BYTES).read(0, size)
        if checksum_bytes(raw).hex() != fields["seal"]:
            raise CorruptStream("checksum does not hold; fetch the object again")
        return raw

    def _checks(self) -> Iterator[Check]:
        place = 0
        for name in self.names:
            size = self._read_entry(name).body_bytes
            yield Check(name, place, size, self._damage(name))
            place += size

    def _damage(self, name: str) -> Callable[[str, codec.Progress], Sequence[Damage | str]]:
        def found(backend: str, progress: codec.Progress) -> Sequence[Damage | str]:
            entry, fields = self._read_entry(name), self._tensors[name]
            key = f"{fields['path']}/{_DOCUMENT}"
            document = json_value(_get(self._store, key) or b"", key)
            if not isinstance(document, dict) or _seal(document) != fields["document"]:
                raise CorruptStream(f"{key} is not what was written; zarr would read the array in another way")
            if not entry.coded:
                raw = self._read_exact(entry)
                if raw.size and self._whole(fields, 0) != _with_crc(raw.tobytes()):
                    raise CorruptStream("zarr's own checksum does not hold")
                return []
            self._check_shards(fields)
            parts = self._read_parts(entry)
            return [damage for part in parts for damage in codec.verify(part.open(True), backend=backend, progress=progress)]

        return found

    def _check_shards(self, fields: listing.Fields) -> None:
        """Whether the objects of a tensor are as long as they were, and their indexes what zarr needs."""
        sizes = [n for n, _ in fields["streams"]]
        for number, count in enumerate(fields.get("objects", [1])):
            here, sizes = sizes[:count], sizes[count:]
            data = self._whole(fields, number)
            index = _shard_index(here, fields["per_shard"]) if fields.get("per_shard") else b""
            if len(data) != sum(here) + len(index) or data[sum(here) :] != index:
                raise CorruptStream(f"object {number}: its length or its index is not what was written")

    def _whole(self, fields: listing.Fields, number: int) -> bytes:
        key = _key(fields, number)
        data = _get(self._store, key)
        if data is None:
            raise _lost(key)
        return data


def _key(fields: listing.Fields, number: int) -> str:
    """An object of a tensor, which its chunks along the tokens are."""
    place = [0] * len(fields["shape"])
    if len(place) > 1:
        place[-2] = number
    return "/".join([fields["path"], "c", *map(str, place)])


def _exact_bytes(fields: listing.Fields) -> int:
    return math.prod(fields["shape"]) * c.EXACT_ITEM_BYTES[fields["dtype"]]


def _index_bytes(fields: listing.Fields) -> int:
    per_shard = fields.get("per_shard", 0)
    return 16 * per_shard + _CRC_BYTES if per_shard else 0


def _problem(fields: listing.Fields) -> str:
    """What is wrong with what the list says of where a tensor lies, or an empty string."""
    path, document = fields.get("path"), fields.get("document")
    if not isinstance(path, str) or not all(_SAFE.fullmatch(part) for part in path.split("/")) or not isinstance(document, str):
        return f"path is {path!r:.60}, document {document!r:.20}; the name of an array in the group and a checksum are expected"
    if problem := listing.shape_problem(fields):
        return problem
    if not fields["coded"]:
        return ""
    streams, objects = fields.get("streams"), fields.get("objects", [1])
    if streams is None or not isinstance(objects, list) or not all(map(natural, objects)) or sum(objects) != len(streams):
        return f"objects is {objects!r:.60}; the number of streams in each is expected"
    per_shard = fields.get("per_shard", 0)
    whole = natural(per_shard) and per_shard <= _MOST_IN_SHARD and (not per_shard or max(objects) <= per_shard)
    return (
        ""
        if whole
        else f"per_shard is {per_shard!r:.20}; a number from 0 to {_MOST_IN_SHARD}, enough for its objects, is expected"
    )


# -- whole caches ------------------------------------------------------------------------------------------------
def save_zarr(
    store: Any,
    layers: Sequence[tuple[Any, Any]],
    *,
    preset: str = "pq3",
    rope: Rope | None = None,
    exact_tokens: int = EXACT_TOKENS,
    seed: int = 0,
    center_keys: bool = True,
    share_bits: bool = True,
    chunk_tokens: int = CHUNK_TOKENS,
    tokens_per_chunk: int | None = TOKENS_PER_CHUNK,
    chunks_per_shard: int | None = None,
    backend: str = "auto",
    metadata: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write (key, value) tensors [..., tokens, head_dim] of each layer as zarr arrays layers/{i}/key and layers/{i}/value.

    ``store``: a path or URL, or a store of zarr. A chunk holds ``tokens_per_chunk`` tokens of all leading indices (None: all
    tokens, which takes least bytes: each chunk of a key has a mean of its own, 2 % of 256 tokens); ``chunks_per_shard`` puts
    so many into one object of the store. ``overwrite``: replace what is there. The other options are those of
    ``save_cache``. bfloat16, which zarr lacks, is an array of float32 to zarr, and bfloat16 in ``load_zarr``. Raises
    InvalidArgument, or as ``pqcodec.encode`` does.

    >>> from zarr.storage import MemoryStore
    >>> store = MemoryStore()
    >>> save_zarr(store, [(np.ones((2, 300, 64), np.float16), np.ones((2, 300, 64), np.float16))])
    >>> zarr.open(store)["layers/0/key"][1, 250:260].shape, load_zarr(store, tokens=(0, 4))[0][0].shape
    ((10, 64), (2, 4, 64))
    """
    recipe = recipe_of(
        rope,
        center_keys,
        preset=preset,
        exact_tokens=exact_tokens,
        seed=seed,
        share_bits=share_bits,
        chunk_tokens=chunk_tokens,
        stream_tokens=tokens_per_chunk,
        backend=backend,
    )
    if chunks_per_shard is not None and (not 1 <= chunks_per_shard <= _MOST_IN_SHARD or tokens_per_chunk is None):
        wanted = f"a number from 1 to {_MOST_IN_SHARD}, and tokens_per_chunk, are expected"
        raise InvalidArgument(f"chunks_per_shard {chunks_per_shard}: {wanted}")
    pieces = recipe.pieces(*layers_by_name(layers))
    write_pieces(store, pieces, metadata, progress, overwrite=overwrite, chunks_per_shard=chunks_per_shard)


def load_zarr(
    store: Any, *, tokens: tuple[int, int] | None = None, device: Any = None, backend: str = "auto"
) -> list[tuple[Any, Any]]:
    """The (key, value) tensors of each layer of a store; ``tokens`` = (first, last + 1) reads those only.

    Raises InvalidArgument where the store holds no complete cache, and as ``pqcodec.decode`` does.
    """
    with ZarrCache(store) as file:
        return layers_of(file, tokens=tokens, device=device, backend=backend)
