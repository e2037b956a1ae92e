"""Caches that were kept: what they were begun with goes along, and ``generate`` does not feed them their own text again."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from pqcodec.errors import InvalidArgument
from pqcodec.formats import save_cache
from pqcodec.formats.containers.kinds import convert
from pqcodec.formats.engines import transformers_cache as tc
from pqcodec.formats.store import PrefixStore

transformers = pytest.importorskip("transformers")
from test_transformers_cache import cached, prompt, tiny  # noqa: E402

OTHER = r"goes on from numbers of preset {}, whose errors a store of preset {} would keep as its own"


def saved(cache: Any, path: Path, model: Any, **options: Any) -> Any:
    """What is loaded of a file of a cache."""
    tc.save(cache, path, model, **options)
    return tc.load(path, model)


def put(folder: Path, preset: str, model: Any, ids: torch.Tensor, cache: Any) -> Any:
    with PrefixStore(folder / f"store of {preset}", preset=preset) as store:
        return store.put(model, ids, cache)


@pytest.mark.parametrize("extension", ["pqkv", "safetensors"])
def test_a_cache_of_a_file_is_not_kept_as_more_exact_than_it_is(tmp_path: Path, extension: str) -> None:
    model, ids = tiny("llama"), prompt(300)
    one = saved(cached(model, ids), tmp_path / f"a.{extension}", model, preset="pq2")
    for preset in ("exact", "pq3"):
        for cache in (one, copy.deepcopy(one), tc.load(tmp_path / f"a.{extension}", model.config)):
            with pytest.raises(InvalidArgument, match=OTHER.format("pq2", preset)):
                put(tmp_path, preset, model, ids, cache)
    assert put(tmp_path, "pq2", model, ids, one).tokens == 300
    with torch.no_grad():  # gone on with, it is no better
        model(prompt(4, seed=2), past_key_values=one)
    with pytest.raises(InvalidArgument, match=OTHER.format("pq2", "exact")):
        put(tmp_path, "exact", model, torch.cat([ids, prompt(4, seed=2)], 1), one)
    exact = saved(cached(model, ids), tmp_path / f"b.{extension}", model, preset="exact")
    for preset in ("exact", "pq3"):
        assert put(tmp_path, preset, model, ids, exact).tokens == 300
    with PrefixStore(tmp_path / "store of exact", preset="exact") as store:
        assert put(tmp_path, "pq4", model, ids, store.get(model, ids, leave=0).cache).tokens == 300


def test_losses_go_along_through_files_and_stores(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(300)
    one = saved(cached(model, ids), tmp_path / "a.pqkv", model, preset="pq2")
    kept = saved(one, tmp_path / "b.pqkv", model, preset="exact")
    with pytest.raises(InvalidArgument, match=OTHER.format("pq2", "exact")):
        put(tmp_path, "exact", model, ids, kept)
    both = saved(one, tmp_path / "c.pqkv", model, preset="pq4")
    for preset in ("pq2", "pq4"):
        with pytest.raises(InvalidArgument, match=OTHER.format("pq2 and pq4", preset)):
            put(tmp_path, preset, model, ids, both)
    convert(tmp_path / "b.pqkv", tmp_path / "d.safetensors")
    with pytest.raises(InvalidArgument, match=OTHER.format("pq2", "exact")):
        put(tmp_path, "exact", model, ids, tc.load(tmp_path / "d.safetensors", model))
    with PrefixStore(tmp_path / "of pq3", preset="pq3") as store:
        store.put(model, ids, cached(model, ids))
        found = saved(store.get(model, ids, leave=0).cache, tmp_path / "e.pqkv", model, preset="exact")
    with pytest.raises(InvalidArgument, match=OTHER.format("pq3", "exact")):
        put(tmp_path, "exact", model, ids, found)


def test_a_file_of_an_older_writer_has_lost_something_unknown(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(300)
    cache = cached(model, ids)
    tc.save(cache, tmp_path / "a.pqkv", model)
    told = {tc.KEY: tc.files.cache_metadata(tc.state_of(cache), {})}
    save_cache(tmp_path / "b.pqkv", [(layer.keys, layer.values) for layer in cache.layers], metadata=told)
    for preset in ("exact", "pq3"):
        with pytest.raises(InvalidArgument, match=OTHER.format("unknown", preset)):
            put(tmp_path, preset, model, ids, tc.load(tmp_path / "b.pqkv"))


def test_a_cache_of_a_file_is_of_its_model(tmp_path: Path) -> None:
    model, ids = copy.deepcopy(tiny("llama")), prompt(300)
    one = saved(cached(model, ids), tmp_path / "a.pqkv", model, preset="exact")
    model.model.norm.weight.data.mul_(2)
    with pytest.raises(InvalidArgument, match="the model, or how it is run, has changed since this cache was begun"):
        put(tmp_path, "exact", model, ids, one)
    with pytest.raises(InvalidArgument, match="has changed since this cache was begun"):
        tc.save(one, tmp_path / "b.pqkv", model)


def test_an_encoded_cache_is_not_kept(tmp_path: Path) -> None:
    from pqcodec.formats.offload import EncodedCache

    model, ids = tiny("llama"), prompt(300)
    cache = EncodedCache(model, window=8, chunk=8)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with pytest.raises(InvalidArgument, match="layer 0 is a EncodedLayer, which pqcodec cannot save"):
        put(tmp_path, "exact", model, ids, cache)
    with pytest.raises(InvalidArgument, match="layer 0 is a EncodedLayer, which pqcodec cannot save"):
        tc.save(cache, tmp_path / "a.pqkv", model)


# -- what is fed -------------------------------------------------------------------------------------------------
GREEDY = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3-next", "mamba"])
def test_generate_does_not_feed_a_caches_text_again(tmp_path: Path, kind: str) -> None:
    """Of a store, of a file, copied and pickled; with more tokens, a mask of all, or one by one it goes on."""
    model, ids, more = tiny(kind), prompt(300), prompt(320)
    assert torch.equal(more[:, :300], ids)
    name = tc.argument_of(model)
    with PrefixStore(tmp_path / "store", preset="exact") as store:
        store.put(model, ids, cached(model, ids))
        tc.save(cached(model, ids), tmp_path / "a.pqkv", model, preset="exact")

        def found() -> Any:
            return store.get(model, ids, leave=0, stepwise=True).cache

        ways = {"store": found, "copy": lambda: copy.deepcopy(found()), "pickle": lambda: pickle.loads(pickle.dumps(found()))}
        ways |= {"file": lambda: tc.load(tmp_path / "a.pqkv", model)} if kind != "mamba" else {}
        for way, cache in ways.items():
            for fed in (ids, ids[:, :200]):
                with pytest.raises(InvalidArgument, match=rf"given {fed.shape[1]} tokens and a cache of 300.*PrefixStore\.get"):
                    model.generate(fed, **{name: cache()}, **GREEDY)
            if kind != "mamba":  # which takes no several tokens on top of a cache
                expected, one = model.generate(more, **GREEDY), model.generate(more, **{name: cache()}, **GREEDY)
                torch.testing.assert_close(one.logits[0], expected.logits[0], rtol=1e-3, atol=1e-4, msg=way)
                pieces = model.generate(more, **{name: cache()}, prefill_chunk_size=8, **GREEDY)
                torch.testing.assert_close(pieces.logits[0], expected.logits[0], rtol=1e-3, atol=1e-4, msg=way)
                masked = model.generate(more[:, 300:], attention_mask=torch.ones(1, 320), **{name: cache()}, **GREEDY)
                torch.testing.assert_close(masked.logits[0], expected.logits[0], rtol=1e-3, atol=1e-4, msg=way)


def test_generate_does_not_feed_an_encoded_caches_text_again() -> None:
    from pqcodec.formats.offload import EncodedCache

    model, ids = tiny("llama"), prompt(300)
    cache = EncodedCache(model)
    model.generate(ids, past_key_values=cache, **GREEDY)
    with pytest.raises(InvalidArgument, match="given 300 tokens and a cache of 302"):
        model.generate(ids, past_key_values=cache, **GREEDY)


def test_text_in_embeddings_is_not_fed_again(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(300)
    tc.save(cached(model, ids), tmp_path / "a.pqkv", model, preset="exact")
    embedded = model.get_input_embeddings()(ids).detach()
    with pytest.raises(InvalidArgument, match="given 300 tokens and a cache of 300"):
        model.generate(inputs_embeds=embedded, past_key_values=tc.load(tmp_path / "a.pqkv", model), **GREEDY)
