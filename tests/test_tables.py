"""Tables in narrow terminals: whole numbers, and names of any length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from pqcodec.formats import PQKVWriter
from pqcodec.tools import inspect, jobs, tables
from pqcodec.tools.cli import app
from pqcodec.tools.store import listing

LONG = "model." + "x" * 5000 + ".key"


@pytest.fixture
def coded(tmp_path: Path) -> Path:
    x = np.random.default_rng(0).standard_normal((1, 2, 20, 64)).astype(np.float16)
    with PQKVWriter(tmp_path / "c.pqkv") as writer:
        for layer, name in ((0, "layers.0.key"), (1, "layers.1.key"), (None, LONG), (None, "漢字" * 300)):
            writer.add(name, x, layer=layer, role="key", preset="pq3", backend="reference")
    return tmp_path / "c.pqkv"


def printed(width: int, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> list[str]:
    for module in (inspect, jobs, listing, tables):
        monkeypatch.setattr(module, "console", lambda: Console(width=width))
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 120, 200])
@pytest.mark.parametrize("options", [[], ["--tensors"]])
def test_numbers_are_never_cut(width: int, options: list[str], coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for line in printed(width, monkeypatch, "inspect", coded, *options) if "3.288" in line]
    assert len(lines) == 4
    for line in lines:
        cells = line.split()
        assert sum("…" in cell for cell in cells) <= 1  # in the name
        assert "…" not in "".join(cells[1:])
        assert cells[-1].endswith("x")
    names = [line for line in lines if line.startswith("model.")]
    assert len(names) == 1
    assert names[0].split()[0].endswith(".key")


def test_a_table_is_no_wider_than_it_need_be(coded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(100, monkeypatch, "inspect", coded, "--tensors")
    assert max(map(len, lines)) <= 100
    assert lines[-5].startswith("name ")


def test_names_of_files_are_shortened(coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = tmp_path / ("y" * 200 + ".pqkv")
    longer.write_bytes(coded.read_bytes())
    lines = printed(80, monkeypatch, "inspect", coded, longer)
    assert len(lines) == 3
    assert max(map(len, lines)) <= 80
    assert lines[2].split()[0].endswith(".pqkv")


@pytest.mark.parametrize("text", ["keys", "k" * 99, "漢字" * 20, "", "a b " * 20])
@pytest.mark.parametrize("width", [3, 10, 11, 40])
def test_shortened(text: str, width: int) -> None:
    from rich.cells import cell_len

    found = tables.shortened(text, width)
    assert cell_len(found) <= width
    assert found == text or "…" in found


def test_notes_of_encode_shorten_names(tmp_path: Path) -> None:
    x: Any = np.ones((2, 8, 64), np.float16)
    np.savez(tmp_path / "in.npz", **{"z" * 3000: x, "layers.0.key": x})
    result = CliRunner().invoke(app, ["encode", str(tmp_path / "in.npz"), str(tmp_path / "o.pqkv"), "--backend", "reference"])
    assert max(map(len, result.stderr.splitlines())) < 200
