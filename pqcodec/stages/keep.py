"""Law: keep lists (SPEC 17): which tokens of a tensor a stream holds, the same of all leading indices or others of each.

A list is written as numbers or as a bitmap, whichever is smaller; which one follows from the header. In a stream of n kept
tokens everything else counts kept tokens 0 .. n - 1; only RoPE asks for the positions that they had in the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.stream import sections
from pqcodec.stream.header import DTYPE_NAMES, Header
from pqcodec.stream.header_fields import KeepField
from pqcodec.stream.index import Bounds
from pqcodec.stream.report import Damage
from pqcodec.stream.source import Source
from pqcodec.tensors.numbers import is_torch, narrow
from pqcodec.tensors.rows import Values, values_of


# -- what is asked -------------------------------------------------------------------------------------------------
def positions_of(keep: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Positions [n] or [..., n] for a tensor [..., tokens, head_dim], checked: uint32 [1 or leading, n].

    Raises InvalidArgument where they are no whole numbers, not in the tensor, do not ascend, or go with another shape.
    """
    if len(shape) < 2:
        raise InvalidArgument(
            f"keep: a tensor {tuple(shape)} has no tokens to choose from; [..., tokens, head_dim] is expected"
        )
    return ascending_lists("keep", keep, tuple(shape[:-2]), shape[-2]).astype(np.uint32)


def ascending_lists(name: str, given: Any, leading: tuple[int, ...], count: int) -> np.ndarray:
    """Lists of positions below ``count``, [n] or [..., n] for dimensions ``leading``, checked: int64 [1 or leading, n].

    Raises InvalidArgument where they are no whole numbers, too large, do not ascend, or go with other dimensions.
    """
    found = np.asarray(given.detach().cpu() if is_torch(given) else given)
    if found.ndim == 0 or (found.dtype.kind not in "iu" and found.size):
        raise InvalidArgument(f"{name}: {found.dtype} {found.shape}; positions are expected, integers [n] or [..., n]")
    lists, n = math.prod(found.shape[:-1]), found.shape[-1]
    if found.ndim > 1 and found.shape[:-1] not in (leading, (math.prod(leading),)):
        expected = f"[n], the same of all leading indices, or [{', '.join(map(str, (*leading, 'n')))}]"
        raise InvalidArgument(f"{name} {found.shape} does not go with the tensor; {expected} is expected")
    positions = found.reshape(lists, n).astype(np.int64)
    if positions.size and not 0 <= positions.min() <= positions.max() < count:
        raise InvalidArgument(f"{name}: positions {positions.min()} .. {positions.max()} are not all below {count}")
    if (positions[:, 1:] <= positions[:, :-1]).any():
        raise InvalidArgument(
            f"{name}: positions do not ascend, or stand twice; sort them, those of each leading index by themselves"
        )
    return positions


def header_of(whole: Header, keep: Any) -> Header:
    """The header of the kept tokens, from that of the whole tensor; raises InvalidArgument."""
    n, field = positions_of(keep, whole.shape).shape[1], KeepField(whole.tokens, np.ndim(keep) > 1)
    return replace(whole, shape=(*whole.shape[:-2], n, whole.head_dim), keep=field)


def coded_pairs(positions: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Pairs (leading index, token of the tensor), int64 [n, 2], as pairs (leading index, kept token): int64 [n, 2].

    Raises InvalidArgument where a token is not kept.
    """
    found = []
    for lead, token in pairs:
        kept = positions[lead % len(positions)] if lead >= 0 else positions[0, :0]
        at = int(np.searchsorted(kept, token))
        if at == len(kept) or kept[at] != token:
            raise InvalidArgument(f"exact vector (leading index {lead}, token {token}) is none of the tokens that are kept")
        found.append((lead, at))
    return np.array(found, np.int64).reshape(-1, 2)


def gathered(stored: np.ndarray, positions: np.ndarray) -> Values:
    """The kept rows of stored numbers [..., tokens, head_dim], copied: Values [leading, n, head_dim]."""
    rows = np.empty((math.prod(stored.shape[:-2]), positions.shape[1], stored.shape[-1]), stored.dtype)
    for lead, place in enumerate(np.ndindex(stored.shape[:-2])):
        rows[lead] = stored[place][positions[lead % len(positions)]]
    return values_of(rows)


# -- in streams ----------------------------------------------------------------------------------------------------
def bodies(h: Header, positions: np.ndarray) -> Iterator[bytes]:
    """Each list as the stream keeps it: numbers, or a bitmap where that is smaller."""
    for row in positions:
        if not h.keep_bitmap:
            yield row.astype("<u4").tobytes()
            continue
        kept = np.zeros(h.whole_shape[-2], np.bool_)
        kept[row] = True
        yield np.packbits(kept, bitorder="little").tobytes()


def read(source: Source, h: Header, leads: Bounds, damage: list[Damage]) -> np.ndarray | None:
    """The positions that kept tokens had: uint32 [1 or leading, n], zeros of other leading indices and of damaged lists.

    None where the stream holds all tokens; ``damage`` gets what is damaged. Raises CorruptStream.
    """
    if h.keep is None:
        return None
    positions = np.zeros((h.leading if h.keep.each else 1, h.tokens), np.uint32)
    sound, raw = sections.read_entries(source, h, sections.KEEP, leads if h.keep.each else (0, 1), damage)
    if not len(sound):
        return positions
    if h.keep_bitmap:
        kept = np.unpackbits(raw, axis=1, bitorder="little")
        if (kept.sum(1) != h.tokens).any() or kept[:, h.keep.tokens :].any():
            raise CorruptStream(f"keep list: a bitmap marks other than {h.tokens} of {h.keep.tokens} tokens")
        positions[sound] = np.nonzero(kept)[1].reshape(len(sound), h.tokens)
        return positions
    found = raw.view("<u4").astype(np.int64)
    if (found[:, 1:] <= found[:, :-1]).any() or found.max(initial=0) >= h.keep.tokens:
        raise CorruptStream(f"keep list: positions do not ascend inside of {h.keep.tokens} tokens")
    positions[sound] = found
    return positions


def places_of(positions: np.ndarray | None, lead: int, tokens: np.ndarray) -> np.ndarray:
    """Where tokens of a leading index stand for RoPE: whole numbers [n]. ``positions``: of kept ones, as ``read`` gives."""
    return tokens if positions is None else positions[lead % len(positions), tokens]


# -- the whole tensor ----------------------------------------------------------------------------------------------
def stored_fill(fill: Any, dtype: int) -> np.ndarray:
    """A fill value as a stored number: uint16 or float32 of one element; NaN and Inf stay. Raises InvalidArgument."""
    if not isinstance(fill, Real) or isinstance(fill, bool):
        raise InvalidArgument(f"fill {fill!r} is no number")
    with np.errstate(over="ignore"):
        value = np.array([fill], np.float32)
    if math.isfinite(fill) and abs(float(fill)) > c.LARGEST_FINITE[dtype]:
        raise InvalidArgument(f"fill {fill!r} is beyond the largest {DTYPE_NAMES[dtype]} {c.LARGEST_FINITE[dtype]:.6g}")
    if math.isfinite(fill) or dtype == c.DTYPE_FLOAT32:
        return narrow(value, dtype) if math.isfinite(fill) else value
    return (
        value.astype(np.float16).view(np.uint16)
        if dtype == c.DTYPE_FLOAT16
        else (value.view(np.uint32) >> 16).astype(np.uint16)
    )


def within(positions: np.ndarray, leads: Bounds, tokens: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """Of each leading index the kept tokens that lie among some tokens of the tensor: first and last + 1, intp [leads] each."""
    lists = [positions[lead % len(positions)] for lead in range(*leads)]
    cuts = np.array([np.searchsorted(kept, tokens) for kept in lists], np.intp).reshape(-1, 2)
    return cuts[:, 0], cuts[:, 1]
