"""Identities of models: what a cache's numbers depend on is seen, the rest is not, and what has no name is refused."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gaussian, sampled

from pqcodec.errors import InvalidArgument
from pqcodec.formats import PrefixStore
from pqcodec.formats.engines import transformers_cache as tc
from pqcodec.formats.engines.model_identity import Identity, forget, unwrapped
from pqcodec.formats.engines.model_identity import identity as reading

transformers = pytest.importorskip("transformers")
from test_transformers_cache import COMMON, MODELS, prompt, tiny  # noqa: E402


def identity(model: Any) -> dict[str, str]:
    return Identity.of(model).as_dict()


def test_the_same_weights_are_the_same_model(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path)
    one, two = (transformers.LlamaForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    assert identity(one) == identity(two)
    assert identity(one)["weights"] == identity(model)["weights"] == identity(copy.deepcopy(model))["weights"]
    assert identity(one)["weights"] != identity(tiny("llama", seed=1))["weights"]


def test_one_element_makes_another_model() -> None:
    model = copy.deepcopy(tiny("llama"))
    first = identity(model)
    assert identity(model) == first
    seen = {first["weights"]}
    for weight in list(model.parameters()):
        with torch.no_grad():
            flat = weight.view(-1)
            flat[flat.numel() // 2] = torch.nextafter(flat[flat.numel() // 2], torch.tensor(9.0))  # in place
        seen.add(identity(model)["weights"])
    assert len(seen) == 1 + len(list(model.named_parameters()))
    assert {key: value for key, value in identity(model).items() if key != "weights"} == {
        key: value for key, value in first.items() if key != "weights"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (1024,), (1025, 8), (2, 1024, 129)])
def test_every_byte_counts_at_its_place(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model = copy.deepcopy(tiny("mamba"))
    weight = gaussian(*shape).mul(50).to(dtype)
    model.register_buffer("extra", weight)
    flat, seen = weight.view(-1), {identity(model)["weights"]}
    places = np.random.default_rng(0).integers(0, len(flat), 12)
    for at in places:
        flat[at] += 1  # twice at one place is other than once
        seen.add(identity(model)["weights"])
    assert len(seen) == 1 + len(places)
    if len(flat) > 8:
        flat[:] = flat.flip(0).clone()
        assert identity(model)["weights"] not in seen


def test_what_is_written_past_the_version_counters_is_seen_after_forget() -> None:
    model = copy.deepcopy(tiny("llama"))
    first = identity(model)
    model.lm_head.weight.data[3, 3] += 1
    forget(model)
    assert identity(model) != first
    model.lm_head.weight.data[3, 3] -= 1


def test_weights_that_are_exchanged_make_another_model() -> None:
    model = copy.deepcopy(tiny("llama"))
    first, one = identity(model), model.model.layers
    one[0], one[1] = one[1], one[0]
    assert identity(model)["weights"] != first["weights"]
    one[0], one[1] = one[1], one[0]
    assert identity(model) == first


class Adapter(torch.nn.Linear):
    """What peft puts in the place of a linear layer, as far as its state goes."""

    def __init__(self) -> None:
        super().__init__(64, 64)
        self.lora_A = torch.nn.ModuleDict({"one": torch.nn.Linear(64, 2), "two": torch.nn.Linear(64, 2)})
        self.active_adapters = ["one"]
        self.merged_adapters: list[str] = []
        self.disable_adapters = False
        self.scaling = {"one": 1.0, "two": 0.5}


def test_adapters_make_another_model() -> None:
    model = copy.deepcopy(tiny("llama"))
    assert "adapters" not in identity(model)
    adapter = model.model.layers[1].self_attn.q_proj = Adapter()
    seen = [identity(model)]
    for name, value in [
        ("active_adapters", ["two"]),
        ("active_adapters", ["one", "two"]),
        ("disable_adapters", True),
        ("merged_adapters", ["one"]),
        ("scaling", {"one": 2.0, "two": 0.5}),
    ]:
        setattr(adapter, name, value)
        seen.append(identity(model))
    assert len({each["weights"] for each in seen}) == 1
    assert len({each["adapters"] for each in seen}) == len(seen)
    with torch.no_grad():
        adapter.lora_A["two"].weight[0, 0] += 1
    assert identity(model)["weights"] != seen[0]["weights"]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba"])
def test_flags_of_a_config_do_not_count(kind: str) -> None:
    model = copy.deepcopy(tiny(kind))
    first = identity(model)
    config = model.config
    config._attn_implementation, config._name_or_path, config.architectures = "eager", "elsewhere", ["X"]
    config.use_cache, config.output_attentions, config.output_hidden_states = False, True, True
    assert identity(model) == first


def test_settings_of_a_config_count() -> None:
    model = copy.deepcopy(tiny("gemma3"))
    seen = [identity(model)]
    model.config.sliding_window = 17
    seen.append(identity(model))
    model.config.rope_parameters["full_attention"]["rope_theta"] *= 2
    seen.append(identity(model))
    model.config.layer_types = model.config.layer_types[::-1][:1] + model.config.layer_types[1:]
    seen.append(identity(model))
    assert len({each["config"] for each in seen}) >= 3
    assert len({each["weights"] for each in seen}) == 1


def test_a_model_that_is_not_loaded_cannot_be_told() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(tiny("llama").config)
    with pytest.raises(InvalidArgument, match="is not loaded"):
        Identity.of(model)
    known = Identity(model.config, "c" * 32, weights="w" * 32)
    assert Identity.of(known) is known


# -- an ordinary model -------------------------------------------------------------------------------------------
_PLAIN = [
    "Gemma",
    "Gemma2",
    "Phi",
    "Qwen3",
    "StableLm",
    "Starcoder2",
    "Olmo2",
    "Granite",
    "Nemotron",
    "Glm4",
    "OPT",
    "Bloom",
    "Arcee",
    "Mixtral",
]
MORE: dict[str, dict[str, Any]] = {  # families beyond those of MODELS, and what their configs have beside COMMON
    **{family: {} for family in _PLAIN},
    "Helium": {"head_dim": 16},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "Bart": {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 128},
}


def made(family: str, seed: int = 0) -> Any:
    if family in MODELS:
        return copy.deepcopy(tiny(family, seed))
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**COMMON | MORE[family])
    kind = getattr(transformers, f"{family}ForCausalLM", None) or getattr(transformers, f"{family}LMHeadModel")
    return kind(config).eval()


@pytest.mark.parametrize("family", sampled([*MODELS, *MORE]))
def test_an_ordinary_model_deviates_nowhere(family: str, tmp_path: Path) -> None:
    """Fresh, after generating, and loaded again in either dtype: the identity is that of weights, config and dtype alone."""
    model, draws = made(family), torch.get_rng_state()
    first = identity(model)
    assert set(first) == {"config", "weights", "dtype"}
    assert torch.equal(torch.get_rng_state(), draws)
    model.generate(prompt(12), max_new_tokens=4, do_sample=False, pad_token_id=0, output_hidden_states=True)
    assert identity(model) == first
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert identity(again)["weights"] == first["weights"]
    assert set(identity(again)) == set(identity(type(model).from_pretrained(tmp_path, dtype=torch.bfloat16))) == set(first)


def test_names_are_those_of_the_version_before() -> None:
    """So stores and files that were written before are still hit."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON)).eval()
    for place, (_, weight) in enumerate(sorted(model.state_dict().items())):
        weight.copy_(torch.arange(weight.numel()).reshape(weight.shape) % 17 - 8 + place)
    assert identity(model) == {
        "config": "011638518082a4580653699c4f2d2abe",
        "weights": "f8e69584b9735a57bd4e52b8b62f6dbe",
        "dtype": "torch.float32",
    }


# -- wrappers ----------------------------------------------------------------------------------------------------
def test_wrappers_are_the_model_inside() -> None:
    model = made("llama")
    compiled = torch.compile(model)
    assert unwrapped(compiled) is unwrapped(model) is model
    assert identity(compiled) == identity(model)

    class PeftModel(torch.nn.Module):
        def __init__(self, learns_prompt: bool) -> None:
            super().__init__()
            self.base_model, self.peft_config = torch.nn.Module(), {}
            self.base_model.model = model
            self.active_peft_config = SimpleNamespace(is_prompt_learning=learns_prompt, peft_type="PREFIX_TUNING")

        def get_base_model(self) -> Any:
            return self.base_model.model

    assert unwrapped(torch.compile(PeftModel(False))) is model
    with pytest.raises(InvalidArgument, match="PREFIX_TUNING: it puts virtual tokens before each prompt"):
        Identity.of(PeftModel(True))


def test_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = made("llama")
    first = identity(model)
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, lora_dropout=0.1)
    wrapped = peft.get_peft_model(model, lora)
    with pytest.raises(InvalidArgument, match=r"call model\.eval"):
        Identity.of(wrapped.train())
    wrapped.eval()
    seen = [identity(wrapped)]
    with wrapped.disable_adapter():
        seen.append(identity(wrapped))
    assert identity(wrapped) == seen[0] == identity(unwrapped(wrapped))
    next(module for module in wrapped.modules() if hasattr(module, "lora_A")).scaling["default"] *= 2
    seen.append(identity(wrapped))
    wrapped.merge_adapter()
    seen.append(identity(wrapped))
    merged = wrapped.merge_and_unload()
    seen.append(identity(merged))
    assert len({str(sorted(each.items())) for each in [first, *seen]}) == 1 + len(seen)
    assert set(seen[-1]) == set(first)
    with pytest.raises(InvalidArgument, match="virtual tokens"):
        Identity.of(peft.get_peft_model(made("llama"), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)))


# -- files, stores, threads --------------------------------------------------------------------------------------
def test_files_tell_state_mode_and_autocast(tmp_path: Path) -> None:
    model, path = made("llama"), tmp_path / "a.pqkv"
    cache = transformers.DynamicCache(config=model.config)
    model(prompt(40), past_key_values=cache)
    tc.save(cache, path, model)
    tc.load(path, model)
    model.model.norm.variance_epsilon = 1e-3
    with pytest.raises(InvalidArgument, match="a model of other state; compute"):
        tc.load(path, model)
    tc.save(cache, path, model)
    tc.load(path, model)
    tc.load(path, model.config)
    with pytest.raises(InvalidArgument, match="a model of other state; compute"):
        tc.load(path, made("llama"))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InvalidArgument, match="a model of other autocast"):
        tc.load(path, model)


def test_a_store_misses_what_another_state_computed(tmp_path: Path) -> None:
    ids = prompt(300)
    for kind in ("sampled", "full"):
        model = made("llama")
        cache = transformers.DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        with PrefixStore(tmp_path / kind, preset="exact", identity=kind) as store:
            store.put(model, ids, cache)
            assert store.get(model, ids).length == 299
            weight = model.model.layers[0].self_attn.k_proj.weight
            weight.data[0, 5] += 1
            assert store.get(model, ids).length == (0 if kind == "full" else 299)
            weight.data += 0.01
            assert store.get(model, ids).length == 0
    with pytest.raises(InvalidArgument, match="identity 'none': 'sampled' or 'full' is expected"):
        PrefixStore(tmp_path / "none", identity="none")


def test_a_model_is_let_go() -> None:
    """Even one whose own attributes lead back to it, as those of accelerate do."""
    model = made("llama")
    model._old_forward, model.me = model.forward, [model]
    Identity.of(model, full=True)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_threads_ask_at_once() -> None:
    model = made("llama")
    first, found = identity(model), []
    forget(model)
    threads = [threading.Thread(target=lambda: found.extend(identity(model) == first for _ in range(5))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 40


def test_inference_mode_changes_nothing() -> None:
    first = identity(made("gemma3"))
    with torch.inference_mode():
        assert identity(tiny("gemma3")) == Identity.of(tiny("gemma3"), full=True).as_dict() == first
    assert Identity.of(tiny("gemma3"), full=True).as_dict() == first


def test_a_model_that_did_not_change_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("gemma3")
    model.generate(prompt(12), max_new_tokens=2, do_sample=False, pad_token_id=0)
    first = identity(model)
    monkeypatch.setattr(reading, "_read", lambda *_: pytest.fail("read again"))
    model.generate(prompt(12), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert identity(model) == first


# -- code of others ----------------------------------------------------------------------------------------------
def test_functions_that_torch_compile_keeps_in_a_module_are_no_other_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile puts its functions into the module of the code that it compiled, and may do so at each call."""
    model = copy.deepcopy(tiny("llama"))
    home: Any = sys.modules[type(model).__module__]
    plain = Identity.of(model)
    space: dict[str, Any] = {"__name__": "torch_made"}
    exec("def forward(x):\n    return x", space)
    monkeypatch.setattr(home, "__compiled_fn_1_0a1b", space["forward"], raising=False)
    assert Identity.of(model) == plain
    monkeypatch.setattr(home, "apply_rotary_pos_emb", space["forward"])  # what the module calls by name is another matter
    assert Identity.of(model).state


def test_code_that_is_not_transformers_own_is_in_a_models_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(tiny("llama"))
    plain = Identity.of(model)
    assert not plain.state

    def subclass(factor: int) -> type:
        """As a notebook's cell that is edited and run again: the same name, other code."""
        space: dict[str, Any] = {"Base": type(model), "__name__": "somewhere"}
        exec(f"class Mine(Base):\n    def scaled(self, x):\n        return x * {factor}", space)
        return space["Mine"]

    found = []
    for factor in (1, 2, 1):
        other = subclass(factor)(model.config).eval()
        other.load_state_dict(model.state_dict())
        found.append(Identity.of(other).digest())
    assert found[0] == found[2]
    assert len({plain.digest(), *found}) == 3
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turned_further)
    assert Identity.of(model).digest() != plain.digest()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *_: None)
    with pytest.raises(InvalidArgument, match=r"apply_rotary_pos_emb was replaced by .*<lambda>"):
        Identity.of(model)
    monkeypatch.undo()
    assert Identity.of(model).digest() == plain.digest()


def turned_further(*args: Any) -> Any:
    raise NotImplementedError
