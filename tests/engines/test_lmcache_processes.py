"""LMCache itself, with pqcodec as its serde: what one process stored another finds, damage is a miss, and its server starts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lmcache.v1.distributed.serde")
from lmcache_processes import CODEC, COUNT, ENVIRONMENT, SERDE, SHAPE, listens, manager, plug_in, server


def adapter_of(folder: Path, **options: Any) -> str:
    return plug_in({"type": "fs", "base_path": str(folder)}, SERDE | options)


def test_what_was_stored_is_found_after_a_restart_and_damage_is_a_miss_until_it_is_stored_anew(tmp_path: Path) -> None:
    adapter = adapter_of(tmp_path)
    assert manager("store", adapter, COUNT)["stored"]
    files = sorted(tmp_path.glob("*.data"))
    assert [file.stat().st_size for file in files] == COUNT * [CODEC.size(SHAPE, "bfloat16")]

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
def engine(ports: tuple[int, int], spec: str) -> str:
    """What LMCache's own client prints that stores and retrieves as an engine with such a cache does."""
    command = [
        sys.executable,
        "-m",
        "lmcache.cli.main",
        "bench",
        "server",
        "--mode",
        "cpu",
        "--num-blocks",
        "128",
        "--end",
        "2",
    ]
    command += [
        "--rpc-url",
        f"tcp://127.0.0.1:{ports[0]}",
        "--url",
        f"http://127.0.0.1:{ports[1]}",
        "--kvcache-shape-spec",
        spec,
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.mark.parametrize("spec", ["(2,128,16,2,64):bfloat16:3", "(1,128,16,2,128):bfloat16:3"], ids=["apart", "sent"])
def test_an_engine_finds_after_a_restart_of_the_server_what_it_stored(tmp_path: Path, spec: str) -> None:
    adapter, blocks = adapter_of(tmp_path / "blocks"), tmp_path / "blocks"
    with server(adapter, tmp_path / "log") as ports:
        first = engine(ports, spec)
        assert "[seq 0/cold] LOOKUP: 0/4" in first
        end = time.monotonic() + 60
        while len(list(blocks.glob("*.data"))) < 8 and time.monotonic() < end:
            time.sleep(0.2)
    files = list(blocks.glob("*.data"))
    assert [file.stat().st_size for file in files] == 8 * [CODEC.size(SHAPE, "bfloat16")]
    with server(adapter, tmp_path / "log") as ports:
        second = engine(ports, spec)
    for number in range(2):
        assert f"[seq {number}/cold] LOOKUP: 4/4" in second
    assert "(0 L1, 4 L2)" in (tmp_path / "log").read_text()


def test_the_server_does_not_start_with_a_wrong_configuration(tmp_path: Path) -> None:
    with server(adapter_of(tmp_path / "blocks", kv_heads=0), tmp_path / "log") as ports:
        assert not listens(ports[0])
    assert "kv_heads is 0; a whole number from 1 on is expected" in (tmp_path / "log").read_text()


# -- LMCache's own check -------------------------------------------------------------------------------------------
def test_lmcaches_own_check_takes_the_plug_ins_adapter_for_the_one_behind_it(tmp_path: Path) -> None:
    given = {name: value for name, value in json.loads(adapter_of(tmp_path)).items() if name != "serde"}  # it knows no chunks
    command = [sys.executable, "-m", "lmcache.v1.basic_check", "--mode", "test_l2_adapter", "--l2-adapter", json.dumps(given)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Validation (content): 5/5" in run.stdout
