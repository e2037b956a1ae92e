"""Prompts with images: a store's answer is the model's own, whatever is shown, asked again, gone on with or changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pqcodec.errors import InvalidArgument
from pqcodec.formats.store import PrefixStore

transformers = pytest.importorskip("transformers")
from families import distinct  # noqa: E402
from test_families import ASKED, answered, answered_cache, check_like, ids_of  # noqa: E402

IMAGE = 110  # the token that stands for a patch
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"vocab_size": 120, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048}


def llava() -> Any:
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=transformers.CLIPVisionConfig(**VISION, image_size=32, patch_size=8),
            text_config=transformers.LlamaConfig(**TEXT),
            image_token_id=IMAGE,
            image_seq_length=16,
            vision_feature_layer=-1,
        )
    )


def gemma3() -> Any:
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            vision_config=transformers.SiglipVisionConfig(**VISION, image_size=32, patch_size=8),
            text_config=transformers.Gemma3TextConfig(
                **TEXT, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
            ),
            image_token_id=IMAGE,
            mm_tokens_per_image=16,
            boi_token_id=111,
            eoi_token_id=112,
        )
    )


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2},
            text_config={**TEXT, "rope_parameters": rope},
            image_token_id=IMAGE,
            video_token_id=113,
            vision_start_token_id=111,
            vision_end_token_id=112,
        )
    )


MODELS = {"llava": llava, "gemma3": gemma3, "qwen2-vl": qwen2_vl}


def made(kind: str) -> Any:
    torch.manual_seed(0)
    return distinct(MODELS[kind]().eval())


def shown(kind: str, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    if kind == "qwen2-vl":
        return {
            "pixel_values": torch.randn(16, 3 * 2 * 8 * 8, generator=generator),
            "image_grid_thw": torch.tensor([[1, 4, 4]]),
        }
    return {"pixel_values": torch.randn(1, 3, 32, 32, generator=generator)}


def prompt_of(kind: str, seed: int = 1) -> torch.Tensor:
    patches = 4 if kind == "qwen2-vl" else 16
    inside = torch.tensor([[111, *[IMAGE] * patches, 112]])
    return torch.cat([ids_of(9, seed), inside, ids_of(300, seed + 1)], 1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrefixStore]:
    with PrefixStore(tmp_path / "store", preset="exact") as made_here:
        yield made_here


@pytest.mark.parametrize("kind", MODELS)
def test_a_prompt_with_an_image_is_answered_as_by_itself(store: PrefixStore, kind: str) -> None:
    model, ids = made(kind), prompt_of(kind)
    one, other = shown(kind, 1), shown(kind, 2)
    first = answered(store, model, ids, **one)
    for image in (one, other, one, {}):  # again, another image under the same tokens, and none
        answered(store, model, ids, **image) if image or kind == "qwen2-vl" else None
    second = torch.cat([first.sequences, ids_of(20, 5)], 1)
    for image in (one, other):
        assert answered(store, model, second, **image) is not None
    branch = torch.cat([ids[:, :40], ids_of(30, 7)], 1)
    assert answered(store, model, branch, **one) is not None
    assert bool(store.shelf.index.all()) == (kind != "qwen2-vl"), "M-RoPE's positions are kept in the model: it answers alone"


def test_a_text_behind_an_image_has_a_texts_positions(store: PrefixStore) -> None:
    """Qwen2-VL keeps how far an image's positions are from its tokens' numbers, and takes it for the next text's."""
    model, image = made("qwen2-vl"), prompt_of("qwen2-vl")
    types = {"mm_token_type_ids": (image == IMAGE).long()}
    for text in (ids_of(300, 3), torch.cat([ids_of(300, 3), ids_of(30, 4)], 1)):
        assert answered(store, model, image, **shown("qwen2-vl", 1), **types) is not None
        assert int(model.model.rope_deltas) < 0
        assert answered(store, model, text) is not None
    answered(store, model, image, **shown("qwen2-vl", 1), **types)
    cache, length = store.get(model, ids_of(300, 3))
    assert length == 299
    found = model.generate(ids_of(300, 3), **ASKED, past_key_values=cache)
    check_like(found, model.generate(ids_of(300, 3), **ASKED))


def test_types_that_tell_of_nothing_shown_are_a_texts(store: PrefixStore) -> None:
    model, ids = made("qwen2-vl"), ids_of(300, 3)
    for _ in range(2):
        assert answered(store, model, ids, mm_token_type_ids=torch.zeros_like(ids)) is not None
    assert store.get(model, ids).length == 299


@pytest.mark.parametrize("kind", ["llava", "gemma3"])
def test_an_image_is_not_computed_again(store: PrefixStore, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, image = made(kind), prompt_of(kind), shown(kind, 1)
    first = store.generate(model, ids, wait=True, **ASKED, **image)
    second = torch.cat([first.sequences, ids_of(20, 5)], 1)
    store.generate(model, second, wait=True, **ASKED, **image)  # which also tries once whether the text goes on alone
    seen = 0
    get_image_features = type(model.model).get_image_features

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        return get_image_features(*args, **options)

    monkeypatch.setattr(type(model.model), "get_image_features", counted)
    store.generate(model, torch.cat([second, ids_of(20, 6)], 1), wait=True, **ASKED, **image)
    assert not seen


def test_what_is_shown_has_to_be_told_by_hand(store: PrefixStore) -> None:
    model, ids = made("llava"), prompt_of("llava")
    with pytest.raises(InvalidArgument, match="pass a digest of it as extra"):
        store.get(model, ids)
    with pytest.raises(InvalidArgument, match="pass a digest of it as extra"):
        store.put(model, ids, answered_cache(model, ids))
    assert store.get(model, ids, extra="a digest").length == 0


def test_types_of_tokens_are_those_of_the_prompt(store: PrefixStore) -> None:
    model, ids, image = made("gemma3"), prompt_of("gemma3"), shown("gemma3", 1)
    types = (ids == IMAGE).long()
    assert answered(store, model, ids, **image) is not None  # whose patches do not see each other
    for _ in range(2):
        assert answered(store, model, ids, token_type_ids=types, **image) is not None
    with pytest.raises(InvalidArgument, match="token_type_ids"):
        store.generate(model, ids, token_type_ids=1 - types, **image)
