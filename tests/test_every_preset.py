"""Every preset through every store and pool: what comes back is what decode(encode(x)) gives, or a refusal by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RESTORING, TINY, bits, gaussian

import pqcodec
from pqcodec.errors import InvalidArgument
from pqcodec.formats.offload import HostPool

transformers = pytest.importorskip("transformers")

from pqcodec.formats.engines import transformers_cache as tc  # noqa: E402
from pqcodec.formats.offload.encoded_cache import ROLES, EncodedCache  # noqa: E402
from pqcodec.formats.policy.names import TensorRole  # noqa: E402
from pqcodec.formats.policy.recipe import Recipe  # noqa: E402
from pqcodec.formats.store import PrefixStore  # noqa: E402
from pqcodec.formats.store.prefix_store import BLOCK_CHUNK  # noqa: E402
from pqcodec.formats.store.writing import TAIL_PRESET  # noqa: E402

BLOCK, TOKENS, HEADS, DIM = 256, 300, 2, 16
every_preset = pytest.mark.parametrize("preset", RESTORING)  # test_residual has those that need codebooks


def again(x: torch.Tensor, **options: Any) -> torch.Tensor:
    """A tensor, encoded and decoded."""
    return pqcodec.decode(pqcodec.encode(x.contiguous(), **options))


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return x.dtype == y.dtype and bool((bits(x) == bits(y)).all())


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, "num_hidden_layers": 2})).eval()


def pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, neither of mean 0."""
    return gaussian(*shape, seed=1) + 1, gaussian(*shape, seed=2) - 1


@every_preset
def test_a_pool_gives_back_what_was_put_from_memory_and_from_disk(preset: str, tmp_path: Path) -> None:
    given, options = list(pair(HEADS, 40, 64)), {"preset": preset, "center": "mean", "exact_tokens": 3}
    with HostPool(1 << 15, device="cpu", spill=tmp_path) as pool:
        fitted = pqcodec.PRESETS[preset].by_levels and not pqcodec.PRESETS[preset].levels
        if preset == "paper" or fitted:  # their headers depend on the numbers
            with pytest.raises(InvalidArgument, match=f"preset '{preset}' looks at the numbers"):
                pool.put("given", given, **options)
            return
        pool.put("given", given, wait=True, **options)
        in_memory = pool.get("given")
        while not pool.counters.spilled:
            pool.put(len(pool), given, preset="pq2", wait=True)
        for x, *found in zip(given, in_memory, pool.get("given"), strict=True):
            assert all(same(again(x, **options), y) for y in found)
        assert pool.counters.reloaded == 1


@every_preset
def test_an_encoded_cache_gives_attention_what_was_encoded(model: Any, preset: str) -> None:
    first, last, given = 2, 8, pair(2, HEADS, TOKENS, DIM)
    cache = EncodedCache(model, preset=preset, window=last, chunk=16, exact_tokens=first)
    cache.update(*(x[:, :, :-1] for x in given), 0)
    (layer, *_), old = cache.encoded_layers, slice(first, TOKENS - 1 - last)
    found = cache.update(*(x[:, :, -1:] for x in given), 0)
    for role, x, y in zip(ROLES, given, found, strict=True):
        options = {name: getattr(layer._old.options[role], name) for name in ("preset", "center", "rope", "seed")}
        assert (options["preset"], options["center"] is None) == (preset, role == "values")
        coded = torch.stack([again(row[:, old], **options) for row in x])
        assert same(torch.cat([x[:, :, : old.start], coded, x[:, :, old.stop :]], 2), y)


@every_preset
def test_a_prefix_store_gives_back_its_blocks(model: Any, preset: str, tmp_path: Path) -> None:
    ids = torch.randint(3, 100, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    with PrefixStore(tmp_path, preset=preset) as store, torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        assert store.put(model, ids, cache).tokens == TOKENS
        found, length = store.get(model, ids)
    rope = tc.rope_of(model.config, 0, DIM, "half")
    for role, path, rope_of_role in (("key", "keys", rope), ("value", "values", None)):
        whole, expected = torch.stack([getattr(layer, path) for layer in cache.layers]), []
        for first, last, of in ((0, BLOCK, preset), (BLOCK, TOKENS, TAIL_PRESET)):
            recipe = Recipe(of, chunk_tokens=BLOCK_CHUNK)
            options = recipe.options(TensorRole(role, None, rope_of_role, first))
            expected.append(again(whole[..., first:last, :], preset=of, **options))
        assert same(torch.cat(expected, -2)[..., :length, :], torch.stack([getattr(layer, path) for layer in found.layers]))
