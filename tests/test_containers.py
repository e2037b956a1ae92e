"""Containers into each other: nothing is decoded, nothing is lost; odd names, kinds, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pqcodec
from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.formats import PQKVAppender, PQKVFile, PQKVWriter, append_cache, load_cache, save_cache
from pqcodec.formats.cache import layer_pairs
from pqcodec.formats.containers.kinds import KINDS, container_of, convert, kind_of, open_encoded
from pqcodec.formats.containers.reader import TensorFile
from pqcodec.formats.plain import numbers as exact

pytest.importorskip("zarr", minversion="3.0.8")
REFERENCE = {"backend": "reference"}
EXACT = {
    "flags": np.array([True, False, True]),
    "norm": torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16),
    "f8": torch.ones(3, 2).to(torch.float8_e5m2),
    "complex": np.array([[1 + 2j]], np.complex64),
    "scalar": np.array(2.5),
    "none": np.zeros((0, 4), np.float32),
}


def tensor(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of everything: coded tensors of several dtypes and sizes, grown ones, exact ones, odd names."""
    path = tmp_path_factory.mktemp("many") / "a.pqkv"
    rope = pqcodec.Rope(theta=100.0, first_position=3)
    with PQKVWriter(path, {"model": "tiny", "list": [1, None, "é"]}) as writer:
        writer.add("layers.0.key", tensor(1, 2, 50, 16), layer=0, role="key", center="rope", rope=rope, **REFERENCE)
        writer.add("layers.0.value", torch.randn(1, 2, 50, 16).bfloat16(), layer=0, role="value", exact_tokens=4, **REFERENCE)
        writer.add("vector", tensor(16), **REFERENCE)
        writer.add("../odd name/é", tensor(3, 16), **REFERENCE)
        stream = pqcodec.encode(tensor(9, 64), preset="paper", **REFERENCE)
        writer.add_stream("paper", stream, rel_mse=0.0321)
        for name, x in EXACT.items():
            writer.add_exact(name, x)
    with PQKVAppender(path) as writer:
        writer.extend("layers.0.key", tensor(1, 2, 7, 16, seed=1), center="rope", rope=rope, **REFERENCE)
        writer.add_exact("late", np.arange(3))
    return path


def everything(file: TensorFile) -> dict[str, Any]:
    entries = [file.entry(name) for name in file.names]
    kept = ("name", "coded", "layer", "role", "shape", "dtype", "layout", "numpy", "parts", "rel_mse")
    streams = {
        e.name: [file.stream(e.name, i).read(0, file.stream(e.name, i).size).tobytes() for i in range(e.parts)]
        for e in entries
        if e.coded
    }
    plain = {e.name: exact.to_bytes(file.decode(e.name)).tobytes() for e in entries if not e.coded}
    about = [tuple(getattr(e, key) for key in kept) for e in entries]
    return {"metadata": file.metadata, "about": about, "streams": streams, "plain": plain}


@pytest.mark.parametrize("through", [(a, b) for a in KINDS for b in KINDS])
def test_all_of_a_file_goes_through_any_containers(
    through: tuple[str, ...], many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_encoded(many) as file:
        expected = everything(file)
    monkeypatch.setattr(pqcodec.codec, "decode", lambda *args, **options: pytest.fail("decoded"))
    source = many
    for number, kind in enumerate(through):
        target = tmp_path / f"{number}.{kind}"
        size = convert(source, target)
        assert (kind_of(target), container_of(target)) == (kind, kind)
        assert size == sum(p.stat().st_size for p in ([target] if target.is_file() else target.rglob("*")) if p.is_file())
        source = target
    with open_encoded(source) as file:
        assert everything(file) == expected
        assert file.verify(**REFERENCE) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f"{i}.{kind}" for i, kind in enumerate(through))


def test_zarr_slices_what_was_converted(many: Path, tmp_path: Path) -> None:
    import zarr

    convert(many, tmp_path / "a.zarr")
    root = zarr.open(tmp_path / "a.zarr", mode="r")
    with PQKVFile(many) as file:
        key, value = (file.decode(f"layers.0.{role}", **REFERENCE) for role in ("key", "value"))
        np.testing.assert_array_equal(root["layers/0/key"][0, 1, 48:55], key[0, 1, 48:55])
        assert root["layers/0/value"].dtype == np.float32  # zarr has no bfloat16
        np.testing.assert_array_equal(root["layers/0/value"][..., 2:30, :], value[..., 2:30, :].float().numpy())
        np.testing.assert_array_equal(root["vector"][:], file.decode("vector", **REFERENCE))
        np.testing.assert_array_equal(root["flags"][:], EXACT["flags"])
        assert root["layers/0/key"].attrs["role"] == "key"
        assert (tmp_path / "a.zarr" / "tensors" / "3").is_dir()  # ../odd name
        assert root["tensors/3"].attrs["name"] == "../odd name/é"


def test_a_converted_cache_loads_and_grows(tmp_path: Path) -> None:
    layers = [(tensor(1, 2, 20, 16, seed=i), tensor(1, 2, 20, 16, seed=9 + i)) for i in range(2)]
    save_cache(tmp_path / "a.pqkv", layers, **REFERENCE)
    expected = load_cache(tmp_path / "a.pqkv", **REFERENCE)
    for kind in KINDS:
        convert(tmp_path / "a.pqkv", tmp_path / f"b.{kind}")
        with open_encoded(tmp_path / f"b.{kind}") as file:
            for pair, found in zip(expected, layer_pairs(file, **REFERENCE), strict=True):
                for x, y in zip(pair, found, strict=True):
                    np.testing.assert_array_equal(x, y)
            assert 0.01 < file.entry("layers.0.value").rel_mse < 0.06
    assert (tmp_path / "a.pqkv").read_bytes() == (tmp_path / "b.pqkv").read_bytes()
    convert(tmp_path / "b.zarr", tmp_path / "c.pqkv")
    append_cache(tmp_path / "c.pqkv", layers, **REFERENCE)
    convert(tmp_path / "c.pqkv", tmp_path / "d.zarr")
    convert(tmp_path / "d.zarr", tmp_path / "e.pqkv")
    append_cache(tmp_path / "e.pqkv", layers, **REFERENCE)
    assert load_cache(tmp_path / "e.pqkv", tokens=(15, 45), **REFERENCE)[0][0].shape == (1, 2, 30, 16)


def test_names_that_meet_in_folders_are_told_apart(tmp_path: Path) -> None:
    names = ["a", "A", "a.b", "a/b", "a.b.c", "complete", "x.zarr.json", "tensors.1", "..", ".", "a..b", "c/../../d", "tensors"]
    with PQKVWriter(tmp_path / "a.pqkv") as writer:
        for number, name in enumerate(names):
            writer.add_exact(name, np.array([number]))
    convert(tmp_path / "a.pqkv", tmp_path / "a.zarr")
    with open_encoded(tmp_path / "a.zarr") as file:
        assert list(file.names) == names
        assert [int(file.decode(name)[0]) for name in names] == list(range(len(names)))
    assert {p.name for p in tmp_path.iterdir()} == {"a.pqkv", "a.zarr"}


def test_damage_goes_along_and_stays_visible(many: Path, tmp_path: Path) -> None:
    with PQKVFile(many) as file:
        entry = file.entry("layers.0.value")
    data = bytearray(many.read_bytes())
    data[entry.body_start + entry.body_bytes - 9] ^= 1
    (tmp_path / "a.pqkv").write_bytes(data)
    convert(tmp_path / "a.pqkv", tmp_path / "a.zarr", check=False)
    convert(tmp_path / "a.zarr", tmp_path / "b.safetensors", check=False)
    for path in ("a.pqkv", "a.zarr", "b.safetensors"):
        with pytest.raises(CorruptStream, match=r"tensor 'layers\.0\.value': checksum does not hold: payload, leading index"):
            convert(tmp_path / path, tmp_path / "c.pqkv")
        assert not (tmp_path / "c.pqkv").exists()
        with open_encoded(tmp_path / path) as file:
            assert [name for name, _ in file.verify(**REFERENCE)] == ["layers.0.value"]
            with pytest.raises(CorruptStream, match=r"'layers\.0\.value'"):
                file.decode("layers.0.value", **REFERENCE)


def test_what_is_refused(many: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    for path, message in ((tmp_path / "a.npz", "npz file of plain tensors"), (tmp_path, "folder without a zarr.json")):
        with pytest.raises(InvalidArgument, match=message):
            open_encoded(path)
    with pytest.raises(InvalidArgument, match=r"'.bin' is unknown"):
        convert(many, tmp_path / "a.bin")
    with pytest.raises(InvalidArgument, match="'tar' is unknown"):
        convert(many, tmp_path / "a.bin", to="tar")
    (tmp_path / "full.zarr").mkdir()
    (tmp_path / "full.zarr" / "thesis.txt").write_text("the only copy")
    with pytest.raises(FileExistsError, match="not replaced"):
        convert(many, tmp_path / "full.zarr")
    assert (tmp_path / "full.zarr" / "thesis.txt").read_text() == "the only copy"
    with pytest.raises(NotADirectoryError):
        convert(many, tmp_path / "a.npz", to="zarr")
    with PQKVWriter(tmp_path / "c.pqkv") as writer:
        writer.add_exact("x", np.zeros(3, np.complex128))
    with pytest.raises(InvalidArgument, match=r"'x'.*complex128"):
        convert(tmp_path / "c.pqkv", tmp_path / "c.safetensors")
    convert(tmp_path / "c.pqkv", tmp_path / "c.zarr")
    with pytest.raises(InvalidArgument, match="cannot be written to a pipe"):
        convert(many, (tmp_path / "p").open("wb"), to="zarr")


def test_single_streams_convert_too(tmp_path: Path) -> None:
    (tmp_path / "k.pqs").write_bytes(pqcodec.encode(tensor(5, 16), **REFERENCE))
    convert(tmp_path / "k.pqs", tmp_path / "k.pqkv")
    with PQKVFile(tmp_path / "k.pqkv") as file, open_encoded(tmp_path / "k.pqs") as single:
        assert file.names == single.names == ("k",)
        np.testing.assert_array_equal(file.decode("k", **REFERENCE), single.decode("k", **REFERENCE))
        assert single.verify(**REFERENCE) == []
        assert single.size == (tmp_path / "k.pqs").stat().st_size


class Counting(io.FileIO):
    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self.count += len(data)
        return data


def test_what_is_read_of_256_tokens_is_what_was_wanted(tmp_path: Path) -> None:
    """Any 256 tokens of a head: nine tenths of the bytes are their rows; blocks add a percent to rows, files half of one."""
    tokens, heads, row = 2048, 8, 128 * 3 // 8 + 1
    rng = np.random.default_rng(0)
    save_cache(tmp_path / "a.pqkv", [(tensor(heads, tokens, 128), tensor(heads, tokens, 128))], share_bits=False)
    with Counting(tmp_path / "a.pqkv") as counted, PQKVFile(counted) as file:
        whole = {name: file.decode(name) for name in file.names}
        counted.count = 0
        for number in range(200):
            name, first, head = file.names[number % 2], int(rng.integers(4, tokens - 255)), int(rng.integers(heads))
            x = file.decode(name, tokens=(first, first + 256), leading=(head, head + 1))
            np.testing.assert_array_equal(x[0], whole[name][head, first : first + 256])
        assert 200 * 256 * row / counted.count >= 0.9
        streams = [file.inspect(name) for name in file.names]
        rows = len(streams) * heads * (tokens - 4) * row
        assert sum(info.payload_bytes for info in streams) <= 1.01 * rows  # with their checksums
        assert file.size - sum(info.stream_bytes for info in streams) <= 0.005 * rows


@pytest.mark.parametrize("error", [0.0, 5e-324, 0.00012345678901234567, 1234567890123456.7, 1.7976931348623157e308, None])
def test_any_measured_error_has_room_in_a_header(error: float | None, tmp_path: Path) -> None:
    with PQKVWriter(tmp_path / "a.pqkv") as writer:
        writer.add_stream("k", pqcodec.encode(tensor(5, 16), **REFERENCE), rel_mse=error)
    convert(tmp_path / "a.pqkv", tmp_path / "a.safetensors")
    with open_encoded(tmp_path / "a.safetensors") as file:
        assert file.entry("k").rel_mse == error
        assert file.verify(**REFERENCE) == []
