"""``pqcodec encode`` with stages and shared tables: what streams have, what inspect shows, and refusals that name options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from spec_vectors import BOOKS
from test_cli import run, told
from test_cli_choices import error, normal

import pqcodec
from pqcodec.calibrate import rows_to_code, shared_levels, shared_ranges
from pqcodec.stream.tables import SharedTable

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


# -- single streams, whose tables are given ------------------------------------------------------------------------
@pytest.fixture
def streams(tmp_path: Path) -> dict[str, tuple[bytes, tuple[SharedTable, ...]]]:
    """Single streams of rows of 16 numbers in files, and the tables that they name, in files by their kinds."""
    levels, basis = pqcodec.LevelTable((-1, -0.3, 0.3, 1)), pqcodec.BasisTable(np.eye(16)[:6])
    ranges, x = pqcodec.RangeTable(np.ones((2, 2, 16)), width=16, channels=1), normal(2, 40, 16)
    made = {
        "books": (pqcodec.encode(x, preset="rvq2", codebooks=BOOKS, backend="cpu"), (BOOKS,)),
        "both": (pqcodec.encode(x, preset="nuq2", levels=levels, basis=basis, backend="cpu"), (basis, levels)),
        "ranges": (pqcodec.encode(x, preset="kivi2-key", ranges=ranges, backend="cpu"), (ranges,)),
    }
    (tmp_path / "streams").mkdir()
    for name, (stream, tables) in made.items():
        (tmp_path / "streams" / f"{name}.pqs").write_bytes(stream)
        for table in tables:
            (tmp_path / f"{table.option}.pqt").write_bytes(table.to_bytes())
    return made


def test_single_streams_are_decoded_by_the_tables_that_they_name(tmp_path: Path, streams: dict[str, Any]) -> None:
    """Any number of them in files, of which each stream takes what it names, and in a folder as train-vq writes it."""
    given = [option for kind in ("basis", "levels", "codebooks", "ranges") for option in ("--table", tmp_path / f"{kind}.pqt")]
    run("decode", tmp_path / "streams", tmp_path / "out", *given, *CPU)
    for name, (stream, tables) in streams.items():
        found = load_file(tmp_path / "out" / f"{name}.safetensors")[name]
        np.testing.assert_array_equal(found, pqcodec.decode(stream, tables=tables, backend="cpu"))
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "value.pqt").write_bytes(BOOKS.to_bytes())
    run("decode", tmp_path / "streams" / "books.pqs", tmp_path / "o.npy", "--table", folder, "--tokens", "3:9", *CPU)
    part = pqcodec.decode(streams["books"][0], tables=BOOKS, tokens=(3, 9), backend="cpu")
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), part)


@pytest.mark.parametrize(
    ("name", "missing", "held"),
    [("books", 0, "codebooks"), ("both", 0, "a basis"), ("both", 1, "levels"), ("ranges", 0, "ranges")],
)
def test_a_table_that_is_missing_is_told_with_what_to_do(
    tmp_path: Path, streams: dict[str, Any], name: str, missing: int, held: str
) -> None:
    path, tables = tmp_path / "streams" / f"{name}.pqs", streams[name][1]
    others = [
        option for table in tables if table != tables[missing] for option in ("--table", tmp_path / f"{table.option}.pqt")
    ]
    given = f", and none of the {len(others) // 2} that were given is it" if others else ""
    named = f"{path}: the stream names the shared table {tables[missing].name}, {held}"
    said = f"{named}{given}: give the file that holds it by --table PATH"
    for more in ((), ("--dry-run",), ("--fill", 0)):
        assert said in run("decode", path, tmp_path / "o.npy", *others, *more, *CPU, code=3).stderr
    assert said in run("convert", path, tmp_path / "o.pqkv", *others, code=3).stderr
    assert not list(tmp_path.glob("o.*"))


@pytest.mark.parametrize("kind", ["pqkv", "safetensors", "zarr"])
def test_converted_streams_bring_their_tables(tmp_path: Path, streams: dict[str, Any], kind: str) -> None:
    pytest.importorskip("zarr") if kind == "zarr" else None
    stream, tables = streams["both"]
    given = [option for table in tables for option in ("--table", tmp_path / f"{table.option}.pqt")]
    run("convert", tmp_path / "streams" / "both.pqs", tmp_path / f"c.{kind}", *given)
    run("decode", tmp_path / f"c.{kind}", tmp_path / "o.npy", *CPU)
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), pqcodec.decode(stream, tables=tables, backend="cpu"))


def test_of_many_streams_the_first_without_its_table_ends_the_work_before_it_begins(tmp_path: Path, streams: Any) -> None:
    given = ("--table", tmp_path / "codebooks.pqt")
    assert "both.pqs: the stream names" in run("decode", tmp_path / "streams", tmp_path / "out", *given, *CPU, code=3).stderr
    assert not (tmp_path / "out").exists()
    assert (
        run("decode", tmp_path / "streams", tmp_path / "out", *given, "--keep-going", *CPU, code=3).stderr.count("names the")
        == 2
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["books.safetensors"]
    not_one = tmp_path / "streams" / "books.pqs"
    assert "are no shared table" in run("decode", not_one, tmp_path / "o.npy", "--table", not_one, code=1).stderr
