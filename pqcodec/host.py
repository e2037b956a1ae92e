"""Law: encode, decode, decode_together and verify where the tensor is in host memory; ``device`` has the same four on GPUs."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.backends import backend as backend_of
from pqcodec.codings import levels
from pqcodec.codings.declared import Codebook
from pqcodec.codings.registry import CODINGS
from pqcodec.errors import InvalidArgument, NonFiniteInput
from pqcodec.kernels.job import Backend, DecodeJob, EncodeJob
from pqcodec.options import EncodeOptions, Progress
from pqcodec.stages import centre, exact, keep, vectors
from pqcodec.stages.linear import read_linear
from pqcodec.stages.registry import STAGES, Kept
from pqcodec.stream import sections
from pqcodec.stream.header import DTYPE_NAMES, Header, read_header
from pqcodec.stream.index import Bounds, checked_range, result_shape
from pqcodec.stream.report import Damage, damage_error
from pqcodec.stream.source import Source
from pqcodec.tensors import arrays
from pqcodec.tensors.numbers import narrow, widen
from pqcodec.tensors.rows import Values, values_of

_SCAN_ROWS = 1 << 12
ESTIMATES = (None, "unbiased", "shrunk")  # vectors that a sketch is decoded to
SHRUNK = ESTIMATES[2]
_KEPT = "decode it with fill=value to the whole shape, or with decode_kept to the kept rows and their positions"


# -- encode ------------------------------------------------------------------------------------------------------
def encode(
    view: arrays.View,
    options: EncodeOptions,
    backend: str,
    progress: Progress | None,
    means: centre.Halves | None = None,
) -> tuple[Header, bytes]:
    """``codec.encode_by`` of a tensor in host memory."""
    header = options.header(view.shape, view.dtype, view.numpy)
    kernel = backend_of(backend, "cpu", header)
    if view.device != "cpu":
        raise InvalidArgument(f"the tensor is on {view.device!r}, backend {kernel.name!r} encodes on the CPU; pass x.cpu()")
    positions, pairs = None, exact.pairs_of(options.exact_pairs)
    if options.keep is None:
        values = view.values()
    else:
        positions = keep.positions_of(options.keep, view.shape)
        values, pairs = keep.gathered(view.stored, positions), keep.coded_pairs(positions, pairs)
    if means is not None:
        centre.check_means(means, header)
    rows = exact.coded_rows(header, pairs)
    halves, offsets = np.zeros((header.leading, 0), np.float16), None
    if header.offsets:
        halves, exponent = means or _means(values, header, positions, kernel)
        header = replace(header, offset_exponent=exponent)
        offsets = centre.from_halves(halves, exponent)
    if options.farthest:
        around = centre.from_halves(*_means(values, header, positions, kernel)) if offsets is None else offsets
        rows = exact.farthest_rows(header, values, around, turning(header, positions), options.farthest)
    if options.nonfinite == "exact":
        rows = np.union1d(rows, _bad_rows(values, header))
    if len(rows):
        header = replace(header, exceptions=len(rows))
    bad = np.zeros((header.leading, header.coded_tokens), np.bool_)
    seen, linear = _Seen(values, offsets, turning(header, positions), bad), None
    if header.inner:
        asked = options.linear
        coded, bad, linear = vectors.rows_of_vectors(header, values, offsets, seen.positions, asked, kernel)
        seen = _Seen(values_of(coded), None, None, np.zeros(coded.shape[:2], np.bool_))
    header = _fitted(header, seen, options)
    stream = io.BytesIO()  # its buffer becomes the result without a copy
    stream.write(header.to_bytes())
    kept = Kept(values, halves, rows, np.zeros((0, 0), np.uint32) if positions is None else positions, linear)
    for stage in STAGES:
        if stage.section.there(header):
            sections.write_entries(stream, stage.bodies(header, kept))
    stream.seek(header.stream_bytes - 1)
    if header.stream_bytes > header.payload_start:
        stream.write(b"\0")
    payload = np.frombuffer(stream.getbuffer(), np.uint8)[header.payload_start :]
    found = (payload, seen.bad, options.effort, _counter(header, progress))
    kernel.encode(EncodeJob(header.inner or header, seen.values, seen.offsets, *found, seen.positions))
    del payload, found  # the stream gives its buffer away uncopied only when nobody else holds it
    if options.nonfinite == "error" and bad.any():
        raise NonFiniteInput(_name_place(values, header, bad, positions))
    return header, stream.getvalue()


def _means(values: Values, header: Header, positions: np.ndarray | None, kernel: Backend) -> centre.Halves:
    """The means of a tensor's own coded tokens, turned back under RoPE, as streams store them."""
    return centre.to_halves(kernel.means(values, header, turning(header, positions)))


@dataclass(frozen=True)
class _Seen:
    """What the coding sees of a tensor: its vectors, or the rows that stages make of them. Fields as in an ``EncodeJob``."""

    values: Values
    offsets: np.ndarray | None
    positions: np.ndarray | None
    bad: np.ndarray


def _fitted(header: Header, seen: _Seen, options: EncodeOptions) -> Header:
    """The header with what its coding takes from all numbers: the exponent of radii, and levels unless they were given."""
    inner, radius_exponent = header.inner or header, CODINGS[header.coding].radius_exponent
    if radius_exponent:
        header = replace(header, radius_exponent=radius_exponent(_largest(seen.values, inner), header.order))
    if isinstance(header.codebook, Codebook) and options.levels is None:
        header = replace(header, codebook=Codebook(levels.levels_of(seen.values, inner, seen.offsets)))
    return header


def _counter(header: Header, progress: Progress | None) -> Callable[[int], None]:
    total = header.chunks * header.blocks.leading
    done = 0

    def advance(blocks: int) -> None:
        nonlocal done
        done += blocks
        if progress:
            progress(done, total)

    return advance


def _magnitudes(values: Values, h: Header) -> Iterator[tuple[int, int, np.ndarray]]:
    """Runs of coded tokens as (lead, first coded token, magnitudes float32), a bounded piece at a time."""
    for lead in range(h.leading):
        for first in range(0, h.coded_tokens, _SCAN_ROWS):
            tokens = min(_SCAN_ROWS, h.coded_tokens - first)
            yield lead, first, np.abs(widen(values.rows(lead, h.first_tokens + first, tokens), h.dtype))


def _bad_rows(values: Values, h: Header) -> np.ndarray:
    """Coded vectors that hold NaN or Inf, as lead * coded_tokens + token, ascending."""
    found = [lead * h.coded_tokens + first + np.nonzero(~np.isfinite(x).all(1))[0] for lead, first, x in _magnitudes(values, h)]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def _largest(values: Values, h: Header) -> float:
    """The largest finite magnitude of a coded coordinate."""
    return max((float(np.where(np.isfinite(x), x, 0).max()) for _, _, x in _magnitudes(values, h) if x.size), default=0.0)


def turning(h: Header, positions: np.ndarray | None) -> np.ndarray | None:
    """The positions of kept tokens where a job needs them: under RoPE."""
    return positions if h.rope else None


def _name_place(values: Values, h: Header, bad: np.ndarray, positions: np.ndarray | None) -> str:
    lead, token = (int(i) for i in np.argwhere(bad)[0])
    row = widen(values.rows(lead, h.first_tokens + token, 1), h.dtype)[0]
    channel = int(np.nonzero(~np.isfinite(row))[0][0])
    leading = [int(i) for i in np.unravel_index(lead, h.shape[:-2])] if len(h.shape) > 2 else []
    (place_of_token,) = keep.places_of(positions, lead, np.array([h.first_tokens + token]))
    place = [*leading, int(place_of_token), channel][-len(h.shape) :]
    count = int(bad.sum())
    return f"element {place} of the tensor is {row[channel]} ({count} vectors hold NaN or Inf)"


# -- decode ------------------------------------------------------------------------------------------------------
def decode(
    source: Source,
    backend: str,
    out: Any,
    tokens: tuple[int, int] | None,
    leading: tuple[int, int] | None,
    progress: Progress | None,
    fill: Any = None,
    estimate: str | None = None,
) -> Any:
    """``codec.decode`` into host memory: a new tensor, or ``out``."""
    header = read_header(source)
    header.check_tables()
    check_estimate(header, estimate)
    if header.keep is None:
        return _decode_rows(source, header, backend, out, tokens, leading, progress, estimate)
    if fill is None:
        raise InvalidArgument(f"the stream holds {header.tokens} of {header.keep.tokens} tokens: {_KEPT}")
    return _decode_filled(source, header, backend, out, tokens, leading, progress, fill, estimate)


def check_estimate(header: Header, estimate: str | None) -> None:
    """Raises InvalidArgument for another ``estimate`` than there is, and for none of a stream that has nothing else."""
    if estimate not in ESTIMATES:
        raise InvalidArgument(f"estimate {estimate!r} is unknown; choose None, 'unbiased' or 'shrunk'")
    if header.sketch and estimate is None:
        error = header.sketch.error(header.head_dim, header.order)
        raise InvalidArgument(
            "the stream is a sign sketch, which keeps inner products, not vectors: use attention.scores(stream, q), or ask for "
            f"vectors of relMSE about {error:.2g} by estimate='unbiased' or 'shrunk'"
        )


def decode_kept(
    source: Source, backend: str, tokens: Bounds | None = None, leading: Bounds | None = None, estimate: str | None = None
) -> tuple[Any, np.ndarray]:
    """``codec.decode_kept`` into host memory, of some of the kept tokens: rows, and positions int64 [n] or [..., n]."""
    h = read_header(source)
    h.check_tables()
    check_estimate(h, estimate)
    rows = _decode_rows(source, h, backend, None, tokens, leading, None, estimate)
    wanted, leads = checked_range("tokens", tokens, h.tokens), checked_range("leading", leading, h.leading)
    if h.keep is None:
        return rows, np.arange(*wanted)
    positions = read_positions(source, h, leads)[:, slice(*wanted)].astype(np.int64)
    return rows, positions[slice(*leads)].reshape(*rows.shape[:-1]) if h.keep.each else positions[0]


def _decode_rows(
    source: Source,
    header: Header,
    backend: str,
    out: Any,
    tokens: Bounds | None,
    leading: Bounds | None,
    progress: Progress | None,
    estimate: str | None,
) -> Any:
    """The rows that a stream holds: those of all tokens, or of kept ones."""
    kernel = backend_of(backend, "cpu", header)
    wanted, leads = checked_range("tokens", tokens, header.tokens), checked_range("leading", leading, header.leading)
    shape = result_shape(header, tokens, leading)
    in_place = out is not None and arrays.fits(out, shape, header.dtype)
    result, stored = arrays.seen(out) if in_place else arrays.empty(shape, header.dtype, header.numpy)
    if stored.size or (wanted, leads) == ((0, header.tokens), (0, header.leading)):  # a whole empty tensor has checksums, too
        values = values_of(stored) if stored.size else None
        damage = _decode_into(source, header, kernel, values, wanted, leads, progress, estimate == SHRUNK)
        if damage:
            raise damage_error(damage)
    return result if out is None or in_place else arrays.copied(out, result)


def _decode_filled(
    source: Source,
    header: Header,
    backend: str,
    out: Any,
    tokens: Bounds | None,
    leading: Bounds | None,
    progress: Progress | None,
    fill: Any,
    estimate: str | None,
) -> Any:
    """A tensor of all tokens, those that were kept and ``fill`` in the place of the others."""
    whole = replace(header, shape=header.whole_shape, keep=None)
    value = keep.stored_fill(fill, header.dtype)
    wanted, leads = checked_range("tokens", tokens, whole.tokens), checked_range("leading", leading, header.leading)
    shape = result_shape(whole, tokens, leading)
    in_place = out is not None and arrays.fits(out, shape, header.dtype)
    positions = read_positions(source, header, leads)
    first, last = keep.within(positions, leads, wanted)
    low, high = int(first.min(initial=header.tokens)), int(last.max(initial=0))
    rows = None
    if low < high or (wanted, leads) == ((0, whole.tokens), (0, header.leading)):
        some = (min(low, high), high)
        rows = arrays.view(_decode_rows(source, header, backend, None, some, leads, progress, estimate)).stored
    result, stored = arrays.seen(out) if in_place else _room(shape, header)  # only now: a stream of a few bytes may ask for any
    stored[...] = value
    if rows is not None:
        for n, place in enumerate(np.ndindex(shape[:-2])):
            kept = slice(first[n], last[n])
            at = positions[(leads[0] + n) % len(positions), kept].astype(np.intp) - wanted[0]
            stored[place][at] = rows[n, first[n] - low : last[n] - low]
    return result if out is None or in_place else arrays.copied(out, result)


def _room(shape: tuple[int, ...], h: Header) -> tuple[Any, np.ndarray]:
    """A new tensor, as ``arrays.empty`` makes it, of a shape that the stream's size does not bound; raises InvalidArgument."""
    try:
        return arrays.empty(shape, h.dtype, h.numpy)
    except MemoryError:
        size = math.prod(shape) * c.ITEM_BYTES[h.dtype]
        raise InvalidArgument(
            f"fill asks for {DTYPE_NAMES[h.dtype]} {shape}, {size} bytes, which memory has no room for: decode fewer tokens "
            "(tokens=) or leading indices, or the kept rows and their positions (decode_kept)"
        ) from None


def read_positions(source: Source, h: Header, leads: Bounds) -> np.ndarray:
    """The positions of a stream's kept tokens: uint32 [1 or leading, n]; of other leading indices than ``leads`` zeros."""
    damage: list[Damage] = []
    positions = keep.read(source, h, leads, damage)
    if damage:
        raise damage_error(damage)
    assert positions is not None
    return positions


def verify(source: Source, backend: str, progress: Progress | None) -> list[Damage]:
    """``codec.verify`` in host memory."""
    header = read_header(source)
    kernel = backend_of(backend, "cpu", header)
    return _decode_into(source, header, kernel, None, (0, header.tokens), (0, header.leading), progress)


def means(source: Source) -> np.ndarray | None:
    """``codec.means``: what a stream's encoder subtracted, float32 [leading, head_dim]."""
    header, damage = read_header(source), list[Damage]()
    found = centre.read_means(source, header, (0, header.leading), damage)
    if damage:
        raise damage_error(damage)
    return found


def _decode_into(
    source: Source,
    h: Header,
    kernel: Backend,
    out: Values | None,
    tokens: tuple[int, int],
    leads: tuple[int, int],
    progress: Progress | None,
    shrunk: bool = False,
) -> list[Damage]:
    """Fill ``out`` and tell what is damaged; the caller drops ``out`` if anything is."""
    damage: list[Damage] = []
    advance = _counter(h, progress)
    positions = turning(h, keep.read(source, h, leads, damage))
    offsets = centre.read_means(source, h, leads, damage)
    linear = read_linear(source, h, h.leads_of_rows(leads), damage)
    _place(source, h, out, tokens, leads, damage, over_rows=False)
    for job, rows in _row_jobs(source, h, out is not None, tokens, leads) if h.inner else ():
        kernel.decode([job], advance)
        damage += _damage_of(h, job)
        if out is not None:
            first = h.first_tokens + job.first_token
            found = vectors.vectors_of_rows(h, rows, leads, first, offsets, positions, linear, kernel)
            for lead, numbers in enumerate(found):
                out.rows(lead, first - tokens[0], len(numbers))[:] = narrow(numbers, h.dtype)
    for job in _jobs(source, h, out, tokens, leads, offsets, positions, shrunk) if h.inner is None else ():
        kernel.decode([job], advance)
        damage += _damage_of(h, job)
    _place(source, h, out, tokens, leads, damage, over_rows=True)
    return damage


def _place(
    source: Source,
    h: Header,
    out: Values | None,
    tokens: tuple[int, int],
    leads: tuple[int, int],
    damage: list[Damage],
    over_rows: bool,
) -> None:
    """What stages keep beside the coded rows, into the result."""
    if h.payload_start == h.header_bytes:
        return
    for stage in STAGES:
        if stage.place and stage.over_rows == over_rows and stage.section.there(h):
            stage.place(source, h, out, tokens, leads, damage)


def _jobs(
    source: Source,
    h: Header,
    out: Values | None,
    tokens: Bounds,
    leads: Bounds,
    offsets: np.ndarray | None,
    positions: np.ndarray | None,
    shrunk: bool,
) -> Iterator[DecodeJob]:
    """The blocks that hold some tokens of some leading indices, so many at once as are read at once."""
    chunks = h.blocks.of_tokens(tokens[0] - h.first_tokens, tokens[1] - h.first_tokens)
    for low, high in h.blocks.groups(chunks, leads[1] - leads[0]):
        damaged = np.zeros((high - low, leads[1] - leads[0]), np.bool_)
        payload = h.blocks.read(source, (low, high), leads)
        yield DecodeJob(h, payload, low, high, *leads, *tokens, offsets, out, damaged, positions, shrunk)


def _row_jobs(source: Source, h: Header, wanted: bool, tokens: Bounds, leads: Bounds) -> Iterator[tuple[DecodeJob, np.ndarray]]:
    """The same where stages made rows of vectors; each with the rows that it fills if ``wanted``: float32 [leads, n, width]."""
    inner, leads = h.inner, h.leads_of_rows(leads)
    assert inner
    first, last = (min(max(token - h.first_tokens, 0), h.coded_tokens) for token in tokens)
    for low, high in h.blocks.groups(h.blocks.of_tokens(first, last), leads[1] - leads[0]):
        some = max(first, low * h.chunk_tokens), min(last, high * h.chunk_tokens)
        rows = np.empty((leads[1] - leads[0], some[1] - some[0], inner.head_dim), np.float32)
        damaged = np.zeros((high - low, len(rows)), np.bool_)
        payload, out = h.blocks.read(source, (low, high), leads), values_of(rows) if wanted else None
        yield DecodeJob(inner, payload, low, high, *leads, *some, None, out, damaged), rows


def _damage_of(h: Header, job: DecodeJob) -> list[Damage]:
    """What a backend found of the blocks of a job."""
    found = []
    for chunk, lead in np.argwhere(job.damaged) if job.damaged.any() else ():
        start = h.first_tokens + h.blocks.first_token(job.first_chunk + int(chunk))
        tokens = (start, start + h.blocks.tokens(job.first_chunk + int(chunk)))
        first = (job.first_lead + int(lead)) * h.heads
        found += [Damage("payload", vector, tokens) for vector in range(first, first + h.heads)]
    return found


def decode_together(
    sources: Sequence[Source], outs: Sequence[Any], starts: Sequence[int], backend: str, firsts: Sequence[int] | None
) -> None:
    """``codec.decode_together`` into host memory."""
    damage: list[Damage] = []
    headers = [read_header(source) for source in sources]
    if any(h.keep for h in headers):
        raise InvalidArgument(f"a stream with a keep list is none that goes into tensors together with others: {_KEPT}")
    for header in headers:
        header.check_tables()
        check_estimate(header, None)
    kernel = backend_of(backend, "cpu", *headers)
    plain = [n for n, h in enumerate(headers) if h.inner is None]
    found = centre.read_means_together([sources[n] for n in plain], [headers[n] for n in plain], damage)
    offsets = dict(zip(plain, found, strict=True))
    seen: dict[int, tuple[arrays.Room, Values]] = {}
    jobs: list[DecodeJob] = []
    rows: list[Values] = []
    begins: Sequence[int | None] = [None] * len(outs) if firsts is None else firsts
    for number, (source, h, out, start, first) in enumerate(zip(sources, headers, outs, starts, begins, strict=True)):
        if id(out) not in seen:
            seen[id(out)] = arrays.room_of(out), arrays.values_in_place(out)
        room, values = seen[id(out)]
        if first is not None:
            room, values = arrays.part_of(room, values, first, h.shape[0])
        if not arrays.holds(room, h.shape, h.dtype, start):
            raise InvalidArgument(f"a {DTYPE_NAMES[h.dtype]} stream {h.shape} does not go to token {start} of an out {room}")
        target = values.from_token(start)
        if h.inner:
            damage += _decode_into(source, h, kernel, target, (0, h.tokens), (0, h.leading), None)
            continue
        payload = source.read(h.payload_start, h.stream_bytes - h.payload_start)
        damaged = np.zeros((h.chunks, h.leading), np.bool_)
        rows.append(target)
        jobs.append(DecodeJob(h, payload, 0, h.chunks, 0, h.leading, 0, h.tokens, offsets[number], target, damaged))
    kernel.decode([job for job in jobs if job.damaged.size])
    damage += [found for job in jobs for found in _damage_of(job.header, job)]
    # Last, because the first write to a fresh page blocks while the system zeroes it.
    for over_rows in (False, True):
        for stage in STAGES:
            if stage.place and stage.over_rows == over_rows:
                stage.place_all([sources[n] for n in plain], [headers[n] for n in plain], rows, damage)
    if damage:
        raise damage_error(damage)
