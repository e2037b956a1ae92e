"""Families of transformers: from a cache that was saved and loaded, a model goes on exactly as from the cache itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, rel_mse

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines import transformers_cache as tc

transformers = pytest.importorskip("transformers")

from pqcodec.formats.offload.encoded_cache import EncodedCache  # noqa: E402

PROMPT = 40  # tokens: more than the windows
COMMON = {**TINY, "num_hidden_layers": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4}
HEADS = {"head_dim": 16}
MIXED = {"layer_types": ["linear_attention", "full_attention"], **HEADS}
LINEAR = {f"linear_{name}": n for name, n in [("num_value_heads", 4), ("key_head_dim", 16), ("value_head_dim", 16)]}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1}
FAMILIES: dict[str, dict[str, Any]] = {  # what a config has beside COMMON
    "GPT2": GPT,
    "GPTBigCode": GPT,
    "CodeGen": {**GPT, "rotary_dim": 8},
    "GPTNeo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 16},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 64},
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Falcon": {},
    "Mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "XGLM": {"d_model": 64, "attention_heads": 4, "num_layers": 2, "ffn_dim": 64},
    "BioGpt": {},
    "Phi": {},
    "Persimmon": {},
    "StableLm": {},
    "Starcoder2": {"sliding_window": 16},
    "Gemma": HEADS,
    "Gemma2": {**HEADS, "sliding_window": 16},
    "VaultGemma": {**HEADS, "sliding_window": 16},
    "Qwen3": HEADS,
    "Qwen2Moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 32},
    "Qwen3Moe": {**EXPERTS, **HEADS, "num_experts": 4},
    "Mixtral": {"num_local_experts": 2},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 16, "num_hidden_layers": 4},
    "Cohere2": {**HEADS, "sliding_window": 16, "num_hidden_layers": 4},
    "Exaone4": {**HEADS, "sliding_window": 16, "num_hidden_layers": 4},
    "Llama4": {
        **HEADS,
        "num_local_experts": 2,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": 16,
        "num_hidden_layers": 4,
    },
    "Glm4": HEADS,
    "Granite": {},
    "Ministral": {**HEADS, "sliding_window": 16},
    "DiffLlama": {},
    "Mamba": {"state_size": 8},
    "FalconMamba": {"state_size": 8},
    "Mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "Jamba": {
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8},
        "use_mamba_kernels": False,
    },
    "Bamba": {**MAMBA, "attn_layer_indices": [1], "mamba_chunk_size": 16},
    "GraniteMoeHybrid": {
        **{**MAMBA, "layer_types": ["mamba", "attention"]},
        **{"num_local_experts": 2, "shared_intermediate_size": 32},
    },
    "NemotronH": {
        **{"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8},
        **{"n_groups": 1, "chunk_size": 16, **HEADS},
    },
    "Qwen3_5": {**MIXED, **LINEAR, "linear_num_key_heads": 2},
    "OlmoHybrid": {**MIXED, **LINEAR, "linear_num_key_heads": 4},
}


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 100, (1, count), generator=torch.Generator().manual_seed(seed))


def lively(model: Any) -> Any:
    """With outputs that depend on what was read."""
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    return model.eval()


@torch.no_grad()
def read(model: Any, cache: Any, **inputs: Any) -> torch.Tensor:
    return model(**inputs, use_cache=True, **{tc.argument_of(model): cache}).logits


def built(family: str) -> Any:
    kind = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config", None)
    made = getattr(transformers, f"{family}ForCausalLM", None) or getattr(transformers, f"{family}LMHeadModel", None)
    if kind is None or made is None:
        pytest.skip("not in this transformers")
    torch.manual_seed(0)
    return lively(made(kind(**COMMON | FAMILIES[family])))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_goes_on_as_from_the_cache_itself(tmp_path: Path, family: str) -> None:
    model, path = built(family), tmp_path / "a.pqkv"
    cache = tc.empty_cache(model.config)
    read(model, cache, input_ids=tokens(PROMPT, 0))
    tc.save(cache, path, model, preset="exact")
    for more in (1, 5):  # one token, and several at once
        mine, loaded = copy.deepcopy(cache), tc.load(path, model)
        for ids in (tokens(more, 1), tokens(2, 2)):
            assert rel_mse(read(model, mine, input_ids=ids), read(model, loaded, input_ids=ids)) < 1e-8


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoded_cache_is_read_as_a_dynamic_one(lossless: None, family: str) -> None:
    model, found = built(family), []
    encoded = EncodedCache(model, window=4, chunk=8, exact_tokens=2)
    for cache in (tc.empty_cache(model.config), encoded):
        pieces = [tokens(count, seed) for seed, count in enumerate([PROMPT, *[1] * 13, 5, 1, 1])]
        found.append(torch.cat([read(model, cache, input_ids=ids) for ids in pieces], 1))
    assert rel_mse(*found) < 1e-9
    assert all(layer.encoded_bytes for layer in encoded.encoded_layers)


SEQ2SEQ = {
    "T5": {"d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "Bart": {
        **{"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 128},
    },
}
SEQ2SEQ |= {
    "Whisper": {**SEQ2SEQ["Bart"], "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 128},
    "Pegasus": SEQ2SEQ["Bart"],
}


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_an_encoder_and_a_decoder_go_on(tmp_path: Path, family: str) -> None:
    marks = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = getattr(transformers, f"{family}Config")(**marks, **SEQ2SEQ[family])
    torch.manual_seed(0)
    model, path = lively(getattr(transformers, f"{family}ForConditionalGeneration")(config)), tmp_path / "a.pqkv"
    source = torch.randn(1, 8, 64) if family == "Whisper" else tokens(30, 3)
    with torch.no_grad():
        encoded = model.get_encoder()(source)
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    read(model, cache, encoder_outputs=encoded, decoder_input_ids=tokens(20, 0))
    tc.save(cache, path, model, preset="exact")
    for more in (1, 5):
        mine, loaded = copy.deepcopy(cache), tc.load(path, model)
        for ids in (tokens(more, 1), tokens(2, 2)):
            expected, found = (read(model, c, encoder_outputs=encoded, decoder_input_ids=ids) for c in (mine, loaded))
            assert rel_mse(expected, found) < 1e-8


def test_a_cache_that_holds_more_than_its_layers_is_refused(tmp_path: Path) -> None:
    sizes = {**HEADS, "num_local_experts": 2, "block_size": 16, "layer_types": ["full_attention", "linear_attention"]}
    model = transformers.MiniMaxForCausalLM(transformers.MiniMaxConfig(**COMMON, **sizes)).eval()
    with torch.no_grad():
        told = model(input_ids=tokens(PROMPT, 0), use_cache=True)
    cache = getattr(told, tc.argument_of(model))
    with pytest.raises(InvalidArgument, match=r"cache is a MiniMaxCache, which holds more than its layers \(linear_cache\)"):
        tc.save(cache, tmp_path / "a.pqkv", model)


# -- modes of torch ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", ["Gemma2", "Mamba2", "Qwen3_5"])
@pytest.mark.parametrize("preset", ["exact", "pq6"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_cache_is_loaded_in_one_mode_and_read_in_another(tmp_path: Path, family: str, preset: str, inside: bool) -> None:
    """Layers change their state in place, which torch refuses for tensors of inference mode outside of it."""
    model = built(family)
    cache, path = tc.empty_cache(model.config), tmp_path / "a.pqkv"
    with torch.inference_mode(inside):
        read(model, cache, input_ids=tokens(PROMPT, 0))
        tc.save(cache, path, model, preset=preset)
        loaded = tc.load(path, model)
    expected = [read(model, c, input_ids=tokens(1, seed)) for c in [tc.load(path, model)] for seed in (1, 2)]
    with torch.inference_mode(not inside):
        assert all(torch.equal(x, read(model, loaded, input_ids=tokens(1, 1 + i))) for i, x in enumerate(expected))


def test_a_file_of_autocast_goes_on_under_autocast(tmp_path: Path) -> None:
    """Its values are bfloat16 and its keys float32; both come back as they are."""
    torch.manual_seed(0)
    model, path = lively(transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))), tmp_path / "a.pqkv"
    cache = tc.empty_cache(model.config)
    with torch.autocast("cpu", torch.bfloat16):
        read(model, cache, input_ids=tokens(PROMPT, 0))
        tc.save(cache, path, model, preset="exact")
        loaded = tc.load(path, model)
        assert [(x.keys.dtype, x.values.dtype) for x in loaded.layers] == [(x.keys.dtype, x.values.dtype) for x in cache.layers]
        assert torch.equal(*(read(model, c, input_ids=tokens(3, 1)) for c in (cache, loaded)))
