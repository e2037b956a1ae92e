"""The verbs ``doctor`` and ``warmup``."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from pqcodec.codings.presets import DEFAULT_PRESET
from pqcodec.errors import BackendUnavailable
from pqcodec.kernels.cpu.backend import Cpu
from pqcodec.tools import doctor
from pqcodec.tools.cli import app


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def test_doctor_says_what_works_and_where_kernels_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TIMED_BYTES", 1 << 16)
    monkeypatch.setitem(doctor.PACKAGES, "no-such-package", "zarr")
    lines = run("doctor").stdout.splitlines()
    assert all(len(line) <= 80 for line in lines if not line.startswith("compiled kernels"))
    assert any(line.split() == ["cpu", "works"] for line in lines)
    assert "  no-such-package not installed: pip install 'pqcodec[zarr]'" in lines
    found = json.loads(run("doctor", "--json").stdout)
    assert found["backends"]["reference"] == "works"
    assert found["speed"]["preset"] == DEFAULT_PRESET
    assert found["speed"]["encode_gb_s"] > 0 < found["speed"]["decode_gb_s"]


def test_doctor_names_what_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any) -> None:
        raise BackendUnavailable("numba is ill")

    monkeypatch.setattr(Cpu, "__init__", broken)
    assert "  cpu            does not work: numba is ill" in run("doctor", code=1).stdout.splitlines()


def test_warmup_codes_every_kind_and_refuses_by_name() -> None:
    assert "9 kinds of streams are compiled" in run("warmup", "--preset", "pq2", "--head-dim", "20").stderr
    assert "device 'nope' is not there" in run("warmup", "--device", "nope", code=2).stderr
    assert "preset 'nix' is unknown" in run("warmup", "--preset", "nix", code=2).stderr
