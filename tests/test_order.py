"""Order seals: what changes places with its checksum is found in every container, and files of before are read as they were."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
import second_decoder
from fuzz.seeds import grown_pqkv, seeds
from fuzz.targets import everything
from hypothesis import given, settings
from hypothesis import strategies as st

import pqcodec
from pqcodec.errors import CorruptStream, PQError
from pqcodec.formats import PQKVAppender, PQKVFile, PQKVWriter
from pqcodec.formats.containers.kinds import convert, open_encoded, write
from pqcodec.formats.containers.pqkv.log import Log
from pqcodec.formats.containers.reader import TensorFile
from pqcodec.formats.containers.writer import pieces_of
from pqcodec.formats.plain.documents import checksum_text
from pqcodec.stream.seal import order_seal
from pqcodec.stream.source import FileSource, MemorySource

pytest.importorskip("zarr", minversion="3.0.8")
Objects = dict[str, bytes]  # of a store; a file is one that is called ""
KINDS = ("pqkv", "safetensors", "zarr", "shards")


def tensor(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float16)


def grown() -> bytes:
    """A file of two tensors alike, with all kinds of sections, one that grew by parts of one size, and exact ones alike."""
    path = fuzz.targets.scratch().with_suffix(".order.pqkv")
    coded: dict[str, Any] = {"preset": "pq2", "chunk_tokens": 2, "backend": "reference"}
    with PQKVWriter(path, {"m": 1}) as writer:
        for layer in range(2):
            x = tensor(2, 9, 16, seed=layer)
            x[1, 5, 2] = np.nan
            sides = {"center": "mean", "exact_tokens": 2, "nonfinite": "exact"}
            writer.add(f"layers.{layer}.key", x, layer=layer, role="key", **sides, **coded)
            writer.add_exact(f"n{layer}", np.arange(layer, layer + 6))
        writer.add("k", tensor(2, 4, 16, seed=2), **coded)
    for seed in (3, 4):
        with PQKVAppender(path) as writer:
            writer.extend("k", tensor(2, 4, 16, seed=seed), **coded)
    return path.read_bytes()


def reader_of(kind: str) -> Callable[[Objects], TensorFile]:
    if kind == "pqkv":
        return lambda objects: PQKVFile(objects[""])
    if kind == "safetensors":
        return lambda objects: fuzz.targets._open_safetensors(objects[""])
    return lambda objects: fuzz.targets._open_store(fuzz.shapes.packed(objects))


@dataclass(frozen=True)
class Sound:
    """A container, and its blocks and exact numbers, each with its checksum: tensor, object, first byte, bytes."""

    objects: Objects
    opened: Callable[[Objects], TensorFile]
    blocks: list[tuple[str, str, int, int]]

    def with_swapped(self, *pairs: tuple[int, int]) -> Objects:
        """The same with blocks in each other's places."""
        objects = {key: bytearray(data) for key, data in self.objects.items()}
        for one, other in pairs:
            (_, key, first, size), (_, there, second, _) = self.blocks[one], self.blocks[other]
            a, b = objects[key][first : first + size], objects[there][second : second + size]
            objects[key][first : first + size], objects[there][second : second + size] = b, a
        return {key: bytes(data) for key, data in objects.items()}

    def bytes_of(self, block: int) -> bytes:
        _, key, first, size = self.blocks[block]
        return self.objects[key][first : first + size]

    def alike(self) -> list[tuple[int, int]]:
        """Pairs of blocks that differ but for their size."""
        raw = [self.bytes_of(block) for block in range(len(self.blocks))]
        pairs = itertools.combinations(range(len(raw)), 2)
        return [(i, j) for i, j in pairs if len(raw[i]) == len(raw[j]) and raw[i] != raw[j]]


@cache
def sound(kind: str) -> Sound:
    data = grown()
    objects, opened = {"": data}, reader_of(kind)
    pieces = pieces_of(PQKVFile(data))
    if kind == "safetensors":
        write(fuzz.targets.scratch(), pieces, {"m": 1}, to="safetensors")
        objects = {"": fuzz.targets.scratch().read_bytes()}
    elif kind != "pqkv":
        from zarr.storage import MemoryStore

        from pqcodec.formats.containers.zarr.writer import write_pieces

        found: dict[str, Any] = {}
        write_pieces(MemoryStore(found), pieces, {"m": 1}, chunks_per_shard=2 if kind == "shards" else None)
        objects = {key: value.to_bytes() for key, value in found.items()}
    blocks = []
    with opened(objects) as file:
        for name in file.names:
            entry = file.entry(name)
            if not entry.coded:
                if kind == "pqkv":
                    blocks.append((name, "", entry.body_start, entry.body_bytes))
                continue
            for part in range(entry.parts):
                stream = file.stream(name, part)
                raw = stream.read(0, stream.size).tobytes()
                (key,) = (key for key, data in objects.items() if raw in data)
                at = objects[key].index(raw)
                for size in second_decoder.blocks(raw):
                    blocks.append((name, key, at, size))
                    at += size
    return Sound(objects, opened, blocks)


def complaints(container: Sound, objects: Objects) -> dict[str | None, str]:
    """What verify tells of each tensor; reading all must agree with it."""
    with container.opened(objects) as file:
        found = {name: str(what) for name, what in file.verify(backend="cpu")}
        refused = set()
        for name in file.names:
            try:
                file.decode(name, backend="cpu")
            except PQError:
                refused.add(name)
        assert refused == set(found)
        return found


# -- blocks ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_two_blocks_that_change_places_are_found(kind: str) -> None:
    """Every pair of a tensor's last stream; its own checksums hold, only the order seal does not."""
    container = sound(kind)
    assert complaints(container, container.objects) == {}
    pairs = [(i, j) for i, j in container.alike() if {container.blocks[i][0], container.blocks[j][0]} == {"layers.1.key"}]
    assert len({container.blocks[i][3] for i, _ in pairs}) == 4  # offsets, exact tokens, whole blocks, and the last chunk's
    for pair in pairs:
        told = complaints(container, container.with_swapped(pair))
        assert set(told) == {"layers.1.key"}
        assert "order seal" in told["layers.1.key"] or "written under this name" in told["layers.1.key"]


def test_a_stream_by_itself_does_not_know_its_order() -> None:
    data = pqcodec.encode(tensor(2, 8, 16), preset="pq2", chunk_tokens=2, backend="reference")
    block = second_decoder.blocks(data)[-1]
    swapped = data[: -2 * block] + data[-block:] + data[-2 * block : -block]
    assert swapped != data
    assert pqcodec.verify(swapped, backend="cpu") == []  # as its docstring says
    assert order_seal(MemorySource(swapped)) != order_seal(MemorySource(data))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None, database=None)
@given(picks=st.lists(st.integers(0, 1 << 30), min_size=1, max_size=4))
def test_no_blocks_change_places_unseen(kind: str, picks: list[int]) -> None:
    """One to four swaps of blocks of one size, of one tensor or of two, headers and exact numbers included."""
    container = sound(kind)
    pairs = container.alike()
    objects = container.with_swapped(*(pairs[pick % len(pairs)] for pick in picks))
    assert bool(complaints(container, objects)) == (objects != container.objects)


@pytest.mark.parametrize("kind", ["pqkv", "safetensors"])
def test_parts_are_read_without_the_seal_and_damage_is_still_named_by_its_place(kind: str) -> None:
    container = sound(kind)
    last = max(i for i, (name, *_) in enumerate(container.blocks) if name == "layers.1.key")
    objects = container.with_swapped((last - 3, last - 2))
    with container.opened(objects) as file, container.opened(container.objects) as before:
        np.testing.assert_array_equal(
            file.decode("layers.1.key", tokens=(0, 3), backend="cpu"),
            before.decode("layers.1.key", tokens=(0, 3), backend="cpu"),
        )
    _, key, first, size = container.blocks[last]
    damaged = bytearray(container.objects[key])
    for at in (first, first + size - 5):
        damaged[at] ^= 1
        with container.opened({key: bytes(damaged)}) as file:
            ((name, damage),) = file.verify(backend="cpu")
            assert (name, isinstance(damage, pqcodec.Damage)) == ("layers.1.key", True)
            with pytest.raises(CorruptStream, match=r"payload, leading index 1, tokens 8 \.\. 8"):
                file.decode(name, backend="cpu")


# -- bodies, frames, objects ---------------------------------------------------------------------------------------
def frames(data: bytes) -> list[Any]:
    return [item for item in Log(MemorySource(data)).items if item.name is not None]


def exchanged(data: bytes, one: tuple[int, int], other: tuple[int, int]) -> bytes:
    """Two runs of bytes, from the first to before the last, in each other's places."""
    (a, b), (x, y) = sorted((one, other))
    assert b - a == y - x
    assert data[a:b] != data[x:y]
    return data[:a] + data[x:y] + data[b:x] + data[a:b] + data[y:]


PAIRS = {"coded": ("layers.0.key", "layers.1.key"), "exact": ("n0", "n1"), "parts": ("k", "k")}


@pytest.mark.parametrize("of", PAIRS)
@pytest.mark.parametrize("metas", [False, True], ids=["bodies", "frames"])
def test_bodies_and_frames_that_change_places_are_found(of: str, metas: bool) -> None:
    data = grown()
    one, other = [item for item in frames(data) if item.name in PAIRS[of]][-2:]
    runs = [(item.offset if metas else item.body_start, item.end) for item in (one, other)]
    file = PQKVFile(exchanged(data, *runs))
    told = file.verify(backend="cpu")
    assert {name for name, _ in told} == set(PAIRS[of])
    assert metas or all("seal does not hold" in str(what) for _, what in told)
    for name in set(PAIRS[of]):
        with pytest.raises(CorruptStream, match=r"the index says|begins with token|seal"):
            file.decode(name, backend="cpu")


def test_objects_of_a_store_that_change_places_are_found() -> None:
    container = sound("zarr")
    keys = sorted(key for key in container.objects if key.startswith("k/c/"))
    assert len(keys) == 3
    names = {f"layers/{i}/key/c/0/0/0": f"layers.{i}.key" for i in range(2)}
    for one, other in [*itertools.combinations(keys, 2), tuple(names)]:
        objects = container.objects | {one: container.objects[other], other: container.objects[one]}
        assert set(complaints(container, objects)) == {names.get(key, "k") for key in (one, other)}


# -- what writes seals -----------------------------------------------------------------------------------------------
def test_frames_tell_the_seal_of_their_bodies() -> None:
    data = grown()
    log = Log(MemorySource(data))
    for item in frames(data):
        body = data[item.body_start : item.end]
        seal = second_decoder.order_seal(body) if item.kind == 1 else second_decoder.checksum(body[:-4])
        assert log.meta(item)["seal"] == checksum_text(seal) == seal.to_bytes(4, "little").hex()


@pytest.mark.parametrize("kind", ["safetensors", "zarr"])
def test_swapped_blocks_stay_visible_in_other_containers(kind: str, tmp_path: Path) -> None:
    container = sound("pqkv")
    last = max(i for i, (name, *_) in enumerate(container.blocks) if name == "layers.1.key")
    (tmp_path / "a.pqkv").write_bytes(container.with_swapped((last - 3, last - 2))[""])
    with pytest.raises(CorruptStream, match="order seal"):
        convert(tmp_path / "a.pqkv", tmp_path / f"b.{kind}")
    convert(tmp_path / "a.pqkv", tmp_path / f"b.{kind}", check=False)
    convert(tmp_path / f"b.{kind}", tmp_path / "c.pqkv", check=False)
    for path in ("a.pqkv", f"b.{kind}", "c.pqkv"):
        with open_encoded(tmp_path / path) as file:
            assert [(name, "order seal" in str(what)) for name, what in file.verify(backend="cpu")] == [("layers.1.key", True)]


def test_a_seal_is_eight_digits() -> None:
    data = grown()
    item = frames(data)[0]
    meta = data[item.offset + 24 : item.body_start]
    at = meta.index(b'"seal":"') + 8
    for bad in (b"ABCDEF01", b"0x000000", b"       0", b"1234567g"):
        told = meta[:at] + bad + meta[at + 8 :]
        header = data[item.offset : item.offset + 20]
        sealed = header + second_decoder.checksum(header + told).to_bytes(4, "little") + told
        with pytest.raises(CorruptStream, match="8 hexadecimal digits"):
            PQKVFile(data[: item.offset] + sealed + data[item.body_start :]).decode(item.name)


# -- files of before -------------------------------------------------------------------------------------------------
BEFORE = [  # written by the release before order seals
    *(("pqkv", name) for name in ("exact.pqkv", "grown.pqkv", "metadata.pqkv", "older.pqkv", "two-coded.pqkv")),
    *(("safetensors", f"{name}.safetensors") for name in ("cache", "empty-tensors", "exact", "grown", "of-torch")),
    *(("zarr-cache", f"{name}.store") for name in ("bfloat16", "chunks", "exact", "grown", "no-tokens", "shards")),
]
KIND_OF = {"pqkv": "pqkv", "safetensors": "safetensors", "zarr-cache": "zarr"}


def opened_as(folder: str, data: bytes) -> TensorFile:
    return reader_of(KIND_OF[folder])(fuzz.shapes.unpacked(data) if folder == "zarr-cache" else {"": data})


@pytest.mark.parametrize(("folder", "name"), BEFORE, ids=lambda value: value)
def test_files_of_before_are_read_as_they_were(folder: str, name: str, tmp_path: Path, encoders_of_before: None) -> None:
    old, new = (fuzz.FOLDER / folder / name).read_bytes(), seeds(folder)[name]
    key = b'"seal"' if folder == "pqkv" else b"order"
    assert key not in old
    with opened_as(folder, old) as file:
        told = everything(file)
        del told["metadata"]  # those of some seeds are others today
        assert file.verify(backend="cpu") == []
        write(tmp_path / "a.pqkv", pieces_of(file), file.metadata, to="pqkv")
        coded = any(file.entry(name).coded for name in file.names)
    with opened_as(folder, new) as file:
        found = {key: value for key, value in everything(file).items() if key != "metadata"}
        if name == "no-tokens.store":  # empty tensors were exact then
            assert not coded
            found = {key: ((False, *entry[1:]), numbers) for key, (entry, numbers) in found.items()}
            coded = True
        assert found == told
        assert (key in new) == bool(coded or (folder == "pqkv" and file.names))
    with PQKVFile(tmp_path / "a.pqkv") as file:  # what is written of it has seals
        assert {key: value for key, value in everything(file).items() if key != "metadata"} == told
        log = Log(FileSource(open(tmp_path / "a.pqkv", "rb")))  # noqa: SIM115 (closed with the process)
        assert all("seal" in log.meta(item) for item in log.items if item.name is not None)
        assert file.verify(backend="cpu") == []


def test_a_file_of_before_grows_by_frames_with_seals(tmp_path: Path) -> None:
    path = tmp_path / "a.pqkv"
    path.write_bytes((fuzz.FOLDER / "pqkv" / "grown.pqkv").read_bytes())
    with PQKVAppender(path) as writer:
        writer.extend("k", tensor(2, 6, 16), preset="pq2", backend="reference")
    data = path.read_bytes()
    log = Log(MemorySource(data))
    assert ["seal" in log.meta(item) for item in frames(data)] == [False] * (len(frames(data)) - 1) + [True]
    assert PQKVFile(data).verify(backend="cpu") == []


def test_readers_of_before_pass_over_seals() -> None:
    """What they ask of an index and of a meta is there, as it was."""
    whole, _ = grown_pqkv()
    old = (fuzz.FOLDER / "pqkv" / "grown.pqkv").read_bytes()
    for data, other in itertools.pairwise((whole, old)):
        items, before = frames(data), frames(other)
        same = [replace(item, offset=0, meta_bytes=0) for item in items]
        assert same == [replace(item, offset=0, meta_bytes=0) for item in before]
        for item, was in zip(items, before, strict=True):
            meta = Log(MemorySource(data)).meta(item)
            assert {key: value for key, value in meta.items() if key != "seal"} == Log(MemorySource(other)).meta(was)
