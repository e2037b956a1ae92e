"""Many inputs on the command line: what becomes of the others when one fails, and what would be written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import REFERENCE, run, told

from pqcodec.formats.places import remote


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three inputs, of which the second one is no file that can be read."""
    place = tmp_path / "in"
    place.mkdir()
    for name in ("a", "c"):
        np.savez(place / f"{name}.npz", k_0=normal(2, 40, 64), v_0=normal(2, 40, 64), n=np.arange(3))
    (place / "b.npz").write_bytes(b"PK\x03\x04 and no more")
    return place


@pytest.fixture
def late(folder: Path) -> Path:
    """Likewise, but the second input's fault is among its numbers, so that only its own work finds it."""
    np.savez(folder / "b.npz", k_0=np.full((2, 40, 64), np.nan, np.float16))
    return folder


# -- one fails -----------------------------------------------------------------------------------------------------
def test_an_input_that_cannot_be_read_is_named_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    result = run("encode", folder, tmp_path / "out", *REFERENCE, code=1)
    assert "b.npz" in result.stderr
    assert not (tmp_path / "out").exists()
    assert "no tensor" in run("encode", folder / "a.npz", folder / "c.npz", tmp_path / "out", "--include", "x", code=2).stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_keep_going_does_the_others_and_lists_what_failed(folder: Path, tmp_path: Path, jobs: int) -> None:
    outcome = told("encode", folder, tmp_path / "out", "--keep-going", "--jobs", jobs, *REFERENCE, code=1)
    assert outcome["failed"] == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.pqkv", "c.pqkv"}
    result = run("encode", folder, tmp_path / "out", "--keep-going", "--force", "--jobs", jobs, *REFERENCE, code=1)
    assert "b.npz" in result.stderr.splitlines()[-1]
    assert result.stdout.count("failed") == 1


def test_without_it_work_ends_at_the_first_failure(late: Path, tmp_path: Path) -> None:
    outcome = told("encode", late, tmp_path / "out", *REFERENCE, code=2)
    assert [list(file) for file in outcome["files"]][1:] == [["file", "error"], ["file", "begun"]]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.pqkv"}
    assert "not begun" in run("encode", late, tmp_path / "out", "--force", *REFERENCE, code=2).stdout
    told("encode", late, tmp_path / "out", "--force", "--keep-going", *REFERENCE, code=2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a.pqkv", "c.pqkv"}


def test_outputs_that_exist_fail_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "b.npz").unlink()
    (tmp_path / "out").mkdir()
    run("encode", folder / "a.npz", tmp_path / "out", *REFERENCE)
    outcome = told("encode", folder, tmp_path / "out", "--keep-going", *REFERENCE, code=2)
    assert "--force" in outcome["files"][0]["error"]["message"]
    assert (tmp_path / "out" / "c.pqkv").exists()


@pytest.mark.parametrize("verb", ["decode", "convert"])
def test_decode_and_convert_do_likewise(verb: str, folder: Path, tmp_path: Path) -> None:
    coded = tmp_path / "coded"
    run("encode", folder, coded, "--keep-going", *REFERENCE, code=1)
    (coded / "b.pqkv").write_bytes((coded / "a.pqkv").read_bytes()[:-9])
    options = ("--to", "npz", *REFERENCE) if verb == "decode" else ("--to", "safetensors")
    assert "b.pqkv" in run(verb, coded, tmp_path / "out", *options, code=1).stderr
    assert not (tmp_path / "out").exists()
    assert told(verb, coded, tmp_path / "out", "--keep-going", *options, code=1)["failed"] == 1
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A pattern of URLs that the store does not list for this user."""

    def matching(pattern: str, folders: str = ".zarr") -> Any:
        raise PermissionError(13, "no credentials", pattern)

    monkeypatch.setattr(remote, "matching", matching)
    return "s3://bucket/*.npz"


def test_an_input_without_credentials_does_not_stop_the_others(forbidden: str, folder: Path, tmp_path: Path) -> None:
    sources = (forbidden, folder / "a.npz")
    refused = run("encode", *sources, tmp_path / "out", *REFERENCE, code=4)
    assert f"{forbidden}: no credentials" in refused.stderr
    assert not (tmp_path / "out").exists()
    outcome = told("encode", *sources, tmp_path / "out", "--keep-going", *REFERENCE, code=4)
    assert outcome["files"][0]["file"] == forbidden
    assert (tmp_path / "out" / "a.pqkv").exists()
    for verb in ("inspect", "verify"):
        assert told(verb, forbidden, tmp_path / "out", code=4)["failed"] == 1
    run("encode", forbidden, tmp_path / "none", "--keep-going", code=4)


# -- what would be written ---------------------------------------------------------------------------------------
def test_a_dry_run_tells_sizes_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    told_of = told("encode", folder / "a.npz", tmp_path / "o.pqkv", "--dry-run")
    assert (told_of["tensors"], told_of["exact_tensors"], told_of["dry_run"]) == (3, 1, True)
    assert not (tmp_path / "o.pqkv").exists()
    line = run("encode", folder / "a.npz", tmp_path / "o.pqkv", "--dry-run")
    assert line.stdout.startswith(f"would write {tmp_path / 'o.pqkv'}: 3 tensors (1 kept exactly), about ")
    assert "dtype int64" in line.stderr
    run("encode", folder / "a.npz", tmp_path / "o.pqkv", *REFERENCE)
    assert 0 < (tmp_path / "o.pqkv").stat().st_size - told_of["body_bytes"] < 2000
    assert "--force" in run("encode", folder / "a.npz", tmp_path / "o.pqkv", "--dry-run", code=2).stderr
    before = set(tmp_path.rglob("*"))
    decoded = told("decode", tmp_path / "o.pqkv", tmp_path / "o.npz", "--dry-run", "--only", "k_0", "--tokens", ":10")
    assert decoded["tensor_bytes"] == 2 * 10 * 64 * 2
    converted = told("convert", tmp_path / "o.pqkv", tmp_path / "o.safetensors", "--dry-run")
    assert (converted["tensors"], converted["exact_tensors"]) == (3, 1)
    assert set(tmp_path.rglob("*")) == before


def test_a_dry_run_of_many_is_a_table_and_names_what_fails(folder: Path, tmp_path: Path) -> None:
    result = run("encode", folder, tmp_path / "out", "--dry-run", "--keep-going", code=1)
    assert "to about" in result.stdout
    assert "b.npz" in result.stderr
    assert not (tmp_path / "out").exists()
