"""Prompt caches of mlx-lm on the command line: their metadata tell keys and values, and all else comes back as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file
from typer.testing import CliRunner

from pqcodec.formats import PQKVFile
from pqcodec.formats.plain import mlx
from pqcodec.formats.policy.names import role_of
from pqcodec.tools.cli import app

CLASSES = ["KVCache", "ArraysCache", "RotatingKVCache"]


def written(path: Path, place: str) -> dict[str, np.ndarray]:
    """A file as mlx-lm 0.32 writes it (``place``: "1"), or older ones ("2"); the second layer is a recurrent one."""
    rng = np.random.default_rng(1)
    tensors: dict[str, np.ndarray] = {}
    for layer, name in enumerate(CLASSES):
        for part in range(2):
            tensors[f"{layer}.{part}"] = rng.standard_normal((1, 2, 300, 64)).astype(np.float16)
        if name != "ArraysCache":
            tensors[f"{layer}.2"] = np.array(300, np.int32)
    metadata = {"0.model": "tiny", **{f"{place}.{layer}": name for layer, name in enumerate(CLASSES)}}
    save_file(tensors, path, metadata)
    return tensors


@pytest.mark.parametrize("place", ["1", "2"])
def test_a_prompt_cache_is_told_by_its_metadata(tmp_path: Path, place: str) -> None:
    tensors = written(tmp_path / "cache.safetensors", place)
    run, coded, back = CliRunner(), tmp_path / "cache.pqkv", tmp_path / "back.safetensors"
    found = run.invoke(app, ["encode", str(tmp_path / "cache.safetensors"), str(coded)])
    assert found.exit_code == 0, found.output
    with PQKVFile(coded) as file:
        roles = {name: (file.entry(name).role, file.entry(name).layer) for name in file.names if file.entry(name).coded}
    kept = {f"{layer}.{part}": (role, layer) for layer in (0, 2) for part, role in enumerate(("key", "value"))}
    assert {name: roles[name] for name in kept} == kept
    assert {roles[name][0] for name in roles.keys() - kept.keys()} <= {"other"}
    assert run.invoke(app, ["decode", str(coded), str(back)]).exit_code == 0
    with safe_open(back, "numpy") as file:
        assert file.metadata()["0.model"] == "tiny"
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            same = file.get_tensor(name)
            assert (same.shape, same.dtype) == (tensor.shape, tensor.dtype)
            error = ((same.astype(float) - tensor) ** 2).mean() / (tensor.astype(float) ** 2).mean()
            assert error <= (0.04 if name in kept or name in roles else 0), name


def test_the_users_word_counts_more(tmp_path: Path) -> None:
    written(tmp_path / "cache.safetensors", "1")
    coded = tmp_path / "cache.pqkv"
    found = CliRunner().invoke(app, ["encode", str(tmp_path / "cache.safetensors"), str(coded), "--keys", r"^2\.0$"])
    assert found.exit_code == 0, found.output
    with PQKVFile(coded) as file:
        assert [name for name in file.names if file.entry(name).role == "key"] == ["2.0"]


@pytest.mark.parametrize(
    "metadata", [{}, {"1.0": "ArraysCache"}, {"1.0": "QuantizedKVCache"}, {"x": "KVCache"}, {"1.": "KVCache"}]
)
def test_other_metadata_say_nothing(metadata: dict[str, str]) -> None:
    assert mlx.regexes_of(metadata) is None


def test_a_regex_can_name_the_layer() -> None:
    assert (role_of("a.7.b.3", keys=r"a\.\d+\.b\.(?P<layer>\d+)").layer, role_of("a.7", keys="a").layer) == (3, 7)
    assert role_of("a.x", keys=r"a\.(?P<layer>.)").layer is None
