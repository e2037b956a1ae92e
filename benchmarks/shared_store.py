"""Law: what a shared store costs: getting a prefix whose index is in Redis, against the local store; and many clients at once.

``python -m benchmarks.shared_store`` starts a Redis server on loopback (``--address redis://...`` takes another), keeps
prefixes of a model's prompt in a local store, in one whose index is there and whose files are in a folder, and in one that is
in Redis alone, and gets them turn by turn. Then 1 to 16 processes get a prefix at once, again and again: from the two shared
stores, and as raw 16-bit safetensors, one file or value a block, from the same folder and the same server. Writes
results/shared_store.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
from pqcodec.formats.store.keys import BLOCK_TOKENS

LENGTHS = (1024, 4096)
ROUNDS = 15
CLIENTS = (1, 2, 4, 8, 16)
GETS = 4  # of each client, and one before them
CLIENT_TOKENS = 2048
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


# -- many clients ------------------------------------------------------------------------------------------------
class BothWays:
    """A prefix of a model in a folder and a server, as the store keeps it and as raw tensors, for forked clients to get."""

    def __init__(self, model: Any, ids: torch.Tensor, folder: Path, address: str) -> None:
        from safetensors.torch import save
        from transformers import DynamicCache

        self._model, self._ids, self._folder, self._address = model, ids, folder, address
        self._name, self._tokens = f"bench-{secrets.token_hex(4)}", len(ids) - 1
        cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            model(input_ids=ids[None, :-1], past_key_values=cache, logits_to_keep=1)
        layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        self._starts = range(0, self._tokens, BLOCK_TOKENS)
        self.raw_bytes = 0
        with self._client() as client:
            for at in self._starts:
                block = [(key[:, at : at + BLOCK_TOKENS], value[:, at : at + BLOCK_TOKENS]) for key, value in layers]
                data = save(lm.named_tensors(block, range(len(block))))
                self.raw_bytes += len(data)
                self._raw(at).write_bytes(data)
                client.set(self._key(at), data)
        for place in ("shared", "redis"):
            with self._store(place) as store:
                store.put(model, ids[:-1], cache)
                self.store_bytes = store.shelf.index.counters()["bytes"]

    def remove(self) -> None:
        """Remove what lies in the server."""
        for place in ("shared", "redis"):
            with self._store(place) as store:
                for row in store.shelf.index.all():
                    store.shelf.drop(row)
        with self._client() as client:
            client.delete(*map(self._key, self._starts))

    @contextmanager
    def getting(self, kind: str, place: str) -> Iterator[Callable[[], Any]]:
        """A function that gets the cache, "store" or "raw", from a place, in this process."""
        if kind == "store":
            with self._store(place) as store:
                yield lambda: store.get(self._model, self._ids)
            return
        with self._client() as client:
            yield lambda: self._assembled(client if place == "redis" else None)

    def _store(self, place: str) -> PrefixStore:
        data = self._folder / f"{self._name}-files" if place == "shared" else None
        return PrefixStore(f"{self._address}?store={self._name}-{place}", data=data, preset=Recipe().preset)

    def _assembled(self, client: Any) -> Any:
        """The cache out of raw tensors, fetched from the server at once, or one file after the other."""
        from safetensors.torch import load, load_file

        if client is None:
            blocks = [load_file(self._raw(at)) for at in self._starts]
        else:
            blocks = [load(data) for data in client.mget(map(self._key, self._starts))]
        return lm.cache_of_blocks(self._model, blocks)

    def _client(self) -> Any:
        import redis

        return redis.Redis.from_url(self._address)

    def _raw(self, at: int) -> Path:
        return self._folder / f"{self._name}-{at}.safetensors"

    def _key(self, at: int) -> str:
        return f"{self._name}:raw:{at}"


def contend(prefix: BothWays, kind: str, place: str, clients: int, gets: int) -> dict[str, float]:
    """Hit latency, and GB of 16-bit cache a second of all clients together, each a forked process that gets ``gets`` times."""
    fork = multiprocessing.get_context("fork")
    ready, results = fork.Barrier(clients + 1), fork.SimpleQueue()

    def client() -> None:
        torch.set_num_threads(1)
        with prefix.getting(kind, place) as get:
            get()
            ready.wait()
            results.put([seconds(get)[0] for _ in range(gets)])

    processes = [fork.Process(target=client) for _ in range(clients)]
    for process in processes:
        process.start()
    ready.wait(timeout=600)
    start = time.perf_counter()
    spent = [one for _ in processes for one in results.get()]
    wall = time.perf_counter() - start
    for process in processes:
        process.join()
    stored = prefix.store_bytes if kind == "store" else prefix.raw_bytes
    return {
        "median_s": median(spent),
        "slowest_s": max(spent),
        "cache_gb_per_s": clients * gets * prefix.raw_bytes / wall / 1e9,
        "wire_gb_per_s": clients * gets * stored / wall / 1e9,
    }


def many_clients(model: Any, ids: torch.Tensor, folder: Path, address: str, gets: int) -> list[dict[str, Any]]:
    """A row for each number of clients and place: the store and raw tensors, one after the other."""
    prefix, rows = BothWays(model, ids, folder, address), []
    for clients in CLIENTS:
        for place in ("shared", "redis"):
            found = {kind: contend(prefix, kind, place, clients, gets) for kind in ("store", "raw")}
            over = found["store"]["median_s"] / found["raw"]["median_s"]
            rows.append({"clients": clients, "place": place, **found, "store_over_raw": over})
    prefix.remove()
    sizes = {"tokens": len(ids) - 1, "store_bytes": prefix.store_bytes, "raw_bytes": prefix.raw_bytes}
    return [{**sizes, **row} for row in rows]


def table_of_clients(rows: list[dict[str, Any]]) -> Table:
    """The figures of ``many_clients`` for a terminal."""
    shown = Table(title=f"{rows[0]['tokens']:,} tokens, clients at once: seconds of a hit, GB of 16-bit cache a second")
    for head in ("clients", "place", "store: s", "raw: s", "store / raw", "store: GB/s", "raw: GB/s"):
        shown.add_column(head, justify="right")
    for row in rows:
        both = [row[kind] for kind in ("store", "raw")]
        times, speeds = ([f"{one[key]:.3f}" for one in both] for key in ("median_s", "cache_gb_per_s"))
        shown.add_row(str(row["clients"]), PLACES[row["place"]], *times, f"{row['store_over_raw']:.2f}", *speeds)
    return shown


@contextmanager
def server_at(address: str | None, folder: str) -> Iterator[str]:
    """The address of a server, of one of its own where none is given."""
    if address is not None:
        yield address
        return
    from tests.servers import redis_server

    with redis_server(folder) as server:
        yield server.address


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--address", help="of a Redis or Valkey server, such as redis://127.0.0.1:6379/0 (default: its own)")
    parser.add_argument("--model", default="smollm2", help="as in benchmarks.ttft")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--gets", type=int, default=GETS, help="of each of many clients")
    parser.add_argument("--out", type=Path, default=results_file.RESULTS, metavar="FOLDER", help="where the figures go")
    options = parser.parse_args()
    with console.status(f"{options.model}: loading"):
        name, model, tokenizer = lm.load(options.model, lm.cache_dir())
    rows = []
    with tempfile.TemporaryDirectory() as folder, server_at(options.address, folder) as address:
        busy = os.getloadavg()[0]
        for tokens in LENGTHS:
            with console.status(f"{tokens} tokens: prefilling, storing, getting {options.rounds} times"):
                rows.append(measure(model, prompt_of(tokenizer, PROSE, tokens + 1), Path(folder), address, options.rounds))
        with console.status(f"{CLIENT_TOKENS} tokens: {CLIENTS} clients"):
            at_once = many_clients(model, prompt_of(tokenizer, PROSE, CLIENT_TOKENS + 1), Path(folder), address, options.gets)
    shown = Table(title=f"{name}: seconds to get a prefix")
    for head in ("tokens", *PLACES.values(), "shared / local", "Redis / local"):
        shown.add_column(head, justify="right")
    for row in rows:
        times = [f"{row['get_s'][place]:.4f}" for place in PLACES]
        shown.add_row(str(row["tokens"]), *times, f"{row['over_local']['shared']:.2f}", f"{row['over_local']['redis']:.2f}")
    console.print(shown)
    console.print(table_of_clients(at_once))
    command = "python -m benchmarks.shared_store" + ("" if options.model == lm.SMOLLM2 else f" --model {options.model}")
    about = {"model": name, "rounds": options.rounds, "gets": options.gets, "load_average_before": busy}
    results_file.write(
        "shared_store", command, {**about, "preset": Recipe().preset, "rows": rows, "clients": at_once}, options.out
    )


if __name__ == "__main__":
    main()
