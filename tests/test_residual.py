"""Residual VQ (SPEC 20): rows by codebooks of shared tables, their training, files that carry them, and the command line."""

from __future__ import annotations

import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import second_decoder
import torch
from conftest import BACKENDS, DEVICE, bits, gaussian
from damage import every_flipped_bit_is_found, every_proper_prefix_is_truncated, no_shared_table
from safetensors.numpy import save_file
from spec_vectors import BOOKS
from typer.testing import CliRunner

import pqcodec
from pqcodec import BackendUnavailable, CorruptStream, InvalidArgument, LevelTable, MissingTable, SharedTable, VectorTable
from pqcodec.attention import attend, scores
from pqcodec.codec import decode_together, given_tables
from pqcodec.codings import residual
from pqcodec.codings.vectors import Book
from pqcodec.errors import PQError, UnsupportedStream
from pqcodec.formats.cache import append_cache, load_cache, save_cache
from pqcodec.formats.containers.kinds import convert, open_encoded
from pqcodec.formats.offload import HostPool
from pqcodec.formats.policy.recipe import Recipe
from pqcodec.formats.store import PrefixStore
from pqcodec.stream.checksum import checksum
from pqcodec.stream.header import Header
from pqcodec.tools.cli import app
from pqcodec.training import group_channels, train_vq

RAW = BOOKS.to_bytes()


@cache
def table(stages: int, bits_: int, group: int, head_dim: int) -> VectorTable:
    """Random codebooks, of strided groups."""
    entries = (
        np.random.default_rng(bits_).standard_normal((stages, 1 << bits_, group)) * 0.8 ** np.arange(stages)[:, None, None]
    )
    return VectorTable(entries, group_channels(head_dim, group, True))


def rel_mse(x: Any, y: Any) -> float:
    x, y = (np.asarray(torch.as_tensor(each).double()) for each in (x, y))
    return float(((x - y) ** 2).sum() / (x**2).sum())


# -- streams -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 4, 8, 8), {"chunk_tokens": 3}),
        ((2, 4, 8, 24), {"center": "mean", "exact_tokens": 2, "exact_last": 3}),
        ((3, 5, 16, 64), {"center": "rope", "rope": pqcodec.Rope(theta=100.0, first_position=77)}),
        ((8, 6, 64, 192), {"keep": [0, 2, 3, 11, 40], "chunk_tokens": 2}),
        ((1, 12, 32, 32), {"nonfinite": "exact"}),
    ],
)
def test_backends_write_and_read_the_same_bits(shape: tuple[int, int, int, int], options: dict[str, Any]) -> None:
    codebooks = table(*shape)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = gaussian(2, 43, shape[-1], dtype=dtype) + 1
        x[1, 3] = 0
        if "nonfinite" in options:
            x[0, 7, 1] = torch.nan
        some = {"preset": f"rvq{shape[0]}", "codebooks": codebooks, **options}
        stream, other = (pqcodec.encode(x, backend=name, **some) for name in BACKENDS)
        assert stream == other
        given = pqcodec.given_tables(stream, codebooks)
        found = [bits(pqcodec.decode_kept(given, backend=name)[0]) for name in BACKENDS]
        np.testing.assert_array_equal(*found)
        if "center" not in options and "keep" not in options:
            assert not found[0][1, 3].any()  # a zero vector stays one
            size = {key: value for key, value in some.items() if key != "nonfinite"}
            dtype_name = str(dtype).removeprefix("torch.")
            exceptions = 4 + 8 + shape[-1] * x.element_size() if "nonfinite" in options else 0
            assert len(stream) == pqcodec.encoded_size(x.shape, dtype_name, **size) + exceptions
    part = pqcodec.decode(stream, tables=codebooks, tokens=(2, 5), leading=(1, 2), fill=0, backend="cpu")
    np.testing.assert_array_equal(bits(part), bits(pqcodec.decode(stream, tables=codebooks, fill=0)[1:, 2:5]))
    info = pqcodec.inspect(stream)
    assert (info.preset, info.coding, info.table) == (f"rvq{shape[0]}", "residual VQ", codebooks.name)


def test_streams_of_several_lengths_turn_with_their_own_tokens() -> None:
    """Phases that were made for a short stream do not serve a longer one that begins at the same position."""
    codebooks, turn = table(3, 5, 16, 64), {"center": "rope", "rope": pqcodec.Rope(theta=100.0)}
    tensors = [gaussian(1, tokens, 64) + 4 for tokens in (10, 100, 30)]
    streams = [pqcodec.encode(x, preset="rvq3", codebooks=codebooks, backend="cpu", **turn) for x in tensors]
    outs = [torch.zeros_like(x) for x in tensors]
    decode_together([given_tables(stream, [codebooks]) for stream in streams], outs, [0, 0, 0], "cpu")
    for out, stream in zip(outs, streams, strict=True):
        torch.testing.assert_close(out, pqcodec.decode(stream, backend="cpu", tables=[codebooks]), rtol=0, atol=0)


def test_the_first_of_equally_near_entries_is_taken() -> None:
    from pqcodec.kernels.cpu.residual import entries_by_lanes

    rng = np.random.default_rng(0)
    entries = rng.integers(-2, 3, (64, 8)).astype(np.float32)
    entries[40], entries[63], entries[9] = entries[3], entries[3], entries[8]
    for count in (1, 5, 70):
        x = entries[rng.integers(0, 64, count)] + rng.integers(-1, 2, (count, 8)).astype(np.float32)
        distances = ((x[:, None] - entries) ** 2).sum(2)  # whole numbers
        for search in (residual.nearest_entries, entries_by_lanes):
            np.testing.assert_array_equal(search(x, Book(entries)), distances.argmin(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_all_sizes_are_coded(backend: str) -> None:
    """The scale of rows is float16 and a power of two of the tensor: nothing overflows, what is tiny beside it is 0."""
    x = gaussian(20, 16).numpy()
    codebooks = table(4, 6, 8, 16)
    worst = rel_mse(x, pqcodec.decode(pqcodec.encode(x, preset="rvq4", codebooks=codebooks), tables=codebooks)) * 1.01
    for size in (1e-37, 1e-20, 1e10, 3e37):
        y = pqcodec.decode(
            pqcodec.encode(x * np.float32(size), preset="rvq4", codebooks=codebooks), tables=codebooks, backend=backend
        )
        assert rel_mse(x, y.astype(np.float64) / size) < worst
    x[1:] *= 1e-12
    y = pqcodec.decode(
        pqcodec.encode(x, preset="rvq4", codebooks=codebooks, backend=backend), tables=codebooks, backend=backend
    )
    assert not y[1:].any()


def test_any_bits_decode_to_finite_numbers() -> None:
    codebooks, rng = table(3, 5, 16, 64), np.random.default_rng(5)
    data = bytearray(pqcodec.encode(gaussian(64, 64), preset="rvq3", codebooks=codebooks))
    h = Header.from_bytes(bytes(data))
    body = rng.integers(0, 256, h.blocks.size(0) - 4, dtype=np.uint8).tobytes()
    data[h.payload_start :] = body + struct.pack("<I", checksum(body))
    one, two = (pqcodec.decode(bytes(data), tables=codebooks, backend=name) for name in BACKENDS)
    assert bool(one.isfinite().all())
    np.testing.assert_array_equal(bits(one), bits(two))
    np.testing.assert_array_equal(bits(one), second_decoder.decode(bytes(data), [codebooks.to_bytes()]))


def test_every_prefix_is_truncated_and_every_flipped_bit_found() -> None:
    stream = pqcodec.encode(gaussian(2, 3, 16), preset="rvq2", codebooks=BOOKS, chunk_tokens=2, exact_tokens=1)
    every_proper_prefix_is_truncated(stream, lambda data: pqcodec.decode(data, tables=BOOKS))
    every_flipped_bit_is_found(stream, lambda data: pqcodec.decode(data, tables=BOOKS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_decodes_some_tokens_at_a_time(backend: str) -> None:
    x, q = gaussian(2, 90, 64), gaussian(4, 3, 64, seed=1).numpy()
    codebooks = table(3, 5, 16, 64)
    streams = [pqcodec.encode(each.numpy(), preset="rvq3", codebooks=codebooks) for each in (x, -x)]
    keys, values = (pqcodec.decode(each, tables=codebooks) for each in streams)
    given = [pqcodec.given_tables(each, codebooks) for each in streams]
    wanted = q.reshape(2, 6, 64) @ keys.swapaxes(1, 2) / 8
    np.testing.assert_allclose(scores(given[0], q, backend=backend).reshape(wanted.shape), wanted, atol=1e-4)
    weights = np.exp(wanted - wanted.max(-1, keepdims=True))
    out = (weights / weights.sum(-1, keepdims=True)) @ values
    found = attend(q, given[0], given[1], causal=False, backend=backend)
    np.testing.assert_allclose(found.reshape(out.shape), out, atol=1e-4)
    with pytest.raises(MissingTable, match=codebooks.name):
        scores(streams[0], q, backend=backend)


def test_gpu_backends_refuse_by_name(gpu_backend: str) -> None:
    x, words = gaussian(2, 3, 16), "does not code such streams .coding residual VQ.*backends 'cpu' and 'reference' do"
    with pytest.raises(BackendUnavailable, match=words):
        pqcodec.encode(x.to(DEVICE), preset="rvq2", codebooks=BOOKS, backend=gpu_backend)
    data = pqcodec.encode(x, preset="rvq2", codebooks=BOOKS)
    with pytest.raises(BackendUnavailable, match=words):
        pqcodec.decode(data, tables=BOOKS, device=DEVICE, backend=gpu_backend)
    with pytest.raises(BackendUnavailable, match="trains no codebooks"):
        train_vq(gaussian(100, 16), stages=1, entries=16, group=8, least=1, backend=gpu_backend)


# -- tables --------------------------------------------------------------------------------------------------------
def with_table(stream: bytes, other: SharedTable) -> bytes:
    """A stream that names another table."""
    size = struct.unpack_from("<I", stream, 8)[0]
    head = stream[: size - 36] + other.digest
    return head + struct.pack("<I", checksum(head)) + stream[size:]


def test_tables_that_do_not_go_with_rows_are_refused() -> None:
    x = gaussian(3, 16).numpy()
    stream = pqcodec.encode(x, preset="rvq2", codebooks=BOOKS)
    more = VectorTable(np.concatenate([BOOKS.entries, BOOKS.entries]), BOOKS.channels)
    longer = pqcodec.decode(with_table(stream, more), tables=more)  # its first stages are the same
    np.testing.assert_array_equal(longer, pqcodec.decode(stream, tables=BOOKS))
    for other, said in (
        (LevelTable((-1, 1)), "residual VQ"),
        (table(2, 4, 8, 24), "codebooks for head_dim 24, where vectors have 16 numbers"),
        (table(1, 4, 8, 16), "codebooks of 1 stages, 2 groups and indices of 4 bits, where rows of 2 stages have 32 bits"),
        (table(2, 5, 8, 16), "indices of 5 bits, where rows of 2 stages have 32 bits"),
        (table(2, 4, 16, 16), "1 groups and indices of 4 bits, where rows of 2 stages have 32 bits"),
    ):
        forged = with_table(stream, other)
        with pytest.raises(CorruptStream, match=said):
            pqcodec.decode(forged, tables=other)
        assert second_decoder.missing(forged, [other.to_bytes()]) == "corrupt"
        assert pqcodec.verify(forged) == []
    for tables in ((), [LevelTable((-1, 1)), more]):
        with pytest.raises(MissingTable, match=f"needs the shared table {BOOKS.name}, which is not here"):
            pqcodec.decode(stream, tables=tables)


@pytest.mark.parametrize(
    ("raw", "error"),
    [
        (RAW[:19], CorruptStream),
        (RAW[:-1], CorruptStream),
        (RAW + b"\0\0", CorruptStream),
        (RAW[:8] + struct.pack("<I", 255) + RAW[12:], CorruptStream),
        (RAW[:18] + b"\1" + RAW[19:], UnsupportedStream),
        *[(RAW[:at] + bytes([n]) + RAW[at + 1 :], CorruptStream) for at in range(12, 18) for n in (3, 9, 13, 200)],
        (RAW[:20] + b"\1" + RAW[21:], CorruptStream),
        (RAW[:20] + b"\x10" + RAW[21:], CorruptStream),
        (RAW[:-1] + b"\x7c", CorruptStream),
        (RAW[:-1] + b"\xff", CorruptStream),
    ],
)
def test_bytes_that_are_no_codebooks_are_refused(raw: bytes, error: type[PQError]) -> None:
    no_shared_table(raw, error)


@pytest.mark.parametrize(
    ("entries", "channels", "said"),
    [
        (np.zeros((2, 16)), range(8), "entries float16 .2, 16.: float16 .stages, entries, channels"),
        (np.zeros((9, 16, 8)), range(8), "9 stages of 16 entries"),
        (np.zeros((1, 17, 8)), range(8), "1 stages of 17 entries"),
        (np.zeros((1, 8192, 8)), range(8), "1 stages of 8192 entries"),
        (np.zeros((1, 16, 12)), range(12), "groups of 12 channels at head_dim 12"),
        (np.zeros((1, 16, 8)), range(12), "groups of 8 channels at head_dim 12"),
        (np.zeros((1, 16, 8)), [0] * 8, "groups do not hold each of 8 channels once"),
        (np.full((1, 16, 8), 1e6), range(8), "an entry is not finite"),
        (np.zeros((1, 16, 8)), [1024] * 8, "channels 0 .. 1023"),
        (np.zeros((1, 16, 8)), np.arange(8.0), "channels of float64"),
        ("no", range(8), "arrays of numbers"),
    ],
)
def test_codebooks_that_are_none_are_refused(entries: Any, channels: Any, said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        VectorTable(entries, np.array(channels))


def test_presets_and_codebooks_go_together() -> None:
    x = gaussian(3, 16).numpy()
    for options, said in (
        ({"preset": "rvq2"}, "preset 'rvq2' needs codebooks=VectorTable.*none are given"),
        ({"preset": "rvq2", "codebooks": LevelTable((-1, 1))}, "needs codebooks=VectorTable.*a LevelTable is given"),
        ({"preset": "rvq3", "codebooks": BOOKS}, "the codebooks have 2 stages; choose fewer, or train more"),
        ({"preset": "pq3", "codebooks": BOOKS}, "preset 'pq3' takes none; choose one of rvq"),
        ({"preset": "rvq2", "levels": (-1, 1)}, "preset 'rvq2' takes none; choose one of nuq"),
        ({"preset": "rvq2", "codebooks": table(2, 4, 8, 24)}, "codebooks for head_dim 24"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            pqcodec.encode(x, **options)
    with pytest.raises(InvalidArgument, match="presets of residual VQ need codebooks="):
        Recipe.of(("pq4", "rvq2"))


def test_what_holds_no_tables_refuses_by_name(tmp_path: Path) -> None:
    words = "preset 'rvq2' needs codebooks=|presets of residual VQ need codebooks="
    x = gaussian(2, 40, 16)
    with HostPool(1 << 16, device="cpu") as pool, pytest.raises(InvalidArgument, match=words):
        pool.put("x", [x, x], preset="rvq2")
    with pytest.raises(InvalidArgument, match=words):
        PrefixStore(tmp_path, preset="rvq2")
    with pytest.raises(InvalidArgument, match=words):
        pqcodec.EncodeBatch([x], preset="rvq2")


# -- training ------------------------------------------------------------------------------------------------------
def test_trained_codebooks_come_near_to_the_least_error() -> None:
    """Gaussian numbers at half a bit a stage: no code errs by less than half of their energy; 16 vectors of 8 by .61."""
    x, held_out = gaussian(1500, 16), gaussian(300, 16, seed=1)
    counts: list[tuple[int, int]] = []
    codebooks = train_vq(x, stages=3, entries=16, group=8, progress=lambda *done: counts.append(done))
    assert counts == [(n + 1, counts[0][1]) for n in range(counts[0][1])]
    for stages, least, most in ((1, 0.5, 0.63), (2, 0.25, 0.4), (3, 0.125, 0.26)):
        stream = pqcodec.encode(held_out, preset=f"rvq{stages}", codebooks=codebooks)
        assert least < rel_mse(held_out, pqcodec.decode(stream, tables=codebooks)) < most
    assert Header.from_bytes(stream).bits_per_coordinate == 8 * 5 / 16  # two bytes of scale, six indices of four bits


def test_a_seed_gives_one_table_on_every_backend() -> None:
    x = gaussian(2, 250, 16).numpy()
    x[0, 3, 2], x[1, 7] = np.nan, 0  # left out
    options: dict[str, Any] = {"stages": 2, "entries": 16, "group": 8}
    first = train_vq(list(x), backend="cpu", **options)
    assert first == train_vq(x, backend="reference", **options)
    assert first != train_vq(x, seed=1, **options)


def test_strided_groups_are_those_of_channels_in_pairs() -> None:
    """The same vectors in RoPE's two layouts get the same entries, and each group the same pairs' halves."""
    interleaved = gaussian(400, 32).numpy()
    half = np.concatenate([interleaved[:, ::2], interleaved[:, 1::2]], 1)
    options: dict[str, Any] = {"stages": 1, "entries": 16, "group": 8, "strided": True}
    one, other = train_vq(interleaved, pairing="interleaved", **options), train_vq(half, pairing="half", **options)
    np.testing.assert_array_equal(one.entries, other.entries)
    np.testing.assert_array_equal(one.channels, np.arange(32).reshape(8, 4).T.ravel())
    np.testing.assert_array_equal(half[:, other.channels], interleaved[:, one.channels])
    assert group_channels(16, 8, True, "half", 8).tolist() == [0, 1, 2, 3, 8, 10, 12, 14, 4, 5, 6, 7, 9, 11, 13, 15]
    assert train_vq(half, **options | {"strided": False}).channels.tolist() == list(range(32))


@pytest.mark.parametrize(
    ("x", "options", "said"),
    [
        (gaussian(100, 16), {}, "200 groups of channels for 16 entries; at least 30 an entry are expected"),
        (gaussian(400, 12), {}, "groups of 8 channels do not divide head_dim 12"),
        (gaussian(400, 16), {"entries": 20}, "entries 20: 16, 32, 64"),
        (gaussian(400, 16), {"group": 4}, "group 4: 8, 16, 32, 64 are possible"),
        (gaussian(400, 16), {"stages": 9}, "stages 9: 1, 2, 3"),
        (gaussian(400, 16), {"pairing": "both"}, "pairing 'both' is unknown"),
        (gaussian(400, 16), {"rope_dim": 17}, "RoPE that turns 17 channels of 16"),
        ([gaussian(400, 16), gaussian(400, 8)], {}, "tensor 1 is .400, 8."),
        ([], {}, "no tensors are given"),
    ],
)
def test_what_cannot_be_trained_is_refused(x: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        train_vq(x, **{"stages": 1, "entries": 16, "group": 8, **options})


# -- files and the command line ------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["safetensors", "zarr", "pqkv"])
def test_files_carry_the_codebooks_of_each_layer(tmp_path: Path, kind: str) -> None:
    if kind == "zarr":
        pytest.importorskip("zarr")
    x, path = gaussian(2, 40, 16).numpy(), tmp_path / "a.pqkv"
    one, two = table(2, 4, 8, 16), table(2, 5, 8, 16)
    layers = [(x, -x), (x + 1, x)]
    save_cache(path, layers, preset="rvq2", codebooks={("key", 0): one, ("key", None): two, ("value", None): BOOKS})
    append_cache(path, layers)
    convert(path, tmp_path / "b", to=kind)
    with open_encoded(tmp_path / "b") as file:
        assert set(file.tables.values()) == {one, two, BOOKS}
        assert [file.inspect(name).table for name in file.names] == [t.name for t in (one, BOOKS, two, BOOKS)]
        assert file.inspect("layers.0.key").centered is None
        found = file.decode("layers.1.key")
        assert file.verify() == []
    np.testing.assert_array_equal(found, load_cache(path)[1][0])
    np.testing.assert_array_equal(found[:, :4], layers[1][0][:, :4])  # exact ones
    with pytest.raises(InvalidArgument, match="there are no codebooks for value 0"):
        save_cache(tmp_path / "c", layers, preset="rvq2", codebooks={("key", None): two})


def test_the_command_line_trains_and_uses_codebooks(tmp_path: Path) -> None:
    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(each) for each in arguments])

    x = gaussian(2, 320, 16).numpy()
    tensors = {f"layers.{layer}.{role}": x + layer for layer in range(2) for role in ("key", "value")}
    save_file(tensors, tmp_path / "kv.safetensors")
    small = ["--stages", 2, "--entries", 16, "--group", 8]
    done = run("train-vq", tmp_path / "kv.safetensors", tmp_path / "books", *small)
    assert done.exit_code == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "books").iterdir())
    assert files == ["key.0.pqt", "key.1.pqt", "value.0.pqt", "value.1.pqt"]
    again = run("train-vq", tmp_path / "kv.safetensors", tmp_path / "books", *small)
    assert (again.exit_code, "exists; pass --force" in again.stderr) == (2, True)
    encoded = run(
        "encode", tmp_path / "kv.safetensors", tmp_path / "kv.pqkv", "--preset", "rvq2", "--table", tmp_path / "books"
    )
    assert encoded.exit_code == 0, encoded.stderr
    found = json.loads(run("inspect", tmp_path / "kv.pqkv", "--json").stdout)
    assert {each["content"] for each in found["tables"]} == {"2 codebooks of 16 entries, 2 groups of 8 channels"}
    key = SharedTable.from_bytes((tmp_path / "books" / "key.1.pqt").read_bytes())
    assert next(t["stream"]["table"] for t in found["tensors"] if t["name"] == "layers.1.key") == key.name
    assert f"shared table {key.name}: 2 codebooks of 16 entries" in run("inspect", tmp_path / "kv.pqkv").stdout
    (tmp_path / "bare.pqs").write_bytes(pqcodec.encode(x, preset="rvq2", codebooks=key))
    assert f"shared table {key.name}: is needed, and not here" in run("inspect", tmp_path / "bare.pqs").stdout
    assert run("verify", tmp_path / "kv.pqkv").exit_code == 0
    together = run("train-vq", tmp_path / "kv.pqkv", tmp_path / "both", "--together", "--json", *small)
    assert [Path(each["file"]).name for each in json.loads(together.stdout)["files"]] == ["key.pqt", "value.pqt"]
    (tmp_path / "both" / "value.pqt").unlink()
    for arguments, said in (
        (["encode", tmp_path / "kv.safetensors", tmp_path / "c.pqkv", "--preset", "rvq2"], "needs codebooks: give --table"),
        (
            ["encode", tmp_path / "kv.safetensors", tmp_path / "c.pqkv", "--preset", "rvq2", "--table", tmp_path],
            "holds no tables",
        ),
        (
            ["encode", tmp_path / "kv.safetensors", tmp_path / "c.pqkv", "--preset", "rvq2", "--table", tmp_path / "both"],
            "there are no codebooks for value 0",
        ),
        (["train-vq", tmp_path / "kv.safetensors", tmp_path / "d", "--group", 8], "1152 groups of channels for 2048 entries"),
    ):
        bad = run(*arguments)
        assert (bad.exit_code, said in bad.stderr) == (2, True), bad.stderr
