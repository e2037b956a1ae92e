"""Tried: reading another user's caches, under the usual umask 022. Must: files are 0600 and folders 0700 unless asked."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attacks.ground import Ground
from pqcodec.formats import HostPool, PrefixStore, save_cache

LAYERS = [(np.ones((1, 8, 64), np.float16), np.ones((1, 8, 64), np.float16))]


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def modes(place: Path) -> set[tuple[str, int]]:
    """Kind and mode of all that lies at a place."""
    found = [place, *place.rglob("*")] if place.is_dir() else [place]
    return {("folder" if path.is_dir() else "file", stat.S_IMODE(path.stat().st_mode)) for path in found}


PRIVATE, OPEN = {("folder", 0o700), ("file", 0o600)}, {("folder", 0o755), ("file", 0o644)}


def test_a_store_and_its_exports(tmp_path: Path) -> None:
    os.umask(0o022)
    ground = Ground(tmp_path)
    ground.get()
    ground.run("store", "export", "--all", ground.folder, ground.out / "exported")
    ground.run("store", "import", "--trust", ground.out / "new", ground.out / "exported")
    for place in (ground.folder, ground.out / "exported", ground.out / "new"):
        assert modes(place) <= PRIVATE, place


def test_a_store_that_others_share(tmp_path: Path) -> None:
    ground = Ground(tmp_path, shared=True)
    ground.get()
    assert modes(ground.folder) <= OPEN
    ground.run("store", "export", "--all", ground.folder, ground.out / "exported")
    assert modes(ground.out / "exported") <= PRIVATE
    ground.run("store", "import", "--trust", "--shared", ground.out / "new", ground.out / "exported")
    assert modes(ground.out / "new") <= OPEN


def test_a_store_of_the_version_before_becomes_private(tmp_path: Path) -> None:
    ground = Ground(tmp_path, shared=True)
    ground.options.pop("shared")
    assert ground.get() > 0
    private = {path.name for path in ground.folder.iterdir() if stat.S_IMODE(path.stat().st_mode) & 0o077 == 0}
    assert {"blocks", "index.sqlite", "lock"} <= private


def test_what_a_pool_spills(tmp_path: Path) -> None:
    x = torch.randn(1, 512, 64)
    with HostPool(40_000, device="cpu", spill=tmp_path / "spill") as pool:
        for number in range(8):
            pool.put(number, [x])
        assert pool.counters.spilled
        assert modes(tmp_path / "spill") == PRIVATE


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
@pytest.mark.parametrize("name", ["kv.pqkv", "kv.safetensors", "kv.zarr"])
def test_outputs_keep_the_mode_of_their_input(ground: Ground, tmp_path: Path, mode: int, name: str) -> None:
    plain, folder_mode = tmp_path / "x.npz", mode | (mode & 0o444) >> 2
    np.savez(plain, **{"layers.0.key": LAYERS[0][0]})
    plain.chmod(mode)
    (tmp_path / "many").mkdir()
    ground.run("encode", plain, tmp_path / name)
    ground.run("decode", tmp_path / name, tmp_path / "back.safetensors")
    ground.run("convert", tmp_path / name, tmp_path / "other.pqkv")
    ground.run("encode", plain, f"{tmp_path}/many/new/")
    for place in (tmp_path / name, tmp_path / "back.safetensors", tmp_path / "other.pqkv", tmp_path / "many" / "new"):
        assert modes(place) <= {("folder", folder_mode), ("file", mode)}, place


def test_the_umask_narrows_and_force_does_not_widen(ground: Ground, tmp_path: Path) -> None:
    plain = tmp_path / "x.npz"
    np.savez(plain, **{"layers.0.key": LAYERS[0][0]})
    plain.chmod(0o666)
    ground.run("encode", plain, tmp_path / "x.pqkv")
    assert modes(tmp_path / "x.pqkv") == {("file", 0o644)}
    plain.chmod(0o600)
    ground.run("encode", "--force", plain, tmp_path / "x.pqkv")
    assert modes(tmp_path / "x.pqkv") == {("file", 0o600)}
    os.umask(0o077)
    plain.chmod(0o644)
    ground.run("encode", "--force", plain, tmp_path / "x.pqkv")
    assert modes(tmp_path / "x.pqkv") == {("file", 0o600)}


def test_caches_that_a_program_saves(tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    from pqcodec.formats.cache import save_safetensors, save_zarr

    save_cache(tmp_path / "a.pqkv", LAYERS)
    save_safetensors(tmp_path / "a.safetensors", LAYERS)
    save_zarr(tmp_path / "a.zarr", LAYERS)
    for place in tmp_path.glob("a.*"):
        assert modes(place) <= PRIVATE, place
    (tmp_path / "a.pqkv").chmod(0o644)
    save_cache(tmp_path / "a.pqkv", LAYERS)
    assert modes(tmp_path / "a.pqkv") == {("file", 0o644)}  # its owner has opened it


def test_a_store_in_a_folder_of_the_user_keeps_the_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir(mode=0o755)
    with PrefixStore(tmp_path / "mine") as store:
        assert store.shelf.folder.stat().st_mode & 0o777 == 0o755
    found: Any = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "mine").iterdir()}
    assert found["blocks"] == 0o700
    assert found["index.sqlite"] == 0o600


@pytest.mark.parametrize("words", [("ls",), ("stats",), ("verify",), ("gc",), ("rm", "--unused-for", 1), ("export", "--all")])
def test_looking_after_a_store_that_others_share(tmp_path: Path, words: tuple[Any, ...]) -> None:
    """An owner who lists it does not lock the others out."""
    ground = Ground(tmp_path, shared=True)
    before = {path: path.stat().st_mode for path in ground.folder.rglob("*")}
    out = [ground.out / "new"] if words[0] == "export" else []
    assert ground.run("store", words[0], ground.folder, *words[1:], *out).exit_code == 0
    assert {path: path.stat().st_mode for path in ground.folder.rglob("*")} == before


def test_folders_above_what_is_written(tmp_path: Path) -> None:
    PrefixStore(tmp_path / "store" / "a" / "b").close()
    HostPool(1 << 20, device="cpu", spill=tmp_path / "spill" / "a" / "b").close()
    for place in ("store", "spill"):
        assert modes(tmp_path / place) <= PRIVATE


def test_an_index_that_is_set_aside(tmp_path: Path) -> None:
    """Of the version before, which left it open to others; it holds prompts as the new one does."""
    ground = Ground(tmp_path)
    (ground.folder / "index.sqlite").chmod(0o644)
    (ground.folder / "index.sqlite.damaged").touch()
    with pytest.warns(RuntimeWarning, match="is set aside"):
        ground.get()
    assert modes(ground.folder) == PRIVATE
