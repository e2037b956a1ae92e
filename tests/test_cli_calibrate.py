"""``pqcodec calibrate``: the tables that Python finds, the errors that it tells, what encode makes of them, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_cli import run, told
from test_cli_choices import error, normal

import pqcodec
from pqcodec.bases import data_basis
from pqcodec.calibrate import rows_to_code, shared_levels, shared_ranges
from pqcodec.stream.tables import SharedTable

TURNED = ("--rope-theta", "500")
SKIP, TOKENS = 4, 104  # of which the last 10 are held out
SEEN = slice(SKIP, TOKENS - 10)


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Two files of keys and values [2, 104, 32] of two layers; keys have a mean and strong channels."""
    names = [f"layers.{layer}.{role}" for layer in range(2) for role in ("key", "value")]
    for file in range(2):
        tensors = {name: normal(2, TOKENS, 32, seed=10 * file + seed) for seed, name in enumerate(names)}
        keys = {name: (x * np.linspace(0.5, 2, 32) + 3).astype(np.float16) for name, x in tensors.items() if "key" in name}
        save_file(tensors | keys, tmp_path / f"{file}.safetensors")
    return [tmp_path / f"{file}.safetensors" for file in range(2)]


def rows_of(texts: list[Path], name: str, **options: Any) -> list[np.ndarray]:
    return [rows_to_code(load_file(path)[name], **options)[..., SEEN, :] for path in texts]


def table_at(path: Path) -> SharedTable:
    return SharedTable.from_bytes(path.read_bytes())


def test_ranges_of_keys_before_rope_and_levels_that_go_with_them(texts: list[Path], tmp_path: Path) -> None:
    said = told("calibrate", *texts, tmp_path / "ranges", "--ranges", "nuq3-key", "--role", "key", *TURNED)
    with_ranges = ("--table", tmp_path / "ranges", "--role", "key", *TURNED)
    fitted = told("calibrate", *texts, tmp_path / "levels", "--levels", "nuq3-key", *with_ranges)
    for layer in range(2):
        rows = rows_of(texts, f"layers.{layer}.key", rope=pqcodec.Rope(theta=500.0))
        ranges = shared_ranges(rows, "nuq3-key")
        assert table_at(tmp_path / "ranges" / f"key.{layer}.pqt") == ranges
        assert table_at(tmp_path / "levels" / f"key.{layer}.pqt") == shared_levels(rows, "nuq3-key", ranges=ranges)
    assert [one["content"].split()[0] for one in said["files"] + fitted["files"]] == ["ranges", "ranges", "8", "8"]
    assert all(0.001 < one["rel_mse"] < 0.03 for one in said["files"] + fitted["files"])
    assert not list(tmp_path.glob("*/value*"))
    options = ("--preset", "nuq3-key", "--value-preset", "int4", "--before-rope", *TURNED)
    run("encode", texts[0], tmp_path / "c.pqkv", *options, "--table", tmp_path / "ranges", "--table", tmp_path / "levels")
    run("decode", tmp_path / "c.pqkv", tmp_path / "o.safetensors")
    x, y = load_file(texts[0])["layers.1.key"], load_file(tmp_path / "o.safetensors")["layers.1.key"]
    assert error(x[:, SKIP:], y[:, SKIP:]) == pytest.approx(fitted["files"][1]["rel_mse"], rel=0.3)


def test_levels_by_themselves_are_of_keys_less_their_mean(texts: list[Path], tmp_path: Path) -> None:
    run("calibrate", *texts, tmp_path / "levels", "--levels", "nuq2", "--skip", 0)
    for role in ("key", "value"):
        rows = [load_file(path)[f"layers.0.{role}"].astype(np.float32) for path in texts]
        rows = [x - x.mean(-2, keepdims=True) if role == "key" else x for x in rows]
        assert table_at(tmp_path / "levels" / f"{role}.0.pqt") == shared_levels([x[:, :-10] for x in rows], "nuq2")


@pytest.mark.parametrize("joined", [False, True])
def test_bases_of_heads_and_of_all_heads_joined(texts: list[Path], tmp_path: Path, joined: bool) -> None:
    more = ("--join-heads",) if joined else ()
    said = told("calibrate", *texts, tmp_path / "basis", "--rank", 20, *TURNED, *more)
    for role, rope in (("key", pqcodec.Rope(theta=500.0)), ("value", None)):
        rows = [rows_to_code(load_file(path)[f"layers.1.{role}"], rope=rope, join_heads=joined) for path in texts]
        rows = [x[..., SKIP:, :] - (x[..., SKIP:, :].mean(-2, keepdims=True) if rope else 0) for x in rows]
        seen, held = ([x[..., cut, :].reshape(-1, x.shape[-1]) for x in rows] for cut in (slice(-10), slice(-10, None)))
        basis = pqcodec.BasisTable(data_basis(np.concatenate(seen)[None], 20))
        assert table_at(tmp_path / "basis" / f"{role}.1.pqt") == basis
        (one,) = (one for one in said["files"] if one["file"].endswith(f"{role}.1.pqt"))
        left = np.concatenate(held) @ basis.basis.T @ basis.basis
        assert one["rel_mse"] == pytest.approx(error(np.concatenate(held), left), rel=1e-3)
    options = ("--preset", "q8_0", "--before-rope", *TURNED, *more, "--table", tmp_path / "basis")
    assert "relMSE" in run("encode", texts[0], tmp_path / "c.pqkv", *options).stdout


def test_one_table_for_all_layers_out_of_encoded_files(texts: list[Path], tmp_path: Path) -> None:
    run("encode", texts[0], tmp_path / "t.pqkv", "--preset", "pq6")
    one = ("calibrate", tmp_path / "t.pqkv", tmp_path / "all", "--ranges", "int4", "--together", "--role", "value")
    assert "ranges of 2 heads, rows of 32 numbers, groups of 32 channels" in run(*one).stdout
    assert [path.name for path in (tmp_path / "all").iterdir()] == ["value.pqt"]
    assert "exists; pass --force" in run(*one, code=2).stderr
    before = (tmp_path / "all" / "value.pqt").read_bytes()
    assert "relMSE 0.0" in run(*one, "--skip", 60, "--force").stdout
    assert (tmp_path / "all" / "value.pqt").read_bytes() != before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "nothing to find: give one of --ranges, --levels and --rank"),
        (("--ranges", "nuq3", "--rank", "3"), "--ranges and --rank to find: give one"),
        (("--rank", "3", "--role", "hidden"), "--role 'hidden' is unknown"),
        (("--rank", "3", "--skip", "-1"), "--skip -1: a number of tokens from 0 on"),
        (("--rank", "3", "--table", "levels.pqt"), "--table is for ranges that --levels are to go with"),
        (("--levels", "nuq2", "--table", "levels.pqt"), "--table is for ranges that --levels are to go with"),
        (("--rank", "3", "--rope-style", "half"), "need --rope-theta"),
        (("--rank", "33"), "key.0.pqt: rank 33: a whole number from 1 to 32"),
        (("--ranges", "pq3"), "key.0.pqt: preset 'pq3' has no scales"),
        (("--levels", "int4"), "key.0.pqt: preset 'int4' has no levels"),
        (("--ranges", "nuq3", "--skip", "104"), "key.0.pqt: no token is left to look at: give longer texts, or a --skip below"),
        (("--levels", "nuq3", "--skip", "500"), "key.0.pqt: no token is left to look at: give longer texts, or a --skip below"),
        (("--rank", "3", "--role", "key", "--keys", "nothing", "--values", "."), "no tensor is a key by name; use --keys"),
        (("--rank", "3", "--keys", "nothing", "--values", "nothing"), "no tensor is a key or a value by name"),
    ],
)
def test_refusals_name_the_options_and_the_table(
    texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("levels.pqt").write_bytes(pqcodec.LevelTable((-1, -0.3, 0.3, 1)).to_bytes())
    assert said in run("calibrate", *texts, "tables", *options, code=2).stderr
    assert not list(Path("tables").glob("*"))


def test_tensors_without_a_table_in_common_are_named(texts: list[Path], tmp_path: Path) -> None:
    odd, name = tmp_path / "odd.safetensors", "layers.0.key"

    def refused(x: Any, *options: Any) -> str:
        save_file({name: x}, odd)
        return run("calibrate", texts[0], odd, tmp_path / "tables", "--role", "key", *options, code=2).stderr

    wide = normal(2, TOKENS, 48, seed=1)
    assert "key.0.pqt: vectors of 32 and 48 numbers have no basis in common" in refused(wide, "--rank", 3)
    assert f"{odd}: tensor '{name}': dtype int32" in refused(np.ones((2, TOKENS, 32), np.int32), "--rank", 3)
    assert f"{odd}: tensor '{name}': x (32,): [..., tokens, head_dim]" in refused(np.ones(32, np.float16), "--levels", "nuq2")
    assert not list((tmp_path / "tables").glob("*"))
    save_file({name: wide}, odd)
    run("calibrate", texts[0], odd, tmp_path / "tables", "--role", "key", "--levels", "nuq2")  # which rows of any width share


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--levels", "nuq2"), "no number differs from others of its group"), (("--rank", "3"), "all vectors are 0")],
)
def test_keys_that_are_their_mean_have_no_table(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    save_file({"layers.0.key": np.ones((2, TOKENS, 32), np.float16)}, tmp_path / "kv.safetensors")
    assert f"key.0.pqt: {said}" in run("calibrate", tmp_path / "kv.safetensors", tmp_path / "t", *options, code=2).stderr


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("-", "FOLDER is '-', but tables are several files: name a folder"),
        ("memory://b/x", "memory://b/x: is a URL; tables are"),
    ],
)
def test_tables_go_into_a_local_folder(
    texts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in run("calibrate", texts[0], folder, "--rank", 3, code=2).stderr
    assert said in run("train-vq", texts[0], folder, code=2).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.safetensors", "1.safetensors"]
    given = ("--preset", "nuq2", "--table", "memory://b/x/key.0.pqt")
    assert "is a URL; --table takes a local file or folder" in run("encode", texts[0], "c.pqkv", *given, code=2).stderr


def test_a_short_text_is_left_out_and_large_numbers_have_an_error(texts: list[Path], tmp_path: Path) -> None:
    save_file({name: x[:, :SKIP] for name, x in load_file(texts[0]).items()}, tmp_path / "short.safetensors")
    run("calibrate", texts[0], tmp_path / "one", "--ranges", "nuq3-key", "--role", "key")
    run("calibrate", texts[0], tmp_path / "short.safetensors", tmp_path / "two", "--ranges", "nuq3-key", "--role", "key")
    assert table_at(tmp_path / "one" / "key.1.pqt") == table_at(tmp_path / "two" / "key.1.pqt")
    save_file({"layers.0.value": normal(2, TOKENS, 32).astype(np.float32) * 1e30}, tmp_path / "large.safetensors")
    large = told("calibrate", tmp_path / "large.safetensors", tmp_path / "large", "--rank", 3)
    assert 0.5 < large["rel_mse"] < 1
