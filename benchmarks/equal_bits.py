"""Law: what models say from quads against split coding at equal bits: ``python -m benchmarks.equal_bits``.

Reads the files of ``benchmarks.fidelity`` in results/quads, each of one model on one text. A preset of split coding stands
between two presets of quads; their KL divergence at its bits is taken to lie on a line between theirs, in its logarithm.
Writes equal_bits.json beside them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import results_file
from pqcodec import PRESETS
from pqcodec import constants as c

FOLDER = results_file.RESULTS / "quads"
EFFORTS = {"fast": "", "best": "+best"}
console = Console()


def kl_at(bits: float, caches: list[dict[str, Any]]) -> float:
    """Between the two caches whose bits are nearest to each other around ``bits``, or beyond the outermost two."""
    caches = sorted(caches, key=lambda cache: cache["bits"])
    above = next((i for i, cache in enumerate(caches) if cache["bits"] >= bits), len(caches) - 1)
    low, high = caches[max(above, 1) - 1], caches[max(above, 1)]
    share = (bits - low["bits"]) / (high["bits"] - low["bits"])
    return math.exp((1 - share) * math.log(low["kl"]) + share * math.log(high["kl"]))


def lines_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each preset of split coding in a report, and each effort of which it has two presets of quads or more."""
    of_split = [cache for cache in report["caches"] if PRESETS.get(cache["name"]) and not is_quads(cache["name"])]
    lines = []
    for effort, suffix in EFFORTS.items():
        named = [(cache["name"], cache) for cache in report["caches"] if cache["name"].endswith(suffix)]
        ours = [cache for name, cache in named if is_quads(name.removesuffix(suffix))]
        for cache in of_split if len(ours) > 1 else ():
            lines.append(
                {
                    "model": report["model"],
                    "text": report["text"],
                    "split": cache["name"],
                    "effort": effort,
                    "bits": cache["bits"],
                    "kl_split": cache["kl"],
                    "kl_quads": kl_at(cache["bits"], ours),
                    "seeds": report["seeds"],
                    "windows": report["windows"],
                }
            )
    for line in lines:
        line["ratio"] = line["kl_quads"] / line["kl_split"]
    return lines


def is_quads(name: str) -> bool:
    return name in PRESETS and PRESETS[name].coding == c.CODING_QUADS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.equal_bits", description="KL of quads and split at equal bits.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of fidelity.<model>.<text>.json files")
    options = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in sorted(options.folder.glob("fidelity.*.json"))]
    lines = [line for report in reports for line in lines_of(report)]
    table = Table(title="next-token KL, nats, at equal bits")
    for head in ("model", "text", "against", "bits", "effort", "split", "quads", "ratio"):
        table.add_column(head)
    for line in lines:
        figures = (
            f"{line['bits']:.2f}",
            line["effort"],
            f"{line['kl_split']:.5f}",
            f"{line['kl_quads']:.5f}",
            f"{line['ratio']:.2f}",
        )
        table.add_row(line["model"], Path(line["text"]).stem, line["split"], *figures)
    console.print(table)
    found = {}
    for effort in EFFORTS:
        ratios = [line["ratio"] for line in lines if line["effort"] == effort]
        if ratios:
            found[effort] = {"lines": len(ratios), "geometric_mean": geometric_mean(ratios), "worst": max(ratios)}
            console.print(
                f"{effort}: geometric mean {geometric_mean(ratios):.3f}, worst {max(ratios):.3f} of {len(ratios)} lines"
            )
    searched = {(line["model"], line["text"], line["split"]) for line in lines if line["effort"] == "best"}
    if searched:
        there = [x["ratio"] for x in lines if x["effort"] == "fast" and (x["model"], x["text"], x["split"]) in searched]
        found["best"]["geometric_mean_of_fast_there"] = geometric_mean(there)
    path = results_file.write(
        "equal_bits", "python -m benchmarks.equal_bits", {"ratios": found, "lines": lines}, options.folder
    )
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
