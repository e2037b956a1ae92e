"""Law: time to the first token of a prompt whose beginning is known: computed again, loaded raw, or loaded from a store.

``python -m benchmarks.ttft`` prefills prompts of 1k, 2k, 4k ... tokens and keeps their caches in a ``PrefixStore`` (as pq3, or
as ``--preset`` says) and as raw fp16 safetensors, in one file a block, as the store has them, side by side on one disk; then
the ways to the first token are timed, turn by turn, files being in the page cache. A load ends with a cache in the model's own
dtype that the model can go on from. The store's checks every byte, finds the prefix by its tokens and makes sure of the model;
the raw one does neither and has its file names. Writes results/ttft.json and .png; with ``--device cuda``, ttft_gpu, where
loads end on the GPU (``--model llama-shaped`` is an 8B Llama's shape with random weights).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks import model as lm
from benchmarks import results_file
from benchmarks.memory import copy_speed, touch_memory
from pqcodec.formats import PrefixStore
from pqcodec.formats.policy.recipe import Recipe
from pqcodec.formats.store.keys import BLOCK_TOKENS

PROSE = Path(__file__).parent / "data" / "prose.txt"
LENGTHS = (1024, 2048, 4096)
ROUNDS = 31
RANDOM = "llama-shaped"
PRESET = Recipe().preset
console = Console()


def prompt_of(tokenizer: Any, text: Path, tokens: int) -> torch.Tensor:
    """Token ids [tokens] of a text, which is read again and again until there are as many."""
    ids = lm.token_ids(tokenizer, text.read_text(encoding="utf-8"))
    return ids.repeat(-(-tokens // len(ids)))[:tokens]


@torch.inference_mode()
def first_token(model: Any, cache: Any, ids: torch.Tensor) -> int:
    """The model's next token after a prompt [n] of which the cache holds all but the last."""
    return int(model(input_ids=ids[None, -1:], past_key_values=cache).logits[0, -1].argmax())


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds until all that ``work`` set going is done, and its result."""
    start = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure(model: Any, ids: torch.Tensor, folder: Path, rounds: int, preset: str) -> dict[str, Any]:
    """Medians of seconds, and bytes, for one prompt: all tokens but the last are its prefix."""
    from transformers import DynamicCache

    tokens = len(ids) - 1
    raw = folder / f"raw-{tokens}"
    raw.mkdir()

    def prefill() -> Any:
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(input_ids=ids[None, :-1], past_key_values=cache, logits_to_keep=1)
        return cache

    def load_raw() -> Any:
        return lm.cache_of_blocks(model, [load_file(file, device=str(model.device)) for file in files])

    prefills = [seconds(prefill)[0]]
    spent, cache = seconds(prefill)
    prefills.append(spent)
    layers = [(layer.keys[0].cpu(), layer.values[0].cpu()) for layer in cache.layers]
    files = []
    for start in range(0, tokens, BLOCK_TOKENS):
        block = [(key[:, start : start + BLOCK_TOKENS], value[:, start : start + BLOCK_TOKENS]) for key, value in layers]
        files.append(raw / f"{start}.safetensors")
        save_file(lm.named_tensors(block, range(len(block))), files[-1])
    with PrefixStore(folder / f"store-{tokens}", preset=preset) as store:
        put, _ = seconds(lambda: store.put(model, ids[:-1], cache))
        found = store.get(model, ids)
        assert found.length == tokens, f"{found.length} of {tokens} tokens were found"
        stored = store.shelf.index.counters()["bytes"]
        loads: dict[str, list[float]] = {"raw": [], "store": [], "first": []}
        for _ in range(rounds):
            touch_memory()
            loads["raw"].append(seconds(load_raw)[0])
            spent, found = seconds(lambda: store.get(model, ids))
            loads["store"].append(spent)
            loads["first"].append(seconds(partial(first_token, model, found.cache, ids))[0])
    names = {"raw": "raw_load_s", "store": "store_load_s", "first": "first_token_s"}
    return {
        "tokens": tokens,
        "prefill_s": min(prefills),
        "put_s": put,
        **{names[key]: median(values) for key, values in loads.items()},
        "store_load_s_all": loads["store"],
        "raw_load_s_all": loads["raw"],
        "raw_bytes": sum(file.stat().st_size for file in files),
        "store_bytes": stored,
    }


def ratios(row: dict[str, Any]) -> dict[str, float]:
    return {
        "prefill_over_store": row["prefill_s"] / row["store_load_s"],
        "store_over_raw": row["store_load_s"] / row["raw_load_s"],
        "bytes_over_raw": row["store_bytes"] / row["raw_bytes"],
    }


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=title)
    for head in (
        "tokens",
        "prefill s",
        "raw fp16 load s",
        "store load s",
        "first token s",
        "prefill / store",
        "store / raw",
        "bytes",
    ):
        shown.add_column(head, justify="right")
    for row in rows:
        times = [f"{row[key]:.3f}" for key in ("prefill_s", "raw_load_s", "store_load_s", "first_token_s")]
        found = [f"{row['prefill_over_store']:.0f} x", f"{row['store_over_raw']:.2f} x", f"{row['bytes_over_raw']:.3f} x"]
        shown.add_row(f"{row['tokens']:,}", *times, *found)
    return shown


def plot(title: str, rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.2))
    ways = {"prefill again": "prefill_s", "raw fp16 safetensors": "raw_load_s", "pq3 from the store": "store_load_s"}
    for (name, key), marker in zip(ways.items(), "so^", strict=True):
        times = [row[key] + (row["first_token_s"] if key != "prefill_s" else 0) for row in rows]
        axis.loglog([row["tokens"] for row in rows], times, f"-{marker}", label=name)
    axis.set(title=title, xlabel="tokens of the prefix", ylabel="seconds to the first token")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ttft", description="Time to the first token of a known prefix.")
    parser.add_argument("--model", default=lm.SMOLLM2, help=lm.SOURCES)
    parser.add_argument("--text", type=Path, default=PROSE, metavar="FILE", help="UTF-8; repeated where it is too short")
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, metavar="N", help="lengths of the prefix")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="loads of each kind")
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary folder)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the model is and loads end")
    parser.add_argument("--preset", default=PRESET, metavar="NAME", help=f"of the store (default: {PRESET})")
    parser.add_argument("--out", type=Path, default=results_file.RESULTS, metavar="FOLDER", help="where the figures go")
    options = parser.parse_args()
    if options.model == RANDOM:
        name, model, prompts = RANDOM, lm.llama_shaped(device=options.device), torch.randint(32000, (max(options.tokens) + 1,))
    else:
        name, model, tokenizer = lm.load(options.model, lm.cache_dir())
        model, prompts = model.to(options.device), prompt_of(tokenizer, options.text, max(options.tokens) + 1)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for tokens in options.tokens:
            with console.status(f"{tokens:,} tokens"):
                row = measure(model, prompts[: tokens + 1].to(options.device), Path(folder), options.rounds, options.preset)
            rows.append({**row, **ratios(row)})
    where = f"{torch.get_num_threads()} threads" if options.device == "cpu" else torch.cuda.get_device_name()
    title = f"{name} in {model.dtype}, {where}"
    console.print(table(title, rows))
    about = {"model": name, "dtype": str(model.dtype), "device": where, "torch": torch.__version__, "preset": options.preset}
    report = {**about, "copy_gb_per_s": copy_speed(), "rows": rows}
    arguments = "" if name == lm.SMOLLM2 else f" --model {name}"
    arguments += "" if options.device == "cpu" else f" --device {options.device} --tokens {' '.join(map(str, options.tokens))}"
    arguments += "" if options.preset == PRESET else f" --preset {options.preset}"
    result = "ttft" if options.device == "cpu" else "ttft_gpu"
    path = results_file.write(result, f"python -m benchmarks.ttft{arguments}", report, options.out)
    plot(title, rows, path.with_suffix(".png"))
    console.print(
        f"np.copyto runs at {report['copy_gb_per_s']:.1f} GB/s here; wrote {path} and {path.with_suffix('.png').name}"
    )


if __name__ == "__main__":
    main()
