"""How much of its tensors encoding reads: each whole, once, and before that a sample of those that share bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gaussian
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file
from typer.testing import CliRunner

import pqcodec
from pqcodec import codec
from pqcodec.formats.cache import save_cache, save_safetensors, save_zarr
from pqcodec.formats.containers.pqkv.appender import PQKVAppender
from pqcodec.formats.containers.pqkv.file import PQKVWriter, write_pieces
from pqcodec.formats.plain import files, in_memory
from pqcodec.formats.plain import numbers as exact
from pqcodec.formats.policy import rates
from pqcodec.formats.policy.names import TensorRole
from pqcodec.formats.policy.recipe import Recipe
from pqcodec.options import EncodeOptions
from pqcodec.stages.centre import Rope
from pqcodec.stream.header import Header, read_header
from pqcodec.stream.source import MemorySource
from pqcodec.tools.cli import app

NAMES = [f"layers.{layer}.{role}" for layer in range(rates.FEWEST_LAYERS) for role in ("key", "value")]
TENSORS = {name: (gaussian(1, 2, 1100, 16, seed=seed) * (1 + seed % 5)).half().numpy() for seed, name in enumerate(NAMES)}
NUMBERS = TENSORS[NAMES[0]].size
SAMPLE = 2 * len(range(4, 1100, (1100 - 4) // 256)) * 16  # numbers of two heads of the tokens that are not exact


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Numbers that are read whole and as samples, summed over all tensors, and headers of streams that are parsed."""
    found: Counter[str] = Counter()

    def watch(reader: type, method: str) -> None:
        real = getattr(reader, method)

        def counting(self: Any, name: str, *where: int) -> Any:
            x = real(self, name, *where)
            found[method] += exact.nbytes(x) // x.dtype.itemsize
            return x

        monkeypatch.setattr(reader, method, counting)

    for reader in (files._Safetensors, files._Npz, files._Npy, in_memory.InMemory):
        watch(reader, "read")
        watch(reader, "read_tokens")
    parse = Header.from_bytes.__func__

    def parsed(cls: type, data: bytes) -> Header:
        found["headers"] += 1
        return parse(cls, data)

    monkeypatch.setattr(Header, "from_bytes", classmethod(parsed))
    return found


def write_bfloat16(path: Path) -> None:
    save_torch_file({name: torch.from_numpy(x).bfloat16() for name, x in TENSORS.items()}, path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "plain.safetensors": lambda path: save_file(TENSORS, path),
    "bfloat16.safetensors": write_bfloat16,
    "plain.npz": lambda path: np.savez(path, **TENSORS),
    "columns.npz": lambda path: np.savez(path, **{name: np.asfortranarray(x) for name, x in TENSORS.items()}),
    "bigendian.npz": lambda path: np.savez(path, **{name: x.astype(">f2") for name, x in TENSORS.items()}),
}


@pytest.mark.parametrize("options", [[], ["--check"], ["--flat"]], ids=" ".join)
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_read_once_and_a_sample_before(tmp_path: Path, reads: Counter[str], name: str, options: list[str]) -> None:
    WRITERS[name](tmp_path / name)
    result = CliRunner().invoke(app, ["encode", str(tmp_path / name), str(tmp_path / "out.pqkv"), *options])
    assert result.exit_code == 0, result.output
    assert reads["read"] == len(NAMES) * NUMBERS
    assert reads["read_tokens"] == (0 if options == ["--flat"] else len(NAMES) * SAMPLE)
    assert reads["headers"] <= 1  # of the trial stream


def test_a_compressed_file_is_unpacked_twice(tmp_path: Path, reads: Counter[str]) -> None:
    np.savez_compressed(tmp_path / "kv.npz", **TENSORS)
    result = CliRunner().invoke(app, ["encode", str(tmp_path / "kv.npz"), str(tmp_path / "out.pqkv")])
    assert result.exit_code == 0, result.output
    assert reads["read"] == 2 * len(NAMES) * NUMBERS


@pytest.mark.parametrize("suffix", ["pqkv", "safetensors", "zarr"])
def test_a_cache_in_memory_is_read_once_and_a_sample_before(tmp_path: Path, reads: Counter[str], suffix: str) -> None:
    if suffix == "zarr":
        pytest.importorskip("zarr")
    save = {"pqkv": save_cache, "safetensors": save_safetensors, "zarr": save_zarr}[suffix]
    save(tmp_path / f"cache.{suffix}", [(TENSORS[key], TENSORS[key.replace("key", "value")]) for key in NAMES[::2]])
    assert reads == {"read": len(NAMES) * NUMBERS, "read_tokens": len(NAMES) * SAMPLE}


@pytest.mark.parametrize("name", [*WRITERS, "deflated.npz", "single.npy"])
@pytest.mark.parametrize(("first", "step"), [(0, 1), (4, 7), (1099, 1), (1100, 1)])
def test_tokens_are_those_of_the_whole_tensor(tmp_path: Path, name: str, first: int, step: int) -> None:
    others = {
        "deflated.npz": lambda path: np.savez_compressed(path, **TENSORS),
        "single.npy": lambda path: np.save(path, TENSORS[NAMES[3]]),
    }
    (WRITERS | others)[name](tmp_path / name)
    with files.open_tensors(tmp_path / name) as reader:
        tensor = reader.names[-1]
        found, whole = reader.read_tokens(tensor, first, step), reader.read(tensor)
    expected = whole[..., first::step, :]
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert np.array_equal(exact.to_bytes(found), exact.to_bytes(expected))


@pytest.mark.parametrize("padding", [(), (0, 3), (600, 1)])
@pytest.mark.parametrize("tokens", [5, 64, 1100])
def test_a_sample_has_the_energy_of_the_whole_tensor(padding: tuple[int, ...], tokens: int) -> None:
    """Exact tokens behind padding count as the last one."""
    x, rope, recipe = gaussian(2, 3, tokens, 16), Rope(theta=100.0), Recipe()
    padding = tuple(min(n, tokens - 2) for n in padding)
    for role, centred in (("key", True), ("value", False)):
        tensor = TensorRole(role, 0, rope if centred else None, padding=padding)
        flat = x.clone().reshape(6, tokens, 16)
        for lead, token in recipe.exact_vectors(tensor, tuple(x.shape)):
            flat[lead, token] = flat[lead, -1]
        first = recipe.options(tensor)["exact_tokens"]
        expected = rates.energy(flat.reshape(x.shape), rope=rope if centred else None, exact_tokens=first, centred=centred)
        tensors = in_memory.InMemory({"x": x})
        assert recipe._energy(tensors, "x", tensor, tuple(x.shape), centred=centred) == expected


@pytest.mark.parametrize("options", [{}, {"center": "mean", "exact_tokens": 3}, {"preset": "paper"}, {"nonfinite": "exact"}])
def test_the_encoders_header_is_the_streams(options: dict[str, Any]) -> None:
    x = gaussian(2, 40, 32)
    x[1, 7, 3] = np.inf if "nonfinite" in options else 0
    header, data = codec.encode_by(EncodeOptions(**options), x)
    assert header == read_header(MemorySource(data))
    assert data == pqcodec.encode(x, **options)


def test_streams_of_a_piece_bring_their_headers(tmp_path: Path) -> None:
    recipe = Recipe(stream_tokens=500, rope=Rope(theta=100.0))
    tensors = in_memory.InMemory({"k": TENSORS[NAMES[0]]})
    (piece,) = recipe.pieces(tensors, {"k": TensorRole("key", 0)})
    coded = piece.body()
    assert [stream.header.tokens for stream in coded.streams] == [500, 500, 100]
    assert all(stream.header == read_header(MemorySource(stream.read(0, stream.size))) for stream in coded.streams)
    assert coded.rel_mse
    assert write_pieces(tmp_path / "k.pqkv", [piece])


def test_a_file_that_grows_parses_each_header_once(tmp_path: Path, reads: Counter[str]) -> None:
    x = TENSORS[NAMES[0]]
    with PQKVWriter(tmp_path / "k.pqkv", parts=True) as writer:
        writer.add("k", x)
    assert reads["headers"] == 1
    with PQKVAppender(tmp_path / "k.pqkv") as writer:
        writer.extend("k", x)
        assert reads["headers"] == 3  # that of the first tokens, too: new ones are coded like them
        writer.extend("k", x)
        assert reads["headers"] == 4
