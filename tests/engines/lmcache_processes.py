"""LMCache's processes, with pqcodec as its serde: its storage manager in a process of its own, its server, its client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pqcodec.formats.engines.chunks import ChunkCodec

MANAGER = Path(__file__).with_name("lmcache_manager.py")
SHAPE, COUNT = (1, 3, 128, 2 * 2 * 64), 5
SERDE = {"type": "pqcodec", "preset": "pq4", "head_dim": 64, "kv_heads": 2, "rope": {"theta": 10000}}
CODEC = ChunkCodec.from_json({name: value for name, value in SERDE.items() if name != "type"})
ENVIRONMENT = os.environ | {"LMCACHE_TRACK_USAGE": "false", "HF_HUB_OFFLINE": "1"}


def plug_in(params: dict[str, Any], serde: dict[str, Any]) -> str:
    """The JSON of LMCache's command line for an adapter with these parameters behind pqcodec's serde."""
    return json.dumps(
        {
            "type": "plugin",
            "module_path": "pqcodec.formats.engines.lmcache",
            "class_name": "PQCodecL2Adapter",
            "adapter_params": params,
            "serde": serde,
        }
    )


def manager(verb: str, adapter: str, expected: int = 0) -> dict[str, Any]:
    """What a process printed that stored or loaded, and ended."""
    command = [sys.executable, str(MANAGER), verb, adapter, json.dumps(SHAPE), str(COUNT), str(expected)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@contextmanager
def server(
    adapter: str, log: Path, chunk_tokens: int = 128, environment: dict[str, str] = ENVIRONMENT
) -> Iterator[tuple[int, int]]:
    """LMCache's server on loopback, ready: its port for engines and the one for HTTP."""
    ports = free_port(), free_port()
    command = [sys.executable, "-m", "lmcache.cli.main", "server", "--host", "127.0.0.1", "--http-host", "127.0.0.1"]
    command += ["--port", str(ports[0]), "--http-port", str(ports[1]), "--chunk-size", str(chunk_tokens), "--l1-size-gb", "1"]
    command += ["--eviction-policy", "LRU", "--supported-transfer-mode", "auto", "--l2-adapter", adapter]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + 600  # where kernels are compiled on a busy machine
        while not all(map(listens, ports)) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        yield ports
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0
