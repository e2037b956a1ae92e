"""Tried: links inside a store to what is beside it. Must: nothing is read, written or removed through them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from attacks.ground import PROMPTS, Ground
from pqcodec.errors import InvalidArgument


def swap(path: Path, target: Path) -> None:
    """Put a link in the place of a file or folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)


def test_the_folder_of_the_blocks(ground: Ground) -> None:
    swap(ground.folder / "blocks", ground.beside / "folder")
    with pytest.raises(InvalidArgument, match=r"blocks: is a link"):
        ground.put()
    ground.use_everything()


def test_a_folder_of_some_blocks(ground: Ground) -> None:
    shutil.copytree(ground.folder / "blocks", ground.beside / "folder" / "copy")
    ground.before = ground.print_of_beside()
    for folder in (ground.folder / "blocks").iterdir():
        swap(folder, ground.beside / "folder" / "copy" / folder.name)
    with pytest.warns(RuntimeWarning, match="is no regular file"):
        assert ground.get() == 0
    ground.use_everything()


def test_a_block(ground: Ground) -> None:
    for block in ground.blocks():
        swap(block, ground.beside / "precious.pqkv")
    with pytest.warns(RuntimeWarning, match="is no regular file"):
        assert ground.get() == 0
    ground.use_everything()


@pytest.mark.parametrize("target", ["precious", "missing"])
@pytest.mark.parametrize("name", ["index.sqlite", "index.sqlite-wal", "index.sqlite-shm", "lock"])
def test_a_file_that_a_store_writes_to(ground: Ground, name: str, target: str) -> None:
    swap(ground.folder / name, ground.beside / target)
    with pytest.raises(InvalidArgument, match="is a link"):
        ground.get()
    ground.use_everything()


@pytest.mark.parametrize("name", ["index.sqlite", "index.sqlite-wal"])
def test_another_name_of_a_file(ground: Ground, name: str) -> None:
    (ground.folder / name).unlink(missing_ok=True)
    os.link(ground.beside / "precious", ground.folder / name)
    with pytest.raises(InvalidArgument, match="one file under 2 names"):
        ground.get()
    ground.use_everything()


@pytest.mark.parametrize("target", ["precious", "folder", "missing"])
def test_the_mark_of_damage(ground: Ground, target: str) -> None:
    swap(ground.folder / "index.sqlite.damaged", ground.beside / target)
    ground.use_everything()


def test_a_store_behind_a_link_of_its_user(ground: Ground, tmp_path: Path) -> None:
    """The folder itself is the user's own word."""
    (tmp_path / "link").symlink_to(ground.folder)
    found = ground.get()
    ground.folder = tmp_path / "link"
    assert ground.get() == found > len(PROMPTS)
