"""Law: the GPU backends' speed, latency and exactness on one CUDA GPU: ``python -m benchmarks.gpu_speed``.

Encode and decode stand beside a device copy that moves as many bytes, turn by turn in one run; beside them stand a cast to
fp8 and another codec's kernels, if it is installed. What the GPU made is held against the CPU backend. Writes
results/gpu_speed.json, and .png if matplotlib is there (``--draw`` draws it elsewhere, from the JSON alone).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import pqcodec
from benchmarks import results_file
from benchmarks.gpu_timing import DEVICE, REPLAYS, microseconds, timed, turns
from benchmarks.readme import gpu_speeds
from pqcodec import DecodeBatch, EncodeBatch, Rope

COMMAND = "python -m benchmarks.gpu_speed"
MAIN = 128  # the head_dim that everything is measured for
OTHERS = (64, 256, 96, 576)
CUDA_HEAD_DIMS = (64, 128, 256)  # that the CUDA backend has kernels of its own for; of quads it has them for all of these
FEW = ("pq2", "pq3", "pq4", "quad3", "paper")
BYTES = 1 << 30
LEADING = 32
ROUNDS, QUICK_ROUNDS = 10, 3
LAYERS, HEADS = 32, 8  # of the model whose tokens the latency is about
PROMPTS = (1024, 8192)  # tokens of all layers' keys, of which more are sampled for means than of few long ones
# Coordinates that GPU and CPU both encode. Of quads they are more blocks than few ones, which a less exact kernel encodes.
CHECKED, OF_QUADS, OF_PQ3 = 1 << 23, 1 << 26, 1 << 27  # the last: at head_dim 128
RANGE = 256  # tokens that GPU and CPU both decode, at the beginning, in the middle and at the end
WORKERS = 14
PEER, PEER_BITS = "fused-turboquant", (3, 4)


@dataclass(frozen=True)
class Case:
    head_dim: int
    preset: str
    dtype: str = "bfloat16"
    backend: str = "auto"
    keys: bool = False

    @property
    def name(self) -> str:
        parts = [f"head_dim {self.head_dim}", self.dtype, self.preset]
        parts += ["RoPE-centred, 4 exact"] * self.keys + [self.backend] * (self.backend != "auto")
        return ", ".join(parts)

    @cached_property
    def options(self) -> dict[str, Any]:
        """For ``encode``, backend left out."""
        return {"preset": self.preset, **({"center": "rope", "rope": Rope(), "exact_tokens": 4} if self.keys else {})}

    @property
    def of_cuda(self) -> bool:
        """Whether kernels of the CUDA backend's own code it, but for means and exact tokens."""
        return self.backend == "auto" and (self.head_dim in CUDA_HEAD_DIMS or self.preset.startswith("quad"))

    @property
    def slow_to_compile(self) -> bool:
        """Whether Triton compiles a kernel of it."""
        return self.keys or not self.of_cuda


def cases(quick: bool, presets: Sequence[str] = ()) -> list[Case]:
    """Cases with the same input follow each other; of these presets and the CUDA backend's own kernels, if any are named."""
    if quick:
        return [Case(MAIN, "pq3")]
    every = [
        *(Case(MAIN, name) for name, preset in pqcodec.PRESETS.items() if preset.rounds),
        Case(MAIN, "pq3", backend="triton"),
        *(Case(MAIN, preset, keys=True) for preset in ("pq3", "quad3", "quad3.5")),
        *(Case(head_dim, "quad3", keys=True) for head_dim in (64, 96, 256, 576)),
        Case(MAIN, "pq3", "float16"),
        Case(MAIN, "pq3", "float32"),
        *(Case(head_dim, preset) for head_dim in OTHERS for preset in FEW),
    ]
    if not presets:
        return every
    return [case for case in every if case.preset in presets and case.of_cuda]


def gaussian(size: int, head_dim: int, dtype: str) -> torch.Tensor:
    """Standard normal numbers [LEADING, tokens, head_dim] on the device, of about ``size`` bytes."""
    kind = getattr(torch, dtype)
    tokens = max(size // (LEADING * head_dim * kind.itemsize), 1)
    generator = torch.Generator(DEVICE).manual_seed(head_dim)
    return torch.randn((LEADING, tokens, head_dim), generator=generator, dtype=kind, device=DEVICE)


class Progress:
    """Lines with the seconds since the beginning, seen at once."""

    def __init__(self, console: Console) -> None:
        self._console, self._start = console, time.perf_counter()

    def __call__(self, line: str) -> None:
        self._console.print(f"{time.perf_counter() - self._start:6.1f} s  {line}", markup=False, highlight=False)


# -- compiling -----------------------------------------------------------------------------------------------------
def compile_case(case: Case) -> None:
    """Code a small tensor as a case does: Triton keeps the kernels on disk, where other processes find them.

    It is large enough for the kernels of large tensors.
    """
    x = torch.ones((LEADING, 4096, case.head_dim), dtype=getattr(torch, case.dtype), device=DEVICE)
    made = EncodeBatch([x], backend=case.backend, **case.options)
    DecodeBatch(made.run(), backend=case.backend).run()
    torch.cuda.synchronize()


def compile_cpu() -> None:
    """The same for the CPU backend's kernels, which numba keeps on disk."""
    for case in (Case(64, "pq3"), Case(64, "pq3", "float32"), Case(64, "pq3", keys=True), Case(64, "paper")):
        x = torch.ones((2, 128, case.head_dim), dtype=getattr(torch, case.dtype))
        pqcodec.decode(pqcodec.encode(x, backend="cpu", **case.options), backend="cpu")


def compile_peer(bits: int) -> None:
    codec = peer_codec(bits, DEVICE)
    codec.decode(codec.encode(torch.ones((64, MAIN), dtype=torch.bfloat16, device=DEVICE)))
    torch.cuda.synchronize()


def compile_all(chosen: Sequence[Case], say: Progress) -> None:
    """Compile what is needed in many processes at once; they are gone, and the GPU is idle, when this returns."""
    works: dict[str, Callable[[], None]] = {"the CPU backend": compile_cpu}
    works |= {case.name: partial(compile_case, case) for case in reversed(chosen) if case.slow_to_compile}
    if peer_is_installed():
        works |= {f"{PEER}, {bits} bits": partial(compile_peer, bits) for bits in PEER_BITS}
    here = [case for case in chosen if not case.slow_to_compile]
    workers = max(1, min(WORKERS, len(works), results_file.machine()["cores"] - 2))
    say(f"compiling: {len(here)} kinds here, {len(works)} in {workers} processes")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting: dict[Future[None], str] = {pool.submit(work): name for name, work in works.items()}
        for case in here:
            compile_case(case)
        say("compiled here")
        for done in as_completed(waiting):
            error = done.exception()
            say(f"compiled: {waiting[done]}" if error is None else f"not compiled beforehand: {waiting[done]}: {error!r}")


# -- speed ---------------------------------------------------------------------------------------------------------
def rel_mse(x: torch.Tensor, y: torch.Tensor) -> float:
    exact = x.double()
    return float(((exact - y.double()) ** 2).sum() / (exact**2).sum())


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.cpu().contiguous().view(torch.uint8), y.cpu().contiguous().view(torch.uint8))


def against_cpu(case: Case, x: torch.Tensor, y: torch.Tensor, stream: torch.Tensor) -> dict[str, Any]:
    """The GPU's rows held against the CPU's, bit for bit; and streams of both, whose rows differ only in ties.

    A tie is an angle closer to a cell's edge than float32 can tell: two encoders may choose either cell. CUDA's encoder of
    quads looks at a few candidates alone, so that most of its rows differ; ``error_against_cpu`` says what that costs.
    """
    data, tokens = stream.cpu().numpy(), x.shape[1]
    starts = {0, max(tokens // 2 - RANGE // 3, 0), max(tokens - RANGE, 0)}
    ranges = [(start, min(start + RANGE, tokens)) for start in sorted(starts)]
    equal = all(same_bits(y[:, a:b], pqcodec.decode(data, tokens=(a, b), backend="cpu")) for a, b in ranges)
    coordinates = OF_PQ3 if case == Case(MAIN, "pq3") else OF_QUADS if case.preset.startswith("quad") else CHECKED
    part = x[:, : max(coordinates // (LEADING * case.head_dim), 1)].contiguous()
    batch = EncodeBatch([part], backend=case.backend, **case.options)
    here = batch.run()[0].cpu().numpy()
    batch.check()
    there = np.frombuffer(pqcodec.encode(part.cpu(), backend="cpu", **case.options), np.uint8)
    one, two = (pqcodec.decode(each, backend="cpu") for each in (here, there))
    differing = int((one != two).any(-1).sum())
    return {
        "rel_mse": rel_mse(part[:, :RANGE], one[:, :RANGE].to(DEVICE)),
        "error_against_cpu": rel_mse(part, one.to(DEVICE)) / rel_mse(part, two.to(DEVICE)),
        "decoded_as_on_cpu": equal,
        "encoded_as_on_cpu": here.size == there.size and (differing > 0 or bool(np.array_equal(here, there))),
        "checked_coordinates": part.numel(),
        "rows_with_ties": differing,
        "ties_per_billion": differing * 1e9 / part.numel(),
    }


def measure(case: Case, x: torch.Tensor, y: torch.Tensor, rounds: int) -> dict[str, Any]:
    encode = EncodeBatch([x], backend=case.backend, **case.options)
    (stream,) = encode.run()
    decode = DecodeBatch([stream], outs=[y], backend=case.backend)
    figures = turns(x.nbytes, stream.nbytes, encode.run, decode.run, rounds)
    encode.check()
    decode.check()
    about = {"head_dim": case.head_dim, "dtype": case.dtype, "preset": case.preset, "backend": case.backend, "keys": case.keys}
    return about | {"bits": 8 * stream.nbytes / x.numel()} | figures | against_cpu(case, x, y, stream)


def speeds(chosen: Sequence[Case], rounds: int, say: Progress) -> list[dict[str, Any]]:
    rows = []
    for (head_dim, dtype), group in groupby(chosen, lambda case: (case.head_dim, case.dtype)):
        x = gaussian(BYTES, head_dim, dtype)
        y = torch.empty_like(x)
        for case in group:
            y.zero_()
            rows.append(row := measure(case, x, y, rounds))
            verdict = "as on the CPU" if sound(row) else "NOT AS ON THE CPU"
            say(
                f"{case.name}: encode {row['encode_gb_s']:.0f} GB/s ({row['encode_ratio']:.2f} of a copy), "
                f"decode {row['decode_gb_s']:.0f} GB/s ({row['decode_ratio']:.2f}), {verdict}; only moving their bytes: "
                f"{row['moving_as_encode_ratio']:.2f}, {row['moving_as_decode_ratio']:.2f}"
            )
        del x, y
        torch.cuda.empty_cache()
    return rows


def sound(row: dict[str, Any]) -> bool:
    return row["decoded_as_on_cpu"] and row["encoded_as_on_cpu"]


# -- latency -------------------------------------------------------------------------------------------------------
def latency(preset: str) -> dict[str, Any]:
    """One token's keys and values of a whole model, bf16: microseconds as a CUDA graph and run by run."""
    xs = [torch.randn((HEADS, 1, MAIN), dtype=torch.bfloat16, device=DEVICE) for _ in range(2 * LAYERS)]
    encode = EncodeBatch(xs, preset=preset)
    decode = DecodeBatch(encode.run())
    small = torch.zeros(1, device=DEVICE)

    def both() -> None:
        encode.run()
        decode.run()

    def trivial() -> None:
        small.add_(1)
        small.mul_(1)

    found: dict[str, Any] = {"tensors": len(xs), "shape": list(xs[0].shape), "replays": REPLAYS, "preset": preset}
    for name, work in {"two_trivial_ops": trivial, "encode": encode.run, "decode": decode.run, "both": both}.items():
        eager = microseconds(work)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        found[name] = {"graph_us": microseconds(graph.replay), "eager_us": eager}
    for x, y in zip(xs, decode.outs, strict=True):
        x.neg_()
        y.zero_()
    graph.replay()  # the last one: encode and decode
    encode.check()
    decode.check()
    pairs = zip(encode.streams, decode.outs, strict=True)
    found["decoded_as_on_cpu"] = all(same_bits(y, pqcodec.decode(data.cpu().numpy(), backend="cpu")) for data, y in pairs)
    return found


# -- keys of a model -----------------------------------------------------------------------------------------------
def keys_of_model(tokens: int, preset: str, rounds: int) -> dict[str, Any]:
    """Keys and values of all layers, at a prompt's length: microseconds, and the share of values' speed that keys have."""
    xs = [gaussian(HEADS * tokens * MAIN * 2, MAIN, "bfloat16").reshape(HEADS, tokens, MAIN) for _ in range(LAYERS)]
    works = []
    for keys in (False, True):
        encode = EncodeBatch(xs, **Case(MAIN, preset, keys=keys).options)
        decode = DecodeBatch(encode.run())
        works += [encode.run, decode.run]
    found = timed(works, rounds)
    names = ("encode_us", "decode_us", "keys_encode_us", "keys_decode_us")
    return {
        "preset": preset,
        "shape": [LAYERS, HEADS, tokens, MAIN],
        **{name: median(column) * 1e6 for name, column in zip(names, zip(*found, strict=True), strict=True)},
        "keys_encode_share": median(row[0] / row[2] for row in found),
        "keys_decode_share": median(row[1] / row[3] for row in found),
    }


# -- peers ---------------------------------------------------------------------------------------------------------
def peer_is_installed() -> bool:
    return find_spec(PEER.replace("-", "_")) is not None


def peer_codec(bits: int, device: str) -> Any:
    """The peer's own entry: its fused Triton kernels on a GPU, torch on a CPU."""
    return import_module(PEER.replace("-", "_")).TurboQuantMSE(head_dim=MAIN, bits=bits, device=device)


def fp8(x: torch.Tensor, rounds: int) -> dict[str, Any]:
    cast = x.to(torch.float8_e4m3fn)
    figures = turns(x.nbytes, cast.nbytes, lambda: x.to(torch.float8_e4m3fn), lambda: cast.to(x.dtype), rounds)
    part = slice(0, CHECKED // MAIN)
    return {"bits": 8.0, "rel_mse": rel_mse(x[part], cast[part].to(x.dtype)), **figures}


def peer(x: torch.Tensor, rounds: int, bits: int) -> dict[str, Any]:
    codec = peer_codec(bits, DEVICE)
    coded = codec.encode(x)
    stored = coded.indices.nbytes + coded.norms.nbytes
    figures = turns(x.nbytes, stored, lambda: codec.encode(x), lambda: codec.decode(coded), rounds)
    part, plain = x[: CHECKED // MAIN], peer_codec(bits, "cpu")
    few = part[: 1 << 12].cpu()
    return {
        "bits": 8 * stored / x.numel(),
        "rel_mse": rel_mse(part, codec.decode(codec.encode(part))),
        "rel_mse_of_its_torch_path": rel_mse(few, plain.decode(plain.encode(few))),
        "decodes_to": str(codec.decode(codec.encode(few.to(DEVICE))).dtype).removeprefix("torch."),
        "version": version(PEER),
        **figures,
    }


def peers(rounds: int, say: Progress) -> list[dict[str, Any]]:
    """Others on the same tensor, as rows [..., 128]: each with its figures, or with why it has none."""
    x = gaussian(BYTES, MAIN, "bfloat16").reshape(-1, MAIN)
    works: dict[str, Callable[[], dict[str, Any]]] = {"torch cast to float8_e4m3fn": partial(fp8, x, rounds)}
    works |= {f"{PEER}, {bits} bits": partial(peer, x, rounds, bits) for bits in PEER_BITS}
    rows = []
    for name, work in works.items():
        row: dict[str, Any]
        if name.startswith(PEER) and not peer_is_installed():
            row = {"missing": f"not installed: pip install {PEER}"}
        else:
            try:
                row = work()
            except Exception as error:  # whatever another's code raises is told, and costs nothing else
                row = {"missing": f"failed: {error!r}"}
        say(f"{name}: " + (row.get("missing") or "encode {encode_gb_s:.0f} GB/s, decode {decode_gb_s:.0f} GB/s".format(**row)))
        rows.append({"name": name, **row})
        torch.cuda.empty_cache()
    return rows


# -- what is shown -------------------------------------------------------------------------------------------------
def table(title: str, headings: Sequence[str]) -> Table:
    shown = Table(title=title)
    for number, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if number else "left")
    return shown


def print_tables(figures: dict[str, Any], console: Console) -> None:
    title = f"{figures['accelerator']}: GB/s of tensor, and the share of a device copy of as many bytes"
    speed = ("copy TB/s", "encode", "decode", "encode/copy", "decode/copy")
    shown = table(title, ("tensor", "MiB", "MiB moved", *speed, "relMSE", "ties in 1e9", "as on the CPU"))
    for row in figures["rows"]:
        name = Case(*(row[key] for key in ("head_dim", "preset", "dtype", "backend", "keys"))).name
        sizes = (f"{row[key] / 2**20:.0f}" for key in ("input_bytes", "moved_bytes"))
        last = (f"{row['rel_mse']:.5f}", f"{row['ties_per_billion']:.0f}", "yes" if sound(row) else "NO")
        shown.add_row(name, *sizes, *_speed(row), *last)
    console.print(shown)
    shown = table(f"others, head_dim {MAIN}, bf16", ("codec", "bits/coord", "relMSE", *speed))
    ours = [{"name": f"pqcodec {name}", **row} for name, row in gpu_speeds(figures).items() if name in FEW]
    for row in ours + figures["peers"]:
        if "missing" in row:
            shown.add_row(escape(f"{row['name']}: {row['missing']}"))
        else:
            shown.add_row(row["name"], f"{row['bits']:.2f}", f"{row['rel_mse']:.5f}", *_speed(row))
    console.print(shown)
    found = figures["latency"]
    shape = " x ".join(map(str, found["shape"]))
    shown = table(f"microseconds a run: {found['tensors']} tensors [{shape}], bf16, pq3", ("work", "CUDA graph", "eager"))
    for name, heading in {"both": "encode + decode", "encode": "encode", "decode": "decode"}.items():
        shown.add_row(heading, *(f"{found[name][kind]:.1f}" for kind in ("graph_us", "eager_us")))
    shown.add_row("two trivial torch ops", *(f"{found['two_trivial_ops'][kind]:.1f}" for kind in ("graph_us", "eager_us")))
    console.print(shown)


def _speed(row: dict[str, Any]) -> tuple[str, ...]:
    speeds = (f"{row['copy_tb_s']:.2f}", f"{row['encode_gb_s']:.0f}", f"{row['decode_gb_s']:.0f}")
    return *speeds, f"{row['encode_ratio']:.3f}", f"{row['decode_ratio']:.3f}"


def draw(figures: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours = gpu_speeds(figures)
    measured = [row for row in figures["peers"] if "missing" not in row]
    rows = [{"name": f"pqcodec\n{name}", **ours[name]} for name in ("pq3", "pq4") if name in ours]
    rows += [row | {"name": row["name"].replace("torch cast to ", "cast to\n").replace(", ", "\n")} for row in measured]
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.4))
    _bars(left, list(ours), list(ours.values()), "ratio", "{:.2f}")
    left.axhline(1, color="black", lw=0.8, ls=":")
    left.set(title="share of a device copy of as many bytes", ylabel="copy's time / kernel's time", ylim=(0, 1.1))
    _bars(right, [row["name"] for row in rows], rows, "gb_s", "{:.0f}")
    right.set(title="beside others", ylabel="GB/s of bf16 input")
    left.legend()
    missing = [f"{row['name']} ({row['missing']})" for row in figures["peers"] if "missing" in row]
    figure.suptitle(f"{figures['accelerator']}, head_dim {MAIN}, bf16" + "".join(f"\nnot shown: {name}" for name in missing))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _bars(axis: Any, names: Sequence[str], rows: Sequence[dict[str, Any]], unit: str, label: str) -> None:
    """Pairs of bars, encode and decode."""
    for verb, shift, color in (("encode", -0.2, "tab:blue"), ("decode", 0.2, "tab:orange")):
        heights = [row[f"{verb}_{unit}"] for row in rows]
        bars = axis.bar([i + shift for i in range(len(rows))], heights, 0.4, color=color, label=verb)
        axis.bar_label(bars, fmt=label, fontsize=8)
    axis.set_xticks(range(len(rows)), names, fontsize=9)
    axis.grid(axis="y", alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Speed, latency and exactness of the GPU backends.")
    parser.add_argument("--quick", action="store_true", help="head_dim 128 and pq3 only, few rounds; writes only with --out")
    parser.add_argument("--presets", type=lambda x: x.split(","), default=(), metavar="A,B", help="only these, and no peers")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write results here (default: benchmarks/results)")
    parser.add_argument("--draw", action="store_true", help="only draw gpu_speed.png from gpu_speed.json")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 170)
    folder = options.out or results_file.RESULTS
    if options.draw:
        draw(json.loads((folder / "gpu_speed.json").read_text()), folder / "gpu_speed.png")
        return
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU, and torch finds none")
    say = Progress(console)
    chosen, rounds = cases(options.quick, options.presets), QUICK_ROUNDS if options.quick else ROUNDS
    device = results_file.accelerator()
    say(f"{device['accelerator']}, driver {device['driver']}, torch {device['torch']}, triton {device['triton']}")
    compile_all(chosen, say)
    figures: dict[str, Any] = {**device, "rounds": rounds, "rows": speeds(chosen, rounds, say)}
    for name, preset in (("latency", "pq3"), ("latency_quads", "quad3")):
        figures[name] = latency(preset)
        both = figures[name]["both"]
        say(f"{preset}: {both['graph_us']:.1f} us encode + decode as a graph, {both['eager_us']:.1f} us eager")
    figures["keys_of_model"] = [keys_of_model(tokens, "quad3", rounds) for tokens in PROMPTS * (not options.quick)]
    for row in figures["keys_of_model"]:
        say(
            f"quad3, keys of {LAYERS} layers of {HEADS} heads and {row['shape'][2]} tokens: encoded in "
            f"{row['keys_encode_us']:.0f} us ({row['keys_encode_share']:.2f} of values' speed), "
            f"decoded in {row['keys_decode_us']:.0f} us ({row['keys_decode_share']:.2f})"
        )
    figures["peers"] = [] if options.presets else peers(rounds, say)
    print_tables(figures, console)
    if options.out or not options.quick:
        command = f"{COMMAND} --presets {','.join(options.presets)}" if options.presets else COMMAND
        path = results_file.write("gpu_speed", command, figures, folder)
        console.print(f"wrote {path}")
        try:
            draw(figures, path.with_suffix(".png"))
        except ImportError:
            console.print(f"matplotlib is not installed: draw later, with {COMMAND} --draw", markup=False)
    if not (all(map(sound, figures["rows"])) and figures["latency"]["decoded_as_on_cpu"]):
        sys.exit("the GPU's results are not those of the CPU: see the tables")


if __name__ == "__main__":
    main()
