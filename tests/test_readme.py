"""The README says what was measured, and what it shows runs."""

from __future__ import annotations

import re

import numpy as np
import pytest

from benchmarks.readme import ROOT, with_figures


def test_the_figures_are_those_of_the_result_files() -> None:
    readme = (ROOT / "README.md").read_text()
    assert with_figures(readme) == readme, "run python -m benchmarks.readme"


def test_its_python_runs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code
    x = np.random.default_rng(0).standard_normal((2, 600, 64)).astype(np.float16)
    names = {"x": x, "key": x, "value": x}
    exec(code[1].replace("(key, value), ...", "(key, value)"), names)
    assert names["y"].shape == x.shape
    assert len(names["layers"]) == 1
