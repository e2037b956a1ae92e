"""Law: how a piece gets from tensors to host memory and back: encoding, copies and decoding, each on a CUDA stream of its own.

Events order the streams; nothing here waits for a whole device. ``DevicePipeline`` works on a GPU. For each kind of piece it
prepares tables and a buffer once, or two of each (``SLOTS``), so that one piece is coded while another is copied; a run only
gives the kernels the addresses of its tensors. ``HostPipeline`` does the same for tensors of the CPU, before its calls return.

The GPU has nothing to copy until the first piece is queued, and what Python does before that takes several times as long as
it does again right after, since the caches are cold: it shall be little, and the same little each time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from struct import Struct
from threading import Lock, RLock
from typing import Any

import numpy as np

from pqcodec import codec
from pqcodec.batch import DecodeBatch, EncodeBatch
from pqcodec.formats.offload.events import event
from pqcodec.formats.offload.graphs import Launch, copy_on
from pqcodec.formats.offload.pieces import BlockPiece
from pqcodec.formats.offload.pinned import PinnedSlice, pinned_copy, pinned_like
from pqcodec.placed import Placed, current
from pqcodec.tensors.arrays import device_rows

SLOTS = 2
KINDS = 12  # of pieces whose batches are kept, in each direction
_ALIGNED = 16  # bytes: the kernel that codes a tensor depends on its address modulo this
_FEW = 256  # addresses, up to which Python's own numbers are faster than numpy
_STAGED = 32768  # bytes: CUDA buffers copies of pageable memory up to this size, so that the caller need not wait


@dataclass
class Arrival:
    """One piece on its way.

    ``event``: it has arrived. ``flags``: tensors in host memory that are all 0 then if the kernels found nothing wrong.
    ``spare``: where both are kept for another piece, once they were looked at. ``sound``: what they said; None until then.
    """

    event: Any
    flags: Sequence[Any] = ()
    spare: list[tuple[Any, Sequence[Any]]] = field(default_factory=list)
    sound: bool | None = None

    def done(self) -> bool:
        """Whether the piece has arrived; does not wait."""
        return self.sound is not None or self.event.query()

    def wait(self) -> None:
        """Wait for the piece, and look at its flags."""
        if self.sound is None:
            self.event.synchronize()
            self.sound = not any(bool(flag.any()) for flag in self.flags)
            self.spare.append((self.event, self.flags))


class Transfer:
    """The pieces of one put or get on their way.

    ``coded``: an event for each device: the caller's tensors there are read or filled.
    """

    def __init__(self) -> None:
        self.arrivals: list[Arrival] = []
        self.coded: dict[Any, Any] = {}
        self._waiting = Lock()

    def done(self) -> bool:
        """Whether every piece has arrived; does not wait."""
        return all(arrival.done() for arrival in self.arrivals)

    def wait(self) -> None:
        """Wait until every piece has arrived; the flags of one are looked at while others are under way."""
        with self._waiting:
            for arrival in self.arrivals:
                arrival.wait()

    def sound(self) -> bool:
        """Whether the kernels found nothing wrong; call ``wait`` first."""
        return all(arrival.sound for arrival in self.arrivals)


# -- the CPU -------------------------------------------------------------------------------------------------------
class HostPipeline:
    """Encodes and decodes tensors of the CPU, before its calls return."""

    def __init__(self, backend: str) -> None:
        self._backend = backend

    def begin(self, tensors: Sequence[Any], filled: bool) -> None:
        """Do nothing: the CPU has no streams to order."""

    def end(self, tensors: Sequence[Any], transfer: Transfer, filled: bool) -> None:
        """Do nothing: all tensors are read or filled already."""

    def encode(self, piece: BlockPiece, tensors: Sequence[Any], host: PinnedSlice, transfer: Transfer) -> None:
        """Encode a piece of a block's ``tensors`` into ``host`` of piece.nbytes. Raises NonFiniteInput."""
        rows = host.tensor.numpy()
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
class _Starts:
    """The addresses of the rows of a group's tensors, which are set before each run: int64 on the device.

    ``numbers``: of the group's tensors in their piece. ``starts``: bytes from the beginning of each to its rows.
    """

    def __init__(self, group: Any, numbers: Sequence[int], starts: Sequence[np.ndarray]) -> None:
        import torch

        self._group = group
        self._numbers, self._starts = np.repeat(numbers, [len(own) for own in starts]), np.concatenate(starts)
        self._places = list(zip(self._numbers.tolist(), self._starts.tolist(), strict=True))
        self._rows = torch.empty(len(self._places), dtype=torch.int64, device="cpu")
        self._numpy: Any = self._rows.numpy()  # the same memory
        self._pack = Struct(f"{len(self._places)}q").pack_into

    def set(self, addresses: Sequence[int], stream: Any) -> None:
        """Copy the addresses of the rows to the device on a stream, from the address of each tensor of the piece."""
        import torch

        if len(self._places) <= _FEW:
            self._pack(self._numpy, 0, *[addresses[number] + start for number, start in self._places])
        else:
            np.add(self._starts, np.array(addresses, np.int64)[self._numbers], out=self._numpy)
        if stream is None or self._numpy.nbytes <= _STAGED:
            copy_on(stream, self._group.starts, self._rows)
        else:
            with torch.cuda.stream(stream):
                self._group.starts.copy_(pinned_copy(self._rows), non_blocking=True)


class _Prepared:
    """What a batch of either direction needs to run again and again, on other tensors of the same strides and alignment."""

    code: Launch
    memory: Any  # of the streams, on the device
    ready: Any  # event: the memory is written
    free: Any  # event: the memory has been read, and may be written again
    spare: list[tuple[Any, Sequence[Any]]]  # of ``Arrival``
    _addresses: list[int]  # of the tensors of the last run
    _starts: list[_Starts]

    def _keep(self: Any, memory: Any, piece: BlockPiece, views: Sequence[Any], stream: Any) -> None:
        self.make_brief()  # costs nothing, because copies are slower still, and lets urgent kernels of the caller run between
        self.code, self.memory = Launch(self.run, memory.device, plain=1, stream=stream), memory
        self.ready, self.free, self.spare = event(memory.device), event(memory.device), []
        kinds: dict[Any, list[int]] = {}
        for number, told in enumerate(piece.streams):
            kinds.setdefault(told.header.kind, []).append(number)
        self._addresses = [x.data_ptr() for x in views]
        starts = [device_rows(x).starts - x.data_ptr() for x in views]
        groups = [(group, kinds[group.spans[0].header.kind]) for group in self.groups]  # empty tensors alone may have none
        self._starts = [_Starts(group, own, [starts[number] for number in own]) for group, own in groups]

    def set(self, views: Sequence[Any], stream: Any) -> None:
        """Let the next run take the tensors ``views``: copy their addresses to the device on a stream, if they are others."""
        addresses = [x.data_ptr() for x in views]
        if addresses != self._addresses:
            self._addresses = []  # until all groups have them: some would be stale if a copy failed
            for starts in self._starts:
                starts.set(addresses, stream)
            self._addresses = addresses

    def give_up(self) -> None:
        """Wait until the last run is over, and let go of all memory at once: a batch refers to itself."""
        self.free.synchronize()
        vars(self).clear()


class _Encoder(_Prepared, EncodeBatch):
    """A batch that encodes other tensors at each run into one arena."""

    def __init__(self, piece: BlockPiece, views: Sequence[Any], device: Any, backend: str, stream: Any) -> None:
        import torch

        self._prepare([device_rows(x) for x in views], [told.header for told in piece.streams], backend)
        self._rows = []  # the tensors are not kept
        arena = torch.empty(0, dtype=torch.uint8, device=device).set_(self.streams[0].untyped_storage())
        self._keep(arena, piece, views, stream)

    def flags(self) -> list[Any]:
        """How many vectors with NaN or Inf each block held, on the device, for each group."""
        return [group.block_flags for group in self.groups]


class _Decoder(_Prepared, DecodeBatch):
    """A batch that decodes one buffer into other tensors at each run."""

    def __init__(self, piece: BlockPiece, views: Sequence[Any], device: Any, backend: str, stream: Any) -> None:
        import torch

        buffer = torch.empty(piece.nbytes, dtype=torch.uint8, device=device)
        places = ((told.header, buffer.data_ptr() + told.offset) for told in piece.streams)
        placed = [Placed.whole(header, address, buffer) for header, address in places]
        self._prepare(placed, device, backend, list(views), None, None, True)
        self.outs = []
        self._keep(buffer, piece, views, stream)

    def flags(self) -> list[Any]:
        """What is damaged in each block and each side section, on the device, for each group."""
        blocks = [group.block_flags for group in self.groups]
        return blocks + [group.side_flags for group in self.groups if group.checks_sides]


class _BatchesByKind:
    """Batches of each kind of piece, of the ``KINDS`` kinds that were used last.

    Of a kind whose pieces come one behind the other, there are ``SLOTS`` batches, which are used by turns; of others, such as
    the halves at both ends of a block, there is one.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._kinds: OrderedDict[Any, list[Any]] = OrderedDict()
        self._last: Any = None  # kind of the piece before; None: that was another block's

    def begin(self) -> None:
        """The next piece is the first one of a block."""
        self._last = None

    def next(self, piece: BlockPiece, views: Sequence[Any]) -> Any:
        """The batch of the piece's kind that was used longest ago, or a new one; its ``free`` says when it can run again."""
        places = tuple((x.stride(), x.data_ptr() % _ALIGNED, x.is_neg()) for x in views)
        kind = (piece.kind, places)
        found = self._kinds.pop(kind, [])
        if not found or (len(found) < SLOTS and kind == self._last):
            found.append(self._make(piece, views))
        else:
            found.append(found.pop(0))
        self._kinds[kind], self._last = found, kind
        while len(self._kinds) > KINDS:
            self._give_up_oldest()
        return found[-1]

    def close(self) -> None:
        """Give up all batches, each when its last run is over."""
        while self._kinds:
            self._give_up_oldest()

    def _give_up_oldest(self) -> None:
        for batch in self._kinds.popitem(last=False)[1]:
            batch.give_up()


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
        self._encoders = _BatchesByKind(partial(self._made, _Encoder, backend, "encode", "encode"))
        self._decoders = _BatchesByKind(partial(self._made, _Decoder, backend, "arrive", "decode"))
        self._before = event(device)

    def begin(self, tensors: Sequence[Any], filled: bool) -> None:
        """Make the transfers that follow wait for the work that the caller's current stream has now.

        ``filled``: the tensors are outputs.
        """
        with self._lock:
            (self._decoders if filled else self._encoders).begin()
            if self._device.type == "cuda":
                import torch

                self._before.record(torch.cuda.current_stream(self._device.index))
                self._before.wait(self._streams["decode" if filled else "encode"])

    def end(self, tensors: Sequence[Any], transfer: Transfer, filled: bool) -> None:
        """Keep the memory of ``tensors`` from being reused while it is read or filled.

        ``filled``: the tensors are outputs, and the caller's current stream waits until they are filled.
        """
        if self._device.type != "cuda":
            return
        import torch

        stream = self._streams["decode" if filled else "encode"]
        for x in tensors:
            x.record_stream(stream)
        transfer.coded[self._device] = coded = stream.record_event()
        if filled:
            coded.wait(torch.cuda.current_stream(self._device))

    def encode(self, piece: BlockPiece, tensors: Sequence[Any], host: PinnedSlice, transfer: Transfer) -> None:
        """Queue the encoding of a piece of a block's ``tensors``, and its copy into ``host`` of piece.nbytes.

        Its arrival is added to ``transfer``; the flags tell of NaN and Inf.
        """
        views, encode, leave = piece.views(tensors), self._streams["encode"], self._streams["leave"]
        with self._lock, current(self._device):
            batch = self._encoders.next(piece, views)
            batch.free.wait(encode)
            batch.set(views, encode)
            batch.code()
            batch.ready.record(encode)
            batch.ready.wait(leave)
            copy_on(leave, host.tensor, batch.memory)
            self._arrives("leave", batch, transfer)

    def decode(self, piece: BlockPiece, host: Any, outs: Sequence[Any], transfer: Transfer) -> None:
        """Queue the copy of ``host``, uint8 [piece.nbytes], to the device, and its decoding into a piece of a block's ``outs``.

        Its arrival is added to ``transfer``; the flags tell of checksums that do not hold.
        """
        views, arrive, decode = piece.views(outs), self._streams["arrive"], self._streams["decode"]
        with self._lock, current(self._device):
            batch = self._decoders.next(piece, views)
            batch.free.wait(arrive)
            copy_on(arrive, batch.memory, host)
            batch.ready.record(arrive)
            batch.set(views, decode)
            batch.ready.wait(decode)
            batch.code()
            self._arrives("decode", batch, transfer)

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

    def _made(
        self, kind: Callable[..., Any], backend: str, first: str, runs: str, piece: BlockPiece, views: Sequence[Any]
    ) -> Any:
        """A batch that runs on the stream ``runs``; its memory is of the stream ``first``, which writes it first."""
        import torch

        with torch.inference_mode(False), self._on(first):  # callers outside of that mode use the batch, too
            return kind(piece, views, self._device, backend, self._streams[runs])

    def _arrives(self, name: str, batch: Any, transfer: Transfer) -> None:
        """Fetch the flags of a batch's run on the stream ``name``, and mark there that the batch is free and has arrived."""
        stream, device = self._streams[name], self._device
        if batch.spare:
            done, found = batch.spare.pop()
        else:
            import torch

            with torch.inference_mode(False):
                done, found = event(device), [pinned_like(x) if x.is_cuda else x.new_empty(x.shape) for x in batch.flags()]
        for target, flags in zip(found, batch.flags(), strict=True):
            copy_on(stream, target, flags)
        done.record(stream)
        batch.free = done
        transfer.arrivals.append(Arrival(done, found, batch.spare))
