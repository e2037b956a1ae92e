"""The command line as a process: pipes that nobody reads, signals that end it, and what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pqcodec.formats import save_cache
from pqcodec.formats.store.shelf import Shelf

CALL = [sys.executable, "-m", "pqcodec.tools.cli"]


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    x = np.random.default_rng(0).standard_normal((1, 2, 20, 64)).astype(np.float16)
    save_cache(tmp_path / "c.pqkv", 2 * [(x, x)], backend="reference")
    return tmp_path / "c.pqkv"


# -- closed pipes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [
        "inspect {coded}",
        "inspect {coded} {coded}",
        "inspect {coded} --json",
        "verify {coded} --backend reference",
        "store ls {store}",
        "store stats {store}",
        "encode --help",
        "--version",
    ],
)
def test_a_pipe_that_nobody_reads_ends_a_verb_quietly(arguments: str, coded: Path, tmp_path: Path) -> None:
    Shelf(tmp_path / "store").close()
    reader, writer = os.pipe()
    os.close(reader)
    words = arguments.format(coded=coded, store=tmp_path / "store").split()
    ended = subprocess.run([*CALL, *words], stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_an_error_that_nobody_reads_ends_a_verb(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run([*CALL, "inspect", tmp_path / "none"], stdout=writer, stderr=writer, timeout=60)
    os.close(writer)
    assert ended.returncode == 141
