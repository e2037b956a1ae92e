"""Law: the linear stage (SPEC 18.2): a row is some channels of vectors, or what a matrix makes of them.

Decoding, channels that were not chosen are 0, and products are summed in float64 in ascending order: of a float16 and a float32
number they are exact there, so every machine finds the same sums, fused or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral
from typing import Any, Protocol

import numpy as np

from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.stages.keep import ascending_lists
from pqcodec.stream import sections
from pqcodec.stream.header import Header
from pqcodec.stream.index import Bounds
from pqcodec.stream.linear import LinearField, SharedBasis, half_matrix
from pqcodec.stream.report import Damage
from pqcodec.stream.source import Source
from pqcodec.stream.tables import BasisTable

_LEAST = 2.0**-10  # of a block's basis: the least of its directions over the largest, so that it can be inverted


class Multiplying(Protocol):
    """What of a backend the stage needs (``kernels.job.Backend``)."""

    def product(self, x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """x float32 [n, a] times a matrix float64 [a, b] of float32 numbers: float32 [n, b]."""
        ...


# -- what is asked -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LinearOptions:
    """The options of ``encode`` that ask for a linear stage, of which one at most is given; raises InvalidArgument."""

    channels: Any = None
    block_basis: Any = None
    basis: Any = None

    def __post_init__(self) -> None:
        given = [name for name in ("channels", "block_basis", "basis") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InvalidArgument(f"{' and '.join(given)} are given; a stream has one linear stage")
        if self.block_basis is not None and self.block_basis is not True:
            object.__setattr__(self, "block_basis", half_matrix("block_basis", self.block_basis))
            if self.block_basis.shape != (c.LINEAR_BLOCK, c.LINEAR_BLOCK):
                raise InvalidArgument(f"block_basis {self.block_basis.shape}: True, or a matrix [16, 16] is expected")
        if self.basis is not None and self._rank is None and not isinstance(self.basis, BasisTable):
            object.__setattr__(self, "basis", half_matrix("basis", self.basis))

    @property
    def _rank(self) -> int | None:
        """The rank of a basis that is fitted to the tensor; None where the basis is given."""
        return int(self.basis) if isinstance(self.basis, Integral) and not isinstance(self.basis, bool) else None

    @property
    def shared(self) -> SharedBasis | None:
        """The basis of a shared table, which a header names."""
        return self.basis.part if isinstance(self.basis, BasisTable) else None

    def field(self, numbers: int) -> LinearField | None:
        """What a header says where the vectors of a row have so many numbers; raises InvalidArgument."""
        if self.channels is not None:
            found = LinearField(c.LINEAR_CHANNELS, np.shape(self.channels)[-1] if np.ndim(self.channels) else 0)
        elif self.block_basis is not None:
            found = LinearField(c.LINEAR_BLOCKS, numbers)
        elif self.basis is not None:
            matrix = self.basis.basis if isinstance(self.basis, BasisTable) else self.basis
            kind = c.LINEAR_SHARED if self.shared else c.LINEAR_BASIS
            found = LinearField(kind, len(matrix) if self._rank is None else self._rank)
            if self._rank is None and matrix.shape[1] != numbers:
                raise InvalidArgument(f"basis {matrix.shape} is none of vectors of {numbers} numbers")
        else:
            return None
        if problem := found.problem(numbers):
            raise InvalidArgument(problem)
        return found

    def stage(self, h: Header, x: np.ndarray) -> Linear:
        """The stage for vectors float32 [leading of rows, n, numbers], to which it may be fitted; raises InvalidArgument."""
        if self.channels is not None:
            leading = (*h.shape[:-3], *(() if h.joined else h.shape[-3:-2]))
            return Linear(h, ascending_lists("channels", self.channels, leading, x.shape[2]), None)
        if h.basis is not None:
            return Linear(h, None, h.basis.matrix)
        if self.block_basis is not None:
            matrix = block_basis(x) if self.block_basis is True else self.block_basis
        else:
            matrix = self.basis if self._rank is None else second_moment(x, x.shape[2])[1][: self._rank]
        return Linear(h, None, matrix.astype(np.float16).astype(np.float64))


def second_moment(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, descending, and eigenvectors, a row each, of the mean x^T x of runs of ``size`` channels.

    Of numbers over the largest of them: their squares stay in range.
    """
    largest = np.abs(x).max(initial=0.0)
    runs = x.reshape(-1, size).astype(np.float64) / (largest or 1.0)
    values, vectors = np.linalg.eigh(runs.T @ runs / max(len(runs), 1))
    return np.maximum(values[::-1], 0), vectors[:, ::-1].T


def block_basis(x: np.ndarray) -> np.ndarray:
    """S^(1/2) V^T of the singular values and vectors of all blocks of channels (DecoQuant), times what makes the largest 1.

    Of zeros the identity.
    """
    values, vectors = second_moment(x, c.LINEAR_BLOCK)
    if not values[0]:
        return np.eye(c.LINEAR_BLOCK)
    strength = values**0.25  # a singular value is the root of a second moment
    return np.maximum(strength / strength[0], _LEAST)[:, None] * vectors


# -- the stage -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Linear:
    """The linear stage of a stream: lists of channels, or a matrix."""

    header: Header
    channels: np.ndarray | None  # int64 [1 or leading of rows, width]
    matrix: np.ndarray | None  # float64 [a, b] of float16 numbers: a row, or each 16 numbers of one, times it are vectors

    def rows(self, x: np.ndarray, kernel: Multiplying) -> np.ndarray:
        """The rows of vectors float32 [leading of rows, n, numbers]: float32 [leading of rows, n, width]."""
        h = self.header
        if self.channels is not None:
            lists = np.resize(self.channels, (len(x), h.width))
            return np.ascontiguousarray(np.take_along_axis(x, lists[:, None], 2))
        assert self.matrix is not None
        of_blocks = h.linear is not None and h.linear.kind == c.LINEAR_BLOCKS
        back = _inverse_of_shared(h.basis) if h.basis else _inverse(self.matrix, of_blocks)
        return kernel.product(x.reshape(-1, len(back)), back).reshape(*x.shape[:2], h.width)

    def vectors(self, rows: np.ndarray, leads: Bounds, kernel: Multiplying) -> np.ndarray:
        """The vectors float32 [leads, n, numbers] of rows [leads, n, width]; ``leads``: which leading indices of rows."""
        numbers = self.header.heads * self.header.head_dim
        if self.channels is None:
            assert self.matrix is not None
            return kernel.product(rows.reshape(-1, len(self.matrix)), self.matrix).reshape(*rows.shape[:2], numbers)
        x = np.zeros((*rows.shape[:2], numbers), np.float32)
        for vectors, row, lead in zip(x, rows, range(*leads), strict=True):
            vectors[:, self.channels[lead % len(self.channels)]] = row
        return x

    def bodies(self) -> Iterator[bytes]:
        """The lists, one for each leading index of rows, or the matrix, as the stream keeps them."""
        if self.matrix is not None:
            yield self.matrix.astype("<f2").tobytes()
            return
        assert self.channels is not None
        for lead in range(self.header.blocks.leading):
            yield self.channels[lead % len(self.channels)].astype("<u2").tobytes()


def _inverse(matrix: np.ndarray, of_blocks: bool = False) -> np.ndarray:
    """The inverse of a matrix of blocks, or the pseudo-inverse of a basis: float64 of float32 numbers."""
    try:
        back = np.linalg.inv(matrix) if of_blocks else np.linalg.pinv(matrix)
    except np.linalg.LinAlgError as error:
        raise InvalidArgument(f"the matrix of the linear stage has no inverse ({error})") from None
    back = back.astype(np.float32).astype(np.float64)
    if not np.isfinite(back).all():
        raise InvalidArgument("the matrix of the linear stage has no inverse within float32")
    return back


@lru_cache(maxsize=4)
def _inverse_of_shared(basis: SharedBasis) -> np.ndarray:
    """The same of a basis that many streams share, which so is inverted once."""
    assert basis.matrix is not None
    return _inverse(basis.matrix)


def read_linear(source: Source, h: Header, leads: Bounds, damage: list[Damage]) -> Linear | None:
    """The linear stage of a stream, lists of those leading indices of rows; None where it has none. Raises CorruptStream.

    None, too, where it is a shared table's and that is not here, which ``Header.check_tables`` tells who wants numbers.
    ``damage`` gets what is damaged: then a list is that of the first channels, a matrix of zeros.
    """
    if h.linear is None or (h.basis and not h.basis.here):
        return None
    if h.basis:
        return Linear(h, None, h.basis.matrix)
    numbers = h.heads * h.head_dim
    if h.linear.kind != c.LINEAR_CHANNELS:
        shape = (h.width, numbers) if h.linear.kind == c.LINEAR_BASIS else (c.LINEAR_BLOCK, c.LINEAR_BLOCK)
        sound, raw = sections.read_entries(source, h, sections.LINEAR, (0, 1), damage)
        matrix = raw[0].view("<f2").reshape(shape).astype(np.float64) if len(sound) else np.zeros(shape)
        if not np.isfinite(matrix).all():
            raise CorruptStream("linear stage: the matrix is not finite")
        return Linear(h, None, matrix)
    channels = np.tile(np.arange(h.width), (h.blocks.leading, 1))
    sound, raw = sections.read_entries(source, h, sections.LINEAR, leads, damage)
    found = raw.view("<u2").astype(np.int64)
    if (found[:, 1:] <= found[:, :-1]).any() or found.max(initial=0) >= numbers:
        raise CorruptStream(f"linear stage: channels do not ascend inside of {numbers}")
    channels[sound] = found
    return Linear(h, channels, None)
