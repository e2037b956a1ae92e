"""Fewer of the stores of ``lmcache_faults.py``, with the same laws."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmcache.v1.distributed.serde")
from lmcache_processes import ENVIRONMENT

SCRIPT = Path(__file__).with_name("lmcache_faults.py")
STORES = 300
KINDS = ("flip", "truncate", "torn", "another", "foreign", "version", "remove", "none")


def test_no_wrong_object_is_found_and_none_is_lost() -> None:
    command = [sys.executable, str(SCRIPT), "--stores", str(STORES), "--seed", "7"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert run.returncode == 0, run.stdout + run.stderr
    told = json.loads(run.stdout.splitlines()[-1])
    assert told["stores"] == STORES
    assert (told["wrong"], told["lost"], told["unstored"]) == (0, 0, 0)
    assert all(told[kind] for kind in KINDS)
    assert told["found"] + told["missed"] == STORES
    assert told["anew"] > 0
