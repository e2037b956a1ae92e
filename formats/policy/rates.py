"""Law: how a cache shares its bits: a preset names the mean rate, and tensors whose errors change the answer more get more.

Measured on SmolLM2-135M, Qwen2.5-Coder-0.5B and Gemma-3-270M (sliding windows, one KV head) with four texts each: a
1,024-token prefix, 96 tokens read on from it in two windows (Qwen: one), one key or value tensor coded at a time at pq3 behind
two rounds of rotation. What an error costs in next-token KL is first a matter of the role: in the geometric mean over layers a
key's relative error costs 3 (SmolLM2), 5 (Qwen) or 8 (Gemma) times a value's. It grows with the layer's centred key energy and,
less, with how far its value energy is above the trend of its neighbours; values of the first two layers count much in SmolLM2.
With all values coded at once (one text), KL grows with the 1.4th power of their error between 2 and 3 bits on all three models,
with all keys about in proportion to it. Low rank and heavy tails, measured on SmolLM2 and Gemma, explained little more.

``IMPORTANCE`` is the rounded optimum that these measurements predict, with equal weights of the three models; each bit goes
where it saves most. Whole caches at pq3 (two windows of 128 scored tokens and two seeds a text) have .47 to .76 of the KL of
equal bits in eleven of the twelve combinations of model and text, and .93 +- .18 in the other; with a regression on two of the
models alone (slopes times 0.7, level at most 1, the same growths) the third has .47 to .95.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.presets import PRESETS
from pqcodec.formats.plain import numbers as exact
from pqcodec.stages import centre
from pqcodec.stages.centre import Rope
from pqcodec.tensors import arrays
from pqcodec.tensors.numbers import widen

Shared = dict[int, tuple[str, str]]  # presets of each layer's key and value

# Presets whose bits are shared: of a coding's lowest rates a tensor has none to give, at its highest it can be given none.
SHARED = ("pq2.5", "pq3", "pq3.5", "pq4", "quad2.25", "quad2.5", "quad2.75", "quad3", "quad3.25")
FEWEST_LAYERS = 8  # in fewer layers the first two would take too many bits from the others


@dataclass(frozen=True)
class Importance:
    """Weights of a linear model: log2 of the cost, per coordinate, of a tensor's relative error, relative to the mean cost."""

    level: float  # constant term
    key_energy: float  # per doubling of the layer's centred key energy over the geometric mean
    value_energy: float  # per doubling of the layer's value energy over the trend
    early: float  # added in layers 0 and 1
    growth: float  # the exponent: cost grows with error ** growth around the preset's rate


IMPORTANCE = {
    "key": Importance(1.0, 1.0, 0.75, 0.0, growth=1.0),
    "value": Importance(-1.0, 0.5, 0.25, 2.0, growth=1.4),
}
FARTHEST = (3.0, 2.0)  # doublings of key and of value energy, to which the features are clamped
_SAMPLES = 256  # tokens per leading index in an energy, at least (where there are so many)
_TRIES = 8  # of shares, each of fewer bits than the last, until streams are small enough
_WIDE = 1 << 20  # coordinates that are widened to float64 at once
# relMSE of Gaussian vectors of 128 numbers, much as in benchmarks/results/rate_distortion.json: of quads by fast effort, and of
# split presets at the rates above, which quads do not have
_QUAD_ERRORS = {2: 0.1016, 2.25: 0.0740, 2.5: 0.0522, 2.75: 0.0370, 3: 0.0261, 3.25: 0.0186, 3.5: 0.0133}
_QUAD_ERRORS |= {4: 0.00777, 5: 0.00202, 6: 0.00052}


def energy(x: Any, *, rope: Rope | None = None, exact_tokens: int = 0, centred: bool = True) -> float:
    """Mean squared norm of a tensor's vectors [..., tokens, head_dim], minus their (RoPE-aware) mean unless ``centred=False``.

    Of 256 to 511 evenly spaced tokens of each leading index, without the first ``exact_tokens``; NaN and Inf count as 0.

    >>> energy(np.ones((2, 8, 64), np.float32)), energy(np.ones((2, 8, 64), np.float32), centred=False)
    (0.0, 64.0)
    """
    first, step = token_sample(x.shape[-2], exact_tokens)
    return energy_of(x[..., first::step, :], first, step, rope=rope, centred=centred)


def token_sample(tokens: int, exact_tokens: int) -> tuple[int, int]:
    """The sample that ``energy`` takes of so many tokens, as (first, step): every ``step``-th token from ``first`` on.

    >>> token_sample(1028, 4), token_sample(100, 4)
    ((4, 4), (4, 1))
    """
    first = min(exact_tokens, max(tokens - 1, 0))
    return first, max((tokens - first) // _SAMPLES, 1)


def energy_of(sample: Any, first: int, step: int, *, rope: Rope | None = None, centred: bool = True) -> float:
    """``energy`` of a tensor whose tokens ``first``, ``first + step`` ... (``token_sample``) are ``sample``."""
    seen = arrays.view(exact.on_cpu(sample))
    if not seen.stored.size:
        return 0.0
    stored = seen.stored.reshape(-1, *seen.shape[-2:])
    if rope and centred:
        field = rope.field(seen.shape[-1])
        cos, sin = centre.phases(field, first, stored.shape[-2], step)
    found = []
    at_once = max(_WIDE // (stored.shape[-2] * stored.shape[-1]), 1)
    for lead in range(0, len(stored), at_once):
        rows = widen(stored[lead : lead + at_once], seen.dtype).astype(np.float64)
        rows = np.where(np.isfinite(rows), rows, 0)
        if rope and centred:
            rows = centre.turn_back(rows, cos, sin, field)
        found.append(rows.var(-2).sum(-1) if centred else (rows**2).sum(-1))
    return float(np.concatenate(found).mean())


def shares(preset: str, layers: int) -> bool:
    """Whether a cache of ``layers`` layers shares the bits of a preset."""
    return preset in SHARED and layers >= FEWEST_LAYERS


def share_within(
    preset: str,
    energies: Mapping[int, tuple[float, float]],
    bytes_of: Callable[[Shared], int],
    sizes: Mapping[int, int] | None = None,
) -> Shared:
    """``share`` of so many bits that streams become no larger than by ``preset`` alone, whatever their blocks are padded by.

    ``bytes_of``: what the streams of all tensors take together. Where no such share is found, ``preset`` for all.
    """
    alone = {layer: (preset, preset) for layer in energies}
    if not shares(preset, len(energies)):
        return alone
    most, part = bytes_of(alone), 1.0
    for _ in range(_TRIES):
        shared = share(preset, energies, sizes, part)
        found = bytes_of(shared)
        if found <= most:
            return shared
        part *= most / found
    return alone


def share(
    preset: str, energies: Mapping[int, tuple[float, float]], sizes: Mapping[int, int] | None = None, part: float = 1.0
) -> Shared:
    """Presets of each layer's key and value whose mean is at most ``preset``'s rate, or a ``part`` of it.

    ``energies``: (centred key energy, value energy) of each layer; ``sizes``: coordinates of each layer's key, and of its
    value (None: all equal).

    >>> shared = share("pq3", {layer: (16.0 if layer == 5 else 1.0, 1.0) for layer in range(8)})
    >>> " ".join(key for key, _ in shared.values())
    'pq3 pq3 pq3 pq3 pq3 pq5 pq3 pq3'
    >>> " ".join(value for _, value in shared.values())
    'pq3.5 pq3 pq2.5 pq2.5 pq2.5 pq3 pq2.5 pq2.5'
    """
    layers = sorted(energies)
    if not shares(preset, len(layers)):
        return {layer: (preset, preset) for layer in layers}
    size = np.tile([1.0 if sizes is None else sizes[layer] for layer in layers], 2)
    costs, growths = _costs(np.array([energies[layer] for layer in layers]))
    rate, names = PRESETS[preset].rate, _names(preset)
    rates = np.array(sorted(names))
    errors = np.array([_log_error(preset, other) for other in rates])[:, None]
    left = size * costs * 4.0 ** (growths * (errors - _log_error(preset, rate)))  # cost of each tensor at each rate
    bits = size * np.diff(rates)[:, None]  # that each step to the next rate takes
    worth = (left[:-1] - left[1:]) / np.maximum(bits, 1e-30)
    level = [0] * len(size)
    budget = (part * rate - rates[0]) * size.sum() * (1 + 1e-12)
    steps = [(-worth[0, tensor], tensor) for tensor in range(len(size)) if size[tensor]]
    heapify(steps)
    while steps:  # the step that saves most cost per bit; one beyond the budget stays beyond it
        saves, tensor = heappop(steps)
        if saves >= 0:
            break
        at = level[tensor]
        if bits[at, tensor] > budget:
            continue
        budget -= bits[at, tensor]
        level[tensor] = at + 1
        if at + 1 < len(worth):
            heappush(steps, (-worth[at + 1, tensor], tensor))
    chosen = [names[rates[at]] for at in level]
    return dict(zip(layers, zip(chosen[: len(layers)], chosen[len(layers) :], strict=True), strict=True))


def presets_beside(preset: str) -> tuple[str, ...]:
    """The presets that tensors may get which share a preset's bits, the lowest rate first.

    >>> presets_beside("quad3")[-2:]
    ('pq5', 'pq6')
    """
    names = _names(preset)
    return tuple(names[rate] for rate in sorted(names))


def _names(preset: str) -> dict[float, str]:
    """The presets that tensors may get, by their rates: those of the preset's coding; above quads' rates split's."""
    own = {other.rate: name for name, other in PRESETS.items() if other.coding == PRESETS[preset].coding}
    higher = {other.rate: name for name, other in PRESETS.items() if other.coding == c.CODING_SPLIT and other.rate > max(own)}
    return own | higher


def _log_error(preset: str, rate: float) -> float:
    """The base-4 logarithm of a preset's relative error at another rate: one less a bit, or as measured."""
    return math.log(_QUAD_ERRORS[rate], 4) if PRESETS[preset].coding == c.CODING_QUADS else -rate


def _costs(energies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cost per coordinate of a relative error, and its growth exponent: [2 * layers] each, keys before values.

    ``energies`` [layers, 2]: as ``share`` takes them.
    """
    keys, values = np.log2(np.maximum(energies, 1e-30)).T
    near = [np.clip(x, -far, far) for x, far in zip((keys - keys.mean(), _above_trend(values)), FARTHEST, strict=True)]
    features = np.stack([np.ones(len(keys)), *near, np.arange(len(keys)) < 2])
    *weights, growths = np.array([list(vars(IMPORTANCE[role]).values()) for role in c.ROLES[:2]]).T
    return 2.0 ** (np.array(weights).T @ features).ravel(), np.repeat(growths, len(keys))


def _above_trend(energies: np.ndarray) -> np.ndarray:
    """log2 energies less their regression line over the layers, without layer 0 (often an outlier), whose result is 0."""
    at = np.arange(len(energies))
    above: np.ndarray = energies - np.polyval(np.polyfit(at[1:], energies[1:], 1), at)
    above[0] = 0
    return above
