"""Tried: a store of objects that lists names which lead elsewhere. Must: they are passed over, or refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from attacks.ground import Ground
from pqcodec.errors import InvalidArgument
from pqcodec.formats.places import remote
from pqcodec.formats.store.files import BlockFiles
from pqcodec.tools import files

NAMES = ["..", "../x", "a/../../beside/precious.pqkv", "ab/x.pqkv", f"ab/{'ab' * 32}-{'0' * 12}.pqkv/..", f"{'ab' * 33}.pqkv"]


def test_objects_that_no_store_wrote_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = f"ab/{'ab' * 32}-{'0' * 12}.pqkv"
    monkeypatch.setattr(remote, "ages", lambda pattern: [(f"objects/{name}", 5.0) for name in (*NAMES, mine)])
    assert list(BlockFiles("memory://objects").complete()) == [mine]


@pytest.mark.parametrize("name", ["..", ".", "", "a/../..", "a//b", "/etc/x"])
def test_an_input_is_listed_under_a_name_that_leads_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setattr(files, "inputs", lambda *_: files.WorkList([files.Input("memory://x", name)], True))
    with pytest.raises(InvalidArgument, match="would be written outside OUTPUT"):
        files.tasks(["memory://x/*"], str(tmp_path / "out"), files.PLAIN, ".pqkv", False)


@pytest.mark.parametrize("place", ["file://{}", "{}"])
def test_a_store_with_its_files_in_a_place_that_the_user_names(ground: Ground, tmp_path: Path, place: str) -> None:
    shutil.copytree(ground.folder / "blocks", tmp_path / "objects")
    total = ground.get()
    ground.folder, ground.options["data"] = tmp_path / "another", place.format(tmp_path / "objects")
    with pytest.warns(RuntimeWarning, match="found again"):
        assert ground.get() == total
    ground.change("UPDATE blocks SET file = '../beside/precious'")
    with pytest.warns(RuntimeWarning, match="a row was dropped"):
        assert ground.get() == 0
    (tmp_path / "objects" / "ab").mkdir(exist_ok=True)
    ground.put()
    ground.check_beside()
