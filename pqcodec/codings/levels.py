"""Law: levels of scalar coding (SPEC 16): which float16 numbers best stand for those of a tensor, and the bounds between them.

Numbers are told by their place in the range of their group: -1 its least, 1 its largest.
"""

from __future__ import annotations

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import outliers
from pqcodec.codings.declared import Affine
from pqcodec.stages import centre
from pqcodec.stream.header import Header
from pqcodec.stream.prng import splitmix64
from pqcodec.tensors.numbers import widen
from pqcodec.tensors.rows import DeviceRows, Values

_SAMPLE = 1 << 15  # numbers that levels are fitted to, about
_FEWEST = 8  # runs of tokens among them, where there are so many
_RUN = 16  # tokens, where each has groups of its own
_BINS = 1 << 12  # of -1 .. 1, by which numbers are told apart
_ROUNDS = 100  # of the search, at the most
_STEP = 1e-6  # of the error that a round must gain


def bounds(levels: np.ndarray) -> np.ndarray:
    """The middles between neighbouring levels, float32; a number that is no larger than one takes the level below it."""
    return (levels[1:] + levels[:-1]) * np.float32(0.5)


def levels_of(values: Values | DeviceRows, h: Header, offsets: np.ndarray | None) -> tuple[int, ...]:
    """The levels for a tensor [leading, tokens, head_dim], fitted to an even selection of its groups of numbers.

    Which ones depends on the header's seed. ``offsets``: float32 [leading, head_dim], or None. A number weighs as much as the
    square of its group's range, as its error does.
    """
    assert h.affine is not None
    size = h.affine.tokens if h.affine.tokens > 1 else min(_RUN, max(h.coded_tokens, 1))
    runs = -(-h.coded_tokens // size)
    wanted = min(max(_SAMPLE // (size * h.head_dim), _FEWEST), runs * h.leading)
    start = int(splitmix64(h.seed, 0, 1)[0])
    step = max(wanted * size * h.head_dim // _SAMPLE, 1) if h.affine.channels == 1 else 1  # of channels
    found = [(np.zeros(0), np.zeros(0))]
    for i in range(wanted):
        lead, run = divmod((start + i * runs * h.leading // wanted) % (runs * h.leading), runs)
        x = _centred(values, h, offsets, lead, run * size, min(size, h.coded_tokens - run * size), step)
        found.append(_places(x if len(x) else np.zeros((1, x.shape[1])), h.affine))
    numbers, weights = (np.concatenate(each) for each in zip(*found, strict=True))
    return fitted_levels(numbers, weights, 1 << h.row_bits // h.order)


def _centred(
    values: Values | DeviceRows, h: Header, offsets: np.ndarray | None, lead: int, first: int, tokens: int, step: int
) -> np.ndarray:
    """Every ``step``-th channel of coded tokens, float64 [n, channels], less offsets; without vectors that are not finite."""
    first += h.first_tokens
    x = widen(np.ascontiguousarray(values.rows(lead, first, tokens)[:, ::step]), h.dtype).astype(np.float64)
    if offsets is not None and h.rope:
        x -= centre.turn(offsets[lead], *centre.phases(h.rope, first, tokens), h.rope)[:, ::step]
    elif offsets is not None:
        x -= offsets[lead, ::step]
    return x[np.isfinite(x).all(1)]


def _places(x: np.ndarray, affine: Affine) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of one group of tokens, or of many of one token -> places in the range of each group, and weights: [n] each."""
    width, numbers, weights = affine.channels, [], []
    cut = x.reshape(1 if affine.tokens > 1 else len(x), -1, x.shape[1])
    for first in range(0, x.shape[1], x.shape[1] if width == 1 else width):
        part = cut if width == 1 else cut[:, :, first : first + width]
        axes = 1 if width == 1 else (1, 2)
        low, high = _ends(part, axes, outliers.at_an_end(x.shape[0] if affine.tokens > 1 else 1, affine))
        middle = (low + high) / 2 if affine.fields == c.AFFINE_SCALE_ZERO else np.zeros_like(low)
        half = np.maximum(high - middle, middle - low)
        inside = (part >= low) & (part <= high)
        numbers.append(((part - middle) / np.where(half > 0, half, 1))[inside])
        weights.append(np.broadcast_to(half * half, part.shape)[inside])
    return np.concatenate(numbers), np.concatenate(weights)


def _ends(part: np.ndarray, axes: int | tuple[int, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest number of each group without ``count`` at each end, as ``outliers.ends`` has them."""
    if not count:
        return part.min(axes, keepdims=True), part.max(axes, keepdims=True)
    flat = part if axes == 1 else part.reshape(len(part), -1, 1)
    count = count if flat.shape[1] > 2 * count else 0
    ordered = np.partition(flat, (count, flat.shape[1] - 1 - count), 1)
    return ordered[:, count : count + 1], ordered[:, flat.shape[1] - 1 - count :][:, :1]


def fitted_levels(numbers: np.ndarray, weights: np.ndarray, count: int) -> tuple[int, ...]:
    """The ``count`` levels of least weighted squared error on numbers -1 .. 1, as bits of float16, ascending.

    Lloyd-Max levels (S. P. Lloyd, IEEE Trans. Inf. Theory 28, 1982), which are the means of 1-D k-means; those that KVQuant
    (arXiv 2401.18079, section 3.3) calls nuq. ``numbers`` and ``weights``: [n]. The search is deterministic: it begins where a
    third root of the density has equal parts, and ends where a round gains less than a millionth.
    """
    place = np.clip(((numbers + 1) * (_BINS / 2)).astype(np.int64), 0, _BINS - 1)
    first = weights * numbers
    parts: list[np.ndarray] = [np.bincount(place, each, _BINS) for each in (weights, first, first * numbers)]
    if not parts[0].any():  # nothing weighs: all places alike
        middle = (np.arange(_BINS) + 0.5) * (2 / _BINS) - 1
        parts = [np.ones(_BINS), middle, middle**2]
    mass, total, square = (np.concatenate([[0.0], np.cumsum(each)]) for each in parts)
    spread = np.cumsum(np.cbrt(np.diff(mass[:: _BINS >> 8])))  # of 256 parts, smoothed so
    levels = np.interp((np.arange(count) + 0.5) / count, spread / spread[-1], np.arange(1, 257) / 128 - 1)
    error = np.inf
    for _ in range(_ROUNDS):
        middles = (levels[1:] + levels[:-1]) / 2
        ends = np.concatenate([[0], np.clip(np.rint((middles + 1) * (_BINS / 2)).astype(np.int64), 0, _BINS), [_BINS]])
        weight, first = np.diff(mass[ends]), np.diff(total[ends])
        levels = np.where(weight > 0, first / np.where(weight > 0, weight, 1), levels)
        last, error = error, float((np.diff(square[ends]) - levels * (2 * first - levels * weight)).sum())
        if last - error <= _STEP * abs(error):
            break
    return tuple(np.sort(levels.astype("<f2")).view("<u2").tolist())
