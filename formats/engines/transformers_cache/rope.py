"""Law: the RoPE of a model's keys: frequencies from the config, the pairing of channels from the keys themselves.

Scaled frequencies are computed by transformers' own functions (5.24).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pqcodec.formats.engines.transformers_cache.state import CacheState, LayerState
from pqcodec.formats.plain import numbers as exact
from pqcodec.formats.policy import rates
from pqcodec.formats.policy.recipe import EXACT_TOKENS, why_exact
from pqcodec.stages.centre import Rope

_GPTJ_THETA = 10000.0


def pairings(config: Any, state: CacheState) -> dict[str, str]:
    """The pairing of channels ("half", "interleaved" ...) of each tensor under RoPE, by the tensor's name (``layers.0.keys``).

    A config gives the frequencies (theta, scaling, partial RoPE), but not how the model's code pairs channels, and some layers
    have no RoPE. So the pairing with the least energy around the means, over all layers, is chosen; a tensor whose plain mean
    leaves less energy gets none.
    """
    plain: dict[str, float] = {}
    turned: dict[str, dict[str, float]] = {}  # energies by pairing
    for prefix, index, layer in state.layers():
        if prefix.startswith("cross_attention_cache") or layer.kept < 2:
            continue
        rotary = "values" if _is_latent(config, index, layer) else "keys"  # a latent cache holds the rotary key as the value
        tensor = layer.tensors[rotary]
        if why_exact(tuple(tensor.shape), exact.dtype_name(tensor)):
            continue
        name, exact_tokens = f"{prefix}.{rotary}", max(EXACT_TOKENS - (layer.tokens - layer.kept), 0)
        plain[name] = rates.energy(tensor, exact_tokens=exact_tokens)
        for pairing, rope in _candidates(config, index, int(tensor.shape[-1])).items():
            turned.setdefault(pairing, {})[name] = rates.energy(tensor, rope=rope, exact_tokens=exact_tokens)

    def left(pairing: str) -> float:
        return sum(min(energy / max(plain[name], 1e-30), 1.0) - 1 for name, energy in turned[pairing].items())

    best = min(turned, key=left, default="")
    return {name: best for name, energy in turned.get(best, {}).items() if energy < plain[name]}


def rope_of(config: Any, index: int, head_dim: int, pairing: str | None) -> Rope | None:
    """The RoPE of a layer's tensor with a pairing; None without one. Its first position is 0: another only turns the mean."""
    return None if pairing is None else _candidates(config, index, head_dim).get(pairing)


def ropes(config: Any, state: CacheState, found: Mapping[str, str]) -> dict[str, Rope]:
    """The RoPE of each tensor in ``found``, the result of ``pairings``, by the tensor's name (``layers.0.keys``)."""
    turned: dict[str, Rope] = {}
    for prefix, index, layer in state.layers():
        for path, tensor in layer.tensors.items():
            name = f"{prefix}.{path}"
            if name in found and (rope := rope_of(config, index, int(tensor.shape[-1]), found[name])):
                turned[name] = rope
    return turned


def longest_prefix(config: Any) -> int | None:
    """The most tokens of a prefix whose keys do not depend on later tokens; None: no limit.

    Under "dynamic" and "longrope" scaling all frequencies change once a sequence is longer than the original context.

    >>> from transformers import LlamaConfig
    >>> dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    >>> longest_prefix(LlamaConfig()), longest_prefix(LlamaConfig(rope_parameters=dynamic, max_position_embeddings=4096))
    (None, 4096)
    """
    config = _text(config)
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    if not any(str(one.get("rope_type")) in ("dynamic", "longrope") for one in each):
        return None
    original = next(
        (one["original_max_position_embeddings"] for one in each if one.get("original_max_position_embeddings")), None
    )
    return int(original or config.max_position_embeddings)


def _is_latent(config: Any, index: int, layer: LayerState) -> bool:
    """Whether a layer holds the latent of multi-head latent attention as keys, and the heads' one rotary key as values."""
    one = _of_layer(_text(config), index)
    rank, rotary = (getattr(one, name, None) for name in ("kv_lora_rank", "qk_rope_head_dim"))
    dims = tuple(int(layer.tensors[name].shape[-1]) for name in ("keys", "values"))
    return rank is not None and dims == (rank, rotary)


def _text(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _of_layer(config: Any, index: int) -> Any:
    """The config of one layer, for models whose layers have different ones."""
    differ = getattr(config, "is_heterogeneous", False) and index < config.num_hidden_layers
    return config.per_layer_config[index] if differ else config


def _candidates(config: Any, index: int, head_dim: int) -> dict[str, Rope]:
    """The possible RoPEs of a layer's tensor, by pairing."""
    radians = frequencies(config, index)
    if not radians or 2 * len(radians) > head_dim:
        return {}
    found = {style: Rope(frequencies=radians, style=style) for style in ("half", "interleaved")}
    still = (0.0,) * (head_dim // 2 - len(radians))
    return found | ({"last, interleaved": Rope(frequencies=(*still, *radians), style="interleaved")} if still else {})


def frequencies(config: Any, index: int) -> tuple[float, ...] | None:
    """The angle in radians per token of each channel pair of a layer, from a model's config; None without RoPE.

    Scaled frequencies (linear, YaRN, Llama 3, LongRoPE ...) are those of transformers' own functions.
    """
    config = _text(config)
    parameters = getattr(config, "rope_parameters", None)
    if not parameters and getattr(config, "rotary_dim", None):  # GPT-J and CodeGen, whose theta is in the code
        return tuple(_GPTJ_THETA ** (-2 * i / config.rotary_dim) for i in range(config.rotary_dim // 2))
    if not parameters:
        return None
    layer_type = None
    if "rope_type" not in parameters and "rope_theta" not in parameters:  # parameters by type of layer
        types = getattr(config, "layer_types", None)
        layer_type = types[index] if types else None
        parameters = parameters.get(layer_type)
        if not parameters:
            return None
    kind = parameters.get("rope_type", "default")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if kind == "default" or kind not in ROPE_INIT_FUNCTIONS:
        one = _of_layer(config, index)
        head_dim = getattr(one, "qk_rope_head_dim", None) or getattr(one, "head_dim", None)
        head_dim = head_dim or one.hidden_size // one.num_attention_heads
        dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        theta = parameters.get("rope_theta")
        return None if theta is None else tuple(float(theta) ** (-2 * i / dim) for i in range(dim // 2))
    function: Callable[..., Any] = ROPE_INIT_FUNCTIONS[kind]
    radians, _ = function(config, "cpu", **({} if layer_type is None else {"layer_type": layer_type}))
    return tuple(float(f) for f in radians)
