"""A linear stage whose basis many streams share (SPEC 18.2, 18.3): LoRC's of a layer, named by streams, carried once a file."""

from __future__ import annotations

import hashlib
import struct
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import second_decoder
import torch
from conftest import BACKENDS, bits, gaussian, needs_triton, rel_mse
from damage import every_flipped_bit_is_found, every_proper_prefix_is_truncated, no_shared_table
from test_pqkv import sealed

import pqcodec
from pqcodec import (
    BackendUnavailable,
    BasisTable,
    CorruptStream,
    InvalidArgument,
    LevelTable,
    MissingTable,
    PQError,
    SharedTable,
    UnsupportedStream,
)
from pqcodec.attention import attend, scores
from pqcodec.bases import data_basis
from pqcodec.codec import decode_together
from pqcodec.formats import PQKVFile, PQKVWriter, append_cache, load_cache
from pqcodec.formats.containers.kinds import convert, open_encoded
from pqcodec.stream.header import Header

X = gaussian(2, 4, 40, 20, seed=3, dtype=torch.float16)
TABLE = BasisTable(np.linalg.qr(np.random.default_rng(5).standard_normal((80, 80)))[0][:50])
LEVELS = LevelTable((-1, -0.25, 0.25, 1))
RAW = TABLE.to_bytes()
ROPE = pqcodec.Rope(theta=1e4, first_position=2**32 - 5)
HOW: dict[str, dict[str, Any]] = {
    "quads": {"preset": "quad3.5"},
    "before rope": {"preset": "q8_0", "rope": ROPE, "before_rope": True, "center": "mean", "exact_tokens": 2},
    "levels of a table": {"preset": "nuq2", "levels": LEVELS},
}
MISSED = f"the stream needs the shared table {TABLE.name}, which is not here"


def encoded(backend: str = "cpu", basis: Any = TABLE, **how: Any) -> bytes:
    return pqcodec.encode(X, basis=basis, join_heads=True, backend=backend, **(how or HOW["quads"]))


# -- streams -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", HOW)
def test_a_stream_that_names_its_basis_decodes_as_one_that_carries_it(how: str) -> None:
    tables = [LEVELS, TABLE]
    for backend in BACKENDS:
        named, carrying = (encoded(backend, basis, **HOW[how]) for basis in (TABLE, TABLE.basis))
        assert len(carrying) - len(named) == 2 * TABLE.basis.size + 4 - 32
        assert len(named) == pqcodec.encoded_size(X.shape, basis=TABLE, join_heads=True, **HOW[how])
        whole = pqcodec.decode(carrying, tables=tables, backend=backend)
        for other in BACKENDS:
            np.testing.assert_array_equal(bits(pqcodec.decode(named, tables=tables, backend=other)), bits(whole))
        part = pqcodec.decode(named, tables=tables, tokens=(5, 30), leading=(3, 6), backend=backend)
        np.testing.assert_array_equal(bits(part), bits(whole.reshape(8, 40, 20)[3:6, 5:30]))
        np.testing.assert_array_equal(bits(whole), second_decoder.decode(named, [table.to_bytes() for table in tables]))
    info = pqcodec.inspect(named)
    assert (info.linear, info.width, info.basis_table) == ("shared basis", 50, TABLE.name)
    assert info.tables == ((LEVELS.name,) if how == "levels of a table" else ()) + (TABLE.name,)


def test_one_basis_serves_many_streams() -> None:
    """LoRC's: that of a layer's keys, found in some and used for others; rows that do not lie along it are lost."""
    directions = np.linalg.qr(np.random.default_rng(1).standard_normal((80, 30)))[0].T
    latents = np.random.default_rng(2).standard_normal((3, 200, 30))
    texts = (latents @ directions).reshape(3, 200, 4, 20).swapaxes(1, 2).astype(np.float32)
    table = BasisTable(data_basis(texts[0], 30))
    for text in texts[1:]:
        data = pqcodec.encode(text, preset="q8_0", join_heads=True, basis=table)
        assert rel_mse(torch.from_numpy(text), torch.from_numpy(pqcodec.decode(data, tables=table))) < 1e-4
    lost = rel_mse(X.float(), pqcodec.decode(encoded(preset="q8_0"), tables=TABLE).float())
    assert lost == pytest.approx(30 / 80, rel=0.1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_basis_that_is_not_there_is_missed_by_its_name(backend: str) -> None:
    named = encoded(**HOW["levels of a table"])
    for data, tables in ((encoded(), ()), (encoded(), LEVELS), (named, LEVELS)):
        with pytest.raises(MissingTable, match=MISSED):
            pqcodec.decode(data, tables=tables, backend=backend)
        assert pqcodec.verify(data, backend=backend) == []
        assert second_decoder.missing(data, [LEVELS.to_bytes()]) == "unsupported"
    with pytest.raises(MissingTable, match=LEVELS.name):
        pqcodec.decode(named, tables=TABLE, backend=backend)
    q = torch.ones(2, 4, 1, 20)
    for work in (
        lambda: decode_together([pqcodec.given_tables(encoded(), LEVELS)], [torch.empty_like(X)], [0], backend=backend),
        lambda: scores(encoded(), q, backend=backend),
        lambda: attend(q, pqcodec.encode(X, backend=backend), encoded(), backend=backend),
    ):
        with pytest.raises(MissingTable, match=MISSED):
            work()


def test_attention_reads_streams_with_their_basis() -> None:
    given, q = pqcodec.given_tables(encoded(), TABLE), gaussian(2, 4, 3, 20, seed=1)
    expected = q @ pqcodec.decode(given).float().mT / 20**0.5
    torch.testing.assert_close(scores(given, q), expected, rtol=2e-3, atol=4e-3)  # keys are not rounded there


def test_every_proper_prefix_is_truncated_and_every_flipped_bit_is_found() -> None:
    table = BasisTable(np.eye(16)[:3])
    small = pqcodec.encode(gaussian(2, 3, 8), preset="pq2", basis=table, join_heads=True, exact_last=1, backend="reference")
    decode = partial(pqcodec.decode, tables=table, backend="cpu")
    every_proper_prefix_is_truncated(small, decode)
    every_flipped_bit_is_found(small, decode)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (BasisTable(TABLE.basis[:49]), r"a basis \(49, 80\), where rows of 50 numbers are made of vectors of 80"),
        (BasisTable(np.eye(81)[:50]), r"a basis \(50, 81\)"),
        (LEVELS, "it holds 4 levels, which is no basis"),
    ],
)
def test_a_table_that_is_none_for_the_rows_is_refused(other: SharedTable, said: str) -> None:
    data, size = encoded(), Header.from_bytes(encoded()).header_bytes
    forged = sealed(data[: size - 36] + other.digest) + data[size:]
    with pytest.raises(CorruptStream, match=f"shared table {other.name}: {said}"):
        pqcodec.decode(forged, tables=other)
    assert second_decoder.missing(forged, [other.to_bytes()]) == "corrupt"


def test_a_basis_in_the_place_of_levels_is_refused() -> None:
    data = pqcodec.encode(X, preset="nuq2", levels=LEVELS)
    size = Header.from_bytes(data).header_bytes
    forged = sealed(data[: size - 36] + TABLE.digest) + data[size:]
    with pytest.raises(CorruptStream, match="a basis of 50 directions among 80 numbers, which is no codebook"):
        pqcodec.decode(forged, tables=TABLE)
    assert second_decoder.missing(forged, [RAW]) == "corrupt"


# -- tables --------------------------------------------------------------------------------------------------------
def test_a_name_is_the_hash_of_the_bytes() -> None:
    assert RAW[:20] == b"\x89PQT\x01\x03\0\0" + struct.pack("<IHHI", 4000, 50, 80, 0)
    assert TABLE.name == hashlib.sha256(RAW).hexdigest()
    assert SharedTable.from_bytes(RAW) == TABLE
    largest = BasisTable(np.zeros((1024, 2048)))
    assert SharedTable.from_bytes(largest.to_bytes()) == largest


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (RAW[:15], CorruptStream),
        (RAW[:-1], CorruptStream),
        (RAW + b"\0", CorruptStream),
        (RAW[:19] + b"\1" + RAW[20:], UnsupportedStream),
        (RAW[:8] + struct.pack("<I", 3999) + RAW[12:], CorruptStream),
        (RAW[:12] + struct.pack("<HH", 80, 50) + RAW[16:], CorruptStream),  # as many numbers, more directions than numbers
        (RAW[:12] + struct.pack("<HH", 0, 80) + RAW[16:], CorruptStream),
        (RAW[:20] + b"\0\x7c" + RAW[22:], CorruptStream),
        (RAW[:8] + struct.pack("<IHHI", 4097, 1, 4097, 0) + bytes(2 * 4097), CorruptStream),
        (RAW[:5] + b"\5" + RAW[6:], UnsupportedStream),
    ],
)
def test_bytes_that_are_no_basis_are_refused(raw: bytes, error: type[PQError]) -> None:
    no_shared_table(raw, error)


@pytest.mark.parametrize(
    ("basis", "said"),
    [
        (np.zeros((5, 4)), r"basis \(5, 4\): 1 .. 1024 directions"),
        (np.zeros((1024, 4096)), "2097152 numbers in all"),
        (np.zeros(4), "a matrix of numbers is expected"),
        (np.full((1, 4), np.nan), "not finite in float16"),
    ],
)
def test_what_is_no_basis_is_refused(basis: np.ndarray, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        BasisTable(basis)


def test_a_basis_of_other_vectors_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"basis \(50, 80\) is none of vectors of 20 numbers"):
        pqcodec.encode(X, basis=TABLE)


@needs_triton
def test_backends_of_gpus_refuse_it_by_name() -> None:
    for work in (
        lambda: encoded("triton"),
        lambda: pqcodec.decode(pqcodec.given_tables(encoded(), TABLE), backend="triton"),
        lambda: pqcodec.verify(encoded(), backend="triton"),
    ):
        with pytest.raises(BackendUnavailable, match="with heads joined and a linear stage"):
            work()


# -- files ---------------------------------------------------------------------------------------------------------
def test_files_carry_a_basis_once_convert_it_and_grow(tmp_path: Path) -> None:
    """One of both layers' keys and values, beside levels of which another table has theirs."""
    path, how = tmp_path / "a.pqkv", {"join_heads": True, "basis": TABLE, "backend": "cpu", **HOW["levels of a table"]}
    with PQKVWriter(path) as writer:
        for layer, role in product(range(2), ("key", "value")):
            writer.add(f"layers.{layer}.{role}", X if role == "key" else -X, layer=layer, role=role, **how)
    assert (path.read_bytes().count(RAW), path.read_bytes().count(LEVELS.to_bytes())) == (1, 1)
    append_cache(path, 2 * [(X, -X)], backend="cpu")
    assert path.read_bytes().count(RAW) == 1
    wanted = load_cache(path, backend="cpu")
    assert wanted[1][1].shape == (2, 4, 80, 20)
    for way in ("b.safetensors", "c.zarr", "d.pqkv"):
        if way == "c.zarr":
            pytest.importorskip("zarr")
        convert(path, tmp_path / way)
        path = tmp_path / way
        with open_encoded(path) as file:
            assert set(file.tables.values()) == {TABLE, LEVELS}
            np.testing.assert_array_equal(bits(file.decode("layers.1.value")), bits(wanted[1][1]))
            assert file.verify() == []
    with PQKVFile(path) as file:
        assert file.inspect("layers.0.key").tables == (LEVELS.name, TABLE.name)
