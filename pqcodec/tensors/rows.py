"""Law: rows of stored numbers inside a tensor, wherever they lie: on the host as a view, on a device by address."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from pqcodec import constants as c


def values_of(stored: np.ndarray) -> Values:
    """An array [..., tokens, head_dim] with contiguous rows -> Values over its own memory."""
    if stored.ndim == 1:
        stored = stored[None, :]
    item = stored.itemsize
    starts = np.zeros(1, np.int64)
    for size, stride in zip(stored.shape[:-2], stored.strides[:-2], strict=True) if stored.size else ():
        starts = (starts[:, None] + np.arange(size) * (stride // item)).ravel()
    if not stored.size:  # zeros take no memory before they are touched, and leading indices of no tokens cost nothing
        starts = np.zeros(math.prod(stored.shape[:-2]), np.int64)
    extent = sum((size - 1) * (stride // item) for size, stride in zip(stored.shape, stored.strides, strict=True)) + 1
    flat = np.lib.stride_tricks.as_strided(stored, (extent if stored.size else 0,), (item,), writeable=stored.flags.writeable)
    return Values(flat, starts, stored.strides[-2] // item, stored.shape[-1])


@dataclass(frozen=True)
class DeviceRows:
    """Rows of a torch tensor [..., tokens, head_dim] by address, for kernels that reach them in place."""

    tensor: Any
    shape: tuple[int, ...]
    dtype: int
    device: str
    starts: np.ndarray  # int64 [leading]: address of each leading index's first row
    stride: int  # elements from one token to the next

    def from_token(self, token: int) -> np.ndarray:
        """Addresses of each leading index's row of a token: int64 [leading]."""
        return self.starts + token * self.stride * c.ITEM_BYTES[self.dtype]

    def rows(self, lead: int, first: int, tokens: int) -> np.ndarray:
        """A copy of a run of tokens in host memory, stored numbers [tokens, head_dim]; waits."""
        import torch

        x = self.tensor if self.tensor.ndim > 1 else self.tensor[None]
        part = x[np.unravel_index(lead, self.shape[:-2])][first : first + tokens].contiguous().cpu()
        found: np.ndarray = (part if self.dtype == c.DTYPE_FLOAT32 else part.view(torch.int16)).numpy()
        return found if self.dtype == c.DTYPE_FLOAT32 else found.view(np.uint16)


@dataclass(frozen=True)
class Values:
    """A tensor [leading, tokens, head_dim] of stored numbers inside one flat array, wherever its rows lie.

    ``flat``: uint16 (float16 and bfloat16) or float32; ``starts``: int64 [leading], element at which each leading index
    begins; ``stride``: elements from one token to the next. The last dimension is contiguous.
    """

    flat: np.ndarray
    starts: np.ndarray
    stride: int
    head_dim: int

    def rows(self, lead: int, first: int, tokens: int) -> np.ndarray:
        """View [tokens, head_dim] of a run of tokens."""
        start, item = int(self.starts[lead]) + first * self.stride, self.flat.itemsize
        return np.ndarray((tokens, self.head_dim), self.flat.dtype, self.flat, start * item, (self.stride * item, item))

    def put_first(self, rows: np.ndarray) -> None:
        """Copy rows [leading, n, head_dim] of stored numbers to the first n tokens."""
        item = self.flat.itemsize
        anywhere = np.ndarray((self.flat.size - self.head_dim + 1, self.head_dim), self.flat.dtype, self.flat, 0, (item, item))
        anywhere[self.starts[:, None] + np.arange(rows.shape[1]) * self.stride] = rows

    def from_token(self, token: int) -> Values:
        """The rows from a token on."""
        return Values(self.flat, self.starts + token * self.stride, self.stride, self.head_dim)


def address(array: np.ndarray) -> int:
    """Where an array begins in memory."""
    return int(array.__array_interface__["data"][0])
