"""Channels and directions that linear stages take, on a real model: ``python -m benchmarks.bases``.

What ThinK's channels and LoRC's bases lose of SmolLM2's keys when what is kept stays exact. Keys are those before RoPE for
bases, those after it for channels; score errors are those of 64 or 68 later queries, up to a constant a query, which softmax
does not see, over the scores' own variance. ``KNOWN`` is the same measured beforehand, of other texts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import model as models
from benchmarks import results_file
from benchmarks.kept_tokens import LATER, TEXT, TOKENS, captured
from pqcodec import bases
from pqcodec.calibrate import rows_to_code

DATA, WINDOW = TEXT.parent, 32
FIXTURE_LAYERS, LAYERS = (0, 1, 15, 29), (1, 15, 29)
DROPPED, SHARES = (0.4, 0.5), (0.75, 0.5, 0.4)
# relMSE and score error of the first 256 of 324 tokens (68 later queries), and of 2,304: by share of channels dropped
KNOWN_THINK = {256: {0.4: (0.097, 0.081), 0.5: (0.140, 0.127)}, TOKENS: {0.4: (0.080, 0.049), 0.5: (0.118, 0.080)}}
# relMSE of r / D' = .75, .5 and .4
KNOWN_LORC = {"weights": (0.0123, 0.0499, 0.0718), "other texts": (0.0023, 0.0111, 0.0184), "own": (0.0010, 0.0056, 0.0098)}
KNOWN_CONDITIONS = {0: (166, 8.7), 1: (20, 5.2), 2: (23, 7.2), 15: (39, 8.0), 28: (36, 8.6), 29: (31, 4.9)}  # W_K, W_V


def lost(x: np.ndarray, y: np.ndarray) -> float:
    """Squared error over squared norm."""
    return float(((x - y) ** 2).sum() / (x**2).sum())


def score_error(q: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Variance of q.(y - x) over that of q.x, around each query's mean; q [q_heads, n, D], x and y [kv_heads, T, D]."""
    group = len(q) // len(x)
    scores = q @ np.repeat(x, group, 0).swapaxes(1, 2)
    wrong = q @ np.repeat(y - x, group, 0).swapaxes(1, 2)
    return float(wrong.var(-1).sum() / scores.var(-1).sum())


def of_think(layers: dict[int, Any], tokens: int, dropped: float) -> tuple[float, float]:
    """relMSE and score error of keys without ThinK's channels, the mean of layers."""
    found = []
    for q, k, _ in layers.values():
        queries, keys = q[:, :tokens].numpy(), k[:, :tokens].numpy()
        kept = bases.think(queries[:, -WINDOW:], keys, dropped)[:, None].astype(int)
        thin = np.zeros_like(keys)
        np.put_along_axis(thin, kept, np.take_along_axis(keys, kept, 2), 2)
        found.append((lost(keys, thin), score_error(q[:, tokens:].numpy(), keys, thin)))
    relative, scores = np.mean(found, 0)
    return float(relative), float(scores)


def lorc_rows(model: Any, own: dict[int, np.ndarray], others: dict[int, np.ndarray]) -> list[dict[str, Any]]:
    """relMSE of keys in bases of weights, of other texts' keys, and of their own, the mean of layers."""
    rows = []
    for number, share in enumerate(SHARES):
        found: dict[str, list[float]] = {kind: [] for kind in KNOWN_LORC}
        for layer, keys in own.items():
            vectors = bases.vectors_of_heads(keys)
            rank = round(share * vectors.shape[1])
            weight = model.model.layers[layer].self_attn.k_proj.weight
            of = {
                "weights": bases.weight_basis(weight, rank),
                "other texts": bases.data_basis(others[layer], rank),
                "own": bases.data_basis(keys, rank),
            }
            for kind, basis in of.items():
                found[kind].append(lost(vectors, vectors @ basis.T.astype(np.float64) @ basis))
        for kind, known in KNOWN_LORC.items():
            rows.append({"basis": kind, "share": share, "key": float(np.mean(found[kind])), "known": known[number]})
    return rows


def conditions_of(model: Any) -> list[tuple[float, float]]:
    """Condition numbers of each layer's W_K and W_V."""
    attention = [layer.self_attn for layer in model.model.layers]
    return [(bases.condition_number(x.k_proj.weight), bases.condition_number(x.v_proj.weight)) for x in attention]


def main() -> None:
    torch.manual_seed(0)
    model, tokenizer = models.load_smollm2(models.cache_dir())
    rope = models.rope_of(model.config)
    ids = models.token_ids(tokenizer, TEXT.read_text(encoding="utf-8"))
    of_text = captured(model, ids[: TOKENS + LATER], LAYERS)
    spoken = {256: captured(model, ids[:324], FIXTURE_LAYERS), TOKENS: of_text}
    think = []
    for tokens, known in KNOWN_THINK.items():
        for dropped in DROPPED:
            key, scores = of_think(spoken[tokens], tokens, dropped)
            row = {"tokens": tokens, "dropped": dropped, "key": key, "scores": scores}
            think.append(row | {"key_known": known[dropped][0], "scores_known": known[dropped][1]})
    own = {layer: rows_to_code(k[:, :TOKENS], rope=rope) for layer, (_, k, _) in of_text.items()}
    other_texts = [path for path in sorted(DATA.glob("*.txt")) if path != TEXT]
    parts = [
        captured(model, models.token_ids(tokenizer, path.read_text(encoding="utf-8"))[:TOKENS], LAYERS) for path in other_texts
    ]
    others = {layer: np.concatenate([rows_to_code(part[layer][1], rope=rope) for part in parts], 1) for layer in LAYERS}
    lorc, conditions = lorc_rows(model, own, others), conditions_of(model)
    shown = Table(title="SmolLM2's keys: ThinK by tokens and share of channels dropped, LoRC by basis and r/D'")
    for heading in ("system", "", "share", "relMSE", "known", "score error", "known"):
        shown.add_column(heading, justify="right")
    for row in think:
        numbers = (f"{row[name]:.3f}" for name in ("key", "key_known", "scores", "scores_known"))
        shown.add_row("ThinK", str(row["tokens"]), str(row["dropped"]), *numbers)
    for row in lorc:
        shown.add_row("LoRC", row["basis"], str(row["share"]), f"{row['key']:.4f}", f"{row['known']:.4f}")
    Console().print(shown)
    for layer, known in KNOWN_CONDITIONS.items():
        key, value = conditions[layer]
        print(f"layer {layer}: condition numbers {key:.3g}, {value:.2g} ({known[0]}, {known[1]} known)")
    found = {"think": think, "lorc": lorc, "texts": [path.name for path in other_texts], "conditions": conditions}
    found["ranks"] = bases.progressive_ranks(conditions, 144, 77)
    print(f"wrote {results_file.write('bases', 'python -m benchmarks.bases', found)}")


if __name__ == "__main__":
    main()
