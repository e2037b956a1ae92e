"""Law: attention to pages of encoded keys and values, and to tokens that a serving engine still has exactly, on one GPU.

Prepared once for a number of sequences and a room of pages; what the sequences are may change between runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pqcodec.backends import device_backend
from pqcodec.errors import BackendUnavailable, InvalidArgument
from pqcodec.kernels.attention import checked_number, checked_softcap
from pqcodec.placed import current
from pqcodec.stream.header import Header, dtype_code
from pqcodec.stream.pages import PagedStream

Segments = Sequence[tuple[PagedStream, PagedStream]]  # keys and values of a sequence, in order; at least one pair


class AttendPages:
    """Attention of queries [sequences, q_heads, queries, head_dim] to pages, and to raw tokens behind them, in one launch.

    ``sequences``: the segments of each, streams of one kind that lie in ``pools``, uint8 [pages, page_bytes] of keys and of
    values. ``raw``: the engine's keys and values, views [blocks, block, heads, head_dim], and its block tables, int32
    [sequences, columns]: the tokens of a sequence behind those of its segments are there. ``lengths``: int32 [sequences], all
    tokens of each. ``room``: pages and segments of a sequence that ``place`` may bring at most, if more than there are now.
    ``scale``: of scores, head_dim^-0.5 if None; ``softcap``: their bound.

    The queries stand at the end of a sequence's tokens; where there are several, their own tokens are raw. ``run`` fills
    ``out`` on the current stream and can be captured in a CUDA graph. Block tables, lengths and caches are read when it runs,
    where they are now: an engine that writes its next token, and its next length, there has nothing else to do. A length below
    that of a sequence's pages counts as that; a block that is not in the cache makes NaN of its sequence.

    Raises InvalidArgument, and BackendUnavailable where no kernel reads such codes.
    """

    def __init__(
        self,
        query: Any,
        sequences: Sequence[Segments],
        pools: tuple[Any, Any],
        raw: tuple[Any, Any, Any] | None,
        lengths: Any,
        *,
        room: tuple[int, int] = (0, 0),
        scale: float | None = None,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> None:
        import torch

        k, v = (stream.header for stream in sequences[0][0])
        dtype = dtype_code(query.dtype)
        if query.ndim != 4 or dtype is None or query.shape[1] % k.leading or query.shape[3] != k.head_dim or not query.numel():
            raise InvalidArgument(
                f"queries {query.dtype} {tuple(query.shape)} do not go with keys {k.shape}: [sequences, a multiple of "
                f"{k.leading} heads, queries, {k.head_dim}] of float16, bfloat16 or float32 is expected"
            )
        if len(query) != len(sequences):
            raise InvalidArgument(f"{len(query)} sequences of queries, {len(sequences)} of pages; as many are expected")
        scale = query.shape[-1] ** -0.5 if scale is None else checked_number("scale", scale)
        cap = checked_softcap(softcap)
        reason = why_no_pages(query, k, v, raw, backend)
        if reason is not None:
            raise BackendUnavailable(f"no kernel attends to these pages on a GPU: {reason}")
        pages, segments = _size(sequences)
        self._query, self._lengths, self._room = query, lengths, (max(room[0], pages), max(room[1], segments))
        from pqcodec.kernels.on_cuda.paged_attention import MOST_SEGMENTS, CudaPagedAttention

        if self._room[1] > MOST_SEGMENTS:
            raise InvalidArgument(
                f"{self._room[1]} segments of a sequence are more than {MOST_SEGMENTS}; let one go on instead"
            )
        self._check(dict(enumerate(sequences)))
        self.out = torch.empty_like(query, memory_format=torch.contiguous_format)
        with current(query.device):
            self._way = CudaPagedAttention(tuple(query.shape), dtype, sequences, pools, raw, self._room, scale, cap)

    def _check(self, sequences: Mapping[int, Segments]) -> None:
        """Raises InvalidArgument for sequences that there is no room for, or that the kernel cannot read."""
        pages, segments = _size(list(sequences.values()))
        unknown = [n for n in sequences if not 0 <= n < len(self._query)]
        if unknown:
            raise InvalidArgument(f"sequence {unknown[0]} is not there: 0 .. {len(self._query) - 1} were prepared")
        if pages > self._room[0] or segments > self._room[1]:
            raise InvalidArgument(
                f"a sequence has {pages} pages, or {segments} segments; there is room for {self._room[0]} in {self._room[1]}: "
                f"prepare anew, with more room"
            )
        for number, each in sequences.items():
            if any(keys.header.first_tokens for keys, _ in each[1:]):
                raise InvalidArgument(f"sequence {number}: only its first segment may have exact tokens on a GPU")

    def place(self, sequences: Mapping[int, Segments]) -> None:
        """Let these sequences, by their numbers, have other segments from the next run on, also in graphs that are captured.

        On the current stream. Raises InvalidArgument where there is no room for them.
        """
        self._check(sequences)
        with current(self._query.device):
            self._way.place(sequences)

    def run(self, query: Any = None) -> Any:
        """Attend with the queries that the object was made of, or with others like them; returns ``out``."""
        query, like = self._query if query is None else query, self._query
        if query.shape != like.shape or query.dtype != like.dtype or query.device != like.device:
            raise InvalidArgument(
                f"queries {tuple(query.shape)}, {query.dtype} on {query.device}; "
                f"{tuple(like.shape)}, {like.dtype} on {like.device} were prepared"
            )
        with current(like.device):
            return self._way.run(query.contiguous(), self.out, self._lengths)


def _size(sequences: Sequence[Segments]) -> tuple[int, int]:
    """The most pages of a sequence, and its most segments that have some."""
    counts = [[keys.header.chunks for keys, _ in segments] for segments in sequences]
    return max(map(sum, counts), default=0), max((sum(n > 0 for n in each) for each in counts), default=0)


def why_no_pages(query: Any, keys: Header, values: Header, raw: tuple[Any, Any, Any] | None, backend: str) -> str | None:
    """Why an ``AttendPages`` cannot be made of streams of such headers, on a GPU; None where it can."""
    if device_backend(backend, query.device).name != "cuda":
        return "only backend 'cuda' reads codes"
    from pqcodec.kernels.on_cuda.attention import is_readable, why_not

    if values.offsets:
        return "values are centred"
    for x in raw[:2] if raw else ():
        if not is_readable(x):
            return f"the engine's cache has strides {x.stride()}"
    return why_not(keys, values, query.shape[1] // keys.leading * query.shape[2])
