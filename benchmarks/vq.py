"""Residual VQ: ``python -m benchmarks.vq --text TEXT ...``: what trained codebooks are worth, and what encoding costs.

Gaussian vectors of 128 numbers, trained on 98,304 groups. Keys before RoPE and values of SmolLM2's layer 15, 324 tokens, by
codebooks that saw other texts only: --text names files, of which each gives up to its share of 180,000 tokens (a million
groups), and keys once more by codebooks that saw one run of tokens in each of ``FEW`` parts of them, some 100,000 groups. Bits
are those of rows. ``KNOWN`` is what ten rounds of k-means (Gaussian), and three rounds on 40,000 groups of texts that are not
known (model), made of it in plain numpy. The texts matter more than all else, and so does how many tokens of them there are.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import pqcodec
from benchmarks import model as lm
from benchmarks import results_file
from benchmarks.neighbours import FIXTURE, ROPE
from pqcodec.calibrate import rows_to_code

GAUSSIAN, HELD_OUT = (24_576, 128), (4_096, 128)
LAYER, TOKENS_AT_ONCE, MOST_TOKENS, FEW = 15, 1024, 180_000, 17
KNOWN: dict[str, dict[int, float]] = {  # relMSE by the number of stages
    "gaussian": {1: 0.685, 2: 0.469, 4: 0.220, 6: 0.104, 8: 0.050},
    "key": {4: 0.0311, 6: 0.0153, 8: 0.0077},  # at head_dim 64 both groups of pairs are neighbours
    "key, every second channel": {4: 0.0314, 6: 0.0155, 8: 0.0078},
    "key, of few tokens": {4: 0.0311, 6: 0.0153, 8: 0.0077},
    "value": {4: 0.178, 6: 0.087, 8: 0.043},
}
BESIDE = ("pq2", "pq2.5", "pq3")


def row_of(kind: str, stages: int, x: np.ndarray, table: pqcodec.VectorTable) -> dict[str, Any]:
    """Bits and error of a preset on vectors that no codebook saw."""
    data = pqcodec.encode(x, preset=f"rvq{stages}", codebooks=table)
    return {
        "tensor": kind,
        "preset": f"rvq{stages}",
        "bits": table.vectors.row_bits(stages) / table.vectors.head_dim,
        "rel_mse": rel_mse(x, pqcodec.decode(data, tables=table)),
        "known": KNOWN[kind].get(stages),
    }


def rel_mse(x: np.ndarray, y: np.ndarray) -> float:
    """Squared error over squared norm."""
    x = x.astype(np.float64)
    return float(((x - y) ** 2).sum() / (x**2).sum())


def trained(kind: str, x: np.ndarray | list[np.ndarray], test: np.ndarray, **options: Any) -> list[dict[str, Any]]:
    """The rows of a kind of vectors, by one table of eight stages."""
    start = time.perf_counter()
    table = pqcodec.train_vq(x, **options)
    seconds = time.perf_counter() - start
    print(f"{kind}: trained in {seconds:.0f} s, table {table.name}", flush=True)
    rows = [row_of(kind, stages, test, table) | {"train_seconds": seconds} for stages in KNOWN[kind]]
    for preset in BESIDE:
        error = rel_mse(test, pqcodec.decode(pqcodec.encode(test, preset=preset)))
        rows.append({"tensor": kind, "preset": preset, "bits": pqcodec.PRESETS[preset].rate, "rel_mse": error, "known": None})
    for row in rows[: len(KNOWN[kind])]:
        print(f"  {row['preset']}: {row['bits']:.4g} bits, {row['rel_mse']:.4g} (known {row['known']})", flush=True)
    return rows


def of_texts(paths: list[Path]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Keys before RoPE and values of a layer of SmolLM2, [heads, tokens, head_dim] for each run of tokens of the texts."""
    model, tokenizer = lm.load_smollm2(lm.cache_dir())
    keys, values = [], []
    for path in paths:
        ids = lm.token_ids(tokenizer, path.read_text(encoding="utf-8"))[: MOST_TOKENS // len(paths)]
        for part in ids.split(TOKENS_AT_ONCE):
            key, value = lm.prefill(model, part)[LAYER]
            keys.append(rows_to_code(key, rope=ROPE))
            values.append(value.numpy())
    print(f"{sum(x.shape[1] for x in keys)} tokens of {len(paths)} texts", flush=True)
    return keys, values


def speed() -> dict[str, float]:
    """Million coordinates a second of encoding and decoding at eight stages, on all cores, the median of five."""
    rng = np.random.default_rng(0)
    table = pqcodec.VectorTable(rng.standard_normal((8, 2048, 32)), np.arange(128))
    x = rng.standard_normal((8, 512, 128)).astype(np.float16)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        data = pqcodec.encode(x, preset="rvq8", codebooks=table)
        between = time.perf_counter()
        pqcodec.decode(data, tables=table)
        seconds.append((between - start, time.perf_counter() - between))
    encode, decode = np.median(seconds, 0)
    return {"encode_million_a_second": x.size / encode / 1e6, "decode_million_a_second": x.size / decode / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="texts to train on: not benchmarks/data/prose.txt")
    texts = parser.parse_args().text
    rng = np.random.default_rng(0)
    rows = trained("gaussian", *(rng.standard_normal(shape).astype(np.float32) for shape in (GAUSSIAN, HELD_OUT)))
    tensors = load_file(FIXTURE)
    test_key = rows_to_code(tensors[f"layers.{LAYER}.key"][0], rope=ROPE)
    test_value = tensors[f"layers.{LAYER}.value"][0].astype(np.float32)
    keys, values = of_texts(texts)
    rows += trained("key", keys, test_key, strided=True)
    rows += trained("key, every second channel", keys, test_key, strided=True, pairing="interleaved")
    rows += trained("key, of few tokens", keys[:: -(-len(keys) // FEW)], test_key, strided=True)
    rows += trained("value", values, test_value)
    tokens = sum(x.shape[1] for x in keys)
    found = {"rows": rows, "texts": [path.name for path in texts], "tokens": tokens, **speed()}
    print(f"wrote {results_file.write('vq', 'python -m benchmarks.vq --text ' + ' '.join(found['texts']), found)}")


if __name__ == "__main__":
    main()
