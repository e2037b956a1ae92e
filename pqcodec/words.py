"""Law: the bytes of tensors looked at by address: words here and there of the host's memory, sums over all of a GPU's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from pqcodec.stream.prng import splitmix64

_SEED = 0x6D6F64656C  # of the weights


def words_at(addresses: np.ndarray) -> np.ndarray:
    """The 64-bit words at addresses of this process's memory (int64 [n], multiples of 8), uint64 [n]; all must be readable."""
    from pqcodec.kernels.cpu import samples

    return samples.words_at(addresses)


def sums_anywhere(tensor: Any) -> bool:
    """Whether ``Sums`` takes a tensor: it is contiguous, on a device for which Triton compiles, at a multiple of 8 bytes."""
    return _triton_for(tensor.device.type) and tensor.is_contiguous() and tensor.data_ptr() % 8 == 0


@lru_cache(maxsize=8)
def _triton_for(device: str) -> bool:
    if find_spec("triton") is None:
        return False
    if device == "cpu":
        from pqcodec.kernels.on_triton.numbers import interpreted

        return interpreted()
    return device in ("cuda", "xpu")


class Sums:
    """Sums over all bytes of tensors of one device, each chunk of 512 KiB its own; a byte that changes changes its chunk's sum.

    The tensors are not kept: they must lie where they lay whenever ``begin`` is called. ``chunks``: sums of each tensor.
    """

    def __init__(self, tensors: Sequence[Any]) -> None:
        import torch

        from pqcodec.kernels.on_triton import words

        self._device = tensors[0].device
        size = words.CHUNK_BYTES
        rows = [
            (tensor.data_ptr() + first, min(size, tensor.nbytes - first))
            for tensor in tensors
            for first in range(0, tensor.nbytes, size)
        ]
        self.chunks = [-(-tensor.nbytes // size) for tensor in tensors]
        self._rows = torch.from_numpy(np.array(rows, np.int64).reshape(-1, 2)).to(self._device)
        weights = splitmix64(_SEED, 0, words.LANES) | np.uint64(1)
        self._weights = torch.from_numpy(weights.view(np.int64)).to(self._device)

    def begin(self) -> Callable[[], np.ndarray]:
        """Start to sum on the current stream; the result waits for int64 [sum of ``chunks``]."""
        import torch

        from pqcodec.kernels.on_triton import words
        from pqcodec.placed import current

        sums = torch.empty(len(self._rows), dtype=torch.int64, device=self._device)
        if len(self._rows):
            with current(self._device):
                words.sum_words[(len(self._rows),)](
                    self._rows, self._weights, sums, LANES=words.LANES, STEPS=words.STEPS, num_warps=words.WARPS
                )
        return lambda: sums.cpu().numpy()
