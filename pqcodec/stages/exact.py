"""Law: vectors that are kept in the tensor's own dtype (SPEC 3.2): the first and the last tokens, and single vectors by place.

Exact first and last tokens are not coded at all; an exact vector is coded too (as zeros where it is not finite) and laid over
its row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.stages.centre import offset_at
from pqcodec.stages.keep import places_of
from pqcodec.stream import sections
from pqcodec.stream.header import Header
from pqcodec.stream.index import Bounds
from pqcodec.stream.report import Damage
from pqcodec.stream.source import Source
from pqcodec.tensors.numbers import widen
from pqcodec.tensors.rows import Values

_DISTANCE_ROWS = 1 << 12


# -- first and last tokens ---------------------------------------------------------------------------------------
def first_bodies(h: Header, values: Values) -> Iterator[bytes]:
    """The exact first tokens of each leading index, as the stream keeps them."""
    return (values.rows(lead, 0, h.first_tokens).tobytes() for lead in range(h.leading))


def last_bodies(h: Header, values: Values) -> Iterator[bytes]:
    """The exact last tokens of each leading index, as the stream keeps them."""
    return (values.rows(lead, h.last_start, h.last_tokens).tobytes() for lead in range(h.leading))


def place_first(source: Source, h: Header, out: Values | None, tokens: Bounds, leads: Bounds, damage: list[Damage]) -> None:
    """Copy exact first tokens to where they belong in ``out`` [leads, tokens, head_dim]; None: only check them."""
    _place(source, h, sections.EXACT_TOKENS, (0, h.first_tokens), out, tokens, leads, damage)


def place_first_together(
    sources: Sequence[Source], headers: Sequence[Header], outs: Sequence[Values], damage: list[Damage]
) -> None:
    """``place_first`` of whole streams, those whose entries have one size at once."""
    for numbers, bodies in sections.read_together(sources, headers, sections.EXACT_TOKENS):
        at = 0
        for number in numbers:
            h, out = headers[number], outs[number]
            if bodies is None:  # one by one, to tell which is damaged
                place_first(sources[number], h, out, (0, h.tokens), (0, h.leading), damage)
                continue
            out.put_first(bodies[at : at + h.leading].view(out.flat.dtype).reshape(h.leading, h.first_tokens, h.head_dim))
            at += h.leading


def place_last(source: Source, h: Header, out: Values | None, tokens: Bounds, leads: Bounds, damage: list[Damage]) -> None:
    """The same of exact last tokens."""
    _place(source, h, sections.EXACT_LAST, (h.last_start, h.tokens), out, tokens, leads, damage)


def _place(
    source: Source,
    h: Header,
    section: sections.SideSection,
    there: Bounds,
    out: Values | None,
    tokens: Bounds,
    leads: Bounds,
    damage: list[Damage],
) -> None:
    """Copy the tokens ``there``, which a section keeps, to where they belong among ``tokens``."""
    low, high = max(tokens[0], there[0]), min(tokens[1], there[1])
    if low >= high:
        return
    sound, raw = sections.read_entries(source, h, section, leads, damage)
    if out is None:
        return
    exact = raw.view(out.flat.dtype).reshape(-1, there[1] - there[0], h.head_dim)[:, low - there[0] : high - there[0]]
    for lead, rows in zip(sound, exact, strict=True):
        out.rows(lead - leads[0], low - tokens[0], high - low)[:] = rows


# -- single vectors ----------------------------------------------------------------------------------------------
def pairs_of(vectors: Any) -> np.ndarray:
    """Pairs (leading index, token) as they are asked for: int64 [n, 2]; raises InvalidArgument for what is none."""
    pairs = np.asarray(vectors, np.int64)
    if pairs.size % 2 or not pairs.ndim:
        raise InvalidArgument(f"exact_vectors {pairs.shape}: pairs (leading index, token) are expected, integers [n, 2]")
    return pairs.reshape(-1, 2)


def coded_rows(h: Header, vectors: Any) -> np.ndarray:
    """The rows of vectors that are kept exact beside first and last tokens, given as pairs (leading index, token): int64 [n].

    A row is leading index times coded tokens plus coded token; rows ascend. Raises InvalidArgument.
    """
    pairs = pairs_of(vectors)
    if ((pairs < 0) | (pairs >= (h.leading, h.tokens))).any():
        raise InvalidArgument(f"exact vectors are outside of {h.leading} leading indices and {h.tokens} tokens")
    pairs = pairs[(pairs[:, 1] >= h.first_tokens) & (pairs[:, 1] < h.last_start)]
    return np.unique(pairs[:, 0] * h.coded_tokens + pairs[:, 1] - h.first_tokens)


def farthest_rows(h: Header, values: Values, offsets: np.ndarray, positions: np.ndarray | None, count: int) -> np.ndarray:
    """The rows of the ``count`` coded vectors of each leading index that lie farthest from its offset: int64 [n], ascending.

    ``offsets``: float32 [leading, head_dim], under RoPE those of position 0, which turn with the token; ``positions``: of kept
    tokens. Of vectors equally far those of lower tokens come first, and last come those that hold NaN or Inf.
    """
    count = min(count, h.coded_tokens)
    found = np.empty((h.leading, count), np.int64)
    for lead, offset in enumerate(offsets):
        distances = [_distances(h, values, lead, tokens, offset, positions) for tokens in _runs(h)]
        order = np.argsort(-np.concatenate(distances), kind="stable") if distances else np.zeros(0, np.int64)
        found[lead] = lead * h.coded_tokens + np.sort(order[:count])
    return found.ravel()


def _runs(h: Header) -> Iterator[np.ndarray]:
    """The coded tokens, a bounded piece at a time."""
    for first in range(h.first_tokens, h.last_start, _DISTANCE_ROWS):
        yield np.arange(first, min(first + _DISTANCE_ROWS, h.last_start))


def _distances(
    h: Header, values: Values, lead: int, tokens: np.ndarray, offset: np.ndarray, positions: np.ndarray | None
) -> np.ndarray:
    """Squared distances of some tokens that follow each other from an offset: float64 [n], -1 of those with NaN or Inf."""
    x = widen(values.rows(lead, int(tokens[0]), len(tokens)), h.dtype)
    x[~np.isfinite(x).all(1)] = np.nan
    means = offset_at(h.rope, offset, places_of(positions, lead, tokens))
    return np.nan_to_num(np.square(x.astype(np.float64) - means).sum(1), nan=-1)


def vectors_of(h: Header, values: Values, rows: np.ndarray) -> list[np.ndarray]:
    """The stored numbers of some coded rows: arrays [head_dim]."""
    places = (divmod(int(row), h.coded_tokens) for row in rows)
    return [values.rows(lead, h.first_tokens + token, 1)[0] for lead, token in places]


def vectors_body(rows: np.ndarray, vectors: Any) -> bytes:
    """The section's one body: each row as 8 bytes, and its vector [head_dim] of stored numbers."""
    return b"".join(int(row).to_bytes(8, "little") + vector.tobytes() for row, vector in zip(rows, vectors, strict=True))


def read_vectors(source: Source, h: Header, damage: list[Damage]) -> tuple[np.ndarray, np.ndarray] | None:
    """Rows int64 [n] and vectors uint8 [n, vector_bytes]; None where there are none, or after noting the damage.

    Raises CorruptStream.
    """
    sound, bodies = sections.read_entries(source, h, sections.EXACT_VECTORS, (0, 1), damage)
    if not len(sound):
        return None
    records = bodies.reshape(h.exceptions, 8 + h.vector_bytes)
    rows = np.ascontiguousarray(records[:, :8]).view("<u8").ravel()
    if (rows[1:] <= rows[:-1]).any() or int(rows[-1]) >= h.leading * h.coded_tokens:
        raise CorruptStream("exact vectors are not in ascending order inside the tensor")
    return rows.astype(np.int64), np.ascontiguousarray(records[:, 8:])


def place_vectors(source: Source, h: Header, out: Values | None, tokens: Bounds, leads: Bounds, damage: list[Damage]) -> None:
    """Copy exact vectors over what their rows decode to in ``out`` [leads, tokens, head_dim]; None: only check them."""
    found = read_vectors(source, h, damage)
    if out is None or found is None:
        return
    for row, vector in zip(*found, strict=True):
        lead, token = divmod(int(row), h.coded_tokens)
        token += h.first_tokens
        if tokens[0] <= token < tokens[1] and leads[0] <= lead < leads[1]:
            out.rows(lead - leads[0], token - tokens[0], 1)[0] = vector.view(out.flat.dtype)
