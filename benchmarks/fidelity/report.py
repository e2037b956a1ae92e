"""Law: how the figures are told: two tables of all caches, one of the layers of one cache, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

import pqcodec
from benchmarks import model as lm
from benchmarks.fidelity.reading import Prefix

WIDEST = 9  # bits of a cache that is in the plot; what fp16 loses is too little to see
SHOWN = ("paper", "turboquant3+cures", "kivi2", "pq2.5", "pq3", "pq4")  # in the plot by layer


def tables(title: str, rows: list[dict[str, Any]], report: dict[str, Any]) -> tuple[Table, Table]:
    """What the model says, and why."""
    heads = ["bits", "KL, nats", "± windows", "± seeds", "ppl change", "top-1 same"]
    costs = _table(title, heads)
    errors_of = [*lm.ROLES, *(["attention"] if "attention_rel_mse" in rows[0] else [])]
    heads = [{"key": "keys", "value": "values"}.get(what, what) for what in errors_of]
    heads += ["same until", "same"] * ("greedy_tokens" in report) + ["found", "NLL"] * ("needles" in report)
    errors = _table("relMSE; greedy text; needles", heads)
    for row in rows:
        spread = f"{row['kl_seed_error']:.5f}" if len(row["kl_by_seed"]) > 1 else ""
        change = f"{100 * row['ppl_change']:+.2f} %" if row["ppl_change"] < 10 else f"x {1 + row['ppl_change']:.4g}"
        cells = [f"{row['bits']:.3f}", f"{row['kl']:.5f}", f"{row['kl_standard_error']:.5f}", spread]
        costs.add_row(row["name"], *cells, change, f"{100 * row['top1']:.1f} %")
        cells = [f"{row[f'{what}_rel_mse']:.5f}" for what in errors_of]
        if "greedy_tokens" in report:
            cells += [str(row["greedy_before_difference"]), f"{row['greedy_same']}/{report['greedy_tokens']}"]
        if "needles" in report:
            cells += [f"{row['needles_found']}/{report['needles']}", f"{row['needle_nll']:.3f}"]
        errors.add_row(row["name"], *cells)
    return costs, errors


def layer_table(row: dict[str, Any], layers: list[dict[str, Any]]) -> Table:
    """One cache, layer by layer; ``layers`` are those of ``layers_of``."""
    heads = ["kind", "tokens", "heads", "head_dim", "K bits", "V bits", "K relMSE", "V relMSE", "attention"]
    shown = _table(f"{row['name']} by layer", heads)
    attention = dict(zip(row.get("watched_layers", []), row.get("attention_rel_mse_by_layer", []), strict=True))
    for number, layer in enumerate(layers):
        bits = [row[f"{role}_bits_by_layer"][number] for role in lm.ROLES]
        cells = ["exact" if found is None else f"{found:.2f}" for found in bits]
        cells += [f"{row[f'{role}_rel_mse_by_layer'][number]:.5f}" for role in lm.ROLES]
        cells += [f"{attention[layer['layer']]:.5f}" if layer["layer"] in attention else ""]
        shown.add_row(str(layer["layer"]), layer["kind"], *(str(layer[name]) for name in heads[1:4]), *cells)
    return shown


def layers_of(prefix: Prefix) -> list[dict[str, Any]]:
    """What each layer that has a key and a value is."""
    found = []
    for index in prefix.layers():
        state, key = prefix.layer(index), prefix.exact[f"layers.{index}.key"]
        kind = "sliding" if "sliding_window" in state.fields else "full"
        found.append({"layer": index, "kind": kind, "tokens": state.kept, "heads": key.shape[1], "head_dim": key.shape[-1]})
    return found


def _table(title: str, heads: Sequence[str]) -> Table:
    shown = Table(title=title, padding=0)
    shown.add_column("layer" if heads[0] == "kind" else "cache", no_wrap=True)
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    return shown


def plot(title: str, rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    for row in (row for row in rows if row["bits"] < WIDEST):
        ours = row["name"] in pqcodec.PRESETS and pqcodec.PRESETS[row["name"]].own
        error = (row["kl_standard_error"] ** 2 + row["kl_seed_error"] ** 2) ** 0.5
        colour = "tab:blue" if ours else "tab:gray"
        left.errorbar(row["bits"], row["kl"], error, fmt="o" if ours else "s", color=colour)
        left.annotate(row["name"], (row["bits"], row["kl"]), xytext=(5, 3), textcoords="offset points", fontsize=8)
        if row["name"] in SHOWN and "attention_rel_mse" in row:
            right.semilogy(row["watched_layers"], row["attention_rel_mse_by_layer"], "-" if ours else "--", label=row["name"])
    left.set(title=title, xlabel="bits per coordinate, everything stored", ylabel="next-token KL, nats", yscale="log")
    right.set(title="relMSE of the attention's output", xlabel="layer")
    for axis in (left, right):
        axis.grid(alpha=0.3, which="both")
    if right.get_lines():
        low, high = right.get_ylim()
        right.set_ylim(low / 4, high)  # room for the legend
        right.legend(fontsize=8, ncols=3, loc="lower center")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
