"""Law: what a shared store costs: getting a prefix whose index is in Redis, against the local store.

``python -m benchmarks.shared_store --address redis://127.0.0.1:6379/0`` keeps prefixes of a model's prompt in a local store,
in one whose index is at the address and whose files are in a folder, and in one that is in Redis alone, and gets them turn by
turn. Writes results/shared_store.json.
"""

from __future__ import annotations

import argparse
import secrets
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import model as lm
from benchmarks import results_file
from benchmarks.ttft import PROSE, prompt_of, seconds
from pqcodec.formats import PrefixStore
from pqcodec.formats.policy.recipe import Recipe

LENGTHS = (1024, 4096)
ROUNDS = 15
PLACES = {"local": "a folder", "shared": "index in Redis, files in a folder", "redis": "Redis alone"}
console = Console()


def measure(model: Any, ids: torch.Tensor, folder: Path, address: str, rounds: int) -> dict[str, Any]:
    """Medians of seconds of a put and a get of all tokens but the last, by place."""
    from transformers import DynamicCache

    tokens, preset = len(ids) - 1, Recipe().preset
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids[None, :-1], past_key_values=cache, logits_to_keep=1)
    name = f"bench-{secrets.token_hex(4)}"
    with ExitStack() as opened:
        stores = {
            "local": PrefixStore(folder / f"local-{tokens}", preset=preset),
            "shared": PrefixStore(f"{address}?store={name}-a", data=folder / f"files-{tokens}", preset=preset),
            "redis": PrefixStore(f"{address}?store={name}-b", preset=preset),
        }
        puts, gets = {}, {place: [] for place in stores}
        for place, store in stores.items():
            opened.enter_context(store)
            puts[place] = seconds(lambda store=store: store.put(model, ids[:-1], cache))[0]
        for turn in range(1 + rounds):
            for place, store in stores.items():
                spent, found = seconds(lambda store=store: store.get(model, ids))
                assert found.length == tokens, f"{place}: {found.length} of {tokens} tokens were found"
                if turn:
                    gets[place].append(spent)
        stored = stores["local"].shelf.index.counters()["bytes"]
        for place in ("shared", "redis"):
            for row in stores[place].shelf.index.all():
                stores[place].shelf.drop(row)
    medians = {place: median(times) for place, times in gets.items()}
    ratios = {place: medians[place] / medians["local"] for place in ("shared", "redis")}
    return {"tokens": tokens, "bytes": stored, "put_s": puts, "get_s": medians, "over_local": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--address", required=True, help="of a Redis or Valkey server, such as redis://127.0.0.1:6379/0")
    parser.add_argument("--model", default="smollm2", help="as in benchmarks.ttft")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    with console.status(f"{options.model}: loading"):
        name, model, tokenizer = lm.load(options.model, lm.cache_dir())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for tokens in LENGTHS:
            with console.status(f"{tokens} tokens: prefilling, storing, getting {options.rounds} times"):
                rows.append(
                    measure(model, prompt_of(tokenizer, PROSE, tokens + 1), Path(folder), options.address, options.rounds)
                )
    shown = Table(title=f"{name}: seconds to get a prefix")
    for head in ("tokens", *PLACES.values(), "shared / local", "Redis / local"):
        shown.add_column(head, justify="right")
    for row in rows:
        times = [f"{row['get_s'][place]:.4f}" for place in PLACES]
        shown.add_row(str(row["tokens"]), *times, f"{row['over_local']['shared']:.2f}", f"{row['over_local']['redis']:.2f}")
    console.print(shown)
    command = f"python -m benchmarks.shared_store --address redis://... --model {options.model}"
    results_file.write("shared_store", command, {"model": name, "rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
