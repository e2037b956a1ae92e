"""Law: one tensor <-> one stream: header, sections and a backend put together; the public functions live here."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.presets import preset_name
from pqcodec.errors import CorruptStream, InvalidArgument, NonFiniteInput
from pqcodec.kernels import ON_DEVICE
from pqcodec.kernels import backend as backend_of
from pqcodec.kernels.job import DecodeJob, EncodeJob, Values
from pqcodec.stages import centre
from pqcodec.stages.centre import Rope
from pqcodec.stream.checksum import checksum, checksums
from pqcodec.stream.header import CODING_NAMES, DTYPE_NAMES, Header
from pqcodec.stream.sections import (
    Damage,
    StreamInfo,
    checked_range,
    coded_rows,
    damage_error,
    exceptions_section,
    groups_of_chunks,
    make_header,
    paper_exponent,
    read_blocks,
    read_exceptions,
    read_header,
    result_shape,
)
from pqcodec.stream.source import Source, source_of
from pqcodec.tensors import arrays

Progress = Callable[[int, int], None]  # blocks done, blocks in all
_SCAN_ROWS = 1 << 12


# -- encode ------------------------------------------------------------------------------------------------------
def encode(
    x: Any,
    *,
    preset: str = "pq3",
    seed: int = 0,
    center: str | None = None,
    rope: Rope | None = None,
    exact_tokens: int = 0,
    exact_vectors: Any = (),
    nonfinite: str = "error",
    chunk_tokens: int = c.DEFAULT_CHUNK_TOKENS,
    backend: str = "auto",
    progress: Progress | None = None,
) -> bytes:
    """Encode a tensor [..., tokens, head_dim] of float16, bfloat16 or float32 (torch or numpy) into one stream.

    ``center``: None, "mean" (subtract the mean over tokens of each leading index) or "rope" (the mean before RoPE,
    described by ``rope``). ``exact_tokens``: first tokens kept in the tensor's own dtype. ``exact_vectors``: further vectors
    that are kept so, as pairs (leading index, token). ``nonfinite``: "error", or "exact" to keep vectors that hold NaN or
    Inf as they are. ``chunk_tokens``: tokens under one checksum. A tensor of a GPU is encoded there (``batch.EncodeBatch``
    leaves the stream there, too), and ``progress`` is told only at the end.
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
    if nonfinite not in ("error", "exact"):
        raise InvalidArgument(f"nonfinite {nonfinite!r} is unknown; choose 'error' or 'exact'")
    options = (preset, seed, center, rope, exact_tokens, chunk_tokens)
    if kernel.name in ON_DEVICE:
        from pqcodec import batch

        return batch.encode_bytes(x, *options, exact_vectors, nonfinite, kernel, progress)
    if view.device != "cpu":
        raise InvalidArgument(f"the tensor is on {view.device!r}, backend {kernel.name!r} encodes on the CPU; pass x.cpu()")
    values = view.values()
    header = make_header(view.shape, view.dtype, *options, view.numpy)
    kept = coded_rows(header, exact_vectors)
    if nonfinite == "exact":
        kept = np.union1d(kept, _bad_rows(values, header))
    header = replace(header, exceptions=len(kept))
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
    _write_sides(stream, header, values, halves, kept)
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
    return make_header(tuple(shape), codes[dtype], preset, 0, center, rope, exact_tokens, chunk_tokens, True).stream_bytes


def _counter(header: Header, progress: Progress | None) -> Callable[[int], None]:
    total = header.chunks * header.leading
    done = 0

    def advance(blocks: int) -> None:
        nonlocal done
        done += blocks
        if progress:
            progress(done, total)

    return advance


def _write_sides(stream: io.BytesIO, h: Header, values: Values, halves: np.ndarray, rows: np.ndarray) -> None:
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
        places = (divmod(int(row), h.coded_tokens) for row in rows)
        vectors = [values.rows(lead, h.first_tokens + token, 1)[0] for lead, token in places]
        stream.write(exceptions_section(rows, np.stack(vectors)))


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
    return paper_exponent(largest, h.order)


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
    out: Any = None,
    progress: Progress | None = None,
) -> Any:
    """Decode a stream (bytes-like, or a seekable binary file) into a tensor of the shape, dtype and kind that was encoded.

    ``tokens`` = (first, last + 1) decodes that range only and reads only the blocks that hold it: [..., last+1-first,
    head_dim]. ``leading`` = (first, last + 1) does the same for the flattened leading dimensions: [n, tokens, head_dim].
    ``device``: a torch device for the result; on a GPU the stream is decoded there. ``out``: a tensor of the result's shape and
    dtype to fill instead, with any strides, such as a part of a larger cache; after an error its content is undefined.
    Raises InvalidArgument, TruncatedStream, CorruptStream or UnsupportedStream.
    """
    where = arrays.device_of(out) if out is not None else device
    if arrays.is_torch(data) or (where is not None and arrays.device_type(where) != "cpu") or backend in ON_DEVICE:
        kernel = backend_of(backend, arrays.device_type(where if where is not None else arrays.device_of(data)))
        if kernel.name in ON_DEVICE:
            from pqcodec import batch

            return batch.decode_one(data, where, kernel, out, tokens, leading, progress)
    source = source_of(data)
    header = read_header(source)
    kernel = backend_of("cpu" if backend == "auto" else backend)
    first, last = checked_range("tokens", tokens, header.tokens)
    low, high = checked_range("leading", leading, header.leading)
    shape = result_shape(header, tokens, leading)
    in_place = out is not None and arrays.fits(out, shape, header.dtype)
    result, stored = arrays.seen(out) if in_place else arrays.empty(shape, header.dtype, header.numpy)
    if stored.size:
        damage = _decode_into(source, header, kernel, arrays.values_of(stored), (first, last), (low, high), progress)
        if damage:
            raise damage_error(damage)
    if out is not None:
        return out if in_place else arrays.copied(out, result)
    return result if device is None else arrays.to_device(result, device)


def inspect(data: Any) -> StreamInfo:
    """What a stream says of itself; reads only its header. Raises as ``decode`` does.

    >>> import numpy as np
    >>> inspect(encode(np.zeros((4, 64), np.float16), preset="pq4", backend="reference")).preset
    'pq4'
    """
    return inspect_header(read_header(source_of(data)))


def inspect_header(h: Header) -> StreamInfo:
    """What a header says of its stream."""
    return StreamInfo(
        version=c.STREAM_VERSION,
        preset=preset_name(h.coding, h.row_bits, h.radius_bits, h.order),
        coding=CODING_NAMES[h.coding],
        dtype=DTYPE_NAMES[h.dtype],
        shape=h.shape,
        seed=h.seed,
        rounds=h.rounds,
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
    kernel = backend_of(backend, arrays.device_of(data) if arrays.is_torch(data) else "cpu")
    if kernel.name in ON_DEVICE:
        from pqcodec import batch

        return batch.verify_one(data, kernel, progress)
    source = source_of(data)
    header = read_header(source)
    return _decode_into(source, header, kernel, None, (0, header.tokens), (0, header.leading), progress)


def means(data: Any) -> np.ndarray | None:
    """What a stream's encoder subtracted: float32 [leading, head_dim], turned back to position 0 under RoPE; None for nothing.

    Raises as ``decode`` does.
    """
    source = source_of(data)
    header, damage = read_header(source), list[Damage]()
    found = _offsets(source, header, (0, header.leading), damage)
    if damage:
        raise damage_error(damage)
    return found


def _offsets(source: Source, h: Header, leads: tuple[int, int], damage: list[Damage]) -> np.ndarray | None:
    """The offsets of some leading indices, zeros for all others and for damaged ones; None where the stream has none."""
    if not h.offsets:
        return None
    offsets = np.zeros((h.leading, h.head_dim), np.float32)
    sound, raw = _sections(source, h, h.header_bytes, h.offset_block_bytes, leads, "offset", damage)
    halves = raw.view("<f2").reshape(-1, h.head_dim)
    if not np.isfinite(halves).all():
        lead = sound[int(np.argmin(np.isfinite(halves).all(1)))]
        raise CorruptStream(f"offset of leading index {lead} is not finite")
    offsets[sound] = centre.load(halves, h.offset_exponent)
    return offsets


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
    advance = _counter(h, progress)
    offsets = _offsets(source, h, leads, damage)
    _place_exact(source, h, out, tokens, leads, damage)
    for job in _jobs(source, h, out, tokens, leads, offsets):
        kernel.decode([job], advance)
        damage += _damage_of(job)
    _place_exceptions(source, h, out, tokens, leads, damage)
    return damage


def decode_together(sources: Sequence[Source], outs: Sequence[Any], starts: Sequence[int], backend: str = "auto") -> None:
    """Decode whole streams into tensors of the CPU, all at once: what many small streams cost beside their numbers, once.

    Each stream goes to the tokens of its out [..., tokens, head_dim] from a start on; many may share one out. An out may be a
    list of tensors that follow each other along their first dimension. Raises as ``decode`` does, and does not say which of the
    streams is damaged.
    """
    kernel = backend_of("cpu" if backend == "auto" else backend)
    damage: list[Damage] = []
    headers = [read_header(source) for source in sources]
    offsets = _offsets_together(sources, headers, damage)
    seen: dict[int, tuple[arrays.Room, Values]] = {}
    jobs: list[DecodeJob] = []
    for source, h, out, start, offset in zip(sources, headers, outs, starts, offsets, strict=True):
        if id(out) not in seen:
            seen[id(out)] = arrays.room_of(out), arrays.values_in_place(out)
        room, values = seen[id(out)]
        if not arrays.holds(room, h.shape, h.dtype, start):
            raise InvalidArgument(f"a {DTYPE_NAMES[h.dtype]} stream {h.shape} does not go to token {start} of an out {room}")
        values = values.from_token(start)
        payload = source.read(h.payload_start, h.stream_bytes - h.payload_start)
        damaged = np.zeros((h.chunks, h.leading), np.bool_)
        jobs.append(DecodeJob(h, payload, 0, h.chunks, 0, h.leading, 0, h.tokens, offset, values, damaged))
    kernel.decode([job for job in jobs if job.damaged.size])
    damage += [found for job in jobs for found in _damage_of(job)]
    for source, h, job in zip(sources, headers, jobs, strict=True):  # last: who first writes to a page waits until it is zeroed
        whole = (0, h.tokens), (0, h.leading)
        if h.first_tokens:
            _place_exact(source, h, job.out, *whole, damage)
        if h.exceptions:
            _place_exceptions(source, h, job.out, *whole, damage)
    if damage:
        raise damage_error(damage)


def _offsets_together(sources: Sequence[Source], headers: Sequence[Header], damage: list[Damage]) -> list[np.ndarray | None]:
    """``_offsets`` of whole streams, those of one shape at once."""
    found: list[np.ndarray | None] = [None] * len(headers)
    alike: dict[tuple[int, int], list[int]] = {}
    for number, h in enumerate(headers):
        if h.offsets:
            alike.setdefault((h.leading, h.head_dim), []).append(number)
    for (leading, head_dim), numbers in alike.items():
        block = headers[numbers[0]].offset_block_bytes
        data = np.concatenate([sources[n].read(headers[n].header_bytes, leading * block) for n in numbers]).reshape(-1, block)
        bodies, sound = _unsealed(data)
        halves = bodies.view("<f2")
        if sound.all() and np.isfinite(halves).all():
            exponents = np.repeat([headers[n].offset_exponent for n in numbers], leading)[:, None]
            loaded = centre.load(halves, exponents).reshape(-1, leading, head_dim)
            for number, of in zip(numbers, loaded, strict=True):
                found[number] = of
        else:  # one by one, to tell which
            for number in numbers:
                found[number] = _offsets(sources[number], headers[number], (0, leading), damage)
    return found


def _place_exact(
    source: Source, h: Header, out: Values | None, tokens: tuple[int, int], leads: tuple[int, int], damage: list[Damage]
) -> None:
    """Copy exact first tokens to where they belong."""
    if tokens[0] >= h.first_tokens:
        return
    sound, raw = _sections(source, h, h.exact_start, h.exact_block_bytes, leads, "exact tokens", damage)
    if out is None:
        return
    last = min(tokens[1], h.first_tokens)
    exact = raw.view(out.flat.dtype).reshape(-1, h.first_tokens, h.head_dim)[:, tokens[0] : last]
    for lead, rows in zip(sound, exact, strict=True):
        out.rows(lead - leads[0], 0, last - tokens[0])[:] = rows


def _jobs(
    source: Source, h: Header, out: Values | None, tokens: tuple[int, int], leads: tuple[int, int], offsets: np.ndarray | None
) -> Iterator[DecodeJob]:
    """The blocks that hold some tokens of some leading indices, so many at once as are read at once."""
    first = max(tokens[0] - h.first_tokens, 0) // h.chunk_tokens
    last = -(-max(tokens[1] - h.first_tokens, 0) // h.chunk_tokens)
    for low, high in groups_of_chunks(h, first, last, leads[1] - leads[0]):
        damaged = np.zeros((high - low, leads[1] - leads[0]), np.bool_)
        payload = read_blocks(source, h, low, high, leads)
        yield DecodeJob(h, payload, low, high, *leads, *tokens, offsets, out, damaged)


def _damage_of(job: DecodeJob) -> list[Damage]:
    """What a backend found of the blocks of a job."""
    found, h = [], job.header
    for chunk, lead in np.argwhere(job.damaged) if job.damaged.any() else ():
        start = h.first_tokens + (job.first_chunk + int(chunk)) * h.chunk_tokens
        tokens = (start, start + h.block_tokens(job.first_chunk + int(chunk)))
        found.append(Damage("payload", job.first_lead + int(lead), tokens))
    return found


def _sections(
    source: Source, h: Header, start: int, block: int, leads: tuple[int, int], part: str, damage: list[Damage]
) -> tuple[np.ndarray, np.ndarray]:
    """Side blocks of some leading indices that are sound: the indices [n], their bytes without checksums uint8 [n, bytes]."""
    if not block or leads[0] == leads[1]:
        return np.zeros(0, np.intp), np.zeros((0, max(block - c.CHECKSUM_BYTES, 0)), np.uint8)
    data = source.read(start + leads[0] * block, (leads[1] - leads[0]) * block).reshape(-1, block)
    bodies, sound = _unsealed(data)
    if sound.all():
        return np.arange(*leads), bodies
    tokens = (0, h.first_tokens) if part == "exact tokens" else None
    damage += [Damage(part, leads[0] + int(lead), tokens) for lead in np.flatnonzero(~sound)]
    return leads[0] + np.flatnonzero(sound), bodies[sound]


def _unsealed(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows uint8 [n, bytes] without the checksums at their ends, and whether these hold: bool [n]."""
    bodies = np.ascontiguousarray(rows[:, : -c.CHECKSUM_BYTES])
    told = np.ascontiguousarray(rows[:, -c.CHECKSUM_BYTES :]).view("<u4")[:, 0]
    return bodies, checksums(bodies) == told


def _place_exceptions(
    source: Source, h: Header, out: Values | None, tokens: tuple[int, int], leads: tuple[int, int], damage: list[Damage]
) -> None:
    """Copy exact vectors to where they belong."""
    found = read_exceptions(source, h, damage) if h.exceptions else None
    if out is None or found is None:
        return
    for row, vector in zip(*found, strict=True):
        lead, token = divmod(int(row), h.coded_tokens)
        token += h.first_tokens
        if tokens[0] <= token < tokens[1] and leads[0] <= lead < leads[1]:
            out.rows(lead - leads[0], token - tokens[0], 1)[0] = vector.view(out.flat.dtype)
