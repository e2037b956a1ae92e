"""Law: how quickly a KV cache leaves a GPU encoded and comes back, and what that costs: ``python -m benchmarks.offload_speed``.

The cache is that of an 8B Llama at 8,192 tokens: 64 tensors [8, 8192, 128] of bfloat16, 1 GiB. A ``HostPool`` and pinned
memory of their full size take it in and give it back turn by turn in one run. Then as many matrix products run alone, and with
transfers beside them the whole time, on a stream of the same priority as the pool's and on one of a higher. Writes
results/offload_speed.json, and .png if matplotlib is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import results_file
from pqcodec import DecodeBatch, EncodeBatch
from pqcodec.formats.offload.host_pool import HostPool
from pqcodec.formats.offload.pinned import PinnedArena
from pqcodec.formats.policy.recipe import Recipe

COMMAND = "python -m benchmarks.offload_speed"
LAYERS, HEADS, TOKENS, DIM = 32, 8, 8192, 128
PRESET = Recipe().preset
PIECES = (64, 128, 256, 512)  # MiB of tensors a step
MAIN_PIECE = 128
ROUNDS, DROPPED = 9, 2
BESIDE_ROUNDS = 12
SETTLING = 5  # rounds before those: a GPU at its power limit takes seconds to find its clock after a pause
PRODUCT = 8192  # rows of the square matrices
PRODUCTS = 250  # some 0.4 s
BESIDE = ((128, 0), (128, -1), (512, 0))  # MiB of tensors a step, and the priority of the products' stream
console = Console(width=None if sys.stdout.isatty() else 150)


def seconds(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


class Copies:
    """The same tensors in pinned memory of their full size, each by one copy on a stream for each direction."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._arena = PinnedArena(sum(x.nbytes + 256 for x in tensors))
        self._hosts = [self._arena.allocate(x.nbytes).tensor.view(x.dtype).view(x.shape) for x in tensors]
        self._out, self._back = torch.cuda.Stream(), torch.cuda.Stream()

    def put(self, tensors: Sequence[torch.Tensor]) -> torch.cuda.Event:
        with torch.cuda.stream(self._out):
            for x, host in zip(tensors, self._hosts, strict=True):
                host.copy_(x, non_blocking=True)
            return self._out.record_event()

    def get(self, outs: Sequence[torch.Tensor]) -> torch.cuda.Event:
        with torch.cuda.stream(self._back):
            for x, host in zip(outs, self._hosts, strict=True):
                x.copy_(host, non_blocking=True)
            return self._back.record_event()


class Encoded:
    """The tensors in a HostPool."""

    def __init__(self, tensors: Sequence[torch.Tensor], piece: int, preset: str) -> None:
        size = sum(x.nbytes for x in tensors)
        self.pool = HostPool(size, preset=preset, piece_bytes=piece << 20)
        self._free = torch.cuda.Stream()  # a stream without work, for a get that waits for no other

    def put(self, tensors: Sequence[torch.Tensor]) -> Any:
        with torch.cuda.stream(self._free):
            return self.pool.put("cache", tensors)

    def get(self, outs: Sequence[torch.Tensor]) -> Any:
        with torch.cuda.stream(self._free):
            return self.pool.fetch("cache", outs)


def finish(handle: Any) -> None:
    handle.synchronize() if isinstance(handle, torch.cuda.Event) else handle.wait()


def both(one: Any, tensors: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
    """Out and back, one after the other."""
    finish(one.put(tensors))
    finish(one.get(outs))


# -- speed ---------------------------------------------------------------------------------------------------------
def speed(
    copies: Copies, tensors: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], piece: int, preset: str
) -> dict[str, Any]:
    """GB/s of tensors out, back and out and back, of the pool and of copies, turn by turn."""
    size = sum(x.nbytes for x in tensors)
    encoded = Encoded(tensors, piece, preset)
    sides: dict[str, Any] = {"pool": encoded, "copy": copies}
    times: dict[str, list[float]] = {f"{side}_{what}": [] for side in sides for what in ("out", "back", "both")}
    for turn in range(DROPPED + ROUNDS):
        for name, side in sides.items():
            works = {
                "out": lambda side=side: finish(side.put(tensors)),
                "back": lambda side=side: finish(side.get(outs)),
                "both": partial(both, side, tensors, outs),
            }
            for what, work in works.items():
                found = seconds(work)
                if turn >= DROPPED:
                    times[f"{name}_{what}"].append(found)
    figures: dict[str, Any] = {"piece_mib": piece, "encoded_bytes": encoded.pool.usage().used_bytes}
    for what in ("out", "back", "both"):
        mine, theirs = (median(times[f"{side}_{what}"]) for side in ("pool", "copy"))
        factor = 2 if what == "both" else 1
        figures[what] = {
            "pool_gb_s": factor * size / mine / 1e9,
            "copy_gb_s": factor * size / theirs / 1e9,
            "ratio": theirs / mine,
        }
    encoded.pool.close()
    return figures


def exact(tensors: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], preset: str) -> bool:
    """Whether a pool gives back what batches of the same tensors do, bit for bit."""
    with HostPool(1 << 30, preset=preset) as pool:
        for x in outs:
            x.fill_(float("nan"))
        pool.put("cache", list(tensors), wait=True)
        pool.get("cache", list(outs))
        expected = DecodeBatch(EncodeBatch(list(tensors), preset=preset).run()).run()
        return all(torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip(outs, expected, strict=True))


# -- beside other work ---------------------------------------------------------------------------------------------
class Products:
    """Matrix products on a stream of their own, and the milliseconds that so many take."""

    def __init__(self, priority: int = 0) -> None:
        self._a, self._b = (torch.randn((PRODUCT, PRODUCT), dtype=torch.bfloat16, device="cuda") for _ in range(2))
        self._c = torch.empty_like(self._a)
        self.priority = priority
        self._stream = torch.cuda.Stream(priority=priority)

    def beside(self, work: Callable[[], int] | None) -> tuple[float, float]:
        """Milliseconds of the products, and GB/s that ``work`` (which returns bytes) moved meanwhile."""
        torch.cuda.synchronize()
        if work is not None:
            work()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            begin.record()
            for _ in range(PRODUCTS):
                torch.mm(self._a, self._b, out=self._c)
            end.record()
        start, moved = time.perf_counter(), 0
        while work is not None and not end.query():
            moved += work()
        elapsed = time.perf_counter() - start
        torch.cuda.synchronize()
        return begin.elapsed_time(end), moved / elapsed / 1e9


def works(one: Any, tensors: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> dict[str, Callable[[], int]]:
    """One transfer of the whole cache in each direction; they return its bytes."""
    size = sum(x.nbytes for x in tensors)

    def out() -> int:
        finish(one.put(tensors))
        return size

    def back() -> int:
        finish(one.get(outs))
        return size

    return {"out": out, "back": back}


def slow_downs(
    copies: Copies, tensors: Sequence[torch.Tensor], outs: Sequence[torch.Tensor], preset: str
) -> list[dict[str, Any]]:
    """The products' time with each kind of transfers over the mean of their times alone, before and behind."""
    rows = beside(Products(), copies, tensors, outs, "copies", None)
    for piece, priority in BESIDE:
        encoded = Encoded(tensors, piece, preset)
        rows += beside(Products(priority), encoded, tensors, outs, "pool", piece)
        encoded.pool.close()
    return rows


def beside(
    products: Products,
    one: Any,
    tensors: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    name: str,
    piece: int | None,
) -> list[dict[str, Any]]:
    rows = []
    for what, work in works(one, tensors, outs).items():
        finish(one.put(tensors))
        work()
        before = products.beside(None)[0]
        ratios, speeds, alone = [], [], []
        for turn in range(SETTLING + BESIDE_ROUNDS):
            slowed, moved = products.beside(work)
            after = products.beside(None)[0]
            if turn >= SETTLING:
                ratios.append(2 * slowed / (before + after) - 1)
                speeds.append(moved)
                alone.append(before)
            before = after
        row = {
            "priority": products.priority,
            "work": f"{name} {what}",
            "piece_mib": piece,
            "alone_ms": median(alone),
            "tflops_alone": 2 * PRODUCT**3 * PRODUCTS / median(alone) / 1e9,
            "slow_down": median(ratios),
            "slow_downs": ratios,
            "gb_s": median(speeds),
        }
        rows.append(row)
        console.print(f"{row['work']}, {piece} MiB a step: {row['gb_s']:.0f} GB/s, products {row['slow_down']:+.1%}")
    return rows


# -- what is shown -------------------------------------------------------------------------------------------------
def print_tables(figures: dict[str, Any]) -> None:
    shown = Table(
        title=f"{figures['accelerator']}: GB/s of bf16 tensors, {figures['preset']} in a HostPool and copies of the tensors"
    )
    for heading in ("MiB a step", "out", "copy", "ratio", "back", "copy", "ratio", "out, then back", "copy", "ratio"):
        shown.add_column(heading, justify="right")
    for row in figures["speed"]:
        cells = [f"{row[what][key]:.{2 if key == 'ratio' else 0}f}" for what in ("out", "back", "both") for key in row[what]]
        shown.add_row(str(row["piece_mib"]), *cells)
    console.print(shown)
    if not figures["beside"]:
        return
    shown = Table(title=f"{PRODUCTS} products of {PRODUCT}^2 bf16 matrices, with transfers beside them")
    for heading in ("work", "MiB a step", "products' priority", "GB/s", "slow-down"):
        shown.add_column(heading, justify="right")
    for row in figures["beside"]:
        cells = (
            row["work"],
            str(row["piece_mib"] or ""),
            str(row["priority"]),
            f"{row['gb_s']:.0f}",
            f"{row['slow_down']:.1%}",
        )
        shown.add_row(*cells)
    console.print(shown)


def draw(figures: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
    main = next(row for row in figures["speed"] if row["piece_mib"] == MAIN_PIECE)
    for side, shift, color in (("pool", -0.2, "tab:blue"), ("copy", 0.2, "tab:gray")):
        heights = [main[what][f"{side}_gb_s"] for what in ("out", "back", "both")]
        label = {"pool": f"HostPool, {figures['preset']}", "copy": "copy to pinned memory"}[side]
        left.bar_label(
            left.bar([i + shift for i in range(3)], heights, 0.4, color=color, label=label), fmt="{:.0f}", fontsize=8
        )
    left.set_xticks(range(3), ["out", "back", "out, then back"])
    left.set(title="GPU and host", ylabel="GB/s of bf16 tensors")
    left.margins(y=0.2)
    left.legend(loc="upper center", ncols=2)
    for name, mark in (("pool out", "o"), ("pool back", "s"), ("copies out", "^"), ("copies back", "v")):
        for priority, color in ((0, "tab:blue"), (-1, "tab:green")):
            rows = [row for row in figures["beside"] if (row["work"], row["priority"]) == (name, priority)]
            if rows:
                label = name + ", products go first" * (priority < 0)
                right.scatter(
                    [r["gb_s"] for r in rows], [100 * r["slow_down"] for r in rows], c=color, marker=mark, label=label
                )
    right.set(title="matrix products beside it", xlabel="GB/s of bf16 tensors", ylabel="slower by %")
    right.grid(alpha=0.3)
    right.legend()
    figure.suptitle(figures["accelerator"])
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Offload of encoded KV caches against copies of them.")
    parser.add_argument("--draw", action="store_true", help="only draw offload_speed.png from offload_speed.json")
    parser.add_argument("--preset", default=PRESET, metavar="NAME", help=f"of the pool (default: {PRESET})")
    parser.add_argument("--alone", action="store_true", help="leave out what runs beside matrix products: most of the time")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write results here (default: benchmarks/results)")
    options = parser.parse_args()
    folder = options.out or results_file.RESULTS
    if options.draw:
        draw(json.loads((folder / "offload_speed.json").read_text()), folder / "offload_speed.png")
        return
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU, and torch finds none")
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (HEADS, TOKENS, DIM)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.bfloat16, device="cuda") for _ in range(2 * LAYERS)]
    outs = [torch.empty_like(x) for x in tensors]
    if not exact(tensors, outs, options.preset):
        sys.exit("the pool gives other tensors back than batches do")
    console.print("the pool gives back what batches do, bit for bit")
    copies = Copies(tensors)
    figures: dict[str, Any] = {
        **results_file.accelerator(),
        "preset": options.preset,
        "tensors": len(tensors),
        "shape": list(shape),
    }
    figures["speed"] = [speed(copies, tensors, outs, piece, options.preset) for piece in PIECES]
    figures["beside"] = [] if options.alone else slow_downs(copies, tensors, outs, options.preset)
    print_tables(figures)
    command = COMMAND if options.preset == PRESET else f"{COMMAND} --preset {options.preset}"
    command += " --alone" * options.alone
    path = results_file.write("offload_speed", command, figures, folder)
    console.print(f"wrote {path}")
    if options.alone:
        return
    try:
        draw(figures, path.with_suffix(".png"))
    except ImportError:
        console.print("matplotlib is not installed: the figure is not drawn")


if __name__ == "__main__":
    main()
