"""Law: writing a cache into a zarr store as a group of arrays, and its listing last (SPEC III.3).

A tensor of one stream is an array of one chunk of zarr. Streams of equal length (``save_zarr``) are a chunk each, or several in
a shard; streams of other lengths are one chunk together.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.errors import ContainsArrayError, ContainsGroupError
from zarr.storage import LocalStore

from pqcodec import __version__, codec
from pqcodec import constants as c
from pqcodec.codings.presets import DEFAULT_PRESET, PRESETS
from pqcodec.errors import InvalidArgument
from pqcodec.formats.containers import listing
from pqcodec.formats.containers.reader import LAYOUT, Progress, named
from pqcodec.formats.containers.writer import Coded, Piece, carried, check_pieces
from pqcodec.formats.containers.zarr.codec import PQCodec
from pqcodec.formats.containers.zarr.objects import DOCUMENT, get, put, store_of, total_bytes
from pqcodec.formats.places import remote
from pqcodec.formats.places.atomic import replacing_folder
from pqcodec.formats.plain import numbers as exact
from pqcodec.formats.plain.documents import checksum_bytes, json_value, metadata_bytes
from pqcodec.stages.centre import rope_from_field
from pqcodec.stream.header import Header, read_header
from pqcodec.stream.seal import with_seal
from pqcodec.stream.tables import SharedTable, tables_by_name

# dtypes that zarr lacks, and the unsigned integers that hold their bits
_STORED_AS = {name: f"uint{8 * size}" for name, size in c.EXACT_ITEM_BYTES.items() if name not in exact.NUMPY_DTYPES}
SAFE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}")  # a name that any file system takes for a folder
CRC_BYTES = 4
_SETTLING = 10  # seconds that zarr's thread gets
_MISSING = (1 << 64) - 1  # offset and size, in the index of a shard, of a chunk that is not there


@dataclass(frozen=True)
class _Grid:
    """How the streams of a tensor are divided among objects."""

    chunk_tokens: int  # of a chunk of zarr
    per_shard: int  # chunks of a shard; 0: no shards
    objects: tuple[int, ...]  # streams in each object

    @classmethod
    def of(cls, tokens: Sequence[int], per_shard: int | None) -> _Grid:
        """The grid for streams of ``tokens`` tokens each."""
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
    """Write tensors into a store (path, URL or Store) and return its size in bytes.

    A local folder appears when it is complete; in any other store the cache is valid once the last object is written.
    ``progress`` is called with (tensors done, tensors in all). Raises InvalidArgument, OSError, and what a ``body`` raises.
    """
    check_pieces(pieces)
    meta = metadata_bytes(metadata, c.MAX_META_BYTES).decode()
    if isinstance(target, (str, os.PathLike)) and not remote.is_url(target):
        remote.check_path(target, "store")
        if not overwrite and os.path.exists(target):
            raise InvalidArgument(f"{os.fspath(target)}: exists; pass overwrite=True to replace it, or choose another place")
        with replacing_folder(target, DOCUMENT) as folder, _settled():
            return _write(LocalStore(folder), pieces, meta, progress, False, chunks_per_shard)
    return _write(store_of(target, False), pieces, meta, progress, overwrite, chunks_per_shard)


@contextmanager
def _settled() -> Iterator[None]:
    """A context that an error leaves only when zarr's thread has ended what it was at: it would write into a removed folder."""
    try:
        yield
    except BaseException:
        with suppress(Exception):
            sync(_others_done(), timeout=_SETTLING)
        raise


async def _others_done() -> None:
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)


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
    root.create_group(c.ZARR_COMPLETE, attributes=dict(listing.sealed_listing(writer.listed, meta, None, writer.tables)))
    return total_bytes(store)


class _Writer:
    """Writes tensors as arrays and collects their fields and shared tables for the listing (``listed``, ``tables``)."""

    def __init__(self, store: Store, root: zarr.Group) -> None:
        self._store, self._root = store, root
        self.listed: list[listing.Fields] = []
        self.tables: dict[bytes, SharedTable] = {}

    def add(self, piece: Piece, path: str, per_shard: int | None) -> None:
        """Write one tensor as the array at ``path``."""
        fields = self._coded(piece, path, piece.body(), per_shard) if piece.coded else self._exact(piece, path, piece.plain())
        document = json_value(get(self._store, f"{path}/{DOCUMENT}") or b"", path)
        self.listed.append({**fields, "path": path, "document": document_seal(document)})

    def _coded(self, piece: Piece, path: str, body: Coded, per_shard: int | None) -> listing.Fields:
        whole, orders = zip(*map(with_seal, body.streams), strict=True)
        headers = [read_header(stream) for stream in whole]
        self.tables.update(tables_by_name(carried(whole, {table.name for table in self.tables.values()})))
        h = headers[0]
        shape, chunks = piece.shape, list(piece.shape)
        shards_too = per_shard if math.prod(shape) else None  # zarr has no chunks of an empty array, and no shards
        grid = _Grid.of([header.tokens for header in headers], shards_too)
        if len(shape) > 1:
            chunks[-2] = grid.chunk_tokens
        shards = (*chunks[:-2], chunks[-2] * grid.per_shard, chunks[-1]) if grid.per_shard else None
        dtype = np.float16 if h.dtype == c.DTYPE_FLOAT16 else np.float32
        array = self._create(piece, path, shape, dtype, chunks, shards=shards, serializer=_codec_of(h), compressors=None)
        first = 0
        for number, count in enumerate(grid.objects):
            streams = whole[first : first + count]
            data = b"".join(stream.read(0, stream.size).data for stream in streams)
            if grid.per_shard:
                data += shard_index([stream.size for stream in streams], grid.per_shard)
            self._put(array, (*[0] * len(shape[:-2]), number, 0)[-len(shape) :], data)
            first += count
        more = listing.coded_fields(whole, orders, body.rel_mse)
        more |= {"objects": list(grid.objects), "per_shard": grid.per_shard} if len(headers) > 1 or grid.per_shard else {}
        sizes = {} if "streams" in more else {"streams": [[whole[0].size, headers[0].tokens]]}
        return listing.listing_fields(piece, listing.seal_of(whole), **more, **sizes)

    def _exact(self, piece: Piece, path: str, x: Any) -> listing.Fields:
        raw = exact.to_bytes(x)
        stored = np.dtype(_STORED_AS.get(piece.dtype, piece.dtype))
        how: dict[str, Any] = {"serializer": BytesCodec(endian="little"), "compressors": [Crc32cCodec()]}
        array = self._create(piece, path, piece.shape, stored, [max(n, 1) for n in piece.shape], **how)
        if raw.size:
            self._put(array, (0,) * len(piece.shape), with_crc(raw.tobytes()))
        about = {"numpy": not exact.is_torch(x), "shape": list(piece.shape), "dtype": piece.dtype}
        return listing.listing_fields(piece, checksum_bytes(raw).hex(), **about)

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

    def _put(self, array: Any, index: Sequence[int], data: bytes) -> None:
        key = f"{array.path}/{array.metadata.encode_chunk_key(tuple(index))}"
        put(self._store, key, data)


def _paths(pieces: Sequence[Piece]) -> dict[str, str]:
    """The path of each tensor's array: layers/3/key for layers.3.key; tensors/{number} where that is no safe or free path."""
    found: dict[str, str] = {}
    nodes, leaves = {c.ZARR_COMPLETE}, {c.ZARR_COMPLETE}  # paths in use, and those of them that are arrays
    for number, piece in enumerate(pieces):
        parts = re.split(r"[./]", piece.name)
        above = {"/".join(parts[:i]).lower() for i in range(1, len(parts))}
        path = "/".join(parts)
        taken = path.lower() in nodes or above & leaves
        if taken or not all(SAFE.fullmatch(part) for part in parts):
            path, above = f"tensors/{number}", {"tensors"}
        nodes |= {path.lower(), *above}
        leaves.add(path.lower())
        found[piece.name] = path
    return found


def _codec_of(h: Header) -> PQCodec:
    """The codec, for the array's document, whose options are those of the stream's header.

    New chunks get the default preset where those that are there have one that zarr's codec cannot write: none, or one by
    codebooks.
    """
    info = codec.inspect_header(h)
    rope = None if h.rope is None or h.before_rope else rope_from_field(h.rope)  # zarr's own chunks are coded after RoPE
    preset = info.preset if info.preset and not PRESETS[info.preset].by_vectors else DEFAULT_PRESET
    return PQCodec(preset, h.seed, info.centered, rope, chunk_tokens=h.chunk_tokens)


def shard_index(sizes: Sequence[int], per_shard: int) -> bytes:
    """The index at the end of a shard: (offset, size) of each chunk, and a crc32c, as zarr's ``sharding_indexed`` writes it."""
    starts = np.cumsum([0, *sizes])[:-1]
    pairs = [*zip(starts.tolist(), sizes, strict=True), *[(_MISSING, _MISSING)] * (per_shard - len(sizes))]
    return with_crc(b"".join(struct.pack("<QQ", *pair) for pair in pairs))


def with_crc(data: bytes) -> bytes:
    """Data followed by its crc32c (4 bytes), as zarr's codec appends it."""
    prototype = default_buffer_prototype()
    spec: Any = SimpleNamespace(prototype=prototype)  # the only field that this codec reads
    (found,) = sync(Crc32cCodec().encode([(prototype.buffer.from_bytes(data), spec)]))
    assert found is not None
    return found.to_bytes()


def document_seal(document: Any) -> str:
    """The checksum, as 8 hexadecimal digits, of an array's zarr.json without its attributes."""
    said = {key: value for key, value in document.items() if key != "attributes"}
    text = json.dumps(said, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return checksum_bytes(text.encode("utf-8", "surrogatepass")).hex()
