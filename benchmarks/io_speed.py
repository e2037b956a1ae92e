"""Law: saving and loading a cache of 1 GiB: ``python -m benchmarks.io_speed [FOLDER]``.

The same fp16 cache as raw safetensors and coded with pq3 in each container, each saved, loaded from a cold page cache and from
a warm one, turn by turn in one run, beside the disk's own streaming speed; then what partial reads take, what containers and
checksums add, and an append against writing anew. Writes results/io_speed.json and .png.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks import results_file
from benchmarks.memory import touch_memory
from pqcodec import encoded_size
from pqcodec.formats import PQKVFile, append_cache, load_cache, save_cache
from pqcodec.formats.cache import load_safetensors, load_zarr, save_safetensors, save_zarr

LAYERS, SHAPE = 8, (1, 8, 32768, 128)  # 64 MiB of fp16 a tensor, 1 GiB in all
NEW_TOKENS = 256
ROUNDS = 5
READS = 256
COMMAND = "python -m benchmarks.io_speed"
Layers = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Way:
    """A way to keep a cache."""

    name: str
    path: Path
    save: Callable[[], Any]
    load: Callable[[], Any]

    def files(self) -> list[Path]:
        return [self.path] if self.path.is_file() else [path for path in sorted(self.path.rglob("*")) if path.is_file()]

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files())

    def remove(self) -> None:
        if self.path.is_dir():
            shutil.rmtree(self.path)
        self.path.unlink(missing_ok=True)


def cache(seed: int, tokens: int) -> Layers:
    rng = np.random.default_rng(seed)
    shape = (*SHAPE[:2], tokens, SHAPE[3])

    def tensor() -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32)).half()

    return [(tensor(), tensor()) for _ in range(LAYERS)]


def ways(folder: Path, layers: Layers) -> list[Way]:
    """Raw safetensors first, the .pqkv file second."""
    named = {f"layers.{i}.{role}": x for i, pair in enumerate(layers) for role, x in zip(("key", "value"), pair, strict=True)}
    flat: dict[str, Any] = {"preset": "pq3", "share_bits": False}
    raw, pqkv, coded, chunks, whole = (folder / name for name in ("raw", "a.pqkv", "a.safetensors", "a.zarr", "b.zarr"))

    def load_raw() -> Any:
        return [x.clone() for x in load_file(raw).values()]  # safetensors maps the file: the clone reads it

    def to_zarr(path: Path, **options: Any) -> Callable[[], Any]:
        return lambda: save_zarr(path, layers, overwrite=True, **flat, **options)

    return [
        Way("raw safetensors", raw, lambda: save_file(named, raw), load_raw),
        Way("pq3, .pqkv", pqkv, lambda: save_cache(pqkv, layers, **flat), lambda: load_cache(pqkv)),
        Way(
            "pq3, .safetensors",
            coded,
            lambda: save_safetensors(coded, layers, **flat),
            lambda: load_safetensors(coded),
        ),
        Way("pq3, .zarr, a chunk a tensor", whole, to_zarr(whole, tokens_per_chunk=None), lambda: load_zarr(whole)),
        Way("pq3, .zarr, chunks of 4096", chunks, to_zarr(chunks), lambda: load_zarr(chunks)),
    ]


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def forget(way: Way) -> None:
    """Drop the pages of a way's files from the page cache."""
    for path in way.files():
        handle = os.open(path, os.O_RDWR)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def stream(way: Way) -> None:
    """Read all bytes, as fast as the disk gives them."""
    buffer = bytearray(8 << 20)
    for path in way.files():
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


class Counting(io.FileIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        self.count += len(data or b"")
        return data or b""


def partial(path: Path) -> dict[str, float]:
    """256 tokens of one head, of keys and values in turn, from any token on: which share of what is read are their rows."""
    rng, useful, times = np.random.default_rng(0), 0.0, []
    with Counting(path) as counted, PQKVFile(counted) as file:
        for name in file.names:
            file.inspect(name)
        counted.count = 0
        for number in range(READS):
            name = f"layers.{number % LAYERS}.{('key', 'value')[number // LAYERS % 2]}"
            first, head = int(rng.integers(4, SHAPE[2] - 255)), int(rng.integers(0, SHAPE[1]))
            wanted: dict[str, Any] = {"tokens": (first, first + 256), "leading": (head, head + 1)}
            times.append(seconds(partial_read(file, name, wanted)))
            info = file.inspect(name)
            useful += 256 * (info.payload_bytes - checksums(info.chunk_tokens)) / (SHAPE[1] * (SHAPE[2] - info.exact_tokens))
        return {"useful_share": useful / counted.count, "milliseconds": 1e3 * median(times), "reads": READS}


def partial_read(file: PQKVFile, name: str, wanted: dict[str, Any]) -> Callable[[], Any]:
    return lambda: file.decode(name, **wanted)


def checksums(chunk_tokens: int) -> int:
    """Bytes of a tensor's checksums."""
    return 4 * SHAPE[1] * -(-(SHAPE[2] - 4) // chunk_tokens)


def overhead(path: Path) -> dict[str, float]:
    """What is added to coded rows: by the file to its streams, and in all (headers, means, exact tokens, checksums)."""
    with PQKVFile(path) as file:
        infos = [file.inspect(name) for name in file.names]
        streams = sum(info.stream_bytes for info in infos)
        rows = sum(info.payload_bytes - checksums(info.chunk_tokens) for info in infos)
        checked = {n: 16 * checksums(n) / rows for n in (infos[0].chunk_tokens, 256)}
        whole = {n: encoded_size(SHAPE, center="mean", exact_tokens=4, chunk_tokens=n) for n in checked}
        return {
            "container": (file.size - streams) / streams,
            **{f"checksums of {n} tokens": share for n, share in checked.items()},
            **{f"a key in all, {n} tokens a checksum": size * len(infos) / rows - 1 for n, size in whole.items()},
        }


def measured(all_ways: list[Way], console: Console) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, list[float]]] = {way.name: {"save": [], "cold": [], "warm": [], "disk": []} for way in all_ways}
    for turn in range(ROUNDS):
        for way in all_ways:
            found = rows[way.name]
            way.remove()
            found["save"].append(seconds(lambda way=way: (way.save(), os.sync())))
            forget(way)
            found["disk"].append(way.bytes / 1e9 / seconds(lambda way=way: stream(way)))
            for kind in ("cold", "warm"):
                touch_memory()
                if kind == "cold":
                    forget(way)
                found[kind].append(seconds(way.load))
            told = ", ".join(f"{key} {values[-1]:.2f}" for key, values in found.items())
            console.print(f"turn {turn + 1}, {way.name}: {told}", highlight=False)
    figures = []
    for way in all_ways:
        row = {key: median(values) for key, values in rows[way.name].items()}
        shares = {f"{key}_share_of_disk": way.bytes / 1e9 / row[key] / row["disk"] for key in ("save", "cold")}
        against = {f"{key}_ratio": row[key] / median(rows[all_ways[0].name][key]) for key in ("save", "cold", "warm")}
        figures.append({"name": way.name, "bytes": way.bytes, **row, **shares, **against})
    return figures


def shown(rows: list[dict[str, Any]], size: int) -> Table:
    table = Table(title=f"a cache of {size / 2**30:.0f} GiB of fp16: seconds (median of {ROUNDS} turns), and against raw")
    for heading in ("as", "MiB", "save", "load, cold", "load, warm", "disk GB/s", "share of disk, cold"):
        table.add_column(heading, justify="left" if heading == "as" else "right")
    for row in rows:
        times = [f"{row[key]:.2f} ({row[f'{key}_ratio']:.2f}x)" for key in ("save", "cold", "warm")]
        table.add_row(
            row["name"], f"{row['bytes'] / 2**20:.0f}", *times, f"{row['disk']:.2f}", f"{row['cold_share_of_disk']:.2f}"
        )
    return table


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    places = np.arange(len(rows))
    for offset, key in ((-0.27, "save"), (0, "cold"), (0.27, "warm")):
        axis.barh(
            places + offset, [row[key] for row in rows], 0.25, label={"cold": "load, cold", "warm": "load, warm"}.get(key, key)
        )
    axis.set_yticks(places, [f"{row['name']}\n{row['bytes'] / 2**20:.0f} MiB" for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("seconds for 1 GiB of fp16")
    axis.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    console = Console()
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        layers = cache(0, SHAPE[2])
        size = sum(x.nbytes for pair in layers for x in pair)
        all_ways = ways(Path(folder), layers)
        rows = measured(all_ways, console)
        pqkv = all_ways[1].path
        figures: dict[str, Any] = {"tensor_bytes": size, "rows": rows, "overhead": overhead(pqkv), "partial": partial(pqkv)}
        new = cache(1, NEW_TOKENS)
        figures |= {"append_seconds": seconds(lambda: append_cache(pqkv, new)), "rewrite_seconds": rows[1]["save"]}
    console.print(shown(rows, size))
    found, added = figures["partial"], figures["overhead"]
    console.print(
        "added to coded rows: " + ", ".join(f"{key} {share:.3%}" for key, share in added.items()) + "\n"
        f"256 tokens of a head, any of them: {found['milliseconds']:.2f} ms, {found['useful_share']:.1%} of the bytes useful\n"
        f"{NEW_TOKENS} tokens more: {figures['append_seconds']:.2f} s, writing anew {figures['rewrite_seconds']:.1f} s",
        highlight=False,
    )
    written = results_file.write("io_speed", COMMAND, figures)
    draw(rows, written.with_suffix(".png"))
    console.print(f"wrote {written.name} and {written.stem}.png")


if __name__ == "__main__":
    main()
