"""Law: the codec ``pqcodec`` of zarr 3: a chunk of zarr [..., tokens, head_dim] is one or several streams (SPEC III.3).

Streams describe themselves, so the codec's configuration only decides how new chunks are written. zarr does not pass a codec
the position of its chunk. For keys under RoPE any constant first position will do: it only turns the chunk's mean, and the
stream holds the position that it was encoded with. ``exact_tokens`` applies to every chunk (4 of 256 tokens cost 7 % at 3
bits); ``save_zarr``, which knows the first chunk, keeps exact tokens in that one only. Streams of bfloat16, which zarr lacks,
are in arrays of float32.

Write whole chunks. zarr fills up the last one, of whose tokens the trailing ones that equal the fill value are not coded.
Tokens added to it later make zarr decode and encode it again, with the loss of both; chunks before it stay as they are.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from zarr.abc.codec import ArrayBytesCodec, ArrayBytesCodecPartialDecodeMixin
from zarr.abc.store import RangeByteRequest

from pqcodec import codec
from pqcodec import constants as c
from pqcodec.codings.presets import DEFAULT_PRESET, check_restores
from pqcodec.errors import CorruptStream, InvalidArgument, TruncatedStream
from pqcodec.formats.containers.reader import named
from pqcodec.options import EncodeOptions
from pqcodec.stages.centre import Rope
from pqcodec.stream.header import DTYPE_NAMES, Header, header_size, read_header
from pqcodec.stream.source import Extent, MemorySource, Source, check_range
from pqcodec.tensors.arrays import view
from pqcodec.tensors.numbers import widen

if TYPE_CHECKING:
    from zarr.abc.store import ByteGetter
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer

NAME = "pqcodec"
_DTYPES = {np.dtype(np.float16): c.DTYPE_FLOAT16, np.dtype(np.float32): c.DTYPE_FLOAT32}
_HEAD_BYTES = 4096  # read first where the configuration does not give the size of what precedes a stream's payload


# -- the codec ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PQCodec(ArrayBytesCodec, ArrayBytesCodecPartialDecodeMixin):
    """The codec ``pqcodec`` of zarr 3: options as in ``pqcodec.encode``; a ``rope`` alone means center="rope".

    Chunks of zarr hold whole vectors: their last dimension is the array's. Reading some tokens reads only the chunks of
    ``chunk_tokens`` that hold them. Raises InvalidArgument; reading a damaged chunk raises CorruptStream.

    >>> import zarr
    >>> from zarr.storage import MemoryStore
    >>> array = zarr.create_array(
    ...     MemoryStore(), shape=(2, 512, 64), chunks=(1, 256, 64), dtype="float16", serializer=PQCodec("pq4"), compressors=None
    ... )
    >>> array[...] = np.random.default_rng(0).standard_normal((2, 512, 64)).astype(np.float16)
    >>> array[1, :, 0:32].shape
    (512, 32)
    """

    is_fixed_size = False

    preset: str = DEFAULT_PRESET
    seed: int = 0
    center: str | None = None
    rope: Rope | None = None
    exact_tokens: int = 0
    chunk_tokens: int = c.DEFAULT_CHUNK_TOKENS
    nonfinite: str = "error"

    def __post_init__(self) -> None:
        rope: Any = self.rope
        if isinstance(rope, dict):
            rope = _rope(rope)
        elif isinstance(rope, Rope):
            frequencies = None if rope.frequencies is None else tuple(map(float, rope.frequencies))
            rope = replace(rope, theta=float(rope.theta), frequencies=frequencies)  # the types that JSON returns
        object.__setattr__(self, "rope", rope)
        if rope is not None and self.center is None:
            object.__setattr__(self, "center", "rope")
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise InvalidArgument(f"zarr codec {NAME}: {name} {value!r} is not of type {' or '.join(map(_kind, kinds))}")
        if self.nonfinite not in ("error", "exact"):
            raise InvalidArgument(f"zarr codec {NAME}: nonfinite {self.nonfinite!r} is unknown; choose 'error' or 'exact'")
        check_restores(self.preset, "a zarr array")
        self._header((1, c.MAX_HEAD_DIM), c.DTYPE_FLOAT16)

    @classmethod
    def from_dict(cls, data: Any) -> PQCodec:
        """The codec for its description in zarr.json; raises InvalidArgument."""
        given = data.get("configuration") or {}
        if data.get("name") != NAME or not isinstance(given, dict):
            raise InvalidArgument(f"zarr codec {data.get('name')!r}: {NAME!r} with a configuration is expected")
        _known(given, PQCodec, "configuration")
        return PQCodec(**given)

    def to_dict(self) -> Any:
        """The codec's description for zarr.json."""
        values = {name: getattr(self, name) for name in _KINDS}
        if self.rope is not None:
            rope = asdict(self.rope)
            rope.pop("theta" if self.rope.frequencies is not None else "frequencies")
            values["rope"] = {name: list(v) if name == "frequencies" else v for name, v in rope.items() if v is not None}
        return {"name": NAME, "configuration": values}

    def evolve_from_array_spec(self, array_spec: ArraySpec) -> PQCodec:
        """This codec; raises InvalidArgument for an array of a dtype that it cannot encode."""
        _coded_dtype(array_spec.dtype)
        return self

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """Raises InvalidArgument for chunks that cut vectors, or a shape or dtype that cannot be encoded."""
        chunks = tuple(getattr(chunk_grid, "chunk_shape", shape))
        if not shape or chunks[-1] != shape[-1]:
            raise InvalidArgument(
                f"zarr codec {NAME}: chunks {chunks} of an array {tuple(shape)} cut its vectors; "
                f"the last dimension of a chunk must be head_dim, such as chunks=(..., {c.ZARR_TOKENS_PER_CHUNK}, head_dim)"
            )
        self._header(chunks, _coded_dtype(dtype))

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Raises NotImplementedError: a stream's size depends on the numbers."""
        raise NotImplementedError("the size of a stream depends on its numbers: trailing fill values are not coded")

    # -- encode --------------------------------------------------------------------------------------------------
    def _encode_sync(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        x = chunk_array.as_numpy_array()
        x = np.ascontiguousarray(x, x.dtype.newbyteorder("=")).reshape(_shape(chunk_spec))
        x = x[..., : _filled_tokens(x, chunk_spec), :]
        with named("chunk of a zarr array"):
            stream = codec.encode(
                x,
                preset=self.preset,
                seed=self.seed,
                center=self.center,
                rope=self.rope,
                exact_tokens=self.exact_tokens,
                nonfinite=self.nonfinite,
                chunk_tokens=self.chunk_tokens,
            )
        return chunk_spec.prototype.buffer.from_bytes(stream)

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.to_thread(self._encode_sync, chunk_array, chunk_spec)

    def _header(self, shape: tuple[int, ...], dtype: int) -> Header:
        with named(f"zarr codec {NAME}"):
            options = EncodeOptions(self.preset, self.seed, self.center, self.rope, self.exact_tokens, self.chunk_tokens)
            return options.header(shape, dtype, numpy=True)

    # -- decode --------------------------------------------------------------------------------------------------
    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return _decoded(MemorySource(chunk_bytes.as_numpy_array()), (0, _shape(chunk_spec)[-2]), chunk_spec)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    async def _decode_partial_single(self, byte_getter: ByteGetter, selection: Any, chunk_spec: ArraySpec) -> NDBuffer | None:
        """The selection of a chunk; a range of its tokens takes one range of the payload beside the head of the stream."""
        path = getattr(byte_getter, "path", None)
        with named(path or "chunk of a shard"):
            tokens, inner = _token_range(selection, chunk_spec)
            source: Source | None
            if path and tokens != (0, _shape(chunk_spec)[-2]):
                source = await self._part(byte_getter, tokens, chunk_spec)
            else:  # all tokens, or a chunk in a shard that zarr has read already
                data = await byte_getter.get(prototype=chunk_spec.prototype)
                source = None if data is None else MemorySource(data.as_numpy_array())
            return None if source is None else (await asyncio.to_thread(_decoded, source, tokens, chunk_spec))[inner]

    async def _part(self, byte_getter: ByteGetter, tokens: tuple[int, int], chunk_spec: ArraySpec) -> Source | None:
        """A stream of which only what precedes the payload, and the chunks that hold a range of tokens, is read.

        Where the first stream ends before the range, the chunk of zarr holds several or was filled up: all of it is read.
        None where the object is missing.
        """

        async def read(start: int, stop: int) -> bytes | None:
            data = await byte_getter.get(prototype=chunk_spec.prototype, byte_range=RangeByteRequest(start, stop))
            return None if data is None else data.to_bytes()

        try:
            guess = self._header(_shape(chunk_spec), _coded_dtype(chunk_spec.dtype)).payload_start
        except InvalidArgument:  # the configuration is for new chunks, and need not fit existing ones
            guess = _HEAD_BYTES
        head = await read(0, guess)
        if head is None:
            return None
        size = header_size(head)
        if len(head) < size:
            head += await read(len(head), size) or b""
        header = Header.from_bytes(head)
        if header.tokens < tokens[1]:
            data = await byte_getter.get(prototype=chunk_spec.prototype)
            return None if data is None else MemorySource(data.as_numpy_array())
        if len(head) < header.payload_start:
            head += await read(len(head), header.payload_start) or b""
        first, last = (min(max(token - header.first_tokens, 0), header.coded_tokens) for token in tokens)
        blocks = header.blocks
        chunks = blocks.of_tokens(first, last)
        start = blocks.place(chunks[0], 0)
        stop = blocks.place(chunks[1], 0) if chunks[1] < header.chunks else header.stream_bytes
        rows = await read(start, stop) if first < last else b""
        return _PartialStream(header.stream_bytes, head, start, rows or b"")


class _PartialStream:
    """A ``Source`` of a stream of which only the head and a run of chunks were read."""

    def __init__(self, size: int, head: bytes, start: int, blocks: bytes) -> None:
        self.size, self._head, self._start, self._blocks = size, MemorySource(head), start, MemorySource(blocks)

    def read(self, start: int, count: int) -> np.ndarray:
        check_range(start, count, self.size)
        if start < self._start:
            return self._head.read(start, count)
        if start - self._start + count > self._blocks.size:
            raise TruncatedStream(f"bytes {start} .. {start + count} wanted, the store has fewer; the chunk is cut off")
        return self._blocks.read(start - self._start, count)


def streams_in_chunk(source: Source) -> list[Extent]:
    """The streams of a chunk of zarr, which follow each other; at least one. Raises CorruptStream or TruncatedStream."""
    found: list[Extent] = []
    offset = 0
    while offset < source.size or not found:
        fixed = source.read(offset, min(source.size - offset, c.HEADER_STRUCT.size)).tobytes()
        size = min(source.size - offset, header_size(fixed))
        header = Header.from_bytes(source.read(offset, size).tobytes())
        check_range(offset, header.stream_bytes, source.size)
        part = Extent(source, offset, header.stream_bytes)
        part.header = header
        found.append(part)
        offset += header.stream_bytes
    return found


def _decoded(source: Source, tokens: tuple[int, int], spec: ArraySpec) -> NDBuffer:
    """A range of a chunk's tokens, decoded; tokens beyond its streams are fill values. Raises CorruptStream."""
    shape, dtype = _shape(spec), _coded_dtype(spec.dtype)
    native = _native(spec.dtype)
    out = np.empty((*shape[:-2], tokens[1] - tokens[0], shape[-1]), native.newbyteorder("="))
    begin = 0
    for part in [source] if isinstance(source, _PartialStream) else streams_in_chunk(source):
        h = read_header(part)
        wide = h.dtype == c.DTYPE_BFLOAT16 and dtype == c.DTYPE_FLOAT32
        fits = (h.shape[:-2], h.head_dim) == (shape[:-2], shape[-1]) and (wide or h.dtype == dtype)
        if not fits or begin + h.tokens > shape[-2]:
            raise CorruptStream(
                f"the chunk's stream holds {DTYPE_NAMES[h.dtype]} {h.shape}, the array's chunks are {DTYPE_NAMES[dtype]} "
                f"{shape}; is it the chunk of another array?"
            )
        low, high = max(tokens[0], begin), min(tokens[1], begin + h.tokens)
        if low < high:
            target = out[..., low - tokens[0] : high - tokens[0], :] if len(h.shape) > 1 else out[0]
            if wide:
                target[...] = widen(view(codec.decode(part, tokens=(low - begin, high - begin))).stored, h.dtype)
            else:
                codec.decode(part, tokens=(low - begin, high - begin), out=target)
        begin += h.tokens
    out[..., max(begin - tokens[0], 0) :, :] = _fill(spec)
    out = out.astype(native, copy=False)
    return spec.prototype.nd_buffer.from_numpy_array(out if len(spec.shape) > 1 else out.reshape(spec.shape))


def _token_range(selection: Any, spec: ArraySpec) -> tuple[tuple[int, int], Any]:
    """The range of tokens that covers a selection of a chunk, and the selection relative to that range."""
    tokens = _shape(spec)[-2]
    if not isinstance(selection, tuple) or len(selection) != len(spec.shape) or len(selection) < 2:
        return (0, tokens), selection
    wanted = selection[-2]
    inner: Any
    if isinstance(wanted, slice):
        found = range(tokens)[wanted]
        if not found or found.step < 1:
            return (0, tokens), selection
        first, last = found[0], found[-1] + 1
        inner = slice(0, last - first, found.step)
    elif isinstance(wanted, (int, np.integer)) or (
        isinstance(wanted, np.ndarray) and wanted.dtype.kind in "iu" and wanted.size
    ):
        first, last = int(np.min(wanted)), int(np.max(wanted)) + 1
        if first < 0:
            return (0, tokens), selection
        inner = wanted - first
    else:
        return (0, tokens), selection
    return (first, last), (*selection[:-2], inner, selection[-1])


def _filled_tokens(x: np.ndarray, spec: ArraySpec) -> int:
    """The number of tokens without the trailing ones that equal the fill value, bit for bit."""
    kind = np.uint16 if x.itemsize == 2 else np.uint32
    differs = x.view(kind) != np.asarray(_fill(spec), x.dtype).view(kind)
    if not x.size or differs[..., -1, :].any():
        return int(x.shape[-2])
    held = np.nonzero(differs.any((*range(x.ndim - 2), x.ndim - 1)))[0]
    return int(held[-1]) + 1 if held.size else 0


def _fill(spec: ArraySpec) -> Any:
    return 0 if spec.fill_value is None else spec.fill_value


def _shape(spec: ArraySpec) -> tuple[int, ...]:
    """A chunk's shape, with a dimension of one token added to a single vector."""
    return spec.shape if len(spec.shape) > 1 else (1, *spec.shape)


def _native(dtype: Any) -> np.dtype:
    """The numpy dtype of zarr's data type, which from zarr 3.1 on is a class of zarr."""
    return np.dtype(dtype.to_native_dtype() if hasattr(dtype, "to_native_dtype") else dtype)


def _coded_dtype(dtype: Any) -> int:
    found = _DTYPES.get(_native(dtype).newbyteorder("="))
    if found is None:
        raise InvalidArgument(
            f"zarr codec {NAME}: dtype {_native(dtype)} of the array; choose float16 or float32 "
            "(bfloat16, which zarr lacks, is float32 without loss and takes no more bytes: x.float())"
        )
    return found


# -- configuration -----------------------------------------------------------------------------------------------
_KINDS: dict[str, tuple[type, ...]] = {
    "preset": (str,),
    "seed": (int,),
    "center": (str, type(None)),
    "rope": (Rope, type(None)),
    "exact_tokens": (int,),
    "chunk_tokens": (int,),
    "nonfinite": (str,),
}
_NUMBER = (int, float)


def _kind(kind: type) -> str:
    return {type(None): "null", Rope: "object"}.get(kind, kind.__name__)


def _known(given: dict[str, Any], of: type, what: str) -> None:
    known = [f.name for f in fields(of) if f.init]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise InvalidArgument(f"zarr codec {NAME}: {what} {unknown[0]!r} is unknown; {', '.join(known)} are known")


def _rope(given: dict[str, Any]) -> Rope:
    _known(given, Rope, "rope")
    frequencies = given.get("frequencies")
    listed = isinstance(frequencies, (list, tuple)) and all(isinstance(f, _NUMBER) for f in frequencies)
    sound = (
        isinstance(given.get("theta", 1.0), _NUMBER)
        and isinstance(given.get("dim"), (int, type(None)))
        and isinstance(given.get("first_position", 0), int)
        and isinstance(given.get("style", "half"), str)
        and (frequencies is None or listed)
    )
    if not sound:
        raise InvalidArgument(
            f"zarr codec {NAME}: rope {given!r}: theta (number) or frequencies (numbers), dim, first_position (integers) and "
            "style (string) are expected"
        )
    return Rope(**{**given, "frequencies": None if frequencies is None else tuple(map(float, frequencies))})
