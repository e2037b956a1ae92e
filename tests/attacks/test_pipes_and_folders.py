"""Tried: pipes, sockets and folders where a store has files. Must: nothing waits, the block counts as damaged."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from attacks.ground import Ground
from pqcodec.errors import InvalidArgument


def socket_at(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent.parent)  # a socket's name may have 100 characters
    try:
        socket.socket(socket.AF_UNIX).bind(os.path.join(path.parent.name, "s"))
        os.rename(os.path.join(path.parent.name, "s"), path)
    finally:
        os.chdir(before)


MAKE: dict[str, Any] = {"a pipe": os.mkfifo, "a folder": Path.mkdir, "a socket": socket_at}


@pytest.mark.parametrize("kind", MAKE)
def test_in_the_place_of_a_block(ground: Ground, kind: str) -> None:
    total = ground.get()
    path = ground.first()
    path.unlink()
    MAKE[kind](path)
    with pytest.warns(RuntimeWarning, match=r"damaged and was dropped.*no regular file"):
        assert ground.get() < total
    ground.put()
    ground.use_everything()


@pytest.mark.parametrize("kind", MAKE)
def test_when_the_index_is_made_anew(ground: Ground, kind: str) -> None:
    blocks = list(ground.blocks())
    blocks[0].unlink()
    MAKE[kind](blocks[0])
    for name in ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
        (ground.folder / name).unlink(missing_ok=True)
    with pytest.warns(RuntimeWarning, match=f"{len(blocks) - 1} blocks were found again"):
        ground.get()
    ground.use_everything()


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", ["index.sqlite", "index.sqlite-wal", "lock"])
def test_in_the_place_of_a_file_of_the_store(ground: Ground, kind: str, name: str) -> None:
    (ground.folder / name).unlink(missing_ok=True)
    MAKE[kind](ground.folder / name)
    with pytest.raises(InvalidArgument, match="regular files of its own"):
        ground.get()
    ground.use_everything()


def test_in_a_folder_of_inputs(ground: Ground) -> None:
    (ground.out / "in").mkdir()
    os.mkfifo(ground.out / "in" / "a.pqkv")
    for verb in ("verify", "inspect"):
        assert ground.run(verb, ground.out / "in").exit_code == 2


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", ["index.sqlite.damaged", "index.sqlite-journal"])
def test_in_the_place_of_a_mark(ground: Ground, kind: str, name: str) -> None:
    """The index stays where it is, and the store opens once the thing is moved away."""
    index = (ground.folder / "index.sqlite").stat().st_ino
    MAKE[kind](ground.folder / name)
    with pytest.raises(InvalidArgument, match="regular files of its own"):
        ground.get()
    assert (ground.folder / "index.sqlite").stat().st_ino == index


@pytest.mark.parametrize("kind", ["a pipe", "a socket"])
def test_an_input_by_its_name(ground: Ground, kind: str) -> None:
    path = ground.out / "x.pqkv"
    MAKE[kind](path)
    new = ground.out / "new.pqkv"
    for words in (
        ("verify", path),
        ("inspect", path),
        ("decode", path, f"{new}.npz"),
        ("encode", path, new),
        ("convert", path, new),
    ):
        assert "is no regular file" in ground.run(*words).output
    assert "is no regular file" in ground.run("store", "import", "--trust", ground.out / "s", path).output


@pytest.mark.parametrize("what", ["a pipe", "a socket", "what never ends"])
@pytest.mark.parametrize("where", ["zarr.json", "complete/zarr.json", "*/zarr.json", "*/c/*"])
def test_inside_of_a_zarr_store(ground: Ground, what: str, where: str) -> None:
    pytest.importorskip("zarr")
    cache = ground.out / "x.zarr"
    ground.run("convert", ground.first(), cache)
    paths = [path for path in cache.rglob("*") if path.is_file() and path.relative_to(cache).match(where)]
    assert paths
    for path in paths:
        path.unlink()
        MAKE[what](path) if what in MAKE else path.symlink_to("/dev/zero")
    assert ground.run("verify", cache).exit_code == 1
    ground.run("decode", cache, ground.out / "back.npz")
    ground.run("convert", cache, ground.out / "back.pqkv")


def test_a_document_without_end(ground: Ground) -> None:
    pytest.importorskip("zarr")
    ground.run("convert", ground.first(), ground.out / "x.zarr")
    with open(ground.out / "x.zarr" / "zarr.json", "r+b") as file:
        file.truncate(1 << 40)  # takes no room on the disk, nor in an archive
    assert "at most" in ground.run("verify", ground.out / "x.zarr").output
