"""Law: the command ``python -m benchmarks.codecs --model NAME --text FILE``, and without a text one that puts parts together.

A cache of ``--prefix`` tokens is rounded to float16 and kept by each system of the table; the model (float32) reads on from
what comes back. Parts go to ``--folder``; the table of all parts to results/codecs.json and .png. Where there are parts of
speeds alone, these go into the table that is there. Texts are those of ``benchmarks.fidelity``: ``policy`` and ``devil``.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import model as lm
from benchmarks import results_file
from benchmarks.codecs.parts import SPEED, TIMED, TURNS, Bench, kept_parts, part, speeds
from benchmarks.codecs.report import plot, printed, together, with_speeds
from benchmarks.codecs.systems import BASE, SYSTEMS, System

console = Console()


def measure_texts(options: argparse.Namespace, systems: list[System]) -> None:
    """The parts of a model on some texts that are missing."""
    name, model, tokenizer = lm.load(options.model, lm.cache_dir())
    settings = {key: getattr(options, key) for key in ("windows", "prefix", "scored")}
    for text in options.text:
        bench = Bench.of(model, tokenizer, text.read_text(encoding="utf-8"), **settings)
        for system in systems:
            console.print(f"{name}, {text.stem}: {system.name}")
            part(options.folder, name, text.stem, system.name, settings, partial(bench.measure, system))


def measure_speeds(options: argparse.Namespace, systems: list[System]) -> None:
    """The speeds that are missing."""
    settings = {"turns": TURNS, "base": BASE, "shape": list(TIMED)}
    for system in systems:
        console.print(f"speed: {system.name}")
        part(options.folder, SPEED, SPEED, system.name, settings, partial(speeds, system))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codecs", description="All systems in one table.")
    parser.add_argument("--model", default=lm.SMOLLM2, help=lm.SOURCES)
    parser.add_argument("--text", type=Path, nargs="*", default=[], metavar="FILE", help="UTF-8 texts; none: only put together")
    parser.add_argument("--speed", action="store_true", help="measure speeds")
    parser.add_argument("--systems", metavar="A,B", help="only these (default: all)")
    parser.add_argument("--windows", type=int, default=1, metavar="N", help="pieces of the text, evenly spaced (default: 1)")
    parser.add_argument("--prefix", type=int, default=1024, metavar="N", help="tokens whose cache is kept")
    parser.add_argument("--scored", type=int, default=512, metavar="N", help="tokens of each window read on from it")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads that torch uses")
    parser.add_argument("--folder", type=Path, default=lm.cache_dir() / "codecs", metavar="DIR", help="of the parts")
    parser.add_argument("--out", type=Path, default=results_file.RESULTS, metavar="DIR", help="where the figures go")
    options = parser.parse_args()
    names = options.systems.split(",") if options.systems else list(SYSTEMS)
    unknown = [name for name in names if name not in SYSTEMS]
    if unknown:
        raise SystemExit(f"systems {', '.join(unknown)} are unknown; choose from {', '.join(SYSTEMS)}")
    torch.set_num_threads(options.threads)
    if options.text:
        measure_texts(options, [SYSTEMS[name] for name in names])
    if options.speed:
        measure_speeds(options, [SYSTEMS[name] for name in names])
    parts, path = list(kept_parts(options.folder)), options.out / "codecs.json"
    if path.exists() and all(one["model"] == SPEED for one in parts):
        found = with_speeds(json.loads(path.read_text()), parts, results_file.machine())
        console.print(printed(found))
        path.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"wrote the speeds of {len(parts)} systems into {path}")
        return
    found = together(parts)
    console.print(printed(found))
    if found["left_out"]:
        console.print(f"not measured on all of {found['measured_on']}, and left out: {', '.join(found['left_out'])}")
    asked = "".join(f" --{name} {value}" for name, value in found["settings"].items())
    path = results_file.write("codecs", f"python -m benchmarks.codecs{asked}", found, options.out)
    plot(found, path.with_suffix(".png"))
    console.print(f"wrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
