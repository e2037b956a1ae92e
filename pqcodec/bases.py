"""Law: which channels of keys and values, or directions among them, are worth keeping: what linear stages take.

Found from queries, weights of a model or tensors that the caller gives; a stream carries only what was found. Every basis is
float32 [rank, width], one direction a row; a vector's latents are ``vector @ basis.T``, and ``latents @ basis`` is what is kept
of it. Heads are joined: channel j of head h is number h * head_dim + j of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from numbers import Integral, Real
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.errors import InvalidArgument
from pqcodec.select import queries_and_keys
from pqcodec.stages.linear import block_basis, second_moment
from pqcodec.tensors import arrays

BLOCK = c.LINEAR_BLOCK  # neighbouring channels that share DecoQuant's factor


# -- channels ------------------------------------------------------------------------------------------------------
def channel_scores(q: Any, keys: Any) -> np.ndarray:
    """What each channel of keys adds to attention's scores, as ThinK has it: float32 [..., kv_heads, head_dim].

    ``q`` [..., q_heads, queries, head_dim] and ``keys`` [..., kv_heads, tokens, head_dim], both after RoPE: the mean square of
    a channel of the queries times that of the keys. Heads of queries that share a head of keys are summed; the authors' code
    has a mask for each head of queries, and so a copy of the keys. Raises InvalidArgument.

    >>> q, keys = np.ones((2, 3, 4), np.float32), np.float32([[[0, 1, 2, 3]]])
    >>> channel_scores(q, keys).tolist()
    [[0.0, 2.0, 8.0, 18.0]]
    """
    queries, k = queries_and_keys(q, keys)
    heads, kv_heads = queries.shape[-3], k.shape[-3]
    if not queries.size or not k.size or heads % kv_heads:
        raise InvalidArgument(f"q {queries.shape}, keys {k.shape}: numbers, and a multiple of heads of queries, are expected")
    asked, held = (np.square(x, dtype=np.float64).mean(-2) for x in (queries, k))
    found = asked.reshape(*k.shape[:-2], heads // kv_heads, k.shape[-1]).sum(-2) * held
    if not np.isfinite(found).all():
        raise InvalidArgument("q or keys hold NaN or Inf: no channel is worth more than another")
    return found.astype(np.float32)


def think(q: Any, keys: Any, dropped: float, *, pairs: str | None = None) -> np.ndarray:
    """The channels that ThinK keeps of keys (arXiv 2407.21018): uint16 [..., kv_heads, kept], ascending.

    The share ``dropped`` (lambda there) of channels with the least ``channel_scores`` goes, rounded down to whole channels; of
    equals the last ones. ``q``: the last queries of a prompt (32 there). ``pairs``: "half" or "interleaved" keeps or drops both
    channels that RoPE turns together, as must be where keys are coded before RoPE. Raises InvalidArgument.

    >>> keys = np.float32([[[1, 4, 2, 3]]])
    >>> think(keys, keys, 0.5).tolist(), think(keys, keys, 0.5, pairs="half").tolist()
    ([[1, 3]], [[1, 3]])
    """
    scores = channel_scores(q, keys)
    head_dim = scores.shape[-1]
    if not isinstance(dropped, Real) or isinstance(dropped, bool) or not 0 <= dropped < 1:
        raise InvalidArgument(f"dropped {dropped!r}: a share of the channels from 0 to below 1 is expected")
    if pairs is None:
        units = np.arange(head_dim)[:, None]
    elif pairs in _PAIRS and head_dim % 2 == 0:
        units = _PAIRS[pairs](np.arange(head_dim))
    else:
        raise InvalidArgument(
            f"pairs {pairs!r} of {head_dim} channels: None, or {' or '.join(map(repr, _PAIRS))} of an even number"
        )
    kept = len(units) - int(dropped * len(units) + 1e-9)
    best = np.argsort(-scores[..., units].sum(-1), axis=-1, kind="stable")[..., :kept]
    return np.sort(units[best].reshape(*scores.shape[:-1], -1), axis=-1).astype(np.uint16)


# which channels RoPE turns together: [pairs, 2]
_PAIRS = {"half": lambda channels: channels.reshape(2, -1).T, "interleaved": lambda channels: channels.reshape(-1, 2)}


# -- directions ----------------------------------------------------------------------------------------------------
def weight_basis(weight: Any, rank: int) -> np.ndarray:
    """The directions into which a layer's W_K or W_V reaches farthest, as LoRC truncates it (arXiv 2410.03111).

    ``weight`` [heads * head_dim, hidden]: what keys, before RoPE, or values are computed by. The basis is its first left
    singular vectors. Those of tensors (``data_basis``) lose a quarter as much where there are any. Raises InvalidArgument.

    >>> weight_basis(np.diag([1.0, 3, 2]), 2).tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    w = _matrix("weight", weight)
    _check_rank(rank, w.shape[0])
    return _upright(np.linalg.svd(w, full_matrices=False)[0].T, rank)


def data_basis(x: Any, rank: int, *, centred: bool = False) -> np.ndarray:
    """The directions of most energy among vectors [..., heads, tokens, head_dim]: their principal components.

    Keys are to be as they were before RoPE. ``centred``: around the vectors' mean, for streams that subtract it. Raises
    InvalidArgument.

    >>> x = np.zeros((1, 5, 3), np.float32)  # one head of five vectors (0, token, 1)
    >>> x[..., 1], x[..., 2] = np.arange(5), 1
    >>> data_basis(x, 1, centred=True).tolist()
    [[0.0, 1.0, 0.0]]
    """
    vectors = vectors_of_heads(x)
    _check_rank(rank, vectors.shape[1])
    if centred:
        vectors = vectors - vectors.mean(0)
    return _upright(second_moment(vectors, vectors.shape[1])[1], rank)


def vectors_of_heads(x: Any) -> np.ndarray:
    """Vectors [..., heads, tokens, head_dim], those of all heads side by side: float64 [vectors, heads * head_dim]."""
    numbers = arrays.numbers_of(x)
    if numbers.ndim < 3 or not numbers.size:
        raise InvalidArgument(f"x {numbers.shape}: some vectors [..., heads, tokens, head_dim] are expected")
    if not np.isfinite(numbers).all():
        raise InvalidArgument("x holds NaN or Inf: it has no directions")
    heads, head_dim = numbers.shape[-3], numbers.shape[-1]
    return numbers.swapaxes(-3, -2).reshape(-1, heads * head_dim).astype(np.float64)


def condition_number(weight: Any) -> float:
    """The largest singular value of a matrix over its least one, inf where that is 0. Raises InvalidArgument."""
    values = np.linalg.svd(_matrix("weight", weight), compute_uv=False)
    return float(values[0] / values[-1]) if values[-1] > 0 else float("inf")


def progressive_ranks(conditions: Sequence[tuple[float, float]], most: int, least: int) -> list[int]:
    """A rank for each layer, larger in shallow ones, whose errors all later layers amplify; as LoRC chooses them.

    ``conditions``: the ``condition_number`` of each layer's W_K and W_V. Ranks fall from ``most`` to ``least`` on a line in the
    logarithm of a layer's own condition numbers times those of all later layers. The rule is unconfirmed: it is told
    from memory of the paper, whose text and code could not be had. Raises InvalidArgument.

    >>> progressive_ranks([(100, 10), (10, 10), (10, 10)], 96, 48)
    [96, 67, 48]
    """
    _check_rank(most, None)
    _check_rank(least, most, "least")
    flat = np.array(conditions, np.float64).reshape(-1)
    if len(flat) != 2 * len(conditions) or not (np.isfinite(flat).all() and (flat >= 1).all()) or not len(flat):
        raise InvalidArgument(f"conditions {conditions!r:.60}: two finite numbers from 1 on of each layer are expected")
    logs = np.array(list(accumulate(np.log(flat).reshape(-1, 2).sum(1)[::-1]))[::-1])
    share = (logs - logs[-1]) / (logs[0] - logs[-1]) if logs[0] > logs[-1] else np.ones(len(logs))
    return np.rint(least + share * (most - least)).astype(int).tolist()  # type: ignore[no-any-return]


# -- blocks --------------------------------------------------------------------------------------------------------
def decoquant_factor(x: Any) -> np.ndarray:
    """The 16 x 16 factor of DecoQuant (arXiv 2405.12591) for vectors [..., heads, tokens, head_dim]: T_S, float32 [16, 16].

    Each 16 neighbouring channels of vectors, heads joined, are a row of a matrix U S V^T; T_S = S^(1/2) V^T stays as it is, and
    the rows' coordinates T_L = U S^(1/2), which are the rows times the inverse of T_S, are what is coded. Here the largest
    direction of T_S has length 1, and none less than 2^-10, so that it has an inverse in float16. Raises InvalidArgument.

    >>> x = np.random.default_rng(0).standard_normal((1, 100, 16)).astype(np.float32)
    >>> factor = decoquant_factor(x)
    >>> bool(np.allclose(x[0] @ np.linalg.inv(factor) @ factor, x[0], atol=1e-4))
    True
    """
    vectors = vectors_of_heads(x)
    if vectors.shape[1] % BLOCK:
        raise InvalidArgument(f"{vectors.shape[1]} channels of all heads: a multiple of {BLOCK} is expected")
    return block_basis(vectors).astype(np.float32)


def _upright(directions: np.ndarray, rank: int) -> np.ndarray:
    """The first ``rank`` directions, each with the sign that makes its number of the largest magnitude positive: float32."""
    kept = directions[:rank]
    largest = np.take_along_axis(kept, np.abs(kept).argmax(1)[:, None], 1)
    return (kept * np.where(largest < 0, -1, 1) + 0.0).astype(np.float32)


def _matrix(name: str, x: Any) -> np.ndarray:
    """A matrix of finite numbers, float64; raises InvalidArgument."""
    numbers = np.asarray(x.detach().cpu().double() if hasattr(x, "detach") else x, np.float64)
    if numbers.ndim != 2 or not numbers.size or not np.isfinite(numbers).all():
        raise InvalidArgument(f"{name} of shape {numbers.shape}: a matrix of finite numbers is expected")
    return numbers


def _check_rank(rank: Any, most: int | None, name: str = "rank") -> None:
    """Raises InvalidArgument for what is no whole number from 1 to ``most``."""
    whole = int(rank) if isinstance(rank, Integral) and not isinstance(rank, bool) else 0
    if whole < 1 or (most is not None and whole > most):
        raise InvalidArgument(f"{name} {rank!r}: a whole number from 1{'' if most is None else f' to {most}'} is expected")
