"""Law: where a benchmark's figures go: one JSON file a benchmark, with the machine that made it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

import pqcodec

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The processor's name and what else a reader needs to judge a figure."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name"))
        name = next(lines, name)
    return {
        "machine": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pqcodec": pqcodec.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def accelerator() -> dict[str, Any]:
    """The GPU that torch uses, and what drives it."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "accelerator": properties.name,
        "accelerator_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda_bindings": _version("cuda-bindings"),
    }


def versions(*packages: str) -> dict[str, str | None]:
    """The versions of distributions that a benchmark compares, None for what is not installed."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Version of NVIDIA's driver, if its tool is there to tell."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0] or None


def write(name: str, command: str, figures: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write NAME.json into ``folder`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"command": command, **machine(), **figures}, indent=1) + "\n")
    return path
