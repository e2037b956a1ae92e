"""NaN and Inf: each place that refuses them says what can be done there, and each place that keeps them says nothing."""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pqcodec
from pqcodec.errors import InvalidArgument, NonFiniteInput
from pqcodec.formats import HostPool
from pqcodec.formats.cache import (
    append_cache,
    load_cache,
    load_safetensors,
    load_zarr,
    save_cache,
    save_safetensors,
    save_zarr,
)
from pqcodec.formats.containers.reader import named
from pqcodec.formats.engines.block_tables import encode_blocks

REFERENCE = {"backend": "reference"}


def layers(*places: tuple[int, float], dtype: Any = np.float32) -> list[tuple[np.ndarray, np.ndarray]]:
    """Two layers of (key, value) that have some numbers at (token, number)."""
    found = np.random.default_rng(0).standard_normal((2, 2, 2, 40, 64)).astype(dtype)
    for token, number in places:
        found[:, :, 1, token, 3] = number
    return [(key, value) for key, value in found]


def write_appended(path: Path, cache: Any, **options: Any) -> None:
    save_cache(path, layers(), **REFERENCE)
    append_cache(path, cache, **options)


WRITERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "c.pqkv": (save_cache, load_cache),
    "a.pqkv": (write_appended, load_cache),
    "c.safetensors": (save_safetensors, lambda path, **load: [[*load_safetensors(path, **load).values()][:2]]),
    "c.zarr": (save_zarr, load_zarr),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_of_caches_has_the_option_that_it_hints_at(name: str, tmp_path: Path) -> None:
    if name == "c.zarr":
        pytest.importorskip("zarr")
    write, read = WRITERS[name]
    cache = layers((1, np.inf), (9, np.nan))
    with pytest.raises(NonFiniteInput, match=r"element \[1, 9, 3\] of the tensor is nan.*pass nonfinite='exact'"):
        write(tmp_path / name, cache, **REFERENCE) if name != "a.pqkv" else write(tmp_path / name, layers((9, np.nan)))
    for left in tmp_path.iterdir():
        left.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(tmp_path / name, cache, nonfinite="exact", **REFERENCE)
        key, _ = read(tmp_path / name, **REFERENCE)[0]
    np.testing.assert_array_equal(np.asarray(key)[1, -40:][[1, 9]], cache[0][0][1, [1, 9]])


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_exact_tokens_may_hold_anything_without_a_warning(number: float, dtype: Any, tmp_path: Path) -> None:
    cache = layers((0, number), (3, number), dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_cache(tmp_path / "c.pqkv", cache, **REFERENCE)
        key, _ = load_cache(tmp_path / "c.pqkv", **REFERENCE)[0]
    np.testing.assert_array_equal(key[:, :4], cache[0][0][:, :4])


def test_places_without_the_option_do_not_hint_at_it() -> None:
    blocks = torch.zeros(2, 4, 8, 2, 64)
    blocks[0, 2, 3] = torch.inf
    with pytest.raises(NonFiniteInput, match="gather_blocks"):
        encode_blocks(blocks, "2,blocks,block,heads,dim", [2], 8, **REFERENCE)
    assert "nonfinite" not in inspect.signature(encode_blocks).parameters
    with HostPool(1 << 20, device="cpu") as pool, pytest.raises(NonFiniteInput, match="is not kept; mend") as told:
        pool.put("a", torch.full((2, 8, 64), torch.nan), wait=True)
    assert "nonfinite" not in str(told.value)


def test_the_error_keeps_its_two_parts_on_its_way() -> None:
    with pytest.raises(InvalidArgument) as told, named("tensor 'k'"):
        pqcodec.encode(np.full((4, 64), np.inf, np.float32), **REFERENCE)
    again = pickle.loads(pickle.dumps(told.value))
    assert str(again) == str(told.value)
    assert str(again).startswith("tensor 'k': element [0, 0] of the tensor is inf (4 vectors hold NaN or Inf); mend the tensor")
    assert str(again).count("mend") == 1


def test_a_prefix_store_keeps_them_where_it_is_asked_to(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from pqcodec.formats import PrefixStore
    from pqcodec.formats.engines import transformers_cache

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    ids, cache = torch.arange(40)[None], transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        cache.layers[1].values[0, 1, 20, 3] = torch.inf
    with PrefixStore(tmp_path / "store", **REFERENCE) as store, pytest.raises(NonFiniteInput, match="nonfinite='exact'"):
        store.put(model, ids, cache)
    with PrefixStore(tmp_path / "store", nonfinite="exact", **REFERENCE) as store:
        store.put(model, ids, cache)
        kept, _ = store.get(model, ids)
    assert torch.equal(kept.layers[1].values[0, 1, 20], cache.layers[1].values[0, 1, 20])
    with pytest.raises(NonFiniteInput, match="nonfinite='exact'"):
        transformers_cache.save(cache, tmp_path / "c.pqkv", model, **REFERENCE)
    transformers_cache.save(cache, tmp_path / "c.pqkv", model, nonfinite="exact", **REFERENCE)
