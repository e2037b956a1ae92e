"""The README says what was measured, and what it shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.readme import ROOT, with_figures
from pqcodec.formats import PrefixStore


def test_the_figures_are_those_of_the_result_files() -> None:
    readme = (ROOT / "README.md").read_text()
    assert with_figures(readme) == readme, "run python -m benchmarks.readme"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).standard_normal((2, 600, 64)).astype(np.float16)
    names = {"x": x, "key": x, "value": x}
    exec(blocks()[1].replace("(key, value), ...", "(key, value)"), names)
    assert names["y"].shape == x.shape
    assert len(names["layers"]) == 1


def test_its_three_lines_for_transformers_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 100}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    names = {"model": model, "input_ids": torch.randint(3, 100, (1, 300))}
    for _ in range(2):
        exec(blocks()[0], names)
    assert names["out"].shape[1] > 300
    with PrefixStore("prefixes") as store:
        assert store.get(model, names["out"]).length >= 300
        assert store.shelf.max_bytes == 50 << 30
