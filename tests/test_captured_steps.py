"""Attention from codes of an ``EncodedCache`` on a GPU, and its steps as CUDA graphs: the same logits as after decoding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from conftest import needs_cuda
from test_encoded_cache import prompt, read_on

from pqcodec import attend_layer
from pqcodec.errors import InvalidArgument
from pqcodec.formats.offload import CapturedSteps, EncodedCache

SMALL: dict[str, Any] = {"window": 16, "chunk": 32, "exact_tokens": 4, "preset": "quad3"}
# Errors of logits, of the largest one: after some layers, a thousandth in one of them decides otherwise how some numbers of the
# next layer's new tokens are encoded.
LARGEST = {torch.float32: 1e-2, torch.bfloat16: 4e-2}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries were attended from codes, launch by launch."""
    found: list[int] = []
    real = attend_layer.AttendLayer.run

    def noted(self: Any, query: Any, *arguments: Any) -> Any:
        found.append(query.shape[-2])
        return real(self, query, *arguments)

    monkeypatch.setattr(attend_layer.AttendLayer, "run", noted)
    return found


def tiny(dtype: torch.dtype = torch.float32, device: str = "cuda", kind: str = "Llama", **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 100,
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
    }
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **more}, attn_implementation="pqcodec")
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval().to(device, dtype)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


@needs_cuda
@pytest.mark.parametrize("preset", ["quad3", ("quad3.5", "quad2")], ids=str)
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_logits_are_those_of_decoding(dtype: torch.dtype, kind: str, preset: Any, launches: list[int]) -> None:
    model, ids = tiny(dtype, kind=kind), prompt(2, 300)
    ways = [EncodedCache(model, place="device", **{**SMALL, "preset": preset}) for _ in range(2)]
    for pieces in ([100], [1] * 70, [4, 3, 2, 9, 40], [1] * 5):  # a prompt, steps, a prompt in pieces
        model.set_attn_implementation("sdpa")
        wanted = read_on(model, ways[0], ids, pieces)
        model.set_attn_implementation("pqcodec")
        assert error(read_on(model, ways[1], ids, pieces), wanted) <= LARGEST[dtype]
        assert ways[0].memory.encoded == ways[1].memory.encoded
    assert {1, 2, 3, 4} == set(launches)


@needs_cuda
def test_what_is_done_to_a_cache_on_the_way(launches: list[int]) -> None:
    model, ids = tiny(), prompt(3, 400)
    ways = [EncodedCache(model, place="device", **SMALL) for _ in range(2)]
    for step, pieces in enumerate(([80], [3], [60], [1] * 3, [5], [1] * 40, [1] * 4)):
        for cache in ways:
            if cache.get_seq_length() > 25:
                cache.reorder_cache(torch.tensor([2, 0, 1]))
                cache.crop(-(3, 2, 9, 1, 14, 40, 6)[step])
        ids = ids[[2, 0, 1]]
        model.set_attn_implementation("sdpa")
        wanted = read_on(model, ways[0], ids, pieces)
        model.set_attn_implementation("pqcodec")
        assert error(read_on(model, ways[1], ids, pieces), wanted) <= LARGEST[torch.float32]
    copied = copy.deepcopy(ways[1])
    assert error(read_on(model, ways[1], ids, [1, 1]), read_on(model, copied, ids, [1, 1])) == 0
    assert launches


@needs_cuda
@pytest.mark.parametrize("batch", [1, 3])
def test_captured_steps_give_the_same_logits_and_count(batch: int) -> None:
    model, ids = tiny(), prompt(batch, 400)
    plain, captured = (EncodedCache(model, place="device", **SMALL) for _ in range(2))
    for cache in (plain, captured):
        read_on(model, cache, ids, [100])
    wanted = read_on(model, plain, ids, [1] * 150)
    with CapturedSteps(model, captured) as steps:
        found = read_on(model, captured, ids, [1] * 150)
    assert error(found, wanted) <= 1e-5
    assert plain.get_seq_length() == captured.get_seq_length()
    assert plain.memory.encoded == captured.memory.encoded
    assert steps.replays >= 150 - 4 * (150 // SMALL["chunk"] + 1)  # two steps of each chunk run as they are
    read_on(model, plain, ids, [2, 1]), read_on(model, captured, ids, [2, 1])
    assert "forward" not in vars(model)


@needs_cuda
def test_a_text_is_the_same_and_others_uses_are_served() -> None:
    model, ids = tiny(), prompt(2, 120)
    options: dict[str, Any] = {"max_new_tokens": 90, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    caches = [EncodedCache(model, place="device", **SMALL) for _ in range(2)]
    wanted = model.generate(ids, cache=caches[0], **options)
    with CapturedSteps(model, caches[1]) as steps:
        assert torch.equal(model.generate(ids, cache=caches[1], **options), wanted)
        assert steps.replays > 60
        other = EncodedCache(model, place="device", **SMALL)
        before = steps.replays
        assert torch.equal(model.generate(ids, cache=other, **options), wanted)
        assert steps.replays == before
        assert steps.why
        caches[1].crop(-10)  # what was captured does not stand for what is there now
        mask = torch.ones_like(wanted[:, :-9])
        again = model.generate(wanted[:, :-9], attention_mask=mask, cache=caches[1], **{**options, "max_new_tokens": 9})
        assert again.shape == wanted.shape
        model(ids[:, :1], cache=caches[1])
        assert "called with" in (steps.why or "")


@needs_cuda
def test_a_model_that_changes_is_not_replayed() -> None:
    model, ids = tiny(), prompt(1, 200)
    plain, captured = (EncodedCache(model, place="device", **SMALL) for _ in range(2))
    wanted = [read_on(model, plain, ids, [100] + [1] * 5)]
    with CapturedSteps(model, captured) as steps:
        found = [read_on(model, captured, ids, [100] + [1] * 5)]
        handle = model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
        wanted.append(read_on(model, plain, ids, [1] * 5))
        before = steps.replays
        found.append(read_on(model, captured, ids, [1] * 5))
        assert before < steps.replays < before + 5
        handle.remove()
        model.model.embed_tokens.weight.data *= 1.5  # weights are read where they lie
        wanted.append(read_on(model, plain, ids, [1] * 5))
        found.append(read_on(model, captured, ids, [1] * 5))
    for one, other in zip(found, wanted, strict=True):
        assert error(one, other) <= 1e-5


@needs_cuda
def test_beams_are_served() -> None:
    model, ids = tiny(), prompt(1, 120)
    options: dict[str, Any] = {"max_new_tokens": 20, "num_beams": 3, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(ids, cache=EncodedCache(model, place="device", **SMALL), **options)
    cache = EncodedCache(model, place="device", **SMALL)
    with CapturedSteps(model, cache):
        assert torch.equal(model.generate(ids, cache=cache, **options), wanted)


def test_caches_that_no_graph_can_stand_for_are_refused() -> None:
    model = tiny(device="cpu")
    with pytest.raises(InvalidArgument, match="place='device'"):
        CapturedSteps(model, EncodedCache(model, **SMALL))
    with pytest.raises(InvalidArgument, match="DynamicCache; an EncodedCache is expected"):
        CapturedSteps(model, transformers.DynamicCache())  # type: ignore[arg-type]
    windows = tiny(device="cpu", kind="Mistral", sliding_window=16)
    with pytest.raises(InvalidArgument, match="sliding windows"):
        CapturedSteps(windows, EncodedCache(windows, place="device", **SMALL))


def test_on_a_cpu_steps_run_as_ever() -> None:
    model = tiny(device="cpu")
    cache, ids = EncodedCache(model, place="device", **SMALL), prompt(1, 110).cpu()
    plain = EncodedCache(model, place="device", **SMALL)
    with CapturedSteps(model, cache) as steps:
        found = read_on(model, cache, ids, [100, 1, 1])
        assert not steps.replays
        assert "a step of one token on a GPU is expected" in (steps.why or "")
    assert torch.equal(found, read_on(model, plain, ids, [100, 1, 1]))
