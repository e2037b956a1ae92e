"""Nodes of ``vllm_node.py``: vLLM in a process of its own, with its answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks import model as lm

NODE = Path(__file__).with_name("vllm_node.py")
TEXT = Path(__file__).parents[2] / "benchmarks" / "data" / "prose.txt"
PATIENCE = 120  # seconds
HERE = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "NUMBA_CACHE_DIR": str(Path(sys.prefix) / "numba"),  # vLLM's numba is another one, which does not share a cache
}
Answers = list[dict[str, Any]]


@dataclass
class VLLMProcess:
    """A node and its answers."""

    process: subprocess.Popen[str]

    def answers(self, prompts: list[Any] | None = None) -> Answers:
        """What it says of prompts; None: wait until it is ready."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if prompts is not None:
            self.process.stdin.write(json.dumps(prompts) + "\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answers "):
                return json.loads(line.removeprefix("answers "))
        raise AssertionError(f"the node ended: {self.process.wait()}; its log is beside the objects")


@contextmanager
def vllm_process(folder: Path, where: str, logs: Path, environment: dict[str, str] = HERE) -> Iterator[VLLMProcess]:
    """A new node with the weights in a folder, which is ready, and has written everything when it has ended."""
    (library,) = (Path(sys.prefix) / "lib").glob("libiomp5.so")
    with (
        (logs / "vllm.log").open("a") as log,
        subprocess.Popen(
            [sys.executable, str(NODE), str(folder), where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment | {"LD_PRELOAD": str(library)},
        ) as process,
    ):
        assert process.stdin is not None
        try:
            made = VLLMProcess(process)
            made.answers()
            yield made
        finally:
            process.stdin.close()  # so that it ends by itself: a gigabyte of shared memory would stay behind
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            process.kill()


def weights_folder() -> Path:
    """SmolLM2's weights; skips the test without them."""
    found = sorted(lm.cache_dir().glob(f"{Path(lm.GGUF).stem}-*"))
    if not found:
        pytest.skip("SmolLM2's weights are not there; make test-vllm makes them")
    return found[0]


def prompts_of(folder: Path, count: int, length: int) -> list[list[int]]:
    """Runs of the text's tokens, one behind the other."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    return [ids[first : first + length] for first in range(0, count * length, length)]
