"""LMCache itself, with pqcodec as its serde: what one process stored another finds, damage is a miss, and its server starts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pqcodec.formats.engines.chunks import ChunkCodec

pytest.importorskip("lmcache.v1.distributed.serde")
MANAGER = Path(__file__).with_name("lmcache_manager.py")
SHAPE, COUNT = (1, 3, 128, 2 * 2 * 64), 5
SERDE = {"type": "pqcodec", "head_dim": 64, "kv_heads": 2, "rope": {"theta": 10000}}
ENVIRONMENT = os.environ | {"LMCACHE_TRACK_USAGE": "false", "HF_HUB_OFFLINE": "1"}


def adapter_of(folder: Path, **options: Any) -> str:
    return json.dumps(
        {
            "type": "plugin",
            "module_path": "pqcodec.formats.engines.lmcache",
            "class_name": "PQCodecL2Adapter",
            "adapter_params": {"type": "fs", "base_path": str(folder)},
            "serde": {**SERDE, **options},
        }
    )


def manager(verb: str, adapter: str, expected: int = 0) -> dict[str, Any]:
    """What a process printed that stored or loaded, and ended."""
    command = [sys.executable, str(MANAGER), verb, adapter, json.dumps(SHAPE), str(COUNT), str(expected)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_what_was_stored_is_found_after_a_restart_and_damage_is_a_miss_until_it_is_stored_anew(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path)
    assert manager("store", adapter, COUNT)["stored"]
    files = sorted(tmp_path.glob("*.data"))
    size = ChunkCodec(64, 2, rope=None).size(SHAPE, "bfloat16")
    assert len(files) == COUNT
    assert len({file.stat().st_size for file in files}) == 1
    assert size <= files[0].stat().st_size < 0.3 * 2 * 3 * 128 * 256

    found = manager("load", adapter)
    assert found["found"] == list(range(COUNT))
    assert max(found["errors"]) < 0.01

    data = bytearray(files[2].read_bytes())
    data[len(data) // 2] ^= 4
    files[2].write_bytes(data)
    assert manager("load", adapter)["found"] == []  # LMCache gives up all objects of a task
    assert not files[2].exists()
    assert manager("load", adapter)["found"] == [0, 1]  # a prefix
    assert manager("store", adapter, 1)["stored"]
    assert manager("load", adapter)["found"] == list(range(COUNT))


def test_what_another_preset_wrote_is_a_miss(tmp_path: Path) -> None:
    assert manager("store", adapter_of(tmp_path), COUNT)["stored"]
    assert manager("load", adapter_of(tmp_path, preset="pq3"))["found"] == []
    assert manager("load", adapter_of(tmp_path))["found"] == list(range(COUNT))


# -- the server ----------------------------------------------------------------------------------------------------
def server(adapter: str, port: int, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lmcache.v1.multiprocess.server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--l1-size-gb", "1", "--eviction-policy", "LRU", "--l2-adapter", adapter]
    with log.open("wb") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def test_the_server_starts_with_kernels_that_are_compiled(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    process = server(adapter_of(tmp_path / "blocks"), port, log)
    try:
        end = time.monotonic() + 180
        while not listens(port) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        assert listens(port), log.read_text()
    finally:
        process.terminate()
        process.wait(60)
    assert "): ready" in log.read_text()


def test_the_server_does_not_start_with_a_wrong_configuration(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = server(adapter_of(tmp_path / "blocks", kv_heads=0), free_port(), log)
    assert process.wait(120) != 0
    assert "kv_heads is 0; a whole number from 1 on is expected" in log.read_text()
