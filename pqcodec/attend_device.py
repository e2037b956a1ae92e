"""Law: attention and scores where queries are on a GPU, for one call; ``attention`` has the same on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pqcodec.attend_batch import AttendBatch, check_exact, placed_streams
from pqcodec.attend_decoded import Decoding
from pqcodec.attend_parts import AttendedTokens, Pair, coded_and_exact, why_not_triton
from pqcodec.backends import device_backend
from pqcodec.errors import InvalidArgument
from pqcodec.kernels.attention import checked_number, checked_softcap
from pqcodec.placed import current, one_device, stream_on
from pqcodec.stream.header import dtype_code
from pqcodec.stream.index import Bounds
from pqcodec.tensors.numbers import is_torch


def attend_on_device(q: Any, keys: Any, values: Any, exact: dict[str, Pair | None], **options: Any) -> Any:
    """``attention.attend`` of queries on a GPU: by an ``AttendBatch`` of one sequence, whose ``options`` these are.

    ``exact``: "first" and "recent".
    """
    _check_queries(q)
    pairs = {name: None if pair is None else _pair(name, pair) for name, pair in exact.items()}
    batch = AttendBatch(
        _of_one_sequence("q", q).contiguous(),
        [_streams_beside(q, keys)],
        [_streams_beside(q, values)],
        first=pairs["first"],
        recent=pairs["recent"],
        **options,
    )
    _check_leading(q, batch.leading, [x for pair in exact.values() for x in pair or ()])
    return batch.run().reshape(*q.shape[:-1], batch.out.shape[-1])


def scores_on_device(
    keys: Any,
    q: Any,
    *,
    scale: float | None,
    softcap: float | None,
    tokens: Bounds | None,
    recent: Any,
    check: bool,
    backend: str,
) -> Any:
    """``attention.scores`` of queries on a GPU."""
    import torch

    _check_queries(q)
    query = _of_one_sequence("q", q).contiguous()
    streams = _streams_beside(q, keys)
    exact = [] if recent is None else [_of_one_sequence("recent", recent)]
    device = one_device([query, *streams, *exact])
    device_backend(backend, device)  # before streams are read
    sequences = placed_streams([[streams]], device, backend, check)
    h = sequences[0][0][0].header
    heads, queries, head_dim = query.shape[1:]
    if not h.leading or not heads or heads % h.leading or head_dim != h.head_dim or not queries:
        raise InvalidArgument(
            f"q {tuple(q.shape)} does not go with keys {h.shape}: [..., q_heads, queries, head_dim] is expected"
        )
    check_exact("recent", exact, 1, sequences[0][0])
    _check_leading(q, tuple(h.shape[:-2]), [] if recent is None else [recent])
    scale = head_dim**-0.5 if scale is None else checked_number("scale", scale)
    attended = AttendedTokens.of(sequences, tokens, [], exact if exact and exact[0].shape[2] else [])
    out = torch.empty((*query.shape[:-1], attended.totals[0]), dtype=torch.float32, device=device)
    cap, found = checked_softcap(softcap), (*q.shape[:-1], attended.totals[0])
    if not out.numel():
        return out.reshape(found)
    with current(device):
        return _scorer(query, attended, h.leading, backend, scale, cap).score(query, out).reshape(found)


def _scorer(query: Any, attended: AttendedTokens, leading: int, backend: str, scale: float, cap: float) -> Any:
    """What scores: the CUDA kernel that reads pair polar, Triton's where they are asked for; else keys are decoded."""
    shape, dtype, device = tuple(query.shape), dtype_code(query.dtype), query.device
    headers, sizes = attended.headers, (shape, attended.totals, leading, shape[-1:])
    if headers and device_backend(backend, device).name == "cuda":
        from pqcodec.kernels.on_cuda.pair_scores import PairScores, why_not_pairs

        rows = shape[1] // leading * shape[2]
        if not any(why_not_pairs(h, dtype, rows, cap) for h in headers):
            return PairScores(*sizes, *coded_and_exact(attended, backend), device, scale, cap, query_dtype=dtype)
    if why_not_triton(headers, backend) is None:
        from pqcodec.kernels.on_triton.attending import TritonAttention

        return TritonAttention(*sizes, *coded_and_exact(attended, backend), device, scale, cap)
    return Decoding(shape, leading, attended, backend, device, scale, cap)


# -- what is asked -----------------------------------------------------------------------------------------------------
def _check_queries(q: Any) -> None:
    if not is_torch(q) or q.ndim < 3:
        raise InvalidArgument(
            f"q: a {type(q).__name__} {tuple(q.shape)}; attention to codes on a GPU takes tensors of torch that lie there, "
            "[..., q_heads, queries, head_dim]"
        )


def _pair(name: str, pair: Any) -> Pair:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise InvalidArgument(f"{name} is a {type(pair).__name__}; a pair of tensors, keys and values, is expected")
    return _of_one_sequence(name, pair[0]), _of_one_sequence(name, pair[1])


def _of_one_sequence(name: str, x: Any) -> Any:
    """[..., heads, n, head_dim] as [1, heads, n, head_dim]; raises InvalidArgument."""
    if not is_torch(x) or x.ndim < 3:
        raise InvalidArgument(f"{name}: a pair of tensors of torch, [..., kv_heads, n, head_dim], is expected")
    return x.reshape(1, math.prod(x.shape[:-2]), *x.shape[-2:])


def _streams_beside(q: Any, streams: Any) -> list[Any]:
    """One stream, or each of a list, beside the queries: as it is, or moved there from host memory."""
    many = list(streams) if isinstance(streams, (list, tuple)) else [streams]
    if not many:
        raise InvalidArgument("an empty list of streams; at least one is expected")
    return [stream_on(stream, q.device) for stream in many]


def _check_leading(q: Any, leading: tuple[int, ...], exact: Sequence[Any]) -> None:
    """Raises InvalidArgument where the dimensions before tokens differ but for the heads of queries."""
    shapes = [leading, *(tuple(x.shape[:-2]) for x in exact)]
    if any(shape[:-1] != tuple(q.shape[:-3]) or shape != shapes[0] for shape in shapes):
        raise InvalidArgument(
            f"q {tuple(q.shape)} does not go with {' and '.join(map(str, shapes))} heads of keys and exact tokens: "
            f"they are expected alike but for the last number"
        )
