"""Law: codebooks of residual VQ, trained on a model's own keys or values (A. Kumar, arXiv 2410.15704, section 3).

Each stage is fitted to what the stages before it leave: k-means on a sample, then averages that move with batches of all
vectors. Searches are those of encoders, and sums have a fixed order (cumsum, bincount), so a seed gives one table everywhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.backends import backend as backend_of
from pqcodec.backends import on_device
from pqcodec.codings import paper
from pqcodec.codings.residual import Search, scaled_groups
from pqcodec.codings.vectors import Book
from pqcodec.errors import BackendUnavailable, InvalidArgument
from pqcodec.options import Progress, check_numbers
from pqcodec.stages.centre import PAIRINGS
from pqcodec.stream.prng import splitmix64
from pqcodec.stream.tables import VectorTable
from pqcodec.tensors import arrays

_SAMPLE = 100_000  # groups that k-means takes, at the most
_ROUNDS = 10  # of k-means
_BATCH = 8192  # groups by which averages move once
_DECAY, _LAPLACE, _MOST = 0.99, 1e-5, 100.0  # of moving averages; what each weight has more; magnitude of an entry
_ALL = 1 << 20  # groups that are trained on, at the most: 128 MiB of 32 channels
LEAST = 30  # groups of channels for each entry: with fewer the error on other texts grows


def train_vq(
    tensors: Any,
    *,
    stages: int = 8,
    entries: int = 2048,
    group: int = 32,
    strided: bool = False,
    pairing: str = "half",
    rope_dim: int | None = None,
    seed: int = 0,
    least: float = LEAST,
    backend: str = "auto",
    progress: Progress | None = None,
) -> VectorTable:
    """Codebooks for ``encode(preset="rvq8", codebooks=)``, trained on keys or on values, of one layer or of more.

    ``tensors``: one or a list of them, [..., tokens, head_dim], of one head_dim; vectors with NaN or Inf, and zero vectors, are
    left out. ``stages`` 1 .. 8 codebooks of ``entries`` (16, 32 ... 4096) for groups of ``group`` channels (8, 16, 32 or 64,
    which divides head_dim). ``strided``: a group is every (head_dim / group)-th channel, the paper's choice for keys, and else
    neighbours. Channels are counted in the order in which RoPE pairs them: with ``pairing`` "half" channel i stands beside
    i + rope_dim/2 (``rope_dim``: channels that RoPE turns, None for all). Fewer than ``least`` groups an entry are refused.
    100,000 groups take about 5 seconds of a core a stage; eight times as many take four times as long, and err 5 to 10 % less
    on other texts of a model. Raises InvalidArgument or BackendUnavailable.

    >>> x = np.random.default_rng(0).standard_normal((2, 300, 16)).astype(np.float32)
    >>> table = train_vq(x, stages=2, entries=16, group=8, backend="reference")
    >>> from pqcodec import decode, encode
    >>> y = decode(encode(x, preset="rvq2", codebooks=table, backend="reference"), tables=table, backend="reference")
    >>> bool(0.2 < ((x - y) ** 2).sum() / (x**2).sum() < 0.6)
    True
    """
    check_numbers(seed=seed)
    counts = [1 << bits for bits in c.RESIDUAL_INDEX_BITS]
    for name, value, possible in (
        ("stages", stages, c.RESIDUAL_STAGES),
        ("entries", entries, counts),
        ("group", group, c.RESIDUAL_GROUPS),
    ):
        if value not in possible:
            raise InvalidArgument(f"{name} {value!r}: {', '.join(map(str, possible))} are possible")
    rows = _rows(tensors)
    channels = group_channels(rows.shape[1], group, strided, pairing, rope_dim)
    groups = rows.size // group
    if groups < max(least * entries, 1):
        raise InvalidArgument(
            f"{groups} groups of channels for {entries} entries; at least {least:g} an entry are expected: give more tokens, "
            f"or fewer entries (or least=, and look at the error on other texts)"
        )
    if on_device(backend):
        raise BackendUnavailable(f"backend {backend!r} trains no codebooks; choose 'cpu' or 'reference'")
    x = _drawn(rows, channels, group, seed)
    search = _Counted(backend_of(backend, "cpu").nearest, stages * (_ROUNDS + 2 + -(-len(x) // _BATCH)), progress)
    found = np.empty((stages, entries, group), np.float16)
    for stage in range(stages):
        found[stage] = _fitted(x, entries, search)
        book = Book(found[stage].astype(np.float32))
        x -= book.entries[search(x, book)]
    return VectorTable(found, channels)


def group_channels(head_dim: int, group: int, strided: bool, pairing: str = "half", rope_dim: int | None = None) -> np.ndarray:
    """The channels of the groups of ``train_vq``, one group behind the other: int64 [head_dim]; raises InvalidArgument.

    >>> group_channels(8, 2, True, "half").tolist(), group_channels(8, 2, True, "interleaved").tolist()
    ([0, 2, 4, 6, 1, 3, 5, 7], [0, 4, 1, 5, 2, 6, 3, 7])
    """
    if pairing not in PAIRINGS:
        raise InvalidArgument(f"pairing {pairing!r} is unknown; choose {' or '.join(map(repr, PAIRINGS))}")
    turned = head_dim if rope_dim is None else rope_dim
    if turned % 2 or not 0 < turned <= head_dim:
        raise InvalidArgument(f"RoPE that turns {rope_dim} channels of {head_dim}; an even number of them is expected")
    if group < 1 or head_dim % group:
        raise InvalidArgument(f"groups of {group} channels do not divide head_dim {head_dim}")
    order = np.arange(head_dim)
    if strided and pairing == "half":
        order[:turned] = order[:turned].reshape(2, -1).T.ravel()
    return order.reshape(group, -1).T.ravel() if strided else order


def _rows(tensors: Any) -> np.ndarray:
    """All vectors of tensors that are finite, float32 [n, head_dim]; raises InvalidArgument."""
    found: list[np.ndarray] = []
    for number, x in enumerate(tensors if isinstance(tensors, (list, tuple)) else [tensors]):
        rows = arrays.numbers_of(x)
        if rows.ndim < 2 or (found and rows.shape[-1] != found[0].shape[-1]):
            raise InvalidArgument(
                f"tensor {number} is {rows.shape}; [..., tokens, head_dim] of one head_dim is expected of all"
            )
        rows = rows.reshape(-1, rows.shape[-1])
        found.append(rows[np.isfinite(rows).all(1) & rows.any(1)])
    if not found:
        raise InvalidArgument("no tensors are given; keys or values [..., tokens, head_dim] are expected")
    return np.concatenate(found)


def _drawn(rows: np.ndarray, channels: np.ndarray, group: int, seed: int) -> np.ndarray:
    """The groups to train on, over their rows' scales, in an order of the seed: float32 [n, channels of a group]."""
    count = len(channels) // group
    picked = np.argsort(splitmix64(seed, 0, len(rows)), kind="stable")[: _ALL // count]
    exponent = paper.radius_exponent(float(np.abs(rows).max(initial=0)), rows.shape[1])
    x = np.ldexp(rows[picked].astype(np.float64), -exponent).astype(np.float32)
    groups = scaled_groups(x, channels, count)[1]
    return groups[np.argsort(splitmix64(seed, 1 << 32, len(groups)), kind="stable")]


def _fitted(x: np.ndarray, count: int, search: Search) -> np.ndarray:
    """Entries float16 [count, channels] for vectors x [n, channels] in random order."""
    sample = x[:_SAMPLE]
    entries = sample[np.arange(count) % len(sample)]
    for _ in range(_ROUNDS):
        weights, sums, far = _assigned(sample, entries, search)
        empty = np.nonzero(weights == 0)[0][: len(sample)]
        entries = (sums / np.maximum(weights, 1)[:, None]).astype(np.float32)
        entries[empty] = sample[far[: len(empty)]]
    weights, sums, _ = _assigned(sample, entries, search)
    share = min(_BATCH, len(x)) / len(sample)
    weights, sums = weights * share, sums * share
    for first in range(0, len(x), _BATCH):
        here, its_sums, _ = _assigned(x[first : first + _BATCH], entries, search)
        weights, sums = _DECAY * weights + (1 - _DECAY) * here, _DECAY * sums + (1 - _DECAY) * its_sums
        total = np.cumsum(weights)[-1]
        smooth = (weights + _LAPLACE) / (total + count * _LAPLACE) * total
        entries = np.clip(sums / smooth[:, None], -_MOST, _MOST).astype(np.float32)
    return entries.astype(np.float16)


def _assigned(x: np.ndarray, entries: np.ndarray, search: Search) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How many of x each entry is nearest to, float64 [count], their sums [count, channels], and x from the farthest on."""
    codes = search(x, Book(entries))
    sums = [np.bincount(codes, column, len(entries)) for column in x.T.astype(np.float64)]
    far = np.argsort(-np.cumsum((x - entries[codes]) ** 2, 1)[:, -1], kind="stable")
    return np.bincount(codes, minlength=len(entries)).astype(np.float64), np.stack(sums, 1), far


class _Counted:
    """A search that counts its calls."""

    def __init__(self, search: Search, total: int, progress: Progress | None) -> None:
        self._search, self._done, self._total, self._progress = search, 0, total, progress

    def __call__(self, x: np.ndarray, book: Book) -> np.ndarray:
        found = self._search(x, book)
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)
        return found
