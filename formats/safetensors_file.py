"""Law: an encoded cache as a plain .safetensors file: a coded tensor is a uint8 tensor that holds one stream, an exact one
stays as it is, and ``__metadata__`` says which is which.

Any safetensors reader opens such a file. Bodies are written one behind the other into room that is left for the header, so
neither side holds more than one tensor. Exact tensors come first, the widest numbers before the others: all are aligned.

``__metadata__``, string -> string:
    pqcodec_format    "kv-cache"
    pqcodec_version   "1"
    pqcodec_tensors   JSON list, in the order of writing: name, layer, role, layout, coded, seal (and numpy, of an exact tensor)
    pqcodec_metadata  JSON object of the caller
    pqcodec_checksum  of the four above and of every tensor's name, dtype and shape
A seal ties a name to its bytes: the checksum of an exact tensor, and of a stream that of its header and its last four bytes.
Where the tensors lie is not sealed: a tool that writes the same tensors and metadata in another order keeps the file valid.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any, BinaryIO

import numpy as np

from pqcodec import arrays, codec
from pqcodec import constants as c
from pqcodec.centre import Rope
from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats import exact, rates
from pqcodec.formats.atomic import replacing
from pqcodec.formats.cache import EXACT_TOKENS, check_centring, key_center
from pqcodec.formats.frames import checksum_bytes, json_bytes, json_value, tensor_problem
from pqcodec.formats.names import Part, part_of
from pqcodec.formats.pqkv import LAYOUT, Entry, Progress, named, unknown
from pqcodec.formats.tensors import open_tensors, safetensors_header
from pqcodec.header import DTYPE_NAMES
from pqcodec.source import FileSource, MemorySource, Source
from pqcodec.stream import Damage, StreamInfo

FORMAT, VERSION = "kv-cache", "1"
_KEYS = tuple(f"pqcodec_{key}" for key in ("format", "version", "tensors", "metadata", "checksum"))
_CODED = "U8"
_ALIGNMENT = 16
_COPY_BYTES = 16 << 20
_WIDEST = (1 << 63) - 1  # a number that takes the most room
CODES = {  # safetensors' names of dtypes
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "bfloat16": "BF16",
    "complex64": "C64",
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
}
_DTYPES = {code: dtype for dtype, code in CODES.items()}


# -- writing -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Piece:
    """A tensor to write. ``body`` is called once, when its turn comes: a stream (bytes or a Source), or an exact tensor."""

    name: str
    coded: bool
    layer: int | None
    role: str
    shape: tuple[int, ...]  # shape, dtype and layout of an exact tensor
    dtype: str
    layout: str
    body: Callable[[], Any]

    @property
    def problem(self) -> str:
        if self.name == "__metadata__":
            return "safetensors keeps this name for itself; choose another one"
        if not self.coded and self.dtype not in CODES:
            return f"safetensors has no dtype {self.dtype}; choose from {', '.join(CODES)}, or write a .pqkv file"
        return tensor_problem(self.name, self.layer, self.role)


def write_pieces(
    path: str | os.PathLike[str],
    pieces: Sequence[Piece],
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write tensors that were found coded or exact; the file appears when it is complete.

    ``progress`` is told (tensors done, tensors in all). Raises InvalidArgument, OSError, and what a ``body`` raises.
    """
    place = Path(path)
    if place.exists() and not place.is_file() and not place.is_dir():
        raise InvalidArgument(f"{path}: is no regular file; a .safetensors file is written to a regular file only")
    seen: set[str] = set()
    for piece in pieces:
        if problem := "is given twice; names are unique" if piece.name in seen else piece.problem:
            raise InvalidArgument(f"tensor {piece.name!r}: {problem}")
        seen.add(piece.name)
    meta = json_bytes(metadata or {}, "metadata", c.MAX_META_BYTES).decode()
    found = {piece.name: _Found(_CODED if piece.coded else CODES[piece.dtype], piece.shape) for piece in pieces}
    room = len(_header(pieces, found, meta))
    room += -(8 + room) % _ALIGNMENT
    start = 0
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            file.seek(8 + room)
            for done, piece in enumerate(sorted(pieces, key=_width, reverse=True), 1):
                with named(f"tensor {piece.name!r}"):
                    found[piece.name] = one = _written(file, piece, start)
                start = one.end
                if progress:
                    progress(done, len(pieces))
            file.seek(0)
            file.write(room.to_bytes(8, "little") + _header(pieces, found, meta).ljust(room))
        except OSError as error:
            error.filename = os.fspath(path)
            raise


@dataclass(frozen=True)
class _Found:
    """What the header says of a tensor; before it is written, what takes at least as much room."""

    code: str
    shape: tuple[int, ...]
    start: int = _WIDEST
    end: int = _WIDEST
    seal: str = "0" * 2 * c.CHECKSUM_BYTES
    numpy: bool = False


def _width(piece: Piece) -> int:
    return 0 if piece.coded else c.EXACT_ITEM_BYTES[piece.dtype]


def _written(file: BinaryIO, piece: Piece, place: int) -> _Found:
    body = piece.body()
    if piece.coded:
        source: Source = MemorySource(body) if isinstance(body, (bytes, bytearray, memoryview, np.ndarray)) else body
        seal = _stream_seal(source)
        shape: tuple[int, ...] = (source.size,)
        numpy = False
    else:
        if (tuple(body.shape), exact.dtype_name(body)) != (piece.shape, piece.dtype):
            raise InvalidArgument(f"is {exact.dtype_name(body)} {tuple(body.shape)}, not {piece.dtype} {piece.shape}")
        raw = exact.to_bytes(body)
        source, seal, shape, numpy = MemorySource(raw), checksum_bytes(raw).hex(), piece.shape, not exact.is_torch(body)
    for start in range(0, source.size, _COPY_BYTES):
        file.write(source.read(start, min(_COPY_BYTES, source.size - start)).data)
    return _Found(_CODED if piece.coded else CODES[piece.dtype], shape, place, place + source.size, seal, numpy)


def _stream_seal(source: Source) -> str:
    """What ties a stream to its name: its header, and the checksum at its end."""
    header = source.read(0, codec.inspect(source).header_bytes)
    return checksum_bytes(np.concatenate([header, source.read(source.size - c.CHECKSUM_BYTES, c.CHECKSUM_BYTES)])).hex()


def _header(pieces: Sequence[Piece], found: dict[str, _Found], meta: str) -> bytes:
    """The header as JSON; it takes no more room for tensors that are written than for those that are not yet."""
    listed = []
    for piece in pieces:
        one = found[piece.name]
        fields = {"name": piece.name, "layer": piece.layer, "role": piece.role, "layout": piece.layout, "coded": piece.coded}
        listed.append(fields | ({} if piece.coded else {"numpy": one.numpy}) | {"seal": one.seal})
    values = [FORMAT, VERSION, json_bytes(listed, "the list of tensors", c.MAX_INDEX_BYTES).decode(), meta]
    sizes = {name: [_WIDEST] if one.end == _WIDEST and one.code == _CODED else one.shape for name, one in found.items()}
    values.append(_checksum(values, [(name, one.code, sizes[name]) for name, one in found.items()]))
    header: dict[str, Any] = {"__metadata__": dict(zip(_KEYS, values, strict=True))}
    for name, one in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        header[name] = {"dtype": one.code, "shape": sizes[name], "data_offsets": [one.start, one.end]}
    return json_bytes(header, "the header", c.MAX_INDEX_BYTES)


def _checksum(values: Sequence[str], tensors: Iterable[tuple[str, str, Sequence[int]]]) -> str:
    said = [*values, sorted([name, code, list(shape)] for name, code, shape in tensors)]
    return checksum_bytes(json_bytes(said, "the header", 2 * c.MAX_INDEX_BYTES)).hex()


# -- whole caches ------------------------------------------------------------------------------------------------
def save_safetensors(
    path: str | os.PathLike[str],
    cache: Sequence[tuple[Any, Any]] | Mapping[str, Any],
    *,
    preset: str = "pq3",
    rope: Rope | None = None,
    exact_tokens: int = EXACT_TOKENS,
    seed: int = 0,
    center_keys: bool = True,
    share_bits: bool = True,
    nonfinite: str = "error",
    backend: str = "auto",
    metadata: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a cache as ``save_cache`` does, into a .safetensors file.

    ``cache``: (key, value) tensors of each layer, which become layers.{i}.key and layers.{i}.value, or a mapping of names to
    tensors: those that are keys and values by name (``formats.names``) and of a dtype that can be coded are, others are kept
    exactly. ``nonfinite`` is that of ``pqcodec.encode``, all else that of ``save_cache``. Raises as ``pqcodec.encode`` does.

    >>> import tempfile, numpy as np
    >>> path = tempfile.mkdtemp() + "/cache.safetensors"
    >>> cache = [(np.ones((1, 2, 8, 64), np.float16), np.ones((1, 2, 8, 64), np.float16))]
    >>> save_safetensors(path, cache, backend="reference", metadata={"model": "tiny"})
    >>> with SafetensorsCache(path) as file:
    ...     file.names, file.metadata, file.decode("layers.0.key", tokens=(2, 6), backend="reference").shape
    (('layers.0.key', 'layers.0.value'), {'model': 'tiny'}, (1, 2, 4, 64))
    """
    check_centring(rope, center_keys)
    if isinstance(cache, Mapping):
        tensors, parts = dict(cache), {name: part_of(name) for name in cache}
    else:
        pairs = [(layer, role, x) for layer, pair in enumerate(cache) for role, x in zip(("key", "value"), pair, strict=True)]
        tensors = {f"layers.{layer}.{role}": x for layer, role, x in pairs}
        parts = {f"layers.{layer}.{role}": Part(role, layer) for layer, role, _ in pairs}
    for name, x in tensors.items():
        if not exact.is_torch(x) and not isinstance(x, np.ndarray):
            raise InvalidArgument(f"tensor {name!r}: a torch.Tensor or numpy.ndarray is expected, not {type(x).__name__}")
    coded = set(tensors)
    if isinstance(cache, Mapping):
        coded = {name for name, x in tensors.items() if parts[name].role != "other" and _can_be_coded(x)}
    presets = dict.fromkeys(tensors, preset)
    if share_bits and center_keys:
        presets |= _shared_presets(
            preset, {name: tensors[name] for name in tensors if name in coded}, parts, rope, exact_tokens
        )

    def stream(name: str) -> bytes:
        centred = center_keys and parts[name].role == "key"
        return codec.encode(
            tensors[name],
            preset=presets[name],
            seed=seed,
            center=key_center(rope) if centred else None,
            rope=rope if centred else None,
            exact_tokens=exact_tokens,
            nonfinite=nonfinite,
            backend=backend,
        )

    pieces = []
    for name, x in tensors.items():
        part, is_coded = parts[name], name in coded
        layout = LAYOUT if part.role != "other" and x.ndim > 1 else "..."
        body = (lambda name=name: stream(name)) if is_coded else (lambda x=x: x)
        shape = tuple(int(n) for n in x.shape)
        pieces.append(Piece(name, is_coded, part.layer, part.role, shape, exact.dtype_name(x), layout, body))
    write_pieces(path, pieces, metadata, progress)


def _can_be_coded(x: Any) -> bool:
    return x.ndim > 1 and 1 <= x.shape[-1] <= c.MAX_HEAD_DIM and exact.dtype_name(x) in DTYPE_NAMES.values()


def _shared_presets(
    preset: str, tensors: dict[str, Any], parts: dict[str, Part], rope: Rope | None, exact_tokens: int
) -> dict[str, str]:
    """Presets of a cache that shares its bits (``formats.rates``): one key and one value of each layer, all of one shape."""
    found = {(parts[name].layer, parts[name].role): name for name in tensors}
    layers = len(tensors) // 2
    wanted = {(layer, role) for layer in range(layers) for role in ("key", "value")}
    if len(found) != len(tensors) or found.keys() != wanted or len({tuple(x.shape) for x in tensors.values()}) > 1:
        return {}
    keys, values = ([found[layer, role] for layer in range(layers)] for role in ("key", "value"))
    if preset not in rates.SHARED or layers < rates.FEWEST_LAYERS:
        return {}
    energies = [rates.centred_energy(tensors[name], rope=rope, exact_tokens=exact_tokens) for name in keys]
    of_keys, of_values = rates.share(preset, energies)
    return dict(zip([*keys, *values], [*of_keys, *of_values], strict=True))


def load_file(
    path: str | os.PathLike[str],
    tokens: tuple[int, int] | None = None,
    *,
    device: Any = None,
    backend: str = "auto",
    foreign: bool = False,
) -> dict[str, Any]:
    """All tensors of a file by name, decoded; ``tokens`` = (first, last + 1) cuts those that have tokens.

    A file that pqcodec did not write is refused, for a damaged marker looks the same; with ``foreign``, its tensors come as
    they are.
    """
    if foreign and _is_foreign(path):
        return _load_foreign(path, tokens, device)
    with SafetensorsCache(path) as file:
        cut = {name: tokens if file.entry(name).layout == LAYOUT else None for name in file.names}
        return {name: file.decode(name, tokens=cut[name], device=device, backend=backend) for name in file.names}


def _is_foreign(path: str | os.PathLike[str]) -> bool:
    header, _ = safetensors_header(path)
    return not any(key.startswith("pqcodec_") for key in header.get("__metadata__") or {})


def _load_foreign(path: str | os.PathLike[str], tokens: tuple[int, int] | None, device: Any) -> dict[str, Any]:
    if tokens is not None:
        raise InvalidArgument(f"{path}: says nothing of tokens, it is no file of pqcodec; load it whole and cut it")
    found = {}
    with open_tensors(path) as reader:
        for name in reader.names:
            found[name] = x = reader.read(name)
            if exact.dtype_name(x) == "uint8" and x.ndim == 1 and bytes(x[: len(c.STREAM_MAGIC)].tolist()) == c.STREAM_MAGIC:
                raise CorruptStream(f"{path}: tensor {name!r} is a stream of pqcodec, the file's metadata are lost; decode it")
    return found if device is None else {name: arrays.to_device(x, device) for name, x in found.items()}


# -- reading -----------------------------------------------------------------------------------------------------
class SafetensorsCache:
    """Reads a .safetensors file that holds an encoded cache; a context manager.

    Opening reads the header; a tensor's bytes are read when it is asked for, and of a coded one only the blocks that are
    wanted. Raises InvalidArgument for a file that pqcodec did not write, TruncatedStream, CorruptStream or UnsupportedStream.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._label = os.fspath(path)
        self._stack = ExitStack()
        self._header, self._start = safetensors_header(path)
        values = self._header.pop("__metadata__", None) or {}
        self._file = self._stack.enter_context(open(path, "rb"))  # noqa: SIM115 (the stack closes it)
        self._source = FileSource(self._file)
        try:
            with named(self._label):
                self.metadata, listed = self._open(values)
        except BaseException:
            self.close()
            raise
        self._tensors = {fields["name"]: fields for fields in listed}
        self._entries: dict[str, Entry] = {}

    def __enter__(self) -> SafetensorsCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._source.size

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in the order in which they were given to the writer."""
        return tuple(self._tensors)

    def keys(self) -> tuple[str, ...]:
        """``names``, as ``safetensors.safe_open`` calls them."""
        return self.names

    def entry(self, name: str) -> Entry:
        """Role, layer, shape, dtype and place of a tensor."""
        if name not in self._tensors:
            raise unknown(self._label, name, self.names)
        if name not in self._entries:
            with self._named(name):
                self._entries[name] = self._read_entry(name)
        return self._entries[name]

    def stream(self, name: str) -> Source:
        """The stream of a coded tensor, as it lies in the file."""
        entry = self.entry(name)
        if not entry.coded:
            raise InvalidArgument(f"{self._label}: tensor {name!r} is kept exactly, no stream is there; see entry(name)")
        return self._body(name)

    def inspect(self, name: str) -> StreamInfo:
        """What the stream of a coded tensor says of itself; reads only its header."""
        stream = self.stream(name)
        with self._named(name):
            return codec.inspect(stream)

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
        """The tensor ``name``; arguments and result are those of ``pqcodec.decode``. Of an exact tensor all bytes are read."""
        entry = self.entry(name)
        with self._named(name):
            if entry.coded:
                stream = self._body(name)
                return codec.decode(stream, device=device, backend=backend, tokens=tokens, leading=leading, progress=progress)
            x = exact.from_bytes(self._exact_bytes(name), entry.shape, entry.dtype, self._tensors[name]["numpy"])
            x = exact.cut(x, tokens, leading)
            return x if device is None else arrays.to_device(x, device)

    def get_tensor(self, name: str) -> Any:
        """``decode``, as ``safetensors.safe_open`` calls it."""
        return self.decode(name)

    def get_slice(self, name: str, *, device: Any = None, backend: str = "auto") -> TensorSlice:
        """A view of a tensor that decodes what its index asks for: ``file.get_slice(name)[..., 100:200, :]``."""
        return TensorSlice(self, name, device, backend)

    def verify(self, progress: Progress | None = None, *, backend: str = "auto") -> list[tuple[str | None, Damage | str]]:
        """Check every byte; an empty list is a sound file. ``progress`` is told (bytes done, bytes in all)."""
        found: list[tuple[str | None, Damage | str]] = []
        places = {name: self._header[name]["data_offsets"] for name in self.names}
        for name in sorted(self.names, key=places.__getitem__):
            start, end = places[name]

            def advance(done: int, total: int, start: int = start, end: int = end) -> None:
                if progress:
                    progress(self._start + start + (end - start) * done // max(total, 1), self.size)

            try:
                if self._read_entry(name).coded:
                    found += [(name, damage) for damage in codec.verify(self._body(name), backend=backend, progress=advance)]
                else:
                    self._exact_bytes(name)
            except (CorruptStream, UnsupportedStream) as error:
                found.append((name, str(error)))
            advance(1, 1)
        return found

    # -- opening -------------------------------------------------------------------------------------------------
    def _open(self, values: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The caller's metadata and what is said of each tensor, from a header that holds."""
        missing = [key for key in _KEYS if key not in values]
        if missing:
            if any(key.startswith("pqcodec_") for key in values):
                raise CorruptStream(f"metadata: {', '.join(missing)} not there; the header is damaged, fetch the file again")
            raise InvalidArgument(
                "holds plain tensors, no cache that pqcodec has encoded (no pqcodec_format in its metadata); "
                "load_file(path, foreign=True) reads them as they are"
            )
        form, version, tensors, metadata, stored = (values[key] for key in _KEYS)
        if form != FORMAT or version != VERSION:
            told = f"{form!r:.40} version {version!r:.20}; this release reads {FORMAT!r} version {VERSION!r}"
            raise UnsupportedStream(f"metadata: {told}: install a newer pqcodec")
        listed, found = json_value(tensors.encode(), "pqcodec_tensors"), json_value(metadata.encode(), "pqcodec_metadata")
        if not isinstance(listed, list) or not isinstance(found, dict):
            raise CorruptStream("pqcodec_tensors and pqcodec_metadata: a JSON list and a JSON object are expected")
        for place, fields in enumerate(listed):
            if problem := _fields_problem(fields):
                raise CorruptStream(f"pqcodec_tensors: tensor {place}: {problem}")
            self._check_tensor(fields)
        names = [fields["name"] for fields in listed]
        if len(set(names)) != len(names) or set(names) != self._header.keys():
            odd = sorted((Counter(names) - Counter(set(names))).keys() or set(names) ^ self._header.keys())
            raise CorruptStream(f"the header and pqcodec_tensors do not list the same tensors: {', '.join(map(repr, odd[:5]))}")
        said = [(name, item["dtype"], item["shape"]) for name, item in self._header.items()]
        if stored != _checksum((form, version, tensors, metadata), said):
            raise CorruptStream("header: checksum does not hold; names, shapes or metadata were changed, fetch the file again")
        return found, listed

    def _check_tensor(self, fields: dict[str, Any]) -> None:
        item = self._header.get(fields["name"])
        if item is None:
            return
        told = f"tensor {fields['name']!r}: is {item['dtype']} {item['shape']}"
        if fields["coded"] and (item["dtype"] != _CODED or len(item["shape"]) != 1):
            raise CorruptStream(f"{told}, a stream is {_CODED} of one dimension; was the file converted? Fetch the original")
        if item["dtype"] not in _DTYPES:
            raise UnsupportedStream(f"{told}, a dtype that this release does not know: install a newer pqcodec")

    # -- tensors -------------------------------------------------------------------------------------------------
    def _body(self, name: str) -> FileSource:
        start, end = self._header[name]["data_offsets"]
        return FileSource(self._file, self._start + start, end - start)

    def _read_entry(self, name: str) -> Entry:
        fields, item, body = self._tensors[name], self._header[name], self._body(name)
        shape, dtype = tuple(item["shape"]), _DTYPES[item["dtype"]]
        if fields["coded"]:
            info = codec.inspect(body)
            shape, dtype = info.shape, info.dtype
            if _stream_seal(body) != fields["seal"]:
                raise CorruptStream("is not the stream that was written under this name (its seal does not hold)")
        elif len(shape) > c.MAX_EXACT_NDIM or math.prod(shape) * c.EXACT_ITEM_BYTES[dtype] != body.size:
            raise CorruptStream(f"shape {list(shape)} of {dtype} does not go with {body.size} bytes")
        places = {"body_start": self._start + item["data_offsets"][0], "body_bytes": body.size}
        return Entry(name, fields["coded"], fields["layer"], fields["role"], shape, dtype, fields["layout"], **places)

    def _exact_bytes(self, name: str) -> np.ndarray:
        body = self._body(name)
        raw = body.read(0, body.size)
        if checksum_bytes(raw).hex() != self._tensors[name]["seal"]:
            raise CorruptStream("checksum does not hold; fetch the file again")
        return raw

    def _named(self, name: str) -> Any:
        return named(f"{self._label}: tensor {name!r}")


def _fields_problem(fields: object) -> str:
    """What is wrong with what the metadata say of a tensor, or an empty string; unknown keys are passed over."""
    if not isinstance(fields, dict):
        return "a JSON object is expected"
    if type(fields.get("coded")) is not bool or type(fields.get("numpy", fields.get("coded"))) is not bool:
        return f"coded is {fields.get('coded')!r}, numpy {fields.get('numpy')!r}; true or false is expected"
    if not fields["coded"] and "numpy" not in fields:
        return "numpy is not there; true or false is expected"
    if not isinstance(fields.get("layout"), str) or not isinstance(fields.get("seal"), str):
        return f"layout is {fields.get('layout')!r}, seal {fields.get('seal')!r}; strings are expected"
    return tensor_problem(fields.get("name"), fields.get("layer"), fields.get("role"))


# -- slices ------------------------------------------------------------------------------------------------------
class TensorSlice:
    """A tensor of a file that is decoded where it is indexed: whole numbers and slices that go forward.

    The range of tokens, and of the first dimension where there are more, decides what is read.
    """

    def __init__(self, file: SafetensorsCache, name: str, device: Any, backend: str) -> None:
        self._file, self._name = file, name
        self._options: dict[str, Any] = {"device": device, "backend": backend}
        entry = file.entry(name)
        self.shape, self.dtype = entry.shape, entry.dtype

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        """safetensors' name of the tensor's own dtype."""
        return CODES[self.dtype]

    def __getitem__(self, index: int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]) -> Any:
        given = index if isinstance(index, tuple) else (index,)
        places = [place for place, i in enumerate(given) if i is Ellipsis] or [len(given)]
        left, right = given[: places[0]], given[places[0] + 1 :]
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
        """First, last + 1, and the index inside this range."""
        if isinstance(index, int):
            if not -count <= index < count:
                raise InvalidArgument(f"tensor {self._name!r}: index {index} is outside a dimension of {count}")
            return index % count, index % count + 1, 0
        start, stop, step = index.indices(count)
        if step < 0:
            raise InvalidArgument(f"tensor {self._name!r}: a slice goes backwards; cut forward and turn the result")
        return start, max(start, stop), slice(None, None, step)
