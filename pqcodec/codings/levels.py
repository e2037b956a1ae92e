"""Law: levels of scalar coding (SPEC 16): which float16 numbers best stand for those of a tensor, and the bounds between them.

Numbers are told by their place in the range of their group: -1 its least, 1 its largest.
"""

from __future__ import annotations

import numpy as np

from pqcodec import constants as c
from pqcodec.codings import outliers
from pqcodec.codings.declared import Affine
from pqcodec.codings.ranges import Ranges
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
    """The levels for a tensor [leading, tokens, head_dim], fitted to a ``sample`` of it."""
    return fitted_levels(*sample(values, h, offsets), 1 << h.row_bits // h.order)


def sample(
    values: Values | DeviceRows, h: Header, offsets: np.ndarray | None, gradients: Values | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of an even selection of a tensor's groups, as places in the ranges of these, and their weights: [n] each.

    Which ones depends on the header's seed. ``offsets``: float32 [leading, head_dim], or None. A number weighs as much as the
    square of its group's range, as its error does, times the square of its gradient where ``gradients`` has the tensor's.
    """
    assert h.affine is not None
    size = h.affine.tokens if h.affine.tokens > 1 else min(_RUN, max(h.coded_tokens, 1))
    runs = -(-h.coded_tokens // size)
    wanted = min(max(_SAMPLE // (size * h.head_dim), _FEWEST), runs * h.leading)
    start = int(splitmix64(h.seed, 0, 1)[0])
    step = max(wanted * size * h.head_dim // _SAMPLE, 1) if h.affine.channels == 1 else 1  # of channels
    found: list[list[np.ndarray]] = []
    places = [(np.zeros(0), np.zeros(0))]
    for i in range(wanted):
        lead, run = divmod((start + i * runs * h.leading // wanted) % (runs * h.leading), runs)
        rows = (lead, h.first_tokens + run * size, min(size, h.coded_tokens - run * size))
        read = [_centred(values, h, offsets, rows, step)]
        if gradients is not None:
            read.append(_stored(gradients, h, rows, step))
        finite = np.isfinite(read[0]).all(1)
        read = [x if finite.all() else x[finite] if finite.any() else np.zeros((1, x.shape[1])) for x in read]
        if h.ranges:
            places.append(_places_in(h.ranges, lead, step, *read))
        else:
            found.append(read)
    if h.affine.tokens == 1 and found:  # groups of one token: those of all runs at once take less time
        found = [[np.concatenate(each) for each in zip(*found, strict=True)]]
    places += [_places(h.affine, *read) for read in found]
    numbers, weights = (np.concatenate(each) for each in zip(*places, strict=True))
    return numbers, weights


def _stored(values: Values | DeviceRows, h: Header, rows: tuple[int, int, int], step: int) -> np.ndarray:
    """Every ``step``-th channel of ``rows`` (leading index, first token, tokens), float64 [n, channels]."""
    return widen(np.ascontiguousarray(values.rows(*rows)[:, ::step]), h.dtype).astype(np.float64)


def _centred(
    values: Values | DeviceRows, h: Header, offsets: np.ndarray | None, rows: tuple[int, int, int], step: int
) -> np.ndarray:
    """The same less offsets."""
    x, (lead, first, tokens) = _stored(values, h, rows, step), rows
    if offsets is not None and h.rope:
        x -= centre.turn(offsets[lead], *centre.phases(h.rope, first, tokens), h.rope)[:, ::step]
    elif offsets is not None:
        x -= offsets[lead, ::step]
    return x


def _places(affine: Affine, x: np.ndarray, slopes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of one group of tokens, or of many of one token -> places in the range of each group, and weights: [n] each.

    ``slopes``: gradients of the same shape, if any.
    """
    if affine.channels == 1 and affine.tokens > 1:  # the numbers of a group side by side, which takes a third of the time
        x, slopes = np.ascontiguousarray(x.T), None if slopes is None else np.ascontiguousarray(slopes.T)
    numbers, weights = [], []
    width = x.shape[1] if affine.channels == 1 else affine.channels
    count = outliers.at_an_end(x.shape[1 if affine.channels == 1 else 0] if affine.tokens > 1 else 1, affine)
    for first in range(0, x.shape[1], width):
        groups = x[:, first : first + width]
        if affine.channels > 1 or affine.tokens == 1:
            groups = groups.reshape(1 if affine.tokens > 1 else groups.size if affine.channels == 1 else len(x), -1)
        low, high = _ends(groups, count)
        middle = (low + high) / 2 if affine.fields == c.AFFINE_SCALE_ZERO else np.zeros_like(low)
        half = np.maximum(high - middle, middle - low)
        place = (groups - middle) / np.where(half > 0, half, 1)
        weight = np.broadcast_to(half * half, groups.shape)
        if slopes is not None:
            weight = weight * slopes[:, first : first + width].reshape(weight.shape) ** 2
        inside = (groups >= low) & (groups <= high) if count else slice(None)
        numbers.append(place[inside].ravel())
        weights.append(weight[inside].ravel())
    return np.concatenate(numbers), np.concatenate(weights)


def _places_in(
    ranges: Ranges, lead: int, step: int, x: np.ndarray, slopes: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Every ``step``-th channel of vectors -> places in the range that a shared table has for it, and weights: [n] each."""
    fields = ranges.halves[lead % ranges.heads].astype(np.float64)
    scale, zero = (np.repeat(each, ranges.channels)[: ranges.width : step] for each in (fields[0], fields[-1]))
    middle = zero if ranges.fields == c.AFFINE_SCALE_ZERO else np.zeros_like(zero)
    place = (x - middle) / np.where(scale > 0, scale, 1)
    inside, weight = np.abs(place) <= 1, np.broadcast_to(scale * scale, x.shape)
    if slopes is not None:
        weight = weight * slopes**2
    return place[inside], weight[inside]


def _ends(groups: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The ends of each group [n, numbers] without ``count`` numbers at each, as ``outliers.ends`` has them: [n, 1] both."""
    size = groups.shape[1]
    if not count or size <= 2 * count:
        return groups.min(1, keepdims=True), groups.max(1, keepdims=True)
    ordered = np.sort(groups, 1)  # half the time of a partition at two places
    return ordered[:, count : count + 1], ordered[:, size - 1 - count :][:, :1]


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
    sums = np.zeros((3, _BINS + 1))  # of weights, of those times numbers, and times squares, up to each place
    np.cumsum(parts, 1, out=sums[:, 1:])
    spread = np.cumsum(np.cbrt(np.diff(sums[0, :: _BINS >> 8])))  # of 256 parts, smoothed so
    levels = np.interp((np.arange(count) + 0.5) / count, spread / spread[-1], np.arange(1, 257) / 128 - 1)
    ends, error, square = np.array([0] * count + [_BINS]), np.inf, sums[2, -1]
    for _ in range(_ROUNDS):
        middles = np.rint((levels[1:] + levels[:-1]) * (_BINS / 4) + _BINS / 2)
        ends[1:-1] = np.minimum(np.maximum(middles, 0), _BINS)
        up_to = sums[:2, ends]
        weight, first = up_to[:, 1:] - up_to[:, :-1]
        levels = np.divide(first, weight, out=levels, where=weight > 0)
        last, error = error, square - float(first @ levels)
        if last - error <= _STEP * abs(error):
            break
    return tuple(np.sort(levels.astype("<f2")).view("<u2").tolist())


def q_norm(levels: tuple[int, ...], numbers: np.ndarray, weights: np.ndarray) -> tuple[int, ...]:
    """Levels, as bits, scaled and shifted so that what codes of the former ones decode to has the numbers' mean and deviation.

    KVQuant's Q-Norm (arXiv 2401.18079, for 2 bits): a least error D of the numbers' variance becomes 2 - 2 sqrt(1 - D).
    """
    if not weights.any():
        return levels
    old = np.array(levels, "<u2").view("<f2").astype(np.float64)
    coded = old[np.searchsorted((old[1:] + old[:-1]) / 2, numbers)]
    means = [np.average(each, weights=weights) for each in (numbers, coded)]
    wanted, found = (
        np.average((each - mean) ** 2, weights=weights) for each, mean in zip((numbers, coded), means, strict=True)
    )
    scale = np.sqrt(wanted / found) if found > 0 else 1.0
    return tuple((means[0] + (old - means[1]) * scale).astype("<f2").view("<u2").tolist())
