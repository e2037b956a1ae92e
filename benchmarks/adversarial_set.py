"""Law: vectors that a bad rotation codes badly, made without a model; and how their errors are told against a Gaussian's.

A set is many cases of one head_dim. Few channels with most of the energy stand for what RoPE and outlier channels do to real
keys: the channels lie at every power-of-two xor offset, at the additive offsets of both RoPE styles (d/2 half-split, 1
interleaved), at d/4 and d/16, and scattered; "here" is one place for all vectors of a case, "anywhere" another one for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

import pqcodec
from pqcodec.stages import rotation
from pqcodec.stream.orders import order_for

COUNTS = (1, 2, 3, 4, 8)
SHARES = (0.5, 0.8, 0.95, 0.99)  # of the energy, in the dominating channels
AMPLITUDES = ("equal", "signs", "gaussian")
SEEDS = range(8)
PRESETS = tuple(name for name, preset in pqcodec.PRESETS.items() if preset.own)  # others keep their own rotation, or have none


@dataclass(frozen=True)
class Case:
    """One kind of vectors: x, float32 [vectors, head_dim]."""

    name: str
    x: np.ndarray


def cases(
    head_dim: int, vectors: int, shares: tuple[float, ...] = SHARES, counts: tuple[int, ...] = COUNTS, seed: int = 0
) -> list[Case]:
    """The adversarial set of ``head_dim``: about a thousand cases of ``vectors`` vectors each (one of them of head_dim).

    >>> found = cases(64, 4)
    >>> len(found) > 900, sorted({case.x.shape for case in found}), {case.x.dtype.name for case in found}
    (True, [(4, 64), (64, 64)], {'float32'})
    """
    rng = np.random.default_rng([seed, head_dim])
    made = [*_dominated(head_dim, vectors, shares, counts, rng), *_others(head_dim, vectors, rng)]
    return [Case(name, np.ascontiguousarray(x, np.float32)) for name, x in made]


# -- few channels ------------------------------------------------------------------------------------------------
def layouts(head_dim: int, count: int) -> dict[str, np.ndarray]:
    """Ways to lay ``count`` channels, by name: [places, count], every place at which they fit into ``head_dim``.

    >>> layouts(64, 2)["xor 32"][:2].tolist(), layouts(64, 3)["+16"][60].tolist()
    ([[0, 32], [1, 33]], [60, 12, 28])
    """
    index, steps, found = np.arange(head_dim)[:, None], np.arange(count), {}
    if count == 1:
        return {"single": index}
    bits = [1 << bit for bit in range((head_dim - 1).bit_length())]
    for first, offset in enumerate(bits):  # the span of this offset and the next ones: a coset of a subgroup under xor
        span = [bits[(first + i) % len(bits)] for i in range((count - 1).bit_length())]
        masks = np.array([sum(bit for i, bit in enumerate(span) if step >> i & 1) for step in steps])
        places = index ^ masks
        found[f"xor {offset}"] = places[(places < head_dim).all(axis=1)]
    for offset in dict.fromkeys((1, head_dim // 16, head_dim // 4, head_dim // 2)):
        if offset and offset * count <= head_dim:
            found[f"+{offset}"] = (index + offset * steps) % head_dim
    found["scattered"] = np.random.default_rng(count).random((head_dim, head_dim)).argsort(axis=1)[:, :count]
    return {name: places for name, places in found.items() if len(places)}


def _dominated(
    head_dim: int, vectors: int, shares: tuple[float, ...], counts: tuple[int, ...], rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    for count in counts:
        for (layout, places), share, amplitude, place in product(
            layouts(head_dim, count).items(), shares, AMPLITUDES, ("here", "anywhere")
        ):
            at = rng.integers(len(places), size=1 if place == "here" else vectors)
            channels = np.broadcast_to(places[at], (vectors, count))
            x = _noise_and(channels, _amplitudes(amplitude, vectors, count, rng), head_dim, share, rng)
            yield f"{count} channels, {layout}, {share:.0%}, {amplitude}, {place}", x


def _amplitudes(kind: str, vectors: int, count: int, rng: np.random.Generator) -> np.ndarray:
    if kind == "equal":
        return np.ones((vectors, count))
    if kind == "signs":
        return rng.choice([-1.0, 1.0], (vectors, count))
    return rng.standard_normal((vectors, count))


def _noise_and(
    channels: np.ndarray, amplitudes: np.ndarray, head_dim: int, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Vectors with exactly ``share`` of their energy in ``channels`` and the rest, Gaussian, elsewhere."""
    x = rng.standard_normal((len(channels), head_dim))
    np.put_along_axis(x, channels, 0.0, axis=1)
    x *= np.sqrt((1 - share) / (x**2).sum(axis=1, keepdims=True))
    strong = amplitudes * np.sqrt(share / (amplitudes**2).sum(axis=1, keepdims=True))
    np.put_along_axis(x, channels, strong, axis=1)
    return x


# -- everything else ---------------------------------------------------------------------------------------------
def _others(head_dim: int, vectors: int, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    shape, loud = (vectors, head_dim), rng.lognormal(size=(vectors, 1))
    for size, share in product((4, 8, 16), (0.95, 1.0)):
        starts = size * rng.integers(head_dim // size, size=(vectors, 1))
        blocks = rng.standard_normal((vectors, size))
        yield f"block of {size}, {share:.0%}", _noise_and(starts + np.arange(size), blocks, head_dim, share, rng)
    for rank, number in product((1, 3), range(3)):
        yield f"rank {rank}, number {number}", rng.standard_normal((vectors, rank)) @ rng.standard_normal((rank, head_dim))
    yield "constant", loud * np.ones(head_dim)
    yield "alternating", loud * (-1.0) ** np.arange(head_dim)
    yield "constant, then its negative", loud * np.where(np.arange(head_dim) < head_dim // 2, 1.0, -1.0)
    yield "ramp", loud * np.arange(1, head_dim + 1)
    for freedom in (2, 3):
        yield f"Student t, {freedom}", rng.standard_t(freedom, shape)
    huge = rng.standard_normal((head_dim, head_dim))
    np.fill_diagonal(huge, 1e4)  # few vectors would not do: what they become depends on the channel and the seed alone
    yield "one huge coordinate, every channel in turn", huge
    order = order_for(head_dim)
    rows = rotation.hadamard(order)[:, :head_dim]
    yield "rows of the Hadamard matrix", loud * rows[rng.integers(order, size=vectors)]
    columns = rotation.hadamard(order)[:head_dim].T
    yield "columns of the Hadamard matrix", loud * columns[rng.integers(order, size=vectors)]


def gaussian(head_dim: int, vectors: int) -> np.ndarray:
    """What the presets are made for; its mean error is the nominal one: float32 [vectors, head_dim]."""
    return np.random.default_rng(head_dim).standard_normal((vectors, head_dim)).astype(np.float32)


# -- errors ------------------------------------------------------------------------------------------------------
def errors(x: np.ndarray, preset: str, seed: int, backend: str = "auto") -> np.ndarray:
    """Squared error over squared norm of every vector of x [..., head_dim], coded as a user would."""
    y = pqcodec.decode(pqcodec.encode(x, preset=preset, seed=seed, backend=backend), backend=backend)
    return ((x.astype(np.float64) - y) ** 2).sum(axis=-1) / (x.astype(np.float64) ** 2).sum(axis=-1)


@dataclass(frozen=True)
class Told:
    """What a rotation is judged by. All errors but ``nominal`` are told over it, the mean of Gaussian vectors."""

    nominal: float  # relMSE
    means: dict[str, float]  # of the cases, over their vectors and all seeds
    high: float  # 99.9th percentile of all vectors of all seeds
    worst: float  # vector
    gaussian_high: float
    gaussian_worst: float

    @property
    def worst_case(self) -> str:
        return max(self.means, key=self.means.__getitem__)


def tell(found: list[Case], preset: str, seeds: Iterable[int], nominal_vectors: int, backend: str = "auto") -> Told:
    """Code the whole set with every seed, and as many Gaussian vectors as are asked for with seed 0.

    >>> few = cases(64, 2, shares=(0.5,), counts=(1,))
    >>> found = tell(few, "pq3", seeds=(0, 1), nominal_vectors=500, backend="reference")
    >>> 0.025 < found.nominal < 0.035, found.means[found.worst_case] == max(found.means.values()), found.high <= found.worst
    (True, True, True)
    """
    x = np.concatenate([case.x for case in found])
    plain = errors(gaussian(x.shape[1], nominal_vectors), preset, 0, backend)
    of_set = np.stack([errors(x, preset, seed, backend) for seed in seeds]) / plain.mean()
    per_case = [part.mean() for part in np.split(of_set, np.cumsum([len(case.x) for case in found])[:-1], axis=1)]
    plain_high, plain_worst = np.quantile(plain, 0.999) / plain.mean(), plain.max() / plain.mean()
    return Told(
        nominal=float(plain.mean()),
        means={case.name: float(mean) for case, mean in zip(found, per_case, strict=True)},
        high=float(np.quantile(of_set, 0.999)),
        worst=float(of_set.max()),
        gaussian_high=float(plain_high),
        gaussian_worst=float(plain_worst),
    )
