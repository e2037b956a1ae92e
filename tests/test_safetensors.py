"""An encoded cache as a .safetensors file: round trips, lazy reading, conversion, damage, and what a reader refuses."""

from __future__ import annotations

import builtins
import json
import os
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file as load_plain
from safetensors.numpy import save_file as save_plain

import pqcodec
from pqcodec.errors import CorruptStream, InvalidArgument, NonFiniteInput, PQError, UnsupportedStream
from pqcodec.formats import PQKVFile, PQKVWriter, load_cache
from pqcodec.formats.cache import load_safetensors, save_safetensors
from pqcodec.formats.containers import safetensors as safetensors_file
from pqcodec.formats.containers.kinds import convert
from pqcodec.formats.containers.pqkv.appender import PQKVAppender
from pqcodec.formats.containers.safetensors import SafetensorsCache
from pqcodec.formats.plain import numbers as exact

REFERENCE = {"backend": "reference"}
FUZZ = int(os.environ.get("PQCODEC_FUZZ", "300"))  # examples of each fuzz test; 100000 take half an hour each


def tensor(*shape: int, dtype: type = np.float16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def mapping() -> dict[str, Any]:
    """Two coded tensors of one size between exact ones of several widths."""
    return {
        "flags": np.array([True, False, True]),
        "layers.0.key": tensor(2, 9, 16),
        "layers.0.value": tensor(2, 9, 16, seed=1),
        "layers.1.key": tensor(2, 9, 16, seed=2),
        "norm": torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16),
        "positions": np.arange(9),
        "more positions": np.arange(9, 18),
    }


def saved(path: Path, tensors: Any = None, **options: Any) -> Path:
    how: dict[str, Any] = {"preset": "pq2", "exact_tokens": 2, "metadata": {"model": "tiny"}, **REFERENCE} | options
    save_safetensors(path, mapping() if tensors is None else tensors, **how)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("st") / "small.safetensors")


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


def same(x: Any, y: Any) -> bool:
    if type(x) is not type(y) or x.dtype != y.dtype or x.shape != y.shape:
        return False
    return exact.to_bytes(x).tobytes() == exact.to_bytes(y).tobytes()


def read_everything(path: Path) -> dict[str, Any]:
    """All that a file tells; raises where anything is damaged."""
    with SafetensorsCache(path) as file:
        entries = [file.entry(name) for name in file.names]
        tensors = {name: file.decode(name, **REFERENCE) for name in file.names}
        return {"metadata": file.metadata, "parts": [(e.name, e.layer, e.role, e.layout) for e in entries], "tensors": tensors}


def tells_the_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    names = one["tensors"].keys() == other["tensors"].keys()
    said = all(one[key] == other[key] for key in ("metadata", "parts"))
    return said and names and all(same(x, other["tensors"][name]) for name, x in one["tensors"].items())


# -- round trips -------------------------------------------------------------------------------------------------
def test_tensors_come_back(small: Path) -> None:
    given = mapping()
    with SafetensorsCache(small) as file:
        assert file.names == file.keys() == tuple(given)
        assert file.metadata == {"model": "tiny"}
        assert file.size == small.stat().st_size
        entry = file.entry("layers.1.key")
        assert (entry.coded, entry.layer, entry.role, entry.shape, entry.dtype) == (True, 1, "key", (2, 9, 16), "float16")
        assert (file.inspect("layers.1.key").centered, file.inspect("layers.0.value").centered) == ("mean", None)
        assert file.inspect("layers.1.key").exact_tokens == 2
        for name in ("flags", "norm", "positions", "more positions"):
            assert same(file.decode(name), given[name])
            assert not file.entry(name).coded
        assert file.verify(**REFERENCE) == []
    found = load_safetensors(small, **REFERENCE)
    assert list(found) == list(given)
    for name in ("layers.0.key", "layers.0.value"):
        assert ((found[name] - given[name]).astype(float) ** 2).sum() < 0.25 * (given[name].astype(float) ** 2).sum()


def test_other_readers_open_it(small: Path) -> None:
    """A coded tensor is one stream in a uint8 tensor, whoever reads it."""
    with safe_open(small, framework="pt") as file, SafetensorsCache(small) as cache:
        assert set(file.keys()) == set(cache.names)
        assert file.metadata()["pqcodec_format"] == "kv-cache"
        assert file.get_slice("layers.0.key").get_dtype() == "U8"
        stream = file.get_tensor("layers.0.key").numpy()
        assert stream.tobytes() == cache.stream("layers.0.key").read(0, stream.size).tobytes()
        assert same(pqcodec.decode(stream, **REFERENCE), cache.decode("layers.0.key", **REFERENCE))
        assert torch.equal(file.get_tensor("norm"), mapping()["norm"])


def test_bodies_are_aligned_and_streams_are_what_encode_returns(small: Path) -> None:
    header, body = split(small.read_bytes())
    start = small.stat().st_size - len(body)
    assert start % 16 == 0
    width = {"I64": 8, "BF16": 2}
    for name, item in header.items():
        if name != "__metadata__":
            assert (start + item["data_offsets"][0]) % width.get(item["dtype"], 1) == 0
    low, high = header["layers.0.value"]["data_offsets"]
    assert body[low:high] == pqcodec.encode(
        mapping()["layers.0.value"], preset="pq2", exact_tokens=2, chunk_tokens=24, **REFERENCE
    )


@pytest.mark.parametrize("rope", [None, pqcodec.Rope(theta=10000.0)], ids=["mean", "rope"])
def test_layers_are_written_as_save_cache_does(tmp_path: Path, rope: pqcodec.Rope | None) -> None:
    layers = [(tensor(1, 2, 20, 32, seed=i) * (1 + i), tensor(1, 2, 20, 32, seed=90 + i)) for i in range(8)]
    seen: list[tuple[int, int]] = []
    save_safetensors(tmp_path / "a.safetensors", layers, rope=rope, progress=lambda *done: seen.append(done), **REFERENCE)
    pqcodec.formats.save_cache(tmp_path / "a.pqkv", layers, rope=rope, **REFERENCE)
    convert(tmp_path / "a.safetensors", tmp_path / "b.pqkv")
    assert (tmp_path / "a.pqkv").read_bytes() == (tmp_path / "b.pqkv").read_bytes()
    assert seen == [(n, 16) for n in range(1, 17)]
    named = {f"model.layers.{i}.self_attn.{'kv'[j]}_cache": x for i, pair in enumerate(layers) for j, x in enumerate(pair)}
    save_safetensors(tmp_path / "c.safetensors", named, rope=rope, **REFERENCE)
    with SafetensorsCache(tmp_path / "a.safetensors") as a, SafetensorsCache(tmp_path / "c.safetensors") as b:
        assert len({a.inspect(name).preset for name in a.names}) > 2
        for one, other in zip(a.names, b.names, strict=True):
            assert a.inspect(one) == b.inspect(other)


def test_writing_is_repeatable_and_empty_caches_are_files(tmp_path: Path, small: Path) -> None:
    assert saved(tmp_path / "again").read_bytes() == small.read_bytes()
    assert load_safetensors(saved(tmp_path / "empty", {}, metadata=None)) == {}
    saved(tmp_path / "shapes", {"layers.0.key": tensor(0, 5, 16), "none": np.zeros((0, 4)), "scalar": np.array(2.5)})
    found = load_safetensors(tmp_path / "shapes", **REFERENCE)
    assert (found["layers.0.key"].shape, found["none"].shape, found["scalar"]) == ((0, 5, 16), (0, 4), 2.5)


@pytest.mark.parametrize("dtype", sorted(safetensors_file.CODES))
def test_exact_dtypes(tmp_path: Path, dtype: str) -> None:
    x = torch.tensor([[0.0, 1.0], [2.0, 4.0]]).to(getattr(torch, dtype))
    tensors: dict[str, Any] = {"x": x.T, "scalar": x[1, 1]}
    if dtype != "bfloat16" and "float8" not in dtype:
        tensors["numpy"] = x.numpy().T
    found = load_safetensors(saved(tmp_path / "f", tensors))
    assert all(same(found[name], x.contiguous() if name == "x" else found[name]) for name, x in tensors.items())
    assert {name: x.dtype for name, x in found.items()} == {name: x.dtype for name, x in tensors.items()}


def test_tensors_that_are_no_cache_stay_exact(tmp_path: Path) -> None:
    tensors = {"layers.0.key": np.arange(12).reshape(3, 4), "w.weight": tensor(4, 16), "layers.0.value": tensor(2, 2000)}
    found = load_safetensors(saved(tmp_path / "f", tensors))
    assert all(same(found[name], x) for name, x in tensors.items())


def test_nonfinite_vectors_are_refused_or_kept(tmp_path: Path) -> None:
    x = tensor(1, 20, 16)
    x[0, 7, 3] = np.nan
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(NonFiniteInput, match=r"'layers.0.key'.*nan"):
        saved(tmp_path / "f", {"positions": np.arange(3), "layers.0.key": x})
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"
    found = load_safetensors(saved(tmp_path / "f", {"layers.0.key": x}, nonfinite="exact"), **REFERENCE)
    np.testing.assert_array_equal(found["layers.0.key"][0, 7], x[0, 7])


def test_only_one_stream_is_held_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bodies leave as they come: when the third tensor is encoded, the first two are in the file."""
    sizes = []
    encode = pqcodec.codec.encode_by

    def watched(*args: Any, **options: Any) -> Any:
        sizes.append(sum(path.stat().st_size for path in tmp_path.iterdir()))
        return encode(*args, **options)

    monkeypatch.setattr(pqcodec.codec, "encode_by", watched)
    saved(tmp_path / "f", {f"layers.{i}.key": tensor(1, 2000, 64, seed=i) for i in range(3)})
    stream = pqcodec.encoded_size((1, 2000, 64), preset="pq2", center="mean", exact_tokens=2)
    assert sizes[2] > 1.9 * stream


# -- lazy reading ------------------------------------------------------------------------------------------------
@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that are asked of the file, one number a read."""
    reads: list[int] = []

    class Counting:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def __enter__(self) -> Counting:
            return self

        def __exit__(self, *_: object) -> None:
            self._file.close()

        def read(self, count: int) -> bytes:
            reads.append(count)
            return self._file.read(count)

    def opened(*args: Any) -> Counting:
        return Counting(builtins.open(*args))

    monkeypatch.setattr(safetensors_file, "open", opened, raising=False)
    return reads


def test_only_wanted_bytes_are_read(tmp_path: Path, counted: list[int]) -> None:
    tensors = {"layers.0.key": tensor(4, 1920, 16), "layers.0.value": tensor(4, 1920, 16), "positions": np.arange(10_000)}
    path = saved(tmp_path / "f", tensors, center_keys=False, chunk_tokens=64)
    del counted[:]
    with SafetensorsCache(path) as file:
        assert sum(counted) == 0  # the header was read by the library
        block = file.inspect("layers.0.key").payload_bytes // (30 * 4)
        head, stream = sum(counted), file.inspect("layers.0.key").stream_bytes
        assert head < 500
        del counted[:]
        file.decode("layers.0.key", tokens=(642, 700), **REFERENCE)
        few = sum(counted)
        assert few < 4 * block + 500
        del counted[:]
        part = file.get_slice("layers.0.key", **REFERENCE)[1, 642:700]
        assert part.shape == (58, 16)
        assert sum(counted) < block + 600
        del counted[:]
        file.decode("layers.0.key", **REFERENCE)
        assert stream - head <= sum(counted) <= stream  # the header was read before
        del counted[:]
        file.decode("positions")
        assert sum(counted) == 80_000


def test_slices_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    path = saved(tmp_path / "f", {"layers.0.key": tensor(2, 3, 70, 16), "layers.0.value": tensor(9, 16), "line": np.arange(5)})
    with SafetensorsCache(path) as file:
        whole = load_safetensors(path, **REFERENCE)
        all_ = slice(None)
        indices: list[Any] = [..., 1, (0, 2), (1, 2, 69, 15), (..., slice(3, 68), all_), (..., slice(66, 3), all_), (..., 0)]
        indices += [(slice(1, 9), slice(0, 1), slice(1, 60, 7)), (-1, ..., slice(-9, -2), all_), (all_, all_, -1), slice(0, 0)]
        for index in indices:
            np.testing.assert_array_equal(file.get_slice("layers.0.key", **REFERENCE)[index], whole["layers.0.key"][index])
        for index in (..., 3, slice(2, 5), (slice(2, 8, 3), slice(4, 5)), (..., -1)):
            np.testing.assert_array_equal(file.get_slice("layers.0.value", **REFERENCE)[index], whole["layers.0.value"][index])
        np.testing.assert_array_equal(file.get_slice("line")[1:3], whole["line"][1:3])
        part = file.get_slice("layers.0.key")
        assert (part.get_shape(), part.get_dtype()) == ([2, 3, 70, 16], "F16")
        for index in (
            (0,) * 5,
            [1, 2],
            True,
            (..., slice(None, None, -1), all_),
            2,
            (..., 70, all_),
            "x",
            (..., ...),
            (..., 16),
        ):
            with pytest.raises(InvalidArgument, match="layers"):
                part[index]  # type: ignore[index]


def test_token_ranges(tmp_path: Path) -> None:
    tensors = {"layers.0.key": tensor(2, 70, 16), "layers.0.value": np.arange(560).reshape(2, 70, 4), "positions": np.arange(7)}
    path = saved(tmp_path / "f", tensors)
    whole, part = load_safetensors(path, **REFERENCE), load_safetensors(path, (1, 66), **REFERENCE)
    for name in ("layers.0.key", "layers.0.value"):
        np.testing.assert_array_equal(part[name], whole[name][:, 1:66])
    np.testing.assert_array_equal(part["positions"], tensors["positions"])
    with SafetensorsCache(path) as file:
        np.testing.assert_array_equal(
            file.decode("layers.0.value", tokens=(2, 3), leading=(1, 2)), whole["layers.0.value"][1:2, 2:3]
        )
        np.testing.assert_array_equal(file.get_tensor("positions"), tensors["positions"])
        for name in ("layers.0.key", "layers.0.value"):
            with pytest.raises(InvalidArgument, match=r"outside 0 \.\. 70"):
                file.decode(name, tokens=(1, 71), **REFERENCE)
        with pytest.raises(InvalidArgument, match="head_dim"):
            file.decode("positions", tokens=(0, 1))
        with pytest.raises(InvalidArgument, match=r"no tensor is called 'q'.*'layers.0.key'"):
            file.decode("q")
        with pytest.raises(InvalidArgument, match="kept exactly"):
            file.inspect("positions")


# -- conversion --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("metadata", [None, {"a": [1, "\u00e9\u4e2d"], "b": {"c": None}}], ids=["bare", "metadata"])
def test_a_file_that_came_back_is_the_file_that_went(tmp_path: Path, metadata: dict | None) -> None:
    with PQKVWriter(tmp_path / "a.pqkv", metadata) as writer:
        for name, x in mapping().items():
            if name.startswith("layers"):
                writer.add("caf\u00e9 " + name, x, layer=7, role="key", preset="pq2", **REFERENCE)
            else:
                writer.add_exact(name, x)
    convert(tmp_path / "a.pqkv", tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pqkv")
    assert (tmp_path / "a.pqkv").read_bytes() == (tmp_path / "b.pqkv").read_bytes()
    convert(tmp_path / "b.pqkv", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with PQKVFile(tmp_path / "a.pqkv") as one, SafetensorsCache(tmp_path / "a.safetensors") as other:
        assert one.names == other.names
        assert one.metadata == other.metadata
        for name in one.names:
            assert same(one.decode(name, **REFERENCE), other.decode(name, **REFERENCE))


def test_conversion_decodes_nothing(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pqcodec.codec, "decode", lambda *args, **options: pytest.fail("decoded"))
    convert(small, tmp_path / "a.pqkv")
    convert(tmp_path / "a.pqkv", tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == small.read_bytes()


def test_a_converted_cache_loads(tmp_path: Path) -> None:
    layers = [(tensor(1, 2, 20, 16), tensor(1, 2, 20, 16, seed=1))]
    save_safetensors(tmp_path / "f", layers, **REFERENCE)
    convert(tmp_path / "f", tmp_path / "f.pqkv")
    [(key, value)] = load_cache(tmp_path / "f.pqkv", **REFERENCE)
    found = load_safetensors(tmp_path / "f", **REFERENCE)
    assert same(key, found["layers.0.key"])
    assert same(value, found["layers.0.value"])


def test_what_safetensors_cannot_hold_is_told(tmp_path: Path) -> None:
    with PQKVWriter(tmp_path / "a.pqkv") as writer:
        writer.add_exact("x", np.zeros(3, np.complex128))
    with pytest.raises(InvalidArgument, match=r"'x'.*complex128"):
        convert(tmp_path / "a.pqkv", tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.pqkv"]


def test_a_grown_tensor_goes_along_stream_by_stream(tmp_path: Path) -> None:
    with PQKVWriter(tmp_path / "a.pqkv", {"model": "tiny"}) as writer:
        writer.add("k", tensor(2, 40, 16), layer=0, role="key", preset="pq2", **REFERENCE)
        writer.add_exact("n", np.arange(3))
    for tokens in (1, 30):
        with PQKVAppender(tmp_path / "a.pqkv") as writer:
            writer.extend("k", tensor(2, tokens, 16, seed=tokens), preset="pq2", **REFERENCE)
    convert(tmp_path / "a.pqkv", tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.pqkv")
    convert(tmp_path / "b.pqkv", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with (
        PQKVFile(tmp_path / "a.pqkv") as a,
        SafetensorsCache(tmp_path / "a.safetensors") as b,
        PQKVFile(tmp_path / "b.pqkv") as c,
    ):
        for file in (b, c):
            assert (file.names, file.metadata, file.entry("k").parts) == (("k", "n"), {"model": "tiny"}, 3)
            assert file.entry("k").shape == (2, 71, 16)
            assert file.verify(**REFERENCE) == []
            for tokens in (None, (0, 71), (39, 42), (41, 41), (50, 60)):
                np.testing.assert_array_equal(
                    file.decode("k", tokens=tokens, **REFERENCE), a.decode("k", tokens=tokens, **REFERENCE)
                )
        assert c.version == 2


def test_damage_goes_along_and_stays_visible(tmp_path: Path, small: Path) -> None:
    data = bytearray(small.read_bytes())
    with SafetensorsCache(small) as file:
        entry = file.entry("layers.0.key")
    data[entry.body_start + entry.body_bytes - 9] ^= 1
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CorruptStream, match=r"layers\.0\.key"):
        convert(tmp_path / "a.safetensors", tmp_path / "a.pqkv")
    assert not (tmp_path / "a.pqkv").exists()
    convert(tmp_path / "a.safetensors", tmp_path / "a.pqkv", check=False)
    convert(tmp_path / "a.pqkv", tmp_path / "b.safetensors", check=False)
    assert (tmp_path / "b.safetensors").read_bytes() == bytes(data)
    with PQKVFile(tmp_path / "a.pqkv") as one, SafetensorsCache(tmp_path / "b.safetensors") as other:
        assert one.verify(**REFERENCE) == other.verify(**REFERENCE) != []


# -- damage ------------------------------------------------------------------------------------------------------
def test_verify_names_tensor_and_tokens(tmp_path: Path) -> None:
    path = saved(tmp_path / "f", {"layers.0.key": tensor(2, 200, 16), "positions": np.arange(5)})
    data = bytearray(path.read_bytes())
    with SafetensorsCache(path) as file:
        key = file.entry("layers.0.key")
        data[key.body_start + key.body_bytes - 8] ^= 1
        data[file.entry("positions").body_start] ^= 1
    path.write_bytes(data)
    seen: list[tuple[int, int]] = []
    with SafetensorsCache(path) as file:
        (first, text), (second, damage) = file.verify(lambda *done: seen.append(done), **REFERENCE)
        with pytest.raises(CorruptStream, match=r"f: tensor 'positions': checksum"):
            file.decode("positions")
        with pytest.raises(CorruptStream, match=r"f: tensor 'layers.0.key': .*leading index 1, tokens 194 \.\. 199"):
            file.decode("layers.0.key", **REFERENCE)
        assert file.decode("layers.0.key", tokens=(0, 64), **REFERENCE).shape == (2, 64, 16)
    assert (first, second) == ("positions", "layers.0.key")
    assert "checksum" in str(text)
    assert isinstance(damage, pqcodec.Damage)
    assert seen == sorted(seen)
    assert seen[-1] == (len(data), len(data))


def swapped(key: str, one: str, other: str) -> Callable[[dict[str, Any]], None]:
    def edit(header: dict[str, Any]) -> None:
        header[one][key], header[other][key] = header[other][key], header[one][key]

    return edit


def renamed(one: str, other: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.update({other: header.pop(one)})


def told(key: str, change: Callable[[str], str]) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].update({key: change(header["__metadata__"][key])})


def item(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


def removed(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header["__metadata__"].pop(key) and None


EDITS: dict[str, tuple[Callable[[dict[str, Any]], None], type[PQError], str]] = {
    "offsets of two streams": (swapped("data_offsets", "layers.0.key", "layers.1.key"), CorruptStream, "seal"),
    "offsets of two exact tensors": (swapped("data_offsets", "positions", "more positions"), CorruptStream, "checksum"),
    "name": (renamed("layers.0.key", "layers.2.key"), CorruptStream, "same tensors: 'layers.0.key', 'layers.2.key'"),
    "name in the list": (
        told("pqcodec_tensors", lambda t: t.replace("layers.0.key", "layers.2.key")),
        CorruptStream,
        "same tens",
    ),
    "both names": (
        lambda h: told("pqcodec_tensors", lambda t: t.replace('"norm"', '"nom"'))(h) or renamed("norm", "nom")(h),
        CorruptStream,
        "checksum",
    ),
    "name twice in the list": (
        told("pqcodec_tensors", lambda t: t.replace("layers.0.key", "layers.1.key")),
        CorruptStream,
        "'layers.1.key'",
    ),
    "role": (told("pqcodec_tensors", lambda t: t.replace('"value"', '"key"')), CorruptStream, "checksum"),
    "unknown role": (told("pqcodec_tensors", lambda t: t.replace('"value"', '"query"')), CorruptStream, "role is 'query'"),
    "layer": (told("pqcodec_tensors", lambda t: t.replace('"layer":1', '"layer":2')), CorruptStream, "checksum"),
    "order": (told("pqcodec_tensors", lambda t: json.dumps(json.loads(t)[::-1])), CorruptStream, "checksum"),
    "kind of an exact tensor": (
        told("pqcodec_tensors", lambda t: t.replace('"numpy":true', '"numpy":false')),
        CorruptStream,
        "sum",
    ),
    "numpy missing": (told("pqcodec_tensors", lambda t: t.replace('"numpy":true', '"nmpy":true')), CorruptStream, "numpy"),
    "numpy no truth": (told("pqcodec_tensors", lambda t: t.replace('"numpy":true', '"numpy":1')), CorruptStream, "true or"),
    "coded": (told("pqcodec_tensors", lambda t: t.replace('"coded":true', '"coded":false')), CorruptStream, "numpy"),
    "seal no string": (told("pqcodec_tensors", lambda t: t.replace('"seal":"', '"seal":7,"s":"')), CorruptStream, "strings"),
    "seal": (told("pqcodec_tensors", lambda t: t[:-3] + "\u0127" + t[-3:]), CorruptStream, "checksum"),
    "list broken": (told("pqcodec_tensors", lambda t: t[:-1]), CorruptStream, "pqcodec_tensors: not JSON"),
    "list no list": (told("pqcodec_tensors", lambda t: "{}"), CorruptStream, "list"),
    "list of lists": (told("pqcodec_tensors", lambda t: "[[]]"), CorruptStream, "tensor 0: a JSON object"),
    "list too deep": (told("pqcodec_tensors", lambda t: "[" * 100_000), CorruptStream, "not JSON"),
    "metadata": (told("pqcodec_metadata", lambda t: t.replace("tiny", "Tiny")), CorruptStream, "checksum"),
    "metadata broken": (told("pqcodec_metadata", lambda t: t + "}"), CorruptStream, "pqcodec_metadata: not JSON"),
    "metadata NaN": (told("pqcodec_metadata", lambda t: '{"a":NaN}'), CorruptStream, "NaN"),
    "metadata no object": (told("pqcodec_metadata", lambda t: "[]"), CorruptStream, "object"),
    "checksum": (told("pqcodec_checksum", lambda t: "00000000"), CorruptStream, "checksum"),
    "checksum missing": (removed("pqcodec_checksum"), CorruptStream, "pqcodec_checksum not there"),
    "marker missing": (removed("pqcodec_format"), CorruptStream, "pqcodec_format not there"),
    "newer version": (told("pqcodec_version", lambda t: "2"), UnsupportedStream, "version '2'.*newer pqcodec"),
    "another format": (told("pqcodec_format", lambda t: "weights"), UnsupportedStream, "'weights'"),
    "shape": (item("positions", shape=[3, 3]), CorruptStream, "checksum"),
    "dtype": (item("positions", dtype="F64"), CorruptStream, "checksum"),
    "unknown dtype": (item("flags", dtype="F4", shape=[6]), UnsupportedStream, "'flags'.*F4"),
    "coded tensor of another dtype": (
        item("layers.0.key", dtype="I8"),
        CorruptStream,
        r"'layers.0.key': is I8.*streams are U8",
    ),
    "coded tensor of two dimensions": (
        lambda h: h["layers.0.key"].update(shape=[1, *h["layers.0.key"]["shape"]]),
        CorruptStream,
        "one dimension",
    ),
    "overlap": (item("more positions", data_offsets=[0, 72]), CorruptStream, "no safetensors file"),
    "beyond the end": (item("layers.0.value", data_offsets=[0, 1 << 60]), CorruptStream, "no safetensors file"),
    "negative": (item("positions", data_offsets=[-72, 0]), CorruptStream, "no safetensors file"),
    "huge shape": (item("positions", shape=[1 << 40, 1 << 40]), CorruptStream, "no safetensors file"),
    "metadata no strings": (lambda h: h["__metadata__"].update(a=1), CorruptStream, "no safetensors file"),
}


@pytest.mark.parametrize("case", EDITS)
def test_header_edits_are_found(case: str, tmp_path: Path, small: Path) -> None:
    edit, error, message = EDITS[case]
    header, body = split(small.read_bytes())
    edit(header)
    (tmp_path / "f.safetensors").write_bytes(joined(header, body))
    with pytest.raises(error, match=rf"f\.safetensors.*{message}"):
        read_everything(tmp_path / "f.safetensors")


def test_other_order_and_more_metadata_are_no_damage(tmp_path: Path, small: Path) -> None:
    """The library writes tensors in an order of its own; what other tools note in the metadata is theirs."""
    with safe_open(small, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "f", metadata=metadata | {"format": "pt"})
    assert (tmp_path / "f").read_bytes() != small.read_bytes()
    assert tells_the_same(read_everything(tmp_path / "f"), read_everything(small))


def test_streams_that_changed_places_are_found(tmp_path: Path, small: Path) -> None:
    """Both streams are sound and alike but for their numbers; their names' seals are not."""
    data = bytearray(small.read_bytes())
    with SafetensorsCache(small) as file:
        one, other = (file.entry(name) for name in ("layers.0.key", "layers.1.key"))
    assert one.body_bytes == other.body_bytes
    first = data[one.body_start : one.body_start + one.body_bytes]
    data[one.body_start : one.body_start + one.body_bytes] = data[other.body_start : other.body_start + other.body_bytes]
    data[other.body_start : other.body_start + other.body_bytes] = first
    (tmp_path / "f").write_bytes(data)
    with SafetensorsCache(tmp_path / "f") as file:
        assert [name for name, _ in file.verify(**REFERENCE)] == ["layers.0.key", "layers.1.key"]
        with pytest.raises(CorruptStream, match=r"'layers.1.key'.*seal"):
            file.decode("layers.1.key", tokens=(0, 1), **REFERENCE)


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "no safetensors file"),
    "short": (lambda data: data[:5], "no safetensors file"),
    "header cut": (lambda data: data[:100], "no safetensors file"),
    "body cut": (lambda data: data[:-1], "no safetensors file"),
    "longer": (lambda data: data + b"\0", "no safetensors file"),
    "huge header": (lambda data: struct.pack("<Q", 1 << 62) + data[8:], "no safetensors file"),
    "header of 99 MB": (lambda data: struct.pack("<Q", 99_000_000) + data[8:], "no safetensors file"),
    "no JSON": (lambda data: joined(b"{]", b""), "no safetensors file"),
    "no UTF-8": (lambda data: joined(b'{"\xff":1}', b""), "no safetensors file"),
    "deep": (lambda data: joined(b'{"a":' * 50_000, b""), "no safetensors file"),
    "name twice": (
        lambda data: joined(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":' * 1 + data[:0] + b'{"dtype":"U8",'
            b'"shape":[1],"data_offsets":[0,1]}}',
            b"1",
        ),
        "twice",
    ),
    "key twice in the metadata": (
        lambda data: data.replace(b'{"pqcodec_format"', b'{"pqcodec_format":"a","pqcodec_format"', 1),
        "",
    ),
}


@pytest.mark.parametrize("case", BYTES)
def test_broken_files_are_refused(case: str, tmp_path: Path, small: Path) -> None:
    change, message = BYTES[case]
    (tmp_path / "f.safetensors").write_bytes(change(small.read_bytes()))
    for read in (SafetensorsCache, load_safetensors, lambda path: convert(path, tmp_path / "g.pqkv")):
        with pytest.raises(CorruptStream, match=rf"f\.safetensors.*{message}"):
            read(tmp_path / "f.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]


def test_a_file_that_is_cut_while_it_is_open(tmp_path: Path, small: Path) -> None:
    """No memory map: a reader is told, its process is not killed."""
    path = tmp_path / "f"
    path.write_bytes(small.read_bytes())
    with SafetensorsCache(path) as file:
        os.truncate(path, file.entry("norm").body_start)
        with pytest.raises(CorruptStream, match="layers"):
            file.decode("layers.1.key", **REFERENCE)


def test_foreign_files(tmp_path: Path) -> None:
    tensors = {"w": tensor(3, 4), "stream": np.frombuffer(b"\x89PQS" + bytes(60), np.uint8)}
    save_plain({"w": tensors["w"]}, tmp_path / "plain")
    with pytest.raises(InvalidArgument, match=r"plain: holds plain tensors.*foreign=True"):
        SafetensorsCache(tmp_path / "plain")
    with pytest.raises(InvalidArgument, match="plain tensors"):
        load_safetensors(tmp_path / "plain")
    found = load_safetensors(tmp_path / "plain", foreign=True)
    assert list(found) == ["w"]
    assert same(found["w"], tensors["w"])
    with pytest.raises(InvalidArgument, match="nothing of tokens"):
        load_safetensors(tmp_path / "plain", (0, 1), foreign=True)
    save_plain(tensors, tmp_path / "stripped")
    with pytest.raises(CorruptStream, match="'stream' is a stream of pqcodec"):
        load_safetensors(tmp_path / "stripped", foreign=True)


def test_foreign_reads_encoded_files_too(small: Path, tmp_path: Path) -> None:
    assert same(load_safetensors(small, foreign=True, **REFERENCE)["norm"], mapping()["norm"])
    header, body = split(small.read_bytes())
    del header["__metadata__"]["pqcodec_format"]
    (tmp_path / "f").write_bytes(joined(header, body))
    with pytest.raises(CorruptStream, match="pqcodec_format not there"):
        load_safetensors(tmp_path / "f", foreign=True)
    assert set(load_plain(saved(tmp_path / "g", {"layers.0.key": tensor(4, 16)}))) == {"layers.0.key"}


def test_writer_refuses(tmp_path: Path) -> None:
    bad: list[tuple[Any, dict[str, Any], str]] = [
        ({"__metadata__": np.arange(3)}, {}, "keeps this name"),
        ({"": np.arange(3)}, {}, "name"),
        ({"\ud800": np.arange(3)}, {}, "Unicode"),
        ({"x": np.zeros(2, np.complex128)}, {}, "complex128"),
        ({"x": np.array([{}], object)}, {}, "object"),
        ({"x": [1, 2]}, {}, "list"),
        ([(tensor(4, 16), [1])], {}, "list"),
        ({"x": np.arange(3)}, {"metadata": {"a": float("nan")}}, "JSON"),
        ({}, {"center_keys": False, "rope": pqcodec.Rope(theta=1e4)}, "center_keys"),
    ]
    for tensors, options, message in bad:
        with pytest.raises(InvalidArgument, match=message):
            saved(tmp_path / "f", tensors, **options)
    assert not list(tmp_path.iterdir())
    with pytest.raises(IsADirectoryError):
        saved(tmp_path)
    with pytest.raises(InvalidArgument, match="regular file"):
        saved(Path(os.devnull))
    with pytest.raises(FileNotFoundError):
        SafetensorsCache(tmp_path / "none")


# -- fuzz --------------------------------------------------------------------------------------------------------
def check_found(data: bytes, path: Path, expected: dict[str, Any]) -> None:
    """An error of ours, or all as it was."""
    path.write_bytes(data)
    try:
        found = read_everything(path)
    except PQError:
        return
    assert tells_the_same(found, expected)
    with SafetensorsCache(path) as file:
        assert file.verify(**REFERENCE) == []


fuzz = settings(
    max_examples=FUZZ,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    print_blob=True,
    database=None,
)
PLACES = st.integers(0, 1 << 30)


@fuzz
@given(
    edits=st.lists(
        st.tuples(st.sampled_from(["set", "flip", "insert", "cut", "move", "header"]), PLACES, PLACES, st.integers(1, 255)),
        min_size=1,
        max_size=4,
    )
)
def test_byte_edits_never_give_wrong_data(tmp_path: Path, small: Path, edits: list[tuple[str, int, int, int]]) -> None:
    data = bytearray(small.read_bytes())
    for kind, place, other, value in edits:
        place, other = place % max(len(data), 1), other % max(len(data), 1)
        if kind == "header":  # half of all edits that are made there stay JSON
            place %= 8 + int.from_bytes(small.read_bytes()[:8], "little")
        if not data:
            break
        if kind == "set":
            data[place] = value
        elif kind in ("flip", "header"):
            data[place] = 48 + value % 10 if chr(data[place]).isdigit() and kind == "header" else data[place] ^ value
        elif kind == "insert":
            data[place:place] = bytes([value])
        elif kind == "cut":
            del data[place : place + value]
        else:
            data[place : place + value] = data[other : other + value]
    check_found(bytes(data), tmp_path / "f", read_everything(small))


@fuzz
@given(seed=st.integers(0, 1 << 32), count=st.integers(1, 3))
def test_header_edits_that_stay_json_never_give_wrong_data(tmp_path: Path, small: Path, seed: int, count: int) -> None:
    """Names, offsets, shapes, dtypes and metadata are exchanged and changed, the list of tensors included."""
    header, body = split(small.read_bytes())
    luck = random.Random(seed)
    for _ in range(count):
        names = [name for name in header if name != "__metadata__"]
        one, other = luck.choice(names), luck.choice(names)
        kind = luck.randrange(6)
        if kind == 0:
            key = luck.choice(["dtype", "shape", "data_offsets"])
            header[one][key], header[other][key] = header[other][key], header[one][key]
        elif kind == 1:
            header[one], header[other] = header[other], header[one]
        elif kind == 2:
            header[one]["dtype"] = luck.choice(["U8", "I8", "I64", "U64", "F64", "BF16", "F16", "BOOL"])
        elif kind == 3:
            with suppress(ValueError, KeyError, TypeError, AttributeError):  # an edit before this one may have broken the list
                listed = json.loads(header["__metadata__"]["pqcodec_tensors"])
                first, second, key = luck.choice(listed), luck.choice(listed), luck.choice(sorted(listed[0]))
                if luck.random() < 0.5:
                    first.update(second | {"name": first["name"]})
                else:
                    first[key], second[key] = second[key], first[key]
                header["__metadata__"]["pqcodec_tensors"] = json.dumps(listed, ensure_ascii=False, separators=(",", ":"))
        elif kind == 4:
            key = luck.choice(sorted(header["__metadata__"]))
            text = header["__metadata__"][key]
            place = luck.randrange(len(text))
            header["__metadata__"][key] = text[:place] + luck.choice('0123456789abcdef{}[],:" ') + text[place + 1 :]
        else:
            header[one + luck.choice("x0 ")] = header.pop(one)
    check_found(joined(header, body), tmp_path / "f", read_everything(small))
