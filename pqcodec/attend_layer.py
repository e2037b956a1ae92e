"""Law: attention of one query step of a layer to tokens of which the oldest are encoded and the last ones grow, on one GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pqcodec.backends import device_backend
from pqcodec.kernels.attention import checked_number, checked_softcap
from pqcodec.placed import Placed, current
from pqcodec.stream.header import DTYPE_NAMES, Header

Pair = tuple[Any, Any]  # keys and values


def why_decoded(query: Any, headers: Sequence[tuple[Header, Header]], backend: str) -> str | None:
    """Why an ``AttendLayer`` cannot be made of streams of such headers (keys, values); None where it can.

    ``query`` [sequences, q_heads, queries, head_dim] on the device.
    """
    if device_backend(backend, query.device).name != "cuda":
        return "only backend 'cuda' reads codes"
    from pqcodec.kernels.on_cuda import attention

    k, v = headers[0]
    if any((a.kind, b.kind) != (k.kind, v.kind) for a, b in headers):
        return "streams are of several kinds"
    if v.offsets:
        return "values are centred"
    if len(headers) >= attention.MOST_BLOCKS:
        return f"{len(headers)} streams of a sequence are more than {attention.MOST_BLOCKS - 1}"
    if str(query.dtype) != f"torch.{DTYPE_NAMES[k.dtype]}":
        return f"queries are {query.dtype}, keys {DTYPE_NAMES[k.dtype]}"
    rows = query.shape[1] // k.leading * query.shape[2]
    return next((reason for pair in headers if (reason := attention.why_not(*pair, rows))), None)


class AttendLayer:
    """Attention of queries [sequences, q_heads, queries, head_dim] at the end of a layer's tokens, in one launch.

    ``streams``: keys and values of each sequence in order, as they lie on the GPU, without exact tokens of their own.
    ``first``: exact keys and values before them, [sequences, kv_heads, n, head_dim], contiguous. ``recent``: memory of the
    exact tokens behind them, [sequences, kv_heads, room, head_dim]; the last ``queries`` that count are the queries' own.
    ``why_decoded`` must have been asked, for the streams of one sequence. ``scale``: of scores, head_dim^-0.5 if None;
    ``softcap``: their bound. All of it must stay where it is. Raises InvalidArgument.
    """

    def __init__(
        self,
        query: Any,
        streams: Sequence[Sequence[tuple[Placed, Placed]]],
        first: Pair,
        recent: Pair,
        *,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        from pqcodec.kernels.on_cuda.attention import CodedPair, CudaAttention, ExactFirst

        scale = query.shape[-1] ** -0.5 if scale is None else checked_number("scale", scale)
        tokens, head_bytes = first[0].shape[2], first[0].shape[2] * first[0].shape[3] * first[0].element_size()
        firsts = [ExactFirst(tokens, k.data_ptr(), v.data_ptr(), head_bytes) for k, v in zip(*first, strict=True)]
        dtype = streams[0][0][0].header.dtype
        self._kept = first
        with current(query.device):
            sequences = [[CodedPair(*pair) for pair in pairs] for pairs in streams]
            self._way = CudaAttention(tuple(query.shape), dtype, sequences, firsts, recent, scale, checked_softcap(softcap))

    def run(self, query: Any, recent: Any, new: Pair | None = None) -> Any:
        """The result, like ``query``; on the current stream, and it can be captured in a CUDA graph.

        ``recent``: how many tokens of the recent memory count; a tensor int32 [1] on the GPU is read when the kernel runs.
        ``new``: keys and values of the queries' own tokens, the last of these, which are put into the memory.
        """
        import torch

        from pqcodec.kernels.on_cuda.attention import is_readable

        query = query.contiguous()
        if new is not None and not all(map(is_readable, new)):
            new = new[0].contiguous(), new[1].contiguous()
        with current(query.device):
            return self._way.run(query, torch.empty_like(query), recent, new)
