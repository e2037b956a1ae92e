"""Many processes on one prefix store, killed at any moment: nothing that was put is lost, nothing that is found is wrong.

``python -m tests.store_stress --processes 8 --operations 1000 --seed 1 [--quota BYTES] [--preset pq3] [--folder F] [--redis]``
prints a summary as JSON and exits with 1 where a law is broken. With --redis the index is in a server of its own, which is
killed and started again halfway; the files are in the folder. No model runs: the keys and values of a token are made from a
hash of all tokens up to it, so whoever gets a cache can tell whether it is the one that was asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig

from pqcodec.formats.engines.model_identity import Identity
from pqcodec.formats.store import PrefixStore, writing

LAYERS, HEADS, HEAD_DIM = 2, 1, 16
NUMBERS = LAYERS * 2 * HEADS * HEAD_DIM  # of one token
BRANCHES, DEPTH = 6, 4  # of the tree that prompts are paths in: 1,554 of them
QUOTA = 6_000_000  # bytes: a twentieth of what all prompts take
PUTS = 0.4  # of all operations
CONFIG = LlamaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, num_key_value_heads=HEADS)
MODEL = Identity(CONFIG, "c" * 32, weights="w" * 32)
U64 = np.uint64


# -- prompts and their caches ------------------------------------------------------------------------------------
@functools.cache
def tokens_of(prompt: str) -> np.ndarray:
    """The tokens of a path such as "2.0.3": those of "2.0" and some more."""
    before, _, _ = prompt.rpartition(".")
    rng = random.Random(f"tokens of {prompt}")
    own = np.array([rng.randrange(100) for _ in range(rng.randrange(20, 400))], np.int64)
    return np.concatenate([tokens_of(before), own]) if before else own


def any_prompt(rng: random.Random) -> str:
    """Some more often than others."""
    return ".".join(str(min(rng.randrange(BRANCHES), rng.randrange(BRANCHES))) for _ in range(rng.randrange(1, DEPTH + 1)))


def _mixed(x: np.ndarray) -> np.ndarray:
    """SplitMix64."""
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def numbers_of(ids: np.ndarray) -> np.ndarray:
    """float32 [tokens, layers, 2, heads, head_dim], of each token from the hash of all up to it."""
    state, states = 0x1234567, []
    for token in ids.tolist():
        state = ((state ^ token) * 0x100000001B3 + (state >> 29) + 1) & 0xFFFFFFFFFFFFFFFF
        states.append(state)
    with np.errstate(over="ignore"):
        bits = _mixed(np.array(states, U64)[:, None] + np.arange(1, NUMBERS + 1, dtype=U64) * U64(0x9E3779B97F4A7C15))
    return ((bits >> U64(40)).astype(np.float32) / (1 << 23) - 1).reshape(-1, LAYERS, 2, HEADS, HEAD_DIM)


@functools.lru_cache(200)
def expected(prompt: str) -> np.ndarray:
    return numbers_of(tokens_of(prompt))


def cache_of(numbers: np.ndarray) -> Any:
    cache = DynamicCache()
    tensors = torch.from_numpy(numbers).permute(1, 2, 3, 0, 4)[:, :, None].contiguous()
    for layer in range(LAYERS):
        cache.update(tensors[layer, 0], tensors[layer, 1], layer)
    return cache


def wrong(cache: Any, length: int, numbers: np.ndarray, exact: bool) -> str:
    """What is wrong with a cache that was found; "" where it is right."""
    if cache.get_seq_length() != length:
        return f"a cache of {cache.get_seq_length()} tokens is said to have {length}"
    if not length:
        return ""
    if length > len(numbers):
        return f"{length} tokens, {len(numbers)} were asked for"
    found = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
    x, y = numbers[:length], found.permute(3, 0, 1, 2, 4).numpy()
    if exact:
        return "" if np.array_equal(x.view(np.uint32), np.ascontiguousarray(y).view(np.uint32)) else "other bits"
    errors = ((x - y) ** 2).mean((1, 2, 3, 4)) / (x**2).mean()  # of another token's numbers: 2
    return "" if errors.max() < 0.5 and errors.mean() < 0.1 else f"error {errors.mean()}, at a token {errors.max()}"


# -- workers -----------------------------------------------------------------------------------------------------
def opened(folder: Path, address: str, **options: Any) -> PrefixStore:
    """The store in a folder or, if there is an address, with its index there and its files in the folder."""
    while address:
        try:
            return PrefixStore(address, data=folder / "blocks", **options)
        except OSError:  # the server is gone for a while
            time.sleep(0.05)
    return PrefixStore(folder, **options)


def work(
    number: int, life: int, folder: Path, address: str, operations: int, seed: int, preset: str, limited: bool, done: mmap.mmap
) -> None:
    """Do operations until the worker's count is full; the log's lines are written as one each, behind what they tell of."""
    torch.set_num_threads(1)
    writing.LEASE, writing.PATIENCE = 0.5, 0.05  # of the blocks that killed workers leave
    rng = random.Random(f"{seed} {number} {life}")
    log = os.open(f"{folder}.{number}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    warnings.simplefilter("error")
    store = opened(folder, address, preset=preset)
    while (count := struct.unpack_from("<q", done, 8 * number)[0]) < operations:
        prompt = any_prompt(rng)
        ids, numbers = tokens_of(prompt), expected(prompt)
        if rng.random() < PUTS:
            try:
                stored = store.put(MODEL, ids, cache_of(numbers))
                short = not limited and not stored.pending_tokens and stored.tokens < len(ids)
                os.write(log, f"short {prompt} {stored}\n".encode() if short else f"put {prompt} {stored.tokens}\n".encode())
            except OSError as error:
                if not address:  # there a server may be gone for a while
                    raise
                os.write(log, f"gone {prompt} {error!r:.200}\n".encode())
                time.sleep(0.1)
        else:
            if rng.random() < 0.3:  # goes on otherwise
                cut = rng.randrange(len(ids))
                ids = np.concatenate([ids[:cut], [(ids[cut] + 1) % 100], ids[:50]])
                numbers = numbers_of(ids)
            try:
                cache, length = store.get(MODEL, ids, leave=rng.choice([0, 1, 7]))
            except RuntimeWarning as warning:
                if not address or "nothing is found" not in str(warning):
                    raise
                os.write(log, f"gone {prompt} {warning!r:.200}\n".encode())
                time.sleep(0.1)
                continue
            fault = wrong(cache, length, numbers, preset == "exact")
            os.write(log, f"wrong {prompt} {fault}\n".encode() if fault else f"got {prompt} {length}\n".encode())
        struct.pack_into("<q", done, 8 * number, count + 1)
    store.close()


def start(number: int, life: int, *of: Any) -> int:
    """Fork a worker from this process, which has imported all that it needs."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        work(number, life, *of)
        code = 0
    except BaseException:
        with open(f"{of[0]}.{number}.crash", "a") as file:
            file.write(traceback.format_exc() + "\n")
    finally:
        os._exit(code)


def stress(
    folder: Path,
    *,
    processes: int = 8,
    operations: int = 1000,
    seed: int = 0,
    preset: str = "exact",
    quota: bool | int = False,
    kill_every: float = 0.02,
    address: str = "",
    halfway: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run it and return what is found; the keys ``wrong``, ``lost`` and ``problems`` have to be 0, 0 and [].

    ``address``: of a server for the index; ``halfway``: what happens to it once half of the operations are done.
    """
    began, rng = time.monotonic(), random.Random(f"killer {seed}")
    limit = QUOTA if quota is True else int(quota)
    with opened(folder, address, preset=preset, max_bytes=limit or None), PrefixStore(f"{folder}.warm", preset=preset) as warm:
        warm.put(MODEL, tokens_of("0"), cache_of(expected("0")))  # what is loaded once is there in every worker
        warm.get(MODEL, tokens_of("0"))
    done = mmap.mmap(-1, 8 * processes)
    options = (folder, address, operations, seed, preset, bool(limit), done)
    lives: Counter[int] = Counter(range(processes))
    alive = {start(number, 1, *options): number for number in range(processes)}
    kills = crashes = 0
    disturbed = False
    try:
        while alive:
            if not disturbed and 2 * sum(struct.unpack(f"<{processes}q", done)) >= processes * operations:
                disturbed = True
                halfway()
            until = time.monotonic() + rng.expovariate(1 / kill_every)
            while alive and time.monotonic() < until:
                for pid in [*alive]:
                    gone, status = os.waitpid(pid, os.WNOHANG)
                    if gone:
                        crashes += os.waitstatus_to_exitcode(status) != 0
                        alive.pop(pid)
                time.sleep(0.002)
            if alive:
                victim = rng.choice([*alive])
                os.kill(victim, signal.SIGKILL)
                os.waitpid(victim, 0)
                kills += 1
                number = alive.pop(victim)
                lives[number] += 1
                alive[start(number, lives[number], *options)] = number
    finally:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    worked = time.monotonic() - began
    return {
        "processes": processes,
        "operations": sum(struct.unpack(f"<{processes}q", done)),
        "preset": preset,
        "quota": limit or None,
        "kills": kills,
        "crashes": crashes,
        **checked(folder, address, preset, limit),
        "seconds": round(worked, 1),
        "seconds_with_checks": round(time.monotonic() - began, 1),
    }


def checked(folder: Path, address: str, preset: str, limit: int) -> dict[str, Any]:
    """What the logs and the store say in the end."""
    lines = [line.split(" ", 2) for log in folder.parent.glob(f"{folder.name}.*.log") for line in log.read_text().splitlines()]
    put: dict[str, int] = {}  # the most tokens of each prompt that were said to be there
    for line in lines:
        if line[0] == "put":
            put[line[1]] = max(int(line[2]), put.get(line[1], 0))
    faults = [" ".join(line) for line in lines if line[0] in ("wrong", "short")]
    tally = Counter(line[0] for line in lines)
    found = sum(int(line[2]) > 0 for line in lines if line[0] == "got")
    problems = [
        text for crash in folder.parent.glob(f"{folder.name}.*.crash") for text in crash.read_text().split("\n\n") if text
    ]
    lost = []
    with opened(folder, address, preset=preset) as store:
        for prompt in sorted(put):
            cache, length = store.get(MODEL, tokens_of(prompt), leave=0)
            if length < put[prompt] and not limit:
                lost.append(f"{prompt}: {length} of {put[prompt]} tokens")
            if fault := wrong(cache, length, expected(prompt), preset == "exact"):
                faults.append(f"{prompt}: {fault}")
        first, second = store.shelf.gc(grace=0), store.shelf.gc(grace=0)
        if first["missing"] or any(second.values()):
            problems.append(f"gc: {first}, then {second}")
        rows = store.shelf.index.all()
        problems += [f"{row.file}: {text}" for row in rows for text in store.shelf.problems(row)]
        there = {str(path.relative_to(folder / "blocks")): path for path in (folder / "blocks").rglob("*") if path.is_file()}
        if set(there) != {row.file for row in rows}:
            problems.append(f"files and rows differ: {sorted(set(there) ^ {row.file for row in rows})}")
        names = {row.name for row in rows} | set(store.shelf.index.roots())
        orphaned = [row.file for row in rows if row.parent not in names]
        size, counters = sum(row.size for row in rows), store.shelf.index.counters()
        if size != counters["bytes"] or size != sum(path.stat().st_size for path in there.values()):
            problems.append(f"{counters['bytes']} bytes are counted, {size} are there")
        if limit and size > limit:
            problems.append(f"{size} bytes are over the quota of {limit}")
    return {
        "puts": tally["put"],
        "gets": tally["got"] + tally["wrong"],
        "hits": found,
        "server_gone": tally["gone"],
        "wrong": len(faults),
        "lost": len(lost),
        "orphans_removed": first["orphans"],
        "blocks": len(rows),
        "without_parent": len(orphaned),
        "evicted": counters.get("evicted", 0),
        "bytes": size,
        "problems": [*problems, *faults, *lost][:20],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--operations", type=int, default=1000, help="of each process")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--preset", default="exact")
    parser.add_argument("--quota", type=int, nargs="?", const=QUOTA, default=0, help="bytes; without a number a small one")
    parser.add_argument("--kill-every", type=float, default=0.02, help="seconds, on average")
    parser.add_argument("--redis", action="store_true", help="keep the index in a server that is killed halfway")
    parser.add_argument("--folder", type=Path, help="for the store and its logs, a new one (default: a temporary one)")
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory(prefix="pqcodec-stress-") as temporary:
        folder = (options.pop("folder") or Path(temporary)) / "store"
        folder.parent.mkdir(parents=True, exist_ok=True)
        if options.pop("redis"):
            from tests.servers import redis_server

            (folder.parent / "redis").mkdir()
            with redis_server(str(folder.parent / "redis")) as server:
                found = stress(folder, address=server.address, halfway=server.kill_and_start, **options)
        else:
            found = stress(folder, **options)
    print(json.dumps(found))
    return int(bool(found["wrong"] or found["lost"] or found["problems"] or found["crashes"]))


if __name__ == "__main__":
    sys.exit(main())
