"""Scores q.k from the codes of pair polar beside exact ones: ``python -m benchmarks.wu_scores``.

The shapes of arXiv 2502.00527: one query token of 32 heads of queries to 8 of keys, head_dim 128, batch 8, keys of wu44 and
wu33. Codes are scored by the CUDA kernel that ``attention.scores`` takes (``on_cuda/pair_scores.cu``), and by Triton's
(``score_groups``). Exact scores are torch's best of three calls in float16 and in bfloat16, of keys as caches keep them. All
are captured in CUDA graphs and measured turn by turn with a cold L2 cache. Writes results/wu_scores.json.
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
from pqcodec.kernels.on_cuda.pair_scores import PairScores, why_not_pairs
from pqcodec.kernels.on_triton.attending import TritonAttention
from pqcodec.placed import lying
from pqcodec.stream.header import dtype_code

COMMAND = "python -m benchmarks.wu_scores"
BATCH, TOKENS, PRESETS = 8, (4096, 8192, 32768, 131072), ("wu44", "wu33")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# Of scores from codes, of the largest one of decoded keys, which are rounded to their dtype
MOST_ERROR = {"float16": 2e-3, "bfloat16": 4e-3}


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


class CodedScores:
    """Scores from the codes of keys [batch, KV_HEADS, tokens, DIM], by a kernel of ours: ``by`` "cuda" or "triton"."""

    def __init__(self, query: torch.Tensor, streams: list[torch.Tensor], by: str) -> None:
        attended = AttendedTokens.of([[(lying(stream, None, None, []),)] for stream in streams], None, [], [])
        dtype, rows = dtype_code(query.dtype), query.shape[1] // KV_HEADS * query.shape[2]
        sizes, device = (tuple(query.shape), attended.totals, KV_HEADS, (DIM,)), query.device
        parts = (*sizes, *coded_and_exact(attended, by), device, DIM**-0.5, 0.0)
        if by == "cuda" and any(why_not_pairs(h, dtype, rows, 0.0) for h in attended.headers):
            raise SystemExit("the CUDA kernel does not take these streams")
        self.way = PairScores(*parts, query_dtype=dtype) if by == "cuda" else TritonAttention(*parts)
        self.query, self.out = query, torch.empty(*query.shape[:3], attended.totals[0], dtype=torch.float32, device=device)

    def __call__(self) -> torch.Tensor:
        return self.way.score(self.query, self.out)

    def error(self, decoded: torch.Tensor) -> float:
        """The largest error of the first sequence's scores, of their largest with decoded keys [1, KV_HEADS, tokens, DIM]."""
        keys = decoded.float().reshape(KV_HEADS, -1, DIM)
        wanted = (self.query[0].float() * DIM**-0.5).reshape(KV_HEADS, -1, DIM) @ keys.mT
        return float((self()[0].reshape(wanted.shape) - wanted).abs().max() / wanted.abs().max())


def measure(tokens: int, rate: float, console: Console) -> list[dict[str, Any]]:
    """A row for each preset and dtype: microseconds of every way."""
    rows = []
    for name, dtype in DTYPES.items():
        torch.manual_seed(0)
        keys = torch.stack([keys_with_mean(KV_HEADS, tokens, DIM).to(dtype) for _ in range(BATCH)])
        query = torch.randn(BATCH, Q_HEADS, 1, DIM, device=DEVICE, dtype=dtype)
        exact = {way: captured(work) for way, work in exact_scores(query, keys).items()}
        streams = {preset: [EncodeBatch([x], preset=preset).run()[0] for x in keys] for preset in PRESETS}
        coded = {(preset, by): CodedScores(query, streams[preset], by) for preset in PRESETS for by in ("cuda", "triton")}
        works = {" ".join(named): captured(work) for named, work in coded.items()}
        times = microseconds({**exact, **works})
        best = min(exact, key=times.__getitem__)
        for preset in PRESETS:
            decoded = DecodeBatch(streams[preset][:1]).run()[0]
            error = max(coded[preset, by].error(decoded) for by in ("cuda", "triton"))
            if error > MOST_ERROR[name]:
                raise SystemExit(f"{preset}, {tokens} tokens of {name}: scores are {error:.1e} of the largest one off")
            codes, size = times[f"{preset} cuda"], sum(stream.nbytes for stream in streams[preset])
            row = {"tokens": tokens, "dtype": name, "preset": preset, "microseconds": codes, "best_exact": best}
            row |= {"triton_microseconds": times[f"{preset} triton"], "exact_microseconds": {way: times[way] for way in exact}}
            row |= {"speedup": times[best] / codes, "coded_bytes": size, "share_of_limit": size / rate / codes, "error": error}
            rows.append(row)
            console.print(
                f"{tokens} tokens, {name}, {preset}: {codes:.1f} us, exact {times[best]:.1f} us by {best}, "
                f"{row['speedup']:.2f} x; by Triton {row['triton_microseconds']:.1f} us; error {error:.1e}"
            )
        del keys, exact, streams, coded, works
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
