"""zarr: arrays of streams that decode by themselves, partial reads by the byte, and whole caches in a store."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bits, gaussian, rel_mse

import pqcodec
from pqcodec import CorruptStream, InvalidArgument, NonFiniteInput, Rope

zarr = pytest.importorskip("zarr", minversion="3.0.8")
from zarr.abc.store import Store  # noqa: E402
from zarr.storage import FsspecStore, LocalStore, MemoryStore, WrapperStore, ZipStore  # noqa: E402

from pqcodec.formats.cache import load_zarr, save_zarr  # noqa: E402
from pqcodec.formats.containers.writer import Coded, Piece  # noqa: E402
from pqcodec.formats.containers.zarr.codec import PQCodec  # noqa: E402
from pqcodec.formats.containers.zarr.reader import ZarrCache  # noqa: E402
from pqcodec.formats.containers.zarr.writer import document_seal, write_pieces  # noqa: E402
from pqcodec.stream.checksum import checksum  # noqa: E402

if not entry_points(group="zarr.codecs", name="pqcodec"):
    pytest.skip("pqcodec is installed without its entry points: pip install --editable .", allow_module_level=True)

ROPE = Rope(theta=100.0, dim=32, first_position=7)
CODECS = (
    PQCodec("pq4", seed=3),
    PQCodec(center="mean", exact_tokens=4, chunk_tokens=32),
    PQCodec("pq2.5", rope=ROPE, nonfinite="exact"),
    PQCodec(rope=Rope(frequencies=[1.0, 0.1], style="interleaved")),
)


def numbers(*shape: int, seed: int = 0, dtype: Any = np.float16) -> np.ndarray:
    return gaussian(*shape, seed=seed).numpy().astype(dtype)


def new_array(store: Any, x: np.ndarray, codec: Any, tokens: int = 128, **options: Any) -> Any:
    chunks = (1,) * (x.ndim - 2) + (tokens, x.shape[-1])
    array = zarr.create_array(store, shape=x.shape, dtype=x.dtype, chunks=chunks, serializer=codec, compressors=None, **options)
    array[...] = x
    return array


def direct(x: np.ndarray, codec: PQCodec) -> bytes:
    names = ("preset", "seed", "center", "rope", "exact_tokens", "chunk_tokens", "nonfinite")
    return pqcodec.encode(x, **{name: getattr(codec, name) for name in names})


def data_of(store: MemoryStore, key: str) -> bytes:
    return bytes(store._store_dict[key].to_bytes())


class Counting(WrapperStore):
    """Remembers what was read: (key, bytes)."""

    def __init__(self, store: Any) -> None:
        super().__init__(store)
        self.reads: list[tuple[str, int]] = []

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        data = await super().get(key, prototype, byte_range)
        if data is not None and not key.endswith("zarr.json"):
            self.reads.append((key, len(data)))
        return data

    get_ranges = getattr(Store, "get_ranges", None)  # newer zarr reads ranges by it: let it come by ``get``, too


# -- chunks --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("codec", CODECS, ids=range(len(CODECS)))
def test_a_chunk_is_the_stream_of_its_numbers(codec: PQCodec, dtype: Any) -> None:
    x = numbers(3, 256, 64, dtype=dtype)
    store = MemoryStore()
    array = new_array(store, x, codec)
    for head in range(3):
        for place in range(2):
            part = x[head : head + 1, 128 * place : 128 * (place + 1)]
            stream = direct(part, codec)
            assert data_of(store, f"c/{head}/{place}/0") == stream
            got = array[head : head + 1, 128 * place : 128 * (place + 1)]
            np.testing.assert_array_equal(bits(got), bits(pqcodec.decode(stream)))


@pytest.mark.parametrize("codec", CODECS, ids=range(len(CODECS)))
def test_zarr_json_holds_the_configuration(codec: PQCodec) -> None:
    store = MemoryStore()
    new_array(store, numbers(1, 128, 64), codec)
    stored = json.loads(data_of(store, "zarr.json"))["codecs"]
    assert stored == [json.loads(json.dumps(codec.to_dict()))]
    assert stored[0]["name"] == "pqcodec"
    assert PQCodec.from_dict(stored[0]) == codec == zarr.open(store).metadata.codecs[0]
    assert hash(codec) == hash(PQCodec.from_dict(stored[0]))


def test_a_bare_name_is_the_default_configuration() -> None:
    assert PQCodec.from_dict({"name": "pqcodec"}) == PQCodec() == PQCodec.from_dict({"name": "pqcodec", "configuration": {}})
    store = MemoryStore()
    array = new_array(store, numbers(1, 128, 64), {"name": "pqcodec", "configuration": {"preset": "pq5"}})
    assert array.metadata.codecs == (PQCodec("pq5"),)


def test_decoding_needs_nothing_of_the_configuration() -> None:
    x = numbers(1, 256, 64)
    store = MemoryStore()
    expected = new_array(store, x, PQCodec("pq5", center="mean", exact_tokens=3))[...]
    meta = json.loads(data_of(store, "zarr.json"))
    meta["codecs"] = [{"name": "pqcodec", "configuration": {"preset": "pq2", "chunk_tokens": 17}}]
    store._store_dict["zarr.json"] = type(store._store_dict["zarr.json"]).from_bytes(json.dumps(meta).encode())
    again = zarr.open(store)
    np.testing.assert_array_equal(again[...], expected)
    np.testing.assert_array_equal(again[:, 70:90], expected[:, 70:90])


def test_another_process_decodes_by_the_entry_point_alone(tmp_path: Path) -> None:
    x = numbers(2, 200, 64)
    expected = new_array(tmp_path / "kv.zarr", x, PQCodec(rope=ROPE))[...]
    code = (
        "import sys, zarr, numpy as np; a = zarr.open(sys.argv[1], mode='r');"
        "np.save(sys.argv[2], a[...]); print(a[1, 100:140].shape, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "kv.zarr"), str(tmp_path / "x.npy")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "(40, 64) False"
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected)


@pytest.mark.parametrize("shards", [None, (2, 256, 64)])
def test_every_selection_is_that_of_the_whole(shards: Any) -> None:
    x = numbers(3, 500, 64)
    array = new_array(MemoryStore(), x, PQCodec(center="mean", exact_tokens=2, chunk_tokens=16), shards=shards)
    whole = array[...]
    assert rel_mse(torch.from_numpy(x), torch.from_numpy(whole)) < 0.04
    places: list[Any] = [
        (slice(None), slice(100, 140)),
        (1, slice(127, 129), slice(None, 8)),
        (2, 499),
        (slice(0, 2), slice(3, 400, 37)),
        (slice(None), 128, 5),
        (slice(None), slice(0, 1)),
        (0, slice(450, 500)),
        (slice(None), slice(5, 5)),
    ]
    for place in places:
        np.testing.assert_array_equal(array[place], whole[place], err_msg=str(place))
    rows = [3, 130, 131, 499]
    np.testing.assert_array_equal(array.oindex[[0, 2], rows], whole[[0, 2]][:, rows])
    np.testing.assert_array_equal(array.vindex[[0, 1, 2, 1], rows, [1, 2, 3, 4]], whole[[0, 1, 2, 1], rows, [1, 2, 3, 4]])
    mask = np.random.default_rng(0).random(x.shape) < 0.001
    np.testing.assert_array_equal(array.vindex[mask], whole[mask])
    if shards is None:
        np.testing.assert_array_equal(array.blocks[1, 1], whole[1:2, 128:256])


def test_vectors_and_matrices_and_many_dimensions() -> None:
    for shape in ((64,), (100, 64), (2, 1, 3, 40, 16)):
        x = numbers(*shape)
        array = zarr.create_array(
            MemoryStore(), shape=shape, chunks=shape, dtype=x.dtype, serializer=PQCodec(), compressors=None
        )
        array[...] = x
        np.testing.assert_array_equal(array[...], pqcodec.decode(pqcodec.encode(x)))
        np.testing.assert_array_equal(array[..., 3:9], array[...][..., 3:9])


def test_filters_and_compressors_go_along() -> None:
    x = numbers(100, 2, 64)
    codecs: dict[str, Any] = {
        "filters": [zarr.codecs.TransposeCodec(order=(1, 0, 2))],
        "compressors": zarr.codecs.Crc32cCodec(),
    }
    store = MemoryStore()
    array = zarr.create_array(store, shape=x.shape, chunks=(50, 2, 64), dtype="f2", serializer=PQCodec(), **codecs)
    array[...] = x
    expected = pqcodec.decode(pqcodec.encode(np.ascontiguousarray(x[:50].transpose(1, 0, 2)))).transpose(1, 0, 2)
    np.testing.assert_array_equal(array[:50], expected)
    np.testing.assert_array_equal(array[20:30, 1], expected[20:30, 1])


# -- fill values ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fill", [0, 1.5, float("nan")])
def test_fill_values_behind_the_last_token_are_not_coded(fill: float) -> None:
    x = numbers(2, 200, 64)
    store = MemoryStore()
    array = new_array(store, x, PQCodec(center="mean"), fill_value=fill)
    assert data_of(store, "c/1/1/0") == pqcodec.encode(x[1:, 128:], center="mean")
    array.resize((2, 300, 64))
    for got in (array[:, 200:], array[:, 190:260][:, 10:]):
        assert np.isnan(got).all() if np.isnan(fill) else (got == fill).all()
    np.testing.assert_array_equal(array[1:, 128:200], pqcodec.decode(data_of(store, "c/1/1/0")))


def test_missing_and_empty_chunks_are_fill_values() -> None:
    store = MemoryStore()
    x = np.full((1, 256, 64), 2, np.float16)
    array = new_array(store, x, PQCodec(), fill_value=2)
    assert [key for key in store._store_dict if key.startswith("c")] == []
    assert (array[...] == 2).all()
    assert (array[:, 5:9] == 2).all()
    kept = new_array(store, x, PQCodec(center="mean"), fill_value=2, config={"write_empty_chunks": True}, overwrite=True)
    assert pqcodec.inspect(data_of(store, "c/0/0/0")).shape == (1, 0, 64)
    assert (kept[...] == 2).all()
    assert (kept[:, 5:9] == 2).all()


def test_appending_leaves_old_chunks_as_they_are() -> None:
    x = numbers(2, 512, 64)
    store = MemoryStore()
    array = new_array(store, x[:, :256], PQCodec(rope=ROPE))
    before = {key: data_of(store, key) for key in store._store_dict if key.startswith("c/")}
    old = array[...]
    array.resize((2, 512, 64))
    array[:, 256:] = x[:, 256:]
    assert {key: data_of(store, key) for key in before} == before
    assert len([key for key in store._store_dict if key.startswith("c/")]) == 2 * len(before)
    np.testing.assert_array_equal(array[:, :256], old)
    assert rel_mse(torch.from_numpy(x), torch.from_numpy(array[...])) < 0.04
    array.append(x[:, :128], axis=1)
    assert data_of(store, "c/1/4/0") == direct(x[1:, :128], PQCodec(rope=ROPE))


# -- bytes that are read -------------------------------------------------------------------------------------------
def test_one_chunk_of_a_shard_is_read_with_the_index_alone() -> None:
    x = numbers(1, 1024, 64)
    memory = MemoryStore()
    new_array(memory, x, PQCodec(center="mean"), shards=(1, 1024, 64))
    store = Counting(memory)
    array = zarr.open(store, mode="r+")
    one = len(pqcodec.encode(x[:, :128], center="mean"))
    assert len(data_of(memory, "c/0/0/0")) == 8 * one + 8 * 16 + 4
    np.testing.assert_array_equal(array[:, 256:384], pqcodec.decode(pqcodec.encode(x[:, 256:384], center="mean")))
    assert sorted(n for _, n in store.reads) == [8 * 16 + 4, one]


@pytest.mark.parametrize("exact", [0, 4])
def test_a_range_of_tokens_reads_the_blocks_that_hold_it(exact: int) -> None:
    x = numbers(1, 1024, 64)
    memory = MemoryStore()
    codec = PQCodec("pq3", center="mean", exact_tokens=exact)
    new_array(memory, x, codec, tokens=1024)
    stream = data_of(memory, "c/0/0/0")
    store = Counting(memory)
    part = zarr.open(store, mode="r+")[0, 300:400]
    np.testing.assert_array_equal(part, pqcodec.decode(stream)[0, 300:400])
    block = 64 * 24 + 4
    info = pqcodec.inspect(stream)
    assert [n for _, n in store.reads] == [info.header_bytes + info.side_bytes, 3 * block]
    assert len(stream) > 3 * sum(n for _, n in store.reads)
    store.reads.clear()
    zarr.open(store, mode="r+")[...]
    assert [n for _, n in store.reads] == [len(stream)]


# -- what goes wrong -----------------------------------------------------------------------------------------------
def test_damage_reaches_the_caller_with_its_place(tmp_path: Path) -> None:
    x = numbers(1, 256, 64)
    new_array(tmp_path / "kv.zarr", x, PQCodec())
    array = zarr.open(tmp_path / "kv.zarr", mode="r")
    path = tmp_path / "kv.zarr" / "c" / "0" / "1" / "0"
    sound = path.read_bytes()
    path.write_bytes(sound[:-300] + bytes([sound[-300] ^ 1]) + sound[-299:])
    for wanted in (slice(None), slice(130, 256), slice(200, 201)):
        with pytest.raises(CorruptStream, match="c/0/1/0: checksum does not hold: payload, leading index 0, tokens 64"):
            array[:, wanted]
    assert array[:, :128].shape == (1, 128, 64)
    for bad, message in (
        (sound[:-5], "cut off"),
        (sound[:50], "cut off|header"),
        (b"", "cut off|header"),
        (b"PK" + sound, "magic"),
    ):
        path.write_bytes(bad)
        for wanted in (slice(128, 256), slice(200, 201)):
            with pytest.raises(CorruptStream, match=message):
                array[:, wanted]
    path.write_bytes(pqcodec.encode(x[:, :128].astype(np.float32)))
    with pytest.raises(CorruptStream, match=r"holds float32 \(1, 128, 64\), the array's chunks are float16"):
        array[:, 128:]
    path.write_bytes(pqcodec.encode(x))
    with pytest.raises(CorruptStream, match="another array"):
        array[:, 128:]


def test_damage_inside_a_shard() -> None:
    store = MemoryStore()
    array = new_array(store, numbers(1, 256, 64), PQCodec(), shards=(1, 256, 64))
    raw = bytearray(data_of(store, "c/0/0/0"))
    raw[1000] ^= 4
    store._store_dict["c/0/0/0"] = type(store._store_dict["c/0/0/0"]).from_bytes(bytes(raw))
    with pytest.raises(CorruptStream, match="checksum"):
        array[...]
    with pytest.raises(CorruptStream, match="chunk of a shard: checksum"):
        array[:, :64]
    assert array[:, 128:].shape == (1, 128, 64)


@pytest.mark.parametrize("dtype", ["float64", "int32", "bool", "complex64"])
@pytest.mark.parametrize("shards", [None, (1, 256, 64)])
def test_other_dtypes_are_refused(dtype: str, shards: Any) -> None:
    with pytest.raises(InvalidArgument, match=rf"dtype {dtype} of the array; choose float16 or float32 \(bfloat16"):
        new_array(MemoryStore(), np.zeros((1, 256, 64), dtype), PQCodec(), shards=shards)


def test_chunks_hold_whole_vectors() -> None:
    with pytest.raises(InvalidArgument, match=r"chunks \(1, 128, 32\) of an array \(1, 256, 64\) cut its vectors"):
        zarr.create_array(MemoryStore(), shape=(1, 256, 64), chunks=(1, 128, 32), dtype="f2", serializer=PQCodec())
    with pytest.raises(InvalidArgument, match="head_dim 2048 is outside"):
        zarr.create_array(MemoryStore(), shape=(256, 2048), chunks=(128, 2048), dtype="f2", serializer=PQCodec())
    with pytest.raises(InvalidArgument, match="rope turns 32 channels"):
        zarr.create_array(MemoryStore(), shape=(256, 16), chunks=(128, 16), dtype="f2", serializer=PQCodec(rope=ROPE))


def test_nan_is_named_or_kept() -> None:
    x = numbers(1, 256, 64)
    x[0, 200, 3] = np.nan
    with pytest.raises(NonFiniteInput, match=r"chunk of a zarr array: element \[0, 72, 3\]"):
        new_array(MemoryStore(), x, PQCodec())
    np.testing.assert_array_equal(new_array(MemoryStore(), x, PQCodec(nonfinite="exact"))[0, 200], x[0, 200])


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"preset": "pq9"}, "preset 'pq9' is unknown"),
        ({"preset": 3}, "preset 3 is not of type str"),
        ({"preset": ["pq3"]}, "preset"),
        ({"seed": -1}, "seed -1 is outside"),
        ({"seed": 1.0}, "seed 1.0 is not of type int"),
        ({"seed": True}, "seed True is not of type int"),
        ({"center": "median"}, "center 'median' is unknown"),
        ({"center": "rope"}, "go together"),
        ({"center": "mean", "rope": {}}, "go together"),
        ({"rope": {"theta": "big"}}, "theta"),
        ({"rope": {"base": 1e4}}, "rope 'base' is unknown"),
        ({"rope": {"frequencies": 1}}, "frequencies"),
        ({"rope": {"style": "both"}}, "style 'both' is unknown"),
        ({"rope": {"first_position": -1}}, "first_position -1 is outside"),
        ({"rope": 1e4}, "rope 10000.0 is not of type object"),
        ({"exact_tokens": -1}, "exact_tokens -1 is outside"),
        ({"chunk_tokens": 0}, "chunk_tokens 0 is outside"),
        ({"chunk_tokens": None}, "chunk_tokens None is not of type int"),
        ({"nonfinite": "drop"}, "nonfinite 'drop' is unknown"),
        ({"bits": 3}, "configuration 'bits' is unknown; preset, seed"),
        ([], None),
        ([1], "configuration is expected"),
    ],
)
def test_bad_configurations_are_refused(configuration: Any, message: str | None) -> None:
    data = {"name": "pqcodec", "configuration": configuration}
    if message is None:
        assert PQCodec.from_dict(data) == PQCodec()
        return
    with pytest.raises(InvalidArgument, match=message):
        PQCodec.from_dict(data)


# -- whole caches --------------------------------------------------------------------------------------------------
def keys_under_rope(heads: int, tokens: int, head_dim: int, rope: Rope) -> torch.Tensor:
    """Gaussian keys with a large bias, turned by their position."""
    from pqcodec.stages import centre

    x = gaussian(heads, tokens, head_dim, seed=1).double().numpy() + 8 * gaussian(head_dim, seed=2).double().numpy()
    field = rope.field(head_dim)
    cos, sin = (part.astype(np.float64) for part in centre.phases(field, 0, tokens))
    p, q = centre.pairs(field)
    turned = x.copy()
    turned[..., p], turned[..., q] = x[..., p] * cos - x[..., q] * sin, x[..., p] * sin + x[..., q] * cos
    return torch.from_numpy(turned).half()


@pytest.mark.parametrize("first", [0, 1000])
def test_a_constant_first_position_centres_every_chunk(first: int) -> None:
    """A chunk's own position would turn the mean, and change the error by rounding only."""
    rope = Rope(theta=10000.0)
    x = keys_under_rope(2, 1024, 64, rope).numpy()
    array = new_array(MemoryStore(), x, PQCodec(rope=Rope(theta=10000.0, first_position=first)), tokens=256)
    for start in range(0, 1024, 256):
        part = torch.from_numpy(x[:, start : start + 256])
        own = pqcodec.encode(part, center="rope", rope=Rope(theta=10000.0, first_position=start))
        mine = rel_mse(part, torch.from_numpy(array[:, start : start + 256]))
        assert mine == pytest.approx(rel_mse(part, pqcodec.decode(own)), rel=0.02)
        assert mine < 0.2 * rel_mse(part, pqcodec.decode(pqcodec.encode(part)))


def cache(dtype: torch.dtype = torch.float16, tokens: int = 300) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rope = Rope(theta=10000.0)
    return [(keys_under_rope(2, tokens, 64, rope).to(dtype), gaussian(2, tokens, 64, seed=9 + i).to(dtype)) for i in range(2)]


@pytest.mark.parametrize("kind", ["path", "local", "memory", "zip", "fsspec", "url"])
@pytest.mark.parametrize("shards", [None, 2])
def test_caches_in_every_store(kind: str, shards: int | None, tmp_path: Path) -> None:
    url = f"memory://caches-in-every-store/{kind}-{shards}"
    if kind in ("fsspec", "url"):
        pytest.importorskip("fsspec")
    places: dict[str, Any] = {
        "path": lambda: str(tmp_path / "kv.zarr"),
        "local": lambda: LocalStore(tmp_path / "kv.zarr"),
        "memory": MemoryStore,
        "zip": lambda: ZipStore(tmp_path / "kv.zip", mode="w"),
        "fsspec": lambda: FsspecStore.from_url(url),
        "url": lambda: url,
    }
    store = places[kind]()
    layers = cache()
    save_zarr(
        store, layers, rope=Rope(theta=10000.0), tokens_per_chunk=128, chunks_per_shard=shards, metadata={"model": "tiny"}
    )
    if kind == "zip":
        store.close()
        store = ZipStore(tmp_path / "kv.zip", mode="r")
    back = load_zarr(store)
    assert len(back) == 2
    for pair, found in zip(layers, back, strict=True):
        for x, y in zip(pair, found, strict=True):
            assert (y.dtype, y.shape) == (x.dtype, x.shape)
            assert rel_mse(x, y) < 0.04
            np.testing.assert_array_equal(bits(x[:, :4]), bits(y[:, :4]))
    for pair, found in zip(back, load_zarr(store, tokens=(100, 140)), strict=True):
        for x, y in zip(pair, found, strict=True):
            np.testing.assert_array_equal(bits(x[:, 100:140]), bits(y))
    root = zarr.open(store, mode="r")
    assert root.attrs["metadata"] == {"model": "tiny"}
    key = root["layers/1/key"]
    assert {name: key.attrs[name] for name in ("layer", "role", "layout")} == {
        "layer": 1,
        "role": "key",
        "layout": "..., tokens, head_dim",
    }
    assert key.metadata.dimension_names == (None, "tokens", "head_dim")
    np.testing.assert_array_equal(key[1, 0:256], back[1][0][1, 0:256].numpy())


def test_the_document_is_hashed_as_the_specification_writes_it() -> None:
    numbers = [0.0001, 0.00001, 1e15, 1e16, 1.5e16, 0.0, -0.0, 1, 2**70]
    document = {"b": {"z": None, "a": True}, "attributes": {"x": 1}, "a": numbers, "é": '"\\/\n\t\x01\x7f'}
    text = '{"a":[0.0001,1e-05,1000000000000000.0,1e+16,1.5e+16,0.0,-0.0,1,1180591620717411303424],'
    text += '"b":{"a":true,"z":null},"é":"\\"\\\\/\\n\\t\\u0001\x7f"}'
    assert document_seal(document) == checksum(text.encode()).to_bytes(4, "little").hex()


@pytest.mark.parametrize("shape", [(2, 0, 64), (0, 5, 64), (0, 64)])
@pytest.mark.parametrize("shards", [None, 2])
def test_empty_tensors_stay_coded(shape: tuple[int, ...], shards: int | None) -> None:
    """Their streams go along, though zarr has no chunk for them and reads an empty array."""
    stream = pqcodec.encode(np.ones(shape, np.float16), preset="quad3", backend="reference")
    piece = Piece("k", True, 0, "key", shape, "float16", "..., tokens, head_dim", lambda: Coded.of(stream))
    store = MemoryStore()
    write_pieces(store, [piece], chunks_per_shard=shards)
    with ZarrCache(store) as file:
        assert (file.entry("k").coded, file.decode("k").shape, file.verify()) == (True, shape, [])
        held = file.stream("k")
        assert held.read(0, held.size).tobytes() == stream
    assert zarr.open(store, mode="r")["k"][...].shape == shape


def test_only_the_first_chunk_has_exact_tokens() -> None:
    store = MemoryStore()
    save_zarr(store, cache(tokens=700), tokens_per_chunk=256)
    streams = [pqcodec.inspect(data_of(store, f"layers/0/value/c/0/{i}/0")) for i in range(3)]
    assert [info.exact_tokens for info in streams] == [4, 0, 0]
    assert json.loads(data_of(store, "layers/0/value/zarr.json"))["codecs"] == [PQCodec(chunk_tokens=24).to_dict()]
    few = [(key[:, :3], value[:, :3]) for key, value in cache()]
    save_zarr(store, few, overwrite=True)
    assert all(
        torch.equal(x, y) for pair, back in zip(few, load_zarr(store), strict=True) for x, y in zip(pair, back, strict=True)
    )


def test_bfloat16_is_float32_in_the_store() -> None:
    store = MemoryStore()
    layers = cache(torch.bfloat16, tokens=200)
    save_zarr(store, layers, exact_tokens=0)
    assert zarr.open(store)["layers/0/key"].dtype == np.float32
    for (key, value), (key_back, value_back) in zip(layers, load_zarr(store), strict=True):
        np.testing.assert_array_equal(bits(key_back), bits(pqcodec.decode(pqcodec.encode(key, center="mean"))))
        np.testing.assert_array_equal(bits(value_back), bits(pqcodec.decode(pqcodec.encode(value))))


def test_numpy_caches_stay_numpys() -> None:
    store = MemoryStore()
    save_zarr(store, [(numbers(2, 50, 64), numbers(2, 50, 64, dtype=np.float32))])
    ((key, value),) = load_zarr(store)
    assert (type(key), key.dtype, value.dtype) == (np.ndarray, np.float16, np.float32)


def test_caches_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    layers = cache()
    store = MemoryStore()
    zarr.create_group(store)
    with pytest.raises(InvalidArgument, match="no cache of save_zarr"):
        load_zarr(store)
    with pytest.raises(InvalidArgument, match="overwrite=True"):
        save_zarr(store, layers)
    save_zarr(store, layers, overwrite=True)
    with pytest.raises(InvalidArgument, match=r"'layers.0.key': tokens 0 .. 301 is outside 0 .. 300"):
        load_zarr(store, tokens=(0, 301))
    bad = [layers[0], (layers[1][0], layers[1][1].clone())]
    bad[1][1][1, 5, 7] = float("inf")
    with pytest.raises(NonFiniteInput, match=r"'layers.1.value': element \[1, 5, 7\]"):
        save_zarr(tmp_path / "kv.zarr", bad)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        load_zarr(tmp_path / "kv.zarr")
    store = MemoryStore()
    with pytest.raises(NonFiniteInput):
        save_zarr(store, bad)
    with pytest.raises(InvalidArgument, match="not written to its end"):
        load_zarr(store)
    with pytest.raises(InvalidArgument, match="dtype float64"):
        save_zarr(MemoryStore(), [(numbers(4, 64, dtype=np.float64),) * 2], center_keys=False)
    with pytest.raises(InvalidArgument, match="chunks_per_shard 2"):
        save_zarr(MemoryStore(), layers, chunks_per_shard=2, tokens_per_chunk=None)
    with pytest.raises(InvalidArgument, match="rope is used to centre keys"):
        save_zarr(MemoryStore(), layers, rope=ROPE, center_keys=False)
