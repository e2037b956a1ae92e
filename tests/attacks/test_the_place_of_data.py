"""Tried: an index that says that its files lie elsewhere. Must: nobody goes there without the user's word."""

from __future__ import annotations

import pytest

from attacks.ground import Ground
from pqcodec.errors import InvalidArgument


@pytest.mark.parametrize("place", ["{beside}", "{beside}/folder", "../beside", "memory://elsewhere", "redis://host/0", ""])
def test_an_index_names_a_place(ground: Ground, place: str) -> None:
    place = place.format(beside=ground.beside)
    ground.change("INSERT OR REPLACE INTO places VALUES ('data', ?)", place)
    with pytest.raises(InvalidArgument, match=r"its index says that its files lie in .*; pass data="):
        ground.get()
    for verb in (("ls",), ("gc", "--older-than", 0), ("rm", "--all", "--yes"), ("verify", "--drop"), ("stats",)):
        assert ground.run("store", verb[0], ground.folder, *verb[1:]).exit_code == 2
    ground.use_everything()


def test_the_place_that_the_user_names(ground: Ground, tmp_path) -> None:
    ground.options["data"] = str(tmp_path / "elsewhere")
    ground.folder = tmp_path / "another"
    ground.put()
    assert ground.get("2") > 0
    ground.options["data"] = str(ground.beside)
    with pytest.raises(InvalidArgument, match="not in"):
        ground.get("2")
    ground.check_beside()
