"""Whatever the family of models and whatever is asked, a store's answer is the model's own, or a refusal: never another one.

Logits are compared, not tokens. CI takes some families; ``PQCODEC_ALL=1 pytest tests/test_families.py`` takes all.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL, not_always

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines import transformers_cache as tc
from pqcodec.formats.store import PrefixStore

transformers = pytest.importorskip("transformers")
from families import FAMILIES, CannotBuild, build  # noqa: E402

transformers.logging.set_verbosity_error()
ALWAYS = {"llama", "gemma3_text", "mamba2", "jamba", "deepseek_v3", "bert", "qwen3_next", "rwkv"}
FEWEST = 110  # families of transformers 5.24 whose prompts are found again
TOLERANCE = 2e-3  # of the logits' norm
ASKED = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
helped: set[str] = set()
seen: set[str] = set()


def ids_of(tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 100, (1, tokens), generator=torch.Generator().manual_seed(seed))


def model_of(family: str) -> Any:
    try:
        model = build(family)
        model.generate(ids_of(20), **ASKED)
    except CannotBuild as error:
        pytest.skip(str(error))
    except Exception as error:  # of any kind: it is the family's code that runs
        pytest.skip(f"{family} does not generate by itself: {error!r:.120}")
    return model


def check_like(found: Any, expected: Any) -> None:
    """The same logits at every step, for as long as the texts are the same: a tie may be broken otherwise."""
    assert found.sequences.shape[0] == expected.sequences.shape[0]
    prompt = expected.sequences.shape[1] - len(expected.logits)
    for step, (x, y) in enumerate(zip(found.logits, expected.logits, strict=False)):
        error = float((x - y).norm() / y.norm().clamp(min=1e-30))
        assert error <= TOLERANCE, f"step {step}: the logits' relative error is {error:.2g}"
        if not torch.equal(found.sequences[:, prompt + step], expected.sequences[:, prompt + step]):
            return
    assert torch.equal(found.sequences, expected.sequences)


def answered(store: PrefixStore, model: Any, ids: torch.Tensor, **options: Any) -> Any:
    """What a store answers, held against the model; None where it refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            found = store.generate(model, ids, wait=True, **{**ASKED, **options})
        except InvalidArgument:
            return None
        torch.manual_seed(0)
        expected = model.generate(ids, **{**ASKED, **options})
    check_like(found, expected)
    return found


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrefixStore]:
    with PrefixStore(tmp_path / "store", preset="exact") as made:
        yield made


@pytest.mark.parametrize("family", [f for i, f in enumerate(FAMILIES) if ALL or i % 14 == 0 or f in ALWAYS])
def test_every_family_is_answered_as_by_itself(family: str, store: PrefixStore) -> None:
    """A prompt, the same again, a second turn, a branch in the middle, and a cache taken and gone on with by hand."""
    model = model_of(family)
    seen.add(family)
    ids = ids_of(300)
    first = answered(store, model, ids)
    if first is None:
        assert not store.shelf.index.all(), "a refusal comes before anything is kept"
        return
    answered(store, model, ids)
    second = torch.cat([first.sequences, ids_of(20, 2)], 1)
    answered(store, model, second)
    answered(store, model, torch.cat([ids[:, :200], ids_of(90, 3)], 1))
    if store.shelf.index.all():
        cache, length = store.get(model, second)
        if length:
            helped.add(family)
            check_like(
                model.generate(second, **ASKED, **{tc.argument_of(model): cache}),
                model.generate(second, **ASKED),
            )


@not_always
def test_most_families_are_helped() -> None:
    assert len(helped) >= FEWEST, f"{len(helped)} of {len(seen)}: not {sorted(seen - helped)}"


def test_a_pad_token_inside_of_a_prompt_is_left_out_as_generate_does(store: PrefixStore) -> None:
    """Unless a mask says that it is text."""
    model, ids = model_of("llama"), ids_of(300)
    ids[0, 100] = model.generation_config.pad_token_id
    assert answered(store, model, ids) is not None
    assert not store.shelf.index.all()
    for _ in range(2):
        assert answered(store, model, ids, attention_mask=torch.ones_like(ids)) is not None
    assert store.shelf.index.all()


def test_none_overrides_what_the_config_of_a_model_asks_for(store: PrefixStore) -> None:
    model, ids = copy.deepcopy(model_of("llama")), ids_of(300)
    model.generation_config.eos_token_id = int(answered(store, model, ids).sequences[0, 300])
    for options in ({}, {"eos_token_id": None}, {"suppress_tokens": None, "eos_token_id": None}):
        assert answered(store, model, ids, **options) is not None


def test_a_model_is_tried_on_tokens_that_differ_and_again_when_it_changes(store: PrefixStore) -> None:
    """Whatever the first prompt was: alike tokens have alike values, behind which no one sees who looks at whom."""
    model, ids = copy.deepcopy(model_of("llama")), ids_of(300)
    assert answered(store, model, ids[:, :1]) is not None
    assert answered(store, model, ids) is not None
    model.config.is_causal = False
    assert answered(store, model, torch.cat([ids, ids_of(30, 2)], 1)) is not None
    with pytest.raises(InvalidArgument, match="depend on the tokens behind them"):
        store.get(model, ids)


class Streamer:
    def put(self, tokens: torch.Tensor) -> None: ...

    def end(self) -> None: ...


TAKEN: list[dict[str, Any]] = [
    {"attention_mask": torch.ones(1, 300, dtype=torch.long)},
    {"do_sample": True, "temperature": 0.8, "top_k": 5},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"max_new_tokens": None, "max_length": 303},
    {"min_new_tokens": 3, "eos_token_id": 5},
    {"num_beams": 3},
    {"num_return_sequences": 2, "do_sample": True},
    {"output_hidden_states": True},
    {"output_attentions": True},
    {"streamer": Streamer()},
    {"logits_processor": [lambda _, scores: scores.roll(1, -1)]},
    {"generation_config": transformers.GenerationConfig(**ASKED, suppress_tokens=[7])},
    {"use_cache": True, "cache_implementation": None},
]
REFUSED: list[dict[str, Any]] = [
    {"prompt_lookup_num_tokens": 3},
    {"assistant_model": object()},
    {"position_ids": torch.arange(1000, 1300)[None]},
    {"inputs_embeds": torch.zeros(1, 300, 64)},
    {"token_type_ids": torch.ones(1, 300, dtype=torch.long)},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"past_key_values": transformers.DynamicCache()},
    {"attention_mask": torch.tensor([[0] * 5 + [1] * 295])},
    {"attention_mask": torch.ones(1, 299, dtype=torch.long)},
    {"prefill_chunk_size": 64},
    {"custom_generate": "somewhere/else"},
    {"token_healing": True},
    {"generation_config": transformers.GenerationConfig(prompt_lookup_num_tokens=3)},
    {"generation_config": transformers.GenerationConfig(cache_implementation="static")},
    {"anything_new": 1},
]


def told(options: dict[str, Any]) -> str:
    return ", ".join(options)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"] if ALL else ["gemma3_text"])
@pytest.mark.parametrize("options", TAKEN, ids=told)
def test_options_that_are_taken_give_the_models_own_answer(store: PrefixStore, family: str, options: dict[str, Any]) -> None:
    model, ids = model_of(family), ids_of(300)
    for _ in range(2):
        assert answered(store, model, ids, **options) is not None
    again = {name: value for name, value in options.items() if name not in ("attention_mask", "max_length", "max_new_tokens")}
    assert answered(store, model, torch.cat([ids, ids_of(20, 2)], 1), **again) is not None


@pytest.mark.parametrize("options", REFUSED, ids=told)
def test_other_options_are_refused_by_name_before_anything_is_computed(store: PrefixStore, options: dict[str, Any]) -> None:
    model, fed = build("llama"), 0

    def count(*_: Any) -> None:
        nonlocal fed
        fed += 1

    name = next(iter(options))
    hook = model.lm_head.register_forward_pre_hook(count)
    try:
        with pytest.raises(InvalidArgument, match="mask" if name == "attention_mask" else name):
            store.generate(model, ids_of(300), **options)
    finally:
        hook.remove()
    assert not fed
    assert not store.shelf.index.all()


def test_a_prompt_beyond_a_switch_of_rope_is_computed_by_the_model_alone(store: PrefixStore) -> None:
    """LongRoPE's long factors hold for all of a prompt that is longer than the original context, not from there on."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)]}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Phi3Config(
        vocab_size=120,
        **sizes,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        original_max_position_embeddings=2500,
        rope_parameters={**rope, "original_max_position_embeddings": 2500},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    for tokens in (2490, 2600):
        assert answered(store, model, ids_of(tokens), max_new_tokens=20) is not None


def test_a_state_is_never_given_to_generate_that_would_feed_it_again(store: PrefixStore) -> None:
    model, ids = model_of("mamba"), ids_of(60)
    store.put(model, ids[:, :40], answered_cache(model, ids[:, :40]))
    cache, length = store.get(model, ids)
    assert length == 0, "transformers takes up a state of Mamba when one token is fed, not twenty"
    cache, length = store.get(model, ids, stepwise=True)
    assert length == 40
    with torch.no_grad():
        model(input_ids=ids[:, 40:41], **{tc.argument_of(model): cache})
    with pytest.raises(InvalidArgument, match="feed what follows to the model yourself"):
        model.generate(ids, **{tc.argument_of(model): cache})


def answered_cache(model: Any, ids: torch.Tensor) -> Any:
    cache = tc.empty_cache(model.config)
    with torch.no_grad():
        model(input_ids=ids, **{tc.argument_of(model): cache})
    return cache
