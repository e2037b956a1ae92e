"""Identities of models: what a cache's numbers depend on is seen, the rest is not, and what has no name is refused."""

from __future__ import annotations

import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gaussian

from pqcodec.errors import InvalidArgument
from pqcodec.formats import PrefixStore
from pqcodec.formats import transformers_cache as tc
from pqcodec.formats.model_identity import Identity, forget, unwrapped
from pqcodec.formats.model_identity import identity as reading

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


@pytest.mark.parametrize("family", [*MODELS, *MORE])
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


# -- what changes a model's numbers ------------------------------------------------------------------------------
def steered(module: Any, x: Any) -> Any:
    """A forward that a library might put in the place of a norm's."""
    return module.weight * x


def set_tensor(tensor: Any) -> Iterator[None]:
    """Every way to edit a whole tensor past its version counter; each is undone."""
    kept = tensor.data.clone()
    for edit in (
        lambda: tensor.data.add_(0.5) if tensor.is_floating_point() else tensor.data.add_(1),
        lambda: tensor.data.neg_(),
        lambda: setattr(tensor, "data", kept.flip(0).clone()),
        lambda: np.copyto(tensor.detach().numpy(), kept.numpy() + 1),
    ):
        edit()
        yield
        tensor.data = kept.clone()


@pytest.mark.parametrize("full", [False, True])
def test_edits_of_whole_tensors_are_seen(full: bool) -> None:
    model = made("llama")
    layer = model.model.layers[1]
    layer.register_buffer("steering", torch.randn(64))
    layer.register_buffer("hidden", torch.randn(64), persistent=False)
    layer.shift = torch.randn(64)
    layer.shifts = {"of": [torch.randn(300), 1.0]}
    layer.counts = torch.arange(1, 9)
    first = Identity.of(model, full=full)
    tensors = [*model.parameters(), *model.buffers(), layer.shift, layer.shifts["of"][0], layer.counts]
    seen = {first.digest()}
    for tensor in tensors:
        for _ in set_tensor(tensor):
            seen.add(Identity.of(model, full=full).digest())
        forget(model)
        assert Identity.of(model, full=full) == first
    assert len(seen) >= 1 + 3 * len(tensors)  # exchanged rows of equal numbers are the same tensor


def test_edits_of_one_element_are_seen_under_full() -> None:
    model = made("mamba")
    model.register_buffer("odd", torch.randn(2, 1021, 9).to(torch.bfloat16)[:, :, :7], persistent=False)
    model.register_buffer("bytes", torch.randint(0, 255, (40_001,), dtype=torch.uint8))
    seen = {Identity.of(model, full=True).digest()}
    random = np.random.default_rng(0)
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        at = tuple(int(random.integers(0, n)) for n in tensor.shape)
        tensor.data[at] = tensor.data[at] + 1
        seen.add(Identity.of(model, full=True).digest())
    assert len(seen) == 1 + len(tensors)


def test_full_after_sampled_looks_at_what_sampled_did_not() -> None:
    model = made("llama")
    first = Identity.of(model)
    model.lm_head.weight.data[3, 3] += 1
    assert Identity.of(model) == first  # as told: an element that is not among the samples
    assert Identity.of(model, full=True).weights != first.weights


def test_an_edit_past_the_counters_reads_all_weights_again() -> None:
    """A synchronisation of weights may leave the samples of some tensors as they were."""
    model = made("llama")
    Identity.of(model)
    model.lm_head.weight.data[3, 3] += 1
    model.model.norm.weight.data.add_(1)
    assert Identity.of(model).weights == identity(copy.deepcopy(model))["weights"]


def numbers_of(model: Any) -> dict[str, Callable[[], None]]:
    layer = model.model.layers[1]
    attention = layer.self_attn

    def setting(thing: Any, name: str, value: Any) -> Callable[[], None]:
        return lambda: setattr(thing, name, value)

    return {
        "epsilon of a norm": setting(layer.input_layernorm, "variance_epsilon", 1e-3),
        "scaling of an attention": setting(attention, "scaling", 0.5),
        "number of groups": setting(attention, "num_key_value_groups", 1),
        "a flag": setting(attention, "is_causal", False),
        "a list": setting(attention, "multipliers", [1.0, 2.0]),
        "a member of a list": lambda: attention.multipliers.append(3.0),
        "a number in a dict": setting(layer, "strengths", {"one": {"deep": [0.5]}}),
        "another number in it": lambda: layer.strengths["one"]["deep"].__setitem__(0, 0.25),
        "numbers of numpy": setting(layer, "table", np.ones(3)),
        "frequencies": setting(model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq * 2),
        "frequencies in place": lambda: model.model.rotary_emb.inv_freq.mul_(0.5).add_(0.01),
        "scaling of frequencies": setting(model.model.rotary_emb, "attention_scaling", 2.0),
        "a module's class": setting(layer.mlp.act_fn, "__class__", torch.nn.ReLU),
        "a module": setting(layer.mlp, "act_fn", torch.nn.GELU()),
        "a module more": setting(layer, "more", torch.nn.Identity()),
        "a config of a module": setting(attention, "config", transformers.LlamaConfig(**COMMON, attention_bias=True)),
    }


def test_python_numbers_anywhere_are_seen() -> None:
    model = made("llama")
    first = identity(model)
    seen = {Identity.of(model).digest()}
    for count, (what, change) in enumerate(numbers_of(model).items(), 2):
        change()
        seen.add(Identity.of(model).digest())
        assert len(seen) == count, what
    assert identity(model)["weights"] == first["weights"]
    assert identity(copy.deepcopy(model)) == identity(model)


def test_strength_of_an_adapter_is_seen() -> None:
    model = made("llama")
    adapter = model.model.layers[1].self_attn.q_proj = Adapter()
    model.eval()
    seen = {Identity.of(model).digest()}
    adapter.scaling["one"] = 2.0
    seen.add(Identity.of(model).digest())
    adapter.strength = 0.5
    seen.add(Identity.of(model).digest())
    adapter.strength = 0.75
    seen.add(Identity.of(model).digest())
    assert len(seen) == 4


def test_frequencies_that_were_rounded_are_others() -> None:
    """``model.to(bfloat16)`` rounds them, loading in bfloat16 does not: keys at position 1,000 have nothing in common."""
    assert "state" in identity(made("llama").to(torch.bfloat16))


def test_rope_that_changes_with_the_length_is_no_state() -> None:
    for kind in ("llama, dynamic", "phi3, longrope"):
        model = made(kind)
        first = identity(model)
        for tokens in (200, 12):
            model(prompt(tokens))
            assert identity(model) == first
        if "dynamic" not in kind:
            continue
        model.model.rotary_emb.original_inv_freq.data *= 2  # what it goes back to
        assert identity(model) != first
    model = made("llama")
    first = identity(model)
    model.model.rope_deltas = torch.ones(1, 1)
    assert identity(model) == first


@pytest.mark.parametrize("name", ["sdpa", "eager", None, "flash_attention_2", "my_attention"])
def test_attention_counts_beyond_eager_and_sdpa(name: str | None) -> None:
    model = made("llama")
    model.config._attn_implementation_internal = name
    assert identity(model).get("attention", "") == ("" if name in ("sdpa", "eager", None) else name)


def test_autocast_counts() -> None:
    model = made("llama")
    first = identity(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert identity(model) == first | {"autocast": "bfloat16"}
    assert identity(model) == first


# -- modes, hooks and forwards -----------------------------------------------------------------------------------
def test_training_with_dropout_is_refused() -> None:
    model = made("llama")
    first = identity(model)
    model.train()
    assert identity(model) == first | {"mode": "train"}
    model.model.layers[0].eval()
    assert identity(model)["mode"] not in ("train", "")
    model.model.layers[1].self_attn.attention_dropout = 0.5
    with pytest.raises(
        InvalidArgument, match=r"drops numbers at random \(attention_dropout 0\.5\).*call model\.eval\(\) first"
    ):
        Identity.of(model)
    model.model.layers[1].self_attn.attention_dropout = 0.0
    model.config.attention_dropout = 0.5
    with pytest.raises(InvalidArgument, match="the config drops numbers"):
        Identity.of(model)
    model.config.attention_dropout = 0.0
    model.model.extra = torch.nn.Dropout(0.1)
    with pytest.raises(InvalidArgument, match=r"the module 'model\.extra' drops"):
        Identity.of(model)
    del model.model.extra
    assert identity(model.eval()) == first


def test_hooks_are_refused_by_name() -> None:
    model = made("llama")
    first = identity(model)

    def steer(*_: Any) -> None: ...

    layer = model.model.layers[1]
    for register, where in [
        (layer.register_forward_hook, r"the module 'model\.layers\.1'"),
        (layer.mlp.register_forward_pre_hook, r"the module 'model\.layers\.1\.mlp'"),
        (torch.nn.modules.module.register_module_forward_hook, "every module"),
        (torch.nn.modules.module.register_module_forward_pre_hook, "every module"),
    ]:
        handle = register(steer)
        try:
            with pytest.raises(InvalidArgument, match=f"{where}.*forward hook .*steer.*remove the hook, or pass an Identity"):
                Identity.of(model)
        finally:
            handle.remove()
        assert identity(model) == first
    assert Identity.of(Identity(model.config, "c" * 32, weights="w" * 32))


def test_replaced_forwards_are_refused_unless_they_surround_the_own() -> None:
    model = made("llama")
    first = identity(model)
    norm = model.model.norm
    norm.forward = functools.partial(steered, norm)
    with pytest.raises(InvalidArgument, match=r"the module 'model\.norm' has a forward of its own, .*steered"):
        Identity.of(model)
    del norm.forward
    model.forward = torch.compile(model.forward)
    assert identity(model) == first
    del model.forward
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model.model.layers[0], hooks.AlignDevicesHook("cpu"))
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook("cpu"))
    assert identity(model) == first

    class Steering(hooks.ModelHook):
        pass

    hooks.add_hook_to_module(norm, Steering())
    with pytest.raises(InvalidArgument, match=r"'model\.norm' has a forward"):
        Identity.of(model)


def test_classes_whose_forward_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    first = identity(model)
    kind = type(model.model.norm)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", steered)
    assert set(identity(model)) == {*first, "state"}
    for function in (lambda self, x: x, functools.wraps(own)(lambda self, x: own(self, x) * 1.1)):
        monkeypatch.setattr(kind, "forward", function)
        with pytest.raises(InvalidArgument, match=r"the forward of .*LlamaRMSNorm was replaced by .*lambda"):
            Identity.of(model)
    monkeypatch.setattr(kind, "forward", own)
    assert identity(model) == first


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


def test_a_model_that_did_not_change_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("gemma3")
    model.generate(prompt(12), max_new_tokens=2, do_sample=False, pad_token_id=0)
    first = identity(model)
    monkeypatch.setattr(reading, "_read", lambda *_: pytest.fail("read again"))
    model.generate(prompt(12), max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert identity(model) == first
