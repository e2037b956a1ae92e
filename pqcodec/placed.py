"""Law: where the bytes of a stream are on a device: bytes that are there already, and bytes that are moved there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from pqcodec.errors import BackendUnavailable, InvalidArgument
from pqcodec.stages.exact import read_vectors
from pqcodec.stream import sections
from pqcodec.stream.header import Header, read_header
from pqcodec.stream.index import Bounds, checked_range
from pqcodec.stream.report import Damage
from pqcodec.stream.source import Source, source_of
from pqcodec.tensors.numbers import is_torch

ALIGNMENT = 16  # bytes; each of several streams in one tensor begins at a multiple
_HEADER_READ = 4096  # bytes; no header is longer


def aligned(size: int) -> int:
    """``size`` bytes, rounded up to the beginning of the next stream."""
    return -(-size // ALIGNMENT) * ALIGNMENT


# -- devices -----------------------------------------------------------------------------------------------------
def current(device: Any) -> AbstractContextManager[Any]:
    """A context in which kernels are launched on a device."""
    import torch

    if device.type == "cpu" or getattr(torch, device.type).current_device() == device.index:
        return nullcontext()
    return getattr(torch, device.type).device(device)


def one_device(tensors: Sequence[Any]) -> Any:
    """The torch device of all tensors; raises InvalidArgument where they lie on several."""
    for x in tensors:
        if not is_torch(x):
            raise InvalidArgument(f"a batch takes torch tensors, not {type(x).__name__}")
    devices = {x.device for x in tensors}
    if len(devices) != 1:
        raise InvalidArgument(f"a batch takes tensors of one device, these lie on {sorted(map(str, devices)) or 'none'}")
    return devices.pop()


def device_named(device: Any) -> Any:
    """A torch device with its number ("cuda" is "cuda:0"); raises BackendUnavailable where there is none such."""
    import torch

    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as error:
        raise BackendUnavailable(f"device {str(device)!r} is unknown, or not there: {error}") from error


# -- streams -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """Blocks of a stream that follow one another on a device."""

    chunks: Bounds
    leads: Bounds
    payload: int  # address at which the payload would begin, were all of it there


@dataclass(frozen=True)
class Placed:
    """A stream on a device: its header, and the addresses of its parts."""

    header: Header
    stream: int  # address of the first byte; header, offsets and exact tokens are there
    runs: tuple[Run, ...]
    exceptions: tuple[np.ndarray, np.ndarray] | None
    keeps: Any  # the tensor that owns the bytes

    @classmethod
    def whole(cls, header: Header, address: int, keeps: Any, exceptions: tuple[np.ndarray, np.ndarray] | None = None) -> Placed:
        """A whole stream, from ``address`` on."""
        run = Run((0, header.chunks), (0, header.blocks.leading), address + header.payload_start)
        return cls(header, address, (run,) if header.leading else (), exceptions, keeps)


class DeviceSource:
    """A stream on a device, whose header and exact vectors are read from the host."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.size = stream, stream.numel()
        self._head = stream[:_HEADER_READ].cpu().numpy()

    def read(self, start: int, count: int) -> np.ndarray:
        """Bytes uint8 [count]; a copy to the host, but for the stream's head."""
        if start + count <= self._head.size:
            return self._head[start : start + count]
        return self._stream[start : start + count].cpu().numpy()


def lying(stream: Any, tokens: Bounds | None, leading: Bounds | None, damage: list[Damage]) -> Placed:
    """A stream on a device, uint8 [bytes], as it is; raises InvalidArgument, and what reading a header raises."""
    import torch

    if stream.dtype != torch.uint8 or stream.ndim != 1 or not stream.is_contiguous():
        raise InvalidArgument(
            f"a stream on a device is a contiguous uint8 tensor [bytes]; this one is {stream.dtype} {tuple(stream.shape)}"
        )
    source = DeviceSource(stream)
    header = read_header(source)
    if stream.data_ptr() % 4:
        raise InvalidArgument("a stream on a device begins at a multiple of 4 bytes; pass stream.clone()")
    chunks, leads = _wanted(header, tokens, leading)
    address = stream.data_ptr()
    run = Run(chunks, leads, address + header.payload_start)
    return Placed(header, address, (run,) if leads[0] < leads[1] else (), read_vectors(source, header, damage), stream)


def _wanted(h: Header, tokens: Bounds | None, leading: Bounds | None) -> tuple[Bounds, Bounds]:
    """The chunks, (0, 0) if none, and the leading indices of the blocks that hold the wanted tokens."""
    first, last = checked_range("tokens", tokens, h.tokens)
    chunks = h.blocks.of_tokens(first - h.first_tokens, last - h.first_tokens)
    leads = h.leads_of_rows(checked_range("leading", leading, h.leading))
    return chunks if chunks[0] < chunks[1] else (0, 0), leads


def stream_on(stream: Any, device: Any) -> Any:
    """A stream as a uint8 tensor on a device: one of torch's moved there, or read; raises as reading a header does."""
    import torch

    if is_torch(stream):
        return stream.to(device)
    source = source_of(stream)
    return torch.from_numpy(np.array(source.read(0, read_header(source).stream_bytes))).to(device)


def moved(source: Source, device: Any, tokens: Bounds | None, leading: Bounds | None, damage: list[Damage]) -> Placed:
    """A stream of the host, whose needed parts are moved to a device."""
    import torch

    h = read_header(source)
    chunks, leads = _wanted(h, tokens, leading)
    parts = [source.read(0, h.places[sections.EXACT_VECTORS].start)]
    runs, at = [], parts[0].size
    whole = leads == (0, h.blocks.leading) and chunks[0] < chunks[1] and h.leading
    for low_high, part in [(chunks, leads)] if whole else h.blocks.runs(chunks, leads):
        start, size = h.blocks.span((low_high[0], part[0]), (low_high[1] - 1, part[1] - 1))
        parts.append(source.read(start, size))
        runs.append((low_high, part, at + h.payload_start - start))
        at += size
    stream = torch.empty(at, dtype=torch.uint8, device=device)
    at = 0
    for part_bytes in parts:
        stream[at : at + part_bytes.size] = torch.from_numpy(np.array(part_bytes))
        at += part_bytes.size
    if not runs and leads[0] < leads[1]:
        runs.append(((0, 0), leads, 0))
    placed = tuple(Run(low_high, part, stream.data_ptr() + payload) for low_high, part, payload in runs)
    return Placed(h, stream.data_ptr(), placed, read_vectors(source, h, damage), stream)
