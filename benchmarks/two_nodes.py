"""Law: what a shared store is for: a prefix that one node has computed, from which another goes on.

``python -m benchmarks.two_nodes`` starts a Redis server, an S3 store and two processes, the nodes, each with a model and a
``PrefixStore`` (index in Redis, blocks in S3). The nodes reach both servers through links of ``--mb-per-s`` each, whose bytes
are counted. One node prefills a prompt and puts its cache, also as raw 16-bit safetensors, one object a block; the other gets
to the first token turn by turn: from the store, from the raw tensors, and by computing the prompt again. The raw way is told
the objects' names, and checks nothing. Times are the quickest of all rounds. Writes results/two_nodes.json and .png.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import model as lm
from benchmarks import results_file
from benchmarks.ttft import PRESET, PROSE, first_token, prompt_of, seconds
from pqcodec.formats import PrefixStore
from pqcodec.formats.places import remote
from pqcodec.formats.store.files import AT_ONCE
from pqcodec.formats.store.keys import BLOCK_TOKENS

LENGTHS = (1024, 4096)
ROUNDS, PREFILLS = 11, 1
MB_PER_S = 125  # a link of 1 Gbit/s
BUCKET = "s3://kv-cache"
WAYS = {"store": f"{PRESET} from the store", "raw": "raw 16-bit safetensors", "compute": "computed again"}
SETTINGS = {"key": "key", "secret": "secret"}
PATIENCE = 120.0  # seconds that a connection of a node may be silent, as while it computes
console = Console(stderr=True)


# -- a node ------------------------------------------------------------------------------------------------------
class Node:
    """A model and its store; ``address``: of the index, ``name``: of the model."""

    def __init__(self, address: str, name: str, longest: int) -> None:
        self.name, self._model, tokenizer = lm.load(name, lm.cache_dir())
        self._prompt = prompt_of(tokenizer, PROSE, longest + 1)
        self._store = PrefixStore(address, data=f"{BUCKET}/prefixes", preset=PRESET)

    def put(self, tokens: int) -> dict[str, Any]:
        """Prefill, and put the cache into the store and beside it as raw tensors."""
        from safetensors.torch import save

        spent, cache = seconds(lambda: self._prefilled(tokens))
        put, stored = seconds(lambda: self._store.put(self._model, self._prompt[:tokens], cache))
        assert stored.tokens == tokens, f"{stored.tokens} of {tokens} tokens were stored"
        layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers]
        raw = 0
        for at, url in raw_places(tokens):
            block = [(key[:, at : at + BLOCK_TOKENS], value[:, at : at + BLOCK_TOKENS]) for key, value in layers]
            data = save(lm.named_tensors(block, range(len(block))))
            raw += len(data)
            put_object(url, data)
        return {"prefill_s": spent, "put_s": put, "store_bytes": stored.new_bytes, "raw_bytes": raw}

    def store(self, tokens: int) -> Any:
        """The cache out of the store."""
        found = self._store.get(self._model, self._prompt[: tokens + 1])
        assert found.length == tokens, f"{found.length} of {tokens} tokens were found"
        return found.cache

    def raw(self, tokens: int) -> Any:
        """The cache out of the raw tensors, as many objects at once as the store fetches."""
        from safetensors.torch import load

        with ThreadPoolExecutor(AT_ONCE) as pool:
            blocks = [*pool.map(lambda place: load(remote.read_all(place[1]).tobytes()), raw_places(tokens))]
        return lm.cache_of_blocks(self._model, blocks)

    def compute(self, tokens: int) -> Any:
        """The cache by prefilling."""
        return self._prefilled(tokens)

    def first(self, way: str, tokens: int) -> dict[str, Any]:
        """Seconds to the first token by one of ``WAYS``, those of them until the cache is there, and the token."""
        cached, cache = seconds(lambda: getattr(self, way)(tokens))
        spent, token = seconds(lambda: first_token(self._model, cache, self._prompt[: tokens + 1]))
        return {"seconds": cached + spent, "cache_s": cached, "token": token}

    @torch.inference_mode()
    def _prefilled(self, tokens: int) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        self._model(input_ids=self._prompt[None, :tokens], past_key_values=cache, logits_to_keep=1)
        return cache

    def serve(self) -> None:
        """Answer each line of stdin, JSON of a method's name and its arguments, by a line of JSON."""
        print(json.dumps(self.name), flush=True)
        for line in sys.stdin:
            method, *arguments = json.loads(line)
            print(json.dumps(getattr(self, method)(*arguments)), flush=True)


def raw_places(tokens: int) -> list[tuple[int, str]]:
    """(first token, URL) of each block of a prompt's raw tensors."""
    return [(at, f"{BUCKET}/raw/{tokens}/{at}.safetensors") for at in range(0, tokens, BLOCK_TOKENS)]


def put_object(url: str, data: bytes) -> None:
    """Write an object of the S3 store that fsspec is configured for."""
    import fsspec

    with fsspec.open(url, "wb") as file:
        file.write(data)


# -- both, and what is between them ------------------------------------------------------------------------------
class Process:
    """A ``Node`` in a process of its own."""

    def __init__(self, *arguments: str, environment: dict[str, str]) -> None:
        command = [sys.executable, "-m", "benchmarks.two_nodes", "--node", *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | environment
        )
        self.name = self._answer()

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of the node returns."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a node has failed; its error is above")
        return json.loads(line)

    def end(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def places(folder: str, mb_per_s: float) -> Iterator[tuple[str, dict[str, str], list[Any]]]:
    """The index's address and the nodes' environment, and the links to both servers, which count bytes."""
    from tests.servers import proxy, redis_server, s3_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # a line for each request
    with ExitStack() as stack:
        server, s3 = stack.enter_context(redis_server(folder)), stack.enter_context(s3_server())
        links = [stack.enter_context(proxy(place, PATIENCE, mb_per_s * 1e6)) for place in (server.place, s3)]
        environment = {"FSSPEC_S3_ENDPOINT_URL": links[1].url, "FSSPEC_S3": json.dumps(SETTINGS), "NO_PROXY": "127.0.0.1"}
        import s3fs

        s3fs.S3FileSystem(**SETTINGS, endpoint_url="http://{}:{}".format(*s3)).mkdir(BUCKET)
        yield links[0].url.replace("http", "redis") + "/0?store=team", environment, links


def measure(one: Process, two: Process, links: list[Any], tokens: int, rounds: int) -> dict[str, Any]:
    """One node puts a prompt of so many tokens, the other gets to its first token by each way, turn by turn."""

    def passed() -> int:
        time.sleep(0.05)  # the last bytes of an answer may be counted after it has arrived
        return sum(link.passed for link in links)

    put = one.ask("put", tokens)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    caches: dict[str, list[float]] = {way: [] for way in WAYS}
    wire, tokens_found = {}, {}
    for turn in range(rounds + 1):
        for way in WAYS:
            if way == "compute" and turn > PREFILLS:
                continue
            before = passed()
            found = two.ask("first", way, tokens)
            wire[way], tokens_found[way] = passed() - before, found["token"]
            if turn:  # in the first one kernels and connections are made
                times[way].append(found["seconds"])
                caches[way].append(found["cache_s"])
    first = {way: min(spent) for way, spent in times.items()}  # the others tell of what else the machine did
    return {
        "tokens": tokens,
        "first_token_s": first,
        "cache_s": {way: min(spent) for way, spent in caches.items()},
        "first_token_s_all": times,
        "wire_bytes": wire,
        "same_first_token": {way: tokens_found[way] == tokens_found["compute"] for way in ("store", "raw")},
        "raw_over_store": first["raw"] / first["store"],
        "compute_over_store": first["compute"] / first["store"],
        "wire_over_raw": wire["store"] / wire["raw"],
        **put,
    }


# -- what is shown -----------------------------------------------------------------------------------------------
def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """The figures for a terminal."""
    shown = Table(title=title)
    for head in ("tokens", *(f"{way}: s" for way in WAYS), "store: MB", "raw: MB", "raw / store", "computed / store"):
        shown.add_column(head, justify="right")
    for row in rows:
        times = (f"{row['first_token_s'][way]:.3f}" for way in WAYS)
        sizes = (f"{row['wire_bytes'][way] / 1e6:.1f}" for way in ("store", "raw"))
        shown.add_row(
            f"{row['tokens']:,}", *times, *sizes, *(f"{row[key]:.1f} x" for key in ("raw_over_store", "compute_over_store"))
        )
    return shown


def plot(title: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes and seconds to the first token as bars side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (sizes, times) = plt.subplots(1, 2, figsize=(10, 4.2))
    for axis, key, scale, label in (
        (sizes, "wire_bytes", 1e-6, "MB on the wire"),
        (times, "first_token_s", 1.0, "seconds to the first token"),
    ):
        ways = [way for way in WAYS if key == "first_token_s" or way != "compute"]
        for number, way in enumerate(ways):
            at = [index + (number - (len(ways) - 1) / 2) * 0.27 for index in range(len(rows))]
            bars = axis.bar(at, [row[key][way] * scale for row in rows], 0.25, label=WAYS[way], color=f"C{number}")
            axis.bar_label(bars, fmt="%.3g", fontsize=8)
        axis.set_xticks(range(len(rows)), [f"{row['tokens']:,}" for row in rows])
        axis.set(xlabel="tokens of the prefix", ylabel=label)
        axis.grid(alpha=0.3, axis="y")
    times.set_yscale("log")
    times.yaxis.set_major_formatter("{x:g}")
    times.yaxis.set_minor_formatter(lambda *_: "")
    times.legend(fontsize=8)
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_nodes", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default=lm.SMOLLM2, help=lm.SOURCES)
    parser.add_argument("--tokens", type=int, nargs="+", default=LENGTHS, metavar="N", help="lengths of the prefix")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--mb-per-s", type=float, default=MB_PER_S, help=f"of each link (default: {MB_PER_S}, 1 Gbit/s)")
    parser.add_argument("--out", type=Path, default=results_file.RESULTS, metavar="FOLDER", help="where the figures go")
    parser.add_argument("--node", metavar="ADDRESS", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node:
        Node(options.node, options.model, max(options.tokens)).serve()
        return
    rows, busy = [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, places(folder, options.mb_per_s) as (address, environment, links):
        lm.fetch(options.model, lm.cache_dir()) if options.model in lm.KNOWN else None
        arguments = (address, "--model", options.model, "--tokens", *map(str, options.tokens))
        one, two = (Process(*arguments, environment=environment) for _ in range(2))
        for tokens in options.tokens:
            with console.status(f"{tokens:,} tokens"):
                rows.append(measure(one, two, links, tokens, options.rounds))
        for node in (one, two):
            node.end()
    title = f"{one.name}: another node's prefix over links of {options.mb_per_s:g} MB/s, {torch.get_num_threads()} threads"
    console.print(table(title, rows))
    report = {"model": one.name, "preset": PRESET, "mb_per_s": options.mb_per_s, "rounds": options.rounds}
    report |= {"load_average_before": busy, "rows": rows}
    command = "python -m benchmarks.two_nodes" + ("" if options.model == lm.SMOLLM2 else f" --model {options.model}")
    path = results_file.write("two_nodes", command, report, options.out)
    plot(title, rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
