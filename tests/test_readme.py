"""The README says what was measured, and what it shows runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, rel_mse

from benchmarks.fleet import PAGE, with_tables
from benchmarks.readme import ROOT, with_figures
from pqcodec.formats import PrefixStore


def test_the_figures_are_those_of_the_result_files() -> None:
    readme = (ROOT / "README.md").read_text()
    assert with_figures(readme) == readme, "run python -m benchmarks.readme"


def test_the_tables_for_fleets_are_those_of_the_sizes_and_the_result_files() -> None:
    page = PAGE.read_text()
    assert with_tables(page) == page, "run python -m benchmarks.fleet"


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x = np.random.default_rng(0).standard_normal((2, 600, 64)).astype(np.float16)
    names = {"x": x, "key": x, "value": x}
    exec(blocks()[2].replace("(key, value), ...", "(key, value)"), names)
    assert names["y"].shape == x.shape
    assert len(names["layers"]) == 1


def tiny_model() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 100}
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def test_its_lines_for_offload_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys, values = torch.ones(2, 8, 300, 64, device=DEVICE)
    names = {"model": tiny_model(), "input_ids": torch.randint(3, 100, (1, 1000)), "keys": keys, "values": values}
    exec(blocks()[1].replace("8 << 30", "8 << 20"), names)
    assert rel_mse(keys, names["keys"]) < 0.05
    assert names["out"].shape[1] > 1000


def test_its_three_lines_for_transformers_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    names = {"model": model, "input_ids": torch.randint(3, 100, (1, 300))}
    for _ in range(2):
        exec(blocks()[0], names)
    assert names["out"].shape[1] > 300
    with PrefixStore("prefixes") as store:
        assert store.get(model, names["out"]).length >= 300
        assert store.shelf.max_bytes == 50 << 30
