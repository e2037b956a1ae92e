"""Law: the work of a backend in host memory: the records that it reads, and those that it fills."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pqcodec.stream.header import Header
from pqcodec.tensors.rows import Values

if TYPE_CHECKING:
    from pqcodec.kernels.attention import AttentionJob, Partial


def nobody(done: int) -> None:
    """Ignore progress."""


MEAN_TOKENS = 1024  # coded tokens that a mean is taken of, at the most: its error is then 1/1000 of the variance


def sampled(values: Values, h: Header) -> tuple[Values, int, int]:
    """The coded tokens that a mean is taken of: (values that begin with the first, their number, the step between them)."""
    step = max(1, -(-h.coded_tokens // MEAN_TOKENS))
    coded = values.from_token(h.first_tokens)
    return replace(coded, stride=step * values.stride), -(-h.coded_tokens // step), step


@dataclass(frozen=True)
class EncodeJob:
    """Encode every block of a stream."""

    header: Header
    values: Values  # [leading, tokens, head_dim], exact first tokens included
    offsets: np.ndarray | None  # float32 [leading, head_dim]
    payload: np.ndarray  # uint8 [payload bytes], to be filled
    bad: np.ndarray  # bool [leading, coded tokens], to be filled: vectors with NaN or Inf, coded as zeros
    effort: str = "fast"  # of the search for the best code, where the coding has one: an ``EncodeOptions.effort``
    advance: Callable[[int], None] = nobody  # called with the number of blocks just done
    positions: np.ndarray | None = None  # uint32 [1 or leading, tokens]: those of kept tokens, which RoPE asks for


@dataclass(frozen=True)
class DecodeJob:
    """Check, and decode where ``out`` is given, the blocks of some chunks and leading indices.

    ``payload`` holds their blocks and nothing else, chunk by chunk. Tokens count from the tensor's beginning.
    """

    header: Header
    payload: np.ndarray  # uint8 [n]
    first_chunk: int
    last_chunk: int
    first_lead: int
    last_lead: int
    first_token: int  # the first token of ``out``
    last_token: int  # the last token of ``out``, plus one
    offsets: np.ndarray | None  # float32 [leading, head_dim]
    out: Values | None  # [last_lead - first_lead, last_token - first_token, head_dim]
    damaged: np.ndarray  # bool [chunks, leads], to be filled
    positions: np.ndarray | None = None  # uint32 [1 or leading, tokens]: those of kept tokens, which RoPE asks for
    shrunk: bool = False  # of a sketch: decode vectors of less error, and not those without bias

    def block(self, chunk: int, lead: int) -> np.ndarray:
        """Bytes of a block with its checksum."""
        size = self.header.blocks.size(chunk)
        start = (chunk - self.first_chunk) * self.chunk_bytes + (lead - self.first_lead) * size
        return self.payload[start : start + size]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a whole chunk's blocks."""
        h = self.header
        return (self.last_lead - self.first_lead) * h.blocks.chunk_bytes

    @property
    def decoded_bytes(self) -> int:
        """Bytes of ``out``."""
        rows = (self.last_lead - self.first_lead) * (self.last_token - self.first_token)
        return 0 if self.out is None else rows * self.header.vector_bytes

    def rows_of(self, chunk: int) -> tuple[int, int]:
        """The first wanted row of a chunk's blocks, and the last plus one."""
        start = self.header.first_tokens + chunk * self.header.chunk_tokens
        low, high = max(self.first_token - start, 0), min(self.last_token - start, self.header.blocks.tokens(chunk))
        return low, max(low, high)


class Backend(Protocol):
    """A kernel family. All decode the same bits; encoders may differ in ties between cells, which tests count."""

    name: str

    def covers(self, header: Header) -> bool:
        """Whether it codes streams of such a header."""
        ...

    def means(self, values: Values, header: Header, positions: np.ndarray | None = None) -> np.ndarray:
        """Mean of the ``sampled`` tokens, turned back under RoPE, NaN and Inf as zero vectors: float64 [leading, head_dim].

        ``positions`` as in an ``EncodeJob``.
        """
        ...

    def turn(self, x: np.ndarray, header: Header, first: tuple[int, int], positions: np.ndarray | None, back: bool) -> None:
        """Turn vectors float32 [leads, tokens, head_dim] by their tokens' angles (SPEC 9.3), or back, in place.

        ``first``: leading index and token of the first one; ``positions`` as in an ``EncodeJob``.
        """
        ...

    def product(self, x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """x float32 [n, a] times a matrix float64 [a, b] of float32 numbers (SPEC 18.2): float32 [n, b], never infinite.

        Sums are float64, in ascending order.
        """
        ...

    def encode(self, job: EncodeJob) -> None:
        """Fill ``job.payload`` with every block of a stream, and ``job.bad`` with the vectors that are not finite."""
        ...

    def decode(self, jobs: Sequence[DecodeJob], advance: Callable[[int], None] = nobody) -> None:
        """Do all jobs, in any order; ``advance`` is called with the number of blocks just done."""
        ...

    def scores(self, job: AttentionJob) -> np.ndarray:
        """Scores of all tokens of a job: [leading, rows, tokens]; damage is told in the job."""
        ...

    def attend(self, job: AttentionJob) -> Partial:
        """Attention to the tokens of a job; its parts are arrays [leading, rows, head_dim] and [leading, rows]."""
        ...
