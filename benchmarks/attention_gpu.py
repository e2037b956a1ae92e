"""Law: attention to codes on a GPU beside exact attention: ``python -m benchmarks.attention_gpu``.

One query token of a model with 32 heads of queries and 8 of keys, head_dim 128, bfloat16, against a long cache: an
``AttendBatch`` of quads (keys centred under RoPE, 4 exact first tokens, 128 recent ones) by the CUDA kernel and by Triton's,
torch's attention by each of its kernels that takes grouped heads, decoding into memory that is there already and attending to
that, and the time in which a copy moves the bytes that each must read. All are captured in CUDA graphs and measured turn by
turn with a cold L2 cache. Writes results/attention_gpu.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import results_file
from pqcodec import AttendBatch, DecodeBatch, EncodeBatch, Rope

COMMAND = "python -m benchmarks.attention_gpu"
DEVICE, DTYPE = "cuda", torch.bfloat16
KV_HEADS, Q_HEADS, DIM = 8, 32, 128
EXACT, RECENT, CHUNK = 4, 128, 64
ROUNDS, DROPPED = 15, 3
CASES = [(1, 4096), (1, 32768), (1, 131072), (1, 524288), (8, 32768), (8, 131072), (32, 4096), (32, 32768)]  # batch, tokens
PRESETS = {(1, 131072): ("quad3", "quad2", "quad2.5", "quad3.5"), (8, 131072): ("quad3", "quad2", "quad3.5")}
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass(frozen=True)
class Captured:
    """A CUDA graph, and the work that it is of: as long as the graph is there, so are the work's tensors."""

    graph: torch.cuda.CUDAGraph
    work: Callable[[], Any]

    def __call__(self) -> None:
        self.graph.replay()


def captured(work: Callable[[], Any]) -> Captured:
    """A work as a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return Captured(graph, work)


def microseconds(works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Of each work, the median of turns in which every work runs once, with an L2 cache that holds nothing of it."""
    filler = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    turns = []
    for _ in range(DROPPED + ROUNDS):
        marks = {}
        for name, work in works.items():
            filler.zero_()
            marks[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[name][0].record()
            work()
            marks[name][1].record()
        turns.append(marks)
    torch.cuda.synchronize()
    return {name: median(1e3 * one[name][0].elapsed_time(one[name][1]) for one in turns[DROPPED:]) for name in works}


def copy_rate() -> float:
    """Bytes read and written in a microsecond by a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds({"copy": partial(target.copy_, source)})["copy"]


def keys_with_mean(heads: int, tokens: int, dim: int, theta: float = 1e4) -> torch.Tensor:
    """Random keys [heads, tokens, dim] whose mean turns as RoPE has it: float32."""
    level = 2 * torch.randn(heads, 1, dim, device=DEVICE)
    angle = torch.arange(tokens, device=DEVICE).double()[:, None] * theta ** (
        -torch.arange(0, dim, 2, device=DEVICE).double() / dim
    )
    cos, sin = angle.cos().float(), angle.sin().float()
    a, b = level[..., : dim // 2], level[..., dim // 2 :]
    return torch.randn(heads, tokens, dim, device=DEVICE) + torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def cache(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with a mean that turns, and values: [batch, KV_HEADS, tokens, DIM]."""
    keys = torch.stack([keys_with_mean(KV_HEADS, tokens, DIM).to(DTYPE) for _ in range(batch)])
    return keys, torch.randn(batch, KV_HEADS, tokens, DIM, device=DEVICE, dtype=DTYPE)


def exact_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kernel: Any) -> torch.Tensor:
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def measure(batch: int, tokens: int, rate: float, console: Console) -> list[dict[str, Any]]:
    """A row for each preset: microseconds of every way."""
    torch.manual_seed(0)
    keys, values = cache(batch, tokens)
    query = torch.randn(batch, Q_HEADS, 1, DIM, device=DEVICE, dtype=DTYPE)
    recent = tuple(torch.randn(batch, KV_HEADS, RECENT, DIM, device=DEVICE, dtype=DTYPE) for _ in range(2))
    exact: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    for name, kernel in KERNELS.items():
        try:
            exact[name] = captured(partial(exact_attention, query, keys, values, kernel))
        except RuntimeError as error:
            missing[name] = str(error).splitlines()[0]
    rows = []
    for preset in PRESETS.get((batch, tokens), ("quad3",)):
        options = {"preset": preset, "exact_tokens": EXACT, "chunk_tokens": CHUNK}
        k = [stream for x in keys for stream in EncodeBatch([x], center="rope", rope=Rope(), **options).run()]
        v = [stream for x in values for stream in EncodeBatch([x], **options).run()]
        attend = AttendBatch(query, k, v, recent=recent)
        decode = DecodeBatch([*k, *v], outs=[*keys, *values])

        def decode_first(decode: DecodeBatch = decode) -> None:
            decode.run()
            exact_attention(query, keys, values, SDPBackend.FLASH_ATTENTION)

        by_triton = AttendBatch(query, k, v, recent=recent, backend="triton", check=False)
        works = {**exact, "codes": captured(attend.run), "decode_first": captured(decode_first)}
        works["codes_by_triton"] = captured(by_triton.run)
        times = microseconds(works)
        best = min(exact, key=times.__getitem__)
        coded, plain = sum(x.nbytes for x in (*k, *v)), keys.nbytes + values.nbytes
        row = {
            "batch": batch,
            "tokens": tokens,
            "preset": preset,
            "microseconds": times,
            "missing": missing,
            "best_exact": best,
        }
        row |= {"coded_bytes": coded, "exact_bytes": plain, "speedup": times[best] / times["codes"]}
        row |= {"to_decoding": times["decode_first"] / times["codes"], "share_of_limit": coded / rate / times["codes"]}
        rows.append(row)
        console.print(
            f"{batch} x {tokens}, {preset}: {times['codes']:.1f} us, exact {times[best]:.1f} us, {row['speedup']:.2f} x; "
            f"by Triton {times['codes_by_triton']:.1f} us"
        )
        del attend, by_triton, decode, works
    torch.cuda.empty_cache()
    return rows


def shown(figures: dict[str, Any], console: Console) -> None:
    """The table, in 80 columns."""
    table = Table(title=f"{figures['accelerator']}: microseconds, {Q_HEADS} / {KV_HEADS} heads, bf16", box=None)
    for heading in ("batch x tokens", "preset", "codes", "exact", "decode", "to exact", "of limit"):
        table.add_column(heading, justify="left" if heading == "batch x tokens" else "right")
    for row in figures["rows"]:
        times = row["microseconds"]
        numbers = (f"{times[name]:.0f}" for name in ("codes", row["best_exact"], "decode_first"))
        ratios = f"{row['speedup']:.2f}x", f"{row['share_of_limit']:.2f}"
        table.add_row(f"{row['batch']} x {row['tokens'] // 1024}k", row["preset"], *numbers, *ratios)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Attention to codes beside exact attention, on one GPU.")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the result here (default: benchmarks/results)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "this benchmark needs a CUDA GPU, and torch finds none\n")
    console = Console(width=80)
    rate = copy_rate()
    rows = [row for batch, tokens in CASES for row in measure(batch, tokens, rate, console)]
    figures = {**results_file.accelerator(), "copy_gb_s": rate / 1e3, "rounds": ROUNDS, "rows": rows}
    shown(figures, console)
    path = results_file.write("attention_gpu", COMMAND, figures, options.out or results_file.RESULTS)
    console.print(f"wrote {path.name}: {json.dumps(figures['accelerator'])}")


if __name__ == "__main__":
    main()
