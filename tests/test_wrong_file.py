"""A file that is given to the function of another kind: the error says what the file is, and which function reads it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pqcodec
from pqcodec import CorruptStream, InvalidArgument
from pqcodec.formats import PQKVFile, PQKVWriter, load_cache, save_cache
from pqcodec.formats.cache import load_safetensors, load_zarr, save_safetensors, save_zarr
from pqcodec.formats.containers import open_encoded

X = np.random.default_rng(0).standard_normal((2, 40, 64)).astype(np.float16)
KINDS = {  # of files, and how an error calls them
    "pqkv": r"a \.pqkv file, which pqcodec\.formats\.load_cache reads",
    "safetensors": r"a \.safetensors file, which pqcodec\.formats\.cache\.load_safetensors reads",
    "zarr": r"a folder of zarr, which pqcodec\.formats\.cache\.load_zarr reads",
    "npz": r"plain arrays, which numpy\.load reads and `pqcodec encode` encodes",
    "npy": r"a plain array, which numpy\.load reads and `pqcodec encode` encodes",
    "pqs": r"single stream.* pqcodec\.decode",
    "txt": r"is this the right file\?",
    "folder": "it is a folder",
}
READERS: dict[str, Callable[[Any], Any]] = {"pqkv": load_cache, "safetensors": load_safetensors, "zarr": load_zarr}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of every kind, called so that its name tells nothing."""
    folder = tmp_path_factory.mktemp("files")
    made = {kind: folder / f"made-{number}" for number, kind in enumerate(KINDS)}
    save_cache(made["pqkv"], [(X, X)])
    save_safetensors(made["safetensors"], [(X, X)])
    pytest.importorskip("zarr")
    save_zarr(made["zarr"], [(X, X)])
    with open(made["npz"], "wb") as npz, open(made["npy"], "wb") as npy:
        np.savez(npz, x=X)
        np.save(npy, X)
    made["pqs"].write_bytes(pqcodec.encode(X))
    made["txt"].write_text("a text, and no tensor")
    made["folder"].mkdir()
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_the_error_names_the_right_function(reader: str, kind: str, files: dict[str, Path]) -> None:
    if reader == kind:
        assert len(READERS[reader](files[kind])) > 0
        return
    expected = "holds no cache of save_zarr" if (reader, kind) == ("zarr", "folder") else KINDS[kind]
    with pytest.raises((CorruptStream, InvalidArgument, IsADirectoryError), match=expected):
        READERS[reader](files[kind])


@pytest.mark.parametrize("verb", [pqcodec.decode, pqcodec.inspect, pqcodec.verify])
def test_verbs_of_one_stream_name_it_too(verb: Callable[[Any], Any], files: dict[str, Path]) -> None:
    for kind in ("pqkv", "safetensors", "npz", "npy", "txt"):
        with pytest.raises(CorruptStream, match=KINDS[kind]):
            verb(files[kind].read_bytes())
    for path in (str(files["pqkv"]), files["pqs"]):
        with pytest.raises(InvalidArgument, match=r"open\(path, 'rb'\).*load_cache"):
            verb(path)


def test_a_damaged_file_of_the_right_kind_is_not_called_another(tmp_path: Path) -> None:
    path = tmp_path / "kv.safetensors"
    save_safetensors(path, [(X, X)])
    os.truncate(path, 200)
    with pytest.raises(CorruptStream) as raised:
        load_safetensors(path)
    assert "it is" not in str(raised.value)


def test_a_file_at_a_url_is_named_too() -> None:
    pytest.importorskip("fsspec")
    save_cache("memory://wrong/kv", [(X, X)])
    with pytest.raises(CorruptStream, match=KINDS["pqkv"]):
        load_safetensors("memory://wrong/kv")


def test_load_cache_refuses_tensors_of_no_layer(tmp_path: Path) -> None:
    path = tmp_path / "other.pqkv"
    with PQKVWriter(path) as writer:
        writer.add("memory", X)
        writer.add_exact("positions", np.arange(40))
    with pytest.raises(InvalidArgument, match=r"it holds 'memory', 'positions'; .*open_encoded"):
        load_cache(path)
    with open_encoded(path) as file:
        assert file.decode("memory").shape == X.shape


def test_an_empty_cache_is_one(tmp_path: Path) -> None:
    save_cache(tmp_path / "none.pqkv", [])
    assert load_cache(tmp_path / "none.pqkv") == []
    with PQKVFile(tmp_path / "none.pqkv") as file:
        assert file.names == ()
