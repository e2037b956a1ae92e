"""Law: many tensors of one device, coded on it: prepared once, then run without a wait or an allocation.

A batch reads shapes and headers and lays out its tables when it is made; ``run`` only launches kernels on the current
stream (one for each kind of tensor, and a few small ones where means or exact tokens are stored), so it can be captured
in a CUDA graph and replayed on new numbers in the same tensors; ``check`` waits, and raises for what the kernels found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.errors import BackendUnavailable, InvalidArgument, NonFiniteInput
from pqcodec.kernels import ON_DEVICE
from pqcodec.kernels import backend as backend_of
from pqcodec.kernels.spans import Group, Span
from pqcodec.stages.centre import Rope
from pqcodec.stream.header import DTYPE_NAMES, Header
from pqcodec.stream.sections import (
    Damage,
    checked_range,
    coded_rows,
    damage_error,
    exceptions_section,
    make_header,
    paper_exponent,
    read_exceptions,
    read_header,
    result_shape,
    runs_of_blocks,
)
from pqcodec.stream.source import Source, source_of
from pqcodec.tensors import arrays
from pqcodec.tensors.arrays import DeviceRows

Progress = Callable[[int, int], None]
ALIGNMENT = 16  # bytes between the beginnings of streams that lie together
_HEADER_READ = 4096  # no header is longer


def aligned(size: int) -> int:
    """Where the next stream begins behind so many bytes."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def batch_kernel(backend: str, device: Any) -> Any:
    """The backend that codes batches on a device; raises InvalidArgument or BackendUnavailable."""
    kernel = backend_of(backend, device.type)
    if kernel.name not in ON_DEVICE:
        raise InvalidArgument(f"backend {kernel.name!r} does not code batches; choose from {sorted(ON_DEVICE)} or 'auto'")
    kernel.check_device(device)
    return kernel


def current(device: Any) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device: the tensors' own."""
    import torch

    if device.type == "cpu" or getattr(torch, device.type).current_device() == device.index:
        return nullcontext()
    return getattr(torch, device.type).device(device)


def _groups(spans: Iterable[Span], device: Any) -> list[Group]:
    """Spans by kind, in the order in which the kinds appear."""
    kinds: dict[Any, list[Span]] = {}
    for span in spans:
        kinds.setdefault(span.header.kind, []).append(span)
    return [Group(members, device) for members in kinds.values()]


def each(name: str, value: Any, count: int, one: type | tuple[type, ...]) -> list[Any]:
    """``value`` for each tensor: the same for all, or one each."""
    if isinstance(value, one):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise InvalidArgument(f"{name}: {len(values)} are given for {count} tensors; give one for all, or one each")
    return values


# -- encode --------------------------------------------------------------------------------------------------------
class EncodeBatch:
    """Streams of many tensors [..., tokens, head_dim] of one GPU, encoded there.

    ``streams``: uint8 tensors on the device, one a tensor, complete after ``run``. ``preset`` and ``rope`` are one for all
    tensors or one each; the other options are those of ``encode``. Vectors with NaN or Inf are coded as zeros and make
    ``check`` raise. The paper's preset looks at the numbers once, when the batch is made, to bring its radii into float16's
    range.
    """

    def __init__(
        self,
        tensors: Sequence[Any],
        *,
        preset: str | Sequence[str] = "pq3",
        seed: int = 0,
        center: str | None = None,
        rope: Rope | Sequence[Rope | None] | None = None,
        exact_tokens: int = 0,
        chunk_tokens: int = c.DEFAULT_CHUNK_TOKENS,
        backend: str = "auto",
    ) -> None:
        rows = [arrays.device_rows(x) for x in tensors]
        options = zip(each("preset", preset, len(rows), str), each("rope", rope, len(rows), (Rope, type(None))), strict=True)
        headers = [
            make_header(r.shape, r.dtype, name, seed, center, turn, exact_tokens, chunk_tokens, False)
            for r, (name, turn) in zip(rows, options, strict=True)
        ]
        self._prepare(rows, headers, backend)

    def _prepare(self, rows: list[DeviceRows], headers: list[Header], backend: str) -> None:
        import torch

        self._device = device = _one_device([r.tensor for r in rows])
        self._kernel = batch_kernel(backend, device)
        self._rows = rows
        headers = [
            replace(h, radius_exponent=_paper_exponent(r.tensor, h)) if h.coding == c.CODING_PAPER else h
            for r, h in zip(rows, headers, strict=True)
        ]
        places = np.cumsum([0, *(aligned(h.stream_bytes) for h in headers)])
        arena = torch.empty(int(places[-1]), dtype=torch.uint8, device=device)
        self.streams = [arena[int(p) : int(p) + h.stream_bytes] for p, h in zip(places, headers, strict=False)]
        self.headers = headers
        for stream, header in zip(self.streams, headers, strict=True):
            stream[: header.header_bytes] = torch.frombuffer(bytearray(header.to_bytes()), dtype=torch.uint8).to(device)
        self._groups = _groups(
            (
                Span(
                    h,
                    stream.data_ptr(),
                    stream.data_ptr() + h.payload_start,
                    (0, h.chunks),
                    (0, h.leading),
                    (0, h.tokens),
                    r.starts,
                    r.stride,
                )
                for h, stream, r in zip(headers, self.streams, rows, strict=True)
            ),
            device,
        )
        for group in self._groups:
            self._kernel.prepare("encode", group)

    def run(self) -> list[Any]:
        """Encode what the tensors hold now; returns ``streams``. Waits for nothing."""
        with current(self._device):
            for group in self._groups:
                self._kernel.write_sides(group)
                self._kernel.encode(group)
        return self.streams

    def check(self) -> None:
        """Wait; raises NonFiniteInput, naming the place, if a tensor held NaN or Inf when it was encoded."""
        for group in self._groups:
            for span, bad in zip(group.spans, group.span_flags.tolist(), strict=True):
                if bad:
                    index = next(i for i, h in enumerate(self.headers) if h is span.header)
                    raise NonFiniteInput(_name_place(self._rows[index].tensor, span.header, bad))


def _one_device(tensors: Sequence[Any]) -> Any:
    for x in tensors:
        if not arrays.is_torch(x):
            raise InvalidArgument(f"a batch takes torch tensors, not {type(x).__name__}")
    devices = {x.device for x in tensors}
    if len(devices) != 1:
        raise InvalidArgument(f"a batch takes tensors of one device, these lie on {sorted(map(str, devices)) or 'none'}")
    return devices.pop()


def _paper_exponent(x: Any, h: Header) -> int:
    """Power of two that brings the paper coding's radii into float16's range; 0 where they are there already."""
    import torch

    coded = torch.atleast_2d(x)[..., h.first_tokens :, :]
    largest = float(torch.where(torch.isfinite(coded), coded, 0).abs().max()) if coded.numel() else 0.0
    return paper_exponent(largest, h.order)


def _name_place(x: Any, h: Header, count: int) -> str:
    import torch

    coded = x[..., h.first_tokens :, :] if x.ndim > 1 else x
    bad = torch.nonzero(~torch.isfinite(coded))
    if not len(bad):
        return f"{count} vectors held NaN or Inf when they were encoded; the tensor has changed since"
    place = bad[0].tolist()
    value = coded[tuple(place)].item()
    if x.ndim > 1:
        place[-2] += h.first_tokens
    return (
        f"element {place} of the tensor is {value} ({count} vectors hold NaN or Inf); "
        "mend the tensor, or pass nonfinite='exact' to encode() to keep such vectors as they are"
    )


def encode_bytes(
    x: Any,
    preset: str,
    seed: int,
    center: str | None,
    rope: Rope | None,
    exact_tokens: int,
    chunk_tokens: int,
    exact_vectors: Any,
    nonfinite: str,
    kernel: Any,
    progress: Progress | None,
) -> bytes:
    """``encode`` for a tensor of a GPU."""
    import torch

    numpy = not arrays.is_torch(x)
    x = torch.as_tensor(x).resolve_neg()
    x = x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()
    rows = arrays.device_rows(x)
    header = make_header(rows.shape, rows.dtype, preset, seed, center, rope, exact_tokens, chunk_tokens, numpy)
    kept = coded_rows(header, exact_vectors)
    coded = x.reshape(header.leading, header.tokens, header.head_dim)[:, header.first_tokens :]
    if nonfinite == "exact" and x.numel():
        kept = np.union1d(kept, torch.nonzero(~torch.isfinite(coded).all(-1).ravel()).ravel().cpu().numpy())
    header = replace(header, exceptions=len(kept))
    batch = EncodeBatch.__new__(EncodeBatch)
    batch._prepare([rows], [header], kernel.name)
    data = bytearray(batch.run()[0].cpu().numpy().tobytes())
    header = batch.headers[0]
    if header.exceptions:
        vectors = coded.reshape(-1, header.head_dim)[torch.from_numpy(kept).to(x.device)].cpu()
        stored = (vectors if vectors.dtype == torch.float32 else vectors.view(torch.int16)).numpy()
        data[header.exceptions_start : header.payload_start] = exceptions_section(kept, stored)
    if nonfinite == "error":
        batch.check()
    if progress:
        progress(header.chunks * header.leading, header.chunks * header.leading)
    return bytes(data)


# -- decode --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Placed:
    """A stream whose parts lie on a device: its header, and where the parts are."""

    header: Header
    stream: int  # address of the first byte; header, offsets and exact tokens are there
    runs: tuple[tuple[tuple[int, int], tuple[int, int], int], ...]  # (chunks, leads, address of the payload, reckoned)
    exceptions: tuple[np.ndarray, np.ndarray] | None
    keeps: Any  # the tensor that holds the bytes

    @classmethod
    def whole(cls, header: Header, address: int, keeps: Any, exceptions: tuple[np.ndarray, np.ndarray] | None = None) -> Placed:
        """All of a stream, side by side from ``address`` on."""
        run = ((0, header.chunks), (0, header.leading), address + header.payload_start)
        return cls(header, address, (run,) if header.leading else (), exceptions, keeps)


class DecodeBatch:
    """Tensors out of many streams that lie on one GPU, decoded there.

    ``streams``: uint8 tensors, each a whole stream, as ``EncodeBatch`` makes them. ``outs``: tensors to fill, of any strides
    whose last dimension is contiguous, such as parts of a larger cache (None: new ones). ``tokens`` and ``leading`` are those
    of ``decode``, one for all. Headers and exact vectors are read when the batch is made; numbers are, when it runs.
    """

    def __init__(
        self,
        streams: Sequence[Any],
        *,
        outs: Sequence[Any] | None = None,
        tokens: tuple[int, int] | None = None,
        leading: tuple[int, int] | None = None,
        backend: str = "auto",
    ) -> None:
        device = _one_device(streams)
        kernel = batch_kernel(backend, device)
        damage: list[Damage] = []
        placed = [_lying(stream, tokens, leading, damage) for stream in streams]
        if damage:
            raise damage_error(damage)
        self._prepare(placed, device, kernel, outs, tokens, leading, True)

    def _prepare(
        self,
        placed: list[Placed],
        device: Any,
        kernel: Any,
        outs: Sequence[Any] | None,
        tokens: tuple[int, int] | None,
        leading: tuple[int, int] | None,
        write: bool,
    ) -> None:
        import torch

        self._kernel, self._placed, self._device = kernel, placed, device
        shapes = [result_shape(p.header, tokens, leading) for p in placed]
        if outs is None and write:
            dtypes = [getattr(torch, DTYPE_NAMES[p.header.dtype]) for p in placed]
            outs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in zip(shapes, dtypes, strict=True)]
        if outs is not None and len(outs) != len(placed):
            raise InvalidArgument(f"{len(outs)} outs are given for {len(placed)} streams")
        self.outs = list(outs or ())
        spans = []
        self._patches: list[tuple[Any, tuple[Any, ...], Any]] = []
        for i, p in enumerate(placed):
            wanted = checked_range("tokens", tokens, p.header.tokens) if write else (0, 0)
            leads = checked_range("leading", leading, p.header.leading)
            starts, stride = np.zeros(leads[1] - leads[0], np.int64), 0
            if write:
                out = self.outs[i]
                if arrays.device_of(out) != str(device):
                    raise InvalidArgument(f"out {i} lies on {arrays.device_of(out)!r}, its stream on {str(device)!r}")
                if not arrays.fits(out, shapes[i], p.header.dtype):
                    raise InvalidArgument(f"out {i} has strides {out.stride()}; its last dimension must be contiguous")
                rows = arrays.device_rows(out)
                starts, stride = rows.starts, rows.stride
                self._patch(out, p, wanted, leads)
            spans += [
                Span(
                    p.header,
                    p.stream,
                    payload,
                    chunks,
                    run,
                    wanted,
                    starts[run[0] - leads[0] : run[1] - leads[0]],
                    stride,
                    sides=number == 0,
                )
                for number, (chunks, run, payload) in enumerate(p.runs)
            ]
        self._groups = _groups(spans, device) if spans else []
        for group in self._groups:
            kernel.prepare("decode", group)

    def _patch(self, out: Any, p: Placed, tokens: tuple[int, int], leads: tuple[int, int]) -> None:
        """Note the exact vectors that ``run`` copies over what their rows decode to."""
        import torch

        if p.exceptions is None:
            return
        lead, token = np.divmod(p.exceptions[0], max(p.header.coded_tokens, 1))
        token = token + p.header.first_tokens
        kept = (token >= tokens[0]) & (token < tokens[1]) & (lead >= leads[0]) & (lead < leads[1])
        if not kept.any():
            return
        vectors = torch.from_numpy(p.exceptions[1][kept]).view(out.dtype).to(out.device)
        index = [token[kept] - tokens[0]] if out.ndim > 1 else []
        if out.ndim > 2:
            index = [*np.unravel_index(lead[kept] - leads[0], tuple(out.shape[:-2])), *index]
        places = tuple(torch.from_numpy(np.ascontiguousarray(i)).to(out.device) for i in index)
        self._patches.append((out, places or (...,), vectors if places else vectors[0]))

    def run(self) -> list[Any]:
        """Decode what the streams hold now; returns ``outs``. Waits for nothing."""
        with current(self._device):
            for group in self._groups:
                self._kernel.read_sides(group)
                self._kernel.decode(group)
            for out, places, vectors in self._patches:
                out[places] = vectors
        return self.outs

    def damage(self) -> list[Damage]:
        """Wait, and tell what parts of the streams are damaged; raises CorruptStream where an offset is not finite."""
        return [damage for group in self._groups for damage in group.damage()]

    def check(self) -> None:
        """Wait; raises CorruptStream if a checksum did not hold."""
        damage = self.damage()
        if damage:
            raise damage_error(damage)


def _lying(stream: Any, tokens: tuple[int, int] | None, leading: tuple[int, int] | None, damage: list[Damage]) -> Placed:
    """A stream that lies on the device."""
    import torch

    if stream.dtype != torch.uint8 or stream.ndim != 1 or not stream.is_contiguous():
        raise InvalidArgument(
            f"a stream on a device is a contiguous uint8 tensor [bytes]; this one is {stream.dtype} {tuple(stream.shape)}"
        )
    source = DeviceSource(stream)
    header = read_header(source)
    if stream.data_ptr() % 4:
        raise InvalidArgument("a stream on a device begins at a multiple of 4 bytes; pass stream.clone()")
    leads = checked_range("leading", leading, header.leading)
    chunks = _chunks(header, checked_range("tokens", tokens, header.tokens))
    address = stream.data_ptr()
    runs = (((chunks, leads, address + header.payload_start),)) if chunks[0] < chunks[1] and leads[0] < leads[1] else ()
    if not runs and leads[0] < leads[1]:
        runs = (((0, 0), leads, address + header.payload_start),)
    exceptions = read_exceptions(source, header, damage) if header.exceptions else None
    return Placed(header, address, runs, exceptions, stream)


class DeviceSource:
    """A stream on a device, whose header and exact vectors are read from the host."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.size = stream, stream.numel()
        self._head = stream[:_HEADER_READ].cpu().numpy()

    def read(self, start: int, count: int) -> np.ndarray:
        if start + count <= self._head.size:
            return self._head[start : start + count]
        return self._stream[start : start + count].cpu().numpy()


def _chunks(h: Header, tokens: tuple[int, int]) -> tuple[int, int]:
    """Chunks that hold a range of tokens."""
    first = max(tokens[0] - h.first_tokens, 0) // h.chunk_tokens
    return first, max(first, -(-max(tokens[1] - h.first_tokens, 0) // h.chunk_tokens))


def _moved(
    source: Source, device: Any, tokens: tuple[int, int] | None, leading: tuple[int, int] | None, damage: list[Damage]
) -> Placed:
    """A stream of the host, of which the parts that are needed are moved to the device."""
    import torch

    h = read_header(source)
    leads = checked_range("leading", leading, h.leading)
    chunks = _chunks(h, checked_range("tokens", tokens, h.tokens))
    parts = [source.read(0, h.exceptions_start)]
    runs, at = [], parts[0].size
    whole = [(*chunks, leads)] if leads == (0, h.leading) else runs_of_blocks(h, *chunks, leads)
    for low, high, part in whole if chunks[0] < chunks[1] and leads[0] < leads[1] else ():
        origin = h.block_start(low, part[0])
        size = h.block_start(high - 1, part[1] - 1) + h.block_bytes(high - 1) - origin
        parts.append(source.read(origin, size))
        runs.append(((low, high), part, at + h.payload_start - origin))
        at += size
    stream = torch.empty(at, dtype=torch.uint8, device=device)
    at = 0
    for part_bytes in parts:
        stream[at : at + part_bytes.size] = torch.from_numpy(np.array(part_bytes))
        at += part_bytes.size
    if not runs and leads[0] < leads[1]:
        runs.append(((0, 0), leads, 0))
    placed = tuple((chunks, part, stream.data_ptr() + place) for chunks, part, place in runs)
    exceptions = read_exceptions(source, h, damage) if h.exceptions else None
    return Placed(h, stream.data_ptr(), placed, exceptions, stream)


def decode_together(sources: Sequence[Source], outs: Sequence[Any], starts: Sequence[int], backend: str = "auto") -> None:
    """``codec.decode_together`` for tensors of one GPU: the streams' bytes move there in one copy. Waits."""
    import torch

    device = _one_device(outs)
    kernel = batch_kernel(backend, device)
    places = np.cumsum([0, *(aligned(source.size) for source in sources)])
    host = torch.empty(int(places[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    rows = host.numpy()
    for source, at in zip(sources, places, strict=False):
        rows[at : at + source.size] = source.read(0, source.size)
    arena = host.to(device, non_blocking=True)
    damage: list[Damage] = []
    placed = []
    for source, at in zip(sources, places, strict=False):
        h = read_header(source)
        exceptions = read_exceptions(source, h, damage) if h.exceptions else None
        placed.append(Placed.whole(h, arena.data_ptr() + int(at), arena, exceptions))
    batch = DecodeBatch.__new__(DecodeBatch)
    parts = [
        out[..., start : start + p.header.tokens, :] if out.ndim > 1 else out
        for out, start, p in zip(outs, starts, placed, strict=True)
    ]
    batch._prepare(placed, device, kernel, parts, None, None, True)
    batch.run()
    damage += batch.damage()
    if damage:
        raise damage_error(damage)


def _found(device: Any) -> Any:
    """A torch device by its full name ("cuda:0" of "cuda"); raises BackendUnavailable where it is not there."""
    import torch

    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        raise BackendUnavailable(f"device {str(device)!r}: {error}") from error


def decode_one(
    data: Any,
    where: Any,
    kernel: Any,
    out: Any,
    tokens: tuple[int, int] | None,
    leading: tuple[int, int] | None,
    progress: Progress | None,
) -> Any:
    """``decode`` on a GPU, of a stream that lies there or is moved there."""

    device = _found(where if where is not None else arrays.device_of(data))
    kernel.check_device(device)
    damage: list[Damage] = []
    if arrays.is_torch(data):
        placed = _lying(data if data.device == device else data.to(device), tokens, leading, damage)
    else:
        placed = _moved(source_of(data), device, tokens, leading, damage)
    header = placed.header
    in_place = (
        out is not None and arrays.fits(out, result_shape(header, tokens, leading), header.dtype) and arrays.is_torch(out)
    )
    batch = DecodeBatch.__new__(DecodeBatch)
    batch._prepare([placed], device, kernel, [out] if in_place else None, tokens, leading, True)
    result = batch.run()[0]
    damage += batch.damage()
    if damage:
        raise damage_error(damage)
    if progress:
        progress(header.chunks * header.leading, header.chunks * header.leading)
    if out is not None and not in_place:
        return arrays.copied(out, result)
    return result.numpy() if header.numpy and where is None and header.dtype != c.DTYPE_BFLOAT16 else result


def verify_one(data: Any, kernel: Any, progress: Progress | None) -> list[Damage]:
    """``verify`` on a GPU."""
    import torch

    device = torch.device(arrays.device_of(data))
    kernel.check_device(device)
    damage: list[Damage] = []
    lies = arrays.is_torch(data)
    placed = _lying(data, None, None, damage) if lies else _moved(source_of(data), device, None, None, damage)
    batch = DecodeBatch.__new__(DecodeBatch)
    batch._prepare([placed], device, kernel, None, None, None, False)
    batch.run()
    if progress:
        progress(placed.header.chunks * placed.header.leading, placed.header.chunks * placed.header.leading)
    return batch.damage() + damage
