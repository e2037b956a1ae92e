"""Law: the CUDA kernel that sums up the tokens of means (``token_sums.cu``): what it takes, how it is compiled, its launch."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.kernels.job import MEAN_TOKENS
from pqcodec.kernels.on_cuda.compiled import compiled, dtype_definitions, span_definitions
from pqcodec.kernels.on_cuda.tables import blob_of
from pqcodec.kernels.spans import Group
from pqcodec.stages import centre
from pqcodec.stream.header import Header

CHANNELS = 8  # of a thread
THREADS, LARGE_THREADS = 128, 224  # of a thread block; the latter where a vector has more than LARGE channels
LARGE = 256
TOGETHER = (4, 2, 1)  # leads that are turned back together: a thread has registers and shared memory for their vectors
MOST_BYTES = 8  # of one channel's numbers of these
PARTS = 16  # of a lead's tokens: always as many, so that a tensor's sums are the same alone and in a batch
ENOUGH = 512  # thread blocks, which fewer leads turned back together than there may be are to make
STAGED_BYTES, MOST_STAGES = 1 << 15, 8  # of a thread block's shared memory, for vectors on their way


@dataclass(frozen=True)
class SumsKind:
    """What the kernel is compiled for. ``frequencies``: of RoPE's pairs, if vectors turn."""

    dtype: int
    head_dim: int
    columns: int
    frequencies: tuple[int, ...]
    pairing: int
    together: int
    mean_tokens: int  # of a lead, at the most

    @property
    def threads(self) -> int:
        """Threads of a thread block."""
        return LARGE_THREADS if self.head_dim > LARGE else THREADS

    @property
    def stages(self) -> int:
        """Places for vectors of each thread and lead that are on their way, and for those that are added."""
        size = self.threads * self.together * CHANNELS * c.ITEM_BYTES[self.dtype]
        return min(max(STAGED_BYTES // size, 2), MOST_STAGES)

    def blob(self) -> tuple[np.ndarray, dict[str, int]]:
        """The tables of its turns, uint8, and the macros that say where each begins."""
        return blob_of({"FREQUENCIES": np.array(self.frequencies, np.uint32), "PHASES": centre.phase_pairs()})

    def machine_code(self, architecture: str) -> bytes:
        """As ``compiled`` gives it, for an architecture such as "sm_90"."""
        macros = {
            "HEAD_DIM": self.head_dim,
            "COLUMNS": self.columns,
            **dtype_definitions(self.dtype),
            "PAIRS": len(self.frequencies),
            "INTERLEAVED": int(self.pairing == c.ROPE_INTERLEAVED),
            "THREADS": self.threads,
            "TOGETHER": self.together,
            "STAGES": self.stages,
            "PART_TOKENS": -(-self.mean_tokens // PARTS),
            "MEAN_TOKENS": self.mean_tokens,
            "PARTS": PARTS,
            **span_definitions(),
            **self.blob()[1],
        }
        return compiled("token_sums.cu", macros, architecture)


@dataclass(frozen=True)
class SumsKernel:
    """A compiled kernel on a device, and its tables there."""

    function: Any
    kind: SumsKind
    blob: Any

    def grid(self, group: Group) -> int:
        """Thread blocks of a launch for a group."""
        return group.leads // self.kind.together * PARTS

    def arguments(self, group: Group) -> tuple[Any, ...]:
        """Those of a launch: tensors, of which it writes the fourth, and a number."""
        written = group.sums(self.kind.columns)
        return group.rows, group.lead_firsts, group.starts, written, self.blob, np.int32(group.search)


def sums_kind(group: Group) -> SumsKind | None:
    """The kind of a group whose blocks a kernel of this backend encodes; None where Triton's sums up its means' tokens.

    Such a group has rows at multiples of 16 bytes, and a head_dim that is a multiple of ``CHANNELS``.
    """
    h: Header = group.header
    frequencies = h.rope.frequencies if h.rope else ()
    if not h.offsets or not group.leads or len(frequencies) % (CHANNELS // 2):
        return None
    most = min(MOST_BYTES // c.ITEM_BYTES[h.dtype], group.leads * PARTS // ENOUGH)
    common = gcd(*(s.side_leads for s in group.spans))
    together = next(n for n in TOGETHER if n == 1 or (common % n == 0 and n <= most))
    pairing = h.rope.pairing if h.rope else c.ROPE_HALF
    return SumsKind(h.dtype, h.head_dim, group.tables.columns, tuple(frequencies), pairing, together, MEAN_TOKENS)
