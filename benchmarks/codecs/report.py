"""Law: parts put together: a row a system, which systems are on the frontier, the table and the picture.

A row's figures are means over the models and texts, of KL the geometric one. A system is on the frontier where none other has a
smaller KL in as many bits or fewer. Others' KL is also told over that of pq at equal bits (``equal_bits.kl_at``).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import geometric_mean, mean
from typing import Any

from rich.table import Table

from benchmarks.codecs.parts import SPEED
from benchmarks.codecs.systems import BASE, SYSTEMS
from benchmarks.equal_bits import kl_at

FIGURES = ("bits", "key_bits", "value_bits", "key_rel_mse", "value_rel_mse", "score_error")
SPEEDS = (f"encode_over_{BASE}", f"decode_over_{BASE}")
WIDEST = 9  # bits of a system that is in the plot
PQ, FARTHEST = ("pq2", "pq2.5", "pq3", "pq3.5", "pq4"), 5.1  # those between whose KL others' is put, and up to which bits


def together(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Rows by bits, the parts that they are of, and how these were measured; raises ValueError for parts of other settings.

    ``left_out``: systems that were not measured on all models and texts of which there are parts.
    """
    all_parts = list(parts)
    measured = [one for one in all_parts if one["model"] != SPEED]
    speed = {one["system"]: {name: one[name] for name in SPEEDS} for one in all_parts if one["model"] == SPEED}
    on = sorted({(one["model"], one["text"]) for one in measured})
    settings = {str(one["settings"]): one["settings"] for one in measured}
    if len(settings) > 1:
        raise ValueError(f"parts of {', '.join(settings)} lie together; measure them anew in one folder each")
    rows = []
    for name, system in SYSTEMS.items():
        own = {(one["model"], one["text"]): one for one in measured if one["system"] == name}
        if sorted(own) == on and on:
            row: dict[str, Any] = {"system": name, "family": system.family, "theirs": system.theirs}
            row |= {figure: mean(one[figure] for one in own.values()) for figure in FIGURES}
            row["kl"] = geometric_mean(max(one["kl"], 1e-12) for one in own.values())
            row["of"] = [{key: own[at][key] for key in ("model", "text", "bits", "kl", "kl_standard_error")} for at in on]
            rows.append(row | speed.get(name, {}))
    rows.sort(key=lambda row: (row["bits"], row["kl"]))
    pq = [row for row in rows if row["system"] in PQ]
    for row in rows if len(pq) == len(PQ) else ():
        if row["bits"] < FARTHEST:
            row["kl_over_pq"] = row["kl"] / kl_at(row["bits"], pq)
    least = float("inf")
    for row in rows:
        row["frontier"], least = row["kl"] < least, min(row["kl"], least)
    left_out = [name for name in SYSTEMS if name not in {row["system"] for row in rows}]
    about = {"measured_on": [list(at) for at in on], "left_out": left_out}
    return {**about, "settings": next(iter(settings.values()), {}), "rows": rows}


def with_speeds(found: dict[str, Any], parts: Iterable[dict[str, Any]], machine: dict[str, Any]) -> dict[str, Any]:
    """An earlier table with these parts' speeds, measured on ``machine``, in the rows of their systems."""
    speed = {one["system"]: {name: one[name] for name in SPEEDS} for one in parts if one["model"] == SPEED}
    rows = [row | speed.get(row["system"], {}) for row in found["rows"]]
    return {**found, "speeds_of": {**machine, "systems": sorted(speed)}, "rows": rows}


def printed(found: dict[str, Any]) -> Table:
    """The table, in 80 columns."""
    shown = Table(title=f"* frontier; bits, relMSE, score error, KL; speed over {BASE}'s", box=None, padding=(0, 1, 0, 0))
    for heading in ("", "system", "bits", "keys", "values", "scores", "KL", "enc", "dec"):
        shown.add_column(heading, justify="left" if heading in ("", "system") else "right", no_wrap=True)
    for row in found["rows"]:
        figures = (f"{row[name]:.4f}" for name in ("key_rel_mse", "value_rel_mse", "score_error", "kl"))
        quick = (f"{row[name]:.2f}" if name in row else "" for name in SPEEDS)
        shown.add_row("*" if row["frontier"] else "", row["system"], f"{row['bits']:.2f}", *figures, *quick)
    return shown


def plot(found: dict[str, Any], path: Path) -> None:
    """KL over bits: a colour a family, and the frontier as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(12, 8))
    rows = [row for row in found["rows"] if row["bits"] < WIDEST]
    families = list(dict.fromkeys(row["family"] for row in rows))
    for number, family in enumerate(families):
        own = [row for row in rows if row["family"] == family]
        marks = [(row["bits"], row["kl"]) for row in own]
        axis.plot(*zip(*marks, strict=True), "o", color=f"C{number % 10}", label=family)
    for row in rows:
        axis.annotate(row["system"], (row["bits"], row["kl"]), xytext=(4, 3), textcoords="offset points", fontsize=7)
    best = [(row["bits"], row["kl"]) for row in rows if row["frontier"]]
    if best:
        axis.plot(*zip(*best, strict=True), "k-", linewidth=0.8, label="frontier")
        axis.legend(fontsize=8)
    where = ", ".join(f"{model} on {text}" for model, text in found["measured_on"])
    axis.set(title=where, xlabel="bits per coordinate, everything stored", ylabel="next-token KL, nats", yscale="log")
    axis.grid(alpha=0.3, which="both")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
