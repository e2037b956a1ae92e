"""Law: one tensor <-> one stream: header, sections and a backend put together; the public functions live here."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pqcodec import arrays, centre
from pqcodec import constants as c
from pqcodec.centre import Rope
from pqcodec.checksum import checksum
from pqcodec.errors import CorruptStream, InvalidArgument, NonFiniteInput, TruncatedStream
from pqcodec.header import CODING_NAMES, DTYPE_NAMES, Header, header_size
from pqcodec.kernels import backend as backend_of
from pqcodec.kernels.job import DecodeJob, EncodeJob, Values
from pqcodec.presets import preset as preset_of
from pqcodec.presets import preset_name
from pqcodec.rotation import order_for
from pqcodec.source import Source, source_of

Progress = Callable[[int, int], None]  # blocks done, blocks in all
_SCAN_ROWS = 1 << 12


@dataclass(frozen=True)
class StreamInfo:
    """What ``inspect`` tells of a stream; sizes in bytes."""

    version: int
    preset: str | None
    coding: str
    dtype: str
    shape: tuple[int, ...]
    seed: int
    centered: str | None
    exact_tokens: int
    exact_vectors: int
    chunk_tokens: int
    order: int
    stream_bytes: int
    header_bytes: int
    side_bytes: int  # offsets, exact tokens and exact vectors
    payload_bytes: int
    tensor_bytes: int

    @property
    def ratio(self) -> float:
        return self.tensor_bytes / self.stream_bytes

    @property
    def bits_per_coordinate(self) -> float:
        """All bytes of the stream over all coordinates of the tensor."""
        return 8 * self.stream_bytes / max(math.prod(self.shape), 1)


@dataclass(frozen=True)
class Damage:
    """A part of a stream whose checksum does not hold; ``leading`` and ``tokens`` are None where all are concerned."""

    part: str  # "offset", "exact tokens", "exact vectors" or "payload"
    leading: int | None
    tokens: tuple[int, int] | None

    def __str__(self) -> str:
        lead = "" if self.leading is None else f", leading index {self.leading}"
        tokens = "" if self.tokens is None else f", tokens {self.tokens[0]} .. {self.tokens[1] - 1}"
        return f"{self.part}{lead}{tokens}"


# -- encode ------------------------------------------------------------------------------------------------------
def encode(
    x: Any,
    *,
    preset: str = "pq3",
    seed: int = 0,
    center: str | None = None,
    rope: Rope | None = None,
    exact_tokens: int = 0,
    nonfinite: str = "error",
    chunk_tokens: int = c.DEFAULT_CHUNK_TOKENS,
    backend: str = "auto",
    progress: Progress | None = None,
) -> bytes:
    """Encode a tensor [..., tokens, head_dim] of float16, bfloat16 or float32 (torch or numpy) into one stream.

    ``center``: None, "mean" (subtract the mean over tokens of each leading index) or "rope" (the mean before RoPE,
    described by ``rope``). ``exact_tokens``: first tokens kept in the tensor's own dtype. ``nonfinite``: "error", or
    "exact" to keep vectors that hold NaN or Inf as they are. ``chunk_tokens``: tokens under one checksum.
    Raises InvalidArgument, NonFiniteInput or BackendUnavailable.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((2, 100, 64)).astype(np.float32)
    >>> data = encode(x, preset="pq3", backend="reference")
    >>> len(data) == encoded_size(x.shape, "float32", preset="pq3")
    True
    >>> y = decode(data, backend="reference")
    >>> bool(((x - y) ** 2).sum() < 0.04 * (x**2).sum())
    True
    """
    view = arrays.view(x)
    kernel = backend_of(backend, view.device)
    if view.device != "cpu":
        raise InvalidArgument(f"the tensor is on {view.device!r}, backend {kernel.name!r} encodes on the CPU; pass x.cpu()")
    if nonfinite not in ("error", "exact"):
        raise InvalidArgument(f"nonfinite {nonfinite!r} is unknown; choose 'error' or 'exact'")
    values = view.values()
    header = _header(view.shape, view.dtype, preset, seed, center, rope, exact_tokens, chunk_tokens, view.numpy)
    if nonfinite == "exact":
        header = replace(header, exceptions=len(_bad_rows(values, header)))
    if header.coding == c.CODING_PAPER:
        header = replace(header, radius_exponent=_paper_exponent(values, header))
    halves = np.zeros((header.leading, 0), np.float16)
    offsets = None
    if header.offsets:
        halves, exponent = centre.store(kernel.means(values, header))
        header = replace(header, offset_exponent=exponent)
        offsets = centre.load(halves, exponent)
    stream = io.BytesIO()  # its buffer becomes the result without a copy
    stream.write(header.to_bytes())
    _write_sides(stream, header, values, halves)
    stream.seek(header.stream_bytes - 1)
    if header.stream_bytes > header.payload_start:
        stream.write(b"\0")
    bad = np.zeros((header.leading, header.coded_tokens), np.bool_)
    payload = np.frombuffer(stream.getbuffer(), np.uint8)[header.payload_start :]
    kernel.encode(EncodeJob(header, values, offsets, payload, bad, _counter(header, progress)))
    del payload  # the stream gives its buffer away uncopied only when nobody else holds it
    if nonfinite == "error" and bad.any():
        raise NonFiniteInput(_name_place(values, header, bad))
    return stream.getvalue()


def encoded_size(
    shape: tuple[int, ...],
    dtype: str = "float16",
    *,
    preset: str = "pq3",
    center: str | None = None,
    rope: Rope | None = None,
    exact_tokens: int = 0,
    chunk_tokens: int = c.DEFAULT_CHUNK_TOKENS,
) -> int:
    """Bytes that ``encode`` returns for a finite tensor of that shape; nothing is encoded.

    >>> encoded_size((32, 8, 4096, 128), preset="pq3") / (32 * 8 * 4096 * 128 * 2)
    0.187...
    """
    codes = {name: code for code, name in DTYPE_NAMES.items()}
    if dtype not in codes:
        raise InvalidArgument(f"dtype {dtype!r} is unknown; choose from {', '.join(codes)}")
    return _header(tuple(shape), codes[dtype], preset, 0, center, rope, exact_tokens, chunk_tokens, True).stream_bytes


def _header(
    shape: tuple[int, ...],
    dtype: int,
    preset: str,
    seed: int,
    center: str | None,
    rope: Rope | None,
    exact_tokens: int,
    chunk_tokens: int,
    numpy: bool,
) -> Header:
    chosen = preset_of(preset)
    if center not in (None, "mean", "rope"):
        raise InvalidArgument(f"center {center!r} is unknown; choose None, 'mean' or 'rope'")
    if (center == "rope") != (rope is not None):
        raise InvalidArgument("center='rope' and rope=Rope(...) go together; give both or neither")
    return Header(
        coding=chosen.coding,
        dtype=dtype,
        shape=shape,
        row_bits=chosen.row_bits(order_for(shape[-1])),
        radius_bits=chosen.radius_bits,
        seed=seed,
        chunk_tokens=chunk_tokens,
        exact_tokens=exact_tokens,
        offsets=center is not None,
        rope=rope.field(shape[-1]) if rope else None,
        numpy=numpy,
    )


def _counter(header: Header, progress: Progress | None) -> Callable[[int], None]:
    total = header.chunks * header.leading
    done = 0

    def advance(blocks: int) -> None:
        nonlocal done
        done += blocks
        if progress:
            progress(done, total)

    return advance


def _write_sides(stream: io.BytesIO, h: Header, values: Values, halves: np.ndarray) -> None:
    """Offsets, exact tokens and exact vectors, each with its checksum (SPEC 3.2)."""

    def section(data: bytes) -> None:
        stream.write(data)
        stream.write(checksum(data).to_bytes(c.CHECKSUM_BYTES, "little"))

    if h.offsets:
        for half in halves:
            section(half.astype("<f2").tobytes())
    if h.first_tokens:
        for lead in range(h.leading):
            section(values.rows(lead, 0, h.first_tokens).tobytes())
    if h.exceptions:
        body = bytearray()
        for row in _bad_rows(values, h):
            lead, token = divmod(int(row), h.coded_tokens)
            body += int(row).to_bytes(8, "little") + values.rows(lead, h.first_tokens + token, 1).tobytes()
        section(bytes(body))


def _widened(values: Values, h: Header) -> Any:
    """Runs of coded tokens as (lead, first coded token, magnitudes float32), a bounded piece at a time."""
    from pqcodec.kernels.reference import widen

    for lead in range(h.leading):
        for first in range(0, h.coded_tokens, _SCAN_ROWS):
            tokens = min(_SCAN_ROWS, h.coded_tokens - first)
            yield lead, first, np.abs(widen(values.rows(lead, h.first_tokens + first, tokens), h.dtype))


def _bad_rows(values: Values, h: Header) -> np.ndarray:
    """Coded vectors that hold NaN or Inf, as lead * coded_tokens + token, ascending."""
    found = [lead * h.coded_tokens + first + np.nonzero(~np.isfinite(x).all(1))[0] for lead, first, x in _widened(values, h)]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _paper_exponent(values: Values, h: Header) -> int:
    """Power of two that brings the paper coding's radii into float16's range; 0 where they are there already."""
    largest = max((float(np.where(np.isfinite(x), x, 0).max()) for _, _, x in _widened(values, h) if x.size), default=0.0)
    norm = largest * math.sqrt(h.order)
    if norm == 0 or 2.0**-4 <= norm < 2.0**15:
        return 0
    low, high = c.RADIUS_EXPONENTS
    return min(max(math.frexp(norm)[1] - 15, low), high)


def _name_place(values: Values, h: Header, bad: np.ndarray) -> str:
    from pqcodec.kernels.reference import widen

    lead, token = (int(i) for i in np.argwhere(bad)[0])
    row = widen(values.rows(lead, h.first_tokens + token, 1), h.dtype)[0]
    channel = int(np.nonzero(~np.isfinite(row))[0][0])
    leading = [int(i) for i in np.unravel_index(lead, h.shape[:-2])] if len(h.shape) > 2 else []
    place = [*leading, h.first_tokens + token, channel][-len(h.shape) :]
    count = int(bad.sum())
    return (
        f"element {place} of the tensor is {row[channel]} ({count} vectors hold NaN or Inf); "
        "mend the tensor, or pass nonfinite='exact' to keep such vectors as they are"
    )


# -- decode ------------------------------------------------------------------------------------------------------
def decode(
    data: Any,
    *,
    device: Any = None,
    backend: str = "auto",
    tokens: tuple[int, int] | None = None,
    leading: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Any:
    """Decode a stream (bytes-like, or a seekable binary file) into a tensor of the shape, dtype and kind that was encoded.

    ``tokens`` = (first, last + 1) decodes that range only and reads only the blocks that hold it: [..., last+1-first,
    head_dim]. ``leading`` = (first, last + 1) does the same for the flattened leading dimensions: [n, tokens, head_dim].
    ``device``: a torch device for the result. Raises TruncatedStream, CorruptStream or UnsupportedStream.
    """
    source = source_of(data)
    header = read_header(source)
    kernel = backend_of(backend)
    first, last = _range("tokens", tokens, header.tokens)
    low, high = _range("leading", leading, header.leading)
    if leading is None:
        shape = (*header.shape[:-2], last - first, header.head_dim) if len(header.shape) > 1 else header.shape
    else:
        shape = (high - low, last - first, header.head_dim)
    result, stored = arrays.empty(shape, header.dtype, header.numpy)
    out = arrays.values_of(stored.reshape(-1, last - first, header.head_dim) if stored.size else stored)
    if stored.size:
        damage = _decode_into(source, header, kernel, out, (first, last), (low, high), progress)
        if damage:
            raise CorruptStream(
                f"checksum does not hold: {damage[0]}" + (f" and {len(damage) - 1} more places" if damage[1:] else "")
            )
    return result if device is None else arrays.to_device(result, device)


def read_header(source: Source) -> Header:
    """The header of a stream whose size is right; allocates nothing that the header asks for."""
    fixed = source.read(0, min(source.size, c.HEADER_STRUCT.size)).tobytes()
    size = header_size(fixed)
    header = Header.from_bytes(source.read(0, min(source.size, size)).tobytes())
    if source.size < header.stream_bytes:
        raise TruncatedStream(f"{header.stream_bytes} bytes announced, {source.size} there; the stream is cut off")
    if source.size > header.stream_bytes:
        raise CorruptStream(f"{source.size - header.stream_bytes} bytes behind the end of the stream; pass exactly one stream")
    return header


def inspect(data: Any) -> StreamInfo:
    """What a stream says of itself; reads only its header. Raises as ``decode`` does.

    >>> import numpy as np
    >>> inspect(encode(np.zeros((4, 64), np.float16), preset="pq4", backend="reference")).preset
    'pq4'
    """
    h = read_header(source_of(data))
    return StreamInfo(
        version=c.STREAM_VERSION,
        preset=preset_name(h.coding, h.row_bits, h.radius_bits, h.order),
        coding=CODING_NAMES[h.coding],
        dtype=DTYPE_NAMES[h.dtype],
        shape=h.shape,
        seed=h.seed,
        centered=("rope" if h.rope else "mean") if h.offsets else None,
        exact_tokens=h.exact_tokens,
        exact_vectors=h.exceptions,
        chunk_tokens=h.chunk_tokens,
        order=h.order,
        stream_bytes=h.stream_bytes,
        header_bytes=h.header_bytes,
        side_bytes=h.payload_start - h.header_bytes,
        payload_bytes=h.stream_bytes - h.payload_start,
        tensor_bytes=math.prod(h.shape) * c.ITEM_BYTES[h.dtype],
    )


def verify(data: Any, *, backend: str = "auto", progress: Progress | None = None) -> list[Damage]:
    """Check every checksum of a stream; an empty list is a sound stream.

    A header that does not hold raises, as in ``decode``.
    """
    source = source_of(data)
    header = read_header(source)
    ranges = (0, header.tokens), (0, header.leading)
    return _decode_into(source, header, backend_of(backend), None, *ranges, progress)


def _range(name: str, wanted: tuple[int, int] | None, count: int) -> tuple[int, int]:
    if wanted is None:
        return 0, count
    first, last = wanted
    if not 0 <= first <= last <= count:
        raise InvalidArgument(f"{name} {first} .. {last} is outside 0 .. {count} of the tensor")
    return first, last


def _decode_into(
    source: Source,
    h: Header,
    kernel: Any,
    out: Values | None,
    tokens: tuple[int, int],
    leads: tuple[int, int],
    progress: Progress | None,
) -> list[Damage]:
    """Fill ``out`` and tell what is damaged; the caller drops ``out`` if anything is."""
    damage: list[Damage] = []
    halves = _sections(source, h, h.header_bytes, h.offset_block_bytes, leads, "offset", damage)
    offsets = None
    if h.offsets:
        offsets = np.zeros((h.leading, h.head_dim), np.float32)
        for lead, raw in halves:
            half = raw.view("<f2")
            if not np.isfinite(half).all():
                raise CorruptStream(f"offset of leading index {lead} is not finite")
            offsets[lead] = centre.load(half, h.offset_exponent)
    if tokens[0] < h.first_tokens:
        exact = _sections(source, h, h.exact_start, h.exact_block_bytes, leads, "exact tokens", damage)
        for lead, raw in exact:
            if out is not None:
                last = min(tokens[1], h.first_tokens)
                rows = raw.view(out.flat.dtype).reshape(h.first_tokens, h.head_dim)[tokens[0] : last]
                out.rows(lead - leads[0], 0, last - tokens[0])[:] = rows
    first = max(tokens[0] - h.first_tokens, 0) // h.chunk_tokens
    last = -(-max(tokens[1] - h.first_tokens, 0) // h.chunk_tokens)
    advance = _counter(h, progress)
    for low, high, part in _spans(h, first, last, leads):
        origin = h.block_start(low, part[0])
        end = h.block_start(high - 1, part[1] - 1) + h.block_bytes(high - 1)
        damaged = np.zeros((high - low, part[1] - part[0]), np.bool_)
        payload = source.read(origin, end - origin)
        job_out = out and Values(out.flat, out.starts[part[0] - leads[0] :], out.stride, out.head_dim)
        kernel.decode(
            DecodeJob(h, payload, origin, low, high, part[0], part[1], tokens[0], tokens[1], offsets, job_out, damaged, advance)
        )
        for chunk, lead in np.argwhere(damaged):
            start = h.first_tokens + (low + int(chunk)) * h.chunk_tokens
            damage.append(Damage("payload", part[0] + int(lead), (start, start + h.block_tokens(low + int(chunk)))))
    if h.exceptions:
        _place_exceptions(source, h, out, tokens, leads, damage)
    return damage


def _spans(h: Header, first: int, last: int, leads: tuple[int, int]) -> Any:
    """Runs of blocks that lie side by side: (first chunk, last + 1, leading range)."""
    if leads == (0, h.leading):
        step = max(1, (16 << 20) // max(h.leading * (h.chunk_tokens * h.row_bytes + c.CHECKSUM_BYTES), 1))
        for low in range(first, last if h.leading else first, step):
            yield low, min(low + step, last), leads
    elif leads[1] > leads[0]:
        for chunk in range(first, last):
            yield chunk, chunk + 1, leads


def _sections(
    source: Source, h: Header, start: int, block: int, leads: tuple[int, int], part: str, damage: list[Damage]
) -> list[tuple[int, np.ndarray]]:
    """Checked side blocks of some leading indices as (lead, bytes without the checksum)."""
    if not block or leads[0] == leads[1]:
        return []
    data = source.read(start + leads[0] * block, (leads[1] - leads[0]) * block).reshape(-1, block)
    found = []
    for lead, raw in enumerate(data, leads[0]):
        body = np.ascontiguousarray(raw[: -c.CHECKSUM_BYTES])
        if checksum(body) != int.from_bytes(raw[-c.CHECKSUM_BYTES :].tobytes(), "little"):
            tokens = (0, h.first_tokens) if part == "exact tokens" else None
            damage.append(Damage(part, lead, tokens))
        else:
            found.append((lead, body))
    return found


def _place_exceptions(
    source: Source, h: Header, out: Values | None, tokens: tuple[int, int], leads: tuple[int, int], damage: list[Damage]
) -> None:
    raw = source.read(h.exceptions_start, h.exceptions_bytes)
    body = np.ascontiguousarray(raw[: -c.CHECKSUM_BYTES])
    if checksum(body) != int.from_bytes(raw[-c.CHECKSUM_BYTES :].tobytes(), "little"):
        damage.append(Damage("exact vectors", None, None))
        return
    records = body.reshape(h.exceptions, 8 + h.vector_bytes)
    rows = np.ascontiguousarray(records[:, :8]).view("<u8").ravel().astype(np.int64)
    if (np.diff(rows) <= 0).any() or rows[0] < 0 or rows[-1] >= h.leading * h.coded_tokens:
        raise CorruptStream("exact vectors are not in ascending order inside the tensor")
    if out is None:
        return
    for row, record in zip(rows, records, strict=True):
        lead, token = divmod(int(row), h.coded_tokens)
        token += h.first_tokens
        if tokens[0] <= token < tokens[1] and leads[0] <= lead < leads[1]:
            vector = np.ascontiguousarray(record[8:]).view(out.flat.dtype)
            out.rows(lead - leads[0], token - tokens[0], 1)[0] = vector
