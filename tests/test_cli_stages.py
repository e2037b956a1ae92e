"""``pqcodec encode`` with stages and shared tables: what streams have, what inspect shows, and refusals that name options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_cli import run, told
from test_cli_choices import error, normal

import pqcodec
from pqcodec.calibrate import rows_to_code, shared_levels, shared_ranges

CPU = ("--backend", "cpu")
ROPE = pqcodec.Rope(theta=500.0)
TURNED = ("--rope-theta", "500")
KEY, VALUE = "layers.0.key", "layers.1.value"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Keys and values [2, 60, 32] of two layers, and a tensor that is neither."""
    names = [f"layers.{layer}.{role}" for layer in range(2) for role in ("key", "value")]
    tensors = {name: normal(2, 60, 32, seed=seed) for seed, name in enumerate(names)}
    save_file(tensors | {"hidden": normal(60, 32)}, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def encoded(plain: Path, *options: Any) -> dict[str, Any]:
    """What inspect tells of the streams of a file that was made with these options and comes back; by names."""
    coded, again = plain.with_name("c.pqkv"), plain.with_name("d.safetensors")
    run("encode", plain, coded, "--force", *options, *CPU)
    run("decode", coded, again, "--force", "--fill", 0, *CPU)
    found = {tensor["name"]: tensor["stream"] | {"tables": tensor["tables"]} for tensor in told("inspect", coded)["tensors"]}
    x, y = load_file(plain), load_file(again)
    return {name: stream | {"error": error(x[name], y[name])} for name, stream in found.items()}


def lists(path: Path, **tensors: Any) -> Path:
    save_file({name.replace("_", "."): np.array(numbers) for name, numbers in tensors.items()}, path)
    return path


def test_stages_are_of_keys_and_values(plain: Path) -> None:
    found = encoded(plain, "--preset", "decoquant4", "--join-heads", "--blocks", "--center", "none")
    for name in (KEY, VALUE):
        assert (found[name]["preset"], found[name]["joined_heads"], found[name]["linear"]) == ("decoquant4", 2, "blocks")
        assert found[name]["error"] < 0.02
    assert (found["hidden"]["joined_heads"], found["hidden"]["linear"]) == (None, None)
    found = encoded(plain, "--preset", "quad3.5", "--join-heads", "--rank", "20")
    assert (found[VALUE]["width"], found[VALUE]["linear"], found[KEY]["centered"]) == (20, "basis", "mean")


def test_keys_are_coded_before_rope_and_values_are_not(plain: Path) -> None:
    found = encoded(plain, "--preset", "pq4", "--before-rope", *TURNED)
    assert [found[name]["before_rope"] for name in (KEY, VALUE, "hidden")] == [True, False, False]
    assert (found[KEY]["centered"], found[KEY]["error"] < 0.02) == ("mean", True)
    assert encoded(plain, "--preset", "int4", "--before-rope", *TURNED, "--center", "none")[KEY]["centered"] is None


def test_channels_are_those_of_keys_or_of_names(plain: Path) -> None:
    some = lists(plain.with_name("some.safetensors"), channels=range(0, 32, 2))
    found = encoded(plain, "--preset", "quad3", "--channels", some)
    assert (found[KEY]["width"], found[VALUE]["width"]) == (16, 32)
    by_name = lists(plain.with_name("n.safetensors"), layers_1_value=[[0, 1, 2], [3, 4, 5]], layers_0_key=range(30))
    found = encoded(plain, "--preset", "quad3", "--channels", by_name, "--keep", "4+40")
    assert (found[KEY]["width"], found[VALUE]["width"], found["layers.0.value"]["width"]) == (30, 3, 32)


def test_a_file_carries_tables_of_every_kind_once(plain: Path) -> None:
    """A basis and levels for all; then ranges and levels for the keys of each layer, calibrated by the tensors themselves."""
    folder, x = plain.parent, load_file(plain)
    basis, levels = pqcodec.BasisTable(np.eye(64)[:40]), pqcodec.LevelTable((-1, -0.3, 0.3, 1))
    for name, table in (("basis", basis), ("levels", levels)):
        (folder / f"{name}.pqt").write_bytes(table.to_bytes())
    both = ("--table", folder / "basis.pqt", "--table", folder / "levels.pqt")
    found = encoded(plain, "--preset", "nuq2", "--join-heads", *both)
    assert found[VALUE]["tables"] == [levels.name, basis.name]
    raw = (folder / "c.pqkv").read_bytes()
    assert (raw.count(basis.to_bytes()), raw.count(levels.to_bytes())) == (1, 1)
    assert f"shared table {basis.name}: a basis of 40 directions" in run("inspect", folder / "c.pqkv").stdout
    for kind in ("ranges", "fitted"):
        (folder / kind).mkdir()
    for layer in range(2):
        rows = rows_to_code(x[f"layers.{layer}.key"][:, 4:], rope=pqcodec.Rope(theta=500.0, first_position=4))
        ranges = shared_ranges(rows, "nuq3-key")
        (folder / "ranges" / f"key.{layer}.pqt").write_bytes(ranges.to_bytes())
        fitted = shared_levels(rows, "nuq3-key", ranges=ranges)
        (folder / "fitted" / f"key.{layer}.pqt").write_bytes(fitted.to_bytes())
    options = ("--preset", "nuq3-key", "--value-preset", "int4", "--before-rope", *TURNED)
    found = encoded(plain, *options, "--table", folder / "ranges", "--table", folder / "fitted")
    assert found["layers.1.key"]["tables"] == [fitted.name, ranges.name]
    assert (found[KEY]["centered"], found[VALUE]["tables"]) == (None, [])
    assert found[KEY]["error"] < 0.05


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--preset", "rvq8"), "--preset rvq8 needs codebooks: give --table PATH"),
        (("--value-preset", "rvq8"), "--preset rvq8 needs codebooks: give --table PATH"),
        (("--before-rope",), "--before-rope needs --rope-theta"),
        (("--before-rope", *TURNED, "--center", "rope"), "with --before-rope choose mean or none"),
        (("--blocks", "--rank", "3"), "--blocks and --rank exclude each other"),
        (("--rank", "0"), "--rank 0: a number of directions from 1 on"),
        (("--rank", "33"), "tensor 'layers.0.key': rows of 33 numbers of vectors of 32"),
        (("--channels", "in.safetensors"), "tensor 'layers.0.key'"),
        (("--channels", "none.npz"), "--channels none.npz: the file holds no tensor of channels"),
    ],
)
def test_refusals_name_the_options(plain: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str) -> None:
    monkeypatch.chdir(plain.parent)
    np.savez("none.npz")
    assert said in run("encode", plain, "c.pqkv", *options, *CPU, code=2).stderr


def test_tables_of_one_kind_are_given_once_and_folders_are_of_one_kind(plain: Path) -> None:
    folder = plain.with_name("tables")
    folder.mkdir()
    levels = pqcodec.LevelTable((-1, 1)).to_bytes()
    (folder / "key.pqt").write_bytes(levels)
    twice = ("--table", folder / "key.pqt", "--table", folder / "key.pqt")
    assert "levels are given twice" in run("encode", plain, "c.pqkv", *twice, code=2).stderr
    (folder / "value.0.pqt").write_bytes(pqcodec.BasisTable(np.eye(32)).to_bytes())
    found = run("encode", plain, "c.pqkv", "--table", folder, code=2).stderr
    assert "holds 2 levels and a basis of 32 directions" in found
    coded = plain.with_name("q.pqkv")
    run("encode", plain, coded, "--preset", "qjl", "--value-preset", "int2", "--include", "*key", *CPU)
    assert "ask by --estimate unbiased or shrunk" in run("decode", coded, plain.with_name("q.safetensors"), code=2).stderr
