"""Law: how a piece gets from tensors to host memory and back: encode, copy, decode, each on its own stream, with events.

Nothing here waits for a device as a whole. ``DevicePipeline`` works on a GPU: tables and buffers of a kind of piece are
prepared once, two of each (``SLOTS``), so that one piece is coded while another is copied; a run only tells the kernels where
this time's tensors lie. ``HostPipeline`` codes on the CPU, at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from threading import RLock
from typing import Any

import numpy as np

from pqcodec import codec
from pqcodec.batch import DecodeBatch, EncodeBatch
from pqcodec.formats.offload.graphs import Launch
from pqcodec.formats.offload.pieces import BlockPiece
from pqcodec.formats.offload.pinned import pinned_copy, pinned_like
from pqcodec.placed import Placed
from pqcodec.tensors.arrays import device_rows

SLOTS = 2
KINDS = 8  # of pieces in each direction, whose tables are kept
_ALIGNED = 16  # bytes: what is coded by which kernel depends on an address modulo this
_STAGED = 32768  # bytes of pageable memory that CUDA takes at once, without waiting for the copy


@dataclass
class Transfer:
    """Pieces under way: events that tell when they have arrived, and what the kernels found (numbers that should be 0)."""

    events: list[Any] = field(default_factory=list)
    flags: list[Any] = field(default_factory=list)
    coded: dict[Any, Any] = field(default_factory=dict)  # events by device: the caller's tensors there were read, or filled

    def done(self) -> bool:
        return all(event.query() for event in self.events)

    def wait(self) -> None:
        """Until every piece has arrived."""
        for event in self.events:
            event.synchronize()

    def sound(self) -> bool:
        """Whether the kernels found nothing wrong; after ``wait``."""
        return not any(bool(flag.any()) for flag in self.flags)


# -- the CPU -------------------------------------------------------------------------------------------------------
class HostPipeline:
    """Tensors of the CPU: encoded and decoded before a call returns."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def begin(self, tensors: Sequence[Any]) -> None:
        """Tensors of the caller are about to be coded."""

    def end(self, tensors: Sequence[Any], transfer: Transfer, filled: bool) -> None:
        """They have all been told of; ``filled``: the caller's own work waits for them."""

    def encode(self, piece: BlockPiece, tensors: Sequence[Any], host: Any, transfer: Transfer) -> None:
        """A piece of ``tensors`` into ``host``, uint8 [piece.nbytes]."""
        rows = host.numpy()
        for stream, x in zip(piece.streams, piece.views(tensors), strict=True):
            how = stream.options
            options: dict[str, Any] = {"center": how.center, "rope": how.rope, "exact_tokens": how.exact_tokens}
            encoded = codec.encode(x, preset=how.preset, backend=self._backend, **options)
            rows[stream.offset : stream.offset + len(encoded)] = np.frombuffer(encoded, np.uint8)

    def decode(self, piece: BlockPiece, host: Any, outs: Sequence[Any], transfer: Transfer) -> None:
        """``host`` into a piece of ``outs``."""
        rows = host.numpy()
        for stream, out in zip(piece.streams, piece.views(outs), strict=True):
            encoded = rows[stream.offset : stream.offset + stream.header.stream_bytes]
            codec.decode(encoded, out=out, backend=self._backend)

    def moved(self, host: Any) -> Any:
        """A copy of ``host`` on the device, under way; None: there is no device."""
        return None

    def drain(self) -> None:
        """Wait for what is under way."""

    def close(self) -> None:
        """Give up what is prepared."""


# -- a GPU ---------------------------------------------------------------------------------------------------------
class _Addresses:
    """The addresses of a batch's rows, which are told anew before each run: int64, for each of the batch's groups."""

    def __init__(self, groups: Sequence[Any], piece: BlockPiece, views: Sequence[Any], device: Any) -> None:
        kinds: dict[Any, list[int]] = {}
        for number, stream in enumerate(piece.streams):
            kinds.setdefault(stream.header.kind, []).append(number)
        self._device = device
        self._told: list[int] = [x.data_ptr() for x in views]
        self.groups = []
        for group, numbers in zip(groups, kinds.values(), strict=True):
            starts = [device_rows(views[n]).starts - views[n].data_ptr() for n in numbers]
            self.groups.append((group, np.concatenate(starts), np.repeat(numbers, [len(s) for s in starts])))

    def tell(self, views: Sequence[Any]) -> None:
        """Copy the addresses of ``views`` to the device on the current stream, if they are others than last time's."""
        import torch

        addresses = [x.data_ptr() for x in views]
        if addresses == self._told:
            return
        now = np.array(addresses, np.int64)
        for group, starts, numbers in self.groups:
            rows = torch.from_numpy(starts + now[numbers])
            if self._device.type == "cuda" and rows.nbytes > _STAGED:
                rows = pinned_copy(rows)
            group.starts.copy_(rows, non_blocking=True)
        self._told = addresses


class _Encoder(EncodeBatch):
    """A batch whose tensors are others at each run, of the same shapes, strides and alignment."""

    def __init__(self, piece: BlockPiece, views: Sequence[Any], device: Any, backend: str) -> None:
        import torch

        self._prepare([device_rows(x) for x in views], [stream.header for stream in piece.streams], backend)
        self._rows = []  # the tensors are not kept
        self.make_brief()  # transfers are slower than the slowest kernel, and what is urgent shall not wait for them
        self.addresses = _Addresses(self.groups, piece, views, device)
        self.arena = torch.empty(0, dtype=torch.uint8, device=device).set_(self.streams[0].untyped_storage())
        self.code = Launch(self.run, device, plain=1)
        self.free: Any = None  # event: the arena has been copied

    def flags(self) -> list[Any]:
        return [group.span_flags for group in self.groups]


class _Decoder(DecodeBatch):
    """A batch with a buffer for its streams; its outs are others at each run, of the same shapes, strides and alignment."""

    def __init__(self, piece: BlockPiece, views: Sequence[Any], device: Any, backend: str) -> None:
        import torch

        self.buffer = torch.empty(piece.nbytes, dtype=torch.uint8, device=device)
        places = ((stream.header, self.buffer.data_ptr() + stream.offset) for stream in piece.streams)
        placed = [Placed.whole(header, address, self.buffer) for header, address in places]
        self._prepare(placed, device, backend, list(views), None, None, True)
        self.outs = []
        self.make_brief()  # transfers are slower than the slowest kernel, and what is urgent shall not wait for them
        self.addresses = _Addresses(self.groups, piece, views, device)
        self.code = Launch(self.run, device, plain=1)
        self.free: Any = None  # event: the buffer has been decoded

    def flags(self) -> list[Any]:
        blocks = [group.block_flags for group in self.groups]
        return blocks + [group.side_flags for group in self.groups if group.checks_sides]


class _Slots:
    """Batches of each kind of piece, in turn; the kinds that were used longest ago are given up."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._kinds: OrderedDict[Any, list[Any]] = OrderedDict()

    def next(self, piece: BlockPiece, views: Sequence[Any]) -> Any:
        places = tuple((x.stride(), x.data_ptr() % _ALIGNED) for x in views)
        kind = (piece.kind, places)
        found = self._kinds.pop(kind, [])
        if len(found) < SLOTS:
            found.append(self._make(piece, views))
        else:
            found.append(found.pop(0))
        self._kinds[kind] = found
        while len(self._kinds) > KINDS:
            self._give_up_oldest()
        return found[-1]

    def close(self) -> None:
        while self._kinds:
            self._give_up_oldest()

    def _give_up_oldest(self) -> None:
        for batch in self._kinds.popitem(last=False)[1]:
            if batch.free is not None:
                batch.free.synchronize()


class DevicePipeline:
    """Tensors of one GPU (or of the CPU, where the kernels run in Triton's interpreter).

    Kernels run on streams of the lowest priority and end soon: a caller's stream of priority -1 goes first.
    """

    def __init__(self, device: Any, backend: str) -> None:
        import torch

        self._device, self._lock = device, RLock()
        gpu = device.type == "cuda"
        names = ("encode", "leave", "arrive", "decode")
        self._streams: dict[str, Any] = {name: torch.cuda.Stream(device) if gpu else None for name in names}
        self._encoders = _Slots(lambda piece, views: _Encoder(piece, views, device, backend))
        self._decoders = _Slots(lambda piece, views: _Decoder(piece, views, device, backend))

    def begin(self, tensors: Sequence[Any]) -> None:
        """What the caller's current stream has to do comes before what is told next."""
        if self._device.type != "cuda":
            return
        import torch

        before = torch.cuda.current_stream(self._device).record_event()
        with self._lock:
            for name in ("encode", "decode"):
                self._streams[name].wait_event(before)

    def end(self, tensors: Sequence[Any], transfer: Transfer, filled: bool) -> None:
        """The memory of the tensors is not given to others too early; a caller's stream waits for tensors that are filled."""
        if self._device.type != "cuda":
            return
        import torch

        for x in tensors:
            x.record_stream(self._streams["decode" if filled else "encode"])
        if filled and self._device in transfer.coded:
            torch.cuda.current_stream(self._device).wait_event(transfer.coded[self._device])

    def encode(self, piece: BlockPiece, tensors: Sequence[Any], host: Any, transfer: Transfer) -> None:
        views = piece.views(tensors)
        with self._lock:
            with self._on("encode"):
                batch = self._encoders.next(piece, views)
                self._wait("encode", batch.free)
                batch.addresses.tell(views)
                batch.code()
                encoded = self._event("encode")
            with self._on("leave"):
                self._wait("leave", encoded)
                host.copy_(batch.arena, non_blocking=True)
                transfer.flags += map(self._fetched, batch.flags())
                batch.free = self._event("leave")
        self._note(transfer, encoded, batch.free)

    def decode(self, piece: BlockPiece, host: Any, outs: Sequence[Any], transfer: Transfer) -> None:
        views = piece.views(outs)
        with self._lock:
            with self._on("arrive"):
                batch = self._decoders.next(piece, views)
                self._wait("arrive", batch.free)
                batch.addresses.tell(views)
                batch.buffer.copy_(host, non_blocking=True)
                arrived = self._event("arrive")
            with self._on("decode"):
                self._wait("decode", arrived)
                batch.code()
                transfer.flags += map(self._fetched, batch.flags())
                batch.free = self._event("decode")
        self._note(transfer, batch.free, batch.free)

    def moved(self, host: Any) -> Any:
        """A copy of ``host`` on the device, under way on the stream that ``decode`` copies on."""
        with self._lock, self._on("arrive"):
            return host.to(self._device, non_blocking=True)

    def drain(self) -> None:
        """Wait for what is under way on the streams of this pipeline, of which a transfer that failed may not tell."""
        for stream in self._streams.values():
            if stream is not None:
                stream.synchronize()

    def close(self) -> None:
        """Wait for what is under way, and give up what is prepared."""
        with self._lock:
            self._encoders.close()
            self._decoders.close()

    # -- streams -------------------------------------------------------------------------------------------------
    def _on(self, name: str) -> AbstractContextManager[Any]:
        import torch

        return torch.cuda.stream(self._streams[name]) if self._streams[name] is not None else nullcontext()

    def _event(self, name: str) -> Any:
        return self._streams[name].record_event() if self._streams[name] is not None else None

    def _wait(self, name: str, event: Any) -> None:
        if event is not None:
            self._streams[name].wait_event(event)

    def _note(self, transfer: Transfer, coded: Any, done: Any) -> None:
        if done is not None:
            transfer.coded[self._device] = coded  # events of one stream: behind the last one all are
            transfer.events.append(done)

    def _fetched(self, flags: Any) -> Any:
        """Numbers of the device in host memory, once the current stream has come so far."""
        if self._device.type != "cuda":
            return flags.clone()
        return pinned_like(flags).copy_(flags, non_blocking=True)
