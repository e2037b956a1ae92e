"""Law: which tokens of a KV cache are worth keeping: positions for ``encode(keep=)``, from queries that the caller gives.

Heads of queries that share a head of keys are summed, so a cache of n tokens is n tokens of each head of keys; programs that
expand heads of keys to those of queries before they prune keep as many times more. Positions ascend. Everything is chosen once,
after a prefill: none of this is a cache that evicts while it grows.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import numpy as np

from pqcodec.errors import InvalidArgument
from pqcodec.tensors import arrays

_AT_ONCE = 1 << 22  # scores


def received_attention(q: Any, keys: Any, *, scale: float | None = None) -> np.ndarray:
    """The attention that each token gets from queries at the end of the tokens: float32 [..., kv_heads, tokens].

    ``q`` [..., q_heads, queries, head_dim] and ``keys`` [..., kv_heads, tokens, head_dim], both after RoPE: softmax of
    <q, k> ``scale`` (head_dim^-0.5 if None) over the tokens up to each query's own, summed over queries, and over the heads of
    queries that share a head of keys. Raises InvalidArgument.

    >>> q, keys = np.zeros((2, 1, 8), np.float32), np.zeros((1, 4, 8), np.float32)  # two heads of queries, one of keys
    >>> received_attention(q, keys).tolist()
    [[0.5, 0.5, 0.5, 0.5]]
    """
    queries, k = queries_and_keys(q, keys)
    (heads, count, head_dim), (kv_heads, tokens) = queries.shape[-3:], k.shape[-3:-1]
    if not kv_heads or heads % kv_heads or not 0 < count <= tokens:
        raise InvalidArgument(
            f"{heads} heads of {count} queries do not go with {kv_heads} heads of {tokens} keys: "
            f"a multiple of heads, and at most as many queries, are expected"
        )
    if scale is not None and (not isinstance(scale, Real) or isinstance(scale, bool) or not np.isfinite(scale)):
        raise InvalidArgument(f"scale {scale!r} is no finite number")
    grouped = queries.reshape(-1, heads // kv_heads, count, head_dim) * np.float32(head_dim**-0.5 if scale is None else scale)
    found = np.zeros((len(grouped), tokens))
    step = max(1, _AT_ONCE // (tokens * (heads // kv_heads)))
    for lead, x in enumerate(k.reshape(-1, tokens, head_dim)):
        for first in range(0, count, step):
            part = grouped[lead, :, first : first + step]
            own = tokens - count + first + np.arange(part.shape[1])
            scores = np.where(np.arange(tokens) <= own[:, None], part @ x.T, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            found[lead] += (weights / weights.sum(-1, keepdims=True)).sum((0, 1), dtype=np.float64)
    if not np.isfinite(found).all():
        raise InvalidArgument("q or keys hold NaN or Inf: no token is worth more than another")
    return found.reshape(*k.shape[:-1]).astype(np.float32)


def queries_and_keys(q: Any, keys: Any) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of ``q`` [..., q_heads, queries, head_dim] and ``keys`` [..., kv_heads, tokens, head_dim], as float32.

    Raises InvalidArgument where they do not go together.
    """
    queries, k = arrays.numbers_of(q), arrays.numbers_of(keys)
    if min(queries.ndim, k.ndim) < 3 or queries.shape[:-3] != k.shape[:-3] or queries.shape[-1] != k.shape[-1]:
        raise InvalidArgument(
            f"q {queries.shape} does not go with keys {k.shape}; [..., q_heads, queries, head_dim] and "
            f"[..., kv_heads, tokens, head_dim] are expected"
        )
    return queries, k


def snapkv(q: Any, keys: Any, n: int, *, pool: int = 7, scale: float | None = None) -> Any:
    """The n tokens that SnapKV keeps (arXiv 2404.14469, as its authors' code does): int64 [..., kv_heads, n].

    ``q``: the last w queries of a prompt (32 there), other arguments as of ``received_attention``. What tokens before the last
    w receive is pooled, the largest of ``pool`` neighbours each; the n - w tokens of most are kept, and the last w. Of equals
    the first ones. All tokens where there are no more than n. Of the kind of ``q``, numpy's or torch's. Raises InvalidArgument.

    >>> rng = np.random.default_rng(0)
    >>> q, keys = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 8, 64), (2, 100, 64)))
    >>> positions = snapkv(q, keys, 20)
    >>> positions.shape, positions[:, -8:].tolist() == 2 * [list(range(92, 100))]
    ((2, 20), True)
    """
    received = received_attention(q, keys, scale=scale)
    window, tokens = q.shape[-2], received.shape[-1]
    _check_number("pool", pool, 1, None)
    if pool % 2 == 0:
        raise InvalidArgument(f"pool {pool} is even; an odd number of neighbours, the token in their middle, is expected")
    before = np.pad(received[..., : tokens - window], [(0, 0)] * (received.ndim - 1) + [(pool // 2,) * 2], constant_values=-1)
    pooled = np.lib.stride_tricks.sliding_window_view(before, pool, -1).max(-1) if tokens > window else received[..., :0]
    return arrays.alike(q, _most_and_last(pooled, n, window, tokens), keep_dtype=False)


def h2o(q: Any, keys: Any, n: int, *, recent: int | None = None, scale: float | None = None) -> Any:
    """The n tokens that H2O keeps after a prefill (arXiv 2306.14048): heavy hitters, and the last ``recent``, n // 2 if None.

    ``q``: the queries whose attention counts, in the paper those of all tokens; the rest is as of ``snapkv``. The paper evicts
    token by token, and what an evicted token would have received later is lost; here all queries see all.
    """
    received = received_attention(q, keys, scale=scale)
    tokens = received.shape[-1]
    _check_number("n", n, 1, None)
    last = n // 2 if recent is None else recent
    _check_number("recent", last, 0, None)
    last = min(last, tokens)
    return arrays.alike(q, _most_and_last(received[..., : tokens - last], n, last, tokens), keep_dtype=False)


def streaming_llm(tokens: int, n: int, *, first: int = 4) -> np.ndarray:
    """The first tokens and the last ones, n in all, as StreamingLLM keeps them (arXiv 2309.17453): int64 [n], of all heads.

    >>> streaming_llm(100, 8).tolist()
    [0, 1, 2, 3, 96, 97, 98, 99]
    """
    _check_number("tokens", tokens, 0, None)
    _check_number("n", n, 0, None)
    _check_number("first", first, 0, n)
    if n >= tokens:
        return np.arange(tokens)
    return np.concatenate([np.arange(first), np.arange(tokens - n + first, tokens)])


def pyramid_budgets(n: int, layers: int, *, window: int = 8, beta: float = 20) -> list[int]:
    """Tokens for each layer, n on average, fewer in later layers, as PyramidKV shares them (arXiv 2406.02069).

    The last layer gets ``window`` and one ``beta``-th of n - window more, the first as much above n as that is below it, those
    between them lie on a line. Rounded so that all together are n times ``layers``, which the authors' integers are nearly. The
    tokens themselves are then chosen by ``snapkv`` with as many queries as ``window``. Raises InvalidArgument.

    >>> pyramid_budgets(128, 4), sum(pyramid_budgets(128, 4)) == 4 * 128
    ([242, 166, 90, 14], True)
    """
    _check_number("layers", layers, 1, None)
    _check_number("window", window, 0, None)
    _check_number("n", n, window, None)
    if not isinstance(beta, Real) or isinstance(beta, bool) or not 1 <= beta < float("inf"):
        raise InvalidArgument(f"beta {beta!r}: a number from 1 on is expected")
    least = (n - window) / beta
    exact = window + (np.linspace(2 * (n - window) - least, least, layers) if layers > 1 else np.array([float(n - window)]))
    whole = np.floor(exact + 1e-9).astype(np.int64)
    short = n * layers - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:short]] += 1
    return whole.tolist()  # type: ignore[no-any-return]


def _most_and_last(scores: np.ndarray, n: int, last: int, tokens: int) -> np.ndarray:
    """The n - last tokens of the largest scores [..., tokens - last], and the last ones: int64 [..., n], ascending."""
    _check_number("n", n, last, None)
    if n >= tokens:
        return np.broadcast_to(np.arange(tokens), (*scores.shape[:-1], tokens)).copy()
    chosen = np.sort(np.argsort(-scores, axis=-1, kind="stable")[..., : n - last], axis=-1)
    behind = np.broadcast_to(np.arange(tokens - last, tokens), (*scores.shape[:-1], last))
    return np.concatenate([chosen, behind], -1)


def _check_number(name: str, value: Any, least: Any, most: Any) -> None:
    """Raises InvalidArgument for what is no whole number in its range."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InvalidArgument(f"{name} {value!r} is no whole number")
    if value < least or (most is not None and value > most):
        raise InvalidArgument(f"{name} {value}: {least} {'or more' if most is None else f'to {most}'} is expected")
