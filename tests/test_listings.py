"""SPEC Part III: listings as another program would compute them, and what a reader refuses, in its order (III.4)."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import second_decoder as second

import pqcodec
from pqcodec.errors import CorruptStream, InvalidArgument, PQError, TruncatedStream, UnsupportedStream
from pqcodec.formats import PQKVFile, PQKVWriter, containers
from pqcodec.formats.containers.writer import Coded, pieces_of
from pqcodec.stream.source import MemorySource

KINDS = ("safetensors", "zarr")
KEYS = tuple(f"pqcodec_{key}" for key in ("format", "version", "tensors", "metadata", "checksum"))
NAME = 'k "\\\u00e9\x01\x7f'
Values = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.safetensors and a.zarr: a tensor of two streams, an exact one, and one without dimensions."""
    pytest.importorskip("zarr")
    folder, x = tmp_path_factory.mktemp("listings"), np.random.default_rng(0).standard_normal((2, 5, 16))
    streams = [
        pqcodec.encode(part, preset="pq2", backend="reference") for part in (x[:, :3].astype("f4"), x[:, 3:].astype("f4"))
    ]
    with PQKVWriter(folder / "a.pqkv", parts=True) as writer:
        writer.add_streams(NAME, Coded([MemorySource(stream) for stream in streams]), layer=1, role="key")
        writer.add_exact("n", np.arange(3, dtype=np.int8))
        writer.add_exact("one", np.ones((), np.float32))
    for kind in KINDS:
        containers.write(folder / f"a.{kind}", pieces_of(PQKVFile(folder / "a.pqkv")), {"m": "\u00e9\n\x1f"}, to=kind)
    return folder


def listing(path: Path) -> tuple[Values, Any, Callable[[dict], bytes]]:
    """The five strings, what the checksum covers beside them, and a function for the bytes of a tensor."""
    if path.suffix == ".zarr":
        values = json.loads((path / "complete" / "zarr.json").read_bytes())["attributes"]

        def of_objects(fields: dict) -> bytes:
            index = [0] * len(fields["shape"])
            data = b""
            for number in range(len(fields.get("objects", [1]))):
                if len(index) > 1:
                    index[-2] = number
                data += path.joinpath(fields["path"], "c", *map(str, index)).read_bytes()
            return data if fields["coded"] else data[:-4]  # of a chunk's numbers the last four are zarr's crc32c

        return values, None, of_objects
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    values = header.pop("__metadata__")
    told = sorted([name, item["dtype"], item["shape"]] for name, item in header.items())

    def of_a_file(fields: dict) -> bytes:
        first, last = header[fields["name"]]["data_offsets"]
        return data[8 + size + first : 8 + size + last]

    return values, told, of_a_file


def written(value: Any) -> str:
    """JSON as III.3 says it."""
    if isinstance(value, str):
        short = dict(zip('"\\\b\f\n\r\t', ('\\"', "\\\\", "\\b", "\\f", "\\n", "\\r", "\\t"), strict=True))
        return '"' + "".join(short.get(x, f"\\u{ord(x):04x}" if x < " " else x) for x in value) + '"'
    return "null" if value is None else str(value) if type(value) is int else "[" + ",".join(map(written, value)) + "]"


def text(value: int) -> str:
    return struct.pack("<I", value).hex()


@pytest.mark.parametrize("kind", KINDS)
def test_seals_and_checksums_of_a_listing_are_those_of_the_specification(kind: str, folder: Path) -> None:
    values, elsewhere, bytes_of = listing(folder / f"a.{kind}")
    assert tuple(values) == KEYS
    assert (values[KEYS[0]], values[KEYS[1]], json.loads(values[KEYS[3]])) == ("kv-cache", "1", {"m": "\u00e9\n\x1f"})
    assert values[KEYS[4]] == text(second.checksum(written([*(values[key] for key in KEYS[:4]), elsewhere]).encode()))
    coded, *exact = json.loads(values[KEYS[2]])
    assert (coded["name"], [fields["name"] for fields in exact]) == (NAME, ["n", "one"])
    for fields in exact:
        assert fields["seal"] == text(second.checksum(bytes_of(fields)))
    data, seals, orders = bytes_of(coded), "", ""
    for size, tokens in coded["streams"]:
        stream, data = data[:size], data[size:]
        assert second.decode(stream).shape == (2, tokens, 16)
        seals += text(second.checksum(stream[: struct.unpack_from("<I", stream, 8)[0]] + stream[-4:]))
        orders += text(second.order_seal(stream))
    assert (data, coded["seal"], coded["order"]) == (b"", seals, orders)


# -- III.4 -------------------------------------------------------------------------------------------------------
Change = Callable[[Values, dict], None]  # of the five strings, and of the JSON that holds them
Edit = Callable[[Path], None]


def edit(*changes: Change) -> Edit:
    """Another listing, or other descriptions of tensors in the header of safetensors; the checksum stays as it was."""

    def edited(path: Path) -> None:
        listed = path / "complete" / "zarr.json" if path.is_dir() else path
        data = listed.read_bytes()
        size = len(data) if path.is_dir() else 8 + int.from_bytes(data[:8], "little")
        holder = json.loads(data[:size] if path.is_dir() else data[8:size])
        for change in changes:
            change(holder["attributes" if path.is_dir() else "__metadata__"], holder)
        new = json.dumps(holder).encode()
        listed.write_bytes(new if path.is_dir() else struct.pack("<Q", len(new)) + new + data[size:])

    return edited


def put(**values: Any) -> Change:
    """Some of the five strings become others; None: they go."""

    def change(listed: Values, _: dict) -> None:
        for key, value in values.items():
            listed[f"pqcodec_{key}"] = value
            if value is None:
                del listed[f"pqcodec_{key}"]

    return change


def of_tensors(old: str, new: str) -> Change:
    def change(listed: Values, _: dict) -> None:
        assert old in listed[KEYS[2]]
        listed[KEYS[2]] = listed[KEYS[2]].replace(old, new)

    return change


def dtype(name: str, code: str) -> Change:
    return lambda _, header: header[name].update(dtype=code)


def no_key(listed: Values, _: dict) -> None:
    listed.clear()


def group(place: str, old: str, new: str | None) -> Edit:
    """Other text in the zarr.json of a group; None: it goes."""

    def edited(path: Path) -> None:
        document = path / place / "zarr.json"
        if new is None:
            document.unlink()
            return
        assert old in document.read_text()
        document.write_text(document.read_text().replace(old, new, 1))

    return edited


def all_of(*edits: Edit) -> Edit:
    return lambda path: [one(path) for one in edits] and None


def cut(number: int, size: int) -> Edit:
    """The first object of a tensor gets more bytes or fewer."""

    def edited(path: Path) -> None:
        fields = json.loads(listing(path)[0][KEYS[2]])[number]
        place = path.joinpath(fields["path"], "c", *["0"] * len(fields["shape"]))
        data = place.read_bytes()
        place.write_bytes(data[:size] if size < 0 else data + bytes(size))

    return edited


def lost(path: Path) -> None:
    next(place for place in path.rglob("c/0") if place.is_file()).unlink()


def of_half_bytes(_: Values, header: dict) -> None:
    """A dtype that safetensors knows and pqcodec does not: two numbers a byte."""
    header["n"].update(dtype="F4", shape=[2 * header["n"]["shape"][0], *header["n"]["shape"][1:]])


EITHER: list[tuple[Edit, type[PQError]]] = [  # what is wrong in a row of the table, and after it
    (edit(put(format=None, version="2")), CorruptStream),
    (edit(put(version="2", tensors="[")), UnsupportedStream),
    (edit(put(format="cache", metadata="[]")), UnsupportedStream),
    (edit(put(metadata="[]")), CorruptStream),
    (edit(put(metadata='{"a":1,"a":1}')), CorruptStream),
    (edit(put(tensors="{}")), CorruptStream),
    (edit(of_tensors('"key"', '"keys"')), CorruptStream),
    (edit(of_tensors('"layer":1', '"layer":true')), CorruptStream),
    (edit(of_tensors('"layer":1', '"layer":2')), CorruptStream),  # the checksum alone tells
    (edit(of_tensors(",3],[", ",2],[")), CorruptStream),  # fewer tokens than the tensor has
    (edit(of_tensors('"order":"', '"order":"0')), CorruptStream),
    (edit(of_tensors('"order":"', '"order":"00000000')), CorruptStream),
    (edit(of_tensors('"float32"', '"float33"')), CorruptStream),
    (edit(of_tensors('"name":"one"', '"name":"n"')), CorruptStream),
    (edit(put(checksum="0" * 8)), CorruptStream),
]
SAFETENSORS: list[tuple[Edit, type[PQError]]] = [
    (edit(no_key), InvalidArgument),
    (edit(put(format=1)), CorruptStream),  # the file breaks safetensors' own rules
    (edit(of_half_bytes, put(checksum=None)), CorruptStream),
    (edit(of_half_bytes, of_tensors('"key"', '"keys"')), CorruptStream),
    (edit(of_half_bytes), UnsupportedStream),
    (edit(of_half_bytes, dtype(NAME, "I8")), CorruptStream),
    (edit(of_half_bytes, of_tensors('"name":"one"', '"name":"two"')), UnsupportedStream),
]
ZARR: list[tuple[Edit, type[PQError]]] = [
    (edit(put(format=1, version="2")), CorruptStream),
    (all_of(group("", "", None), group("complete", "{", "")), InvalidArgument),
    (all_of(group("", "{", ""), group("complete", "", None)), CorruptStream),
    (all_of(group("", "pqcodec.kv_cache", "another"), group("complete", "{", "")), InvalidArgument),
    (group("complete", "", None), InvalidArgument),
    (group("complete", "{", ""), CorruptStream),
    (cut(0, -1), TruncatedStream),
    (cut(0, 1), CorruptStream),
    (cut(1, -1), TruncatedStream),
    (cut(1, 1), CorruptStream),
    (lost, CorruptStream),
]
CASES = [(kind, *case) for kind, more in zip(KINDS, (SAFETENSORS, ZARR), strict=True) for case in EITHER + more]


def error_of(path: Path) -> type[PQError] | None:
    """The error of reading all of a cache."""
    try:
        with containers.open_encoded(path) as file:
            for name in file.names:
                file.decode(name, backend="reference")
    except PQError as error:
        return type(error)
    return None


@pytest.mark.parametrize(("kind", "wrong", "error"), CASES, ids=[f"{case[0]}-{n}" for n, case in enumerate(CASES)])
def test_the_first_thing_that_is_wrong_makes_the_error(
    kind: str, wrong: Edit, error: type[PQError], folder: Path, tmp_path: Path
) -> None:
    sound, path = folder / f"a.{kind}", tmp_path / f"a.{kind}"
    copy = shutil.copytree if sound.is_dir() else shutil.copyfile
    copy(sound, path)
    assert error_of(path) is None
    wrong(path)
    assert error_of(path) is error
