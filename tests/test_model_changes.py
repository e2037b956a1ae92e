"""Changes to a model: what alters a cache's numbers is seen on the next call, and what has no name is refused."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity import Identity, forget

transformers = pytest.importorskip("transformers")
from test_model_identity import Adapter, identity, made  # noqa: E402
from test_transformers_cache import COMMON, prompt  # noqa: E402


# -- numbers -------------------------------------------------------------------------------------------------
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


def test_edits_are_seen_where_a_gpu_sums_weights(summed_weights: None) -> None:
    model = made("llama")
    first = Identity.of(model, full=True)
    for tensor in (model.lm_head.weight, model.model.norm.weight):
        kept = tensor.data.clone()
        tensor.data.view(-1)[-1] += 0.5
        assert Identity.of(model, full=True) != first
        tensor.data.copy_(kept)
        forget(model)
        assert Identity.of(model, full=True) == first


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
        "one of them in place": lambda: layer.table.__setitem__(1, 2.0),
        "a function": setting(layer, "activation", functools.partial(steered, 0.25)),
        "what it is called with": setting(layer, "activation", functools.partial(steered, 0.5)),
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


def test_any_sequence_of_changes_ends_where_reading_anew_does() -> None:
    """What was seen change by change is what a copy that was never looked at is; no change leaves the identity alone."""
    random, model = np.random.default_rng(0), made("llama")
    first, second = model.model.layers
    second.strengths = [1.0]

    def rotate() -> None:
        model.model.layers[0], model.model.layers[1] = model.model.layers[1], model.model.layers[0]

    changes: list[Callable[[], Any]] = [
        lambda: first.mlp.up_proj.weight.data.mul_(1.5),
        lambda: second.mlp.up_proj.weight.data.copy_(torch.randn(64, 64)),
        lambda: setattr(second.input_layernorm.weight, "data", torch.randn(64)),
        lambda: setattr(first.mlp.down_proj, "weight", torch.nn.Parameter(torch.randn(64, 64))),
        lambda: model.model.rotary_emb.inv_freq.mul_(1.25),
        lambda: second.strengths.append(len(second.strengths)),
        lambda: setattr(first.self_attn, "scaling", first.self_attn.scaling * 2),
        lambda: setattr(model.config, "rope_note", getattr(model.config, "rope_note", 0) + 1),
        lambda: first.add_module(f"more_{len(first._modules)}", torch.nn.Linear(2, 2)),
        lambda: model.train(not model.training),
        rotate,
    ]
    before = Identity.of(model)
    with torch.no_grad():
        for _ in range(40):
            at = int(random.integers(len(changes)))
            changes[at]()
            now = Identity.of(model)
            assert now.digest() != before.digest(), at
            assert now.as_dict() == identity(copy.deepcopy(model)), at
            before = now


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
        for name in ("inv_freq", "original_inv_freq") if kind == "llama, dynamic" else ("original_inv_freq",):
            model = made(kind)  # that has seen no long sequence
            getattr(model.model.rotary_emb, name).data *= 2
            assert identity(model) != first
    model = made("llama")
    first = identity(model)
    model.model.rope_deltas = torch.ones(1, 1)
    assert identity(model) == first


MIXED_ROPE = {  # by type of layer, as Gemma3 has it
    "sliding_attention": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    "full_attention": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0, 1.5] * 4,
        "long_factor": [2.0, 4.0] * 4,
        "original_max_position_embeddings": 64,
    },
}


def rotary(kind: str) -> tuple[Any, Any, str]:
    """A model whose RoPE changes with the length, the module, and what the names of a layer's begin with."""
    if kind != "gemma3":
        model = made(kind)
        return model, model.model.rotary_emb, ""
    options = {"num_hidden_layers": 2, "layer_types": list(MIXED_ROPE), "sliding_window": 8, "head_dim": 16}
    config = transformers.Gemma3TextConfig(**{**COMMON, **options, "rope_parameters": MIXED_ROPE})
    model = transformers.Gemma3ForCausalLM(config).eval()
    return model, model.model.rotary_emb, "full_attention_"


@pytest.mark.parametrize("kind", ["llama, dynamic", "phi3, longrope", "gemma3"])
def test_edits_of_a_rope_that_changes_with_the_length_are_seen(kind: str) -> None:
    model, module, layer = rotary(kind)
    first = identity(model)
    assert "state" not in first
    for tokens in (12, 1100, 12):  # beyond the length, and back: what transformers does itself
        model(prompt(tokens))
        assert identity(model) == first
        scaling = getattr(module, f"{layer}attention_scaling")
        setattr(module, f"{layer}attention_scaling", scaling * 1.5)
        assert identity(model) != first
        setattr(module, f"{layer}attention_scaling", scaling)
        assert identity(model) == first
    if kind != "llama, dynamic":  # which keeps none
        frequencies = getattr(module, f"{layer}long_inv_freq")
        frequencies *= 2
        assert identity(model) != first
        frequencies /= 2
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
    model.lm_head.eval()  # the same in both modes
    assert identity(model)["mode"] == "train"
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


def test_the_code_of_a_forward_that_was_replaced_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for number in (1, 2, 1):
        space: dict[str, Any] = {"__name__": "somewhere"}
        exec(f"def steered(module, x):\n    return x * {number}", space)
        model = made("llama")
        monkeypatch.setattr(type(model.model.norm), "forward", space["steered"])
        found.append(Identity.of(model).digest())
    assert found[0] == found[2] != found[1]


def test_functions_without_a_name_are_refused() -> None:
    model = made("llama")
    model.model.layers[0].activations = [lambda x: 2 * x]
    with pytest.raises(InvalidArgument, match=r"'model\.layers\.0\.activations' is or holds the function .*lambda"):
        Identity.of(model)
    del model.model.layers[0].activations
    model.generate = lambda *_: None  # nothing that forward calls
    assert "state" not in identity(model)


# -- modules of other code ---------------------------------------------------------------------------------------
@dataclasses.dataclass
class Settings:
    scale: float = 1.0
    names: tuple[str, ...] = ("one",)


class Slotted:
    __slots__ = ("bias", "inner")

    def __init__(self) -> None:
        self.bias, self.inner = 0.0, Settings()


class Scaled:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, x: Any) -> Any:
        return x * self.factor


class Steering(torch.nn.Module):
    """What a user puts into a model: numbers that are set, and a memory that it writes while it computes."""

    def __init__(self) -> None:
        super().__init__()
        self._scale, self._name, self._on = 1.0, "one", True
        self._strengths, self._by_layer = (1.0, 2.0), {"a": [1.0]}
        self._settings, self._slotted, self.open = Settings(), Slotted(), Settings()
        self._act, self._shift = Scaled(1.0), torch.ones(4)
        self._seen, self._sizes, self._counts, self._buffer = 0, [], Settings(), torch.zeros(4)
        self._last: Any = None

    def forward(self, x: Any) -> Any:
        self._seen += 1
        self._sizes.append(x.shape[-1])
        self._counts.scale += 1
        self._buffer[0] = self._scale * self._shift[0]
        self._note(x)
        return self._act(x * self._scale) + self._slotted.bias

    def _note(self, x: Any) -> None:
        setattr(self, "_last", x.shape)  # noqa: B010 - as code does that has the name from elsewhere

    def set_scale(self, scale: float) -> None:
        self._scale = scale


def test_what_a_module_of_other_code_is_set_to_is_seen() -> None:
    model = made("llama")
    one = model.model.layers[1].mlp.act_fn = Steering()
    first = Identity.of(model)

    def in_shift() -> None:
        one._shift.data += 1

    changes: dict[str, Callable[[], Any]] = {
        "a number": lambda: one.set_scale(2.0),
        "a string": lambda: setattr(one, "_name", "two"),
        "a flag": lambda: setattr(one, "_on", False),
        "nothing": lambda: setattr(one, "_on", None),
        "a tuple": lambda: setattr(one, "_strengths", (1.0, 3.0)),
        "a list in a dict": lambda: one._by_layer["a"].append(2.0),
        "a field": lambda: setattr(one._settings, "scale", 2.0),
        "a tuple in a field": lambda: setattr(one._settings, "names", ("one", "two")),
        "a field of a public object": lambda: setattr(one.open, "scale", 2.0),
        "a slot": lambda: setattr(one._slotted, "bias", 0.5),
        "a field behind a slot": lambda: setattr(one._slotted.inner, "scale", 0.5),
        "an object in a list": lambda: one._by_layer["a"].append(Settings()),
        "its field": lambda: setattr(one._by_layer["a"][-1], "scale", 4.0),
        "what is called": lambda: setattr(one._act, "factor", 3.0),
        "another of its class": lambda: setattr(one, "_act", Scaled(4.0)),
        "a tensor": in_shift,
        "one more": lambda: setattr(one, "_more", 1),
    }
    seen = {first.digest()}
    for count, (what, change) in enumerate(changes.items(), 2):
        change()
        seen.add(Identity.of(model).digest())
        assert len(seen) == count, what
        assert identity(copy.deepcopy(model)) == identity(model), what


def test_what_code_writes_while_it_computes_is_no_state() -> None:
    model = made("llama")
    model.model.layers[1].mlp.act_fn = Steering()
    first = identity(model)
    for tokens in (5, 9):
        model(prompt(tokens))
        assert identity(model) == first


def test_a_class_of_other_code_keeps_its_name_when_it_is_loaded(tmp_path: Path) -> None:
    class Mine(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self._temper, self._settings = 1.0, Settings()

    model = Mine(made("llama").config).eval()
    first = identity(model)
    model.save_pretrained(tmp_path)
    again = Mine.from_pretrained(tmp_path)
    assert identity(again) == first
    again._temper = 2.0
    second = identity(again)
    again._settings.scale = 2.0
    assert len({str(each) for each in (first, second, identity(again))}) == 3


def test_defaults_and_closures_of_other_code_are_in_a_models_name() -> None:
    def mine(factor: float, shift: float) -> Any:
        class Mine(torch.nn.Module):
            def forward(self, x: Any, add: float = shift) -> Any:
                return x * factor + add

        return Mine()

    found = []
    for numbers in ((1.0, 1.0), (1.0, 2.0), (2.0, 1.0), (1.0, 1.0)):
        model = made("llama")
        model.model.layers[0].mlp.act_fn = mine(*numbers)
        found.append(Identity.of(model).digest())
    assert len(set(found)) == 3
    assert found[0] == found[3]


def test_a_patched_class_tells_of_private_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    monkeypatch.setattr(type(model.model.norm), "forward", steered)
    model.model.norm._strength = 1.0
    first = identity(model)
    model.model.norm._strength = 2.0
    assert identity(model) != first


# -- functions that are registered -------------------------------------------------------------------------------
def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float = 1.0, **_: Any) -> Any:
    return (query * scaling).transpose(1, 2), None


def no_mask(*_: Any, **__: Any) -> None: ...


@pytest.fixture
def tables() -> Iterator[dict[str, dict[str, Any]]]:
    """Those of transformers by name, as they were again afterwards."""
    from transformers import masking_utils, modeling_rope_utils, modeling_utils

    found = {
        "attention": modeling_utils.AttentionInterface._global_mapping,
        "local": modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping,
        "mask": masking_utils.AttentionMaskInterface._global_mapping,
        "rope": modeling_rope_utils.ROPE_INIT_FUNCTIONS,
    }
    kept = {name: dict(table) for name, table in found.items()}
    yield found
    for name, table in found.items():
        table.clear()
        table.update(kept[name])


@pytest.mark.parametrize(
    ("table", "name", "kind", "function"),
    [
        ("attention", "sdpa", "llama", attend),
        ("attention", "eager", "gpt-oss", attend),
        ("local", "sdpa", "llama", attend),
        ("mask", "sdpa", "gemma3", no_mask),
        ("rope", "dynamic", "llama, dynamic", no_mask),
        ("rope", "longrope", "phi3, longrope", no_mask),
    ],
)
def test_functions_registered_under_a_name_in_use_are_seen(
    tables: dict[str, dict[str, Any]], table: str, name: str, kind: str, function: Any
) -> None:
    model = made(kind)
    model.config._attn_implementation = "eager" if name == "eager" else "sdpa"
    first, own = identity(model), tables[table].get(name)
    seen = {str(first)}
    for other in (function, functools.partial(function, scaling=2.0), torch.no_grad()(steered), Called(1.0), Called(2.0)):
        tables[table][name] = other
        seen.add(str(identity(model)))
    assert len(seen) == 6
    tables[table][name] = lambda *_: None
    with pytest.raises(InvalidArgument, match=rf"\['{name}'\] was registered as .*lambda.*no name of its own"):
        Identity.of(model)
    tables[table].pop(name)
    tables[table] |= {} if own is None else {name: own}
    assert identity(model) == first


class Called:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.factor


def test_functions_registered_under_other_names_do_not_count(tables: dict[str, dict[str, Any]]) -> None:
    model = made("llama")
    first = identity(model)
    for table in tables.values():
        table["another"] = attend
    tables["rope"]["linear"] = attend
    tables["attention"]["flash_attention_2"] = attend
    assert identity(model) == first
    own = tables["attention"]["sdpa"]
    tables["attention"]["sdpa"] = tables["attention"]["flex_attention"]  # transformers' own, but not what it is called
    assert identity(model) != first
    tables["attention"]["sdpa"] = own
    assert identity(model) == first
    model.config._attn_implementation_internal = "another"
    assert identity(model)["attention"] == "another"
    assert "state" in identity(model)
