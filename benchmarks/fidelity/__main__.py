"""Law: the command ``python -m benchmarks.fidelity --model NAME --text FILE``.

It rounds the caches of some prefixes to float16, has each codec encode and decode them, and lets the model (float32) read on
from the results; what it then says is held against what it says from its own float32 cache. The texts are Debian's: ``linux``
is admin-guide/sysctl/kernel.rst of linux-doc-6.1, ``policy`` the policy.txt of debian-policy, ``devil`` dict-devil from its
first word on; and our own benchmarks/data/chat.txt, a conversation with code, JSON and logs. Writes
results/fidelity.<model>.<text>.json and .png.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import model as lm
from benchmarks import results_file
from benchmarks.fidelity.caches import Cache, all_caches
from benchmarks.fidelity.measures import Bench, answer_of, ratio, real_queries
from benchmarks.fidelity.reading import Reading, needle_windows, windows_of
from benchmarks.fidelity.report import layer_table, layers_of, plot, tables

RATIOS = (
    *((preset, peer) for preset in ("quad3", "pq3") for peer in ("paper", "turboquant3+cures")),
    ("pq4", "turboquant4+cures"),
    ("pq4", "kivi4"),
    ("pq2.5", "kivi2"),
)
console = Console()


def read_bench(options: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[Bench, dict[str, Any]]:
    """The exact readings and what the report says of them."""
    ids, opening = lm.token_ids(tokenizer, options.text.read_text(encoding="utf-8")), lm.opening_ids(tokenizer)
    windows = windows_of(ids, opening, options.windows, options.prefix, options.scored)
    readings = [Reading.of(model, window) for window in windows]
    layers = layers_of(readings[0].prefix)
    if not layers:
        raise SystemExit(f"no layer of a {model.config.model_type} keeps keys and values: there is nothing to code")
    report = {"model_type": model.config.model_type, "layers": len(layers), "by_layer": layers, "opening": opening.tolist()}
    report |= {name: layers[0][shape] for name, shape in (("kv_heads", "heads"), ("head_dim", "head_dim"))}
    report |= {name: getattr(options, name) for name in ("windows", "prefix", "scored", "seeds")}
    scores = [lm.compare(reading.logits, reading.logits, reading.following) for reading in readings]
    report["perplexity"] = mean(score["perplexity"] for score in scores)
    greedy = None
    if options.greedy:
        first = int(readings[0].fed[0])
        greedy = torch.tensor([first, *lm.greedy(model, readings[0].prefix.cache(), first, options.greedy)])
        report["greedy_tokens"] = options.greedy
    needles: list[tuple[Reading, bool]] = []
    if options.retrieval:
        hidden = [Reading.of(model, window) for window in needle_windows(tokenizer, ids, opening, options.prefix)]
        answers = [answer_of(needle.logits, needle.following) for needle in hidden]
        needles = [(needle, able) for needle, (able, _) in zip(hidden, answers, strict=True)]
        report |= {"needles_hidden": len(hidden), "needles": sum(able for able, _ in answers)}
        report["needle_nll"] = mean(nll for _, nll in answers)
    return Bench(model, readings, real_queries(model, readings[0]), greedy, needles), report


def chosen_of(options: argparse.Namespace) -> list[Cache]:
    """The caches that are asked for; ends the program for one that is unknown."""
    caches = all_caches()
    names = options.caches.split(",") if options.caches else [name for name in caches if ":" not in name]
    unknown = [name for name in names if name not in caches]
    if unknown:
        raise SystemExit(f"caches {', '.join(unknown)} are unknown; choose from {', '.join(caches)}")
    return [caches[name] for name in names]


def measured(bench: Bench, caches: list[Cache], seeds: range) -> list[dict[str, Any]]:
    """The figures of each cache, by bits."""
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    rows = []
    with Progress(*columns, console=console) as progress:
        runs = sum(len(seeds) if cache.seeded else 1 for cache in caches) * len(bench.readings)
        task = progress.add_task("", total=runs)
        for cache in caches:
            progress.update(task, description=cache.name)
            rows.append(bench.measure(cache, seeds, lambda: progress.advance(task)))
            rows[-1]["watched_layers"] = list(bench.queries)
    return sorted(rows, key=lambda row: row["bits"])


def run(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    caches = chosen_of(options)
    console.print(f"load {options.model}")
    name, model, tokenizer = lm.load(options.model, lm.cache_dir())
    console.print("read the text: the exact caches, what follows them, the greedy text and the needles")
    bench, report = read_bench(options, model, tokenizer)
    rows = measured(bench, caches, range(options.seeds))
    by_name = {row["name"]: row for row in rows}
    title = f"{name}, {options.text.stem}: {options.windows} x {options.scored} tokens after a prefix of {options.prefix:,}"
    for table in tables(title, rows, report):
        console.print(table)
    for cache in options.by_layer:
        if cache in by_name:
            console.print(layer_table(by_name[cache], report["by_layer"]))
    ratios = {}
    for one, other in RATIOS:
        if one in by_name and other in by_name:
            found, error = ratio(by_name[one], by_name[other])
            ratios[f"{one}/{other}"] = {"kl_ratio": found, "standard_error": error}
            console.print(f"KL({one}) / KL({other}) = {found:.3f} ± {error:.3f}")
    for row in rows:
        del row["token_kl"]
    report = {"model": name, "text": options.text.name, **report, "ratios": ratios, "caches": rows}
    report |= {"torch": torch.__version__, "seconds": round(time.perf_counter() - start, 1)}
    arguments = f"--model {name} --text {options.text.name} --windows {options.windows} --prefix {options.prefix}"
    arguments += f" --scored {options.scored} --seeds {options.seeds} --greedy {options.greedy}"
    arguments += "" if options.retrieval else " --no-retrieval"
    arguments += f" --caches {options.caches}" if options.caches else ""
    stem = f"fidelity.{name}.{options.text.stem}"
    path = results_file.write(stem, f"python -m benchmarks.fidelity {arguments}", report, options.out)
    picture = path.with_name(f"{path.name.removesuffix('.json')}.png")
    plot(title, rows, picture)
    console.print(f"wrote {path} and {picture.name} after {report['seconds']:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fidelity", description="What a compressed cache does to a model."
    )
    parser.add_argument("--model", default=lm.SMOLLM2, help=lm.SOURCES)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="a UTF-8 text longer than what is read of it")
    parser.add_argument("--windows", type=int, default=1, metavar="N", help="pieces of the text, evenly spaced (default: 1)")
    parser.add_argument("--prefix", type=int, default=1024, metavar="N", help="tokens whose cache is coded")
    parser.add_argument("--scored", type=int, default=512, metavar="N", help="tokens of each window read on from it")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="rotations that are tried where there is one")
    parser.add_argument("--caches", metavar="A,B", help="only these (default: all); pq3:key codes the keys alone")
    parser.add_argument("--by-layer", nargs="*", default=["pq3"], metavar="CACHE", help="caches shown by layer (default: pq3)")
    parser.add_argument("--greedy", type=int, default=64, metavar="N", help="tokens of greedy text; 0: none")
    parser.add_argument("--retrieval", action=argparse.BooleanOptionalAction, default=True, help="hide and ask for pass keys")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="threads that torch uses")
    parser.add_argument("--out", type=Path, default=results_file.RESULTS, metavar="DIR", help="where the figures go")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    run(options)


if __name__ == "__main__":
    main()
