"""Law: attention to codes on the CPU: the work as records of its kernels, cut into parts that threads take in any order.

Parts depend on the streams alone and are merged in their order, so that a result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.plan import plan_for
from pqcodec.kernels.attention import (
    AttentionJob,
    CodedTokens,
    ExactRows,
    Partial,
    add_exact,
    block_damage,
    exact_scores,
    runs_of,
    softcapped,
)
from pqcodec.kernels.cpu import attention, tables
from pqcodec.kernels.cpu.records import (
    ATTENTION_ITEM,
    PART,
    ExactParts,
    PartSums,
    RowQueries,
    plain,
)
from pqcodec.stages import centre
from pqcodec.stream.checksum import checksum_keys
from pqcodec.stream.header import Header
from pqcodec.tensors.rows import address
from pqcodec.threads import threads

_MOST_ROWS = 32  # of queries of one leading index: beyond, every look-up is made so often that decoding once is quicker
_LEADS = 8  # of one task: they share the phases of RoPE
_CALLS = 4  # of a kernel, for each thread
_EXPONENTS = (-126, 127)  # of float32
_DOT_BITS = 17  # of a sum of 1024 points' coordinates: rotated queries are so many powers of two below 1
Run = Callable[[list[Callable[[], int]]], None]


def covers(job: AttentionJob) -> bool:
    """Whether the kernels take such values and so few rows of queries."""
    values = job.values
    if any(not coded.header.rounds or coded.positions is not None for coded in job.coded):
        return False
    return job.queries.shape[1] <= _MOST_ROWS and (values is None or values.header.rope is None)


def scores_of_codes(job: AttentionJob, run: Run) -> np.ndarray:
    """Scores of the job's tokens: float32 [leading, rows, tokens]."""
    (starts, most), h = _starts(job), job.keys.header
    found = np.empty((*job.queries.shape[:2], job.tokens[1] - job.tokens[0]), np.float32)
    items, ranges = _items(job.keys, job, starts)
    damaged = np.zeros((job.keys.chunks[1] - job.keys.chunks[0]) * h.leading, np.bool_)
    arguments = (items, h.leading, _decoders(h), tables.rope(h), _queries(job), _keys(job), job.check, damaged)
    parts = _parts(job, starts, ranges)
    _run_all(run, parts, lambda some: attention.score_parts(some, *arguments, most, job.tokens[0], found))
    _tell(job, job.keys, damaged)
    exact = job.keys.exact
    for lead, token, key in zip(exact.leads, exact.tokens - job.tokens[0], exact.vectors, strict=True):
        found[lead, :, token] = exact_scores(job.queries[lead], key[None])[:, 0]
    return softcapped(found, job.softcap)


def attend_to_codes(job: AttentionJob, run: Run) -> Partial:
    """Attention to the job's tokens: float64 [leading, rows, head_dim]."""
    values = job.values
    assert values is not None
    (starts, most), k, v = _starts(job), job.keys.header, values.header
    (key_items, of_keys), (value_items, of_values) = _items(job.keys, job, starts), _items(values, job, starts)
    (exact_keys, of_exact_keys), (exact_values, of_exact_values) = (_exact(x.exact, starts) for x in (job.keys, values))
    rows = job.queries.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):
        exactly = np.einsum("nrd,nd->nr", job.queries[exact_keys.leads], exact_keys.vectors).astype(np.float32)
    exact = ExactParts(
        _places(exact_keys, starts),
        exactly,
        _places(exact_values, starts),
        np.zeros((len(exact_values.leads), rows), np.float32),
    )
    shape = len(starts), k.leading, rows
    sums = PartSums(np.empty((*shape, v.order), np.float32), np.empty(shape[:2], np.int64), *np.empty((2, *shape), np.float32))
    damaged = [np.zeros((coded.chunks[1] - coded.chunks[0]) * k.leading, np.bool_) for coded in job.coded]
    arguments = (
        *(key_items, value_items, k.leading, _decoders(k), _decoders(v), tables.rope(k), _queries(job)),
        *(plain(exact), _keys(job), job.check, *damaged, plain(sums), most),
    )
    parts = _parts(job, starts, of_keys, of_values, of_exact_keys, of_exact_values)
    _run_all(run, parts, lambda some: attention.attend_parts(some, *arguments))
    for coded, found in zip(job.coded, damaged, strict=True):
        _tell(job, coded, found)
    return _merged(job, values, sums, exact_values, exact, starts)


def _run_all(run: Run, parts: np.ndarray, kernel: Callable[[np.ndarray], None]) -> None:
    def task(first: int, last: int) -> int:
        kernel(parts[first:last])
        return 0

    step = -(-len(parts) // (_CALLS * threads()))
    run([partial(task, first, first + step) for first in range(0, len(parts), max(step, 1))])


# -- the work as records -----------------------------------------------------------------------------------------------
def _starts(job: AttentionJob) -> tuple[np.ndarray, int]:
    """The first token of each part, int64 [parts], and the most tokens of one."""
    runs = list(runs_of(job))
    return np.array([low for low, _ in runs], np.int64), max(high - low for low, high in runs)


def _part_of(tokens: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The part of each token of the tensor."""
    return np.searchsorted(starts, tokens, "right") - 1


def _items(coded: CodedTokens, job: AttentionJob, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ATTENTION_ITEMs of a stream, part by part, and the first one of each part: int64 [parts + 1]."""
    h, (first, last) = coded.header, job.tokens
    chunks = np.arange(*coded.chunks)
    cuts = np.union1d(starts, np.clip(h.first_tokens + chunks * h.chunk_tokens, first, last - 1))
    part, chunk = _part_of(cuts, starts), (cuts - h.first_tokens) // h.chunk_tokens
    begin = h.first_tokens + chunk * h.chunk_tokens
    tokens = np.minimum(h.chunk_tokens, h.coded_tokens - chunk * h.chunk_tokens)
    items = np.zeros((len(cuts), len(ATTENTION_ITEM)), np.int64)
    items[:, ATTENTION_ITEM.tokens] = tokens
    items[:, ATTENTION_ITEM.low] = cuts - begin
    items[:, ATTENTION_ITEM.high] = np.append(cuts[1:], last) - begin
    items[:, ATTENTION_ITEM.source] = address(coded.payload) + (chunk - coded.chunks[0]) * h.leading * h.blocks.chunk_bytes
    items[:, ATTENTION_ITEM.size] = h.blocks.size_of(tokens)
    items[:, ATTENTION_ITEM.at] = cuts - starts[part]
    items[:, ATTENTION_ITEM.position] = begin + (h.rope.first_position % (1 << c.PHASE_BITS) if h.rope else 0)
    items[:, ATTENTION_ITEM.chunk] = chunk - coded.chunks[0]
    return items, np.searchsorted(part, np.arange(len(starts) + 1))


def _exact(exact: ExactRows, starts: np.ndarray) -> tuple[ExactRows, np.ndarray]:
    """Exact vectors part by part, and the first one of each part: int64 [parts + 1]."""
    part = _part_of(exact.tokens, starts)
    order = np.argsort(part, kind="stable")
    ordered = ExactRows(exact.leads[order], exact.tokens[order], exact.vectors[order])
    return ordered, np.searchsorted(part[order], np.arange(len(starts) + 1))


def _places(exact: ExactRows, starts: np.ndarray) -> np.ndarray:
    """Leading index, and place among the part's tokens: int64 [n, 2]."""
    return np.stack([exact.leads, exact.tokens - starts[_part_of(exact.tokens, starts)]], 1)


def _parts(job: AttentionJob, starts: np.ndarray, *ranges: np.ndarray) -> np.ndarray:
    """PARTs; ``ranges``: the first key of each part, then value, exact key and exact value, as many as there are."""
    leading, parts = job.keys.header.leading, len(starts)
    step = max(1, min(_LEADS, leading * parts // (2 * threads())))
    firsts = np.arange(0, leading, step)
    found = np.zeros((parts, len(firsts), len(PART)), np.int64)
    found[..., PART.tokens] = np.diff(starts, append=job.tokens[1])[:, None]
    for first, of_parts in zip(range(PART.first_key, PART.first_lead, 2), ranges, strict=False):
        found[..., first], found[..., first + 1] = of_parts[:-1, None], of_parts[1:, None]
    found[..., PART.first_lead], found[..., PART.last_lead] = firsts, np.minimum(firsts + step, leading)
    found[..., PART.part] = np.arange(parts)[:, None]
    found[..., PART.first_token] = starts[:, None]
    return found.reshape(-1, len(PART))


def _queries(job: AttentionJob) -> tuple:
    """A RowQueries."""
    coded, q = job.keys, job.queries.astype(np.float64)
    h, plan = coded.header, plan_for(coded.header)
    missing = -q.shape[1] % attention.ROWS
    q = np.pad(q, ((0, 0), (0, missing), (0, 0)))
    with np.errstate(over="ignore", invalid="ignore"):
        turned = q @ plan.matrix[:, : h.head_dim].T
        exponents = (np.frexp(np.abs(turned).max(-1))[1] + _DOT_BITS).clip(*_EXPONENTS)
        constants, phases = np.zeros(q.shape[:2]), np.zeros((*q.shape[:2], 0, 2))
        if coded.offsets is not None:
            m, still = coded.offsets.astype(np.float64)[:, None], 0
            if h.rope is not None:
                a, b = centre.pairs(h.rope)
                cos = q[..., a] * m[..., a] + q[..., b] * m[..., b]
                sin = q[..., b] * m[..., a] - q[..., a] * m[..., b]
                phases, still = np.stack([cos, sin], -1), h.rope.channels
            constants = (q[..., still:] * m[..., still:]).sum(-1)
        return plain(
            RowQueries(
                job.queries.shape[1],
                _grouped(turned * np.ldexp(1.0, -exponents)[..., None]),
                np.ldexp(1.0, exponents).astype(np.float32).ravel(),
                constants.astype(np.float32).ravel(),
                _grouped(phases.reshape(*phases.shape[:2], 2 * phases.shape[2])),
                job.bounds,
                np.float32(job.softcap),
            )
        )


def _grouped(x: np.ndarray) -> np.ndarray:
    """[leading, rows, n] -> float32 [leading, groups, n, 4], flat."""
    fours = x.reshape(len(x), x.shape[1] // attention.ROWS, attention.ROWS, x.shape[-1])
    return np.ascontiguousarray(fours.swapaxes(-1, -2), np.float32).ravel()


def _decoders(h: Header) -> tuple:
    """A RowDecoders."""
    mantissas = plan_for(h).mantissas
    _, split = tables.of_plan("decode", h.coding, h.head_dim, h.row_bits, h.radius_bits, h.seed, h.rounds)
    quads = tables.quads_decoder(h.coding, h.head_dim, h.row_bits, mantissas.tobytes())
    return h.coding, h.order, h.row_bytes, quads, split, tables.paper_decoder(h, mantissas[0])


def _keys(job: AttentionJob) -> np.ndarray:
    """Keys for the checksums of the blocks of all streams."""
    most = max(int(x.header.blocks.size_of(min(x.header.chunk_tokens, x.header.coded_tokens))) for x in job.coded)
    return checksum_keys(-(-most // 4) + 1)


# -- the results of parts ----------------------------------------------------------------------------------------------
def _tell(job: AttentionJob, coded: CodedTokens, damaged: np.ndarray) -> None:
    h = coded.header
    for chunk, lead in np.argwhere(damaged.reshape(-1, h.leading)) if damaged.any() else ():
        job.damage.append(block_damage(h, coded.chunks[0] + int(chunk), int(lead)))


def _merged(
    job: AttentionJob, values: CodedTokens, sums: PartSums, exact_values: ExactRows, exact: ExactParts, starts: np.ndarray
) -> Partial:
    """The parts as one, rotated back, with what the values' offsets and exact vectors add."""
    h, plan = values.header, plan_for(values.header)
    maximum = sums.maximum.max(0)
    with np.errstate(invalid="ignore"):
        shares = np.where(sums.maximum == -np.inf, 0, np.exp(sums.maximum.astype(np.float64) - maximum))
    total = (shares * sums.total).sum(0)
    weights = exact.weights * shares[_part_of(exact_values.tokens, starts), exact_values.leads]
    turned = np.einsum("plr,plrk->lrk", shares * np.ldexp(1.0, sums.exponents)[..., None], sums.out)
    out = turned @ plan.matrix[:, : h.head_dim]
    if values.offsets is not None:
        coded = total.copy()
        np.subtract.at(coded, exact_values.leads, weights)
        out += coded[..., None] * values.offsets[:, None]
    for lead, token, weight, value in zip(exact_values.leads, exact_values.tokens, weights, exact_values.vectors, strict=True):
        add_exact(out[lead], weight, (token >= job.bounds[:, 0]) & (token < job.bounds[:, 1]), value)
    return Partial(out, maximum, total)
