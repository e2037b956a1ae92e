"""Scores q.k from the codes of pair polar beside exact ones: ``python -m benchmarks.wu_scores``.

The shapes of arXiv 2502.00527: one query token of 32 heads of queries to 8 of keys, head_dim 128, batch 8, keys of wu44 and
wu33. Exact scores are torch's best of three calls in float16 and in bfloat16, of keys as caches keep them. All are
captured in CUDA graphs and measured turn by turn with a cold L2 cache. Writes results/wu_scores.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import results_file
from benchmarks.attention_gpu import DEVICE, DIM, KV_HEADS, Q_HEADS, captured, copy_rate, keys_with_mean, microseconds
from pqcodec import DecodeBatch, EncodeBatch
from pqcodec.attend_parts import AttendedTokens, coded_and_exact
from pqcodec.kernels.on_triton.attending import TritonAttention
from pqcodec.placed import lying

COMMAND = "python -m benchmarks.wu_scores"
BATCH, TOKENS, PRESETS = 8, (4096, 8192, 32768, 131072), ("wu44", "wu33")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_ERROR = 2e-3  # of scores from codes, of the largest one of decoded keys


def exact_scores(query: torch.Tensor, keys: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Ways of torch to the scores [batch * KV_HEADS, heads of a head of keys, tokens], keys [batch, KV_HEADS, tokens, DIM]."""
    q = (query * DIM**-0.5).reshape(BATCH * KV_HEADS, -1, DIM)
    k = keys.reshape(BATCH * KV_HEADS, -1, DIM)
    out = torch.empty(*q.shape[:2], k.shape[1], dtype=q.dtype, device=DEVICE)
    turned = out.mT.contiguous()
    return {
        "matmul": lambda: torch.matmul(q, k.mT, out=out),
        "baddbmm": lambda: torch.baddbmm(out, q, k.mT, beta=0, out=out),
        "keys_first": lambda: torch.bmm(k, q.mT, out=turned),
    }


def coded_scores(query: torch.Tensor, keys: torch.Tensor, preset: str) -> tuple[Callable[[], Any], int, float]:
    """Scores from the codes of keys [batch, KV_HEADS, tokens, DIM], the streams' bytes, and the largest error of a sequence."""
    streams = [EncodeBatch([x], preset=preset).run()[0] for x in keys]
    attended = AttendedTokens.of([[(lying(stream, None, None, []),)] for stream in streams], None, [], [])
    parts = coded_and_exact(attended, "triton")
    way = TritonAttention(tuple(query.shape), attended.totals, KV_HEADS, (DIM,), *parts, DEVICE, DIM**-0.5)
    out = torch.empty(*query.shape[:3], attended.totals[0], dtype=torch.float32, device=DEVICE)
    way.score(query, out)
    decoded = DecodeBatch(streams[:1]).run()[0].float()
    wanted = (query[0].float() * DIM**-0.5).reshape(KV_HEADS, -1, DIM) @ decoded.reshape(KV_HEADS, -1, DIM).mT
    error = float((out[0].reshape(wanted.shape) - wanted).abs().max() / wanted.abs().max())
    return captured(lambda: way.score(query, out)), sum(stream.nbytes for stream in streams), error


def measure(tokens: int, rate: float, console: Console) -> list[dict[str, Any]]:
    """A row for each preset and dtype: microseconds of every way."""
    rows = []
    for name, dtype in DTYPES.items():
        torch.manual_seed(0)
        keys = torch.stack([keys_with_mean(KV_HEADS, tokens, DIM).to(dtype) for _ in range(BATCH)])
        query = torch.randn(BATCH, Q_HEADS, 1, DIM, device=DEVICE, dtype=dtype)
        exact = {way: captured(work) for way, work in exact_scores(query, keys).items()}
        coded = {preset: coded_scores(query, keys, preset) for preset in PRESETS}
        times = microseconds({**exact, **{preset: found[0] for preset, found in coded.items()}})
        best = min(exact, key=times.__getitem__)
        for preset, (_, size, error) in coded.items():
            if error > MOST_ERROR:
                raise SystemExit(f"{preset}, {tokens} tokens of {name}: scores are {error:.1e} of the largest one off")
            row = {"tokens": tokens, "dtype": name, "preset": preset, "microseconds": times[preset], "best_exact": best}
            row |= {"exact_microseconds": {way: times[way] for way in exact}, "speedup": times[best] / times[preset]}
            row |= {"coded_bytes": size, "share_of_limit": size / rate / times[preset], "error": error}
            rows.append(row)
            console.print(
                f"{tokens} tokens, {name}, {preset}: {times[preset]:.1f} us, exact {times[best]:.1f} us by {best}, "
                f"{row['speedup']:.2f} x; error {error:.1e}"
            )
        del keys, exact, coded
        torch.cuda.empty_cache()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Scores from codes of pair polar beside exact ones, on one GPU.")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the result here (default: benchmarks/results)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "this benchmark needs a CUDA GPU, and torch finds none\n")
    console, rate = Console(width=100), copy_rate()
    rows = [row for tokens in TOKENS for row in measure(tokens, rate, console)]
    shape = {"batch": BATCH, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "head_dim": DIM}
    figures = {**results_file.accelerator(), "copy_gb_s": rate / 1e3, "shape": shape, "rows": rows}
    path = results_file.write("wu_scores", COMMAND, figures, options.out or results_file.RESULTS)
    console.print(f"wrote {path.name}: {json.dumps(figures['accelerator'])}")


if __name__ == "__main__":
    main()
