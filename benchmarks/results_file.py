"""Law: where a benchmark's figures go: one JSON file a benchmark, with the machine that made it."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
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


def write(name: str, command: str, figures: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"command": command, **machine(), **figures}, indent=1) + "\n")
    return path
