"""Law: the main job on a real model: its cache goes through the command line and back, and the model reads on from it.

``python -m benchmarks.demo`` prints what each preset costs and saves, and writes benchmarks/results/demo.json, or into another
folder by ``--results``; ``--text FILE`` scores another text and writes demo.<its stem>.json beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

import pqcodec
from benchmarks import model as lm
from pqcodec.codings.presets import DEFAULT_PRESET

PROSE = Path(__file__).parent / "data" / "prose.txt"
RESULTS = Path(__file__).parent / "results"
PREFIX, SCORED, GREEDY = 1024, 512, 40
CENTRED = (DEFAULT_PRESET, "pq3")  # with --rope-theta; the first tokens stay exact by default
PAPER = "paper"
PAPER_OPTIONS = ("--center", "none", "--exact-tokens", "0")  # the paper has neither

console = Console()


@dataclass(frozen=True)
class Outcome:
    """What one preset did; sizes in bytes, kl in nats a token."""

    preset: str
    command: str
    file_bytes: int
    ratio: float
    bits_per_coordinate: float
    key_rel_mse: float
    value_rel_mse: float
    kl: float
    top1: float
    perplexity: float
    ppl_change: float
    continuation: str


@dataclass(frozen=True)
class Text:
    """Token ids: the cached prefix, what is fed after it, and what follows each token fed."""

    prefix: torch.Tensor
    fed: torch.Tensor
    following: torch.Tensor


def read_text(tokenizer: Any, path: Path) -> Text:
    """The first tokens of a UTF-8 text; ends the program where it is too short."""
    ids = lm.token_ids(tokenizer, path.read_text(encoding="utf-8"))
    if len(ids) <= PREFIX + SCORED:
        raise SystemExit(f"{path} has {len(ids)} tokens; more than {PREFIX + SCORED} are needed")
    return Text(ids[:PREFIX], ids[PREFIX : PREFIX + SCORED], ids[PREFIX + 1 : PREFIX + SCORED + 1])


def pqcodec_command(*arguments: str, cwd: Path) -> str:
    """Run the command line in ``cwd``; returns the command as a user would type it."""
    shown = " ".join(("pqcodec", *arguments))
    console.print(f"  [bold]$ {shown}[/bold]")
    done = subprocess.run([sys.executable, "-m", "pqcodec.tools.cli", *arguments], cwd=cwd)
    if done.returncode:
        raise SystemExit(f"`{shown}` ended with {done.returncode}; is pqcodec installed (pip install -e .)?")
    return shown


def rel_mse(exact: lm.Layers, other: lm.Layers) -> tuple[float, float]:
    """Squared error over squared norm of all keys, and of all values."""
    keys, values = (
        sum(float((a[role] - b[role].float()).double().square().sum()) for a, b in zip(exact, other, strict=True))
        / sum(float(a[role].double().square().sum()) for a in exact)
        for role in range(2)
    )
    return keys, values


def measure(
    preset: str, theta: float, folder: Path, model: Any, tokenizer: Any, text: Text, exact: lm.Layers, logits: torch.Tensor
) -> Outcome:
    """Encode and decode kv.safetensors in ``folder`` with a preset, then let the model read on from the result."""
    console.print(f"{preset}: encode, decode")
    options = PAPER_OPTIONS if preset == PAPER else ("--rope-theta", f"{theta:.12g}")
    packed, back = f"kv.{preset}.pqkv", f"back.{preset}.safetensors"
    command = pqcodec_command("encode", "kv.safetensors", packed, "--preset", preset, *options, "--force", cwd=folder)
    pqcodec_command("decode", packed, back, "--force", cwd=folder)
    layers = lm.layers_of(load_file(folder / back))
    console.print(f"{preset}: read on from the decoded cache")
    scores = lm.compare(logits, lm.continuation_logits(model, lm.cache_from(model, layers), text.fed), text.following)
    keys, values = rel_mse(exact, layers)
    size = (folder / packed).stat().st_size
    coordinates = sum(tensor.numel() for layer in exact for tensor in layer)
    return Outcome(
        preset=preset,
        command=command,
        file_bytes=size,
        ratio=(folder / "kv.safetensors").stat().st_size / size,
        bits_per_coordinate=8 * size / coordinates,
        key_rel_mse=keys,
        value_rel_mse=values,
        kl=scores["kl"],
        top1=scores["top1"],
        perplexity=scores["perplexity"],
        ppl_change=scores["ppl_change"],
        continuation=tokenizer.decode(lm.greedy(model, lm.cache_from(model, layers), int(text.fed[0]), GREEDY)),
    )


# -- what is told ------------------------------------------------------------------------------------------------
def processor() -> str:
    """The processor's name, where the system tells it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "pqcodec": pqcodec.__version__,
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def kl_against_paper(outcomes: list[Outcome]) -> dict[str, float]:
    """How many times the paper preset's KL is that of each other preset."""
    paper = next(outcome for outcome in outcomes if outcome.preset == PAPER)
    return {outcome.preset: paper.kl / outcome.kl for outcome in outcomes if outcome is not paper}


def print_tables(report: dict[str, Any], outcomes: list[Outcome]) -> None:
    less = {**report["kl_paper_over_preset"], PAPER: 1.0}
    sizes = Table(title=f"KV cache of {report['tokens']:,} tokens, {report['model']}")
    for column in ("cache", "bytes", "ratio", "bits/coord", "K relMSE", "V relMSE"):
        sizes.add_column(column, justify="left" if column == "cache" else "right")
    sizes.add_row("fp16", f"{report['file_bytes']:,}", "1.00", "16.000", "", "")
    costs = Table(title=f"Next-token predictions over {report['scored']} tokens read on from it")
    for column in ("cache", "KL, nats/token", "paper's KL is", "top-1 same", "perplexity", "change"):
        costs.add_column(column, justify="left" if column == "cache" else "right")
    costs.add_row("exact", "0", "", "100.0 %", f"{report['perplexity']:.3f}", "")
    for o in outcomes:
        bits, errors = f"{o.bits_per_coordinate:.3f}", (f"{o.key_rel_mse:.5f}", f"{o.value_rel_mse:.5f}")
        sizes.add_row(o.preset, f"{o.file_bytes:,}", f"{o.ratio:.2f}", bits, *errors)
        change = f"{100 * o.ppl_change:+.2f} %"
        costs.add_row(
            o.preset, f"{o.kl:.5f}", f"{less[o.preset]:.2f} x", f"{100 * o.top1:.1f} %", f"{o.perplexity:.3f}", change
        )
    texts = Table(title=f"The likeliest {GREEDY} tokens after the prefix", show_lines=True)
    texts.add_column("cache")
    texts.add_column("continuation")
    texts.add_row("exact", report["continuation"])
    for o in outcomes:
        texts.add_row(o.preset, o.continuation)
    for table in (sizes, costs, texts):
        console.print(table)


def results_name(path: Path) -> str:
    """The file of a text's results: demo.json is that of the text shipped.

    >>> results_name(Path("essay.txt"))
    'demo.essay.json'
    """
    return "demo.json" if path == PROSE else f"demo.{path.stem}.json"


def run(folder: Path, path: Path, results: Path) -> None:
    """Do it all with the text at ``path``; tensors and streams go into ``folder``, figures into the folder ``results``."""
    folder.mkdir(parents=True, exist_ok=True)
    console.print(f"load {lm.MODEL} (downloaded and unpacked the first time, into {lm.cache_dir()})")
    model, tokenizer = lm.load_smollm2(lm.cache_dir())
    text, theta = read_text(tokenizer, path), lm.rope_of(model.config).theta
    console.print(f"prefill {PREFIX} tokens; save the cache as {folder / 'kv.safetensors'}")
    exact = lm.prefill(model, text.prefix)
    save_file(lm.named_tensors(exact, range(len(exact))), folder / "kv.safetensors")
    console.print("read on from the exact cache")
    logits = lm.continuation_logits(model, lm.cache_from(model, exact), text.fed)
    continuation = tokenizer.decode(lm.greedy(model, lm.cache_from(model, exact), int(text.fed[0]), GREEDY))
    presets = (*CENTRED, PAPER)
    outcomes = [measure(preset, theta, folder, model, tokenizer, text, exact, logits) for preset in presets]
    report = {
        "command": "python -m benchmarks.demo" + ("" if path == PROSE else f" --text {path.name}"),
        "environment": environment(),
        "model": lm.MODEL,
        "weights": f"{lm.GGUF} from {lm.DISTRIBUTION}",
        "text": "benchmarks/data/prose.txt" if path == PROSE else path.name,
        "tokens": PREFIX,
        "scored": SCORED,
        "file_bytes": (folder / "kv.safetensors").stat().st_size,
        "perplexity": lm.compare(logits, logits, text.following)["perplexity"],
        "continuation": continuation,
        "presets": [asdict(outcome) for outcome in outcomes],
        "kl_paper_over_preset": kl_against_paper(outcomes),
    }
    print_tables(report, outcomes)
    results.mkdir(parents=True, exist_ok=True)
    written = results / results_name(path)
    written.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"written: {written}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description="The codec's main job on a real model.")
    parser.add_argument("--out", type=Path, metavar="DIR", help="keep tensors and streams here (default: a temporary folder)")
    parser.add_argument("--text", type=Path, metavar="FILE", default=PROSE, help="the text to read (default: the one shipped)")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", default=RESULTS, help="of the figures (default: benchmarks/results)"
    )
    options = parser.parse_args()
    if options.out:
        run(options.out, options.text, options.results)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder), options.text, options.results)


if __name__ == "__main__":
    main()
