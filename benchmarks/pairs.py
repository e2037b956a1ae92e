"""Law: this tree's speed on a CPU against another commit's: whole processes by turns, so that a noisy machine hits both.

``python -m benchmarks.pairs COMMIT`` prints, for each kind of call, the median of (seconds of COMMIT) / (seconds here) with its
95 % interval, and writes results/pairs.json. Kernels are compiled before anything is timed.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import results_file

ROOT = Path(__file__).parents[1]
PACKAGES = {"pqcodec": "pqcodec", "formats": "pqcodec/formats", "tools": "pqcodec/tools"}
SHAPES: dict[str, tuple[tuple[int, ...], dict[str, Any], int]] = {  # shape, options, calls that are timed together
    "4 x 64": ((4, 64), {}, 60),
    "8 x 64 x 128, mean": ((8, 64, 128), {"center": "mean", "exact_tokens": 4}, 40),
    "8 x 4096 x 128": ((8, 4096, 128), {}, 2),
    "8 x 2048 x 128, RoPE": ((8, 2048, 128), {"center": "rope"}, 2),
    "8 x 2048 x 64, pq6": ((8, 2048, 64), {"preset": "pq6"}, 2),
    "2 x 1024 x 128, paper": ((2, 1024, 128), {"preset": "paper"}, 2),
}
console = Console()


def laid_out(tree: Path, target: Path) -> None:
    """The package as it is installed, out of a tree of sources."""
    for folder, place in PACKAGES.items():
        shutil.copytree(tree / folder, target / place, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def at_commit(commit: str, target: Path) -> None:
    """The same out of a commit."""
    archive = subprocess.run(["git", "archive", commit, *PACKAGES], cwd=ROOT, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
        laid_out(Path(folder), target)


def quickest(work: Callable[[], Any], calls: int) -> float:
    """Seconds of a call, the least of six runs."""
    work()
    found = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        found.append((time.perf_counter() - start) / calls)
    return min(found)


def measure(package: str) -> dict[str, float]:
    """Seconds of every kind of call, of the package in a folder."""
    sys.path.insert(0, package)
    import numpy as np

    import pqcodec

    if not pqcodec.__file__.startswith(package):
        raise SystemExit(f"{pqcodec.__file__} was imported, not the package in {package}")
    rng, found = np.random.default_rng(0), {}
    for name, (shape, options, calls) in SHAPES.items():
        x = rng.standard_normal(shape).astype(np.float16)
        told = options | ({"rope": pqcodec.Rope(theta=1e4)} if options.get("center") == "rope" else {})
        data = pqcodec.encode(x, **told)
        found[f"encode {name}"] = quickest(lambda x=x, told=told: pqcodec.encode(x, **told), calls)
        found[f"decode {name}"] = quickest(lambda data=data: pqcodec.decode(data), calls)
    found["inspect"] = quickest(lambda: pqcodec.inspect(data), 200)
    return found


def run(package: Path) -> dict[str, float]:
    """``measure`` in a process of its own, which sees no installed pqcodec."""
    packages = [path for path in sys.path if path.endswith("site-packages")]
    code = (
        f"import sys; sys.path += {[*packages, str(ROOT)]!r}; from benchmarks.pairs import measure, json; "
        f"print(json.dumps(measure({str(package)!r})))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=package, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def interval(ratios: list[float]) -> tuple[float, float]:
    """The 95 % interval of their median, by order statistics."""
    ranked, half = sorted(ratios), 0.98 * math.sqrt(len(ratios))
    at = max(0, int(len(ranked) / 2 - half))
    return ranked[at], ranked[-1 - at]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pairs", description="This tree's speed against a commit's.")
    parser.add_argument("commit", help="what to compare with")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="processes of each side")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        before, here = Path(folder, "before"), Path(folder, "here")
        at_commit(options.commit, before)
        laid_out(ROOT, here)
        run(before), run(here)
        ratios: dict[str, list[float]] = {}
        for number in range(options.rounds):
            console.print(f"round {number + 1} of {options.rounds}", end="\r")
            sides = [before, here] if number % 2 else [here, before]
            seconds = {side: run(side) for side in sides}
            for name in seconds[here]:
                ratios.setdefault(name, []).append(seconds[before][name] / seconds[here][name])
    table = Table(title=f"speed against {options.commit}")
    for head in ("call", "median", "95 % interval"):
        table.add_column(head, justify="left" if head == "call" else "right")
    rows = []
    for name, found in ratios.items():
        low, high = interval(found)
        rows.append({"call": name, "ratio": median(found), "low": low, "high": high})
        table.add_row(name, f"{median(found):.3f}", f"{low:.3f} .. {high:.3f}")
    console.print(table)
    command = f"python -m benchmarks.pairs {options.commit}"
    console.print(
        f"wrote {results_file.write('pairs', command, {'commit': options.commit, 'rounds': options.rounds, 'rows': rows})}"
    )


if __name__ == "__main__":
    main()
