"""Law: what of a vLLM engine's settings decides the numbers in its KV cache; what is not known to be right is refused by name.

vLLM has no model that could be looked at as ``model_identity`` does. But a model has files: config.json as parsed, and the
bytes of every other file of its folder that is not known to leave keys and values alone. Nothing of vLLM is imported here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.paged_layers import CacheShape, layers_in_order
from pqcodec.stream.header import DTYPE_NAMES

_OF_FILES = (
    "auto",
    "hf",
    "safetensors",
    "fastsafetensors",
    "instanttensor",
    "mistral",
    "pt",
    "npcache",
    "bitsandbytes",
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_NO_WEIGHTS = """config.json readme.md license license.txt notice notice.txt use_policy.md .gitattributes .gitignore
    generation_config.json tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json
    vocab.json vocab.txt merges.txt chat_template.json chat_template.jinja"""  # nor code: tokens are ids here
_HARMLESS = frozenset(_NO_WEIGHTS.split())
_SPEC = "FullAttentionSpec"
_PLAIN = {  # what an attention spec says where a token's keys and values are what the model computed, and no more
    "sliding_window": None,
    "attention_chunk_size": None,
    "non_causal": False,
    "num_head_slots": None,
    "state_content_bytes": None,
    "tokens_per_state": 1,
}
_PARALLEL = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)


def shape_of(engine: Any, caches: Any) -> tuple[CacheShape, int, list[str]]:
    """The shape of an engine's cache, tokens of a block, and the names of its layers in order.

    ``engine``, ``caches``: vLLM's VllmConfig and KVCacheConfig. Raises InvalidArgument for caches that cannot be served.
    """
    for name in _PARALLEL:
        if getattr(engine.parallel_config, name, 1) != 1:
            raise InvalidArgument(
                f"{name} is {getattr(engine.parallel_config, name)}: pqcodec's connector serves engines of one rank; LMCache "
                "with pqcodec's serde serves several (FLEETS.md)"
            )
    groups = caches.kv_cache_groups
    if len(groups) != 1:
        raise InvalidArgument(f"the model's layers have {len(groups)} kinds of caches; one, full attention, is expected")
    spec = groups[0].kv_cache_spec
    if type(spec).__name__ != _SPEC:
        raise InvalidArgument(
            f"the model's caches are of the kind {type(spec).__name__}; {_SPEC} is expected: no latent attention (MLA), "
            "sliding windows, state space or layers that differ"
        )
    for name, plain in {**_PLAIN, "head_size_v": spec.head_size}.items():
        if getattr(spec, name, plain) != plain:
            raise InvalidArgument(f"the model's caches have {name} {getattr(spec, name)!r}; {plain!r} is expected")
    dtype = str(spec.dtype).removeprefix("torch.")
    if int(getattr(spec, "kv_quant_mode", 0)) or dtype not in DTYPE_NAMES.values():
        raise InvalidArgument(
            f"the KV cache is {engine.cache_config.cache_dtype} ({dtype}); only caches that are not quantized, of "
            f'{", ".join(DTYPE_NAMES.values())}, can be stored: leave kv_cache_dtype at "auto"'
        )
    layers = engine.model_config.hf_text_config.num_hidden_layers
    names = layers_in_order(groups[0].layer_names, layers)
    return CacheShape(layers, spec.num_kv_heads, spec.head_size, dtype), spec.block_size, names


def identity_of(engine: Any, version: str, weights: str | None, rope_said: bool) -> dict[str, Any]:
    """What tells an engine's model from every other one, as JSON: version of vLLM, config, weights, dtypes, overrides.

    ``weights``: a word of the operator's that stands for the weights, None: the digest of their files, all of which are read.
    ``rope_said``: the operator has said what RoPE the model has, so that nothing is known of how it depends on the length of
    texts. Raises InvalidArgument.
    """
    model = engine.model_config
    overrides = model.hf_overrides or {}
    if not isinstance(overrides, Mapping):
        raise InvalidArgument("hf_overrides is a function, so that the model is not known; give an object")
    if weights is not None and (not isinstance(weights, str) or not weights):
        raise InvalidArgument(f"weights is {weights!r}; a word that stands for them is expected, such as a commit")
    identity = {
        "engine": f"vllm {version}",
        "config": _digest_of(config_of(model), "config.json"),
        "overrides": _digest_of(overrides, "hf_overrides"),
        "weights": f"said: {weights}" if weights is not None else _files_digest(engine),
        "dtype": str(model.dtype).removeprefix("torch."),
        "cache_dtype": str(engine.cache_config.cache_dtype),
        "quantization": str(model.quantization),
        "model_impl": str(getattr(model.model_impl, "value", model.model_impl)),
    }
    return identity | ({"max_model_len": model.max_model_len} if rope_said else {})


def config_of(model: Any) -> dict[str, Any]:
    """The object in the config.json of a model's folder, whole; what vLLM parsed, where the model is no folder."""
    path = Path(str(model.model), "config.json")
    try:
        config = json.loads(path.read_bytes()) if path.exists() else {**model.hf_config.to_dict(), "_name_or_path": ""}
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path}: cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise InvalidArgument(f"{path}: holds a {type(config).__name__}; an object is expected")
    return config


def _digest_of(value: Any, what: str) -> str:
    try:
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what} cannot be written as JSON: {error}") from None


def _files_digest(engine: Any) -> str:
    """A digest of the names and bytes of the files that a model is made of; raises InvalidArgument where they are not known."""
    folder, form = Path(str(engine.model_config.model)), str(engine.load_config.load_format)
    advice = "give 'weights', a word that stands for them, such as the commit of the model's repository"
    if not folder.is_dir() or form not in _OF_FILES:
        raise InvalidArgument(f"the weights of {str(folder)!r} (load_format {form!r}) are in no local folder; {advice}")
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and path.name.lower() not in _HARMLESS)
        if not any(path.suffix in _WEIGHTS for path in files):
            raise InvalidArgument(f"{folder}: holds no weights; {advice}")
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(_file_digest, files))
    except OSError as error:
        raise InvalidArgument(f"{folder}: the weights cannot be read: {error}; {advice}") from None
    told = [[path.name, digest] for path, digest in zip(files, found, strict=True)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
