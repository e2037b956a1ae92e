"""Codings of other systems beside ours: ``python -m benchmarks.neighbours``.

Bits are those of rows and of the fields that they share; headers and checksums are left out. Gaussian vectors of 128 numbers;
keys and values of SmolLM2, 256 tokens of layers 0, 1, 15 and 29, not centred. Sketches are decoded without bias. Speeds are
by the time of all cores, over pq3's, measured in turns; of scores of sketches, over those of decoding them. ``KNOWN`` is what
the system's algorithm, in plain numpy and without a stream, makes of such vectors.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

import pqcodec
from benchmarks import results_file
from pqcodec.attention import scores
from pqcodec.calibrate import rows_to_code
from pqcodec.stream.header import Header

FIXTURE = Path(__file__).parent.parent / "tests" / "data" / "smollm2_kv.safetensors"
SHAPE, TOKENS, TURNS = (4, 8, 2048, 128), 256, 7
BESIDE = ("pq2", "pq3", "pq4", "quad3")
KNOWN: dict[str, tuple[float, float | None]] = {  # relMSE of Gaussian vectors, and of keys
    "wu44": (0.0145, 0.0060),
    "wu33": (0.0577, 0.0242),
    "wu35": (0.0100, None),
    "wu24": (0.0396, 0.0172),
    "int2": (0.155, None),
    "nuq4-key": (0.0101, None),
    "nuq3-key": (0.0366, None),
    "nuq2-key": (0.124, None),
    "kvquant4-key": (0.0068, None),
    "kvquant3-key": (0.0263, None),
    "kvquant2-key": (0.0966, None),
    "qjl": (0.283, 0.285),
    "qjl4": (0.142, 0.143),
    "qjl-outliers": (0.241, 0.129),
    "qjl4-outliers": (0.123, None),
    "qjl-iid": (0.780, None),
}
ROPE = pqcodec.Rope(theta=100_000.0)  # of SmolLM2
KVQUANT: dict[
    str, tuple[float, float]
] = {  # relMSE of all 324 tokens: keys before RoPE, first token exact; values, heads joined
    "nuq4": (0.0017, 0.0171),
    "nuq3": (0.0070, 0.0622),
    "nuq2": (0.0257, 0.234),
    "kvquant4": (0.0014, 0.0081),
    "kvquant3": (0.0056, 0.0335),
    "kvquant2": (0.0211, 0.125),
}
KNOWN_BEST = {"wu44": 0.0047, "wu33": 0.0185}  # of keys, with the range behind the largest gap


def rel_mse(x: np.ndarray, options: dict[str, Any]) -> float:
    """Squared error over squared norm of a tensor, coded and decoded."""
    y = pqcodec.decode(pqcodec.encode(x, **options), estimate="unbiased")
    return float(((x.astype(np.float64) - y) ** 2).sum() / (x.astype(np.float64) ** 2).sum())


def row_of(preset: str, effort: str, gaussian: np.ndarray, model: dict[str, list[np.ndarray]]) -> dict[str, Any]:
    """Bits and errors of a preset."""
    options = {"preset": preset, "effort": effort}
    known = KNOWN.get(preset, (None, None)) if effort == "fast" else (None, KNOWN_BEST.get(preset))
    return {
        "preset": preset,
        "effort": effort,
        "bits": Header.from_bytes(pqcodec.encode(gaussian[:1], **options)).bits_per_coordinate,
        "gaussian": rel_mse(gaussian, options),
        "gaussian_known": known[0],
        "key": float(np.mean([rel_mse(x, options) for x in model["key"]])),
        "key_known": known[1],
        "value": float(np.mean([rel_mse(x, options) for x in model["value"]])),
    }


def kvquant_rows(tensors: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """KVQuant as it is, on tensors that were brought into its form, and as streams have it: keys after RoPE, single heads."""
    keys, values = (
        [x[0].astype(np.float32) for name, x in tensors.items() if name.endswith(role)] for role in ("key", "value")
    )
    before, together = [rows_to_code(x, rope=ROPE) for x in keys], [rows_to_code(x, join_heads=True) for x in values]
    found = []
    for name, known in KVQUANT.items():
        of_keys, first = {"preset": f"{name}-key", "exact_tokens": 1}, {"center": "rope", "rope": ROPE}
        found.append(
            {
                "preset": name,
                "keys_before_rope": _mean_rel_mse(before, of_keys),
                "keys_known": known[0],
                "keys_after_rope": _mean_rel_mse(keys, of_keys | first),
                "values_of_all_heads": _mean_rel_mse(together, {"preset": name}),
                "values_known": known[1],
                "values_of_one_head": _mean_rel_mse(values, {"preset": name}),
                "key_bits": float(np.mean([8 * len(pqcodec.encode(x, **of_keys)) / x.size for x in before])),
                "value_bits": float(np.mean([8 * len(pqcodec.encode(x, preset=name)) / x.size for x in together])),
            }
        )
    return found


def _mean_rel_mse(tensors: list[np.ndarray], options: dict[str, Any]) -> float:
    return float(np.mean([rel_mse(x, options) for x in tensors]))


def speeds(rows: list[dict[str, Any]]) -> None:
    """Add to each row the median speeds of encoding and decoding over pq3's, all presets in turns."""
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float16)
    out = np.empty_like(x)
    found: dict[int, list[tuple[float, float]]] = {i: [] for i in range(len(rows))}
    for _ in range(TURNS):
        for i, row in enumerate(rows):
            start = time.process_time()
            data = pqcodec.encode(x, preset=row["preset"], effort=row["effort"])
            between = time.process_time()
            pqcodec.decode(data, out=out, estimate="unbiased")
            found[i].append((between - start, time.process_time() - between))
    seconds = {i: [median(times) for times in zip(*turns, strict=True)] for i, turns in found.items()}
    base = next(seconds[i] for i, row in enumerate(rows) if (row["preset"], row["effort"]) == ("pq3", "fast"))
    for i, row in enumerate(rows):
        row |= {f"{verb}_over_pq3": base[n] / seconds[i][n] for n, verb in enumerate(("encode", "decode"))}


def sketch_scores() -> list[dict[str, Any]]:
    """Scores of sketched keys [8, 8192, 128] from their signs, and what decoding the keys takes: medians of turns."""
    rng, found = np.random.default_rng(0), []
    k = rng.standard_normal((8, 8192, 128)).astype(np.float16)
    for preset in (name for name, one in pqcodec.PRESETS.items() if one.estimates):
        data = pqcodec.encode(k, preset=preset)
        for queries in (1, 4, 8):
            q, seconds = rng.standard_normal((8, queries, 128)).astype(np.float32), []
            for _ in range(TURNS + 1):
                start = time.process_time()
                scores(data, q)
                between = time.process_time()
                pqcodec.decode(data, estimate="unbiased")
                seconds.append((between - start, time.process_time() - between))
            signs, decoded = (median(times) for times in zip(*seconds[1:], strict=True))  # the first made tables
            row = {"preset": preset, "queries": queries, "milliseconds": signs * 1e3, "over_decoding": decoded / signs}
            found.append(row)
    return found


def main() -> None:
    gaussian = np.random.default_rng(0).standard_normal((4, 2048, 128)).astype(np.float32)
    tensors = load_file(FIXTURE)
    model = {
        role: [np.ascontiguousarray(x[0, :, :TOKENS]) for name, x in tensors.items() if name.endswith(role)]
        for role in ("key", "value")
    }
    others = [name for name, one in pqcodec.PRESETS.items() if not one.rounds and not one.by_vectors]
    chosen = [*((name, "fast") for name in (*BESIDE, *others)), *((name, "best") for name in others if name.startswith("wu"))]
    rows = [row_of(preset, effort, gaussian, model) for preset, effort in chosen]
    speeds(rows)
    shown = Table(title=f"relMSE, and speeds of {SHAPE} fp16 over pq3's, by CPU time (median of {TURNS} turns)")
    columns = ("bits", "gaussian", "gaussian_known", "key", "key_known", "value", "encode_over_pq3", "decode_over_pq3")
    for heading in ("preset", *columns):
        shown.add_column(heading, justify="left" if heading == "preset" else "right")
    for row in rows:
        name = row["preset"] + (", best" if row["effort"] == "best" else "")
        shown.add_row(name, *("" if row[key] is None else f"{row[key]:.4g}" for key in columns))
    Console().print(shown)
    of_kvquant = kvquant_rows(tensors)
    for each in of_kvquant:
        print(", ".join(f"{key} {value:.4g}" if isinstance(value, float) else str(value) for key, value in each.items()))
    of_sketches = sketch_scores()
    for each in of_sketches:
        print(f"{each['preset']}, {each['queries']} queries a key: {each['over_decoding']:.1f} times as fast as decoding")
    found = {"rows": rows, "kvquant": of_kvquant, "sketch_scores": of_sketches}
    print(f"wrote {results_file.write('neighbours', 'python -m benchmarks.neighbours', found)}")


if __name__ == "__main__":
    main()
