"""Law: each tensor of a pool is encoded and decoded by the pipeline of the device that it is on.

All devices share the pool's host memory: one GPU can decode what another has encoded. A pipeline is made when the first tensor
of its device comes, so that a GPU without tensors gets no CUDA context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

from pqcodec.backends import ON_DEVICE
from pqcodec.backends import backend as backend_of
from pqcodec.errors import InvalidArgument
from pqcodec.formats.offload.pieces import BlockPiece
from pqcodec.formats.offload.pinned import PinnedSlice
from pqcodec.formats.offload.pipeline import DevicePipeline, HostPipeline, Transfer
from pqcodec.placed import device_named

Pipeline = DevicePipeline | HostPipeline
Shares = Mapping[Any, Sequence[Any]]  # of some tensors: those of each device


class Lanes:
    """The pipelines of a pool, one for each of its ``devices`` that tensors have come from; ``device``: see ``devices_of``.

    Raises InvalidArgument, and BackendUnavailable for a device that the backend cannot use.
    """

    def __init__(self, device: Any, backend: str) -> None:
        self.devices, self._backend, self._lock = devices_of(device), backend, Lock()
        self._made: dict[Any, Pipeline] = {}
        for each in self.devices[:1] if device is None else self.devices:
            _kernel(backend, each)

    @staticmethod
    def check(tensors: Sequence[Any]) -> None:
        """Raises InvalidArgument for what is no tensor of torch."""
        import torch

        for kind in set(map(type, tensors)):
            if not issubclass(kind, torch.Tensor):
                number = next(number for number, x in enumerate(tensors) if type(x) is kind)
                raise InvalidArgument(f"tensor {number} is a {kind.__name__}; torch tensors are expected")

    def shares(self, tensors: Sequence[Any], devices: Sequence[Any]) -> Shares:
        """The tensors of each device, of tensors on ``devices``, whose pipelines are made if they are not yet.

        Raises InvalidArgument for a tensor elsewhere, and BackendUnavailable.
        """
        if len(devices) == 1 and devices[0] in self._made:
            return {devices[0]: tensors}
        shares: dict[Any, list[Any]] = {}
        for number, x in enumerate(tensors):
            if x.device not in self._made:
                self._make(x.device, number)
            shares.setdefault(x.device, []).append(x)
        return shares

    def encode(
        self,
        pieces: Sequence[BlockPiece],
        tensors: Sequence[Any],
        shares: Shares,
        hosts: Sequence[PinnedSlice],
        transfer: Transfer,
    ) -> None:
        """Encode the pieces of a block's ``tensors`` into ``hosts``, of piece.nbytes each; ``shares``: of ``tensors``."""
        self._begin(shares, filled=False)
        for piece, host in zip(pieces, hosts, strict=True):
            self._made[piece.first_of(tensors).device].encode(piece, tensors, host, transfer)
        self._end(shares, transfer, filled=False)

    def decode(
        self,
        pieces: Sequence[BlockPiece],
        hosts: Sequence[Any],
        staged: Sequence[Any],
        outs: Sequence[Any],
        shares: Shares,
        transfer: Transfer,
    ) -> None:
        """Decode ``hosts`` into the pieces of a block's ``outs``; those of one piece may be on several devices.

        ``staged``: what ``moved`` returned, or None for each piece. A copy is used for the tensors of its own device only.
        ``shares``: of ``outs``.
        """
        self._begin(shares, filled=True)
        devices = [x.device for x in outs] if len(shares) > 1 else list(shares)
        for piece, host, copy in zip(pieces, hosts, staged, strict=True):
            for device, on_it, start in piece.split(devices) if len(shares) > 1 else [(devices[0], piece, 0)]:
                source = host if copy is None or copy.device != device else copy
                part = source if on_it is piece else source[start : start + on_it.nbytes]
                self._made[device].decode(on_it, part, outs, transfer)
        self._end(shares, transfer, filled=True)

    def moved(
        self, pieces: Sequence[BlockPiece], devices: Sequence[Any], hosts: Sequence[Any], staged: Sequence[Any]
    ) -> list[Any]:
        """A copy of each of ``hosts`` on the device of its tensors, under way, or the one that is ``staged``; None for the CPU.

        ``devices``: that of each tensor of the block.
        """
        wanted = zip(pieces, hosts, staged, strict=True)
        return [self._made[piece.first_of(devices)].moved(host) if copy is None else copy for piece, host, copy in wanted]

    def drain(self) -> None:
        """Wait for all work of all pipelines; a transfer that failed may have queued work that it has no event for."""
        for lane in list(self._made.values()):
            lane.drain()

    def close(self) -> None:
        """Wait for all work, and let go of what the pipelines have prepared."""
        self.drain()
        for lane in list(self._made.values()):
            lane.close()

    def _make(self, device: Any, number: int) -> None:
        if device not in self.devices:
            raise InvalidArgument(
                f"tensor {number} lies on {device}, this pool's are on {', '.join(map(str, self.devices))}; move it there, or "
                "name its device when the pool is made (device=)"
            )
        with self._lock:
            if device not in self._made:
                kernel = _kernel(self._backend, device)
                on_device = kernel.name in ON_DEVICE
                self._made[device] = DevicePipeline(device, kernel.name) if on_device else HostPipeline(kernel.name)

    def _begin(self, shares: Shares, filled: bool) -> None:
        for device, xs in shares.items():
            self._made[device].begin(xs, filled)

    def _end(self, shares: Shares, transfer: Transfer, filled: bool) -> None:
        for device, xs in shares.items():
            self._made[device].end(xs, transfer, filled)


def devices_of(device: Any) -> tuple[Any, ...]:
    """The torch devices that ``device`` names: one, a sequence, or None for all GPUs (the current one first) or else the CPU.

    Raises InvalidArgument for an empty sequence, and for devices of different types; BackendUnavailable where there is no such
    device.
    """
    import torch

    if device is None:
        if not torch.cuda.is_available():
            return (device_named("cpu"),)
        seen = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        return tuple(dict.fromkeys([device_named("cuda"), *seen]))
    named = list(device) if isinstance(device, (list, tuple)) else [device]
    found = tuple(dict.fromkeys(map(device_named, named)))
    if not found:
        raise InvalidArgument("device: an empty list; name a device or several, or pass None for all GPUs")
    if len({each.type for each in found}) > 1:
        raise InvalidArgument(
            f"device: {', '.join(map(str, found))} are of several kinds, and so is the host memory that they take; make a pool "
            "for each kind"
        )
    return found


def _kernel(backend: str, device: Any) -> Any:
    """The backend that codes tensors of a device; raises BackendUnavailable."""
    kernel = backend_of(backend, device.type)
    if kernel.name in ON_DEVICE:
        kernel.check_device(device)
    return kernel
