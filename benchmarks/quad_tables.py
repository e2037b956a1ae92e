"""Train the tables of the quads coding: ``python -m benchmarks.quad_tables [BITS ...]``, seeded, some minutes a table.

A table of 2^b points of the positive orthant is a union of orbits: all permutations of a few sorted representatives. Equal
coordinates make an orbit smaller, so the representatives' ties must be chosen with the sum of the orbits in view: a search
exchanges some representatives for others of the same sum and keeps what lowers the error. The data are quads of random
directions of 128 dimensions over a quantised radius, as the encoder sees them; at last all vectors choose among five radii
("best" effort).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numba
import numpy as np

from benchmarks.results_file import machine

RADIUS_STEPS = 8  # an octave
CHOICES = (-2, -1, 0, 1, 2)  # steps that best effort tries
DIMENSIONS = 128
LARGEST = 127
EXCHANGES = {4: 2000, 5: 4000, 6: 6000, 7: 6000, 8: 8000, 9: 4000, 10: 4000}  # of a search, by bits
STARTS = {4: 2, 5: 2, 6: 2, 7: 2, 8: 2, 9: 1, 10: 1}  # searches, of which the best counts
PRICE = 0.0003  # of a representative, in its table's error: an encoder tries them all
TIES = {(1, 1, 1, 1): 24, (2, 1, 1): 12, (1, 2, 1): 12, (1, 1, 2): 12, (2, 2): 6, (1, 3): 4, (3, 1): 4, (4,): 1}
TYPES = list(TIES)


def quads(vectors: int, seed: int) -> np.ndarray:
    """Sorted magnitudes [vectors, DIMENSIONS / 4, 4], largest first, of vectors over their quantised radii."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((vectors, DIMENSIONS), np.float32)
    x /= np.sqrt((x**2).mean(1, keepdims=True))
    x *= np.exp2((rng.random((vectors, 1), np.float32) - 0.5) / RADIUS_STEPS)
    return -np.sort(-np.abs(x.reshape(vectors, -1, 4)), 2)


def flat(x: np.ndarray) -> np.ndarray:
    """Quads [vectors, quads, 4] -> [4, n]."""
    return np.ascontiguousarray(x.reshape(-1, 4).T)


@numba.njit(fastmath=True, nogil=True)
def _assign(x, points, half, near, score):  # type: ignore[no-untyped-def]
    """Number of the nearest representative of each quad x float32 [4, n], into ``near``; squared errors, summed up."""
    n = x.shape[1]
    for i in range(n):
        score[i] = -1e30
    for r in range(len(points)):
        p, q, s, t, h, number = points[r, 0], points[r, 1], points[r, 2], points[r, 3], half[r], np.int32(r)
        for i in range(n):
            found = x[0, i] * p + x[1, i] * q + x[2, i] * s + x[3, i] * t - h
            better = found > score[i]
            near[i] = number if better else near[i]
            score[i] = found if better else score[i]
    total = 0.0
    for i in range(n):
        total += x[0, i] ** 2 + x[1, i] ** 2 + x[2, i] ** 2 + x[3, i] ** 2 - 2 * score[i]
    return total


@numba.njit(nogil=True)
def _sums(x, near, sums, counts):  # type: ignore[no-untyped-def]
    sums[:] = 0
    counts[:] = 0
    for i in range(x.shape[1]):
        r = near[i]
        counts[r] += 1
        for k in range(4):
            sums[r, k] += x[k, i]


class Table:
    """Representatives float32 [r, 4], sorted, each with its ties. Quads are float32 [4, n]."""

    def __init__(self, points: np.ndarray, types: list[int]) -> None:
        self.points, self.types = np.ascontiguousarray(points, np.float32), list(types)
        self.snap()

    def copy(self) -> Table:
        return Table(self.points.copy(), self.types)

    def snap(self) -> None:
        """Make tied coordinates equal, and their mean."""
        for row, ties in zip(self.points, self.types, strict=True):
            first = 0
            for run in TYPES[ties]:
                row[first : first + run] = row[first : first + run].mean()
                first += run

    def nearest(self, x: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
        """Numbers of the nearest representatives, the sum of squared errors, and the scores."""
        near, score = np.zeros(x.shape[1], np.int32), np.zeros(x.shape[1], np.float32)
        half = (self.points**2).sum(1) / 2
        return near, _assign(x, self.points, half, near, score), score

    def error(self, x: np.ndarray) -> float:
        return self.nearest(x)[1] / float((x.astype(np.float64) ** 2).sum())

    def cost(self, x: np.ndarray) -> float:
        """The error, and a little for each representative: an encoder tries them all."""
        return self.error(x) * (1 + PRICE * len(self.types))

    def fit(self, x: np.ndarray, times: int) -> None:
        """Each representative becomes the mean of what is nearest to it."""
        sums, counts = np.zeros((len(self.types), 4)), np.zeros(len(self.types), np.int64)
        for _ in range(times):
            _sums(x, self.nearest(x)[0], sums, counts)
            used = counts > 0
            self.points[used] = sums[used] / counts[used, None]
            self.snap()


def replacements(most: int) -> dict[int, list[tuple[int, ...]]]:
    """All small sets of types by the sum of their orbits."""
    found: dict[int, list[tuple[int, ...]]] = {}
    for count in range(1, most + 1):
        for types in itertools.combinations_with_replacement(range(len(TYPES)), count):
            found.setdefault(sum(TIES[TYPES[t]] for t in types), []).append(types)
    return found


def begin(bits: int, x: np.ndarray, rng: np.random.Generator) -> Table:
    """A first table: orbits of random types, filled up to the size."""
    left, types = 1 << bits, list[int]()
    shares = np.array([0.30, 0.14, 0.14, 0.14, 0.06, 0.08, 0.06, 0.08])
    while left:
        fits = shares * [TIES[t] <= left for t in TYPES]
        chosen = int(rng.choice(len(TYPES), p=fits / fits.sum()))
        types.append(chosen)
        left -= TIES[TYPES[chosen]]
    return Table(x[:, rng.integers(x.shape[1], size=len(types))].T, types)


def search(bits: int, exchanges: int, seed: int) -> Table:
    """The best table that so many exchanges find."""
    rng = np.random.default_rng(seed)
    x = flat(quads(4000, seed + 1))
    few = x[:, : 12000 if bits < 8 else 32000]
    sets = {total: [s for s in found if len(s) <= 3] or found for total, found in replacements(4).items()}
    best = begin(bits, few, rng)
    best.fit(few, 30)
    now, error, began = best.copy(), best.cost(few), time.time()
    lowest = error
    for move in range(exchanges):
        heat = 0.01 * (1 - move / exchanges) ** 2
        _, _, score = now.nearest(few[:, :6000])
        out = rng.permutation(len(now.types))[: rng.integers(1, 4)].tolist()
        total = sum(TIES[TYPES[now.types[i]]] for i in out)
        into = sets[total][rng.integers(len(sets[total]))]
        keep = [i for i in range(len(now.types)) if i not in out]
        if rng.random() < 0.5:  # new representatives begin where the error is, or near those that were taken out
            weight = np.maximum((few[:, :6000] ** 2).sum(0) - 2 * score, 0)
            places = few[:, rng.choice(6000, len(into), p=weight / weight.sum())].T
        else:
            old = now.points[[out[i % len(out)] for i in range(len(into))]]
            places = -np.sort(-np.abs(old + 0.15 * rng.standard_normal(old.shape)), 1)
        trial = Table(np.concatenate([now.points[keep], places]), [now.types[i] for i in keep] + list(into))
        trial.fit(few, 8)
        found = trial.cost(few)
        if found < error * (1 + heat * rng.random()):
            now, error = trial, found
            if found < lowest:
                best, lowest = trial.copy(), found
        if move % 1000 == 999:
            spent, what = time.time() - began, f"{move + 1} exchanges, {len(now.types)} representatives"
            print(f"{bits} bits: {spent:4.0f} s, {what}, {error:.5f}, best {lowest:.5f}", file=sys.stderr, flush=True)
    best.fit(x, 60)
    return best


def choose(table: Table, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quads [vectors, quads, 4] over the best of the five radii of each vector, and the squared errors as they were."""
    errors, scaled = [], []
    for step in CHOICES:
        scale = 2.0 ** (step / RADIUS_STEPS)
        y = (x / scale).astype(np.float32)
        _, _, score = table.nearest(flat(y))
        off = (y.astype(np.float64) ** 2).sum((1, 2)) - 2 * score.astype(np.float64).reshape(len(x), -1).sum(1)
        errors.append(off * scale**2)
        scaled.append(y)
    best = np.stack(errors).argmin(0)
    return np.stack(scaled)[best, np.arange(len(x))], np.stack(errors).min(0)


def measured(table: Table, x: np.ndarray) -> tuple[float, float]:
    """relMSE of fast and of best effort."""
    return table.error(flat(x)), float(choose(table, x)[1].sum() / (x.astype(np.float64) ** 2).sum())


def finish(table: Table, seed: int) -> None:
    """Fit to the quads of vectors that chose their radius."""
    x = quads(20000, seed + 2)
    for _ in range(25):
        chosen, _ = choose(table, x)
        table.fit(flat(chosen), 2)


def whole(table: Table) -> tuple[Table, float]:
    """The table in integers of 1 to LARGEST, and how many are a radius (a multiple of 1/16)."""
    best, x = (math.inf, table.points, 1.0), flat(quads(3000, 77))
    top = float(table.points.max())
    for quarters in range(60):
        grid = round(16 * (LARGEST - quarters / 4) / top) / 16
        points = np.clip(np.round(table.points * grid), 1, LARGEST)
        best = min(best, (Table(points / grid, table.types).error(x), points, grid), key=lambda found: found[0])
    return Table(best[1], table.types), best[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bits", nargs="*", type=int, default=[4, 5, 6, 7, 8, 9, 10])
    parser.add_argument("--exchanges", type=int, help="of a search; else what EXCHANGES says")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quad_tables.json"))
    arguments = parser.parse_args()
    tables = json.loads(arguments.out.read_text())["tables"] if arguments.out.exists() else {}
    x = quads(20000, 4242)
    for bits in arguments.bits:
        found = []
        for start in range(STARTS[bits]):
            table = search(bits, arguments.exchanges or EXCHANGES[bits], 1000 * bits + start)
            finish(table, bits)
            found.append((measured(table, x)[1], table))
        table = min(found, key=lambda pair: pair[0])[1]
        integers, grid = whole(table)
        fast, best = measured(Table(integers.points / grid, table.types), x)
        points = sorted((tuple(int(n) for n in row) for row in integers.points), key=lambda p: (sum(n * n for n in p), p))
        assert sum(math.factorial(4) // math.prod(map(math.factorial, map(p.count, set(p)))) for p in points) == 1 << bits
        print(f"{bits} bits: {len(points)} representatives, relMSE fast {fast:.5f}, best {best:.5f}", flush=True)
        tables[str(bits)] = {"grid": grid, "fast": fast, "best": best, "representatives": points}
        figures = {"command": "python -m benchmarks.quad_tables", **machine(), "dimensions": DIMENSIONS, "tables": tables}
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
