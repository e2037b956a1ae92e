"""EncodedCache: the text of the exact cache up to the preset's error, whatever is done to a cache on the way."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, GPU, TINY, gaussian, needs_triton, not_always, rel_mse

import pqcodec
from pqcodec.errors import InvalidArgument, NonFiniteInput
from pqcodec.stream.header import read_header
from pqcodec.stream.source import source_of

transformers = pytest.importorskip("transformers")

from pqcodec.formats.engines import transformers_cache as tc  # noqa: E402
from pqcodec.formats.offload import old_tokens, workspace  # noqa: E402
from pqcodec.formats.offload.encoded_cache import EncodedCache  # noqa: E402

PROMPT, MORE = 40, 24
SMALL = {"window": 4, "chunk": 8, "exact_tokens": 2}
COMMON = {**TINY, "num_hidden_layers": 3}
MIXED = ["sliding_attention", "full_attention", "full_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, one layer": ("Llama", {"num_hidden_layers": 1}),
    "llama, two layers": ("Llama", {"num_hidden_layers": 2}),
    "qwen2": ("Qwen2", {}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "gemma3": ("Gemma3", {"layer_types": MIXED, "sliding_window": 16, "head_dim": 16}),
    "gpt-neox": ("GPTNeoX", {"rotary_pct": 0.5}),
}
# Of tensors of the CPU both places are its memory; Triton's kernels, interpreted, take the ways of a GPU.
PLACES = ("host", "device")
WAYS = [pytest.param({"place": place}, id=place) for place in (PLACES if GPU else PLACES[:1])]
INTERPRETED = [
    pytest.param({"place": place, "backend": "triton"}, id=f"{place}, triton", marks=[needs_triton, *marks])
    for place, marks in zip(PLACES, ([not_always], []), strict=True)
]
ALL_WAYS = WAYS if GPU else [*WAYS, *INTERPRETED]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**SMALL, **request.param}


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def tiny(kind: str) -> Any:
    name, more = MODELS[kind]
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config_class(**{**COMMON, **more})).eval().to(DEVICE)


def prompt(batch: int = 1, tokens: int = PROMPT) -> torch.Tensor:
    return torch.randint(3, 100, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def exact_cache(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


def read_on(model: Any, cache: Any, ids: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    """Logits of tokens that are fed in pieces of some lengths."""
    name, start = tc.argument_of(model), cache.get_seq_length()
    assert start + sum(pieces) <= ids.shape[1]
    found = []
    for size in pieces:
        found.append(model(input_ids=ids[:, start : start + size], **{name: cache}).logits)
        start += size
    return torch.cat(found, 1)


def both(model: Any, way: dict[str, Any], preset: str = "pq6") -> tuple[Any, Any]:
    return exact_cache(model), EncodedCache(model, preset=preset, **way)


def same(x: torch.Tensor, y: torch.Tensor, most: float = 3e-4) -> bool:
    return rel_mse(x.cpu(), y.cpu()) < most


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_reads_on_as_from_the_exact_cache(kind: str, way: dict[str, Any]) -> None:
    model, ids = tiny(kind), prompt(2, 80)
    exact, encoded = both(model, way)
    for pieces in ([PROMPT], [1] * 10, [7, 3, 9], [1] * 5):  # a prompt, steps, a prompt in pieces
        assert same(read_on(model, exact, ids, pieces), read_on(model, encoded, ids, pieces))
        assert encoded.get_seq_length() == exact.get_seq_length()
    if kind == "mistral":
        assert not encoded.encoded_layers  # windows are bounded, and stay exact
    else:
        assert encoded.memory.encoded


@pytest.mark.parametrize("one", ALL_WAYS)
def test_every_way_reads_on_and_is_reordered_and_cropped(one: dict[str, Any]) -> None:
    model, ids = tiny("llama, two layers"), prompt(2, 64)
    exact, encoded = both(model, {**SMALL, **one})
    for pieces in ([3], [20], [1] * 2, [9]):
        for cache in (exact, encoded):
            cache.reorder_cache(torch.tensor([1, 0], device=DEVICE))
            cache.crop(-2 if cache.get_seq_length() > 25 else 0)
        ids = ids.flip(0)
        assert same(read_on(model, exact, ids, pieces), read_on(model, encoded, ids, pieces))
    assert all(layer._old.chunks for layer in encoded.encoded_layers)


class CPUEncodeBatch:
    """``EncodeBatch``, of the CPU's codec: what is done with batches is tried faster than with kernels that are interpreted."""

    def __init__(self, tensors: list[torch.Tensor], **options: Any) -> None:
        coded = [pqcodec.encode(x, **{**options, "backend": "cpu"}) for x in tensors]
        self.headers = [read_header(source_of(data)) for data in coded]
        self._streams = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in coded]

    def run(self) -> list[torch.Tensor]:
        return self._streams

    def check(self) -> None: ...


class CPUDecodeBatch:
    def __init__(self, streams: list[torch.Tensor], outs: list[torch.Tensor], tokens: Any, backend: str) -> None:
        self._streams, self._outs, self._tokens = streams, outs, tokens

    def run(self) -> None:
        for stream, out in zip(self._streams, self._outs, strict=True):
            pqcodec.decode(stream.numpy().tobytes(), out=out, tokens=self._tokens, backend="cpu")


@pytest.fixture(params=WAYS if GPU else [*PLACES, "cpu"])
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every way, the interpreter's ones with the CPU's codec."""
    if GPU or request.param == "cpu":
        return dict(request.param) if GPU else {}
    monkeypatch.setattr(old_tokens, "EncodeBatch", CPUEncodeBatch)
    monkeypatch.setattr(old_tokens, "DecodeBatch", CPUDecodeBatch)
    return {"place": request.param, "backend": "triton"}


LAYERS, HEADS, HEAD_DIM = 3, 2, 16
ROOM = SMALL["window"] + SMALL["chunk"]
OPERATIONS = [*[("append", n) for n in (1, 1, 1, 1, 7, 8, 9, ROOM, ROOM + 1, 3 * ROOM)], *[("crop", n) for n in (1, 3, 14, 50)]]
OPERATIONS += [("reorder", [1, 0]), ("reorder", [0, 0]), ("select", [1, 0, 1]), ("select", [0, 1]), ("reset", 0)]


class Told:
    """Layers of a cache, and the tokens that they were given."""

    def __init__(self, layers: int = LAYERS, heads: int = HEADS, **options: Any) -> None:
        config = transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": layers, "head_dim": HEAD_DIM})
        self.cache = EncodedCache(config, preset="pq6", **{**SMALL, **options})
        self.given = [(torch.zeros(2, heads, 0, HEAD_DIM, device=DEVICE),) * 2] * layers
        self._seed = 0
        self._exact = 0  # last tokens that nothing has been done to, at most a window

    def _new(self, like: torch.Tensor, tokens: int) -> torch.Tensor:
        self._seed += 1
        return gaussian(*like.shape[:2], tokens, HEAD_DIM, seed=self._seed).to(DEVICE)

    def append(self, tokens: int) -> None:
        """And see that what ``update`` returns is what was given: exactly at both ends, and nearly between."""
        for i, before in enumerate(self.given):
            new = [self._new(x, tokens) for x in before]
            found = self.cache.update(*new, i)
            keys, values = (torch.cat(pair, 2) for pair in zip(before, new, strict=True))
            self.given[i] = keys, values
            for x, y in zip((keys, values), found, strict=True):
                assert x.shape == y.shape
                assert same(x, y, 2e-3)
                for part in (slice(SMALL["exact_tokens"]), slice(x.shape[2] - tokens - self._exact, None)):
                    assert torch.equal(x[:, :, part], y[:, :, part])
        self._exact = min(self._exact + tokens, SMALL["window"])

    def do(self, what: str, value: Any) -> None:
        if what == "append":
            return self.append(value)
        rows = torch.tensor(value, device=DEVICE)
        {
            "crop": lambda: self.cache.crop(-value),
            "reorder": lambda: self.cache.reorder_cache(rows),
            "select": lambda: self.cache.batch_select_indices(rows),
            "reset": self.cache.reset,
        }[what]()
        left = max(self.given[0][0].shape[2] - value, 0) if what == "crop" else 0
        self._exact = max(self._exact - value, 0) if what == "crop" else 0 if what == "reset" else self._exact
        for i, both in enumerate(self.given):
            keys, values = (x[:, :, :left] if what in ("crop", "reset") else x[rows] for x in both)
            self.given[i] = keys, values

    def spoil(self) -> None:
        """What lies behind the exact last tokens is nobody's business."""
        for tail in (layer._tail for layer in self.cache.encoded_layers if layer._tail):
            for x in tail.memory:
                x[:, :, tail.tokens :] = float("nan")


@pytest.mark.parametrize("seed", [0, 1])
def test_what_was_given_is_found_whatever_is_done(quick: dict[str, Any], seed: int) -> None:
    told, random = Told(**quick), np.random.default_rng(seed)
    for _ in range(4):
        for number in random.permutation(len(OPERATIONS)):
            what, value = OPERATIONS[number]
            if what != "select" or len(value) != told.given[0][0].shape[0]:
                told.do(what, [row % told.given[0][0].shape[0] for row in value] if isinstance(value, list) else value)
            told.spoil()
            told.append(1)
            told.spoil()
        assert told.cache.get_seq_length() == told.given[0][0].shape[2]


@pytest.mark.parametrize("one", INTERPRETED)
def test_what_was_given_is_found_in_the_interpreter(one: dict[str, Any]) -> None:
    told = Told(layers=2, heads=1, **one)
    for what, value in (
        *[("append", n) for n in (20, SMALL["chunk"], SMALL["chunk"] + 1, 1)],  # fills the room, is one more
        *[("crop", 9), ("append", 3), ("reorder", [1, 0]), ("append", 3), ("crop", 30), ("append", 1), ("append", ROOM)],
        *[("append", n) for n in (SMALL["chunk"] - 1, 1, 1)],
    ):
        told.do(what, value)
        told.spoil()


def test_appends_around_the_border_of_the_tails_room(quick: dict[str, Any]) -> None:
    for steps in (0, 1, SMALL["chunk"] - 1):
        for more in (-1, 0, 1, ROOM - 1, ROOM, 2 * ROOM):
            told = Told(layers=2, **quick)
            told.append(20)
            for _ in range(steps):
                told.append(1)
            if (left := SMALL["chunk"] - steps + more) > 0:
                told.append(left)
            told.spoil()
            told.append(1)
            told.append(2)


def test_while_nothing_is_encoded_nothing_moves_or_is_prepared_anew(
    quick: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    for name in ("Launch", "DecodeBatch"):
        monkeypatch.setattr(old_tokens, name, partial(_noted, made, getattr(old_tokens, name)))
    told = Told(**quick)
    told.append(20)
    places = [layer._tail.memory for layer in told.cache.layers]
    for _ in range(3):
        made.clear()
        for _ in range(SMALL["chunk"]):
            told.append(1)
        assert all(layer._tail.memory is place for layer, place in zip(told.cache.layers, places, strict=True))
        if quick:
            launches, batches = (2 * LAYERS, 2) if quick["place"] == "host" else (LAYERS, LAYERS)
            assert made.count("Launch") == launches  # of an odd number of layers each comes to lie in both slots
            assert len(made) == launches + batches


def _noted(made: list[str], thing: type, *args: Any, **options: Any) -> Any:
    made.append(thing.__name__)
    return thing(*args, **options)


def test_the_memory_of_a_cache_goes_with_it(quick: dict[str, Any]) -> None:
    told = Told(**quick)
    for tokens in (20, 1, 1, 1):
        told.append(tokens)
    spaces = [weakref.ref(space) for space in told.cache._workspaces.values()]
    gc.disable()
    try:
        del told
        assert [space() for space in spaces] == [None]
    finally:
        gc.enable()


def test_scratch_goes_before_it_is_laid_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long context has no room for both."""
    kind = workspace.PairKind((torch.float32, torch.float32), (1, 2, 16), (1, 2, 16))
    space = workspace.Workspace(torch.device("cpu"))
    before = weakref.ref(space.scratch(kind, 100)[0])
    assert before() is not None
    sizes = []

    def device_bytes(size: int, device: Any) -> Any:
        assert before() is None
        sizes.append(size)
        return torch.empty(size, dtype=torch.uint8, device=device)

    monkeypatch.setattr(workspace, "device_bytes", device_bytes)
    assert space.scratch(kind, 10_000)[0].shape[2] >= 10_000
    assert len(sizes) == 1


def test_the_error_goes_down_with_the_preset(way: dict[str, Any]) -> None:
    model, ids = tiny("llama"), prompt(1, 56)
    exact = read_on(model, exact_cache(model), ids, [PROMPT, *[1] * 12])
    presets = ("pq2", "pq3", "pq4", "pq6")
    caches = [EncodedCache(model, preset=preset, **way) for preset in presets]
    errors = [rel_mse(exact, read_on(model, cache, ids, [PROMPT, *[1] * 12])) for cache in caches]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 50


BEAMS: list[dict[str, int]] = [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]


@pytest.mark.parametrize("more", BEAMS, ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_generation_writes_the_same_text(way: dict[str, Any], more: dict[str, int], batch: int) -> None:
    model, ids = tiny("llama"), prompt(batch)
    name = tc.argument_of(model)
    options = {"max_new_tokens": MORE, "min_new_tokens": MORE, "attention_mask": torch.ones_like(ids), **more}
    texts = [model.generate(ids, **{name: cache}, **options) for cache in both(model, way)]
    assert texts[0].shape == texts[1].shape
    assert (texts[0] == texts[1]).float().mean() > 0.9  # the logits of random weights are close to each other


def test_padding_at_the_left(way: dict[str, Any]) -> None:
    model, ids = tiny("llama"), prompt(2, 32)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    name = tc.argument_of(model)
    exact, encoded = both(model, way)
    texts = [model.generate(ids, attention_mask=mask, max_new_tokens=8, **{name: cache}) for cache in (exact, encoded)]
    assert (texts[0] == texts[1]).float().mean() > 0.9


@pytest.mark.parametrize("steps", [0, 11])
def test_sequences_are_reordered_repeated_and_selected(way: dict[str, Any], steps: int) -> None:
    model, ids = tiny("llama"), prompt(3, 64)
    caches = both(model, way)
    for cache in caches:
        read_on(model, cache, ids, [24, *[1] * steps])
        cache.reorder_cache(torch.tensor([2, 0, 0], device=DEVICE))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 5, 2], device=DEVICE))
    exact, encoded = (read_on(model, cache, ids, [1] * 10) for cache in caches)
    assert same(exact, encoded)
    once = caches[1].memory.encoded
    caches[1].batch_select_indices(torch.tensor([True, False, False]))
    assert caches[1].memory.encoded < once
    read_on(model, caches[1], ids[:1], [1] * 10)


def test_beams_share_the_streams_of_their_beginning() -> None:
    model, ids = tiny("llama"), prompt(1, 64)
    cache = EncodedCache(model, **SMALL)
    read_on(model, cache, ids, [PROMPT])
    before = cache.memory.encoded
    cache.batch_repeat_interleave(4)
    assert cache.memory.encoded == before


@pytest.mark.parametrize("removed", [1, 4, 9, 33, 38, 39, 45])
def test_a_cache_is_cropped(way: dict[str, Any], removed: int) -> None:
    model, ids = tiny("llama"), prompt(2, 64)
    caches = both(model, way)
    for cache in caches:
        read_on(model, cache, ids, [30, *[1] * 10])
        cache.crop(-removed)
        assert cache.get_seq_length() == max(40 - removed, 0)
    exact, encoded = (read_on(model, cache, ids, [5, *[1] * 10]) for cache in caches)
    assert same(exact, encoded)


def test_a_cache_begins_anew_after_reset(way: dict[str, Any]) -> None:
    model, ids = tiny("llama"), prompt(2, 64)
    cache = EncodedCache(model, preset="pq6", **way)
    first = read_on(model, cache, ids, [30, *[1] * 5])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(first, read_on(model, cache, ids, [30, *[1] * 5]))


def test_keys_are_centred_under_the_models_rope() -> None:
    """One token again and again has one key before RoPE: centred under it, nothing is left to encode."""
    model = tiny("llama")
    ids = torch.full((1, 60), 7, device=DEVICE)
    exact = read_on(model, exact_cache(model), ids, [50, *[1] * 10])
    cache = EncodedCache(model, preset=("pq2", "pq6"), **SMALL)
    assert rel_mse(exact, read_on(model, cache, ids, [50, *[1] * 10])) < 1e-3
    cache = EncodedCache(model, preset="pq2", **SMALL)
    read_on(model, cache, prompt(1, 60), [50])
    assert {role for role, how in cache.layers[0]._old.options.items() if how.rope} == {"keys"}


def test_two_presets_are_of_keys_and_of_values() -> None:
    model, ids = tiny("llama"), prompt()
    cache = EncodedCache(model, preset=("pq4", "pq2"), **SMALL)
    read_on(model, cache, ids, [PROMPT])
    one, other = (EncodedCache(model, preset=preset, **SMALL) for preset in ("pq2", "pq4"))
    for each in (one, other):
        read_on(model, each, ids, [PROMPT])
    assert one.memory.encoded < cache.memory.encoded < other.memory.encoded


def test_the_window_and_the_first_tokens_are_exact(way: dict[str, Any]) -> None:
    layer = EncodedCache(tiny("llama"), preset="pq2", **way).layers[0]
    keys, values = (gaussian(2, 2, 41, 16, seed=seed).to(DEVICE) for seed in (1, 2))
    layer.update(keys[:, :, :40], values[:, :, :40])
    for x, found in zip((keys, values), layer.update(keys[:, :, 40:], values[:, :, 40:]), strict=True):
        assert torch.equal(found[:, :, :2], x[:, :, :2])
        assert torch.equal(found[:, :, 36:], x[:, :, 36:])
        assert 0.02 < rel_mse(x[:, :, 2:36].cpu(), found[:, :, 2:36].cpu()) < 0.25


def test_a_dtype_that_no_stream_has_stays_exact() -> None:
    model, ids = tiny("llama").double(), prompt()
    exact, encoded = both(model, SMALL)
    assert torch.equal(read_on(model, exact, ids, [20, *[1] * 20]), read_on(model, encoded, ids, [20, *[1] * 20]))
    assert encoded.memory.encoded == 0


def test_what_cannot_be_is_refused(way: dict[str, Any]) -> None:
    model, ids = tiny("llama"), prompt()
    for wrong in ({"place": "disk"}, {"preset": "pq9"}, {"window": 0}, {"preset": ("pq3", "pq3", "pq3")}):
        with pytest.raises(InvalidArgument):
            EncodedCache(model, **{**SMALL, **wrong})
    cache = EncodedCache(model, **way)
    with torch.enable_grad(), pytest.raises(InvalidArgument, match="inference"):
        read_on(model, cache, ids, [PROMPT])
    read_on(model, cache, ids, [PROMPT])
    with pytest.raises(ValueError, match="negative"):
        cache.crop(3)
    for tokens in (1, ROOM + 1):
        with pytest.raises(InvalidArgument, match="2 sequences are given to a cache of 1"):
            read_on(model, cache, prompt(2, 64), [tokens])


@pytest.mark.skipif(not GPU, reason="on a CPU such vectors are kept as they are")
def test_nan_is_told_of_on_a_gpu() -> None:
    layer = EncodedCache(tiny("llama"), **SMALL).layers[0]
    keys = gaussian(1, 2, 40, 16).to(DEVICE)
    keys[0, 1, 20, 3] = float("nan")
    with pytest.raises(NonFiniteInput):
        layer.update(keys, keys)


@pytest.mark.skipif(not GPU, reason="no GPU here: streams and events are a GPU's")
@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_layers_and_a_long_context_on_a_gpu(place: str, dtype: torch.dtype) -> None:
    """What attention is given is what a decoder that waits would give, layer by layer, at every step."""
    config = transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": 8, "head_dim": 128})
    cache = EncodedCache(config, place=place, window=64, chunk=128)
    shape = (2, 2, 3000, 128)
    all_keys = [gaussian(*shape, seed=i, dtype=dtype).to(DEVICE) for i in range(8)]
    at = 0
    for size in (2000, 1, 1, 300, *[1] * 200):
        for i, x in enumerate(all_keys):
            keys, values = cache.update(x[:, :, at : at + size], -x[:, :, at : at + size], i)
            assert rel_mse(x[:, :, : at + size].cpu(), keys.cpu()) < 0.04 if size > 1 else keys.shape[2] == at + size
            if size == 1 and at % 50 == 0:
                assert rel_mse(-x[:, :, : at + size].cpu(), values.cpu()) < 0.04
        at += size
    other = EncodedCache(config, place="device" if place == "host" else "host", window=64, chunk=128)
    at = 0
    for size in (2000, 1, 1, 300, *[1] * 200):
        found = [other.update(x[:, :, at : at + size], -x[:, :, at : at + size], i)[0].sum() for i, x in enumerate(all_keys)]
        at += size
    step = [x[:, :, at : at + 1] for x in all_keys]
    for i, x in enumerate(step):
        first = cache.update(x, -x, i)
        second = other.update(x, -x, i)
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])
    assert torch.isfinite(torch.stack(found)).all()


@pytest.mark.parametrize("one", ALL_WAYS)
def test_a_copy_goes_its_own_way(one: dict[str, Any]) -> None:
    """What was prepared for one cache knows the addresses of its memory, which are not the copy's."""
    told = Told(layers=2, heads=1, **one)
    for tokens in (20, 1, 1):
        told.append(tokens)
    twin = copy.deepcopy(told)
    twin._seed += 100
    for tokens in (1, 9, 1):
        told.append(tokens)
        twin.append(tokens)
    del told
    twin.append(1)
