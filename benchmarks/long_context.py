"""Law: generation behind a long context: tokens a second, and how long a context fits, by the kind of cache.

``python -m benchmarks.long_context`` makes a model of Llama-3-8B's shape with random weights in bf16 on a GPU. Contexts are
random keys and values, given to ``cache.update`` piece by piece as a prefill would, which saves running the model over them.
Speed: greedy steps of the whole model behind 32k tokens, over a period in which an ``EncodedCache`` encodes once. Length: the
longest context behind which four steps run in a fixed number of bytes beside the weights, all included that torch's allocator
reserves (cache, scratch, activations, workspaces), found by bisection with real runs. cuDNN's attention is off for all caches:
it plans anew on the host for every length, which takes longer than all else. Writes results/long_context.json and .png.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # for every cache alike

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import model as lm
from benchmarks import results_file
from pqcodec.formats.engines.transformers_cache import argument_of
from pqcodec.formats.offload.encoded_cache import CHUNK, EncodedCache

CONTEXT = 32768
BUDGET_GIB = 8.0
PIECE = 8192  # tokens of the prefill at once
WARM_UP, STEPS, FEW_STEPS = 4, CHUNK + 8, 32
console = Console()


def caches(config: Any, preset: str) -> dict[str, Callable[[], Any]]:
    """How each kind of cache is made."""
    from transformers import DynamicCache, QuantizedCache

    return {
        "exact": lambda: DynamicCache(config=config),
        "transformers, offloaded": lambda: DynamicCache(config=config, offloading=True),
        f"{preset} on the host": lambda: EncodedCache(config, preset=preset, place="host"),
        f"{preset} on the device": lambda: EncodedCache(config, preset=preset, place="device"),
        "transformers, quanto 4 bits": lambda: QuantizedCache("quanto", config, nbits=4),
    }


def fill(cache: Any, config: Any, tokens: int) -> None:
    """A context of random keys and values."""
    shape = (1, config.num_key_value_heads, config.head_dim)
    for start in range(0, tokens, PIECE):
        size = min(PIECE, tokens - start)
        for layer in range(config.num_hidden_layers):
            key, value = (torch.randn(*shape[:2], size, shape[2], dtype=torch.bfloat16, device="cuda") for _ in range(2))
            cache.update(key, value, layer)


def steps(model: Any, cache: Any, count: int) -> float:
    """Seconds of so many greedy steps."""
    token = torch.ones(1, 1, dtype=torch.long, device="cuda")
    name = argument_of(model)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        token = model(input_ids=token, **{name: cache}).logits[:, -1:].argmax(-1)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@torch.inference_mode()
def speed(model: Any, make: Callable[[], Any], tokens: int) -> dict[str, Any]:
    """Tokens a second behind a context, and the memory that it takes beside the weights."""
    clean()
    weights = torch.cuda.memory_allocated()
    cache = make()
    fill(cache, model.config, tokens)
    steps(model, cache, WARM_UP)
    torch.cuda.reset_peak_memory_stats()
    count = STEPS if isinstance(cache, EncodedCache) else FEW_STEPS
    few = steps(model, cache, FEW_STEPS) if isinstance(cache, EncodedCache) else None
    seconds = steps(model, cache, count)
    found: dict[str, Any] = {
        "tokens_per_s": count / seconds,
        "steps": count,
        "peak_bytes": torch.cuda.max_memory_allocated() - weights,
    }
    if isinstance(cache, EncodedCache) and few is not None:
        memory = cache.memory
        found |= {"encoded_bytes": memory.encoded, "exact_bytes": memory.exact, "scratch_bytes": memory.scratch}
        found["tokens_per_s_without_encoding"] = FEW_STEPS / few
    return found


@torch.inference_mode()
def fits(model: Any, make: Callable[[], Any], tokens: int) -> bool:
    """Whether a context fits and the model can go on from it."""
    clean()
    try:
        cache = make()
        fill(cache, model.config, tokens)
        steps(model, cache, WARM_UP)
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def longest(model: Any, make: Callable[[], Any], guess: int) -> dict[str, Any]:
    """The longest context that fits, to 1 in 128 of a guess."""
    step = max(guess // 128, 1)
    low, high = 0, 1  # in steps: fits, does not fit
    tries, at = {}, 112
    while high == 1 or high - low > 1:
        tries[at] = fits(model, make, at * step)
        low, high = (at, high) if tries[at] else (low, at)
        if high == 1:
            at += 8
        elif low == 0:
            at = max(at - 16, at // 2)
        else:
            at = (low + high) // 2
    return {"tokens": low * step, "resolution": step, "runs": len(tries)}


def table(rows: dict[str, dict[str, Any]], tokens: int, budget: float) -> Table:
    shown = Table(title=f"{tokens:,} tokens of context; {budget:g} GiB beside the weights")
    for head in ("cache", "tokens/s", "GiB beside the weights", "longest context"):
        shown.add_column(head, justify="left" if head == "cache" else "right")
    for name, row in rows.items():
        if "missing" in row:
            shown.add_row(name, row["missing"][:40], "", "")
            continue
        length = f"{row['longest']['tokens']:,}" if "longest" in row else ""
        shown.add_row(name, f"{row['tokens_per_s']:.1f}", f"{row['peak_bytes'] / 2**30:.2f}", length)
    return shown


def plot(rows: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    speeds = {name: row["tokens_per_s"] for name, row in rows.items() if "tokens_per_s" in row}
    lengths = {name: row["longest"]["tokens"] / 1024 for name, row in rows.items() if "longest" in row}
    for axis, values, label in ((left, speeds, "tokens a second"), (right, lengths, "longest context, 1,024 tokens")):
        bars = axis.barh([*values], [*values.values()])
        axis.bar_label(bars, fmt="%.0f", padding=3)
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.set_xlabel(label)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def measured(model: Any, make: Callable[[], Any], tokens: int) -> dict[str, Any]:
    """``speed``, or why there is none: a backend that is not installed."""
    try:
        return speed(model, make, tokens)
    except (ImportError, ValueError, TypeError, torch.cuda.OutOfMemoryError, RuntimeError) as error:
        return {"missing": f"{type(error).__name__}: {error}"[:300]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_context", description="Generation behind a long context.")
    parser.add_argument("--layers", type=int, default=32, metavar="N")
    parser.add_argument("--tokens", type=int, default=CONTEXT, metavar="N", help="of context, where speed is measured")
    parser.add_argument("--budget", type=float, default=BUDGET_GIB, metavar="GIB", help="beside the weights")
    parser.add_argument("--preset", default="pq3")
    parser.add_argument("--skip-length", action="store_true", help="measure speed only")
    parser.add_argument("--out", type=Path, default=results_file.RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    import transformers

    torch.backends.cuda.enable_cudnn_sdp(False)
    model = lm.llama_shaped(options.layers)
    config = model.config
    clean()
    weights = torch.cuda.memory_reserved()
    kinds = caches(config, options.preset)
    rows = {}
    for name, make in kinds.items():
        rows[name] = measured(model, make, options.tokens)
        console.print(name, rows[name])
    if not options.skip_length:
        budget = int(options.budget * 2**30)
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min((weights + budget) / total, 1.0))
        per_token = 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        for name, share in {"exact": 1.0, f"{options.preset} on the device": 0.22}.items():
            rows[name]["longest"] = longest(model, kinds[name], int(budget / per_token / share))
            console.print(name, rows[name]["longest"])
    exact, offloaded = rows["exact"], rows["transformers, offloaded"]
    host, device = rows[f"{options.preset} on the host"], rows[f"{options.preset} on the device"]
    ratios = {"host_over_offloaded": host["tokens_per_s"] / offloaded["tokens_per_s"]}
    ratios["device_over_exact_speed"] = device["tokens_per_s"] / exact["tokens_per_s"]
    if "longest" in exact:
        ratios["longest_over_exact"] = device["longest"]["tokens"] / exact["longest"]["tokens"]
    report = {
        **results_file.accelerator(),
        "transformers": transformers.__version__,
        "model": f"Llama, {options.layers} layers, random weights, bf16, batch 1",
        "shape": lm.LLAMA_8B,
        "attention": "torch's scaled_dot_product_attention, without its cuDNN backend",
        "tokens": options.tokens,
        "prefill": f"random keys and values given to cache.update, {PIECE} tokens at once",
        "budget_gib": options.budget,
        "budget": "what torch's allocator may reserve beside the weights: cache, scratch, activations, workspaces",
        "rows": rows,
        **ratios,
    }
    arguments = "" if options.layers == 32 else f" --layers {options.layers}"
    path = results_file.write("long_context", f"python -m benchmarks.long_context{arguments}", report, options.out)
    plot(rows, f"{report['model']}, {options.tokens:,} tokens; {report['accelerator']}", path.with_suffix(".png"))
    console.print(table(rows, options.tokens, options.budget))
    console.print(ratios)
    console.print(f"wrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
