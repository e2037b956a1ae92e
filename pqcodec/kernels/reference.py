"""Law: the codec as SPEC.md and arXiv 2502.02617 tell it, in numpy; slow, and right by reading.

Read ``encode_block`` and ``decode_block``, and the coding's own module; the class at the foot walks them over a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import residual
from pqcodec.codings.plan import Plan, plan_for
from pqcodec.codings.registry import CODINGS
from pqcodec.codings.vectors import Book
from pqcodec.kernels import attention
from pqcodec.kernels.job import DecodeJob, EncodeJob, nobody, sampled
from pqcodec.stages import centre, rotation
from pqcodec.stages.keep import places_of
from pqcodec.stream.checksum import checksum
from pqcodec.stream.header import Header
from pqcodec.tensors.numbers import narrow, widen
from pqcodec.tensors.rows import Values

Encode = Callable[[np.ndarray, Plan, int, str], np.ndarray]  # as ``Coding.encode``


# -- rotation (SPEC 5) -------------------------------------------------------------------------------------------
def rotate(x: np.ndarray, plan: Plan) -> np.ndarray:
    """x float64 [n, order] -> H D x, or with two rounds H D P H E x; sqrt(energy_scale) times as long. No round: x itself."""
    if not plan.rounds:
        return x
    matrix = rotation.hadamard(plan.order).T.astype(np.float64)
    if plan.rounds == 2:
        x = ((x * plan.first_signs) @ matrix)[:, plan.permutation]
    return (x * plan.signs) @ matrix


def rotate_back(v: np.ndarray, plan: Plan) -> np.ndarray:
    """v [n, order] -> D H^T v, or with two rounds E H^T P^T D H^T v; all integers, but for v that was not rotated."""
    if not plan.rounds:
        return v
    v = v.astype(np.int64)
    matrix = rotation.hadamard(plan.order).astype(np.int64)
    s = v @ matrix * plan.signs.astype(np.int64)
    if plan.rounds == 1:
        return s
    between = np.empty_like(s)
    between[:, plan.permutation] = s
    return between @ matrix * plan.first_signs.astype(np.int64)


# -- blocks ------------------------------------------------------------------------------------------------------
def encode_block(x: np.ndarray, plan: Plan, radius_exponent: int, effort: str, code: Encode | None = None) -> np.ndarray:
    """Centred vectors float32 [tokens, head_dim] -> bytes of their block, without its checksum.

    Vectors that are not finite are zeros; for codings whose vectors share fields, which these must not widen, they are NaN.
    ``code``: in the place of the coding's own function.
    """
    padded = np.zeros((len(x), plan.order))
    padded[:, : plan.head_dim] = x
    v = rotate(padded, plan) / np.sqrt(plan.energy_scale)
    return (code or CODINGS[plan.coding].encode)(v, plan, radius_exponent, effort)


def decode_block(body: np.ndarray, tokens: int, rows: tuple[int, int], plan: Plan, radius_exponent: int) -> np.ndarray:
    """Bytes of a block of ``tokens`` vectors -> those of ``rows``, float32 [n, head_dim], before the offset is added."""
    units, first, second = CODINGS[plan.coding].decode(body, tokens, rows, plan, radius_exponent)
    sums = rotate_back(units, plan)
    with np.errstate(over="ignore"):  # beyond float32: infinite here, the largest finite value in ``narrow``
        return sums[:, : plan.head_dim].astype(np.float32) * first[:, None] * second[:, None] + np.float32(0)  # never -0


def encode_job_block(job: EncodeJob, plan: Plan, chunk: int, lead: int, code: Encode | None = None) -> None:
    """Fill in one block of a job, and mark its vectors that are not finite; ``code`` as in ``encode_block``."""
    h = job.header
    first, tokens = h.first_tokens + chunk * h.chunk_tokens, h.blocks.tokens(chunk)
    x = widen(job.values.rows(lead, first, tokens), h.dtype)
    finite = np.isfinite(x).all(1)
    job.bad[lead, chunk * h.chunk_tokens :][:tokens] = ~finite
    x[~finite] = np.nan if h.affine else 0
    if job.offsets is not None:
        with np.errstate(over="ignore"):
            x[finite] -= _offset(job, lead, first, tokens)[finite]
        x = np.clip(x, -c.LARGEST_FINITE[c.DTYPE_FLOAT32], c.LARGEST_FINITE[c.DTYPE_FLOAT32])
    body = encode_block(x, plan, h.radius_exponent, job.effort, code)
    start = h.blocks.place(chunk, lead) - h.payload_start
    job.payload[start : start + body.size] = body
    word = np.array([checksum(body)], "<u4").view(np.uint8)
    job.payload[start + body.size : start + body.size + c.CHECKSUM_BYTES] = word


def _offset(job: EncodeJob | DecodeJob, lead: int, first: int, tokens: int) -> np.ndarray:
    """The offset at tokens first .. first+tokens-1: float32 [tokens, head_dim]."""
    assert job.offsets is not None
    places = places_of(job.positions, lead, first + np.arange(tokens))
    return centre.offset_of_coded(job.header, job.offsets[lead], places)


# -- the backend -------------------------------------------------------------------------------------------------
class Reference:
    """Walks a stream's blocks one after another."""

    name = "reference"

    def covers(self, header: Header) -> bool:
        """Whether this backend codes streams of such a header."""
        return header.coding in CODINGS

    def means(self, values: Values, header: Header, positions: np.ndarray | None = None) -> np.ndarray:
        """Means of the ``sampled`` tokens: float64 [leading, head_dim]; see ``kernels.job.Backend``."""
        picked, count, step = sampled(values, header)
        tokens, turns = header.first_tokens + step * np.arange(count), None
        total = np.zeros((header.leading, header.head_dim))
        for lead in range(header.leading if count else 0):
            if header.rope and (positions is not None or not lead):
                turns = centre.phases_at(header.rope, places_of(positions, lead, tokens))
            x = widen(picked.rows(lead, 0, count), header.dtype)
            x[~np.isfinite(x).all(1)] = 0
            back = centre.turn_back(x, *turns, header.rope) if turns and header.rope else x.astype(np.float64)
            total[lead] = back.sum(0)
        return total / max(count, 1)

    def turn(self, x: np.ndarray, header: Header, first: tuple[int, int], positions: np.ndarray | None, back: bool) -> None:
        """Turn vectors, or back, in place; see ``kernels.job.Backend``."""
        assert header.rope
        tokens = first[1] + np.arange(x.shape[1])
        for lead in range(len(x)):
            cos, sin = centre.phases_at(header.rope, places_of(positions, first[0] + lead, tokens))
            x[lead] = centre.turn(x[lead], cos, -sin if back else sin, header.rope)

    def product(self, x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """Rows times a matrix; see ``kernels.job.Backend``."""
        sums = np.zeros((len(x), matrix.shape[1]))
        for column, row in zip(x.T.astype(np.float64), matrix, strict=True):
            sums += column[:, None] * row
        largest = c.LARGEST_FINITE[c.DTYPE_FLOAT32]
        return sums.clip(-largest, largest).astype(np.float32)

    def encode(self, job: EncodeJob) -> None:
        """Encode block by block."""
        h, plan = job.header, plan_for(job.header)
        for chunk in range(h.chunks):
            for lead in range(h.leading):
                encode_job_block(job, plan.for_lead(lead), chunk, lead)
            job.advance(h.leading)

    def decode(self, jobs: Sequence[DecodeJob], advance: Callable[[int], None] = nobody) -> None:
        """Check and decode job by job, block by block."""
        for job in jobs:
            self._decode(job, advance)

    def _decode(self, job: DecodeJob, advance: Callable[[int], None]) -> None:
        h = job.header
        plan = None if job.out is None else replace(plan_for(h), shrunk=job.shrunk)
        for chunk in range(job.first_chunk, job.last_chunk):
            for lead in range(job.first_lead, job.last_lead):
                block = job.block(chunk, lead)
                body = block[: -c.CHECKSUM_BYTES]
                job.damaged[chunk - job.first_chunk, lead - job.first_lead] = (
                    checksum(body) != block[-c.CHECKSUM_BYTES :].view("<u4")[0]
                )
                if job.out is None or plan is None:
                    continue
                low, high = job.rows_of(chunk)
                x = decode_block(body, h.blocks.tokens(chunk), (low, high), plan.for_lead(lead), h.radius_exponent)
                first = h.first_tokens + chunk * h.chunk_tokens + low
                if job.offsets is not None:
                    with np.errstate(over="ignore"):
                        x = x + _offset(job, lead, first, high - low)
                job.out.rows(lead - job.first_lead, first - job.first_token, high - low)[:] = narrow(x, h.dtype)
            advance(job.last_lead - job.first_lead)

    def scores(self, job: attention.AttentionJob) -> np.ndarray:
        """Scores of all tokens of a job: float64 [leading, rows, tokens]."""
        return attention.coded_scores(job)

    def attend(self, job: attention.AttentionJob) -> attention.Partial:
        """Attention to the tokens of a job, in float64."""
        return attention.attend_to_coded(job)

    def nearest(self, x: np.ndarray, book: Book) -> np.ndarray:
        """The entry of a codebook nearest to each of x float32 [n, channels of a group]: int64 [n]."""
        return residual.nearest_entries(x, book)
