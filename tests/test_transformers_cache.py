"""Caches of transformers: whatever a layer holds comes back, the model reads on, and nothing is taken for what it is not."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, gaussian, rel_mse

from pqcodec.errors import CorruptStream, InvalidArgument, PQError, UnsupportedStream
from pqcodec.formats import PQKVFile, load_cache, save_cache
from pqcodec.formats.engines import transformers_cache as tc
from pqcodec.formats.policy import rates
from pqcodec.formats.policy.recipe import EXACT_TOKENS

transformers = pytest.importorskip("transformers")
cache_utils = transformers.cache_utils

PROMPT, MORE = 40, 5  # tokens that are cached, and tokens read on from there
WINDOW = 16
COMMON = {**TINY, "num_hidden_layers": 2}
MIXED = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    **EXPERTS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LINEAR = {f"linear_{name}": size for name, size in [("num_value_heads", 4), ("num_key_heads", 2), ("key_head_dim", 16)]}
SHARED_KV = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": MIXED * 2,
    "sliding_window": WINDOW,
    "head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 100,
}


def scaled(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **parameters}}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # a model's class, and what its config has beside COMMON
    "llama": ("Llama", {}),
    "llama, one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama, llama3": (
        "Llama",
        scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama, yarn": ("Llama", scaled("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama, linear": ("Llama", scaled("linear", factor=3.0)),
    "llama, dynamic": ("Llama", scaled("dynamic", factor=2.0)),
    "phi3, longrope": (
        "Phi3",
        {
            **scaled("longrope", short_factor=[1.0, 1.5] * 4, long_factor=[2.0, 4.0] * 4, original_max_position_embeddings=64),
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": ("Qwen2", {}),
    "mistral": ("Mistral", {"sliding_window": WINDOW}),
    "mistral, long window": ("Mistral", {"sliding_window": 64}),
    "gemma3": ("Gemma3", {"num_hidden_layers": 3, "layer_types": [*MIXED, MIXED[0]], "sliding_window": WINDOW, "head_dim": 16}),
    "gpt-oss": (
        "GptOss",
        {"layer_types": MIXED, "sliding_window": WINDOW, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.5}),
    "cohere": ("Cohere", {}),
    "glm": ("Glm", {"head_dim": 16}),
    "gpt-j": ("GPTJ", {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "mamba": ("Mamba", {"state_size": 8}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "qwen3-next": (
        "Qwen3Next",
        {
            **LINEAR,
            **EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "falcon-h1": (
        "FalconH1",
        {"head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8},
    ),
    "deepseek-v3": ("DeepseekV3", LATENT),
    "deepseek-v3.2": ("DeepseekV32", {**LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 16}),
    "gemma3n": (
        "Gemma3n",
        {
            **SHARED_KV,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "intermediate_size": [64] * 4,
        },
    ),
    "gemma4": ("Gemma4", {**SHARED_KV, "global_head_dim": 32}),
}


@functools.lru_cache
def _made(kind: str, seed: int, dtype: torch.dtype) -> Any:
    name, options = MODELS[kind]
    config = (getattr(transformers, f"{name}TextConfig", None) or getattr(transformers, f"{name}Config"))(**COMMON | options)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().to(dtype)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def tiny(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A model with random weights; tests that change one take ``copy.deepcopy`` of it."""
    return _made(kind, seed, dtype)


def prompt(tokens: int, seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(3, 100, (batch, tokens)))


def read(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits of tokens behind a cache, which they are added to."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, **{tc.argument_of(model): cache}).logits


def cached(model: Any, ids: torch.Tensor) -> Any:
    cache = tc.empty_cache(model.config)
    read(model, ids, cache)
    return cache


def layers(cache: Any) -> Iterator[tuple[str, tc.LayerState]]:
    return ((prefix, layer) for prefix, _, layer in tc.state_of(cache).layers())


def check_same(cache: Any, again: Any, most: float = 0.002) -> None:
    """What is exact is so bit for bit, keys and values but for ``most``."""
    before, after = dict(layers(cache)), dict(layers(again))
    assert [*before] == [*after]
    for name, layer in before.items():
        other = after[name]
        assert (layer.kind, dict(layer.fields), [*layer.tensors]) == (other.kind, dict(other.fields), [*other.tensors]), name
        for path, x in layer.tensors.items():
            y = other.tensors[path]
            assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device), (name, path)
            if path in ("keys", "values"):
                first = max(EXACT_TOKENS - (layer.tokens - layer.kept), 0)
                assert torch.equal(x[..., :first, :], y[..., :first, :]), (name, path, "first tokens")
                assert rel_mse(x, y) < most, (name, path)
            else:
                assert torch.equal(x, y), (name, path)


# -- every kind of cache -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_reads_on_from_a_cache_that_was_saved(tmp_path: Path, kind: str) -> None:
    model, path = tiny(kind), tmp_path / "a.pqkv"
    cache = cached(model, prompt(PROMPT))
    tc.save(cache, path, model, preset="pq6")
    again = tc.load(path, model)
    assert isinstance(again, type(cache))
    assert [type(layer) for layer in again.layers] == [type(layer) for layer in cache.layers]
    check_same(cache, again)
    twin = copy.deepcopy(cache)  # with the decoded keys and values in the place of its own
    for mine, other in zip(twin.layers, again.layers, strict=True):
        if getattr(other, "keys", None) is not None:
            mine.keys, mine.values = other.keys, other.values
    for step in range(2):  # the second step reads what the first one has added
        expected, same, found = (read(model, prompt(MORE, seed=1 + step), each) for each in (cache, twin, again))
        assert torch.equal(same, found)
        assert rel_mse(expected, found) < (0.1 if kind in ("gemma3n", "gemma4") else 0.005)  # their queries are not scaled


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen3-next", "falcon-h1", "mamba", "deepseek-v3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = tiny(kind, dtype=dtype)
    cache = cached(model, prompt(PROMPT))
    tc.save(cache, tmp_path / "a.pqkv", model, preset="pq6")
    again = tc.load(tmp_path / "a.pqkv", model)
    check_same(cache, again)
    expected, found = (read(model, prompt(MORE, seed=1), each) for each in (cache, again))
    assert rel_mse(expected, found) < 0.005


@pytest.mark.parametrize("kind", ["llama", "gemma3", "lfm2", "deepseek-v3.2"])
@pytest.mark.parametrize("extension", ["pqkv", "safetensors", "zarr"])
def test_batches_in_every_container(tmp_path: Path, kind: str, extension: str) -> None:
    if extension != "pqkv":
        pytest.importorskip(extension)
    model, path = tiny(kind), tmp_path / f"a.{extension}"
    cache = cached(model, prompt(PROMPT, batch=2))
    assert tc.save(cache, path, model, preset="pq6", metadata={"mine": 1}) > 0
    again = tc.load(path, model)
    check_same(cache, again)
    expected, found = (read(model, prompt(MORE, seed=1, batch=2), each) for each in (cache, again))
    assert rel_mse(expected, found) < 0.005


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba", "falcon-h1", "gemma3n"])
def test_a_cache_that_has_seen_nothing(tmp_path: Path, kind: str) -> None:
    model, path = tiny(kind), tmp_path / "a.pqkv"
    tc.save(tc.empty_cache(model.config), path, model)
    again, new = tc.load(path, model), tc.empty_cache(model.config)
    check_same(new, again)
    assert torch.equal(read(model, prompt(MORE), again), read(model, prompt(MORE), new))


@pytest.mark.parametrize("tokens", [1, 2, 3, EXACT_TOKENS])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "lfm2", "falcon-h1"])
def test_a_cache_of_few_tokens_is_exact(tmp_path: Path, kind: str, tokens: int) -> None:
    model, path = tiny(kind), tmp_path / "a.pqkv"
    cache = cached(model, prompt(tokens))
    tc.save(cache, path, model, preset="pq2")
    again = tc.load(path, model)
    check_same(cache, again, most=1e-30)
    assert torch.equal(read(model, prompt(MORE, seed=1), cache), read(model, prompt(MORE, seed=1), again))


def test_a_cache_without_a_config_grows_layers_as_before(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "a.pqkv"
    tc.save(transformers.DynamicCache(), path, model)
    again = tc.load(path, model)
    assert len(again.layers) == 0
    read(model, prompt(MORE), again)
    assert again.get_seq_length() == MORE


@pytest.mark.parametrize("tokens", [WINDOW - 2, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, 3 * WINDOW])
def test_tokens_that_left_a_window_are_counted(tmp_path: Path, tokens: int) -> None:
    """Without ``cumulative_length`` a window's positions and mask would begin anew, and logits would be off."""
    model, path = tiny("mistral"), tmp_path / "a.pqkv"
    cache = cached(model, prompt(tokens))
    tc.save(cache, path, model, preset="pq6")
    again = tc.load(path, model)
    check_same(cache, again)
    assert {layer.cumulative_length for layer in again.layers} == {tokens}
    expected, found = (read(model, prompt(3, seed=1), each) for each in (cache, again))
    assert rel_mse(expected, found) < 0.002


@pytest.mark.parametrize("kind", ["gemma3", "mamba", "falcon-h1"])
def test_greedy_text_goes_on(tmp_path: Path, kind: str) -> None:
    """``generate`` takes the cache, and what it writes from few exact tokens is what it would have written."""
    model, path, ids = tiny(kind), tmp_path / "a.pqkv", prompt(EXACT_TOKENS)
    expected = model.generate(ids, do_sample=False, max_new_tokens=10)
    tc.save(cached(model, ids[:, :-1]), path, model, preset="pq6")
    if kind == "mamba":  # whose states do not tell how many tokens they have seen
        with pytest.raises(InvalidArgument, match="generate would feed the prompt again"):
            model.generate(ids, **{tc.argument_of(model): tc.load(path, model)})
        return
    found = model.generate(ids, do_sample=False, max_new_tokens=10, **{tc.argument_of(model): tc.load(path, model)})
    assert torch.equal(expected, found)


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=100, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model, path = transformers.T5ForConditionalGeneration(config).eval(), tmp_path / "a.pqkv"
    encoded = model.encoder(prompt(30))
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())

    def step(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        options = {tc.argument_of(model): cache}
        with torch.no_grad():
            return model(encoder_outputs=encoded, decoder_input_ids=ids, use_cache=True, **options).logits

    tc.save(cache, path, model)
    assert torch.equal(step(prompt(3), tc.load(path, model)), step(prompt(3), cache))
    step(prompt(12, seed=1), cache)
    tc.save(cache, path, model, preset="pq6")
    again = tc.load(path, model)
    assert again.is_updated == cache.is_updated
    assert again.get_seq_length() == 15
    check_same(cache, again)
    assert rel_mse(step(prompt(4, seed=2), cache), step(prompt(4, seed=2), again)) < 0.002


def test_layers_may_have_heads_of_their_own_size(tmp_path: Path) -> None:
    model, path, cache = tiny("llama"), tmp_path / "a.pqkv", transformers.DynamicCache()
    for index, (heads, key, value) in enumerate([(2, 16, 16), (1, 32, 32), (4, 80, 48), (1, 1, 3)]):
        cache.update(gaussian(1, heads, 20, key, seed=index), gaussian(1, heads, 20, value, seed=9 + index), index)
    tc.save(cache, path, model, preset="pq6")
    check_same(cache, tc.load(path, model))


def test_states_beyond_the_first_of_a_layer(tmp_path: Path) -> None:
    """A layer may hold several conv and recurrent states, some of which are not there yet."""
    layer = cache_utils.LinearAttentionLayer(number_of_states=3)
    cache = transformers.DynamicCache()
    cache.layers = [layer]
    layer.update_conv_state(gaussian(1, 8, 4), state_idx=0)
    layer.update_recurrent_state(gaussian(1, 4, 8, 8, seed=1), state_idx=2)
    tc.save(cache, tmp_path / "a.pqkv", tiny("mamba"))
    again = tc.load(tmp_path / "a.pqkv").layers[0]
    check_same(cache, tc.load(tmp_path / "a.pqkv"))
    assert again.conv_states[1] is None
    assert torch.equal(again.conv_states[0], layer.conv_states[0])
    assert torch.equal(again.recurrent_states[2], layer.recurrent_states[2])
    again.update_conv_state(gaussian(1, 8, 1), state_idx=0)
    assert again.device == layer.device


def test_frozen_states_stay_as_they_were() -> None:
    """What a model changes in place is copied before it is saved in the background."""
    for kind in ("mamba", "falcon-h1", "gemma3"):
        cache = cached(tiny(kind), prompt(PROMPT))
        state = tc.frozen(tc.state_of(cache))
        before = copy.deepcopy(state)
        read(tiny(kind), prompt(MORE, seed=1), cache)
        for (_, _, a), (_, _, b) in zip(state.layers(), before.layers(), strict=True):
            assert all(torch.equal(a.tensors[path], b.tensors[path]) for path in b.tensors)
            assert a.fields == b.fields


# -- RoPE --------------------------------------------------------------------------------------------------------
def biased(kind: str) -> Any:
    """A model whose keys have a large mean before RoPE, as those of real models do."""
    model = copy.deepcopy(tiny(kind))
    generator = torch.Generator().manual_seed(5)
    for name, module in model.named_modules():
        width = getattr(module, "out_features", 0)
        first, last = {
            "k_proj": (0, width),
            "query_key_value": (0, width),  # GPT-NeoX: of each head its query, key and value
            "qkv_proj": (64, 96),  # Phi-3: four heads of queries, two of keys
            "kv_a_proj_with_mqa": (width - 8, width),  # DeepSeek: the latent, then the rotary key
        }.get(name.rpartition(".")[2], (0, 0))
        if last:
            bias = torch.zeros(width)
            bias[first:last] = 5 * torch.randn(last - first, generator=generator)
            module.bias = torch.nn.Parameter(bias)
    return model


def model_frequencies(model: Any, index: int) -> torch.Tensor:
    """The inv_freq that a layer's keys go through, from the model's own buffers."""
    types = getattr(model.config, "layer_types", None)
    buffers = {name.rpartition(".")[2]: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    return buffers[f"{types[index]}_inv_freq"] if types and f"{types[index]}_inv_freq" in buffers else buffers["inv_freq"]


PAIRED = {
    **dict.fromkeys([kind for kind in MODELS if kind.startswith(("llama", "mistral"))], "half"),
    **dict.fromkeys(["phi3, longrope", "qwen2", "gemma3", "gpt-oss", "gpt-neox", "smollm3", "lfm2", "qwen3-next"], "half"),
    **dict.fromkeys(["falcon-h1", "gemma3n", "gemma4", "deepseek-v3"], "half"),  # DeepSeek's code brings pairs into halves
    **dict.fromkeys(["cohere", "glm"], "interleaved"),
}
WITHOUT = {"smollm3": {1}, "lfm2": {0}, "qwen3-next": {0}, "gemma3n": {2, 3}, "gemma4": {2, 3}}  # layers without RoPE


@pytest.mark.parametrize("kind", PAIRED)
def test_the_pairing_of_keys_is_found(kind: str) -> None:
    model = biased(kind)
    state = tc.state_of(cached(model, prompt(60)))
    tensor = "values" if kind == "deepseek-v3" else "keys"
    turning = set(range(model.config.num_hidden_layers)) - WITHOUT.get(kind, set())
    assert tc.pairings(model.config, state) == {f"layers.{index}.{tensor}": PAIRED[kind] for index in sorted(turning)}


@pytest.mark.parametrize("kind", PAIRED)
def test_frequencies_are_the_models_own(kind: str) -> None:
    model = tiny(kind)
    for index in range(model.config.num_hidden_layers):
        found = tc.frequencies(model.config, index)
        assert found is not None
        expected = model_frequencies(model, index).double().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


def test_layers_may_have_a_theta_of_their_own() -> None:
    config = tiny("gemma3").config
    thetas = [config.rope_parameters[kind]["rope_theta"] for kind in config.layer_types]
    assert thetas[0] != thetas[1]
    for index, theta in enumerate(thetas):
        np.testing.assert_allclose(tc.frequencies(config, index), [theta ** (-i / 8) for i in range(8)], rtol=1e-12)


@pytest.mark.parametrize("kind", ["mamba"])
def test_no_rope_is_found_where_there_is_none(kind: str) -> None:
    model = tiny(kind)
    assert tc.frequencies(model.config, 0) is None
    assert tc.pairings(model.config, tc.state_of(cached(model, prompt(60)))) == {}


@pytest.mark.parametrize("kind", ["qwen2", "cohere", "deepseek-v3", "mistral"])
def test_centring_under_rope_is_what_the_bits_are_spent_on(tmp_path: Path, kind: str) -> None:
    """Keys with a large mean are no worse than keys without one: the error is measured against what varies."""
    model, path = biased(kind), tmp_path / "a.pqkv"
    cache = cached(model, prompt(120))
    tc.save(cache, path, model, preset="pq3")
    tensor = "value" if kind == "deepseek-v3" else "key"
    with PQKVFile(path) as file:
        headers = [file.inspect(f"layers.{index}.{tensor}") for index in range(2)]
        assert [header.centered for header in headers] == ["rope", "rope"]
        for index in range(2):
            x = getattr(cache.layers[index], f"{tensor}s")
            y = file.decode(f"layers.{index}.{tensor}", device="cpu")
            assert rel_mse(x, y) < 0.004  # a third of what pq3 leaves of a tensor that is not centred, or much less


def test_the_longest_prefix_whose_keys_stay() -> None:
    assert tc.longest_prefix(tiny("llama").config) is None
    assert tc.longest_prefix(tiny("llama, yarn").config) is None
    assert tc.longest_prefix(tiny("gemma3").config) is None
    assert tc.longest_prefix(tiny("mamba").config) is None
    assert tc.longest_prefix(tiny("phi3, longrope").config) == 64
    assert tc.longest_prefix(tiny("llama, dynamic").config) == 1024


# -- what is refused ---------------------------------------------------------------------------------------------
class OwnLayer(cache_utils.DynamicLayer):
    """A layer of somebody's own."""


class QuantoQuantizedLayer(cache_utils.DynamicLayer):
    """Has the name of a quantised layer of transformers."""


Impostor = type("DynamicLayer", (cache_utils.DynamicLayer,), {})


@pytest.mark.parametrize("layer", [OwnLayer, QuantoQuantizedLayer, Impostor])
def test_other_layers_are_refused_by_name(tmp_path: Path, layer: type) -> None:
    model, path = tiny("llama"), tmp_path / "a.pqkv"
    cache = cached(model, prompt(8))
    cache.layers[1] = layer()
    with pytest.raises(InvalidArgument, match=rf"cache, layer 1 is a {layer.__name__}, which pqcodec cannot save"):
        tc.save(cache, path, model)
    assert not list(tmp_path.iterdir())


def test_other_caches_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny("llama")
    static = transformers.StaticCache(config=model.config, max_cache_len=16)
    read(model, prompt(4), static)
    with pytest.raises(InvalidArgument, match="layer 0 is a StaticLayer"):
        tc.save(static, tmp_path / "a.pqkv", model)
    with pytest.raises(InvalidArgument, match="a Cache of transformers is expected, not tuple"):
        tc.save(((torch.zeros(1, 1, 1, 16),) * 2,), tmp_path / "a.pqkv", model)
    both = transformers.EncoderDecoderCache(transformers.DynamicCache(), static)
    with pytest.raises(InvalidArgument, match="cross_attention_cache, layer 0 is a StaticLayer"):
        tc.save(both, tmp_path / "a.pqkv", model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [object(), [1, 2], (1,), {"a": [1]}, np.zeros(3), b"raw", 1j], ids=lambda x: type(x).__name__)
def test_attributes_that_would_be_lost_are_refused_by_name(tmp_path: Path, value: Any) -> None:
    model = tiny("llama")
    cache = cached(model, prompt(8))
    cache.layers[1].extra = value
    with pytest.raises(InvalidArgument, match=r"layer 1 \(DynamicLayer\) holds extra.* which pqcodec cannot save; it would be"):
        tc.save(cache, tmp_path / "a.pqkv", model)
    assert not list(tmp_path.iterdir())


def test_an_attribute_that_this_transformers_does_not_know(tmp_path: Path) -> None:
    """As one of a newer version would be: saved, and refused where the layer has no such thing."""
    model, path = tiny("llama"), tmp_path / "a.pqkv"
    cache = cached(model, prompt(8))
    cache.layers[0].of_the_future = 7
    tc.save(cache, path, model)
    with pytest.raises(UnsupportedStream, match=r"layer 0 \(DynamicLayer\): this transformers' layer has no 'of_the_future'"):
        tc.load(path, model)


def test_another_model_is_refused(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "a.pqkv"
    cache = cached(model, prompt(8))
    tc.save(cache, path, model)
    for other, what in [
        (tiny("llama", seed=1), "weights"),
        (tiny("llama, linear"), "config"),
        (tiny("qwen2"), "config and weights"),
        (tiny("llama", dtype=torch.bfloat16), "weights and dtype and state"),  # frequencies are rounded, too
        (tiny("qwen2").config, "config"),
    ]:
        with pytest.raises(InvalidArgument, match=f"of a model of other {what}; compute it anew"):
            tc.load(path, other)
    check_same(cache, tc.load(path, model.config), 0.1)
    check_same(cache, tc.load(path), 0.1)
    tc.save(cache, path, model.config)  # a config alone says nothing of the weights
    check_same(cache, tc.load(path, tiny("llama", seed=1)), 0.1)
    with pytest.raises(InvalidArgument, match="of other config"):
        tc.load(path, tiny("qwen2"))
    with pytest.raises(InvalidArgument, match="a transformers model or its config is expected, not str"):
        tc.save(cache, path, "llama")


def test_a_file_that_holds_no_cache_of_transformers(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "a.pqkv"
    pair = (gaussian(1, 2, 8, 16), gaussian(1, 2, 8, 16, seed=1))
    save_cache(path, [pair])
    with pytest.raises(InvalidArgument, match=r"is the cache of a model of other model|holds no cache"):
        tc.load(path, model)
    with pytest.raises(InvalidArgument, match="holds no cache of transformers; use load_cache"):
        tc.load(path)
    tc.save(cached(model, prompt(8)), path, model)
    assert len(load_cache(path)) == 2  # and the other way about it is a file like any other


LAYER = {"class": "DynamicLayer", "fields": {"is_initialized": True}, "tensors": ["keys", "values"]}
WINDOWED = {"class": "DynamicSlidingWindowLayer", "fields": {}, "tensors": []}


def told(*of: Any, **changes: Any) -> dict[str, Any]:
    return {"format": 1, "class": "DynamicCache", "parts": {"": [*of]}, **changes}


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        (told(LAYER), None),
        (told(LAYER, format=3), UnsupportedStream),
        (told(LAYER, format=True), UnsupportedStream),
        (told(LAYER, format=1.0), UnsupportedStream),
        (told({**LAYER, "class": "os.system"}), UnsupportedStream),
        (told({**LAYER, "class": "StaticLayer"}), UnsupportedStream),
        (told({**LAYER, "fields": {"later": 1}}), UnsupportedStream),
        (told(WINDOWED), UnsupportedStream),  # a window without its size
        ({"format": 1}, CorruptStream),
        (told(LAYER, parts=[]), CorruptStream),
        (told(LAYER, parts={"": 7}), CorruptStream),
        (told(LAYER, parts={"a": []}), CorruptStream),
        (told("layer"), CorruptStream),
        (told({**LAYER, "tensors": None}), CorruptStream),
        (told({**LAYER, "fields": []}), CorruptStream),
        (told({**LAYER, "fields": {"keys.x": 1}}), CorruptStream),
        (told({**LAYER, "fields": {"is_initialized.0": 1}}), CorruptStream),
        (told(LAYER, LAYER), PQError),  # tensors that are not there
    ],
)
def test_metadata_that_describe_no_cache(tmp_path: Path, metadata: dict[str, Any], error: type[Exception] | None) -> None:
    """Written by somebody else's program: an error of pqcodec says so, never one of Python's."""
    path = tmp_path / "a.pqkv"
    save_cache(path, [(gaussian(1, 2, 8, 16), gaussian(1, 2, 8, 16, seed=1))], metadata={tc.KEY: metadata})
    if error is None:
        assert tc.load(path).get_seq_length() == 8
        return
    with pytest.raises(error):
        tc.load(path)


@pytest.mark.parametrize("kind", ["gemma3", "mamba"])
def test_damage_is_an_error(tmp_path: Path, kind: str) -> None:
    model, path, rng = tiny(kind), tmp_path / "a.pqkv", np.random.default_rng(0)
    cache = cached(model, prompt(PROMPT))
    tc.save(cache, path, model, preset="pq6")
    data = path.read_bytes()
    for size in [0, 1, *rng.integers(0, len(data), 40), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(PQError):
            tc.load(path, model)
    harmless = 0
    for at in rng.integers(0, len(data), 60):
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            check_same(cache, tc.load(path, model))  # only where what was hit is not the cache's, such as padding
            harmless += 1
        except PQError:
            pass
    assert harmless <= 6


def test_nan_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    model = tiny("llama")
    cache = cached(model, prompt(PROMPT))
    cache.layers[1].keys[0, 1, 30, 3] = float("nan")
    with pytest.raises(PQError, match=r"layers\.1\.key"):
        tc.save(cache, tmp_path / "a.pqkv", model)
    assert not list(tmp_path.iterdir())


# -- what belongs to code, not to a cache ------------------------------------------------------------------------
def test_frequencies_that_are_in_the_code() -> None:
    """GPT-J's config tells how many channels turn, no theta: one token again and again has one key, turned by its place."""
    model = tiny("gpt-j")
    keys = cached(model, torch.full((1, 60), 7)).layers[0].keys
    turned = tc.rope_of(model.config, 0, keys.shape[-1], "interleaved")
    assert rates.energy(keys, rope=turned) < 1e-6 * rates.energy(keys)


def test_a_model_that_keeps_state_outside_its_cache_is_refused(tmp_path: Path) -> None:
    config = transformers.RecurrentGemmaConfig()
    with pytest.raises(InvalidArgument, match="recurrent_gemma keeps recurrent state in its modules"):
        tc.save(transformers.DynamicCache(), tmp_path / "a.pqkv", config)
