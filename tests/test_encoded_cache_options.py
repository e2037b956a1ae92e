"""Whatever a user does around an EncodedCache, the answer is a DynamicCache's: here with coding that loses nothing."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import TINY, rel_mse

from pqcodec.errors import InvalidArgument

transformers = pytest.importorskip("transformers")

from pqcodec.formats.engines import transformers_cache as tc  # noqa: E402
from pqcodec.formats.engines.model_identity import unwrapped  # noqa: E402
from pqcodec.formats.offload.encoded_cache import EncodedCache  # noqa: E402

SMALL = {"window": 4, "chunk": 8, "exact_tokens": 2}
MIXED = ["sliding_attention", "full_attention", "full_attention"]
HYBRID = {"head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, one layer": ("Llama", {"num_hidden_layers": 1}),
    "gemma3": ("Gemma3", {"layer_types": MIXED, "sliding_window": 16, "head_dim": 16}),
    "falcon-h1": ("FalconH1", HYBRID),
}


def tiny(kind: str) -> Any:
    name, more = MODELS[kind]
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**{**TINY, "num_hidden_layers": 3, **more})).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)  # texts that tell cases apart
    model.generation_config.eos_token_id = None
    return model


def prompt(batch: int = 1, tokens: int = 50, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 100, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def padded() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[1, :7] = 0
    return {"input_ids": prompt(2), "attention_mask": mask}


OPTIONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "greedy": lambda model: {},
    "sampling": lambda model: {"do_sample": True, "num_return_sequences": 3},
    "beams": lambda model: {"num_beams": 3, "num_return_sequences": 2},
    "beams that are sampled": lambda model: {"num_beams": 2, "do_sample": True},
    "an assistant": lambda model: {"assistant_model": tiny("llama, one layer")},
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "early exit": lambda model: {"assistant_early_exit": 1},
    "no cache": lambda model: {"use_cache": False},
    "guidance": lambda model: {"guidance_scale": 1.5},
    "prefill in pieces": lambda model: {"prefill_chunk_size": 16},
    "embeddings": lambda model: {"inputs_embeds": model.get_input_embeddings()(prompt()).detach(), "input_ids": None},
    "positions": lambda model: {"position_ids": torch.arange(100, 150)[None]},
    "attentions": lambda model: {"output_attentions": True, "output_hidden_states": True},
    "padding": lambda model: padded(),
    "padding and beams": lambda model: {**padded(), "num_beams": 2},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_options_of_generate(lossless: None, kind: str, option: str) -> None:
    model, found = tiny(kind), []
    if kind == "gemma3" and option in ("an assistant", "early exit"):
        pytest.skip("the assistant is a Llama")
    for cache in (tc.empty_cache(model.config), EncodedCache(model, **SMALL)):
        options = {
            "input_ids": prompt(),
            "do_sample": False,
            "max_new_tokens": 20,
            "output_logits": True,
            **OPTIONS[option](model),
        }
        torch.manual_seed(0)
        told = model.generate(**options, return_dict_in_generate=True, **{tc.argument_of(model): cache})
        found.append((told.sequences, torch.stack(told.logits), cache.get_seq_length()))
    (text, logits, tokens), (other_text, other_logits, other_tokens) = found
    assert torch.equal(text, other_text)
    assert tokens == other_tokens
    assert rel_mse(logits, other_logits) < 1e-9


@pytest.mark.parametrize("implementation", ["static", "dynamic", "offloaded", "quantized"])
def test_two_caches_are_refused(implementation: str) -> None:
    model = tiny("llama")
    options = {"cache_implementation": implementation, tc.argument_of(model): EncodedCache(model)}
    with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
        model.generate(prompt(), max_new_tokens=2, **options)


# -- modes of torch ----------------------------------------------------------------------------------------------
def read(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, **{tc.argument_of(model): cache}).logits


def steps(model: Any, cache: Any, first: int = 0) -> torch.Tensor:
    return torch.cat([read(model, cache, prompt(1, 1, seed=first + i)) for i in range(14)], 1)


@contextlib.contextmanager
def autocast() -> Iterator[None]:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        yield


MODES = {"inference": torch.inference_mode, "no grad": torch.no_grad, "autocast": autocast}


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "modes",
    [
        ("inference", "no grad"),
        ("no grad", "inference"),
        ("inference", "inference"),
        ("autocast", "autocast"),
        ("no grad", "autocast"),
    ],
)
def test_a_cache_goes_from_one_mode_to_another(lossless: None, kind: str, modes: tuple[str, str]) -> None:
    model, found = tiny(kind), []
    for make in (tc.empty_cache, lambda config: EncodedCache(config, **SMALL)):
        with MODES[modes[0]]():
            cache = make(model.config)
            first = [read(model, cache, prompt()), steps(model, cache)]
        with MODES[modes[1]]():
            found.append(torch.cat([*first, steps(model, cache, 50)], 1).float())
    assert rel_mse(*found) < 1e-9


def test_a_dtype_that_would_be_rounded_is_refused() -> None:
    model = tiny("llama")
    cache = EncodedCache(model, **SMALL)
    with autocast():
        read(model, cache, prompt())
    with (
        torch.no_grad(),
        pytest.raises(InvalidArgument, match=r"values of torch.float32 .* holds them as torch.bfloat16: .*reset"),
    ):
        read(model, cache, prompt(1, 1))
    cache.reset()
    with torch.no_grad():
        assert read(model, cache, prompt()).dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_a_compiled_model(lossless: None, kind: str) -> None:
    """Either way of compiling; a C++ compiler is not needed to see that graphs are broken where they have to be."""
    model = tiny(kind)
    by_method = copy.deepcopy(model)
    by_method.forward = torch.compile(by_method.forward, backend="eager")
    with torch.no_grad():
        expected = [f(model, c, i) for c in [tc.empty_cache(model.config)] for f, i in ((read, prompt()), (steps, 3))]
        for compiled in (by_method, torch.compile(copy.deepcopy(model), backend="eager")):
            assert tc.argument_of(compiled) == tc.argument_of(model)
            cache = EncodedCache(compiled, **SMALL)
            assert rel_mse(expected[0], read(compiled, cache, prompt())) < 1e-9
            assert rel_mse(expected[1], steps(compiled, cache, 3)) < 1e-9
            assert cache.memory.encoded


def test_a_copy_goes_its_own_way(lossless: None) -> None:
    """As a prompt's cache is copied for each of several questions, or sent to another process."""
    model, found = tiny("llama"), []
    ways = (copy.deepcopy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)))
    with torch.no_grad():
        for copied, kind in zip(ways, (tc.empty_cache, EncodedCache, EncodedCache), strict=True):
            cache = kind(model, **SMALL) if kind is EncodedCache else kind(model.config)
            read(model, cache, prompt())
            steps(model, cache)
            twin = copied(cache)
            found.append(torch.cat([steps(model, twin, 20), steps(model, cache, 50)]))
    assert all(rel_mse(found[0], each) < 1e-9 for each in found[1:])


# -- other models ------------------------------------------------------------------------------------------------
class PeftModel(torch.nn.Module):
    """As PEFT wraps a model: its forward takes anything."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model = torch.nn.Module()
        self.base_model.model = model

    def get_base_model(self) -> Any:
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model()(*args, **kwargs)


def test_wrappers_are_looked_through() -> None:
    model = tiny("llama")
    name = tc.argument_of(model)
    replaced = copy.deepcopy(model)
    replaced.forward = lambda *args, **kwargs: None
    wrapped = [PeftModel(model), torch.compile(PeftModel(model), backend="eager"), torch.nn.DataParallel(model), replaced]
    assert [tc.argument_of(each) for each in wrapped] == [name] * 4
    assert unwrapped(wrapped[1]) is model
    with pytest.raises(InvalidArgument, match=r"Linear\.forward takes no cache"):
        tc.argument_of(torch.nn.Linear(1, 1))


@torch.no_grad()
def test_caches_of_other_models_are_refused() -> None:
    model = tiny("llama")
    with pytest.raises(InvalidArgument, match="a model of 2 layers or more is given an EncodedCache of 1"):
        read(model, EncodedCache(tiny("llama, one layer")), prompt())
    cache = EncodedCache(model, **SMALL)
    read(model, cache, prompt())
    with pytest.raises(InvalidArgument, match=r"given to a cache of \(2, 16\) and \(2, 16\): it is another model's"):
        cache.update(torch.zeros(1, 4, 1, 16), torch.zeros(1, 4, 1, 16), 0)


def test_an_encoder_decoder_takes_two_caches(lossless: None) -> None:
    """T5 writes to the one cache that it is given as self-attention's what is cross-attention's."""
    sizes = {"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, eos_token_id=None)
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    options = {"max_new_tokens": 30, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = torch.stack(model.generate(prompt(), **options).logits)
    name, encoded = tc.argument_of(model), lambda: EncodedCache(model, **SMALL)
    two = transformers.EncoderDecoderCache(encoded(), transformers.DynamicCache())
    assert rel_mse(expected, torch.stack(model.generate(prompt(), **{name: two}, **options).logits)) < 1e-9
    for wrong in (encoded(), transformers.EncoderDecoderCache(encoded(), encoded())):
        with pytest.raises(InvalidArgument, match=r"takes EncoderDecoderCache\(EncodedCache\(model\), DynamicCache\(\)\)"):
            model.generate(prompt(), **{name: wrong}, **options)
    with pytest.raises(InvalidArgument, match="of one layer"):
        EncodedCache(transformers.T5Config(**{**sizes, "num_layers": 1}))


def test_models_that_take_no_such_cache_are_refused_by_name() -> None:
    """Before anything is computed, from the model's config as well."""
    text = transformers.MllamaConfig(text_config={"cross_attention_layers": [1], "num_hidden_layers": 2, "vocab_size": 100})
    for config, why in [
        (transformers.MiniMaxConfig(), "a minimax takes a MiniMaxCache alone, not an EncodedCache"),
        (text, "a mllama_text_model looks for its images' keys in the cache itself"),
        (text.text_config, "take a DynamicCache"),
    ]:
        with pytest.raises(InvalidArgument, match=why):
            EncodedCache(config)
