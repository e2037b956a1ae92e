"""Law: attention straight from streams beside decoding them first: ``python -m benchmarks.attention``.

One query token against a long cache, on the CPU: ``attention.attend``, decoding into memory that is there already followed by
torch's products and softmax in float32, and the latter alone with keys and values that lie there uncompressed. All are measured
turn by turn in one run. Of two ways to decode, streams of float16 that are then widened and streams of float32, the better one
counts. Writes results/attention_cpu.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import pqcodec
from benchmarks import results_file
from benchmarks.cpu_speed import seconds
from pqcodec import attention

ROUNDS = 11
ROPE = {"center": "rope", "rope": pqcodec.Rope(500000.0)}
MEAN = {"center": "mean"}


@dataclass(frozen=True)
class Case:
    """Keys and values [kv_heads, tokens, head_dim] as streams, and queries [q_heads, queries, head_dim]."""

    preset: str
    tokens: int = 32768
    kv_heads: int = 8
    q_heads: int = 32
    head_dim: int = 128
    queries: int = 1
    rope: bool = False
    recent: int = 0

    @property
    def name(self) -> str:
        heads = f"{self.q_heads}/{self.kv_heads}"
        more = (
            [f"{self.queries} queries"] * (self.queries > 1)
            + ["RoPE"] * self.rope
            + [f"{self.recent} exact"] * (self.recent > 0)
        )
        return ", ".join([f"{self.preset}, {self.tokens // 1024}k, {heads}", *more])


CASES = [
    Case("quad3"),
    Case("quad3", rope=True, recent=256),
    Case("quad2"),
    Case("quad3.5"),
    Case("quad3", tokens=4096),
    Case("quad3", kv_heads=8, q_heads=8),
    Case("quad3", kv_heads=4, q_heads=32),
    Case("quad3", queries=5),
    Case("pq3"),
    Case("paper"),
]


def exactly(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Attention in float32 with torch's products and softmax; queries that share keys are rows of one product."""
    heads, queries, dim = q.shape
    rows = (q.float() * dim**-0.5).reshape(len(keys), -1, dim)
    scores = rows @ keys.mT
    if queries > 1:
        own = keys.shape[1] - queries + torch.arange(queries).repeat(heads // len(keys))
        scores.masked_fill_(torch.arange(keys.shape[1]) > own[:, None], -torch.inf)
    return (torch.softmax(scores, -1) @ values).reshape(heads, queries, -1)


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds of each way, medians of the rounds, and the median ratio of the better decoding way to the codes'."""
    torch.manual_seed(0)
    shape = case.kv_heads, case.tokens, case.head_dim
    keys, values = torch.randn(shape).half(), torch.randn(shape).half()
    q = torch.randn(case.q_heads, case.queries, case.head_dim).half()
    recent = torch.randn(2, case.kv_heads, case.recent, case.head_dim).half()
    options = ROPE if case.rope else MEAN
    halves = [pqcodec.encode(x, preset=case.preset, **how) for x, how in ((keys, options), (values, MEAN))]
    floats = [pqcodec.encode(x.float(), preset=case.preset, **how) for x, how in ((keys, options), (values, MEAN))]
    room = [torch.empty_like(keys), torch.empty_like(values)]
    wide = torch.zeros(2, case.kv_heads, case.tokens + case.recent, case.head_dim)

    def from_codes() -> torch.Tensor:
        return attention.attend(q, *halves, recent=tuple(recent) if case.recent else None)

    def after_halves() -> torch.Tensor:
        for data, out, target, exact in zip(halves, room, wide, recent, strict=True):
            pqcodec.decode(data, out=out)
            target[:, : case.tokens] = out
            target[:, case.tokens :] = exact
        return exactly(q, *wide)

    def after_floats() -> torch.Tensor:
        for data, target, exact in zip(floats, wide, recent, strict=True):
            pqcodec.decode(data, out=target[:, : case.tokens])
            target[:, case.tokens :] = exact
        return exactly(q, *wide)

    def uncompressed() -> torch.Tensor:
        return exactly(q, *wide)

    ways: dict[str, Callable[[], torch.Tensor]] = {
        "codes": from_codes,
        "halves": after_halves,
        "floats": after_floats,
        "uncompressed": uncompressed,
    }
    results = {name: way().float() for name, way in ways.items()}  # and kernels are compiled
    largest = float(results["floats"].abs().max())
    times = [{name: 1e3 * seconds(way) for name, way in ways.items()} for _ in range(ROUNDS)]
    better = min(("halves", "floats"), key=lambda name: median(one[name] for one in times))
    return {
        **asdict(case),
        **{f"{name}_ms": median(one[name] for one in times) for name in ways},
        "decoding": better,
        "speedup": median(one[better] / one["codes"] for one in times),
        "speedups": sorted(one[better] / one["codes"] for one in times),
        "to_uncompressed": median(one["uncompressed"] / one["codes"] for one in times),
        "largest_difference": float((results["codes"] - results["floats"]).abs().max()) / largest,
    }


def main() -> None:
    console = Console(width=80)
    rows = [(case.name, measure(case)) for case in CASES]
    shown = Table(title=f"ms, head_dim 128, {torch.get_num_threads()} threads (median of {ROUNDS} turns)", box=None)
    for heading in ("preset, tokens, heads", "codes", "decode", "exact", "to decode", "to exact", "off by"):
        shown.add_column(heading, justify="left" if heading.startswith("preset") else "right")
    for name, row in rows:
        times = (f"{row[f'{way}_ms']:.1f}" for way in ("codes", row["decoding"], "uncompressed"))
        ratios = f"{row['speedup']:.1f}x", f"{row['to_uncompressed']:.1f}x"
        shown.add_row(name, *times, *ratios, f"{row['largest_difference']:.0e}")
    console.print(shown)
    figures = {"torch": torch.__version__, "torch_threads": torch.get_num_threads(), "rows": [row for _, row in rows]}
    path = results_file.write("attention_cpu", "python -m benchmarks.attention", figures)
    console.print(f"wrote {path.name}: {json.dumps(results_file.machine()['machine'])}")


if __name__ == "__main__":
    main()
