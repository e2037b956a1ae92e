"""Tiny models of every family of causal language models that this transformers has, made from their default configs.

``build`` shrinks a config by the names that configs give their sizes, so that no family has to be named here; what cannot be
shrunk or built so is left out (``python -m tests.families`` lists it).
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
LARGEST = 20_000_000  # parameters of a model that is still tiny
SECONDS = 60  # that a model may take to be built
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "mamba_d_ssm"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 512),
    **dict.fromkeys(("head_dim", "mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("v_head_dim", "qk_nope_head_dim", "window_size", "sliding_window", "chunk_size"), 16),
    **dict.fromkeys(("rotary_dim", "mamba_d_state", "state_size", "ssm_state_size", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "laurel_rank"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "kv_lora_rank", "q_lora_rank"), 32),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset", "bos_token_id"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 120),
    "attention_types": [[["global", "local"], 1]],
    "hidden_size_per_layer_input": 8,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_scaling": None,
    "is_decoder": True,
}
OWN: dict[str, dict[str, Any]] = {  # of families whose sizes have to fit each other
    "mamba2": {"num_heads": 8},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64},
}


class CannotBuild(Exception):
    """This family has no tiny model here."""


@lru_cache(maxsize=4)
def build(family: str, seed: int = 0) -> Any:
    """A model of a family with random weights, matrices four times as large as usual so that outputs tell cases apart."""
    try:
        with _at_most(SECONDS):
            config = _small_config(family)
            kind = _class_of(family, type(config))
            with torch.device("meta"):
                parameters = sum(p.numel() for p in kind(config).parameters())
            if parameters > LARGEST:
                raise CannotBuild(f"{family}: {parameters} parameters")
            torch.manual_seed(seed)
            model = kind(config).eval()
    except CannotBuild:
        raise
    except Exception as error:  # of any kind: it is the family's code that runs
        raise CannotBuild(f"{family}: {error!r:.200}") from error
    return distinct(model)


def distinct(model: Any) -> Any:
    """The model itself, its matrices four times as large, which no token ends."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def _small_config(family: str) -> Any:
    default = CONFIG_MAPPING[family]()
    text = default.get_text_config(decoder=True)
    kind, default = (type(text), type(text)()) if text is not default else (type(default), default)
    known = {*default.to_dict(), *kind.attribute_map}
    sizes = {name: value for name, value in SMALL.items() if name in known}
    if "kv_lora_rank" in sizes:  # latent attention has as many heads of keys, and tells their size in parts
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
        sizes.pop("head_dim", None)
    sizes |= OWN.get(family, {})
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or []))
    if kinds:
        kinds = kinds if len(kinds) > 1 else 2 * kinds
        try:
            return kind(**{**sizes, "layer_types": kinds, "num_hidden_layers": len(kinds)})
        except AttributeError:  # they follow from other settings
            pass
    return kind(**sizes)


def _class_of(family: str, config: type) -> Any:
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    model = getattr(transformers, names if isinstance(names, str) else names[0])
    if model.config_class is config:
        return model
    others = (getattr(transformers, name) for name in dir(transformers) if name.endswith("ForCausalLM"))
    return next((other for other in others if getattr(other, "config_class", None) is config), model)


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise CannotBuild(f"not built in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    for name in FAMILIES:
        try:
            print(f"{name}: {type(build(name)).__name__}")
        except CannotBuild as error:
            print(f"not built: {error}")
