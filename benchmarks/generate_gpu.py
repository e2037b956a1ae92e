"""Law: steps of a model whose cache is encoded on the GPU and attended to from codes: ``python -m benchmarks.generate_gpu``.

A model of Llama 3.1 8B's shape with random weights, bfloat16, one token a step, after a context of random keys and values whose
mean turns. Against an exact cache, of which the step is captured in a CUDA graph, too, and attends by the quickest of torch's
kernels: it writes its token at one place and reads the same number of tokens at each step, so that nothing but the model's own
work is in its time. Steps are timed alone, and within ``generate`` (greedy; its own work on the host is the same for both).
Writes results/generate_gpu.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM, cache_utils, masking_utils

from benchmarks import results_file
from benchmarks.attention_gpu import KERNELS, captured, keys_with_mean
from pqcodec.formats.offload import CapturedSteps, EncodedCache

COMMAND = "python -m benchmarks.generate_gpu"
DEVICE, DTYPE = "cuda", torch.bfloat16
SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 1 << 20,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
CASES = [(1, 8192), (1, 32768), (1, 131072), (8, 32768)]  # sequences, tokens
STEPS, TEXT = 100, 200
PRESET = "quad3"


class FixedCache(cache_utils.DynamicCache):
    """An exact cache of a number of tokens that does not change: each step's token is the last one of it."""

    def __init__(self, config: Any, keys: list[torch.Tensor], values: list[torch.Tensor]) -> None:
        super().__init__(config=config)
        self.pairs = list(zip(keys, values, strict=True))

    def update(self, key: Any, value: Any, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        pair = self.pairs[layer_idx]
        for kept, x in zip(pair, (key, value), strict=True):
            kept[:, :, -1:] = x
        return pair

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self.pairs[0][0].shape[2]) - 1


def attention_by(kernel: Any) -> Callable[..., Any]:
    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> tuple[Any, None]:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(query, key, value, enable_gqa=True).transpose(1, 2).contiguous(), None

    return attend


def model_of_8b() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, dtype=DTYPE)
    with torch.device(DEVICE):
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE)
        try:
            return LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)


def layers_of(batch: int, tokens: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Keys and values of each layer: [batch, heads, tokens, head_dim]."""
    heads, dim = SHAPE["num_key_value_heads"], SHAPE["hidden_size"] // SHAPE["num_attention_heads"]  # type: ignore[operator]
    keys, values = [], []
    for _ in range(SHAPE["num_hidden_layers"]):  # type: ignore[call-overload]
        keys.append(torch.stack([keys_with_mean(heads, tokens, dim, 5e5).to(DTYPE) for _ in range(batch)]))
        values.append(torch.randn(batch, heads, tokens, dim, device=DEVICE, dtype=DTYPE))
    return keys, values


def milliseconds(step: Callable[[], Any]) -> float:
    """The median time of a step, of those behind the first ten."""
    marks = []
    for _ in range(STEPS + 10):
        marks.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        marks[-1][0].record()
        step()
        marks[-1][1].record()
    torch.cuda.synchronize()
    return median(a.elapsed_time(b) for a, b in marks[10:])


def exact_step(model: Any, cache: FixedCache, ids: torch.Tensor) -> Callable[[], Any]:
    positions = torch.full_like(ids, cache.get_seq_length())

    def step() -> Any:
        return model(input_ids=ids, position_ids=positions, cache=cache, logits_to_keep=1).logits

    return captured(step)


def measure(model: Any, batch: int, tokens: int, console: Console) -> dict[str, Any]:
    torch.manual_seed(1)
    keys, values = layers_of(batch, tokens)
    ids = torch.zeros((batch, 1), dtype=torch.long, device=DEVICE)
    row: dict[str, Any] = {"batch": batch, "tokens": tokens, "preset": PRESET, "milliseconds": {}, "missing": {}}
    for number, (name, kernel) in enumerate(KERNELS.items()):
        AttentionInterface.register(f"exact_{number}", attention_by(kernel))
        AttentionMaskInterface.register(f"exact_{number}", masking_utils.sdpa_mask)
        model.set_attn_implementation(f"exact_{number}")
        try:
            row["milliseconds"][name] = milliseconds(exact_step(model, FixedCache(model.config, keys, values), ids))
        except RuntimeError as error:
            row["missing"][name] = str(error).splitlines()[0]
    model.set_attn_implementation("pqcodec")
    cache = EncodedCache(model, place="device", preset=PRESET)
    for layer in range(len(keys)):
        cache.update(keys[layer], values[layer], layer)
        keys[layer] = values[layer] = torch.empty(0)
    torch.cuda.empty_cache()
    row["encoded_bytes"] = cache.memory.encoded
    with CapturedSteps(model, cache) as steps:

        def step() -> Any:
            return model(input_ids=ids, cache=cache, logits_to_keep=1).logits

        row["milliseconds"]["codes"] = milliseconds(step)
        row["milliseconds"]["plain_codes"] = 0.0
        begun = torch.ones((batch, cache.get_seq_length() + 1), dtype=torch.long, device=DEVICE)
        start = time.perf_counter()
        model.generate(
            begun, cache=cache, max_new_tokens=TEXT, min_new_tokens=TEXT, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        torch.cuda.synchronize()
        row["generate_ms_a_token"] = 1e3 * (time.perf_counter() - start) / TEXT
        row["replays"] = steps.replays
    row["milliseconds"]["plain_codes"] = milliseconds(step)
    times = row["milliseconds"]
    row["best_exact"] = min((name for name in KERNELS if name in times), key=times.__getitem__)
    row["speedup"] = times[row["best_exact"]] / times["codes"]
    console.print(f"{batch} x {tokens}: {times}, {row['speedup']:.2f} x, generate {row['generate_ms_a_token']:.2f} ms")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Tokens a second from codes beside an exact cache, on one GPU.")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the result here (default: benchmarks/results)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "this benchmark needs a CUDA GPU, and torch finds none\n")
    console, rows = Console(width=80), []
    with torch.inference_mode():
        model = model_of_8b()
        for batch, tokens in CASES:
            rows.append(measure(model, batch, tokens, console))
            torch.cuda.empty_cache()
    figures = {**results_file.accelerator(), "steps": STEPS, "rows": rows}
    table = Table(title=f"{figures['accelerator']}: milliseconds a step, 8B shape, bf16", box=None)
    for heading in ("batch x tokens", "exact", "codes", "speed-up", "plain launches", "generate"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = row["milliseconds"]
        numbers = (times[row["best_exact"]], times["codes"], row["speedup"], times["plain_codes"], row["generate_ms_a_token"])
        table.add_row(f"{row['batch']} x {row['tokens'] // 1024}k", *(f"{x:.2f}" for x in numbers))
    console.print(table)
    results_file.write("generate_gpu", COMMAND, figures, options.out or results_file.RESULTS)


if __name__ == "__main__":
    main()
