"""Law: what it costs to look, on every call, whether a model is still the one whose caches are kept.

``python -m benchmarks.identity`` times ``Identity.of`` of a model that did not change (with "sampled" words of its weights, and
with "full" ones), the first reading of it, and beside them ``PrefixStore.get`` of a prefix, which asks for the identity once.
Writes results/identity.json; with ``--device cuda``, where all bytes are looked at either way, identity_gpu.json (``--model
llama-shaped`` is an 8B Llama's shape with random weights).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import model as lm
from benchmarks import results_file
from benchmarks.ttft import PROSE, RANDOM, prompt_of
from pqcodec.formats import PrefixStore
from pqcodec.formats.engines.model_identity import Identity, forget

TOKENS = 4096
ROUNDS = 200
console = Console()


def milliseconds(work: Callable[[], Any], rounds: int) -> float:
    """The median of the milliseconds that ``work`` takes."""
    spent = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        spent.append(1e3 * (time.perf_counter() - start))
    return median(spent)


def measure(model: Any, ids: torch.Tensor, rounds: int) -> dict[str, float]:
    """Milliseconds of each way to ask; ids [n] are the prefix and the token behind it."""
    from transformers import DynamicCache

    Identity.of(model)  # kernels are compiled

    def first(full: bool) -> None:
        forget(model)
        Identity.of(model, full=full)

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids[None, :-1], past_key_values=cache, logits_to_keep=1)
    with tempfile.TemporaryDirectory() as folder, PrefixStore(folder) as store:
        store.put(model, ids[:-1], cache)
        if store.get(model, ids).length != len(ids) - 1:
            raise SystemExit("the prefix was not found")
        return {
            "sampled_ms": milliseconds(lambda: Identity.of(model), rounds),
            "get_ms": milliseconds(lambda: store.get(model, ids), max(rounds // 10, 1)),
            "first_sampled_ms": milliseconds(lambda: first(False), 5),
            "first_full_ms": milliseconds(lambda: first(True), 5),
            "full_ms": milliseconds(lambda: Identity.of(model, full=True), max(rounds // 4, 1)),
        }


def table(title: str, figures: dict[str, Any]) -> Table:
    shown = Table(title=title)
    for head in ("look", "every call ms", "first reading ms", "of a get"):
        shown.add_column(head, justify="right")
    for way in ("sampled", "full"):
        spent = figures[f"{way}_ms"]
        shown.add_row(way, f"{spent:.2f}", f"{figures[f'first_{way}_ms']:.0f}", f"{spent / figures['get_ms']:.1%}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.identity", description="What looking at a model costs.")
    parser.add_argument("--model", default=lm.SMOLLM2, help=lm.SOURCES)
    parser.add_argument("--tokens", type=int, default=TOKENS, metavar="N", help="of the prefix that get loads")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="calls of Identity.of")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the model is")
    options = parser.parse_args()
    if options.model == RANDOM:
        name, model = RANDOM, lm.llama_shaped(device=options.device)
        ids = torch.randint(32000, (options.tokens + 1,), device=options.device)
    else:
        name, model, tokenizer = lm.load(options.model, lm.cache_dir())
        model = model.to(options.device)
        ids = prompt_of(tokenizer, PROSE, options.tokens + 1).to(options.device)
    figures = measure(model, ids, options.rounds)
    where = f"{torch.get_num_threads()} threads" if options.device == "cpu" else torch.cuda.get_device_name()
    console.print(
        table(f"{name} in {model.dtype}, {where}; get of {options.tokens:,} tokens: {figures['get_ms']:.0f} ms", figures)
    )
    about = {
        "model": name,
        "dtype": str(model.dtype),
        "device": where,
        "torch": torch.__version__,
        "tensors": len(model.state_dict()),
        "weights_bytes": sum(weight.nbytes for weight in model.parameters()),
        "tokens": options.tokens,
    }
    arguments = "" if name == lm.SMOLLM2 else f" --model {name}"
    arguments += "" if options.device == "cpu" else f" --device {options.device}"
    result = "identity" if options.device == "cpu" else "identity_gpu"
    console.print(f"wrote {results_file.write(result, f'python -m benchmarks.identity{arguments}', {**about, **figures})}")


if __name__ == "__main__":
    main()
