"""State that a model keeps in its modules goes with the cache: M-RoPE's ``rope_deltas``, without which positions are wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, rel_mse

from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats import PQKVFile, save_cache
from pqcodec.formats.engines import transformers_cache as tc

transformers = pytest.importorskip("transformers")

from pqcodec.formats.engines.transformers_cache import files  # noqa: E402
from pqcodec.formats.offload.encoded_cache import EncodedCache  # noqa: E402

IMAGE, START, END = 90, 91, 92
GRID = (1, 8, 12)  # patches of an image; 24 tokens, 6 positions
TEXT = {
    **TINY,
    "num_hidden_layers": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
}
IDS = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 93}
VISION: dict[str, dict[str, Any]] = {
    "Qwen2VL": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4},
    "Qwen2_5_VL": {
        **{"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32, "patch_size": 4},
        **{"window_size": 16, "fullatt_block_indexes": [0]},
    },
    "Qwen3VL": {
        **{"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32, "patch_size": 4},
        **{"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    },
    "Glm4v": {
        **{"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 32, "patch_size": 4},
        **{"image_size": 32},
    },
}


def built(kind: str = "Qwen2VL") -> Any:
    """A model with random weights, always the same, that has read nothing."""
    text = {**TEXT, "head_dim": 16} if kind == "Qwen3VL" else TEXT
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=VISION[kind], **IDS)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)  # outputs that tell positions apart
    model.generation_config.eos_token_id = None
    return model


def text(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (1, tokens), generator=torch.Generator().manual_seed(seed))


def image_prompt(model: Any) -> dict[str, Any]:
    vision = model.config.vision_config
    patches = GRID[1] * GRID[2]
    pixels = torch.randn(
        patches, 3 * vision.temporal_patch_size * vision.patch_size**2, generator=torch.Generator().manual_seed(1)
    )
    image = torch.tensor([[START, *[IMAGE] * (patches // vision.spatial_merge_size**2), END]])
    ids = torch.cat([text(8), image, text(6, seed=1)], 1)
    return {
        "input_ids": ids,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([GRID]),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


@torch.no_grad()
def read(model: Any, cache: Any, **inputs: Any) -> torch.Tensor:
    return model(**inputs, use_cache=True, **{tc.argument_of(model): cache}).logits


def after_image(kind: str = "Qwen2VL") -> tuple[Any, Any]:
    model = built(kind)
    cache = tc.empty_cache(model.config)
    read(model, cache, **image_prompt(model))
    return model, cache


@pytest.mark.parametrize("kind", VISION)
def test_a_fresh_model_reads_on_behind_an_image(tmp_path: Path, kind: str) -> None:
    model, cache = after_image(kind)
    ((name, deltas),) = tc.module_state(model).items()
    assert name == "model.rope_deltas"
    assert int(deltas) < 0
    tc.save(cache, tmp_path / "a.pqkv", model, preset="pq6")
    fresh = built(kind)
    again = tc.load(tmp_path / "a.pqkv", fresh)
    assert torch.equal(tc.module_state(fresh)[name], deltas)
    for mine, other in zip(cache.layers, again.layers, strict=True):
        other.keys, other.values = mine.keys.clone(), mine.values.clone()  # all but the coding's error
    for tokens in (1, 5):
        more = text(tokens, seed=tokens)
        assert torch.equal(read(model, cache, input_ids=more), read(fresh, again, input_ids=more))


@pytest.mark.parametrize("extension", ["pqkv", "safetensors", "zarr"])
def test_the_deltas_of_another_text_are_replaced(tmp_path: Path, extension: str) -> None:
    """In every container: a text's cache in a model that has seen an image since, and the other way about."""
    if extension != "pqkv":
        pytest.importorskip(extension)
    path, plain = tmp_path / f"a.{extension}", built()
    cache = tc.empty_cache(plain.config)
    read(plain, cache, input_ids=text(30))
    tc.save(cache, path, plain, preset="pq6")
    expected = read(plain, cache, input_ids=text(4, seed=2))
    used, _ = after_image()
    assert rel_mse(expected, read(used, tc.load(path, used), input_ids=text(4, seed=2))) < 0.02
    assert tc.module_state(used) == {"model.rope_deltas": None}


def test_generate_goes_on_behind_an_image(tmp_path: Path) -> None:
    model, options = built(), {"do_sample": False, "max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    inputs = image_prompt(model)
    first = model.generate(**inputs, **options)
    cache = getattr(first, tc.argument_of(model))
    tc.save(cache, tmp_path / "a.pqkv", model, preset="pq6")
    fresh = built()
    again = tc.load(tmp_path / "a.pqkv", fresh)
    ids = torch.cat([first.sequences, text(5, seed=3)], 1)
    name = tc.argument_of(model)
    expected = model.generate(input_ids=ids, **{name: cache}, **options).logits[0]
    assert rel_mse(expected, fresh.generate(input_ids=ids, **{name: again}, **options).logits[0]) < 0.02


def test_an_encoded_cache_goes_on_behind_an_image() -> None:
    model = built()
    found = []
    for cache in (tc.empty_cache(model.config), EncodedCache(model, preset="pq6", window=4, chunk=8)):
        read(model, cache, **image_prompt(model))
        found.append(read(model, cache, input_ids=text(5, seed=4)))
    assert rel_mse(*found) < 0.02


def test_what_would_be_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = after_image()
    path = tmp_path / "a.pqkv"
    with pytest.raises(InvalidArgument, match=r"qwen2_vl keeps state of its cache in its modules .* pass the model"):
        tc.save(cache, path, model.config)
    model.model.rope_deltas = torch.zeros(2, 1, dtype=torch.long)
    with pytest.raises(InvalidArgument, match="rope_deltas is of 2 sequences and the cache of 1"):
        tc.save(cache, path, model)
    model.model.rope_deltas = [1]
    with pytest.raises(InvalidArgument, match=r"model\.rope_deltas = list, which pqcodec cannot save"):
        tc.save(cache, path, model)
    assert not path.exists()
    model.model.rope_deltas = torch.tensor([[-18]])
    tc.save(cache, path, model)
    for nothing in (None, model.config):
        with pytest.raises(InvalidArgument, match="with the model itself"):
            tc.load(path, nothing)
    with PQKVFile(path) as file:
        assert file.metadata[tc.KEY]["format"] == 2
    monkeypatch.setattr(files, "FORMATS", (1,))  # as a reader of today's format alone says
    with pytest.raises(UnsupportedStream, match=r"format 2 of .*install a newer pqcodec"):
        tc.load(path, built())


def test_a_file_of_an_older_writer_is_refused_for_such_a_model_alone(tmp_path: Path) -> None:
    model, cache = after_image()
    pieces = [(layer.keys, layer.values) for layer in cache.layers]
    told = files.cache_metadata(tc.state_of(cache), {})
    path = tmp_path / "a.pqkv"
    save_cache(path, pieces, metadata={tc.KEY: told, files.MODEL: {}})
    for asked in (model, model.config):
        with pytest.raises(InvalidArgument, match=r"by an older pqcodec without .*compute the cache anew"):
            tc.load(path, asked)
    assert tc.load(path).get_seq_length() == cache.get_seq_length()
    for members in (None, [], {"model.rope_deltas": 1.5}, {"model.rope_deltas": "tensor"}):
        save_cache(path, pieces, metadata={tc.KEY: {**told, "format": 2, "module_state": members}, files.MODEL: {}})
        with pytest.raises((CorruptStream, InvalidArgument)):
            tc.load(path, built())
    save_cache(
        path, pieces, metadata={tc.KEY: {**told, "format": 2, "module_state": {"other.rope_deltas": None}}, files.MODEL: {}}
    )
    with pytest.raises(InvalidArgument, match=r"\['other\.rope_deltas'\]; this model's modules have \['model.rope_deltas'\]"):
        tc.load(path, built())


def test_who_keeps_such_state() -> None:
    model = built()
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, num_hidden_layers=1))
    assert tc.keeps_module_state(model)
    assert tc.keeps_module_state(model.config)
    assert not tc.keeps_module_state(model.config.get_text_config())
    assert not tc.keeps_module_state(plain)
    assert not tc.keeps_module_state(plain.config)
    assert tc.module_state(plain) == tc.module_state(model.config) == {}
    compiled = torch.compile(model, backend="eager")
    assert tc.module_state(compiled) == {"model.rope_deltas": None}
    tc.restore_module_state(compiled, {"model.rope_deltas": torch.tensor([[3]])})
    state = tc.module_state(model)
    assert state == {"model.rope_deltas": torch.tensor([[3]])}
    state["model.rope_deltas"] += 1
    assert tc.module_state(copy.deepcopy(model)) == {"model.rope_deltas": torch.tensor([[3]])}
