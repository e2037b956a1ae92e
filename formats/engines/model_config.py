"""Law: what a model's config.json says of its attention: the size of a head, the number of KV heads, and RoPE.

It is read without transformers. How a model's code pairs channels is not in the config but follows from ``model_type``; a type
that is not listed here is refused, as is a RoPE that differs between layers or changes with the length of a text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.plain.documents import natural
from pqcodec.stages.centre import Rope

_HALF = "gemma gemma2 gpt_oss granite llama mistral mixtral olmo olmo2 phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss starcoder2"
_INTERLEAVED = "cohere deepseek_v2 deepseek_v3 glm glm4"
_STYLES = {name: "half" for name in _HALF.split()} | {name: "interleaved" for name in _INTERLEAVED.split()}
_SAY = "say what RoPE it has, as 'rope' (an object of theta, dim, style, frequencies; or \"none\")"


def read_config(path: str | Path) -> dict[str, Any]:
    """The object in a config.json, or in that of a folder; of a model with a text part, the part's. Raises InvalidArgument."""
    try:
        file = Path(path)
        config = json.loads((file / "config.json" if file.is_dir() else file).read_bytes())
    except (OSError, TypeError, ValueError, RecursionError) as error:
        wanted = "the path of a model's config.json, or of its folder, is expected"
        raise InvalidArgument(f"model {str(path)!r}: {error}; {wanted}") from None
    if not isinstance(config, dict):
        raise InvalidArgument(f"model {str(path)!r}: config.json holds a {type(config).__name__}; an object is expected")
    text = config.get("text_config", config)
    return text if isinstance(text, dict) else config


def heads_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Coordinates of a head and the number of KV heads, before they are spread over ranks. Raises InvalidArgument.

    >>> heads_of({"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3})
    (64, 3)
    """
    if config.get("kv_lora_rank"):
        raise InvalidArgument("the model has latent attention (kv_lora_rank): its cache holds no keys and values of heads")
    heads = config.get("num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim")
    if head_dim is None and natural(config.get("hidden_size")) and natural(heads) and heads:
        head_dim = config["hidden_size"] // heads
    if not (natural(head_dim) and natural(kv_heads) and head_dim and kv_heads):
        raise InvalidArgument("config.json does not say head_dim and num_key_value_heads; give 'head_dim' and 'kv_heads'")
    return head_dim, kv_heads


def latent_of(config: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Numbers of a token's rotary key, how many it has (1), and numbers of its latent, if the model has latent attention.

    Raises InvalidArgument.

    >>> latent_of({"kv_lora_rank": 512, "qk_rope_head_dim": 64})
    (64, 1, 512)
    """
    rank, rotary = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if not rank:
        return None
    if not (natural(rank) and natural(rotary) and rotary):
        raise InvalidArgument(
            f"config.json says kv_lora_rank {rank!r} and qk_rope_head_dim {rotary!r}; two whole numbers are expected"
        )
    return rotary, 1, rank


def config_rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """The RoPE of a model's keys, from position 0 on. Raises InvalidArgument where the config does not tell.

    >>> rope = config_rope({"model_type": "llama", "rope_theta": 100000}, 64)
    >>> rope.style, len(rope.frequencies), round(rope.frequencies[1], 4)
    ('half', 32, 0.6978)
    """
    style = _STYLES.get(str(config.get("model_type")))
    if style is None:
        raise InvalidArgument(f"model_type {config.get('model_type')!r}: how its RoPE pairs channels is not known; {_SAY}")
    parameters: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        parameters |= config.get(name) or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        raise InvalidArgument(f"the model's layers have several RoPEs, and a chunk's keys are centred by one; {_SAY}")
    merged = {**config, **parameters}
    theta, kind = merged.get("rope_theta"), merged.get("rope_type", merged.get("type", "default"))
    if not isinstance(theta, (int, float)) or not theta > 0:
        raise InvalidArgument(f"config.json says rope_theta {theta!r}; {_SAY}")
    if kind not in _SCALINGS:
        raise InvalidArgument(f"rope_type {kind!r} is not one of {', '.join(_SCALINGS)}; {_SAY}")
    channels = int(head_dim * merged.get("partial_rotary_factor", 1.0))
    radians = [float(theta) ** (-2 * i / channels) for i in range(channels // 2)]
    try:
        return Rope(frequencies=tuple(_SCALINGS[kind](radians, merged)), style=style)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise InvalidArgument(
            f"rope_type {kind!r}: its parameters {parameters!r:.200} do not hold ({error!r}); {_SAY}"
        ) from None


# -- scaled frequencies --------------------------------------------------------------------------------------------
def _linear(radians: list[float], said: Mapping[str, Any]) -> list[float]:
    return [f / said["factor"] for f in radians]


def _llama3(radians: list[float], said: Mapping[str, Any]) -> list[float]:
    """Slow channels are divided by the factor, fast ones stay, and between two wavelengths it goes over smoothly."""
    low, high = said["low_freq_factor"], said["high_freq_factor"]
    context = said["original_max_position_embeddings"]

    def scaled(f: float) -> float:
        kept = min(max((context * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0)
        return kept * f + (1 - kept) * f / said["factor"]

    return [scaled(f) for f in radians]


def _yarn(radians: list[float], said: Mapping[str, Any]) -> list[float]:
    """As ``_llama3``, but the way between goes by the channel's number, from a number of turns in the context to another."""
    context = said.get("original_max_position_embeddings") or said["max_position_embeddings"]

    def channel(turns: float) -> float:
        return len(radians) * math.log(context / (turns * 2 * math.pi)) / math.log(said["rope_theta"])

    first, last = channel(said.get("beta_fast") or 32), channel(said.get("beta_slow") or 1)
    if said.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * len(radians) - 1)
    way = max(last - first, 0.001)
    slowed = [min(max((i - first) / way, 0.0), 1.0) for i in range(len(radians))]
    return [f / said["factor"] * part + f * (1 - part) for f, part in zip(radians, slowed, strict=True)]


_SCALINGS: dict[str, Callable[[list[float], Mapping[str, Any]], list[float]]] = {
    "default": lambda radians, _: radians,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
