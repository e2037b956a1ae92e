"""The gallery's scripts run, and print and draw what the site shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.docs.scripts import GALLERY, MARK, pictures, printed, with_scripts

NEEDS = {"rope": "matplotlib", "prefixes": "transformers", "shared_store": "transformers", "zarr_slices": "zarr"}
NAMES = sorted(path.stem for path in GALLERY.glob("*.py"))
PAGE = (GALLERY.parent / "pages" / "gallery.md").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_it_prints_and_draws_what_the_site_shows(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(NEEDS.get(name, "numpy"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    shown = (GALLERY / f"{name}.txt").read_text()
    assert printed(name, tmp_path) == shown, f"run python -m tools.docs.scripts {name}"
    assert [path.name for path in tmp_path.iterdir()] == [path.name for path in pictures() if path.stem == name]


def test_the_page_shows_every_script_and_picture() -> None:
    assert sorted(MARK.findall(PAGE)) == NAMES
    page = with_scripts(PAGE)
    assert all((GALLERY / f"{name}.py").read_text() in page for name in NAMES)
    assert re.findall(r"!\[\w+\]\(gallery/(.+)\)", page) == [path.name for path in pictures()]


def test_scripts_are_short() -> None:
    for name in NAMES:
        assert len([line for line in (GALLERY / f"{name}.py").read_text().splitlines() if line]) < 30, name
