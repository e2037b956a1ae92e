"""Law: a kernel that only moves bytes, as many as a codec reads and writes: what bounds the codec beside a device copy.

A copy reads as many bytes as it writes. A decoder writes five to eight times what it reads, an encoder the other way round, and
memory is not as quick at either as at a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

WORDS = 4096  # of four bytes, that a program reads or writes, whichever is more
WARPS = 4


@triton.jit
def move_words(source, target, read: tl.constexpr, most_read: tl.constexpr, write: tl.constexpr, most_write: tl.constexpr):
    """Reads ``read`` words of ``source``, writes ``write`` words of ``target``; ``most_...``: powers of two from there on."""
    program = tl.program_id(0).to(tl.int64)
    reads, writes = tl.arange(0, most_read), tl.arange(0, most_write)
    words = tl.load(source + program * read + reads, mask=reads < read, other=0)
    tl.store(target + program * write + writes, tl.sum(words) + writes, mask=writes < write)


def moving(bytes_read: int, bytes_written: int, device: Any) -> Callable[[], Any]:
    """A launch that reads and writes about so many bytes of a device's memory, side by side."""
    most = max(bytes_read, bytes_written)
    read, write = (max(round(WORDS * each / most), 1) for each in (bytes_read, bytes_written))
    programs = most // (4 * WORDS)
    source, target = (torch.zeros(programs * words, dtype=torch.int32, device=device) for words in (read, write))
    sizes = read, triton.next_power_of_2(read), write, triton.next_power_of_2(write)
    return partial(move_words[(programs,)], source, target, *sizes, num_warps=WARPS)
