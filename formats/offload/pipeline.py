"""Law: how a piece gets from tensors to host memory and back: encoding, copies and decoding, each on a CUDA stream of its own.

Events order the streams; nothing here waits for a whole device. ``DevicePipeline`` works on a GPU. For each kind of piece it
prepares tables and a buffer once, and two of each (``SLOTS``), so that one piece is coded while another is copied; a run only
gives the kernels the addresses of its tensors. ``HostPipeline`` does the same for tensors of the CPU, before its calls return.
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
KINDS = 8  # of pieces whose batches are kept, in each direction
_ALIGNED = 16  # bytes: the kernel that codes a tensor depends on its address modulo this
_STAGED = 32768  # bytes: CUDA buffers copies of pageable memory up to this size, so that the caller need not wait


@dataclass
class Transfer:
    """The pieces of one put or get on their way."""

    events: list[Any] = field(default_factory=list)  # one for each piece: it has arrived
    flags: list[Any] = field(default_factory=list)  # tensors in host memory that are all 0 if the kernels found nothing wrong
    coded: dict[Any, Any] = field(
        default_factory=dict
    )  # an event for each device: the caller's tensors there are read or filled

    def done(self) -> bool:
        """Whether every piece has arrived; does not wait."""
        return all(event.query() for event in self.events)

    def wait(self) -> None:
        """Wait until every piece has arrived."""
        for event in self.events:
            event.synchronize()

    def sound(self) -> bool:
        """Whether the kernels found nothing wrong; call ``wait`` first."""
        return not any(bool(flag.any()) for flag in self.flags)


# -- the CPU -------------------------------------------------------------------------------------------------------
class HostPipeline:
    """Encodes and decodes tensors of the CPU, before its calls return."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def begin(self, tensors: Sequence[Any]) -> None:
        """Do nothing: the CPU has no streams to order."""

    def end(self, tensors: Sequence[Any], transfer: Transfer, filled: bool) -> None:
        """Do nothing: all tensors are read or filled already."""

    def encode(self, piece: BlockPiece, tensors: Sequence[Any], host: Any, transfer: Transfer) -> None:
        """Encode a piece of a block's ``tensors`` into ``host``, uint8 [piece.nbytes]. Raises NonFiniteInput."""
        rows = host.numpy()
        for stream, x in zip(piece.streams, piece.views(tensors), strict=True):
            how = stream.options
            options: dict[str, Any] = {"center": how.center, "rope": how.rope, "exact_tokens": how.exact_tokens}
            encoded = codec.encode(x, preset=how.preset, backend=self._backend, **options)
            rows[stream.offset : stream.offset + len(encoded)] = np.frombuffer(encoded, np.uint8)

    def decode(self, piece: BlockPiece, host: Any, outs: Sequence[Any], transfer: Transfer) -> None:
        """Decode ``host``, uint8 [piece.nbytes], into a piece of a block's ``outs``. Raises CorruptStream."""
        rows = host.numpy()
        for stream, out in zip(piece.streams, piece.views(outs), strict=True):
            encoded = rows[stream.offset : stream.offset + stream.header.stream_bytes]
            codec.decode(encoded, out=out, backend=self._backend)

    def moved(self, host: Any) -> Any:
        """None: there is no device to copy ``host`` to."""
        return None

    def drain(self) -> None:
        """Do nothing: no transfer is under way."""

    def close(self) -> None:
        """Do nothing: nothing is prepared."""


# -- a GPU ---------------------------------------------------------------------------------------------------------
class _Addresses:
    """The addresses of the rows of a batch's tensors, which are set before each run: int64 on the device, in each group."""

    def __init__(self, groups: Sequence[Any], piece: BlockPiece, views: Sequence[Any], device: Any) -> None:
        kinds: dict[Any, list[int]] = {}
        for number, stream in enumerate(piece.streams):
            kinds.setdefault(stream.header.kind, []).append(number)
        self._device = device
        self._addresses: list[int] = [x.data_ptr() for x in views]
        self.groups = []
        for group, numbers in zip(groups, kinds.values(), strict=True):
            starts = [device_rows(views[n]).starts - views[n].data_ptr() for n in numbers]
            self.groups.append((group, np.concatenate(starts), np.repeat(numbers, [len(s) for s in starts])))

    def set(self, views: Sequence[Any]) -> None:
        """Copy the addresses of ``views`` to the device on the current stream, unless they are the same as last time."""
        import torch

        addresses = [x.data_ptr() for x in views]
        if addresses == self._addresses:
            return
        now = np.array(addresses, np.int64)
        for group, starts, numbers in self.groups:
            rows = torch.from_numpy(starts + now[numbers])
            if self._device.type == "cuda" and rows.nbytes > _STAGED:
                rows = pinned_copy(rows)
            group.starts.copy_(rows, non_blocking=True)
        self._addresses = addresses


class _Encoder(EncodeBatch):
    """A batch that encodes other tensors at each run, of the same shapes, strides and alignment, into one arena."""

    def __init__(self, piece: BlockPiece, views: Sequence[Any], device: Any, backend: str) -> None:
        import torch

        self._prepare([device_rows(x) for x in views], [stream.header for stream in piece.streams], backend)
        self._rows = []  # the tensors are not kept
        self.make_brief()  # costs nothing, because copies are slower still, and lets urgent kernels of the caller run between
        self.addresses = _Addresses(self.groups, piece, views, device)
        self.arena = torch.empty(0, dtype=torch.uint8, device=device).set_(self.streams[0].untyped_storage())
        self.code = Launch(self.run, device, plain=1)
        self.free: Any = None  # event: the arena has been copied, and may be written again

    def flags(self) -> list[Any]:
        """How many vectors with NaN or Inf each block held, on the device, for each group."""
        return [group.block_flags for group in self.groups]


class _Decoder(DecodeBatch):
    """A batch that decodes one buffer into other tensors at each run, of the same shapes, strides and alignment."""

    def __init__(self, piece: BlockPiece, views: Sequence[Any], device: Any, backend: str) -> None:
        import torch

        self.buffer = torch.empty(piece.nbytes, dtype=torch.uint8, device=device)
        places = ((stream.header, self.buffer.data_ptr() + stream.offset) for stream in piece.streams)
        placed = [Placed.whole(header, address, self.buffer) for header, address in places]
        self._prepare(placed, device, backend, list(views), None, None, True)
        self.outs = []
        self.make_brief()  # costs nothing, because copies are slower still, and lets urgent kernels of the caller run between
        self.addresses = _Addresses(self.groups, piece, views, device)
        self.code = Launch(self.run, device, plain=1)
        self.free: Any = None  # event: the buffer has been decoded, and may be written again

    def flags(self) -> list[Any]:
        """What is damaged in each block and each side section, on the device, for each group."""
        blocks = [group.block_flags for group in self.groups]
        return blocks + [group.side_flags for group in self.groups if group.checks_sides]


class _BatchesByKind:
    """Up to ``SLOTS`` batches of each kind of piece, which are used by turns, of the ``KINDS`` kinds that were used last."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._kinds: OrderedDict[Any, list[Any]] = OrderedDict()

    def next(self, piece: BlockPiece, views: Sequence[Any]) -> Any:
        """The batch of the piece's kind that was used longest ago, or a new one; its ``free`` says when it can run again."""
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
        """Give up all batches, each when its last run is over."""
        while self._kinds:
            self._give_up_oldest()

    def _give_up_oldest(self) -> None:
        for batch in self._kinds.popitem(last=False)[1]:
            if batch.free is not None:
                batch.free.synchronize()


class DevicePipeline:
    """Encodes, copies and decodes tensors of one GPU (or of the CPU, where kernels run in Triton's interpreter).

    Its kernels are short and run on streams of the lowest priority, so that a caller's stream of priority -1 goes first.
    """

    def __init__(self, device: Any, backend: str) -> None:
        import torch

        self._device, self._lock = device, RLock()
        gpu = device.type == "cuda"
        names = ("encode", "leave", "arrive", "decode")
        self._streams: dict[str, Any] = {name: torch.cuda.Stream(device) if gpu else None for name in names}
        self._encoders = _BatchesByKind(lambda piece, views: _Encoder(piece, views, device, backend))
        self._decoders = _BatchesByKind(lambda piece, views: _Decoder(piece, views, device, backend))

    def begin(self, tensors: Sequence[Any]) -> None:
        """Make the transfers that follow wait for the work that the caller's current stream has now."""
        if self._device.type != "cuda":
            return
        import torch

        before = torch.cuda.current_stream(self._device).record_event()
        with self._lock:
            for name in ("encode", "decode"):
                self._streams[name].wait_event(before)

    def end(self, tensors: Sequence[Any], transfer: Transfer, filled: bool) -> None:
        """Keep the memory of ``tensors`` from being reused while it is read or filled.

        ``filled``: the tensors are outputs, and the caller's current stream waits until they are filled.
        """
        if self._device.type != "cuda":
            return
        import torch

        for x in tensors:
            x.record_stream(self._streams["decode" if filled else "encode"])
        if filled and self._device in transfer.coded:
            torch.cuda.current_stream(self._device).wait_event(transfer.coded[self._device])

    def encode(self, piece: BlockPiece, tensors: Sequence[Any], host: Any, transfer: Transfer) -> None:
        """Queue the encoding of a piece of a block's ``tensors``, and its copy into ``host``, uint8 [piece.nbytes].

        Events and flags are added to ``transfer``; the flags tell of NaN and Inf.
        """
        views = piece.views(tensors)
        with self._lock:
            with self._on("encode"):
                batch = self._encoders.next(piece, views)
                self._wait("encode", batch.free)
                batch.addresses.set(views)
                batch.code()
                encoded = self._event("encode")
            with self._on("leave"):
                self._wait("leave", encoded)
                host.copy_(batch.arena, non_blocking=True)
                transfer.flags += map(self._fetched, batch.flags())
                batch.free = self._event("leave")
        self._note(transfer, encoded, batch.free)

    def decode(self, piece: BlockPiece, host: Any, outs: Sequence[Any], transfer: Transfer) -> None:
        """Queue the copy of ``host``, uint8 [piece.nbytes], to the device, and its decoding into a piece of a block's ``outs``.

        Events and flags are added to ``transfer``; the flags tell of checksums that do not hold.
        """
        views = piece.views(outs)
        with self._lock:
            with self._on("arrive"):
                batch = self._decoders.next(piece, views)
                self._wait("arrive", batch.free)
                batch.addresses.set(views)
                batch.buffer.copy_(host, non_blocking=True)
                arrived = self._event("arrive")
            with self._on("decode"):
                self._wait("decode", arrived)
                batch.code()
                transfer.flags += map(self._fetched, batch.flags())
                batch.free = self._event("decode")
        self._note(transfer, batch.free, batch.free)

    def moved(self, host: Any) -> Any:
        """A copy of ``host`` on the device, queued on the stream that ``decode`` copies on."""
        with self._lock, self._on("arrive"):
            return host.to(self._device, non_blocking=True)

    def drain(self) -> None:
        """Wait for all work on the pipeline's streams; a transfer that failed may have queued work that it has no event for."""
        for stream in self._streams.values():
            if stream is not None:
                stream.synchronize()

    def close(self) -> None:
        """Wait until each batch has run, and give up all of them."""
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
            transfer.coded[self._device] = coded  # each is of the same stream, so the last one is behind all of them
            transfer.events.append(done)

    def _fetched(self, flags: Any) -> Any:
        """A copy of ``flags`` in host memory, which holds their numbers once the current stream has come so far."""
        if self._device.type != "cuda":
            return flags.clone()
        return pinned_like(flags).copy_(flags, non_blocking=True)
