"""EncodedCache under attn_implementation="pqcodec": the logits of decoding, whatever is done to a cache, or a named error."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import sampled

from pqcodec import attention
from pqcodec.errors import InvalidArgument

transformers = pytest.importorskip("transformers")

from test_encoded_cache import SMALL, prompt, read_on  # noqa: E402
from test_encoded_cache import tiny as tiny_model  # noqa: E402

from pqcodec.formats.offload import code_attention  # noqa: E402
from pqcodec.formats.offload.encoded_cache import EncodedCache  # noqa: E402

KINDS = ("llama", "llama, one layer", "qwen2", "gemma3", "mistral", "gpt-neox")


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries were attended from codes, call by call."""
    found: list[int] = []
    real = attention.attend

    def noted(q: Any, *arguments: Any, **options: Any) -> Any:
        found.append(q.shape[-2])
        return real(q, *arguments, **options)

    monkeypatch.setattr(attention, "attend", noted)
    return found


def tiny(kind: str) -> Any:
    """A model on the CPU: on a GPU, old tokens are decoded whatever the attention."""
    return tiny_model(kind).cpu()


def caches(model: Any, **options: Any) -> tuple[EncodedCache, EncodedCache]:
    return EncodedCache(model, **{**SMALL, **options}), EncodedCache(model, **{**SMALL, **options})


def both_ways(model: Any, ways: tuple[Any, Any], ids: torch.Tensor, pieces: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits after decoding, and from codes."""
    model.set_attn_implementation("sdpa")
    decoded = read_on(model, ways[0], ids, pieces)
    model.set_attn_implementation("pqcodec")
    return decoded, read_on(model, ways[1], ids, pieces)


def check(found: tuple[torch.Tensor, torch.Tensor]) -> None:
    decoded, coded = found
    assert float((decoded - coded).abs().max()) <= 2e-5 * float(decoded.abs().max())


@pytest.mark.parametrize("preset", [*sampled(["quad3", "pq3"]), ("pq4", "quad2")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_decoding(kind: str, preset: Any, attended: list[int]) -> None:
    model, ids = tiny(kind), prompt(2, 80).cpu()
    ways = caches(model, preset=preset)
    for pieces in ([40], [1] * 10, [7, 3, 9], [1] * 5):  # a prompt, steps, a prompt in pieces
        check(both_ways(model, ways, ids, pieces))
        assert ways[0].get_seq_length() == ways[1].get_seq_length()
        assert ways[0].memory.encoded == ways[1].memory.encoded
    if kind == "mistral":
        assert not attended  # windows are bounded, and stay exact
    else:
        assert {1, 3, 7, 9} == set(attended)
        assert ways[1].memory.scratch == 0  # nothing was decoded


def test_what_is_done_to_a_cache_on_the_way(attended: list[int]) -> None:
    model, ids = tiny("llama"), prompt(3, 80).cpu()
    ways = caches(model, preset="quad3")
    for step, pieces in enumerate(([3], [30], [1] * 3, [5], [12], [1] * 4)):
        for cache in ways:
            cache.reorder_cache(torch.tensor([2, 0, 1]))
            cache.crop(-(3, 2, 9, 1, 14, 6)[step] if cache.get_seq_length() > 25 else 0)
        ids = ids[[2, 0, 1]]
        check(both_ways(model, ways, ids, pieces))
    copied = copy.deepcopy(ways[1])
    check((read_on(model, ways[1], ids, [1, 1]), read_on(model, copied, ids, [1, 1])))
    assert attended


def test_a_copy_follows_the_model_to_another_attention() -> None:
    model, ids = tiny("llama"), prompt(2, 80).cpu()
    model.set_attn_implementation("pqcodec")
    cache = EncodedCache(model, **SMALL)
    read_on(model, cache, ids, [40, 1])
    copied = copy.deepcopy(cache)
    model.set_attn_implementation("sdpa")
    for pieces in ([1], [3]):
        assert torch.equal(read_on(model, cache, ids, pieces), read_on(model, copied, ids, pieces))
    with pytest.raises(InvalidArgument, match="of encoded keys or values"):
        code_attention.CodedPart(code_attention.LayerTokens([], (torch.zeros(1, 1, 0, 64),) * 2, 0), 0)[:, :1]


def test_a_selection_of_nothing_is_nothing() -> None:
    cache = EncodedCache(tiny("llama"), **SMALL)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.get_seq_length() == 0


def test_chunks_that_are_cut_and_appended_to_are_decoded(attended: list[int]) -> None:
    """A chunk that was cut and has others behind it is no run of its streams' tokens."""
    model, ids = tiny("llama"), prompt(1, 90).cpu()
    ways = caches(model, preset="quad3")
    check(both_ways(model, ways, ids, [50]))
    for cache in ways:
        cache.crop(-20)
    check(both_ways(model, ways, ids, [1] * 20))
    layer = ways[1].encoded_layers[0]
    assert any(chunk.tokens < chunk.stored for chunk in layer._old.chunks[:-1])


def test_generation_and_padding(attended: list[int]) -> None:
    model, ids = tiny("llama"), prompt(2, 40).cpu()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for options, padded in (({}, None), ({"attention_mask": mask}, None), ({"attention_mask": mask}, mask)):
        texts = []
        for implementation in ("sdpa", "pqcodec"):
            model.set_attn_implementation(implementation)
            cache = EncodedCache(model, padding=padded, preset="quad3", **SMALL)
            texts.append(model.generate(ids, past_key_values=cache, max_new_tokens=20, min_new_tokens=20, **options))
        assert torch.equal(*texts)
        assert bool(attended) == (not options)  # a mask that hides padding needs tensors
        attended.clear()


def test_queries_that_need_gradients_are_given_tensors(attended: list[int]) -> None:
    """As where queries alone are trained, on keys that are kept."""
    model, ids = tiny("llama"), prompt(1, 60).cpu()
    gradients = []
    for implementation in ("sdpa", "pqcodec"):
        model.set_attn_implementation(implementation)
        cache = EncodedCache(model, preset="quad3", **SMALL)
        read_on(model, cache, ids, [40])
        weights = model.requires_grad_(False).model.layers[-1].self_attn.q_proj.weight.requires_grad_(True)
        with torch.enable_grad():
            read_on(model, cache, ids, [2]).square().sum().backward()
        gradients.append(weights.grad)
        weights.grad = None
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_a_compiled_model_attends_from_codes(attended: list[int]) -> None:
    model, ids = tiny("llama, one layer"), prompt(1, 60).cpu()
    ways = caches(model, preset="quad3")
    check(both_ways(model, ways, ids, [40]))
    compiled = torch.compile(model, backend="eager")
    model.set_attn_implementation("sdpa")
    decoded = read_on(model, ways[0], ids, [1])
    model.set_attn_implementation("pqcodec")
    check((decoded, read_on(compiled, ways[1], ids, [1])))
    assert attended == [1]


def test_other_uses_of_codes_raise() -> None:
    model, ids = tiny("llama"), prompt(1, 60).cpu()
    model.set_attn_implementation("pqcodec")
    cache = EncodedCache(model, preset="quad3", **SMALL)
    read_on(model, cache, ids, [40])
    new = torch.zeros(1, 2, 1, 16)
    keys, values = cache.update(new, new, 0)
    assert keys.shape == values.shape == (1, 2, 41, 16)
    assert (keys.dtype, keys.device) == (new.dtype, new.device)
    for use in (lambda: torch.zeros(1, 2, 1, 16) @ keys, lambda: torch.cat([keys, new], 2), lambda: keys.mT, lambda: keys[0]):
        with pytest.raises((InvalidArgument, TypeError)):
            use()
    with pytest.raises(InvalidArgument, match="set_attn_implementation"):
        torch.matmul(new, keys)
    with pytest.raises(InvalidArgument, match="s_aux"):
        code_attention.attend_to_layer(lambda *_, **__: None, None, new, keys, values, None, s_aux=new)
    for option in ({"dropout": 0.5}, {"position_bias": new}, {"sliding_window": 3}):
        given = code_attention.attend_to_layer(lambda *arguments, **_: arguments, None, new, keys, values, None, **option)
        assert all(isinstance(x, torch.Tensor) and x.shape == keys.shape for x in given[2:4])
    model._supports_sdpa = False
    with pytest.raises(InvalidArgument, match="does not know 'sdpa'"):
        EncodedCache(model, **SMALL)
