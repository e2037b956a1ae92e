"""Law: saving and loading a cache of 1 GiB: ``python -m benchmarks.io_speed [FOLDER]``.

The same fp16 cache as raw safetensors and coded with pq3, each saved, loaded from a cold page cache and from a warm one, turn
by turn in one run, beside the disk's own streaming speed; then what a partial read takes, and an append against writing anew.
Writes results/io_speed.json.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks import results_file
from pqcodec import decode
from pqcodec.formats import PQKVFile, append_cache, load_cache, save_cache
from pqcodec.source import MappedSource

LAYERS, SHAPE = 8, (1, 8, 32768, 128)  # 64 MiB of fp16 a tensor, 1 GiB in all
NEW_TOKENS = 256
ROUNDS = 3
COMMAND = "python -m benchmarks.io_speed"


def cache(seed: int, tokens: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = np.random.default_rng(seed)
    shape = (*SHAPE[:2], tokens, SHAPE[3])

    def tensor() -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32)).half()

    return [(tensor(), tensor()) for _ in range(LAYERS)]


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forget(path: Path) -> None:
    """Drop a file's pages from the page cache."""
    handle = os.open(path, os.O_RDWR)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def stream(path: Path) -> None:
    """Read a whole file, as fast as the disk gives it."""
    buffer = bytearray(8 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def load_raw(path: Path) -> Any:
    return [x.clone() for x in load_file(path).values()]  # safetensors maps the file: the clone reads it


class Counting(MappedSource):
    """Counts the bytes that are asked for."""

    count = 0

    def read(self, start: int, count: int) -> np.ndarray:
        self.count += count
        return super().read(start, count)


def partial(path: Path) -> dict[str, float]:
    """256 tokens of one head of one layer's key, at random places: useful share of the bytes read, and milliseconds."""
    rng, useful, times = np.random.default_rng(0), 0.0, []
    with PQKVFile(path) as file:
        part = file.stream("layers.3.key")
        info = file.inspect("layers.3.key")
        counted = Counting(path)
        part._source = counted  # type: ignore[attr-defined]
        for _ in range(64):
            first, head = int(rng.integers(4, SHAPE[2] - 256)), int(rng.integers(0, SHAPE[1]))
            first -= (first - info.exact_tokens) % info.chunk_tokens
            times.append(
                seconds(lambda first=first, head=head: decode(part, tokens=(first, first + 256), leading=(head, head + 1)))
            )
            useful += 256 * info.payload_bytes / (SHAPE[1] * (SHAPE[2] - info.exact_tokens))
    return {"useful_share": useful / counted.count, "milliseconds": 1e3 * median(times)}


def main() -> None:
    console = Console()
    folder = tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None)
    place = Path(folder.name)
    layers = cache(0, SHAPE[2])
    named = {f"layers.{i}.{role}": x for i, pair in enumerate(layers) for role, x in zip(("key", "value"), pair, strict=True)}
    size = sum(x.nbytes for x in named.values())
    raw, coded = place / "raw.safetensors", place / "pq3.pqkv"
    kinds: dict[str, tuple[Path, Callable[[], Any], Callable[[], Any]]] = {
        "raw safetensors": (raw, lambda: save_file(named, raw), lambda: load_raw(raw)),
        "pq3, .pqkv": (coded, lambda: save_cache(coded, layers, share_bits=False), lambda: load_cache(coded)),
    }
    rows: dict[str, dict[str, list[float]]] = {name: {"save": [], "cold": [], "warm": [], "disk": []} for name in kinds}
    for turn in range(ROUNDS):
        for name, (path, save, load) in kinds.items():
            found = rows[name]
            path.unlink(missing_ok=True)
            found["save"].append(seconds(lambda save=save, path=path: (save(), os.sync())))
            forget(path)
            found["disk"].append(path.stat().st_size / 1e9 / seconds(lambda path=path: stream(path)))
            forget(path)
            found["cold"].append(seconds(load))
            found["warm"].append(seconds(load))
            console.print(f"turn {turn + 1}, {name}: " + ", ".join(f"{key} {values[-1]:.2f}" for key, values in found.items()))
    figures: dict[str, Any] = {"tensor_bytes": size, "rows": []}
    shown = Table(title=f"a cache of {size / 2**30:.0f} GiB of fp16: seconds (median of {ROUNDS} turns)")
    for heading in ("as", "MiB", "save", "load, cold", "load, warm", "disk GB/s"):
        shown.add_column(heading, justify="left" if heading == "as" else "right")
    for name, (path, _, _) in kinds.items():
        row = {key: median(values) for key, values in rows[name].items()}
        figures["rows"].append({"name": name, "bytes": path.stat().st_size, **row})
        shown.add_row(
            name, f"{path.stat().st_size / 2**20:.0f}", *(f"{row[key]:.2f}" for key in ("save", "cold", "warm", "disk"))
        )
    console.print(shown)
    figures["cold_ratio"] = figures["rows"][1]["cold"] / figures["rows"][0]["cold"]
    with PQKVFile(coded) as file:
        payload = sum(file.inspect(name).payload_bytes for name in file.names)
        streams = sum(file.inspect(name).stream_bytes for name in file.names)
        figures["container_overhead"] = (file.size - streams) / streams
        figures["overhead_with_checksums"] = file.size / payload - 1
    figures["partial"] = partial(coded)
    new = cache(1, NEW_TOKENS)
    figures["append_seconds"] = seconds(lambda: append_cache(coded, new))
    figures["rewrite_seconds"] = figures["rows"][1]["save"]
    found = figures["partial"]
    console.print(
        f"loading pq3 cold takes {figures['cold_ratio']:.2f} of raw; "
        f"the container adds {figures['container_overhead']:.5%} to the streams\n"
        f"256 tokens of a head: {found['milliseconds']:.2f} ms, {found['useful_share']:.1%} of the bytes useful\n"
        f"{NEW_TOKENS} tokens more: {figures['append_seconds']:.2f} s, writing anew {figures['rewrite_seconds']:.1f} s"
    )
    console.print(f"wrote {results_file.write('io_speed', COMMAND, figures).name}")
    folder.cleanup()


if __name__ == "__main__":
    main()
