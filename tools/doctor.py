"""Law: ``pqcodec doctor`` says what works on this machine; ``pqcodec warmup`` compiles kernels ahead of their first use."""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from multiprocessing import get_context
from typing import Annotated, Any

import typer

import pqcodec
from pqcodec.tools.outcome import print_json, shown
from pqcodec.tools.progress import progress_bar

PACKAGES = {  # and the extra that brings it, if it is not always there
    "numpy": "",
    "torch": "",
    "numba": "",
    "safetensors": "",
    "zarr": "zarr",
    "fsspec": "remote",
    "transformers": "transformers",
    "triton": "gpu",
    "cuda-bindings": "cuda",
}
TIMED_BYTES = 1 << 24
ROUNDS = 3
DTYPES = ("float16", "bfloat16", "float32")
CENTRED = (None, "mean", "rope")
STAGES = ("encode", "decode", "attend")  # of which each has kernels of its own
PER_CODING = ("pq3", "wu44", "quad3", "paper", "int4")  # presets: a kernel of the CPU serves all of a coding


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON object.")] = False,
) -> None:
    """Say what is installed, which backends work, where compiled kernels are kept, and how fast one encode is.

    The exit code is 1 where the CPU backend does not work.
    """
    from pqcodec import backends

    found: dict[str, Any] = {
        "pqcodec": pqcodec.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "backends": {name: _state(name) for name in backends.BACKENDS},
        "kernels": backends.kernel_folder() or "nowhere: they are compiled in every process",
    }
    works = found["backends"]["cpu"] == "works"
    if works:
        found["speed"] = _speeds()
    if as_json:
        print_json(found)
    else:
        for line in _lines(found):
            print(shown(line))
    if not works:
        raise typer.Exit(1)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _state(backend: str) -> str:
    """What became of a small tensor on a backend: "works", or why not."""
    import torch

    from pqcodec.backends import ON_DEVICE

    on_device = backend in ON_DEVICE
    if on_device and not torch.cuda.is_available():
        return "no GPU that torch finds"
    x = torch.linspace(-1, 1, 256).reshape(2, 128)
    wanted = pqcodec.decode(pqcodec.encode(x, backend="reference"), backend="reference")
    try:
        there = x.to("cuda" if on_device else "cpu")
        data = pqcodec.encode(there, backend=backend)
        got = pqcodec.decode(data, backend=backend, device="cuda" if on_device else None)
    except Exception as error:
        return f"does not work: {error}"
    same = float((got.cpu() - wanted).abs().max()) < 0.5
    return "works" if same else "does not work: it decodes other numbers than the reference; please report this"


def _speeds() -> dict[str, Any]:
    """GB/s of float16 that the CPU encodes and decodes by the default preset, its kernels loaded: the best of a few rounds."""
    import numpy as np

    from pqcodec.codings.presets import DEFAULT_PRESET

    x = np.random.default_rng(0).standard_normal((TIMED_BYTES // 256, 128), np.float32).astype(np.float16)
    data = pqcodec.encode(x, backend="cpu")
    works = (lambda: pqcodec.encode(x, backend="cpu"), lambda: pqcodec.decode(data, backend="cpu"))
    encode, decode = (round(x.nbytes / min(map(_seconds, ROUNDS * [work])) / 1e9, 2) for work in works)
    return {"preset": DEFAULT_PRESET, "encode_gb_s": encode, "decode_gb_s": decode}


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _lines(found: dict[str, Any]) -> list[str]:
    lines = [f"pqcodec {found['pqcodec']}, Python {found['python']}, {found['machine']}", "", "packages"]
    for name, have in found["packages"].items():
        missing = f"not installed: pip install 'pqcodec[{PACKAGES[name]}]'" if PACKAGES[name] else "not installed"
        lines.append(f"  {name:14} {have or missing}")
    lines += ["", "backends", *(f"  {name:14} {state}" for name, state in found["backends"].items())]
    lines += ["", f"compiled kernels: {found['kernels']}"]
    if speed := found.get("speed"):
        lines.append(
            "{preset} on the CPU, float16: encodes {encode_gb_s:.2f} GB/s, decodes {decode_gb_s:.2f} GB/s".format(**speed)
        )
    return lines


def warmup(
    head_dim: Annotated[list[int], typer.Option(min=1, help="Of the tensors to come; on a GPU kernels differ.")] = [128],  # noqa: B006
    preset: Annotated[list[str], typer.Option(help="On a GPU kernels differ; on a CPU one of a coding serves all.")] = [  # noqa: B006
        *PER_CODING
    ],
    device: Annotated[str, typer.Option(help="cpu, or a GPU as torch names it.")] = "cpu",
) -> None:
    """Compile the kernels of encoding, decoding and attention, so that their first use does not wait: for images and start-up.

    They are kept on disk; ``pqcodec doctor`` says where.
    """
    import torch

    from pqcodec.codings.presets import preset as preset_of
    from pqcodec.errors import InvalidArgument

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgument(f"device {device!r} is not there: {str(error).splitlines()[0]}; choose 'cpu' or 'cuda'") from None
    for name in preset:
        preset_of(name)
    kinds = len(head_dim) * len(preset) * len(DTYPES) * len(CENTRED)
    tasks = [(stage, name, head_dim, device) for name in preset for stage in (STAGES if device == "cpu" else STAGES[:2])]
    start = time.perf_counter()
    # Two processes for a CPU, since one compiles one kernel at a time.
    workers = min(2, os.cpu_count() or 1) if device == "cpu" else 1
    with (
        progress_bar("compile kernels", len(tasks)) as show,
        ProcessPoolExecutor(workers, get_context("spawn"), _quiet) as pool,
    ):
        for done, each in enumerate(as_completed([pool.submit(_compile, *task) for task in tasks])):
            each.result()
            show(done + 1)
    print(f"{kinds} kinds of streams are compiled, after {time.perf_counter() - start:.0f} s", file=sys.stderr)


def _quiet() -> None:
    """In a process that compiles: say nothing of it, for the progress does."""
    logging.getLogger("pqcodec").setLevel(logging.ERROR)


def _compile(stage: str, preset: str, head_dims: Sequence[int], device: str) -> None:
    """Run a stage for a preset, on tensors of every dtype and centred in every way."""
    import torch

    from pqcodec import attention
    from pqcodec.codings.presets import preset as preset_of

    backend = "auto" if stage == "encode" or device != "cpu" else "reference"
    for head_dim, dtype, center in product(head_dims, DTYPES, CENTRED):
        rope = pqcodec.Rope() if center == "rope" else None
        x = torch.ones((2, 80, head_dim), dtype=getattr(torch, dtype), device=device)
        data: Any = pqcodec.encode(x, preset=preset, exact_tokens=1, center=center, rope=rope, backend=backend)
        if stage == "decode":
            pqcodec.decode(data, device=device, estimate="unbiased")
        elif stage == "attend":
            attention.scores(data, x[:, :1])
            if not preset_of(preset).estimates:
                attention.attend(x[:, :1], data, data)
