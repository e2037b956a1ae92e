"""Sequences that are padded at their left: exact are the first tokens behind the padding, in files and in an EncodedCache."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, gaussian, needs_triton, rel_mse

import pqcodec
from pqcodec.errors import InvalidArgument, NonFiniteInput

transformers = pytest.importorskip("transformers")

from pqcodec.formats import PQKVFile  # noqa: E402
from pqcodec.formats.engines import transformers_cache as tc  # noqa: E402
from pqcodec.formats.offload.encoded_cache import EncodedCache  # noqa: E402

PADDING = (0, 7, 33, 2)
TOKENS = 40
SMALL = {"window": 4, "chunk": 8, "exact_tokens": 4, "preset": "pq2"}


def model() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, num_hidden_layers=2)).eval()


def mask() -> torch.Tensor:
    return (torch.arange(TOKENS) >= torch.tensor(PADDING)[:, None]).long()


def with_sinks() -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (and values) whose first real tokens are far from all others, as attention sinks are."""
    keys, values = (gaussian(len(PADDING), 2, TOKENS, 16, seed=seed) for seed in (1, 2))
    for row, before in enumerate(PADDING):
        keys[row, :, before] *= 30
    return keys, values


def firsts(x: torch.Tensor, count: int = 4) -> torch.Tensor:
    return torch.cat([x[row, :, before : before + count] for row, before in enumerate(PADDING)])


# -- the codec ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=needs_triton)])
def test_vectors_are_exact_by_their_places(backend: str) -> None:
    x = gaussian(2, 3, 30, 16, dtype=torch.float16)
    places = [(4, 9), (0, 3), (5, 29), (4, 9), (2, 1)]  # in any order, twice, among the first tokens
    data = pqcodec.encode(x, preset="pq2", exact_tokens=2, exact_vectors=places, backend=backend)
    assert pqcodec.inspect(data).exact_vectors == 3
    for reader in ("reference", "cpu"):
        y = pqcodec.decode(data, backend=reader).reshape(6, 30, 16)
        exact = (y == x.reshape(6, 30, 16)).all(-1)
        assert {tuple(place) for place in exact.nonzero().tolist()} == {*places, *itertools.product(range(6), (0, 1))}
    assert pqcodec.encode(x, preset="pq2", exact_vectors=[], backend=backend) == pqcodec.encode(
        x, preset="pq2", backend=backend
    )
    for wrong in ((6, 0), (0, 30), (-1, 0)):
        with pytest.raises(InvalidArgument, match="outside of 6 leading indices and 30 tokens"):
            pqcodec.encode(x, exact_vectors=[wrong], backend=backend)
    x[1, 1, 9, 3] = float("nan")
    with pytest.raises(NonFiniteInput):
        pqcodec.encode(x, exact_vectors=places, backend=backend)
    assert pqcodec.inspect(pqcodec.encode(x, exact_vectors=places[:2], nonfinite="exact", backend=backend)).exact_vectors == 2


# -- a file ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("told", [PADDING, mask()], ids=["numbers", "mask"])
def test_a_file_keeps_the_first_real_tokens(tmp_path: Path, told: Any) -> None:
    owner, path, cache = model(), tmp_path / "a.pqkv", transformers.DynamicCache()
    keys, values = with_sinks()
    for layer in range(2):
        cache.update(keys, values, layer)
    tc.save(cache, path, owner, preset="pq3", padding=told)
    for layer in tc.load(path, owner).layers:
        assert torch.equal(firsts(layer.keys), firsts(keys))
        assert torch.equal(firsts(layer.values), firsts(values))
        assert 0.01 < rel_mse(values, layer.values) < 0.1
    with PQKVFile(path) as file:
        kept = sum(min(4, TOKENS - before) * 2 for before in PADDING[1:])
        assert file.inspect("layers.0.value").exact_vectors == kept - 2 * 2  # two of the last sequence are first tokens
    tc.save(cache, path, owner, preset="pq3")
    assert not torch.equal(firsts(tc.load(path, owner).layers[0].keys), firsts(keys))


def test_a_window_keeps_those_that_have_not_left_it(tmp_path: Path) -> None:
    config = transformers.MistralConfig(**TINY, num_hidden_layers=1, sliding_window=16)
    torch.manual_seed(0)
    owner, path, cache = transformers.MistralForCausalLM(config).eval(), tmp_path / "a.pqkv", tc.empty_cache(config)
    cache.update(*with_sinks(), 0)
    tc.save(cache, path, owner, preset="pq3", padding=PADDING)
    mine, other = cache.layers[0].keys, tc.load(path, owner).layers[0].keys
    exact = (mine == other).all(-1).nonzero()
    first = TOKENS - mine.shape[2]  # of the window
    assert {tuple(place) for place in exact.tolist()} == {(2, head, 33 - first + i) for head in (0, 1) for i in range(4)}


def test_padding_that_is_none_is_refused(tmp_path: Path) -> None:
    owner, cache = model(), transformers.DynamicCache()
    cache.update(*with_sinks(), 0)
    for wrong, why in [
        ([1, 2], "2 sequences is told of a cache of 4"),
        ([-1] * 4, "a number of tokens for each"),
        (torch.ones(1, 1, 4, 4), "of two dimensions"),
        ([0.5] * 4, "a number of tokens for each"),
    ]:
        with pytest.raises(InvalidArgument, match=why):
            tc.save(cache, tmp_path / "a.pqkv", owner, padding=wrong)
    with pytest.raises(InvalidArgument, match="told of 3 sequences, and 4 are given"):
        EncodedCache(owner, padding=[1, 2, 3]).update(*with_sinks(), 0)


# -- an encoded cache --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pieces", [[40], [3, 37], [10] * 4, [38, 1, 1]], ids=str)
def test_an_encoded_cache_keeps_the_first_real_tokens(pieces: list[int]) -> None:
    """Also where they are among the last tokens when the prompt is encoded, or come later than that."""
    keys, values = with_sinks()
    layer, at = EncodedCache(model(), padding=mask(), **SMALL).layers[0], 0
    for size in pieces:
        layer.update(keys[:, :, at : at + size], values[:, :, at : at + size])
        at += size
    for step in range(30):
        found = layer.update(*(gaussian(4, 2, 1, 16, seed=10 + step),) * 2)
        assert torch.equal(firsts(found[0]), firsts(keys))
        assert torch.equal(firsts(found[1]), firsts(values))
    assert 0.1 < rel_mse(values[:, :, 8:33], found[1][:, :, 8:33]) < 0.3


def test_sequences_are_reordered_cropped_and_begun_anew() -> None:
    keys, values = with_sinks()
    layer = EncodedCache(model(), padding=PADDING, **SMALL).layers[0]
    rng, one = np.random.default_rng(0), lambda x: torch.zeros(len(x), 2, 1, 16)
    rows = list(range(4))
    layer.update(keys, values)
    for step in range(12):
        if step % 3 == 0:
            order = rng.integers(0, len(rows), 4)
            layer.reorder_cache(torch.tensor(order))
            rows = [rows[i] for i in order]
        if step == 7:
            layer.crop(-(layer.get_seq_length() - 35))  # to the middle of the third one's first tokens
            layer.update(keys[rows][:, :, 35:], values[rows][:, :, 35:])
        found, _ = layer.update(one(rows), one(rows))
        for new, row in enumerate(rows):
            before = PADDING[row]
            assert torch.equal(found[new, :, before : before + 4], keys[row, :, before : before + 4])
    layer.batch_select_indices(torch.tensor([0]))
    layer.reset()
    layer.update(keys, values)
    assert torch.equal(firsts(layer.update(one(PADDING), one(PADDING))[0]), firsts(keys))


def test_padding_of_a_prompt_is_that_of_all_its_beams() -> None:
    """Exact first tokens change little in a random model; what counts here is that nothing but the error changes."""
    owner = model()
    ids = torch.randint(3, 100, (4, TOKENS), generator=torch.Generator().manual_seed(1))
    options = {"attention_mask": mask(), "num_beams": 2, "max_new_tokens": 16, "do_sample": False}
    name = tc.argument_of(owner)
    caches = tc.empty_cache(owner.config), EncodedCache(owner, padding=mask(), **{**SMALL, "preset": "pq6"})
    texts = [owner.generate(ids, **options, **{name: cache}) for cache in caches]
    assert (texts[0] == texts[1]).float().mean() > 0.9
