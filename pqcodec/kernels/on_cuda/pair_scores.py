"""Law: the CUDA kernel of scores q.k from the codes of pair polar (``pair_scores.cu``): what it takes, its macros, its launch.

Presets wu44 and wu33 of head_dim 128, on NVIDIA GPUs of compute capability 8.0 and more; ``why_not_pairs`` tells what it
leaves. It reads the shares of Triton's ``score_groups``, and writes its scores. Everything is loaded when it is prepared, so
that ``score`` can be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from pqcodec import constants as c
from pqcodec.kernels.on_cuda.backend import _device
from pqcodec.kernels.on_cuda.compiled import compiled
from pqcodec.kernels.on_cuda.launches import CARVEOUT_PERCENT, launch, loaded
from pqcodec.kernels.on_triton.attending import CodedGroup, TritonAttention
from pqcodec.kernels.on_triton.shares import CODED, CODED_FIELDS, OF_SIDE
from pqcodec.stream.header import DTYPE_NAMES, Header, dtype_code

HEAD_DIM = 128
GROUP_TOKENS = 128
BITS = ((4, 4), (3, 3))  # of angles and of radii
MOST_ROWS = 8  # query heads of a head of keys, times queries
RESIDENT = {1: 16, 2: 12}  # warps of a multiprocessor, by sets of four rows
LANES = 32  # of a thread block
SHARED_PERCENT = 60  # of a multiprocessor's memory, so that all of these find room; the rest is its cache
DTYPES = (c.DTYPE_FLOAT16, c.DTYPE_BFLOAT16)  # of queries, which float16 holds but for a power of two, and of keys


class ScoredKind(NamedTuple):
    """What the kernel is compiled for."""

    angle_bits: int
    radius_bits: int
    chunk_tokens: int
    interleaved: bool  # whether a pair's channels are neighbours
    rows: int  # query heads of a head of keys, times queries

    @classmethod
    def of(cls, h: Header, rows: int) -> ScoredKind:
        """The kind of a stream that ``why_not_pairs`` has nothing against."""
        assert h.affine is not None
        interleaved = h.affine.pairing == c.ROPE_INTERLEAVED
        return cls(h.affine.angle_bits, h.radius_bits, h.chunk_tokens, interleaved, rows)


def why_not_pairs(h: Header, query_dtype: int | None, rows: int, cap: float) -> str | None:
    """Why the kernel does not score the keys of a stream; None where it does.

    ``rows``: query heads of a head of keys, times queries; ``cap``: of scores, 0 for none.
    """
    if h.coding != c.CODING_PAIRS or h.affine is None or (h.affine.angle_bits, h.radius_bits) not in BITS:
        return f"keys are no pairs of {' or '.join(f'{angle} and {radius}' for angle, radius in BITS)} bits"
    if h.head_dim != HEAD_DIM or h.affine.tokens != GROUP_TOKENS:
        return f"head_dim is {h.head_dim}, of {h.affine.tokens} tokens a group; {HEAD_DIM} and {GROUP_TOKENS} are expected"
    if h.offsets:
        return "keys are centred"
    if h.dtype not in DTYPES or query_dtype not in DTYPES:
        return f"keys or queries are none of {', '.join(DTYPE_NAMES[dtype] for dtype in DTYPES)}"
    if rows > MOST_ROWS:
        return f"{rows} query heads of a head of keys, times queries, are more than {MOST_ROWS}"
    return "scores are capped" if cap else None


def pair_definitions(kind: ScoredKind) -> dict[str, Any]:
    """The macros of ``pair_scores.cu``."""
    share, side = CODED.value, OF_SIDE.value
    return {
        "ANGLE_BITS": kind.angle_bits,
        "RADIUS_BITS": kind.radius_bits,
        "CHUNK": kind.chunk_tokens,
        "INTERLEAVED": int(kind.interleaved),
        "ROWS_USED": kind.rows,
        "RESIDENT": RESIDENT[-(-kind.rows // 4)],
        "FLOAT16": c.DTYPE_FLOAT16,
        "FIELDS": CODED_FIELDS.value,
        **{name.upper(): getattr(share, name) for name in ("sequence", "total", "first", "last", "position")},
        **{
            name.upper(): share.keys + getattr(side, name)
            for name in ("payload", "coded", "exact", "whole_bytes", "last_bytes")
        },
    }


@lru_cache(maxsize=32)
def _pair_kernel(kind: ScoredKind, device: str) -> Any:
    """The kernel for a kind, compiled once a process."""
    code = compiled("pair_scores.cu", pair_definitions(kind), _device(device)[1])
    return loaded(code, "score_pairs", device, {CARVEOUT_PERCENT: SHARED_PERCENT})


class PairScores(TritonAttention):
    """Scores of the queries of some sequences with their coded and exact tokens, prepared once.

    The kernel takes keys of a kind that ``why_not_pairs`` has nothing against and that have no exact vectors; Triton's take the
    others, and the exact tokens. Arguments are those of ``TritonAttention`` up to ``cap``, and the dtype of the queries.
    """

    def __init__(self, *arguments: Any, query_dtype: int | None) -> None:
        super().__init__(*arguments)
        self._functions = {
            group.members[0].keys.header.kind: _pair_kernel(self._kind(group), str(self._device))
            for group in self._coded
            if self._takes(group, query_dtype)
        }

    def _kind(self, group: CodedGroup) -> ScoredKind:
        return ScoredKind.of(group.members[0].keys.header, self._rows)

    def _takes(self, group: CodedGroup, query_dtype: int | None) -> bool:
        places = [part.keys.stream + part.keys.header.payload_start for part in group.members]
        why = why_not_pairs(group.members[0].keys.header, query_dtype, self._rows, self._cap)
        return why is None and not group.skips and not any(place % 2 for place in places)

    def _score_codes(self, coded: CodedGroup, query: Any, out: Any) -> None:
        function = self._functions.get(coded.members[0].keys.header.kind)
        if function is None:
            return super()._score_codes(coded, query, out)
        launch_scores(function, coded.shares, coded.count * self._leads, query, out, self._leads, self._scale)


def launch_scores(function: Any, shares: Any, blocks: int, query: Any, out: Any, leads: int, scale: float) -> None:
    """Scores of shares, of all heads of keys, on the current stream: ``leads`` thread blocks of a share."""
    numbers = (np.int32(leads), np.array(dtype_code(query.dtype), np.int32), np.float32(scale))
    launch(function, blocks, LANES, 0, query.device, (shares, query, out, *numbers))
