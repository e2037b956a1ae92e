"""Law: an encoded cache as a .safetensors file (SPEC III.2): a coded tensor is a uint8 tensor that holds its streams, an exact
one stays as it is, and ``__metadata__`` holds the listing.

Any safetensors reader opens such a file. The writer reserves space for the header and writes the bodies after it one by one, so
that neither side holds more than one tensor. Exact tensors come first, those with the widest numbers before the others, which
aligns all. Offsets are not sealed: a tool may write the same tensors and metadata in another order.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import EllipsisType
from typing import Any, BinaryIO

from pqcodec import codec
from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats.containers import listing
from pqcodec.formats.containers.reader import Check, Entry, Progress, StreamPart, TensorFile, named
from pqcodec.formats.containers.writer import Coded, Piece, carried, check_pieces, read_in_pieces
from pqcodec.formats.places import remote
from pqcodec.formats.plain import numbers as exact
from pqcodec.formats.plain.documents import checksum_bytes, json_bytes, metadata_bytes, shape_problem
from pqcodec.formats.plain.files import is_listing, safetensors_header
from pqcodec.formats.plain.numbers import SAFETENSORS_CODES, SAFETENSORS_DTYPES
from pqcodec.stream.report import Damage
from pqcodec.stream.seal import with_seal
from pqcodec.stream.source import Extent, FileSource, Source, owned
from pqcodec.stream.tables import Tables, tables_by_name

_CODED = "U8"
_ALIGNMENT = 16
_WIDEST = (1 << 63) - 1  # the integer with the longest text
_WIDEST_ERROR = 2.2250738585072014e-308  # the positive float with the longest text
CODES, _DTYPES = SAFETENSORS_CODES, SAFETENSORS_DTYPES


# -- writing -----------------------------------------------------------------------------------------------------
def write_pieces(
    path: str | os.PathLike[str],
    pieces: Sequence[Piece],
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write tensors into a file or URL and return its size in bytes; it appears when it is complete.

    ``progress`` is called with (tensors done, tensors in all). Raises InvalidArgument, OSError, and what a ``body`` raises.
    """
    local = Path(path)
    if not remote.is_url(path) and local.exists() and not local.is_file() and not local.is_dir():
        raise InvalidArgument(f"{path}: is no regular file; a .safetensors file is written to a regular file only")
    check_pieces(pieces)
    for piece in pieces:
        if problem := _problem(piece):
            raise InvalidArgument(f"tensor {piece.name!r}: {problem}")
    meta = metadata_bytes(metadata, c.MAX_META_BYTES).decode()
    found = {piece.name: _HeaderEntry.expected(piece) for piece in pieces}
    room = len(_header(pieces, found, meta))
    room += -(8 + room) % _ALIGNMENT
    end = 0
    with remote.placing(path) as temporary, open(temporary, "wb") as file:
        try:
            file.seek(8 + room)
            for done, piece in enumerate(sorted(pieces, key=_width, reverse=True), 1):
                with named(f"tensor {piece.name!r}"):
                    found[piece.name] = one = _written(file, piece, end)
                end = one.end
                if progress:
                    progress(done, len(pieces))
            header = _header(pieces, found, meta)
            assert len(header) <= room, "what was expected takes at least as much room"
            file.seek(0)
            file.write(room.to_bytes(8, "little") + header.ljust(room))
        except OSError as error:
            error.filename = os.fspath(path)
            raise
    return 8 + room + end


def _problem(piece: Piece) -> str:
    if piece.name == "__metadata__":
        return "safetensors keeps this name for itself; choose another one"
    if not piece.coded and piece.dtype not in CODES:
        return f"safetensors has no dtype {piece.dtype}; choose from {', '.join(CODES)}, or write a .pqkv file"
    return ""


@dataclass(frozen=True)
class _HeaderEntry:
    """The description of a tensor in the header and the listing."""

    code: str  # safetensors' name of the dtype
    shape: Sequence[int]
    start: int  # offsets in bytes from the end of the header
    end: int
    seal: str
    more: listing.Fields  # further fields of the listing

    @classmethod
    def expected(cls, piece: Piece) -> _HeaderEntry:
        """A placeholder for a tensor that is not written yet; its text is at least as long as the final one."""
        seal = "0" * 2 * c.CHECKSUM_BYTES
        if not piece.coded:
            return cls(CODES[piece.dtype], piece.shape, _WIDEST, _WIDEST, seal, {"numpy": False})
        streams = {"streams": [[_WIDEST, _WIDEST]] * piece.parts} if piece.parts > 1 else {}
        seals = seal * piece.parts
        return cls(_CODED, [_WIDEST], _WIDEST, _WIDEST, seals, streams | {"order": seals, "rel_mse": _WIDEST_ERROR})


def _width(piece: Piece) -> int:
    return 0 if piece.coded else c.EXACT_ITEM_BYTES[piece.dtype]


def _written(file: BinaryIO, piece: Piece, offset: int) -> _HeaderEntry:
    if piece.coded:
        body: Coded = piece.body()
        announced = {table.name for table in piece.tables}
        if unknown := [table.name for table in carried(body.streams, announced) if table.name not in announced]:
            raise InvalidArgument(f"its streams have the shared table {unknown[0]}, which its piece did not announce")
        streams, orders = zip(*map(with_seal, body.streams), strict=True)
        size = sum(stream.size for stream in streams)
        for stream in streams:
            for data in read_in_pieces(stream):
                file.write(data)
        about = listing.seal_of(streams), listing.coded_fields(streams, orders, body.rel_mse)
        return _HeaderEntry(_CODED, [size], offset, offset + size, *about)
    x = piece.plain()
    raw = exact.to_bytes(x)
    file.write(raw.data)
    numpy = {"numpy": not exact.is_torch(x)}
    return _HeaderEntry(CODES[piece.dtype], piece.shape, offset, offset + raw.size, checksum_bytes(raw).hex(), numpy)


def _header(pieces: Sequence[Piece], found: dict[str, _HeaderEntry], meta: str) -> bytes:
    """The header as JSON, of tensors that are written and placeholders."""
    listed = [listing.listing_fields(piece, found[piece.name].seal, **found[piece.name].more) for piece in pieces]
    said = _said((name, one.code, one.shape) for name, one in found.items())
    values = listing.sealed_listing(listed, meta, said, _announced(pieces))
    header: dict[str, Any] = {"__metadata__": values}
    for name, one in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        header[name] = {"dtype": one.code, "shape": one.shape, "data_offsets": [one.start, one.end]}
    return json_bytes(header, "the header", c.MAX_INDEX_BYTES)


def _announced(pieces: Sequence[Piece]) -> Tables:
    return tables_by_name(table for piece in pieces for table in piece.tables)


def _said(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> list[Any]:
    """Names, dtypes and shapes in the header, sorted, which the listing's checksum covers (SPEC III.2); no offsets."""
    return sorted([name, code, list(shape)] for name, code, shape in tensors)


# -- reading -----------------------------------------------------------------------------------------------------
class SafetensorsCache(TensorFile):
    """Reads a .safetensors file that holds an encoded cache, from a path or a URL; a context manager.

    Opening reads the header, decoding only the chunks that hold the wanted tokens. Raises InvalidArgument for a file that
    pqcodec did not write, TruncatedStream, CorruptStream or UnsupportedStream.

    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     piece = Piece("positions", False, None, "other", (4,), "int64", "...", lambda: np.arange(4))
    ...     size = write_pieces(folder + "/cache.safetensors", [piece], {"model": "tiny"})
    ...     with SafetensorsCache(folder + "/cache.safetensors") as file:
    ...         file.size == size, file.keys(), file.metadata, file.get_tensor("positions").tolist()
    (True, ('positions',), {'model': 'tiny'}, [0, 1, 2, 3])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(os.fspath(path))
        self._header, self._start = safetensors_header(path)
        values = self._header.pop("__metadata__", None) or {}
        self._source: Source
        if remote.is_url(path):
            self._source = remote.RemoteSource(self._label)
        else:  # no memory map: truncating a mapped file would kill its reader (SIGBUS)
            self._source = FileSource(self._stack.enter_context(open(path, "rb")))  # noqa: SIM115 (the stack closes it)
        try:
            with named(self._label):
                self._metadata, listed = self._open(values)
        except BaseException:
            self.close()
            raise
        self._tensors = {fields["name"]: fields for fields in listed}
        self._values = values

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._source.size

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order of the listing."""
        return tuple(self._tensors)

    @property
    def metadata(self) -> dict[str, Any]:
        """The writer's ``metadata``; empty without any."""
        return self._metadata

    @cached_property
    def tables(self) -> Tables:  # type: ignore[override]
        """The shared tables that the file carries, by the bytes of their names; raises CorruptStream or UnsupportedStream."""
        with named(self._label):
            return listing.read_tables(self._values)

    def keys(self) -> tuple[str, ...]:
        """``names``, under the name of the method of ``safetensors.safe_open``."""
        return self.names

    def get_tensor(self, name: str) -> Any:
        """``decode(name)``, under the name of the method of ``safetensors.safe_open``."""
        return self.decode(name)

    def get_slice(self, name: str, *, device: Any = None, backend: str = "auto") -> TensorSlice:
        """A view of a tensor that decodes only what is indexed: ``file.get_slice(name)[..., 100:200, :]``."""
        return TensorSlice(self, name, device, backend)

    def _local_files(self) -> list[str]:
        return [] if remote.is_url(self._label) else [self._label]

    # -- opening -------------------------------------------------------------------------------------------------
    def _open(self, values: dict[str, str]) -> tuple[dict[str, Any], list[listing.Fields]]:
        """The writer's metadata and the fields of each tensor, after checking the header and the listing's checksum."""
        if not is_listing(values):
            raise InvalidArgument(
                "holds plain tensors, no cache that pqcodec has encoded (no pqcodec_format in its metadata); "
                "encode it, or read it as it is with load_safetensors(path, foreign=True)"
            )
        found, listed = listing.read_listing(values)
        for fields in listed:
            self._check_tensor(fields)
        names = [fields["name"] for fields in listed]
        if len(set(names)) != len(names) or set(names) != self._header.keys():
            odd = sorted((Counter(names) - Counter(set(names))).keys() or set(names) ^ self._header.keys())
            raise CorruptStream(f"the header and pqcodec_tensors do not list the same tensors: {', '.join(map(repr, odd[:5]))}")
        said = _said((name, item["dtype"], item["shape"]) for name, item in self._header.items())
        listing.check_listing(values, said)
        return found, listed

    def _check_tensor(self, fields: listing.Fields) -> None:
        item = self._header.get(fields["name"])
        if item is None:
            return
        found = f"tensor {fields['name']!r}: is {item['dtype']} {item['shape']}"
        if fields["coded"] and (item["dtype"] != _CODED or len(item["shape"]) != 1):
            raise CorruptStream(f"{found}, streams are {_CODED} of one dimension; was the file converted? Fetch the original")
        if item["dtype"] not in _DTYPES:
            raise UnsupportedStream(f"{found}, a dtype that this release does not know: install a newer pqcodec")

    # -- tensors -------------------------------------------------------------------------------------------------
    def _body(self, name: str) -> Extent:
        start, end = self._header[name]["data_offsets"]
        return Extent(self._source, self._start + start, end - start)

    def _read_entry(self, name: str) -> Entry:
        fields, item, body = self._tensors[name], self._header[name], self._body(name)
        offset = self._start + item["data_offsets"][0]
        if fields["coded"]:
            return listing.entry_of(fields, fields["shape"], fields["dtype"], offset, body.size)
        shape, dtype = tuple(item["shape"]), _DTYPES[item["dtype"]]
        if problem := shape_problem(shape):
            raise CorruptStream(problem)
        if math.prod(shape) * c.EXACT_ITEM_BYTES[dtype] != body.size:
            raise CorruptStream(f"shape {list(shape)} of {dtype} does not go with {body.size} bytes")
        return listing.entry_of(fields, shape, dtype, offset, body.size)

    def _read_parts(self, entry: Entry) -> list[StreamPart]:
        fields = self._tensors[entry.name]
        return listing.parts_of(entry, fields, listing.streams_in(self._body(entry.name), fields), self._known_tables)

    def _has_order_seal(self, entry: Entry) -> bool:
        return "order" in self._tensors[entry.name]

    def _read_exact(self, entry: Entry) -> Any:
        body = self._body(entry.name)
        raw = owned(body, 0, body.size)
        if checksum_bytes(raw).hex() != self._tensors[entry.name]["seal"]:
            raise CorruptStream("checksum does not hold; fetch the file again")
        return raw

    def _checks(self) -> Iterator[Check]:
        offsets = {name: self._header[name]["data_offsets"] for name in self.names}
        for name in sorted(self.names, key=offsets.__getitem__):
            start, end = offsets[name]
            yield Check(name, self._start + start, end - start, self._damage(name))

    def _damage(self, name: str) -> Callable[[str, codec.Progress], Sequence[Damage | str]]:
        def found(backend: str, progress: codec.Progress) -> Sequence[Damage | str]:
            entry = self._read_entry(name)
            if not entry.coded:
                self._read_exact(entry)
                return []
            return [damage for part in self._read_parts(entry) for damage in part.damage(backend, progress)]

        return found


# -- slices ------------------------------------------------------------------------------------------------------
class TensorSlice:
    """A tensor of a file that is decoded when it is indexed, by integers and slices of positive step.

    Only the range of tokens, and of the first dimension of three or more, limits what is read. Raises InvalidArgument for
    another index, and as ``SafetensorsCache.decode`` does.

    >>> import tempfile, numpy as np
    >>> from pqcodec import encode
    >>> stream = encode(np.ones((2, 40, 64), np.float16), backend="reference")
    >>> piece = Piece("k", True, 0, "key", (2, 40, 64), "float16", "..., tokens, head_dim", lambda: Coded.of(stream))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = write_pieces(folder + "/cache.safetensors", [piece])
    ...     with SafetensorsCache(folder + "/cache.safetensors") as file:
    ...         part = file.get_slice("k", backend="reference")
    ...         part.get_shape(), part.get_dtype(), part[1, 8:12].shape
    ([2, 40, 64], 'F16', (4, 64))
    """

    def __init__(self, file: SafetensorsCache, name: str, device: Any, backend: str) -> None:
        self._file, self._name = file, name
        self._options: dict[str, Any] = {"device": device, "backend": backend}
        entry = file.entry(name)
        self.shape, self.dtype = entry.shape, entry.dtype

    def get_shape(self) -> list[int]:
        """The tensor's shape, as a list."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """safetensors' name of the decoded tensor's dtype, such as "F16"."""
        return CODES[self.dtype]

    def __getitem__(self, index: int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]) -> Any:
        given = index if isinstance(index, tuple) else (index,)
        ellipses = [number for number, i in enumerate(given) if i is Ellipsis] or [len(given)]
        left, right = given[: ellipses[0]], given[ellipses[0] + 1 :]
        missing = len(self.shape) - len(left) - len(right)
        if missing < 0 or any(type(i) not in (int, slice) for i in (*left, *right)):
            raise InvalidArgument(f"tensor {self._name!r}: index {index!r} of {self.shape}; whole numbers and slices are known")
        wanted: list[Any] = [*left, *[slice(None)] * missing, *right]
        ranges = [self._range(i, count) for i, count in zip(wanted, self.shape, strict=True)]
        options = dict(self._options)
        if len(wanted) > 1:
            low, high, wanted[-2] = ranges[-2]
            options["tokens"] = low, high
        if len(wanted) > 2:
            each = math.prod(self.shape[1:-2])
            first, last, wanted[0] = ranges[0]
            x = self._file.decode(self._name, leading=(first * each, last * each), **options)
            return x.reshape(last - first, *self.shape[1:-2], *x.shape[-2:])[tuple(wanted)]
        return self._file.decode(self._name, **options)[tuple(wanted)]

    def _range(self, index: int | slice, count: int) -> tuple[int, int, int | slice]:
        """First, last + 1 of an index into a dimension of ``count``, and the same index relative to this range."""
        if isinstance(index, int):
            if not -count <= index < count:
                raise InvalidArgument(f"tensor {self._name!r}: index {index} is outside a dimension of {count}")
            return index % count, index % count + 1, 0
        start, stop, step = index.indices(count)
        if step < 0:
            raise InvalidArgument(f"tensor {self._name!r}: a slice goes backwards; cut forward and turn the result")
        return start, max(start, stop), slice(None, None, step)
