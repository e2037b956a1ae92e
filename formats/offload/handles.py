"""Law: what a pool's caller holds while a block is under way: a ``Put`` into host memory, a ``Get`` out of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from pqcodec.errors import CorruptStream, NonFiniteInput
from pqcodec.formats.offload.block import Block
from pqcodec.formats.offload.pipeline import Transfer


class Put:
    """A block on its way into a pool.

    ``nbytes``: of its streams in host memory. ``displaced``: (key, "evicted" or "spilled") of each block that made room for it.

    >>> import torch
    >>> from pqcodec.formats import HostPool
    >>> with HostPool(1 << 20, device="cpu") as pool:
    ...     put = pool.put("layer 0", torch.ones(2, 64, 64))
    ...     put.wait()
    ...     put.done(), put.nbytes < 2 * 64 * 64 * 4, put.displaced
    (True, True, [])
    """

    def __init__(
        self, block: Block, transfer: Transfer, displaced: list[tuple[Hashable, str]], settle: Callable[[Block], None]
    ) -> None:
        self._block, self._transfer, self._settle = block, transfer, settle
        self.displaced = displaced
        self.nbytes = block.layout.nbytes

    def done(self) -> bool:
        """Whether all of the block has arrived in host memory; does not wait."""
        return self._transfer.done()

    def read(self, stream: Any) -> None:
        """Make ``stream``, of any GPU, wait until all tensors have been read on all GPUs: its later work may overwrite them."""
        for event in self._transfer.coded.values():
            stream.wait_event(event)

    def wait(self) -> None:
        """Wait until the block has arrived.

        Raises NonFiniteInput if a tensor held NaN or Inf; the pool keeps the block that it had under the key.
        """
        self._transfer.wait()
        self._settle(self._block)
        if not self._transfer.sound():
            raise not_kept(self._block.key)


def not_kept(key: Hashable) -> NonFiniteInput:
    """The error for a block with NaN or Inf in its tensors; which element that is, only the pieces of some pipelines tell."""
    found = f"block {key!r}: a tensor held NaN or Inf when it was encoded, the block is not kept"
    return NonFiniteInput(found, "mend the tensors, or keep them elsewhere")


class Get:
    """Tensors on their way out of a pool. Later work of the stream that was current at ``fetch`` finds them filled.

    >>> import torch
    >>> from pqcodec.formats import HostPool
    >>> with HostPool(1 << 20, device="cpu") as pool:
    ...     put = pool.put("layer 0", [torch.ones(2, 64, 64), torch.zeros(2, 64, 64)], wait=True)
    ...     get = pool.fetch("layer 0")
    ...     [x.shape for x in get.wait()], get.done()
    ([torch.Size([2, 64, 64]), torch.Size([2, 64, 64])], True)
    """

    def __init__(self, key: Hashable, tensors: list[Any], single: bool, transfer: Transfer) -> None:
        self._key, self._tensors, self._single, self._transfer = key, tensors, single, transfer

    @property
    def tensors(self) -> Any:
        """The block's tensors as they were put, one or a list; their numbers are not checked before ``wait``."""
        return self._tensors[0] if self._single else self._tensors

    def done(self) -> bool:
        """Whether all tensors are filled; does not wait."""
        return self._transfer.done()

    def wait(self) -> Any:
        """Wait, and return the tensors, checked; raises CorruptStream if a checksum does not hold."""
        self._transfer.wait()
        if not self._transfer.sound():
            raise CorruptStream(f"block {self._key!r}: a checksum does not hold, the host memory was overwritten; put it again")
        return self.tensors
