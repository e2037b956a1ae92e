"""Law: the CPU backend's speed, memory and start: ``python -m benchmarks.cpu_speed``.

Encode and decode of an fp16 tensor stand beside np.copyto of the same tensor, measured turn by turn in one run, with one
thread and with all; memory and the first byte are measured in processes of their own. Writes results/cpu_speed.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import pqcodec
from benchmarks import results_file
from pqcodec.codings.presets import DEFAULT_PRESET

SHAPE = (8, 16384, 128)  # 32 MiB of fp16
ROUNDS = 9
KEYS: dict[str, Any] = {"center": "rope", "exact_tokens": 4}

MEMORY = """
import resource
import sys
import numpy as np, pqcodec
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def now(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def make(tokens): return np.random.default_rng(0).integers(0x3000, 0x3C00, (8, tokens, 128), dtype=np.uint16).view(np.float16)
pqcodec.decode(pqcodec.encode(make(64)))
tokens = 65536
if sys.argv[1] == "encode":
    before = now()
    x = make(tokens)
    data = pqcodec.encode(x)
else:
    from pathlib import Path
    data = Path(sys.argv[2]).read_bytes()
    before = now() - len(data)
    x = pqcodec.decode(data)
print(peak() - before, x.nbytes + len(data))
if sys.argv[1] == "encode":
    open(sys.argv[2], "wb").write(data)
"""
FIRST_BYTE = """
import numpy as np, pqcodec, sys
x = np.ones((8, 256, 128), np.float16)
sys.stdout.buffer.write(pqcodec.encode(x)[:1])
sys.stdout.flush()
"""


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def speed(x: np.ndarray, preset: str, threads: int, **options: Any) -> dict[str, Any]:
    """GB/s of input and the median ratio to np.copyto, turn by turn."""
    os.environ["PQCODEC_THREADS"] = str(threads)
    target = np.empty_like(x)
    data = pqcodec.encode(x, preset=preset, **options)
    pqcodec.decode(data)
    np.copyto(target, x)
    rounds = []
    for _ in range(ROUNDS):
        copy = seconds(lambda: np.copyto(target, x))
        encode = seconds(lambda: pqcodec.encode(x, preset=preset, **options))
        copy = min(copy, seconds(lambda: np.copyto(target, x)))
        decode = seconds(lambda: pqcodec.decode(data))
        rounds.append((copy, encode, decode))
    copy, encode, decode = (x.nbytes / 1e9 / median(column) for column in zip(*rounds, strict=True))
    return {
        "preset": preset,
        "keys": bool(options),
        "threads": threads,
        "copyto_gb_s": copy,
        "encode_gb_s": encode,
        "decode_gb_s": decode,
        "encode_ratio": median(c / e for c, e, _ in rounds),
        "decode_ratio": median(c / d for c, _, d in rounds),
    }


def child(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


def memory() -> dict[str, int]:
    """Bytes that a process grew above input + output, at its peak, for a 128 MiB tensor."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "stream")
        found = {}
        for verb in ("encode", "decode"):
            grown, needed = map(int, child(MEMORY, verb, path).split())
            found[f"{verb}_extra_bytes"] = grown - needed
        return found


def first_byte() -> dict[str, float]:
    """Seconds from starting a process to its first encoded byte; the kernels are compiled already."""
    times, bare = [], []
    for _ in range(7):
        start = time.perf_counter()
        with subprocess.Popen([sys.executable, "-c", FIRST_BYTE], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)
            times.append(time.perf_counter() - start)
        bare.append(seconds(lambda: child("import numpy, numba")))
    return {"first_byte_s": median(times), "import_numpy_numba_s": median(bare)}


def main() -> None:
    console = Console()
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float16)
    every = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    presets = [name for name, preset in pqcodec.PRESETS.items() if preset.own]
    rows = [speed(x, preset, every) for preset in presets]
    rows += [speed(x, preset, every, **KEYS, rope=pqcodec.Rope()) for preset in (DEFAULT_PRESET, "pq3")]
    rows += [speed(x, preset, 1) for preset in (DEFAULT_PRESET, "pq3")]
    shown = Table(title=f"fp16 {SHAPE}, GB/s of tensor, and the share of np.copyto (median of {ROUNDS} turns)")
    for heading in ("preset", "threads", "np.copyto", "encode", "decode", "encode/copy", "decode/copy"):
        shown.add_column(heading, justify="left" if heading == "preset" else "right")
    for row in rows:
        name = row["preset"] + (", RoPE-centred, 4 exact" if row["keys"] else "")
        speeds = (f"{row[key]:.2f}" for key in ("copyto_gb_s", "encode_gb_s", "decode_gb_s"))
        shown.add_row(name, str(row["threads"]), *speeds, f"{row['encode_ratio']:.3f}", f"{row['decode_ratio']:.3f}")
    console.print(shown)
    figures = {"rows": rows, **memory(), **first_byte()}
    extra = ", ".join(f"{verb} {max(figures[f'{verb}_extra_bytes'], 0) / 2**20:.0f} MiB" for verb in ("encode", "decode"))
    console.print(f"peak memory above input + output: {extra}")
    console.print(
        f"process start to first encoded byte: {figures['first_byte_s']:.2f} s, "
        f"of which importing numpy and numba {figures['import_numpy_numba_s']:.2f} s"
    )
    path = results_file.write("cpu_speed", "python -m benchmarks.cpu_speed", figures)
    console.print(f"wrote {path.name}: {json.dumps(results_file.machine()['machine'])}")


if __name__ == "__main__":
    main()
