"""The README says what was measured, and what it shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, rel_mse
from pages import blocks, run, tiny_model

from benchmarks.fleet import PAGE, with_tables
from benchmarks.readme import PAGES, ROOT, with_figures
from pqcodec.formats import PrefixStore


@pytest.mark.parametrize("page", PAGES)
def test_the_figures_are_those_of_the_result_files(page: str) -> None:
    assert with_figures(page) == (ROOT / page).read_text(), "run python -m benchmarks.readme"


def test_what_it_links_to_is_there() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert len(linked) > 10
    assert not [path for path in linked if not (ROOT / path).exists()]


def test_the_tables_for_fleets_are_those_of_the_sizes_and_the_result_files() -> None:
    page = PAGE.read_text()
    assert with_tables(page) == page, "run python -m benchmarks.fleet"


def test_its_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines for transformers twice, as by two programs."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model().to(DEVICE)
    names = run(ROOT / "README.md", model=model, input_ids=torch.randint(3, 100, (1, 1000)).to(DEVICE))
    assert rel_mse(torch.from_numpy(names["x"]), torch.from_numpy(names["y"])) < 0.05
    assert names["part"].shape == (8, 256, 128)
    assert len(names["layers"]) == 2
    exec(blocks(ROOT / "README.md", "python")[1], names)
    assert names["out"].shape[1] > 1000
    with PrefixStore("prefixes") as store:
        assert store.get(model, names["input_ids"]).length == 999
        assert store.shelf.max_bytes == 50 * 10**9
