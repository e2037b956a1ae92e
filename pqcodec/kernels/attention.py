"""Law: attention over coded tokens, as formulas: the work of a backend, its parts and how they merge, the reference in numpy.

A decoded key is k_t = A_t B_t R^T v_t + m_t (SPEC 5, 6.5, 9): v_t are the whole numbers that the coding looks up, R is the
rotation, m_t the offset. So its score <k_t, q> = A_t B_t <v_t, R q> + <m_t, q> needs R once a query, and never a key. Nor does
a value: sum p_t (A_t B_t R^T v_t + m_t) = R^T (sum p_t A_t B_t v_t) + sum p_t m_t. Nothing is rounded to the tensor's dtype.
Source: arXiv 2502.02617, whose two kernels these sums are; the parts of a softmax are those of arXiv 2205.14135, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import reduce
from numbers import Integral, Real
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import sketch
from pqcodec.codings.plan import plan_for
from pqcodec.codings.registry import CODINGS
from pqcodec.errors import InvalidArgument
from pqcodec.kernels.job import Backend, DecodeJob
from pqcodec.stages import centre
from pqcodec.stages.keep import places_of
from pqcodec.stream.checksum import checksum
from pqcodec.stream.header import Header
from pqcodec.stream.index import Bounds
from pqcodec.stream.report import Damage
from pqcodec.tensors.numbers import is_torch
from pqcodec.tensors.rows import values_of


# -- parts of a softmax ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Partial:
    """Attention to a part of the tokens, as arrays of numpy or tensors of torch; parts merge in any order.

    ``out``: the sum of exp(score - maximum) times the value, [..., head_dim]. ``maximum``: the largest score, -inf where no
    token of the part is seen. ``total``: the sum of exp(score - maximum), [...].

    >>> one = Partial(np.array([[2.0]]), np.array([0.0]), np.array([1.0]))
    >>> two = Partial(np.array([[6.0]]), np.array([np.log(3.0)]), np.array([1.0]))
    >>> one.merge(two).result().round(6).tolist()  # (1 * 2 + 3 * 6) / (1 + 3)
    [[5.0]]
    """

    out: Any
    maximum: Any
    total: Any

    def merge(self, other: Partial) -> Partial:
        """Attention to the tokens of both parts."""
        lib = _library(self.out)
        maximum = lib.maximum(self.maximum, other.maximum)
        mine, its = (_weight(lib, part.maximum, maximum) for part in (self, other))
        out = mine[..., None] * self.out + its[..., None] * other.out
        return Partial(out, maximum, mine * self.total + its * other.total)

    def result(self) -> Any:
        """The mean of the values by their weights: [..., head_dim]."""
        return self.out / self.total[..., None]


def merged(parts: Sequence[Partial]) -> Partial:
    """All parts as one, from the first to the last."""
    with np.errstate(invalid="ignore", over="ignore"):
        return reduce(Partial.merge, parts)


def _library(x: Any) -> Any:
    if not is_torch(x):
        return np
    import torch

    return torch


def _weight(lib: Any, part: Any, maximum: Any) -> Any:
    """exp(part - maximum), 0 for a part that holds nothing."""
    return lib.where(part == -np.inf, lib.zeros_like(part), lib.exp(part - maximum))


# -- the work ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ExactRows:
    """Vectors that a stream holds exactly beside its coded rows, which they replace: n of them, by leading index and token."""

    leads: np.ndarray  # int64 [n]
    tokens: np.ndarray  # int64 [n], of the tensor
    vectors: np.ndarray  # float32 [n, head_dim]

    def within(self, tokens: Bounds) -> ExactRows:
        """Those of some tokens."""
        wanted = (self.tokens >= tokens[0]) & (self.tokens < tokens[1])
        return ExactRows(self.leads[wanted], self.tokens[wanted], self.vectors[wanted])


@dataclass(frozen=True)
class CodedTokens:
    """The blocks of some chunks of a stream, all leading indices, and what their rows need beside themselves."""

    header: Header
    payload: np.ndarray  # uint8 [n]: the blocks, chunk by chunk
    chunks: Bounds
    offsets: np.ndarray | None  # float32 [leading, head_dim]
    exact: ExactRows  # those of the job's tokens
    positions: np.ndarray | None = None  # as in a ``DecodeJob``

    def within(self, tokens: Bounds) -> CodedTokens:
        """The blocks that hold some of these tokens of the tensor."""
        h = self.header
        chunks = h.blocks.of_tokens(tokens[0] - h.first_tokens, tokens[1] - h.first_tokens)
        start, size = h.blocks.span((chunks[0], 0), (chunks[1] - 1, h.leading - 1))
        start -= h.blocks.place(self.chunks[0], 0)
        return replace(self, payload=self.payload[start : start + size], chunks=chunks, exact=self.exact.within(tokens))

    def block(self, chunk: int, lead: int) -> np.ndarray:
        """Bytes of a block with its checksum."""
        blocks = self.header.blocks
        start = blocks.place(chunk, lead) - blocks.place(self.chunks[0], 0)
        return self.payload[start : start + blocks.size(chunk)]

    def rows(self, tokens: Bounds) -> Iterator[tuple[int, Bounds, int]]:
        """Of each chunk: its number, the rows that some tokens of the tensor are, and the first one's place among these."""
        h = self.header
        for chunk in range(*self.chunks):
            start = h.first_tokens + h.blocks.first_token(chunk)
            low, high = max(tokens[0] - start, 0), min(tokens[1] - start, h.blocks.tokens(chunk))
            if low < high:
                yield chunk, (low, high), start + low - tokens[0]


@dataclass(frozen=True)
class AttentionJob:
    """Queries against coded tokens; ``values`` is None where only scores are asked for.

    ``queries``: [leading, rows, head_dim], times the scale; a row is a query of a head that shares keys of a leading index.
    ``tokens``: of the tensor, all of them coded. ``bounds``: the tokens of the tensor that each row sees, first and last + 1.
    ``softcap``: scores become softcap tanh(score / softcap); 0 for none. ``damage`` gets blocks whose checksum does not hold.
    """

    keys: CodedTokens
    values: CodedTokens | None
    queries: np.ndarray
    tokens: Bounds
    bounds: np.ndarray  # int64 [rows, 2]
    softcap: float
    check: bool
    damage: list[Damage]

    @property
    def coded(self) -> list[CodedTokens]:
        """The keys, and the values where they are wanted."""
        return [self.keys] if self.values is None else [self.keys, self.values]


# -- what may be asked -------------------------------------------------------------------------------------------
def checked_window(window: Any) -> int | None:
    """A window of at least one token, or None; raises InvalidArgument."""
    if window is not None and (not isinstance(window, Integral) or isinstance(window, bool) or window < 1):
        raise InvalidArgument(f"window {window!r}: a whole number of at least 1 is expected, or None")
    return None if window is None else int(window)


def checked_softcap(softcap: Any) -> float:
    """A softcap that float32 holds with all digits, 0 for None; raises InvalidArgument."""
    least, most = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
    if softcap is not None and not least <= checked_number("softcap", softcap) <= most:
        raise InvalidArgument(f"softcap {softcap} is outside {least:.3g} .. {most:.3g}; pass None for none")
    return float(softcap or 0)


def checked_number(name: str, value: Any) -> float:
    """A finite number; raises InvalidArgument."""
    with suppress(OverflowError):  # of a whole number beyond float64
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    raise InvalidArgument(f"{name} {value!r} is no finite number")


# -- the formulas ------------------------------------------------------------------------------------------------
def softcapped(scores: np.ndarray, softcap: float) -> np.ndarray:
    """softcap tanh(scores / softcap), or the scores where there is none."""
    if not softcap:
        return scores
    with np.errstate(over="ignore"):
        return softcap * np.tanh(scores / softcap)


def seen_by(bounds: np.ndarray, tokens: Bounds) -> np.ndarray:
    """Which tokens each row sees, bool [rows, tokens]."""
    token = np.arange(*tokens)
    return (token >= bounds[:, :1]) & (token < bounds[:, 1:])


def weights_of(scores: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """exp(score - maximum) of what is seen, 0 of the rest, [..., rows, tokens]; and the maximum, [..., rows]."""
    scores = np.where(seen, scores, -np.inf)
    maximum = scores.max(-1, initial=-np.inf)
    some = seen & (scores > -np.inf) | np.isnan(scores)  # else all weights of a part whose scores are all -inf would be NaN
    with np.errstate(invalid="ignore", over="ignore"):  # of inf - inf
        return np.where(some, np.exp(scores - maximum[..., None]), 0), maximum


def exact_part(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, bounds: np.ndarray, softcap: float) -> Partial:
    """Attention to exact tokens: keys [leading, tokens, head_dim] and values of ``queries``' dtype; see ``AttentionJob``.

    A value with NaN or Inf counts only for rows that see it.
    """
    seen = seen_by(bounds, (0, keys.shape[1]))
    weights, maximum = weights_of(softcapped(exact_scores(queries, keys), softcap), seen)
    finite = np.isfinite(values).all(-1)
    with np.errstate(over="ignore"):
        out = weights @ np.where(finite[..., None], values, 0)
    for lead, token in np.argwhere(~finite):
        add_exact(out[lead], weights[lead, :, token], seen[:, token], values[lead, token])
    return Partial(out, maximum, weights.sum(-1))


def exact_scores(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """<k, q> of exact keys: [leading, rows, tokens]."""
    with np.errstate(invalid="ignore", over="ignore"):
        return queries @ keys.swapaxes(-1, -2)


def add_exact(out: np.ndarray, weights: np.ndarray, seen: np.ndarray, value: np.ndarray) -> None:
    """Add weights [rows] times one value [head_dim] to the rows that see it, out [rows, head_dim]."""
    with np.errstate(invalid="ignore", over="ignore"):
        out[seen] += weights[seen, None] * value.astype(out.dtype)


# -- some tokens at a time ---------------------------------------------------------------------------------------
_RUN = 1024  # tokens that are worked on at once: few enough that they stay in a core's own cache


def scores_by_decoding(job: AttentionJob, kernel: Backend) -> np.ndarray:
    """Scores of the job's tokens, whose keys a backend decodes some at a time: [leading, rows, tokens]."""
    found = [exact_scores(job.queries, _vectors(job, job.keys, tokens, kernel)) for tokens in runs_of(job)]
    return softcapped(np.concatenate(found, -1), job.softcap)


def attend_by_decoding(job: AttentionJob, kernel: Backend) -> Partial:
    """Attention to the job's tokens, which a backend decodes some at a time."""
    assert job.values is not None
    parts = []
    for tokens in runs_of(job):
        keys, values = (_vectors(job, coded, tokens, kernel) for coded in (job.keys, job.values))
        parts.append(exact_part(job.queries, keys, values, job.bounds - tokens[0], job.softcap))
    return merged(parts)


def runs_of(job: AttentionJob) -> Iterator[Bounds]:
    """Runs of the job's tokens that begin with a chunk of the keys, but for the first one."""
    h, (first, last) = job.keys.header, job.tokens
    step = -(-_RUN // h.chunk_tokens) * h.chunk_tokens
    low = first
    while low < last:
        high = min(last, low + step - (low - h.first_tokens) % h.chunk_tokens)
        yield low, high
        low = high


def _vectors(job: AttentionJob, coded: CodedTokens, tokens: Bounds, kernel: Backend) -> np.ndarray:
    damage = job.damage if job.check else []
    return decoded_rows(coded.within(tokens), tokens, kernel, damage).astype(job.queries.dtype, copy=False)


def decoded_rows(coded: CodedTokens, tokens: Bounds, kernel: Backend, damage: list[Damage]) -> np.ndarray:
    """Some coded tokens as vectors, decoded by a backend but not rounded to the tensor's dtype: float32 [leading, n, head_dim].

    Blocks are checked; ``damage`` gets those whose checksum does not hold.
    """
    h = replace(coded.header, dtype=c.DTYPE_FLOAT32)
    out = np.empty((h.leading, tokens[1] - tokens[0], h.head_dim), np.float32)
    damaged = np.zeros((coded.chunks[1] - coded.chunks[0], h.leading), np.bool_)
    places = coded.chunks[0], coded.chunks[1], 0, h.leading
    kernel.decode([DecodeJob(h, coded.payload, *places, *tokens, coded.offsets, values_of(out), damaged, coded.positions)])
    damage += [block_damage(h, coded.chunks[0] + int(chunk), int(lead)) for chunk, lead in np.argwhere(damaged)]
    exact = coded.exact.within(tokens)
    out[exact.leads, exact.tokens - tokens[0]] = exact.vectors
    return out


# -- the reference -----------------------------------------------------------------------------------------------
def coded_scores(job: AttentionJob) -> np.ndarray:
    """Scores of the job's tokens, also of those that a row does not see: float64 [leading, rows, tokens]."""
    coded, q = job.keys, job.queries.astype(np.float64)
    h, plan = coded.header, plan_for(coded.header)
    turned = q @ plan.matrix[:, : h.head_dim].T  # R q
    found = np.zeros((*q.shape[:2], job.tokens[1] - job.tokens[0]))
    for chunk, rows, at in coded.rows(job.tokens):
        for lead in range(h.leading):
            if h.sketch:
                scores = sketch.estimates(_checked_body(job, coded, chunk, lead), h.blocks.tokens(chunk), rows, plan, q[lead])
            else:
                units, factors = decoded_units(job, coded, chunk, lead, rows)
                scores = turned[lead] @ units.T * factors
            if coded.offsets is not None:
                scores += q[lead] @ offsets_of_rows(coded, chunk, lead, rows).T
            found[lead, :, at : at + scores.shape[1]] = scores
    for lead, token, key in zip(coded.exact.leads, coded.exact.tokens, coded.exact.vectors, strict=True):
        found[lead, :, token - job.tokens[0]] = exact_scores(q[lead], key[None].astype(np.float64))[:, 0]
    return softcapped(found, job.softcap)


def score_variances(job: AttentionJob) -> np.ndarray:
    """Of the scores of keys that are sketches, at most: float64 [leading, rows, tokens]; 0 of exact vectors."""
    coded, q = job.keys, job.queries.astype(np.float64)
    h, plan = coded.header, plan_for(coded.header)
    found = np.zeros((*q.shape[:2], job.tokens[1] - job.tokens[0]))
    for chunk, rows, at in coded.rows(job.tokens):
        for lead in range(h.leading):
            each = sketch.variances(_checked_body(job, coded, chunk, lead), h.blocks.tokens(chunk), rows, plan, q[lead])
            found[lead, :, at : at + each.shape[1]] = each
    found[coded.exact.leads, :, coded.exact.tokens - job.tokens[0]] = 0
    return found


def attend_to_coded(job: AttentionJob) -> Partial:
    """Attention to the job's tokens: float64 [leading, rows, head_dim of the values]."""
    assert job.values is not None
    coded, seen = job.values, seen_by(job.bounds, job.tokens)
    h, plan = coded.header, plan_for(coded.header)
    weights, maximum = weights_of(coded_scores(job), seen)
    total, exact = weights.sum(-1), []
    for lead, token in zip(coded.exact.leads, coded.exact.tokens - job.tokens[0], strict=True):
        exact.append(weights[lead, :, token].copy())
        weights[lead, :, token] = 0  # the exact vector's, not the coded row's
    turned = np.zeros((*weights.shape[:2], h.order))  # sum p A B v
    offset = np.zeros((*weights.shape[:2], h.head_dim))  # sum p m
    for chunk, rows, at in coded.rows(job.tokens):
        for lead in range(h.leading):
            units, factors = decoded_units(job, coded, chunk, lead, rows)
            p = weights[lead, :, at : at + len(units)]
            turned[lead] += p * factors @ units
            if coded.offsets is not None:
                offset[lead] += p @ offsets_of_rows(coded, chunk, lead, rows)
    out = turned @ plan.matrix[:, : h.head_dim] + offset
    for lead, token, p, value in zip(coded.exact.leads, coded.exact.tokens, exact, coded.exact.vectors, strict=True):
        add_exact(out[lead], p, seen[:, token - job.tokens[0]], value)
    return Partial(out, maximum, total)


def decoded_units(job: AttentionJob, coded: CodedTokens, chunk: int, lead: int, rows: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """v and A B of some rows of a block, float64 [n, order] and [n]; ``job.damage`` tells if its checksum does not hold."""
    h, body = coded.header, _checked_body(job, coded, chunk, lead)
    units, first, second = CODINGS[h.coding].decode(
        body, h.blocks.tokens(chunk), rows, plan_for(h).for_lead(lead), h.radius_exponent
    )
    return units.astype(np.float64), first.astype(np.float64) * second


def _checked_body(job: AttentionJob, coded: CodedTokens, chunk: int, lead: int) -> np.ndarray:
    """Bytes of a block without its checksum; ``job.damage`` tells if that does not hold."""
    block = coded.block(chunk, lead)
    body = block[: -c.CHECKSUM_BYTES]
    if job.check and checksum(body) != block[-c.CHECKSUM_BYTES :].view("<u4")[0]:
        job.damage.append(block_damage(coded.header, chunk, lead))
    return body


def block_damage(h: Header, chunk: int, lead: int) -> Damage:
    """A block whose checksum does not hold."""
    start = h.first_tokens + h.blocks.first_token(chunk)
    return Damage("payload", lead, (start, start + h.blocks.tokens(chunk)))


def offsets_of_rows(coded: CodedTokens, chunk: int, lead: int, rows: Bounds) -> np.ndarray:
    """The offsets of some rows of a block, float64 [n, head_dim]."""
    assert coded.offsets is not None
    tokens = coded.header.first_tokens + coded.header.blocks.first_token(chunk) + np.arange(*rows)
    places = places_of(coded.positions, lead, tokens)
    return centre.offset_of_coded(coded.header, coded.offsets[lead], places).astype(np.float64)
