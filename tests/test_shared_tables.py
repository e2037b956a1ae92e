"""Tables that many streams share (SPEC 16.3): named by SHA-256, given to every reader, carried once, and missed by name."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import second_decoder
from conftest import BACKENDS
from damage import no_shared_table
from safetensors import safe_open
from safetensors.numpy import save_file
from test_pqkv import assemble, frame, sealed
from typer.testing import CliRunner

import pqcodec
from pqcodec import CorruptStream, InvalidArgument, LevelTable, MissingTable, PQError, SharedTable, UnsupportedStream
from pqcodec.attention import scores
from pqcodec.codec import decode_together
from pqcodec.formats import PQKVFile, PQKVWriter
from pqcodec.formats.cache import layer_pairs
from pqcodec.formats.containers.kinds import convert, open_encoded, write
from pqcodec.formats.containers.pqkv.appender import PQKVAppender
from pqcodec.formats.policy.recipe import Recipe, layers_by_name
from pqcodec.tools.cli import app

TABLE, OTHER = LevelTable((-1, -0.25, 0.25, 1)), LevelTable((-1, 1))
RAW = TABLE.to_bytes()
X = np.random.default_rng(0).standard_normal((2, 40, 16)).astype(np.float16)
NAMED = {"preset": "nuq2", "levels": TABLE, "backend": "cpu"}
STREAM = pqcodec.encode(X, **NAMED)
CARRIED = pqcodec.decode(pqcodec.encode(X, preset="nuq2", levels=TABLE.levels, backend="cpu"), backend="cpu")
MISSED = f"the stream needs the shared table {TABLE.name}, which is not here"


# -- tables --------------------------------------------------------------------------------------------------------
def test_a_name_is_the_hash_of_the_bytes() -> None:
    assert b"\x89PQT\x01\x01\0\0\x04\0\0\0" + np.array([-1, -0.25, 0.25, 1], "<f2").tobytes() == RAW
    assert TABLE.name == hashlib.sha256(RAW).hexdigest()
    assert SharedTable.from_bytes(RAW) == TABLE
    for bits in range(1, 9):
        table = LevelTable(tuple(np.linspace(-1, 1, 1 << bits)))
        assert SharedTable.from_bytes(table.to_bytes()) == table
        assert second_decoder.table_refusal(table.name, table.to_bytes()) == ""


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ((), "0 levels: 2, 4, 8, 16, 32, 64, 128, 256 are possible"),
        ((1, 2, 3), "3 levels: 2, 4, 8, 16"),
        ((2, 1), "levels are not finite, or do not ascend"),
        ((0, float("nan")), "levels are not finite, or do not ascend"),
        ((0, 1e6), "numbers within float16 are expected"),
        (None, "levels None: numbers within float16 are expected"),
    ],
)
def test_levels_that_are_no_table_are_refused(levels: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        LevelTable(levels)


FORGED = [  # bytes that are no table, and the error
    (b"", CorruptStream),
    (RAW[:11], CorruptStream),
    (b"\x89PQS" + RAW[4:], CorruptStream),
    (RAW[:-1], CorruptStream),
    (RAW + b"\0", CorruptStream),
    (RAW[:4] + b"\2" + RAW[5:], UnsupportedStream),
    (RAW[:5] + b"\xff" + RAW[6:], UnsupportedStream),
    (RAW[:5] + b"\2" + RAW[6:], UnsupportedStream),  # its first two levels are reserved bytes there
    (RAW[:7] + b"\1" + RAW[8:], UnsupportedStream),
    (RAW[:8] + struct.pack("<I", 1 << 31) + RAW[12:], CorruptStream),
    (RAW[:8] + struct.pack("<I", 3) + RAW[12:18], CorruptStream),
    (RAW[:12] + b"\0\x7c" + RAW[14:], CorruptStream),
    (RAW[:12] + b"\0\x3c" + RAW[14:], CorruptStream),
    (RAW[:8] + struct.pack("<I", 512) + bytes(1024), CorruptStream),
]


@pytest.mark.parametrize(("raw", "error"), FORGED)
def test_bytes_that_are_no_table_are_refused(raw: bytes, error: type[PQError]) -> None:
    no_shared_table(raw, error)


# -- streams -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_that_names_a_table_decodes_as_one_that_carries_it(backend: str) -> None:
    assert pqcodec.encode(X, preset="nuq2", levels=TABLE, backend=backend) == STREAM
    for tables in (TABLE, [OTHER, TABLE], {"any": TABLE}):
        np.testing.assert_array_equal(pqcodec.decode(STREAM, tables=tables, backend=backend), CARRIED)
    part = pqcodec.decode(STREAM, tables=TABLE, tokens=(5, 30), leading=(1, 2), backend=backend)
    np.testing.assert_array_equal(part, CARRIED[1:, 5:30])
    np.testing.assert_array_equal(second_decoder.decode(STREAM, [RAW]).view(np.float16), CARRIED)
    assert len(STREAM) == pqcodec.encoded_size(X.shape, preset="nuq2", levels=TABLE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_that_is_not_there_is_missed_by_its_name(backend: str) -> None:
    for tables in ((), [OTHER]):
        with pytest.raises(MissingTable, match=MISSED):
            pqcodec.decode(STREAM, tables=tables, backend=backend)
    with pytest.raises(MissingTable, match=MISSED):
        decode_together([pqcodec.given_tables(STREAM, OTHER)], [np.empty_like(X)], [0], backend=backend)
    with pytest.raises(MissingTable, match=MISSED):
        scores(STREAM, np.ones((2, 1, 16), np.float32), backend=backend)
    assert pqcodec.verify(STREAM, backend=backend) == []
    damaged = STREAM[:-1] + bytes([STREAM[-1] ^ 1])
    assert len(pqcodec.verify(damaged, backend=backend)) == 1


def test_other_functions_take_streams_with_their_tables() -> None:
    given = pqcodec.given_tables(STREAM, [TABLE])
    out = np.empty_like(X)
    decode_together([given, given], [out, out], [0, 0])
    np.testing.assert_array_equal(out, CARRIED)
    q = np.random.default_rng(1).standard_normal((2, 3, 16)).astype(np.float32)
    np.testing.assert_allclose(
        scores(given, q), q @ CARRIED.astype(np.float32).swapaxes(1, 2) / 4, atol=2e-3
    )  # keys are not rounded
    found = pqcodec.inspect(given)
    assert (found.preset, found.table, found.levels) == ("nuq2", TABLE.name, TABLE.levels)
    assert pqcodec.inspect(STREAM).levels is None


def test_a_table_of_another_number_of_levels_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="levels: 2 levels for codes of 2 bits"):
        pqcodec.encode(X, preset="nuq2", levels=OTHER)
    size = struct.unpack_from("<I", STREAM, 8)[0]
    head = sealed(STREAM[: size - 36] + OTHER.digest)
    with pytest.raises(CorruptStream, match=f"shared table {OTHER.name}: 2 levels for codes of 2 bits"):
        pqcodec.decode(head + STREAM[size:], tables=OTHER)
    assert second_decoder.missing(head + STREAM[size:], [OTHER.to_bytes()]) == "corrupt"


def test_what_is_no_table_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="a SharedTable or a list of them is expected"):
        pqcodec.decode(STREAM, tables=[RAW])


# -- containers ----------------------------------------------------------------------------------------------------
def written(path: Path) -> Path:
    """A file of two tensors that share a table, and one that has none."""
    with PQKVWriter(path) as writer:
        writer.add("layers.0.key", X, layer=0, role="key", **NAMED)
        writer.add("layers.0.value", -X, layer=0, role="value", **NAMED)
        writer.add("others", X, preset="pq3", backend="cpu")
    return path


def test_a_file_carries_a_table_once(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pqkv")
    data = path.read_bytes()
    assert data.count(RAW) == 1
    with PQKVFile(path) as file:
        assert file.names == ("layers.0.key", "layers.0.value", "others")
        assert list(file.tables.values()) == [TABLE]
        np.testing.assert_array_equal(file.decode("layers.0.key"), CARRIED)
        np.testing.assert_array_equal(file.decode("layers.0.key", tokens=(3, 9)), CARRIED[:, 3:9])
        np.testing.assert_array_equal(pqcodec.decode(file.stream("layers.0.key")), CARRIED)
        assert file.verify() == []
        assert file.bare_stream("layers.0.key") is None


@pytest.mark.parametrize("ways", [["b.safetensors"], ["b.zarr"], ["b.pqkv"], ["b.zarr", "c.safetensors", "d.pqkv"]])
def test_converting_carries_tables_along(tmp_path: Path, ways: list[str]) -> None:
    path = written(tmp_path / "a.pqkv")
    for name in ways:
        if name.endswith("zarr"):
            pytest.importorskip("zarr")
        convert(path, tmp_path / name)
        path = tmp_path / name
    with open_encoded(path) as file:
        assert list(file.tables.values()) == [TABLE]
        ((key, value),) = layer_pairs(file)
        np.testing.assert_array_equal(key, CARRIED)
        np.testing.assert_array_equal(value, pqcodec.decode(pqcodec.encode(-X, **NAMED), tables=TABLE))
        assert file.verify() == []


@pytest.mark.parametrize("kind", ["pqkv", "safetensors", "zarr"])
def test_a_recipe_takes_a_table(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("zarr" if kind == "zarr" else "numpy")
    recipe = Recipe("nuq2", levels=TABLE, measured="all", stream_tokens=16, share_bits=False)
    write(tmp_path / "cache", recipe.pieces(*layers_by_name([(X, X)])), to=kind)
    with open_encoded(tmp_path / "cache") as file:
        assert list(file.tables.values()) == [TABLE]
        assert 0 < file.entry("layers.0.key").rel_mse < 0.3
        assert file.decode("layers.0.key").shape == X.shape


def test_a_file_that_grows_has_each_table_once(tmp_path: Path) -> None:
    path, more = written(tmp_path / "a.pqkv"), LevelTable((-1, -0.5, 0.5, 1))
    with PQKVAppender(path) as writer:
        writer.extend("layers.0.key", X, **NAMED)
        writer.add("new", X, **NAMED | {"levels": more})
    data = path.read_bytes()
    assert (data.count(RAW), data.count(more.to_bytes())) == (1, 1)
    with PQKVFile(path) as file:
        assert set(file.tables.values()) == {TABLE, more}
        np.testing.assert_array_equal(file.decode("layers.0.key"), np.concatenate([CARRIED, CARRIED], 1))
        assert file.verify() == []


@pytest.mark.parametrize("kind", ["pqkv", "safetensors", "zarr"])
def test_no_file_is_written_without_a_table_that_its_streams_name(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("zarr") if kind == "zarr" else None
    (tmp_path / "s.pqs").write_bytes(STREAM)
    for tables in ((), [OTHER]):
        with pytest.raises(MissingTable, match=f"tensor 's': its stream names the shared table {TABLE.name}, without which"):
            convert(tmp_path / "s.pqs", tmp_path / f"s.{kind}", tables=tables)
    assert [path.name for path in tmp_path.iterdir()] == ["s.pqs"]
    convert(tmp_path / "s.pqs", tmp_path / f"s.{kind}", tables=[OTHER, TABLE])
    with open_encoded(tmp_path / f"s.{kind}") as file:
        assert list(file.tables.values()) == [TABLE]
        np.testing.assert_array_equal(file.decode("s"), CARRIED)


def test_a_writer_takes_streams_whose_table_its_file_carries(tmp_path: Path) -> None:
    with PQKVWriter(tmp_path / "a.pqkv") as writer:
        with pytest.raises(MissingTable, match=f"tensor 'k': its stream names the shared table {TABLE.name}"):
            writer.add_stream("k", STREAM)
        writer.add_stream("given", pqcodec.given_tables(STREAM, TABLE))
        writer.add_stream("k", STREAM)
    with PQKVFile(tmp_path / "a.pqkv") as file:
        np.testing.assert_array_equal(file.decode("k"), CARRIED)
    with PQKVAppender(tmp_path / "a.pqkv") as appender:
        appender.add_stream("more", STREAM)
    with PQKVFile(tmp_path / "a.pqkv") as file:
        np.testing.assert_array_equal(file.decode("more"), CARRIED)


def lacking(path: Path) -> Path:
    """A file of two parts of a tensor, 'k', whose table it lacks, as others may write it; by its extension of any container."""
    about = {"name": "k", "layer": 0, "role": "key", "shape": [2, 40, 16], "dtype": "float16", "layout": "..."}
    whole = path.with_name("whole.pqkv")
    whole.write_bytes(assemble(frame(1, json.dumps(about).encode(), STREAM)))
    if path.suffix == ".safetensors":
        convert(written(path.with_name("with.pqkv")), path)
        with safe_open(path, "numpy") as file:
            metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, path, {key: text for key, text in metadata.items() if key != "pqcodec_tables"})
        return path
    return whole.rename(path)


@pytest.mark.parametrize(("suffix", "name"), [(".pqkv", "k"), (".safetensors", "layers.0.key")])
def test_a_file_that_lacks_a_table_is_given_it(tmp_path: Path, suffix: str, name: str) -> None:
    path = lacking(tmp_path / f"lacking{suffix}")
    said = rf"tensor '{name}': {MISSED}; .* open_encoded\(path, tables=\["
    with open_encoded(path) as file, pytest.raises(MissingTable, match=said):
        file.decode(name)
    with open_encoded(path, [OTHER, TABLE]) as file:
        assert not file.tables
        np.testing.assert_array_equal(file.decode(name), CARRIED)
    with pytest.raises(MissingTable, match=f"tensor '{name}': its stream names"):
        convert(path, tmp_path / "mended.pqkv")
    convert(path, tmp_path / "mended.pqkv", tables=[OTHER, TABLE])
    with PQKVFile(tmp_path / "mended.pqkv") as file:
        assert list(file.tables.values()) == [TABLE]
        np.testing.assert_array_equal(file.decode(name), CARRIED)


@pytest.mark.parametrize("suffix", [".pqkv", ".safetensors"])
def test_the_command_line_gives_files_the_tables_that_they_lack(tmp_path: Path, suffix: str) -> None:
    def run(*words: Any) -> Any:
        return CliRunner().invoke(app, list(map(str, words)))

    path, table = lacking(tmp_path / f"lacking{suffix}"), tmp_path / "levels.pqt"
    table.write_bytes(RAW)
    (tmp_path / "other.pqt").write_bytes(OTHER.to_bytes())
    for verb, output, said in (
        (
            "decode",
            "o.safetensors",
            f" names the shared table {TABLE.name}, levels{{}}: give the file that holds it by --table",
        ),
        ("convert", "o.pqkv", f": its stream names the shared table {TABLE.name}, without which nobody could decode the file"),
    ):
        for given, more in (((), ""), (("--table", tmp_path / "other.pqt"), ", and none of the 1 that were given is it")):
            refused = run(verb, path, tmp_path / output, *given)
            assert refused.exit_code == 3
            assert f"{path}: tensor '" in refused.stderr
            assert said.format(more) in refused.stderr
        assert not (tmp_path / output).exists()
        assert run(verb, path, tmp_path / output, "--table", table).exit_code == 0
        assert (tmp_path / output).exists()


def tabled(name: str, raw: bytes, *, checked: bool = True, **meta: Any) -> bytes:
    """A file of a table and a tensor that names TABLE."""
    body = sealed(raw) if checked else raw + bytes(4)
    about = {"name": "k", "layer": 0, "role": "key", "shape": [2, 40, 16], "dtype": "float16", "layout": "..."}
    return assemble(frame(6, json.dumps({"table": name} | meta).encode(), body), frame(1, json.dumps(about).encode(), STREAM))


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        (tabled(OTHER.name, OTHER.to_bytes()), MissingTable, f"tensor 'k': {MISSED}"),
        (tabled(TABLE.name, OTHER.to_bytes()), CorruptStream, "are not those of that name"),
        (tabled(TABLE.name, RAW, checked=False), CorruptStream, "checksum does not hold"),
        (tabled(TABLE.name.upper(), RAW), CorruptStream, "are not those of that name"),
        (tabled(TABLE.name, RAW, table=None), CorruptStream, "are not those of that name"),
        (tabled(TABLE.name, bytes(4196376)), CorruptStream, "a shared table of 4196380 bytes; 4196372 are the most"),
        *[(tabled(hashlib.sha256(raw).hexdigest(), raw), error, "shared table") for raw, error in FORGED],
    ],
)
def test_tables_of_a_file_are_not_believed(data: bytes, error: type[PQError], said: str) -> None:
    import second_reader

    with PQKVFile(data) as file:
        with pytest.raises(error, match=said) as caught:
            file.decode("k")
        assert caught.type is error
        assert bool(file.verify()) == (error is not MissingTable)
    assert second_reader.refusal(data) == ("corrupt" if error is CorruptStream else "unsupported")


def test_tables_of_a_listing_are_not_believed(tmp_path: Path) -> None:
    path = written(tmp_path / "a.pqkv")
    convert(path, tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "numpy") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    newer = RAW[:4] + b"\2" + RAW[5:]
    for text, error in (
        ("[]", CorruptStream),
        ("{", CorruptStream),
        (json.dumps({TABLE.name: 3}), CorruptStream),
        (json.dumps({TABLE.name: "0g"}), CorruptStream),
        (json.dumps({TABLE.name: "00" * 4196373}), CorruptStream),
        (json.dumps({TABLE.name: OTHER.to_bytes().hex()}), CorruptStream),
        (json.dumps({TABLE.name: RAW.hex(), hashlib.sha256(newer).hexdigest(): newer.hex()}), UnsupportedStream),
        (json.dumps({OTHER.name: OTHER.to_bytes().hex()}), MissingTable),
        ("{}", MissingTable),
    ):
        save_file(tensors, tmp_path / "c.safetensors", metadata | {"pqcodec_tables": text})
        with open_encoded(tmp_path / "c.safetensors") as file:
            assert file.decode("others").shape == X.shape
            with pytest.raises(error) as caught:
                file.decode("layers.0.key")
            assert caught.type is error


# -- the command line ----------------------------------------------------------------------------------------------
def test_the_command_line_takes_and_lists_tables(tmp_path: Path) -> None:
    save_file({"layers.0.key": X, "layers.0.value": X}, tmp_path / "kv.safetensors")
    (tmp_path / "levels.pqt").write_bytes(RAW)
    (tmp_path / "long.pqt").write_bytes(RAW + bytes(1 << 23))
    source, target = str(tmp_path / "kv.safetensors"), str(tmp_path / "kv.pqkv")
    one = CliRunner().invoke(app, ["encode", source, target, "--preset", "nuq2", "--table", str(tmp_path / "levels.pqt")])
    assert one.exit_code == 0, one.stderr
    found = json.loads(CliRunner().invoke(app, ["inspect", target, "--json"]).stdout)
    assert [table["name"] for table in found["tables"]] == [TABLE.name]
    assert {tensor["stream"]["table"] for tensor in found["tensors"]} == {TABLE.name}
    assert f"shared table {TABLE.name}: 4 levels" in CliRunner().invoke(app, ["inspect", target]).stdout
    for preset, table in (("pq3", "levels.pqt"), ("nuq4", "levels.pqt"), ("nuq2", "long.pqt"), ("nuq2", "none.pqt")):
        bad = CliRunner().invoke(
            app, ["encode", source, target, "--force", "--preset", preset, "--table", str(tmp_path / table)]
        )
        assert bad.exit_code in (1, 2, 4), bad.stderr
        assert "levels" in bad.stderr or table in bad.stderr
