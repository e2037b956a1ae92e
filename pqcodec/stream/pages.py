"""Law: streams whose payloads lie in pages of a pool: a page is the blocks of all leading indices of one chunk.

Blocks of a chunk lie side by side in a stream (SPEC 3.2), so a page is a run of its bytes, and pages may lie anywhere. What a
stream has before its payload, its front, is kept apart: the header, and the side sections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pqcodec.errors import InvalidArgument
from pqcodec.stream.header import Header
from pqcodec.stream.source import check_range


def page_bytes(h: Header) -> int:
    """Bytes of a page of such streams."""
    return h.blocks.leading * h.blocks.chunk_bytes


def checked_pages(name: str, pages: Any, there: int) -> np.ndarray:
    """Numbers of different pages of a pool that has ``there``, int64 [n]; raises InvalidArgument.

    >>> checked_pages("pages", [5, 9], 10).tolist()
    [5, 9]
    """
    numbers = np.asarray(pages.cpu() if hasattr(pages, "cpu") else pages)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise InvalidArgument(f"{name} is {numbers.dtype} {numbers.shape}; a list of page numbers [n] is expected")
    numbers = numbers.astype(np.int64)
    outside = numbers[(numbers < 0) | (numbers >= there)]
    if outside.size:
        raise InvalidArgument(f"{name} names page {outside[0]}, the pool has pages 0 .. {there - 1}")
    found, counts = np.unique(numbers, return_counts=True)
    if found.size < numbers.size:
        raise InvalidArgument(f"{name} names page {found[counts > 1][0]} twice; a page holds one chunk")
    return numbers


@dataclass(frozen=True, eq=False)
class PagedStream:
    """A stream in pages: its header, its front, a uint8 tensor of torch, and the pages of its chunks in a pool."""

    header: Header
    front: Any  # uint8 [payload_start], on the pool's device
    pages: np.ndarray  # int64 [chunks]

    def resized(self, tokens: int, pages: np.ndarray) -> PagedStream:
        """The stream of so many tokens that are in these pages, with the same offsets and exact tokens."""
        import torch

        h = self.header.with_tokens(tokens)
        header = torch.frombuffer(bytearray(h.to_bytes()), dtype=torch.uint8).to(self.front.device)
        return PagedStream(h, torch.cat([header, self.front[h.header_bytes :]]), pages)

    def gathered(self, pool: Any) -> Any:
        """The stream as it was, uint8 [stream_bytes], out of a pool, uint8 [pages, page_bytes] of torch: a copy."""
        import torch

        payload = pool.index_select(0, torch.from_numpy(self.pages).to(pool.device)).flatten()
        return torch.cat([self.front, payload[: self.header.stream_bytes - self.header.payload_start]])

    def source(self, pool: Any) -> PagedSource:
        """The stream as a source, where the pool is in host memory."""
        return PagedSource(self.header, self.front.numpy(), self.pages, pool.numpy())


class PagedSource:
    """A Source: a stream in pages in host memory. A read gathers the pages that it wants, and no others."""

    def __init__(self, header: Header, front: np.ndarray, pages: Sequence[int] | np.ndarray, pool: np.ndarray) -> None:
        self.header, self.size = header, header.stream_bytes
        self._front, self._pages, self._pool = front, np.asarray(pages, np.int64), pool

    def read(self, start: int, count: int) -> np.ndarray:
        """uint8 [count] from byte ``start`` of the stream; raises TruncatedStream."""
        check_range(start, count, self.size)
        before = self._front.size
        parts = [self._front[start : start + count]]
        low, high = max(start - before, 0), start + count - before  # of the payload
        if low < high:
            size = self._pool.shape[1]
            first = low // size
            taken = self._pool[self._pages[first : -(-high // size)]].reshape(-1)
            parts.append(taken[low - first * size : high - first * size])
        return parts[-1] if not parts[0].size else np.concatenate(parts)
