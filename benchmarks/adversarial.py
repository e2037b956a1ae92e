"""Law: errors of vectors that a bad rotation codes badly, against a Gaussian's: ``python -m benchmarks.adversarial``.

For every head_dim and preset: the worst mean of a case, the 99.9th percentile and the worst of all vectors of all seeds, each
over the nominal error, with the floors that tests/test_adversarial.py holds. Prints a table; writes results/adversarial.json.
With ``--models`` the cases are the keys and values of real models, a case a tensor; writes results/adversarial.models.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import model as lm
from benchmarks import results_file
from benchmarks.adversarial_set import PRESETS, SEEDS, Case, cases, tell
from benchmarks.peers import EXACT_TOKENS, rope_mean

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256, 576)  # the orders' bases: 1, 20, 12, 28, 1, 12, 1, 36
VECTORS = 16  # of a case
NOMINAL_VECTORS = 40_000
MEAN_FLOOR = 1.3  # of a case's mean over the nominal error
HIGH_FLOOR = {"pq5": 10.0, "pq6": 10.0}  # of the 99.9th percentile; a Gaussian's own is higher there
HIGH_FLOOR_ELSE = 4.0
TEXT = Path(__file__).parent / "data" / "chat.txt"
PREFIX = 1024  # tokens that a model's keys and values are of
MODEL_VECTORS = 64  # of each of its tensors


def high_floor(preset: str) -> float:
    return HIGH_FLOOR.get(preset, HIGH_FLOOR_ELSE)


def real_cases(name: str) -> list[Case]:
    """What is coded of a model's keys and values behind a prefix: a case a tensor, less its mean (under RoPE, for keys)."""
    from benchmarks.fidelity.reading import Prefix

    _, model, tokenizer = lm.load(name, lm.cache_dir())
    ids = torch.cat([lm.opening_ids(tokenizer), lm.token_ids(tokenizer, TEXT.read_text(encoding="utf-8"))])[:PREFIX]
    prefix, found = Prefix.of(model, ids), []
    for tensor, part in prefix.roles.items():
        x = prefix.exact[tensor][0][:, EXACT_TOKENS:].contiguous()  # [Hkv, tokens, head_dim]
        if part.role == "key":
            x = x - (rope_mean(x, part.rope, EXACT_TOKENS) if part.rope else x.mean(1, keepdim=True))
        rows = x.reshape(-1, x.shape[-1])
        found.append(Case(f"{name} {tensor}", rows[:: max(len(rows) // MODEL_VECTORS, 1)].numpy().astype(np.float32)))
    return found


def measure(found: list[Case]) -> list[dict[str, Any]]:
    """A row for every preset; of the cases, which are of one head_dim, those ten that come out worst."""
    head_dim, rows = found[0].x.shape[1], []
    for preset in PRESETS:
        told = tell(found, preset, SEEDS, NOMINAL_VECTORS)
        worst = sorted(told.means, key=told.means.__getitem__, reverse=True)
        rows.append(
            {
                "head_dim": head_dim,
                "preset": preset,
                "cases": len(found),
                "nominal": told.nominal,
                "worst_case": told.worst_case,
                "worst_mean": told.means[told.worst_case],
                "cases_above_floor": sum(mean > MEAN_FLOOR for mean in told.means.values()),
                "high": told.high,
                "worst_vector": told.worst,
                "gaussian_high": told.gaussian_high,
                "gaussian_worst": told.gaussian_worst,
                "worst_cases": {name: told.means[name] for name in worst[:10]},
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"head_dim {rows[0]['head_dim']}: errors over the nominal one, {rows[0]['cases']} cases")
    for heading in (
        "preset",
        "nominal",
        "worst mean of a case",
        "which",
        "cases > floor",
        "p99.9 (Gaussian)",
        "max (Gaussian)",
    ):
        shown.add_column(heading, justify="left" if heading in ("preset", "which") else "right")
    for row in rows:
        shown.add_row(
            row["preset"],
            f"{row['nominal']:.5f}",
            f"{row['worst_mean']:.2f}",
            row["worst_case"],
            str(row["cases_above_floor"]),
            f"{row['high']:.2f} ({row['gaussian_high']:.2f})",
            f"{row['worst_vector']:.1f} ({row['gaussian_worst']:.1f})",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--models", nargs="+", metavar="MODEL", help=lm.SOURCES)
    arguments = parser.parse_args()
    head_dims, models = tuple(arguments.head_dims), arguments.models
    command, name = "python -m benchmarks.adversarial", "adversarial.models" if models else "adversarial"
    if models:
        command += f" --models {' '.join(models)}"
    elif head_dims != HEAD_DIMS:
        command += f" --head-dims {' '.join(map(str, head_dims))}"
    console, rows = Console(), []
    for group in models or head_dims:
        found = measure(real_cases(group) if models else cases(group, VECTORS))
        console.print(table(found))
        rows += [{"model": group, **row} for row in found] if models else found
    settings = {"vectors": MODEL_VECTORS if models else VECTORS, "seeds": list(SEEDS), "mean_floor": MEAN_FLOOR, "rows": rows}
    console.print(f"wrote {results_file.write(name, command, settings).name}")


if __name__ == "__main__":
    main()
