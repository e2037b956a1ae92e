"""config.json as LMCache's users have it: the size and number of heads, and RoPE as transformers computes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_config import config_rope, heads_of, read_config

LLAMA = {"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 500000.0}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, not truncated": {
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("partial", [1.0, 0.5])
@pytest.mark.parametrize("of", ["rope_scaling", "rope_parameters"])
def test_frequencies_are_those_of_transformers(kind: str, partial: float, of: str) -> None:
    transformers = pytest.importorskip("transformers")
    from pqcodec.formats.engines.transformers_cache.rope import frequencies

    said = {"rope_type": kind.split(",")[0], **SCALINGS[kind]}
    config = {**LLAMA, "max_position_embeddings": 131072, "partial_rotary_factor": partial}
    config[of] = said if of == "rope_scaling" else {**said, "rope_theta": 500000.0, "partial_rotary_factor": partial}
    rope = config_rope(config, 64)
    given = {**said, "rope_theta": 500000.0, "partial_rotary_factor": partial}
    sizes = {name: value for name, value in config.items() if name not in ("model_type", of, "rope_theta")}
    wanted = frequencies(transformers.LlamaConfig(**sizes, rope_parameters=given), 0)
    assert rope.style == "half"
    assert wanted is not None
    np.testing.assert_allclose(rope.frequencies, wanted, rtol=1e-6)


def test_styles_follow_from_the_type_of_the_model() -> None:
    assert config_rope({**LLAMA, "model_type": "cohere"}, 64).style == "interleaved"
    with pytest.raises(InvalidArgument, match=r"model_type 'my_model'.*say what RoPE it has"):
        config_rope({**LLAMA, "model_type": "my_model"}, 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_theta": None}, "rope_theta None"),
        ({"rope_theta": -1}, "rope_theta -1"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope' is not one of"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not one of"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3': its parameters .* do not hold"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "two"}}, "'linear': its parameters .* do not hold"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}}, "several RoPEs"),
    ],
)
def test_a_rope_that_is_not_told_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        config_rope({**LLAMA, **change}, 64)


def test_heads() -> None:
    assert heads_of(LLAMA) == (64, 2)
    assert heads_of({"head_dim": 128, "num_attention_heads": 8}) == (128, 8)
    with pytest.raises(InvalidArgument, match="latent attention"):
        heads_of({**LLAMA, "kv_lora_rank": 512})
    for config in ({}, {"hidden_size": 64}, {"head_dim": "64", "num_attention_heads": 4}, {"head_dim": 64}):
        with pytest.raises(InvalidArgument, match="give 'head_dim' and 'kv_heads'"):
            heads_of(config)


def test_a_config_is_read_from_its_file_or_folder(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for text in ("[1]", "{", "\xff"):
        file.write_text(text, "latin-1")
        with pytest.raises(InvalidArgument, match=r"config\.json"):
            read_config(file)
    file.write_text(json.dumps({"model_type": "some_vlm", "text_config": LLAMA}))
    assert read_config(file) == read_config(tmp_path) == LLAMA
    with pytest.raises(InvalidArgument, match="the path of a model"):
        read_config(tmp_path / "elsewhere")
