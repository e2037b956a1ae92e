"""Scales and zeros of scalar coding that a shared table has for all tokens (SPEC 13.4), as KVQuant calibrates them."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import second_decoder
import torch
from conftest import BACKENDS, bits, gaussian, needs_triton, rel_mse
from damage import every_flipped_bit_is_found, every_proper_prefix_is_truncated, no_shared_table
from safetensors.torch import load_file
from test_pqkv import sealed

import pqcodec
from pqcodec import (
    BackendUnavailable,
    CorruptStream,
    InvalidArgument,
    MissingTable,
    PQError,
    RangeTable,
    SharedTable,
    UnsupportedStream,
)
from pqcodec.attention import scores
from pqcodec.calibrate import rows_to_code, shared_levels, shared_ranges
from pqcodec.formats import PQKVWriter, append_cache, load_cache
from pqcodec.formats.containers.kinds import convert, open_encoded
from pqcodec.stream.header import Header

FIXTURE = Path(__file__).parent / "data" / "smollm2_kv.safetensors"
LEVELS = pqcodec.LevelTable((-1, -0.25, 0.25, 1))
PRESETS = ["nuq3-key", "kvquant2-key", "kvquant3", "kivi4-key", "int4", "int2", "q4_0", "q8_0"]  # every part of scalar coding
X = gaussian(2, 3, 90, 20, seed=4) * torch.logspace(-1, 1, 20) + torch.arange(3)[:, None, None]
TABLE = shared_ranges(X, "nuq2-key")
NAMED: dict[str, Any] = {"preset": "nuq2-key", "levels": LEVELS, "ranges": TABLE}
RAW = TABLE.to_bytes()
MISSED = f"the stream needs the shared table {TABLE.name}, which is not here"


def grid(preset: str, table: RangeTable) -> np.ndarray:
    """All numbers that codes of an even grid stand for: float32 [heads, channels, 2^bits]."""
    bits_, fields = int(pqcodec.PRESETS[preset].quarter_bits / 4), table.ranges.halves.astype(np.float32)
    step, zero = (np.repeat(each, table.channels, 1)[:, :20, None] for each in (fields[:, 0], fields[:, -1]))
    codes = np.arange(1 << bits_, dtype=np.float32)
    return codes * step + zero if table.ranges.fields == 2 else (codes - (1 << bits_ - 1)) * step


# -- streams -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_coded_and_decoded_alike_everywhere(preset: str) -> None:
    """Calibrated by half of the numbers, of which the other half has some that are far outside."""
    table, x = shared_ranges(X[:1], preset), X.clone()
    x[1, 0, 5, 3], x[1, 2, 80, 0], x[1, 1, 7, 7] = 1e6, -70000, float("nan")
    options = {"preset": preset, "ranges": table, "nonfinite": "exact", "exact_last": 1, "chunk_tokens": 32}
    data = pqcodec.encode(x, **options, backend="reference")
    assert data == pqcodec.encode(x, **options, backend="cpu")
    assert len(data) == pqcodec.encoded_size(x.shape, "float32", **{k: v for k, v in options.items() if k != "nonfinite"}) + 92
    one, other = (pqcodec.decode(data, tables=table, backend=backend) for backend in BACKENDS)
    np.testing.assert_array_equal(bits(one), bits(other))
    np.testing.assert_array_equal(bits(one), second_decoder.decode(data, [table.to_bytes()]))
    part = pqcodec.decode(data, tables=table, tokens=(20, 71), leading=(2, 5))
    np.testing.assert_array_equal(bits(part), bits(one.reshape(6, 90, 20)[2:5, 20:71]))
    info = pqcodec.inspect(data)
    assert (info.preset, info.range_table, info.tables) == (preset, table.name, (table.name,))
    if info.levels is None:
        found, nearest = np.abs((one - x).numpy()), np.abs(x.numpy()[..., None] - grid(preset, table)[:, None]).min(-1)
        coded = np.ones(x.shape, np.bool_)
        coded[..., -1, :] = coded[1, 1, 7] = False  # which are exact
        np.testing.assert_allclose(found[coded], nearest[coded], rtol=1e-5, atol=1e-5)
    else:
        near = torch.ones_like(X, dtype=torch.bool)
        near[1, [0, 2, 1], [5, 80, 7]] = False
        usual = pqcodec.decode(pqcodec.encode(X, preset=preset))
        assert rel_mse(X[near], one[near]) < 1.3 * rel_mse(X[near], usual[near])


def test_each_head_has_ranges_of_its_own_in_every_sequence() -> None:
    x = torch.stack([gaussian(50, 16, seed=head) * 10.0 ** (2 * head) for head in range(3)])
    table = shared_ranges(x, "int4")
    data = pqcodec.encode(x.expand(2, 3, 50, 16).contiguous(), preset="int4", ranges=table)
    found = pqcodec.decode(data, tables=table)
    for head in range(3):
        assert rel_mse(x[head], found[1, head]) < 0.02
        own = pqcodec.decode(data, tables=table, leading=(3 + head, 4 + head))
        np.testing.assert_array_equal(bits(own[0]), bits(found[1, head]))
    with pytest.raises(InvalidArgument, match="ranges of 3 heads, of which 2 leading indices"):
        pqcodec.encode(x[:2], preset="int4", ranges=table)


def test_what_ranges_do_not_reach_is_kept_apart_as_far_as_there_is_room() -> None:
    """The numbers that lose most, wherever in a block they stand; none is taken that its code hits."""
    x = gaussian(1, 400, 16)
    table = shared_ranges(x, "nuq4-key")
    x[0, 3:9, 2], x[0, 390, 15] = 50, -60
    options = {"preset": "kvquant4-key", "ranges": table, "levels": tuple(np.linspace(-1, 1, 16))}
    found = pqcodec.decode(pqcodec.encode(x, **options), tables=table)
    np.testing.assert_array_equal(found[0, 3:9, 2], 6 * [50])
    assert found[0, 390, 15] == -60
    assert rel_mse(x, found) < 0.004
    clipped = pqcodec.decode(pqcodec.encode(x, **options | {"preset": "nuq4-key"}), tables=table)
    assert rel_mse(x, clipped) > 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranges_that_are_not_there_are_missed_by_their_name(backend: str) -> None:
    data = pqcodec.encode(X, **NAMED)
    with pytest.raises(MissingTable, match=MISSED):
        pqcodec.decode(data, tables=LEVELS, backend=backend)
    assert pqcodec.verify(data, backend=backend) == []
    assert second_decoder.missing(data, [LEVELS.to_bytes()]) == "unsupported"
    q = torch.ones(2, 3, 1, 20)
    with pytest.raises(MissingTable, match=MISSED):
        scores(pqcodec.given_tables(data, LEVELS), q, backend=backend)
    given = pqcodec.given_tables(data, [LEVELS, TABLE])
    expected = q @ pqcodec.decode(given, backend=backend).mT / 20**0.5
    torch.testing.assert_close(scores(given, q, backend=backend), expected, rtol=1e-4, atol=1e-4)


def test_every_proper_prefix_is_truncated_and_every_flipped_bit_is_found() -> None:
    x = gaussian(1, 40, 2)
    table = shared_ranges(x, "kvquant2-key")
    small = pqcodec.encode(x, preset="kvquant2-key", ranges=table, levels=LEVELS.levels, backend="reference")
    decode = partial(pqcodec.decode, tables=table, backend="cpu")
    every_proper_prefix_is_truncated(small, decode)
    every_flipped_bit_is_found(small, decode)


@pytest.mark.parametrize(
    "other",
    [
        shared_ranges(X[..., :19], "nuq2-key"),
        shared_ranges(X, "nuq2"),
        RangeTable(np.ones((3, 1, 32)), 20, 1),
        RangeTable(np.ones((4, 2, 32)), 20, 1),
        LEVELS,
    ],
)
def test_a_table_that_is_none_for_the_rows_is_refused(other: SharedTable) -> None:
    data, size = pqcodec.encode(X, **NAMED), Header.from_bytes(pqcodec.encode(X, **NAMED)).header_bytes
    forged = sealed(data[: size - 68] + other.digest + LEVELS.digest) + data[size:]
    with pytest.raises(CorruptStream, match=f"shared table {other.name}"):
        pqcodec.decode(forged, tables=[other, LEVELS])
    assert second_decoder.missing(forged, [other.to_bytes(), LEVELS.to_bytes()]) == "corrupt"


# -- tables, and how they are made ---------------------------------------------------------------------------------
def test_a_name_is_the_hash_of_the_bytes() -> None:
    assert RAW[:20] == b"\x89PQT\x01\x04\0\0" + struct.pack("<IHHHBB", 3 * 2 * 32, 3, 20, 1, 2, 0)
    assert TABLE.name == hashlib.sha256(RAW).hexdigest()
    assert SharedTable.from_bytes(RAW) == TABLE
    largest = RangeTable(np.ones((1024, 2, 1024)), 1024, 1)
    assert SharedTable.from_bytes(largest.to_bytes()) == largest


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (RAW[:19], CorruptStream),
        (RAW[:-1], CorruptStream),
        (RAW + b"\0", CorruptStream),
        (RAW[:18] + b"\3" + RAW[19:], UnsupportedStream),
        (RAW[:19] + b"\1" + RAW[20:], UnsupportedStream),
        (RAW[:12] + b"\0\0" + RAW[14:], CorruptStream),
        (RAW[:14] + b"\0\0" + RAW[16:], CorruptStream),
        (RAW[:14] + b"\x21" + RAW[15:], CorruptStream),
        (RAW[:16] + b"\2" + RAW[17:], CorruptStream),
        (RAW[:8] + struct.pack("<I", 191) + RAW[12:], CorruptStream),
        (RAW[:20] + b"\0\x7e" + RAW[22:], CorruptStream),
    ],
)
def test_bytes_that_are_no_ranges_are_refused(raw: bytes, error: type[PQError]) -> None:
    no_shared_table(raw, error)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"preset": "pq3", "ranges": TABLE}, "preset 'pq3' takes none"),
        ({"preset": "wu44", "ranges": TABLE}, "preset 'wu44' takes none"),
        ({"preset": "nuq2-key", "ranges": LEVELS}, "ranges is a LevelTable; a RangeTable is expected"),
        ({"preset": "int4", "ranges": TABLE}, "groups of 1 channels and 2 fields, where rows have 20 numbers, groups of 32"),
        ({"preset": "nuq2-key", "ranges": TABLE, "join_heads": True}, "where rows have 60 numbers"),
    ],
)
def test_ranges_that_are_none_of_the_preset_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        pqcodec.encode(X, **options)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda: shared_ranges(X, "pq3"), "preset 'pq3' has no scales"),
        (lambda: shared_ranges([], "int4"), "are expected"),
        (lambda: shared_ranges([X, X[:, :2]], "int4"), "alike but for tokens, are expected"),
        (lambda: shared_ranges(X * float("inf"), "int4"), "NaN or Inf"),
        (lambda: shared_ranges(X * 1e6, "int4"), "a field is not finite"),
        (lambda: RangeTable(np.ones((1, 3, 32)), 20, 1), "3 fields of 32 groups"),
        (lambda: RangeTable("abc", 20, 1), "numbers .* are expected"),
        (lambda: RangeTable(np.ones((1, 1, 32)), 20, 1.5), "numbers .* are expected"),
        (lambda: rows_to_code(X[0, 0], join_heads=True), r"\[..., heads, tokens, head_dim\] is expected"),
    ],
)
def test_what_has_no_ranges_is_refused(work: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        work()


def test_ranges_of_one_text_serve_another_as_kvquant_has_them() -> None:
    """SmolLM2's keys before RoPE, calibrated by the first half of a text, and the second half: within 5 % of what is known."""
    rope = pqcodec.Rope(theta=100_000.0, first_position=1)
    known = {"kvquant4-key": 0.0016, "kvquant3-key": 0.0061, "kvquant2-key": 0.0225}  # ranges of other texts
    for preset, wanted in known.items():
        errors = []
        for name, x in load_file(FIXTURE).items():
            if name.endswith("key"):
                rows = rows_to_code(x[0, :, 1:162], rope=rope, join_heads=True)
                table = shared_ranges(rows, preset)
                levels = shared_levels(rows, preset, ranges=table)
                options = {"before_rope": True, "rope": replace(rope, first_position=162), "join_heads": True}
                data = pqcodec.encode(x[0, :, 162:], preset=preset, ranges=table, levels=levels, **options)
                errors.append(rel_mse(x[0, :, 162:].float(), pqcodec.decode(data, tables=[table, levels]).float()))
        assert np.mean(errors) == pytest.approx(wanted, rel=0.05)


@needs_triton
def test_backends_of_gpus_refuse_them_by_name() -> None:
    given = pqcodec.given_tables(pqcodec.encode(X, **NAMED), [LEVELS, TABLE])
    for work in (
        lambda: pqcodec.encode(X, **NAMED, backend="triton"),
        lambda: pqcodec.decode(given, backend="triton"),
        lambda: pqcodec.verify(given, backend="triton"),
    ):
        with pytest.raises(BackendUnavailable, match="with ranges of a shared table"):
            work()


# -- files ---------------------------------------------------------------------------------------------------------
def test_files_carry_ranges_once_convert_them_and_grow(tmp_path: Path) -> None:
    path = tmp_path / "a.pqkv"
    with PQKVWriter(path) as writer:
        for role in ("key", "value"):
            writer.add(f"layers.0.{role}", X, layer=0, role=role, **NAMED, backend="cpu")
    append_cache(path, [(X, X)], backend="cpu")
    assert path.read_bytes().count(RAW) == 1
    wanted = load_cache(path, backend="cpu")[0][0]
    np.testing.assert_array_equal(bits(wanted[..., 90:, :]), bits(wanted[..., :90, :]))
    for way in ("b.safetensors", "c.pqkv"):
        convert(path, tmp_path / way)
        path = tmp_path / way
        with open_encoded(path) as file:
            assert set(file.tables.values()) == {TABLE, LEVELS}
            np.testing.assert_array_equal(bits(file.decode("layers.0.key")), bits(wanted))
            assert file.verify() == []
