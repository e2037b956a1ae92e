"""Law: bits against relMSE, on Gaussian vectors and on a real cache: ``python -m benchmarks.rate_distortion``.

Beside every preset stand, at equal total bits, Lloyd-Max scalars with an f16 norm (what TurboQuant and its kind do), the
paper's setting and Shannon's bound. The paper's dense random rotation and its fitted ("online") codebooks are compared with
the Hadamard rotation and the closed form. Prints tables; writes results/rate_distortion.json and .png.
"""

from __future__ import annotations

from functools import lru_cache
from math import erf, pi, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

import pqcodec
from benchmarks import results_file
from pqcodec import Rope
from pqcodec import constants as c
from pqcodec.stages import rotation
from pqcodec.stream.orders import order_for

FIXTURE = Path(__file__).parents[1] / "tests" / "data" / "smollm2_kv.safetensors"
ROPE = Rope(theta=100000.0)
VECTORS = 20_000
LEVELS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80)
PRESETS = [name for name, preset in pqcodec.PRESETS.items() if preset.own]
ROTATED = [name for name, preset in pqcodec.PRESETS.items() if preset.rounds]


# -- Lloyd-Max ---------------------------------------------------------------------------------------------------
@lru_cache
def lloyd_max(levels: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Bounds, centroids and distortion of the best ``levels`` cells for a standard normal number (Lloyd, Max)."""
    phi = np.vectorize(lambda t: 0.5 * (1 + erf(t / sqrt(2))))
    centroids = np.linspace(-2.5, 2.5, levels) * (1 + np.log2(levels) / 8)
    for _ in range(20_000):
        bounds = np.concatenate([[-40.0], (centroids[1:] + centroids[:-1]) / 2, [40.0]])
        density = np.exp(-(bounds**2) / 2) / sqrt(2 * pi)
        mass = np.diff(phi(bounds))
        new = -np.diff(density) / mass
        done = np.abs(new - centroids).max() < 1e-7
        centroids = new
        if done:
            break
    return bounds, centroids, float(1 - (mass * centroids**2).sum())


def lloyd_max_at(bits: float, head_dim: int) -> float:
    """relMSE of Lloyd-Max with an f16 norm at ``bits`` a coordinate in all; log-linear between numbers of levels."""
    scalar_bits = bits - 16 / head_dim
    known = [lloyd_max(n)[2] for n in LEVELS]
    return float(np.exp(np.interp(scalar_bits, np.log2(LEVELS), np.log(known))))


def lloyd_max_round_trip(x: np.ndarray, levels: int) -> np.ndarray:
    """x [n, head_dim] through f16 norm, Hadamard rotation and Lloyd-Max cells, and back."""
    order = order_for(x.shape[1])
    h = rotation.hadamard(order) * rotation.signs(0, order) / sqrt(order)
    norm = np.linalg.norm(x, axis=1, keepdims=True).astype(np.float16).astype(np.float64)
    unit = np.where(norm > 0, x / np.maximum(norm, 1e-30), 0) @ h.T * sqrt(order)
    bounds, centroids, _ = lloyd_max(levels)
    return centroids[np.searchsorted(bounds[1:-1], unit)] / sqrt(order) @ h * norm


# -- the paper ---------------------------------------------------------------------------------------------------
def paper_round_trip(v: np.ndarray, fitted: bool) -> np.ndarray:
    """Rotated vectors v through four levels of angles, 4/2/2/2 bits, with closed-form or fitted (k-means) codebooks."""
    radius, levels = v.reshape(len(v), -1, 2), []
    level_angles = np.arctan2(radius[..., 1], radius[..., 0]) % (2 * pi)
    levels.append((np.floor(level_angles * 16 / (2 * pi)) + 0.5) * (2 * pi / 16))
    radius = np.linalg.norm(radius, axis=2)
    for level in (2, 3, 4):
        pair = radius.reshape(len(v), -1, 2)
        angle = np.arctan2(pair[..., 1], pair[..., 0])
        a, b = c.PAPER_ANGLES[level]
        centroids = np.array([a, b, pi / 2 - b, pi / 2 - a])
        for _ in range(30 if fitted else 0):
            cell = np.searchsorted((centroids[1:] + centroids[:-1]) / 2, angle)
            centroids = np.array([angle[cell == k].mean() for k in range(4)])
        levels.append(centroids[np.searchsorted((centroids[1:] + centroids[:-1]) / 2, angle)])
        radius = np.linalg.norm(pair, axis=2)
    radius = radius.astype(np.float16).astype(np.float64)
    for angle in reversed(levels):
        radius = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 2).reshape(len(v), -1)
    return radius


def paper_rotations(x: np.ndarray) -> dict[str, float]:
    """relMSE of the paper's setting after its dense rotation and after Hadamard's, with both kinds of codebook."""
    n = x.shape[1]
    dense = np.linalg.qr(np.random.default_rng(1).standard_normal((n, n)))[0]
    turned = {"dense": x @ dense, "hadamard": x * rotation.signs(0, n) @ rotation.hadamard(n).T / sqrt(n)}
    return {
        f"{name}, {'online' if fitted else 'closed form'}": rel_mse(v, paper_round_trip(v, fitted))
        for name, v in turned.items()
        for fitted in (False, True)
    }


# -- figures -----------------------------------------------------------------------------------------------------
def rel_mse(x: np.ndarray, y: np.ndarray) -> float:
    return float(((x.astype(np.float64) - y) ** 2).sum() / (x.astype(np.float64) ** 2).sum())


def rows_bits(data: bytes) -> float:
    """Bits a coordinate of the coded rows, checksums and header left out."""
    from pqcodec.stream.header import Header

    return Header.from_bytes(data).bits_per_coordinate


def gaussian(head_dim: int) -> list[dict[str, Any]]:
    """A row for every preset on standard normal vectors."""
    x = np.random.default_rng(head_dim).standard_normal((VECTORS, head_dim)).astype(np.float32)
    rows = []
    for name in ROTATED:
        data = pqcodec.encode(x, preset=name)
        bits, error = rows_bits(data), rel_mse(x, pqcodec.decode(data))
        scalar = lloyd_max_at(bits, head_dim)
        rows.append(
            {
                "preset": name,
                "bits": bits,
                "rel_mse": error,
                "lloyd_max": scalar,
                "ratio": error / scalar,
                "bits_above_shannon": bits + np.log2(error) / 2,
            }
        )
    return rows


def real() -> dict[str, list[dict[str, Any]]]:
    """Rows for the keys (RoPE-aware centred) and values of the fixture; the first four tokens are left out."""
    tensors = {name: x[0] for name, x in load_file(FIXTURE).items()}
    found: dict[str, list[dict[str, Any]]] = {}
    for role in ("key", "value"):
        group = [x for name, x in tensors.items() if name.endswith(role)]
        options: dict[str, Any] = {"center": "rope", "rope": ROPE} if role == "key" else {}
        centred = [x[:, 4:].astype(np.float32) for x in group]
        if role == "key":  # what a centred codec has left to code: x minus the mean that the stream stores
            centred = [x - _offsets(x) for x in centred]
        flat = np.concatenate([x.reshape(-1, x.shape[-1]) for x in centred])
        known = [(np.log2(n) + 16 / flat.shape[1], rel_mse(flat, lloyd_max_round_trip(flat, n))) for n in LEVELS]
        rows = []
        for name in ROTATED:
            error = norm = 0.0
            for x, rest in zip(group, centred, strict=True):
                data = pqcodec.encode(np.ascontiguousarray(x[:, 4:]).astype(np.float32), preset=name, **options)
                error += float(((x[:, 4:].astype(np.float64) - pqcodec.decode(data)) ** 2).sum())
                norm += float((rest.astype(np.float64) ** 2).sum())
            bits = rows_bits(data)
            scalar = float(np.exp(np.interp(bits, [b for b, _ in known], [np.log(e) for _, e in known])))
            rows.append(
                {"preset": name, "bits": bits, "rel_mse": error / norm, "lloyd_max": scalar, "ratio": error / norm / scalar}
            )
        found[role] = rows
    return found


def _offsets(x: np.ndarray) -> np.ndarray:
    """The RoPE-aware mean of x [heads, tokens, head_dim] at every token."""
    from pqcodec.stages import centre

    field = ROPE.field(x.shape[-1])
    cos, sin = centre.phases(field, 0, x.shape[1])
    means = [centre.turn_back(head, cos, sin, field).mean(0).astype(np.float32) for head in x]
    return np.stack([centre.turn(mean, cos, sin, field) for mean in means])


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=title)
    for heading in ("preset", "bits/coord", "relMSE", "Lloyd-Max + f16 norm", "ratio"):
        shown.add_column(heading, justify="left" if heading == "preset" else "right")
    for row in rows:
        cells = (f"{row['bits']:.3f}", f"{row['rel_mse']:.5f}", f"{row['lloyd_max']:.5f}", f"{row['ratio']:.3f}")
        shown.add_row(row["preset"], *cells)
    return shown


def plot(figures: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "Gaussian, head_dim 128": figures["gaussian"]["128"],
        "SmolLM2 keys, centred": figures["real"]["key"],
        "SmolLM2 values": figures["real"]["value"],
    }
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        split, paper = [r for r in rows if r["preset"] != "paper"], [r for r in rows if r["preset"] == "paper"]
        bits = [r["bits"] for r in split]
        axis.semilogy(bits, [r["lloyd_max"] for r in split], "s--", color="tab:gray", label="Lloyd-Max + f16 norm")
        axis.semilogy(bits, [r["rel_mse"] for r in split], "o-", color="tab:blue", label="pqcodec pq2 .. pq6")
        axis.semilogy(
            [r["bits"] for r in paper], [r["rel_mse"] for r in paper], "*", ms=13, color="tab:red", label="PolarQuant paper"
        )
        if title.startswith("Gaussian"):
            axis.semilogy(bits, [4.0**-b for b in bits], ":", color="black", label="Shannon")
        axis.set(title=title, xlabel="bits per coordinate, radius included")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("relative mean squared error")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    console = Console()
    x = np.random.default_rng(5).standard_normal((VECTORS, 128))
    keys = np.concatenate([v[0].reshape(-1, 64) for k, v in load_file(FIXTURE).items() if k.endswith("key")]).astype(np.float64)
    figures: dict[str, Any] = {
        "gaussian": {str(head_dim): gaussian(head_dim) for head_dim in (64, 128)},
        "real": real(),
        "paper_rotation": {"gaussian 128": paper_rotations(x), "SmolLM2 keys": paper_rotations(keys)},
    }
    for head_dim, rows in figures["gaussian"].items():
        console.print(table(f"Gaussian, head_dim {head_dim}", rows))
    for role, rows in figures["real"].items():
        console.print(table(f"SmolLM2 {role}s" + (", RoPE-aware centred" if role == "key" else ""), rows))
    for name, errors in figures["paper_rotation"].items():
        console.print(f"paper setting on {name}: " + ", ".join(f"{kind} {error:.5f}" for kind, error in errors.items()))
    plot(figures, results_file.RESULTS / "rate_distortion.png")
    console.print(
        f"wrote {results_file.write('rate_distortion', 'python -m benchmarks.rate_distortion', figures).name} and its .png"
    )


if __name__ == "__main__":
    main()
