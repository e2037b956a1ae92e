"""The .pqkv container: round trips, damage, truncation, what a reader refuses, and what a writer leaves behind."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import pqcodec
from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument, NonFiniteInput, PQError, TruncatedStream, UnsupportedStream
from pqcodec.formats import PQKVFile, PQKVWriter, load_cache, save_cache
from pqcodec.formats.policy.names import TensorRole, role_of
from pqcodec.stream.checksum import checksum

REFERENCE = {"backend": "reference"}


def tensor(*shape: int, dtype: type = np.float16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def container(metadata: dict | None = None, **tensors: np.ndarray) -> bytes:
    """A file of tensors; floating-point ones are coded."""
    file = io.BytesIO()
    with PQKVWriter(file, metadata) as writer:
        for name, x in tensors.items():
            if x.dtype.kind == "f" and x.ndim > 1:
                writer.add(name, x, role="key", layer=0, preset="pq2", **REFERENCE)
            else:
                writer.add_exact(name, x)
    return file.getvalue()


@pytest.fixture(scope="module")
def small() -> bytes:
    return container({"m": 1}, k=tensor(1, 2, 16), n=np.arange(3, dtype=np.int8))


# -- round trips -------------------------------------------------------------------------------------------------
def test_tensors_come_back(tmp_path: Path) -> None:
    x = tensor(2, 3, 70, 64)
    with PQKVWriter(tmp_path / "f.pqkv", {"model": "tiny"}) as writer:
        info = writer.add("layers.7.key", x, layer=7, role="key", center="mean", exact_tokens=4, **REFERENCE)
        writer.add_exact("positions", np.arange(70))
    with PQKVFile(tmp_path / "f.pqkv") as file:
        assert file.names == ("layers.7.key", "positions")
        assert file.metadata == {"model": "tiny"}
        entry = file.entry("layers.7.key")
        assert (entry.coded, entry.layer, entry.role, entry.shape, entry.dtype) == (True, 7, "key", (2, 3, 70, 64), "float16")
        assert file.inspect("layers.7.key") == info
        expected = pqcodec.decode(pqcodec.encode(x, center="mean", exact_tokens=4, **REFERENCE), **REFERENCE)
        np.testing.assert_array_equal(file.decode("layers.7.key", **REFERENCE), expected)
        np.testing.assert_array_equal(file.decode("layers.7.key", tokens=(3, 68), **REFERENCE), expected[:, :, 3:68])
        np.testing.assert_array_equal(
            file.decode("layers.7.key", leading=(1, 3), **REFERENCE), expected.reshape(6, 70, 64)[1:3]
        )
        np.testing.assert_array_equal(file.decode("positions"), np.arange(70))
        assert file.verify(**REFERENCE) == []


@pytest.mark.parametrize(
    "x",
    [
        np.array(3.5, np.float32),
        np.arange(6, dtype=np.int64).reshape(2, 3),
        np.array([True, False]),
        np.zeros((0, 4), np.float64),
        np.array([1 + 2j], np.complex64),
        np.arange(4, dtype=">i4"),
        np.arange(12, dtype=np.uint16).reshape(3, 4).T,
    ],
    ids=lambda x: f"{x.dtype}-{x.shape}",
)
def test_exact_numpy(x: np.ndarray) -> None:
    file = io.BytesIO()
    with PQKVWriter(file) as writer:
        writer.add_exact("x", x)
    y = PQKVFile(file).decode("x")
    assert isinstance(y, np.ndarray)
    assert (y.dtype, y.shape) == (x.dtype.newbyteorder("="), x.shape)
    np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "int64", "bool"])
def test_exact_torch(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    x = torch.tensor([[0.0, 1.0], [2.0, 4.0]]).to(getattr(torch, dtype))
    file = io.BytesIO()
    with PQKVWriter(file) as writer:
        writer.add_exact("x", x.T)
        writer.add_exact("scalar", x[1, 1])
    with PQKVFile(file) as read:
        assert read.decode("x").dtype == x.dtype
        assert torch.equal(read.decode("x").float(), x.T.float())
        assert read.decode("scalar").shape == ()


def test_exact_tensors_are_cut_like_coded_ones() -> None:
    x = np.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4)
    file = PQKVFile(container(x=x, line=np.arange(4)))
    np.testing.assert_array_equal(file.decode("x", tokens=(1, 3)), x[:, :, 1:3])
    np.testing.assert_array_equal(file.decode("x", tokens=(1, 3), leading=(2, 4)), x.reshape(6, 5, 4)[2:4, 1:3])
    with pytest.raises(InvalidArgument, match=r"outside 0 \.\. 5"):
        file.decode("x", tokens=(1, 6))
    with pytest.raises(InvalidArgument, match="head_dim"):
        file.decode("line", tokens=(0, 1))


def test_empty_file() -> None:
    file = PQKVFile(container())
    assert file.names == ()
    assert file.metadata == {}
    assert file.verify() == []


def test_ready_streams_are_taken_over() -> None:
    stream = pqcodec.encode(tensor(4, 64), **REFERENCE)
    file = io.BytesIO()
    with PQKVWriter(file) as writer:
        assert writer.add_stream("x", stream) == pqcodec.inspect(stream)
    entry = PQKVFile(file).entry("x")
    assert file.getvalue()[entry.body_start : entry.body_start + entry.body_bytes] == stream


def test_only_wanted_bytes_are_read() -> None:
    class Counting(io.BytesIO):
        taken = 0

        def read(self, count: int | None = -1) -> bytes:  # type: ignore[override]
            data = super().read(count)
            self.taken += len(data)
            return data

    data = container(a=tensor(1920, 16), b=tensor(1920, 16))
    source = Counting(data)
    PQKVFile(source).decode("b", tokens=(640, 704), **REFERENCE)
    assert source.taken < len(data) / 8


# -- whole caches ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rope", [None, pqcodec.Rope(theta=10000.0)], ids=["mean", "rope"])
def test_cache_round_trip(tmp_path: Path, rope: pqcodec.Rope | None) -> None:
    layers = [(tensor(1, 2, 20, 64, seed=i), tensor(1, 2, 20, 64, seed=9 + i)) for i in range(2)]
    seen: list[tuple[int, int]] = []
    save_cache(tmp_path / "c.pqkv", layers, rope=rope, metadata={"a": 1}, progress=lambda *done: seen.append(done), **REFERENCE)
    with PQKVFile(tmp_path / "c.pqkv") as file:
        assert file.names == ("layers.0.key", "layers.0.value", "layers.1.key", "layers.1.value")
        assert file.inspect("layers.1.key").centered == ("rope" if rope else "mean")
        assert file.inspect("layers.1.value").centered is None
    for (key, value), (k, v) in zip(layers, load_cache(tmp_path / "c.pqkv", **REFERENCE), strict=True):
        np.testing.assert_array_equal(k[:, :, :4], key[:, :, :4])
        assert ((k - key).astype(float) ** 2).sum() < 0.05 * (key.astype(float) ** 2).sum()
        assert ((v - value).astype(float) ** 2).sum() < 0.05 * (value.astype(float) ** 2).sum()
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_cache_with_a_missing_layer_is_refused() -> None:
    file = io.BytesIO()
    with PQKVWriter(file) as writer:
        for role in ("key", "value"):
            writer.add(f"layers.1.{role}", tensor(4, 64), layer=1, role=role, **REFERENCE)
    with pytest.raises(InvalidArgument, match="each layer from 0 on"):
        load_cache(file, **REFERENCE)


def test_cpu_backend_reads_what_the_reference_wrote() -> None:
    file = PQKVFile(container(k=tensor(2, 70, 64)))
    np.testing.assert_array_equal(file.decode("k", backend="cpu"), file.decode("k", **REFERENCE))


# -- damage ------------------------------------------------------------------------------------------------------
def read_everything(data: bytes) -> None:
    """Decode all; raises where anything is damaged."""
    file = PQKVFile(data)
    _ = file.metadata
    for name in file.names:
        file.decode(name, **REFERENCE)


def is_found(data: bytes) -> bool:
    try:
        return bool(PQKVFile(data).verify(**REFERENCE))
    except PQError:
        return True


def test_every_flipped_bit_is_found(small: bytes) -> None:
    assert not is_found(small)
    data = bytearray(small)
    missed = []
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        if not is_found(bytes(data)):
            missed.append(divmod(bit, 8))
        data[bit // 8] ^= 1 << bit % 8
    assert missed == []


def test_decoding_all_finds_a_damaged_byte(small: bytes) -> None:
    read_everything(small)
    for place in range(len(small)):
        with pytest.raises(PQError):
            read_everything(small[:place] + bytes([small[place] ^ 0x10]) + small[place + 1 :])


def test_every_prefix_is_truncated(small: bytes) -> None:
    for size in range(len(small)):
        with pytest.raises(TruncatedStream):
            PQKVFile(small[:size])


def test_a_file_that_ends_in_something_else_is_corrupt(small: bytes) -> None:
    """Where the footer is missing, a file is cut off only if all that is there could be its beginning."""
    end = len(small) - 24
    for rest in (b"\0", b"garbage", bytes(23)):
        with pytest.raises(CorruptStream, match="neither a frame nor a footer"):
            PQKVFile(small[:end] + rest)
    torn = bytearray(small[: PQKVFile(small).entry("n").body_start + 1])
    torn[torn.rindex(b"PQFR") + 30] ^= 1  # of the last frame's meta
    with pytest.raises(CorruptStream, match="checksum does not hold"):
        PQKVFile(bytes(torn))


def test_a_file_inside_a_file_does_not_end_it(small: bytes) -> None:
    outer = container(inner=np.frombuffer(small, np.uint8))
    end = outer.index(small) + len(small)
    with pytest.raises(TruncatedStream):
        PQKVFile(outer[:end])


def test_verify_names_tensor_and_tokens() -> None:
    data = bytearray(container(a=tensor(2, 200, 64), b=np.arange(5)))
    file = PQKVFile(bytes(data))
    data[file.entry("a").body_start + file.inspect("a").stream_bytes - 8] ^= 1
    data[file.entry("b").body_start] ^= 1
    seen: list[tuple[int, int]] = []
    (first, damage), (second, text) = PQKVFile(bytes(data)).verify(lambda *done: seen.append(done), **REFERENCE)
    assert (first, second) == ("a", "b")
    assert isinstance(damage, pqcodec.Damage)
    assert (damage.leading, damage.tokens) == (1, (192, 200))
    assert "checksum" in str(text)
    assert seen == sorted(seen)


def test_other_tensors_of_a_damaged_file_are_read() -> None:
    x = tensor(2, 64)
    data = bytearray(container(a=x, b=x))
    data[PQKVFile(bytes(data)).entry("a").body_start + 70] ^= 1
    file = PQKVFile(bytes(data))
    assert file.decode("b", **REFERENCE).shape == x.shape
    with pytest.raises(CorruptStream, match="'a'"):
        file.decode("a", **REFERENCE)


# -- what a reader refuses ---------------------------------------------------------------------------------------
def sealed(record: bytes) -> bytes:
    return record + struct.pack("<I", checksum(record))


def frame(kind: int, meta: bytes, body: bytes = b"", magic: bytes = b"PQFR", reserved: bytes = bytes(3)) -> bytes:
    fields = magic + bytes([kind]) + reserved + struct.pack("<IQ", len(meta), len(body))
    return fields + struct.pack("<I", checksum(fields + meta)) + meta + body


def assemble(*frames: bytes, listed: list[dict] | None = None, index: bytes | None = None, **head: int) -> bytes:
    """A file from frames as a hostile writer would build it."""
    data = sealed(b"\x89PQF" + bytes([head.get("version", 1)]) + bytes([head.get("reserved", 0)]) + bytes(6))
    found = []
    for piece in frames:
        _, kind, _, meta_bytes, body_bytes, _ = c.FRAME_STRUCT.unpack_from(piece)
        meta = json.loads(piece[24 : 24 + meta_bytes])
        item = {"offset": len(data), "kind": kind, "meta_bytes": meta_bytes, "body_bytes": body_bytes}
        found.append(item | {key: meta.get(key) for key in ("name", "layer", "role")})
        data += piece
    start = len(data)
    body = json.dumps(found if listed is None else listed).encode() if index is None else index
    data += frame(4, b"{}", sealed(body))
    return data + sealed(b"PQFE" + struct.pack("<QQ", start, len(data) + 24))


def exact_frame(body: bytes = sealed(bytes(4)), **changes: object) -> bytes:
    meta = {"name": "x", "layer": None, "role": "other", "shape": [4], "dtype": "int8", "layout": "...", "numpy": True}
    return frame(2, json.dumps(meta | changes).encode(), body)


def test_hand_built_file_is_read() -> None:
    file = PQKVFile(assemble(frame(3, b'{"a":[1]}'), exact_frame(later=1)))
    assert file.metadata == {"a": [1]}
    np.testing.assert_array_equal(file.decode("x"), np.zeros(4, np.int8))


def test_json_may_be_nested_500_deep() -> None:
    deep = b'{"a":' * 500 + b"1" + b"}" * 500
    assert PQKVFile(assemble(frame(3, deep))).metadata == json.loads(deep)


def test_layers_are_numbers_below_2_to_the_63() -> None:
    assert PQKVFile(assemble(exact_frame(layer=(1 << 63) - 1))).entry("x").layer == (1 << 63) - 1
    with pytest.raises(CorruptStream, match="layer"):
        PQKVFile(assemble(exact_frame(layer=1 << 63)))


@pytest.mark.parametrize("numpy", [True, False])
def test_bools_are_0_and_1(numpy: bool) -> None:
    """A reader takes any other byte than 0 as true, a writer writes 0 and 1."""
    x = PQKVFile(assemble(exact_frame(sealed(b"\0\1\7\0"), dtype="bool", numpy=numpy))).decode("x")
    assert (np.asarray(x).view(np.uint8).tolist(), x.tolist()) == ([0, 1, 1, 0], [False, True, True, False])
    odd = np.frombuffer(b"\0\1\7\0", np.bool_)
    buffer = io.BytesIO()
    with PQKVWriter(buffer) as writer:
        writer.add_exact("x", odd if numpy else torch.from_numpy(odd.copy()))
    assert buffer.getvalue()[PQKVFile(buffer).entry("x").body_start :][:4] == b"\0\1\1\0"


ITEM = {"offset": 16, "kind": 2, "name": "x", "layer": None, "role": "other", "meta_bytes": 2, "body_bytes": 8}
REFUSED = {
    "another magic": (b"GIF89a" + bytes(40), CorruptStream, "right file"),
    "version": (assemble(version=3), UnsupportedStream, "version 3"),
    "reserved head": (assemble(reserved=1), UnsupportedStream, "reserved"),
    "trailing bytes": (assemble() + bytes(100), CorruptStream, "100 bytes behind"),
    "name twice": (assemble(exact_frame(), exact_frame()), CorruptStream, "called 'x'"),
    "metadata twice": (assemble(frame(3, b"{}"), frame(3, b"{}")), CorruptStream, "two file metadata"),
    "unknown kind": (assemble(frame(9, b"{}")), UnsupportedStream, "kind 9"),
    "index no list": (assemble(index=b"{}"), CorruptStream, "list"),
    "index no JSON": (assemble(index=b"[{]"), CorruptStream, "not JSON"),
    "index NaN": (assemble(index=b"[NaN]"), CorruptStream, "NaN"),
    "index no UTF-8": (assemble(index=b'["\xff"]'), CorruptStream, "not JSON"),
    "index too deep": (assemble(index=b"[" * 100_000), CorruptStream, "not JSON"),
    "index huge number": (assemble(index=b"[" + b"9" * 10_000 + b"]"), CorruptStream, "not JSON"),
    "index kind true": (assemble(exact_frame(), listed=[ITEM | {"kind": True}]), UnsupportedStream, "kind True"),
    "index fields": (assemble(listed=[{"offset": 16}]), CorruptStream, "not an object"),
    "index gap": (assemble(listed=[ITEM | {"offset": 17}]), CorruptStream, "at byte 17"),
    "index beyond": (assemble(listed=[ITEM | {"body_bytes": 1 << 62}]), CorruptStream, "frames end at byte"),
    "index negative": (assemble(listed=[ITEM | {"body_bytes": -8}]), CorruptStream, "numbers from 0"),
    "index lists an index": (assemble(listed=[ITEM | {"kind": 4}]), CorruptStream, "no index"),
    "empty name": (assemble(exact_frame(name="")), CorruptStream, "not empty"),
    "half a surrogate": (assemble(exact_frame(name="\ud800")), CorruptStream, "Unicode"),
    "role": (assemble(exact_frame(role="query")), CorruptStream, "role"),
    "layer": (assemble(exact_frame(layer=-1)), CorruptStream, "layer"),
    "a frame is missing": (assemble(exact_frame(), listed=[]), CorruptStream, "index is at"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_opening_refuses(case: str) -> None:
    data, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        PQKVFile(data)


REFUSED_TENSORS = {
    "shape and body": (exact_frame(shape=[5]), CorruptStream, "does not go with a body"),
    "huge shape": (exact_frame(shape=[1 << 40, 1 << 40]), CorruptStream, "caps"),
    "huge empty shape": (exact_frame(shape=[0, 1 << 62]), CorruptStream, "caps"),
    "shape no list": (exact_frame(shape=4), CorruptStream, "shape"),
    "dtype": (exact_frame(dtype="object"), UnsupportedStream, "dtype"),
    "dtype of torch": (exact_frame(dtype="float8_e5m2"), CorruptStream, "numpy has no"),
    "numpy flag": (exact_frame(numpy=1), CorruptStream, "true or false"),
    "numpy null": (exact_frame(numpy=None), CorruptStream, "true or false"),
    "error no number": (exact_frame(rel_mse="0.1"), CorruptStream, "rel_mse"),
    "error null": (exact_frame(rel_mse=None), CorruptStream, "rel_mse"),
    "error below 0": (exact_frame(rel_mse=-1), CorruptStream, "rel_mse"),
    "error too large": (exact_frame(rel_mse=10**400), CorruptStream, "rel_mse"),
    "a part without a first": (exact_frame(first_token=4), CorruptStream, "no part before it"),
    "no room for a checksum": (exact_frame(bytes(2)), CorruptStream, "body"),
    "reserved frame bytes": (
        frame(2, exact_frame()[24:-8], sealed(bytes(4)), reserved=b"\0\1\0"),
        UnsupportedStream,
        "reserved",
    ),
}


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_decoding_refuses(case: str) -> None:
    data, error, message = REFUSED_TENSORS[case]
    file = PQKVFile(assemble(data))
    with pytest.raises(error, match=message):
        file.decode("x")


def test_a_stream_that_contradicts_its_frame_is_refused() -> None:
    stream = pqcodec.encode(tensor(4, 64), **REFERENCE)
    meta = {"name": "x", "layer": None, "role": "other", "shape": [5, 64], "dtype": "float16", "layout": "..."}
    with pytest.raises(CorruptStream, match="the file says"):
        PQKVFile(assemble(frame(1, json.dumps(meta).encode(), stream))).decode("x", **REFERENCE)


@pytest.mark.parametrize(
    ("told", "of_frame"), [({"role": "key"}, {}), ({"layer": 1}, {"layer": True}), ({"layer": 1}, {"layer": 1.0})]
)
def test_an_index_that_contradicts_a_frame_is_refused(told: dict, of_frame: dict) -> None:
    data = assemble(exact_frame(**of_frame), listed=[])
    item = ITEM | dict(zip(("meta_bytes", "body_bytes"), struct.unpack_from("<IQ", data, 24), strict=True)) | told
    data = assemble(exact_frame(**of_frame), listed=[item])
    with pytest.raises(CorruptStream, match="the index says"):
        PQKVFile(data).decode("x")


def test_parts_tell_by_a_number_where_they_begin() -> None:
    stream = pqcodec.encode(tensor(1, 64), **REFERENCE)
    meta = {"name": "x", "layer": None, "role": "other", "shape": [1, 64], "dtype": "float16", "layout": "..."}

    def file(first_token: object) -> PQKVFile:
        parts = (frame(1, json.dumps(told).encode(), stream) for told in (meta, meta | {"first_token": first_token}))
        return PQKVFile(assemble(*parts, version=2))

    assert file(1).entry("x").shape == (2, 64)
    for wrong in (True, 1.0, 2, None):
        with pytest.raises(CorruptStream, match="1 is expected"):
            file(wrong).entry("x")


def test_a_single_stream_is_told_apart() -> None:
    with pytest.raises(InvalidArgument, match="single stream"):
        PQKVFile(pqcodec.encode(tensor(4, 64), **REFERENCE))


def test_unknown_names_are_told(small: bytes) -> None:
    with pytest.raises(InvalidArgument, match=r"no tensor is called 'q'.*'k', 'n'"):
        PQKVFile(small).decode("q")


# -- what a writer does ------------------------------------------------------------------------------------------
def test_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "f.pqkv"
    path.write_bytes(b"old")
    x = tensor(4, 64)
    x[1, 2] = np.nan
    with pytest.raises(NonFiniteInput, match=r"'x'.*nan"), PQKVWriter(path) as writer:
        writer.add("x", x, **REFERENCE)
    assert [p.name for p in tmp_path.iterdir()] == ["f.pqkv"]
    assert path.read_bytes() == b"old"


def test_a_write_that_failed_fails_the_file() -> None:
    class Full(io.BytesIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            if len(data) > 100:
                raise OSError(28, "No space left on device")
            return super().write(data)

    def swallow(writer: PQKVWriter) -> None:
        with pytest.raises(OSError, match="No space"):
            writer.add_exact("x", np.arange(100))

    with pytest.raises(OSError, match="not complete"), PQKVWriter(Full()) as writer:
        swallow(writer)


def test_short_writes_are_completed(small: bytes) -> None:
    class Short(io.BytesIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            return super().write(data[:7])

    file = Short()
    with PQKVWriter(file) as writer:
        writer.add_exact("x", np.arange(100))
    assert PQKVFile(file.getvalue()).verify() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"role": "query"}, "role"), ({"layer": -1}, "layer"), ({"name": ""}, "name"), ({"name": "\ud800"}, "Unicode")],
)
def test_writer_refuses(options: dict, message: str) -> None:
    with PQKVWriter(io.BytesIO()) as writer, pytest.raises(InvalidArgument, match=message):
        writer.add_exact(**{"name": "x", "array": np.arange(3), **options})


def test_writer_refuses_names_twice_and_metadata_beyond_json() -> None:
    with PQKVWriter(io.BytesIO()) as writer:
        writer.add_exact("x", np.arange(3))
        with pytest.raises(InvalidArgument, match="unique"):
            writer.add("x", tensor(4, 64), **REFERENCE)
    with pytest.raises(InvalidArgument, match="JSON"), PQKVWriter(io.BytesIO(), {"a": float("nan")}):
        pass
    with pytest.raises(InvalidArgument, match="dtype"), PQKVWriter(io.BytesIO()) as writer:
        writer.add_exact("x", np.array([{}], object))


def test_writer_outside_with_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="not open"):
        PQKVWriter(io.BytesIO()).add_exact("x", np.arange(3))


def test_writing_to_a_folder_or_without_one_fails_early(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), PQKVWriter(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), PQKVWriter(tmp_path / "none" / "f.pqkv"):
        pass


# -- names -------------------------------------------------------------------------------------------------------
NAMES = {
    "layers.3.key": TensorRole("key", 3),
    "model.layers.0.self_attn.k_cache": TensorRole("key", 0),
    "key_cache.3": TensorRole("key", 3),
    "past_key_values.3.key": TensorRole("key", 3),
    "past_key_values.3.decoder.value": TensorRole("value", 3),
    "k_3": TensorRole("key", 3),
    "3.keys": TensorRole("key", 3),
    "present.3.value": TensorRole("value", 3),
    "v.3": TensorRole("value", 3),
    "V12": TensorRole("value", 12),
    "keys[3]": TensorRole("key", 3),
    "transformer.h.5.attn.v": TensorRole("value", 5),
    "layer3.value_states": TensorRole("value", 3),
    "model.layers.1.experts.2.key": TensorRole("key", 1),
    "values": TensorRole("value"),
    "layers.0.self_attn.k_proj.weight": TensorRole("other"),
    "layers.0.k_norm": TensorRole("other"),
    "positions": TensorRole("other"),
    "kv": TensorRole("other"),
    "": TensorRole("other"),
}


@pytest.mark.parametrize("name", NAMES)
def test_conventions(name: str) -> None:
    assert role_of(name) == NAMES[name]


def test_a_regex_replaces_the_conventions_of_its_role() -> None:
    assert role_of("block7_kk", keys="kk$") == TensorRole("key", 7)
    assert role_of("layers.3.key", keys="kk$") == TensorRole("other")
    assert role_of("layers.3.value", keys="kk$") == TensorRole("value", 3)
    with pytest.raises(InvalidArgument, match="narrower"):
        role_of("x", keys="x", values="x")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        role_of("x", keys="(")


def test_long_names_cost_no_time() -> None:
    assert role_of("layers.1." * 100_000) == TensorRole("other")
