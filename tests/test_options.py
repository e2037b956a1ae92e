"""Wrong options are refused where they are given, by their own names; no tensor is blamed for them."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pqcodec
from pqcodec.codings.presets import DEFAULT_PRESET
from pqcodec.errors import InvalidArgument
from pqcodec.formats import PrefixStore
from pqcodec.formats.cache import save_cache, save_safetensors, save_zarr
from pqcodec.formats.containers import open_encoded
from pqcodec.formats.offload import EncodedCache, HostPool
from pqcodec.formats.policy import rates
from pqcodec.formats.policy.names import TensorRole
from pqcodec.formats.policy.recipe import Recipe
from pqcodec.formats.store.shelf import Shelf
from pqcodec.options import EncodeOptions
from pqcodec.stages.centre import Rope
from pqcodec.tools import encode as command_line

LAYERS = [(np.ones((2, 8, 64), np.float16), np.ones((2, 8, 64), np.float16))]
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"seed": -1}, r"^seed -1 is outside 0 \.\. 2\^64 - 1"),
    ({"seed": "0"}, r"^seed '0' is no whole number"),
    ({"exact_tokens": -1}, r"^exact_tokens -1 is outside 0"),
    ({"exact_tokens": 1.5}, r"^exact_tokens 1.5 is no whole number"),
    ({"chunk_tokens": 0}, r"^chunk_tokens 0 is outside 1 \.\. 4096"),
    ({"chunk_tokens": True}, r"^chunk_tokens True is no whole number"),
    ({"nonfinite": "maybe"}, r"^nonfinite 'maybe' is unknown; choose 'error' or 'exact'"),
    ({"effort": "most"}, r"^effort 'most' is unknown"),
    ({"rope": Rope(theta=-3.0)}, r"^rope.theta -3.0 is not a positive number"),
    ({"rope": Rope(theta=float("nan"))}, r"^rope.theta nan is not a positive number"),
    ({"rope": Rope(dim=3)}, r"^rope.dim 3: an even number from 2 on is expected"),
    ({"rope": Rope(first_position=-1)}, r"^rope.first_position -1 is outside 0"),
    ({"rope": Rope(style="spiral")}, r"^rope.style 'spiral' is unknown"),
    ({"rope": Rope(frequencies=(1.0, float("inf")))}, r"^rope.frequencies holds NaN or Inf"),
]


def encode(path: Path, layers: Any, **options: Any) -> None:
    pqcodec.encode(layers[0][0], **options, **({"center": "rope"} if "rope" in options else {}))


@pytest.mark.parametrize("write", [encode, save_cache, save_safetensors, save_zarr], ids=lambda write: write.__name__)
@pytest.mark.parametrize(("options", "words"), WRONG, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_a_wrong_option_is_named(write: Callable[..., Any], options: dict[str, Any], words: str, tmp_path: Path) -> None:
    if write is save_zarr:
        pytest.importorskip("zarr")
    with pytest.raises(InvalidArgument, match=words):
        write(tmp_path / "c", LAYERS, backend="reference", **options)
    assert not list(tmp_path.iterdir())


def test_whole_numbers_of_numpy_are_numbers() -> None:
    options = {"seed": np.uint64(1 << 63), "exact_tokens": np.int32(2), "chunk_tokens": np.int64(8)}
    stream = pqcodec.encode(LAYERS[0][0], backend="reference", **options)
    info = pqcodec.inspect(stream)
    assert (info.seed, info.exact_tokens, info.chunk_tokens) == (1 << 63, 2, 8)


@pytest.mark.parametrize("write", [save_cache, save_safetensors, save_zarr], ids=lambda write: write.__name__)
def test_a_pair_of_presets_is_of_keys_and_of_values(write: Callable[..., Any], tmp_path: Path) -> None:
    if write is save_zarr:
        pytest.importorskip("zarr")
    layers = rates.FEWEST_LAYERS * LAYERS  # enough that one preset's bits would be shared
    write(tmp_path / "kv.zarr" if write is save_zarr else tmp_path / "kv", layers, preset=("pq4", "pq3"), backend="reference")
    (path,) = tmp_path.iterdir()
    with open_encoded(path) as file:
        found = {(file.entry(name).role, file.inspect(name).preset) for name in file.names}
    assert found == {("key", "pq4"), ("value", "pq3")}


def test_a_pair_of_presets_of_a_cache_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from pqcodec.formats.engines import transformers_cache

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    config = transformers.LlamaConfig(**sizes)
    cache = transformers.DynamicCache(config=config)
    cache.update(*torch.ones(2, 1, 2, 40, 16), 0)
    transformers_cache.save(cache, tmp_path / "kv.pqkv", config, preset=("pq4", "pq3"), backend="reference")
    with open_encoded(tmp_path / "kv.pqkv") as file:
        assert [file.inspect(name).preset for name in file.names] == ["pq4", "pq3"]
        assert file.metadata[transformers_cache.files.PRESETS] == "pq3 and pq4"


def test_one_preset_still_shares_its_bits(tmp_path: Path) -> None:
    assert Recipe.of("pq3").share_bits
    assert not Recipe.of(("pq3", "pq3")).share_bits
    assert Recipe.of(["pq4", "pq3"]).stream_bytes(TensorRole("value"), (2, 8, 64), "float16") < Recipe.of("pq4").stream_bytes(
        TensorRole("value"), (2, 8, 64), "float16"
    )


@pytest.mark.parametrize("options", [{"seed": -1}, {"exact_tokens": -1}, {"window": 0}, {"chunk": "512"}], ids=str)
def test_an_encoded_cache_names_its_options(options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    from pqcodec.formats.offload.encoded_cache import EncodedCache

    config = transformers.LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(InvalidArgument, match=f"^{next(iter(options))} "):
        EncodedCache(config, **options)


def test_ages_are_not_negative(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path / "store")
    for grace in (-1.0, float("nan")):
        with pytest.raises(InvalidArgument, match=f"^grace {grace}: a number of seconds"):
            shelf.gc(grace)
    shelf.close()


@pytest.mark.parametrize(
    "ask",
    [
        pqcodec.encode,
        pqcodec.encoded_size,
        pqcodec.EncodeBatch,
        EncodeOptions,
        save_cache,
        save_safetensors,
        save_zarr,
        Recipe,
        PrefixStore,
        HostPool,
        EncodedCache,
        command_line.encode,
    ],
    ids=lambda ask: ask.__qualname__,
)
def test_one_preset_is_the_default_everywhere(ask: Callable[..., Any]) -> None:
    assert signature(ask).parameters["preset"].default == DEFAULT_PRESET
