"""The prefix store: what is found is right, shared, evicted in order, and never another's; damage and faults cost time only."""

from __future__ import annotations

import copy
import errno
import io
import itertools
import os
import pickle
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import DEVICE, GPU_BACKENDS, gaussian, rel_mse

from pqcodec.errors import CorruptStream, InvalidArgument, PQError, UnsupportedStream
from pqcodec.formats import PQKVFile, PQKVWriter
from pqcodec.formats.engines import transformers_cache as tc
from pqcodec.formats.engines.model_identity import Identity
from pqcodec.formats.store import PrefixStore, blocks
from pqcodec.formats.store.transfer import write_prefix
from pqcodec.stream.header import read_header

transformers = pytest.importorskip("transformers")
from store_stress import MODEL, cache_of, numbers_of, stress  # noqa: E402
from test_transformers_cache import cached, check_same, layers, prompt, read, tiny  # noqa: E402

BLOCK = 256
KINDS = [
    "llama",
    "mistral",
    "gemma3",
    "cohere",
    "mamba",
    "lfm2",
    "qwen3-next",
    "falcon-h1",
    "deepseek-v3",
    "deepseek-v3.2",
    "gemma3n",
]
CUTTABLE = ["llama", "cohere", "deepseek-v3", "deepseek-v3.2"]  # the state after fewer tokens is a part of the cache
STATEFUL = ["gemma3", "mamba", "qwen3-next", "falcon-h1"]


@pytest.fixture
def store(tmp_path: Path) -> Any:
    with PrefixStore(tmp_path / "store", preset="exact") as made:
        yield made


def files(store: PrefixStore) -> list[Path]:
    """All that lies below the folder of blocks, in the order of the tokens where it has a row."""
    there = {path for path in (store.shelf.folder / "blocks").rglob("*") if path.is_file()}
    known = [store.shelf.folder / "blocks" / row.file for row in store.shelf.index.all()]
    return [path for path in known if path in there] + sorted(there - set(known))


def check_whole(store: PrefixStore) -> None:
    """Rows and files belong together, parents are there, and the counter is the sum of sizes."""
    rows = store.shelf.index.all()
    assert {store.shelf.folder / "blocks" / row.file for row in rows} == set(files(store))
    assert [problem for row in rows for problem in store.shelf.problems(row)] == []
    assert store.shelf.index.counters()["bytes"] == sum(row.size for row in rows) == sum(p.stat().st_size for p in files(store))
    names = {row.name for row in rows} | set(store.shelf.index.roots())
    assert all(row.parent in names for row in rows)


def part(cache: Any, tokens: int) -> Any:
    """The first tokens of a cache that can be cut."""
    state = tc.state_of(cache)
    cut = [layer.cut(0, tokens) if layer.kept else layer for layer in state.parts[""]]
    return tc.cache_of(tc.CacheState(state.kind, {"": cut}))


# -- what is found -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same_with_and_without_the_store(store: PrefixStore, kind: str) -> None:
    model, ids = tiny(kind), prompt(300)
    options = {"do_sample": False, "max_new_tokens": 8}
    expected = model.generate(ids, **options)
    for _ in range(2):
        assert torch.equal(store.generate(model, ids, wait=True, **options), expected)
    longer = torch.cat([expected, prompt(250, seed=1)], 1)
    cache, length = store.get(model, longer, stepwise=True)
    assert length == expected.shape[1] - 1
    check_same(store.get(model, longer[:, : length + 1]).cache, cache, most=1e-30)
    assert torch.equal(store.generate(model, longer, wait=True, **options), model.generate(longer, **options))
    assert store.get(model, prompt(300, seed=2)).length == 0
    check_whole(store)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 600])
def test_a_cache_comes_back_bit_for_bit(store: PrefixStore, kind: str, tokens: int) -> None:
    model, ids = tiny(kind), prompt(tokens + 1)
    cache = cached(model, ids[:, :tokens])
    seen = ids[:, :tokens] if kind == "mamba" else ids  # recurrent state alone does not tell its length
    assert store.put(model, seen, cache).tokens == tokens
    again, length = store.get(model, ids)
    assert length == tokens
    check_same(cache, again, most=1e-30)
    for (_, layer), (_, other) in zip(layers(cache), layers(again), strict=True):
        assert all(torch.equal(x, other.tensors[path]) for path, x in layer.tensors.items())
    assert torch.equal(read(model, prompt(3, seed=1), cache), read(model, prompt(3, seed=1), again))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "falcon-h1"])
@pytest.mark.parametrize("preset", ["pq3", "pq6"])
def test_presets_and_half_precision(tmp_path: Path, kind: str, dtype: torch.dtype, preset: str) -> None:
    model, ids = tiny(kind, dtype=dtype), prompt(601)
    with PrefixStore(tmp_path / "s", preset=preset) as store:
        cache = cached(model, ids[:, :600])
        store.put(model, ids, cache)
        check_same(cache, store.get(model, ids).cache, 0.08 if preset == "pq3" else 0.002)
        assert store.get(tiny(kind), ids).length == 0  # of other numbers
        check_whole(store)


def test_forks_share_blocks_and_cost_their_own_tokens(store: PrefixStore) -> None:
    model, common = tiny("llama"), prompt(600)
    one, two = (torch.cat([common, prompt(50, seed=seed)], 1) for seed in (1, 2))
    first = store.put(model, one, cached(model, one))
    second = store.put(model, two, cached(model, two))
    assert (first.tokens, first.new_tokens) == (650, 650)
    assert (second.tokens, second.new_tokens) == (650, 650 - 2 * BLOCK)
    assert second.new_bytes < first.new_bytes / 3
    assert len(files(store)) == 4
    again = store.put(model, one, cached(model, one))
    assert (again.tokens, again.new_tokens, again.new_bytes) == (650, 0, 0)
    for ids in (one, two):
        assert store.get(model, ids, leave=0).length == 650
    check_whole(store)


@pytest.mark.parametrize("kind", CUTTABLE)
@pytest.mark.parametrize("shared", [1, 100, BLOCK - 1, BLOCK, BLOCK + 1, 400, 2 * BLOCK, 599])
def test_the_longest_prefix_ends_inside_a_block(store: PrefixStore, kind: str, shared: int) -> None:
    model, ids = tiny(kind), prompt(600)
    cache = cached(model, ids)
    store.put(model, ids, cache)
    other = torch.cat([ids[:, :shared], 99 - ids[:, shared : shared + 1], prompt(300, seed=3)], 1)
    again, length = store.get(model, other)
    assert length == shared
    check_same(part(cache, shared), again, most=1e-30)


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_state_is_found_only_after_all_of_its_tokens(store: PrefixStore, kind: str) -> None:
    model, ids = tiny(kind), prompt(700)
    for tokens in (100, 300, 600):
        store.put(model, ids[:, :tokens], cached(model, ids[:, :tokens]))
    for asked, found in [(50, 0), (100, 0), (101, 100), (300, 100), (301, 300), (550, 300), (600, 300), (601, 600), (700, 600)]:
        again, length = store.get(model, ids[:, :asked], stepwise=True)
        assert length == found, asked
        if found:
            check_same(cached(model, ids[:, :found]), again, most=1e-9)  # the first one that put a block made its numbers
    check_whole(store)


def test_a_tail_gives_way_to_what_it_grows_into(store: PrefixStore) -> None:
    model, ids = tiny("llama"), prompt(600)
    cache = cached(model, ids)
    for tokens, count in [(100, 1), (200, 1), (BLOCK, 1), (300, 2), (400, 2), (350, 2), (600, 3)]:
        store.put(model, ids[:, :tokens], part(cache, tokens))
        assert len(files(store)) == count, tokens
        assert store.get(model, ids[:, : tokens + 1]).length == min(tokens, len(ids[0]) - 1)
        check_whole(store)


def test_tokens_may_go_on_beyond_the_cache_but_not_end_before_it(store: PrefixStore) -> None:
    model, ids = tiny("llama"), prompt(300)
    assert store.put(model, ids, cached(model, ids[:, :280])).tokens == 280
    with pytest.raises(InvalidArgument, match="200 tokens, but the cache holds 300 positions"):
        store.put(model, ids[:, :200], cached(model, ids))
    assert store.get(model, ids[0].tolist()).length == 280
    assert store.get(model, ids[0].numpy(), leave=100).length == 200
    assert store.get(model, ids[:, :1]).length == store.get(model, []).length == 0
    assert store.put(model, [], tc.empty_cache(model.config)).tokens == 0
    check_whole(store)


def test_a_block_may_go_on_at_the_rates_of_the_first(tmp_path: Path) -> None:
    """What a turn adds is encoded as the block before it was, so that decoded blocks fit together."""
    model, ids = tiny("llama"), prompt(900)
    with PrefixStore(tmp_path / "s", preset="pq3") as store:
        cache = tc.empty_cache(model.config)
        for first, last in [(0, 300), (300, 500), (500, 900)]:
            read(model, ids[:, first:last], cache)
            store.put(model, ids[:, :last], cache)
        again, length = store.get(model, ids, leave=0)
        assert length == 900
        check_same(cache, again, 0.08)
        check_whole(store)


# -- quota -------------------------------------------------------------------------------------------------------
def test_the_quota_drops_what_was_used_longest_ago_ends_first(tmp_path: Path) -> None:
    model, prompts = tiny("llama"), [prompt(300, seed=seed) for seed in range(5)]
    caches = [cached(model, ids) for ids in prompts]
    with PrefixStore(tmp_path / "s", preset="exact") as store:
        size = store.put(model, prompts[0], caches[0]).new_bytes

        def found() -> list[int]:
            chain = store._chain(store._identity(model), "")
            return [sum(n for _, n in store._longest(chain, ids[0].numpy())) for ids in prompts]

    with PrefixStore(tmp_path / "s", preset="exact", max_bytes=3 * size + 10) as store:
        store.put(model, prompts[1], caches[1])
        store.put(model, prompts[2], caches[2])
        assert found() == [300, 300, 300, 0, 0]
        store.get(model, prompts[0])  # so it is in use, and the second one goes
        store.put(model, prompts[3], caches[3])
        assert found() == [300, 0, 300, 300, 0]
        check_whole(store)
        store.shelf.index.set_limit("max_bytes", 3 * size - 1)
        store.shelf.evict()  # one byte too many: the end of the coldest prefix goes, its beginning stays
        assert found() == [300, 0, BLOCK, 300, 0]
        check_whole(store)
    with PrefixStore(tmp_path / "s", preset="exact") as store:  # the folder knows its quota
        assert store.shelf.max_bytes == 3 * size - 1
        store.put(model, prompts[4], caches[4])
        assert store.shelf.index.counters()["bytes"] <= 3 * size - 1
        assert found()[4] == 300
        check_whole(store)


def test_blocks_that_another_uses_meanwhile_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix that turns out to exceed the quota takes back its blocks, but not those that another put has found."""
    ids = np.arange(4 * 256 + 200) % 97
    numbers = numbers_of(ids)
    with PrefixStore(tmp_path / "sizes", preset="pq3") as store:
        store.put(MODEL, ids, cache_of(numbers))
        sizes = [row.size for row in store.shelf.index.all()]
    write, said = blocks.write_block, []
    for pin in (True, False):
        said.clear()
        with (
            PrefixStore(tmp_path / f"{pin}", preset="pq3", max_bytes=sum(sizes[:-1]) + sizes[-1] // 2) as one,
            PrefixStore(tmp_path / f"{pin}", preset="pq3") as other,
        ):

            def written(path: Any, row: Any, *more: Any, other: Any = other, pin: bool = pin) -> int:
                if not row.whole and not said:
                    said.append(True)
                    other.put(MODEL, ids[:1024], cache_of(numbers[:1024]), pin=pin)
                return write(path, row, *more)

            monkeypatch.setattr(blocks, "write_block", written)
            with pytest.warns(RuntimeWarning, match="left out"):
                one.put(MODEL, ids, cache_of(numbers))
            monkeypatch.undo()
            assert other.get(MODEL, ids[:1024], leave=0).length == 1024
            assert len(other.shelf.index.held()) == (4 if pin else 0)


def test_a_tail_that_grew_before_it_was_pinned_is_pinned_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.arange(600) % 97
    numbers = numbers_of(ids)
    with PrefixStore(tmp_path, preset="pq3") as one, PrefixStore(tmp_path, preset="pq3") as other:
        touch, grown = one.shelf.index.touch, []

        def touched(*arguments: Any, **options: Any) -> None:
            if not grown:
                grown.append(other.put(MODEL, ids, cache_of(numbers)))
            touch(*arguments, **options)

        monkeypatch.setattr(one.shelf.index, "touch", touched)
        one.put(MODEL, ids[:300], cache_of(numbers[:300]), pin=True)
        assert len(one.shelf.index.held()) == 2
        one.shelf.index.set_limit("max_bytes", 0)
        with pytest.warns(RuntimeWarning):
            one.shelf.evict()
        assert one.get(MODEL, ids[:300], leave=0).length == 300


def test_what_is_pinned_stays(tmp_path: Path) -> None:
    model, prompts = tiny("llama"), [prompt(300, seed=seed) for seed in range(4)]
    caches = [cached(model, ids) for ids in prompts]
    with PrefixStore(tmp_path / "s", preset="exact") as store:
        size = store.put(model, prompts[0], caches[0], pin=True).new_bytes
        store.shelf.index.set_limit("max_bytes", 2 * size + 10)
        for ids, cache in zip(prompts[1:], caches[1:], strict=True):
            store.put(model, ids, cache)
        assert [store.get(model, ids, leave=0).length for ids in prompts] == [300, 0, 0, 300]
        assert store.pin(model, prompts[3]) == 300
        assert store.pin(model, prompt(300, seed=9)) == 0
        store.shelf.index.set_limit("max_bytes", 1)
        with pytest.warns(RuntimeWarning, match="over its quota of 1 bytes, and all of it is pinned"):
            store.shelf.evict()
        assert [store.get(model, ids, leave=0).length for ids in prompts] == [300, 0, 0, 300]
        assert store.pin(model, prompts[0], pinned=False) == 300
        with pytest.warns(RuntimeWarning, match="all of it is pinned"):
            store.shelf.evict()
        assert [store.get(model, ids, leave=0).length for ids in prompts] == [0, 0, 0, 300]
        check_whole(store)


def test_a_quota_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(300)
    with PrefixStore(tmp_path / "s", preset="exact", max_bytes=0) as store:
        store.put(model, ids, cached(model, ids))
        assert files(store) == []
        assert store.get(model, ids).length == 0
    with pytest.raises(InvalidArgument, match="max_bytes -1"):
        PrefixStore(tmp_path / "s", max_bytes=-1)


# -- whose it is -------------------------------------------------------------------------------------------------
class Tokenizer:
    """As much of a tokenizer as a store asks for."""

    def __init__(self, *words: str) -> None:
        self._words = words

    def get_vocab(self) -> dict[str, int]:
        return {word: index for index, word in enumerate(self._words)}


def test_nobody_finds_what_is_not_theirs(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(600)
    places: list[tuple[dict[str, Any], Any, str]] = [
        ({}, model, ""),
        ({}, model, "image 1"),
        ({}, tiny("llama", seed=1), ""),
        ({}, tiny("llama", dtype=torch.bfloat16), ""),
        ({"tenant": "a"}, model, ""),
        ({"tenant": "b"}, model, ""),
        ({"tokenizer": Tokenizer("x", "y")}, model, ""),
        ({"tokenizer": Tokenizer("y", "x")}, model, ""),
        ({"preset": "pq3"}, model, ""),
        ({"seed": 1, "preset": "pq3"}, model, ""),
    ]
    for number, (options, other, extra) in enumerate(places):
        with PrefixStore(tmp_path / "s", **{"preset": "exact", **options}) as store:
            assert store.get(other, ids, extra=extra).length == 0, number
            assert store.put(other, ids, cached(other, ids), extra=extra).new_tokens == 600
    for options, other, extra in places:
        with PrefixStore(tmp_path / "s", **{"preset": "exact", **options}) as store:
            assert store.get(other, ids, extra=extra).length == 599
            check_whole(store)


def test_what_changes_in_a_model_changes_whose_it_is(store: PrefixStore) -> None:
    import copy

    model, ids = copy.deepcopy(tiny("llama")), prompt(100)
    store.put(model, ids, cached(model, ids))
    assert store.get(model, ids).length == 99
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert store.get(model, ids).length == 0
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = tiny("llama").model.layers[0].mlp.up_proj.weight[0, 0]
    assert store.get(model, ids).length == 99


# -- damage ------------------------------------------------------------------------------------------------------
def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "something else": lambda path: path.write_bytes(os.urandom(500)),
}


@pytest.mark.parametrize("number", [True, 1.0, 2, None])
def test_a_block_of_another_format_is_not_supported(number: object) -> None:
    file = io.BytesIO()
    with PQKVWriter(file, {blocks.KEY: {"format": number}}):
        pass
    with pytest.raises(UnsupportedStream, match="a block of format"):
        blocks.block_metadata(PQKVFile(file))


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("preset", ["exact", "pq3"])
def test_a_damaged_block_is_dropped_and_never_used(tmp_path: Path, damage: str, number: int, preset: str) -> None:
    model, ids = tiny("llama"), prompt(600)
    cache = cached(model, ids)
    with PrefixStore(tmp_path / "s", preset=preset) as store:
        store.put(model, ids, cache)
        DAMAGE[damage](files(store)[number])
        with pytest.warns(RuntimeWarning, match="is damaged and was dropped; its tokens will be computed anew"):
            again, length = store.get(model, ids, leave=0)
        assert length == number * BLOCK
        if length:
            check_same(part(cache, length), again, 1e-30 if preset == "exact" else 0.08)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert store.get(model, ids, leave=0).length == length
            assert store.put(model, ids, cache).new_tokens == min(BLOCK, 600 - length)  # what follows it is still there
            again, length = store.get(model, ids, leave=0)
        assert length == 600
        check_same(cache, again, 1e-30 if preset == "exact" else 0.08)
        check_whole(store)


@pytest.mark.parametrize("gpu_backend", GPU_BACKENDS)
def test_blocks_that_a_gpu_decodes_together(tmp_path: Path, gpu_backend: str) -> None:
    """Whole streams wait for each other, a part of one does not; a damaged one is found block by block."""
    model, ids = tiny("llama"), prompt(601)
    with PrefixStore(tmp_path / "s") as store, PrefixStore(tmp_path / "s", backend=gpu_backend) as other:
        store.put(model, ids, cached(model, ids[:, :600]))
        for tokens in (601, 500):
            expected, found = store.get(model, ids[:, :tokens]), other.get(model, ids[:, :tokens], device=DEVICE)
            assert found.length == expected.length == min(tokens, 600) - (tokens < 600)
            for (_, layer), (_, same) in zip(layers(found.cache), layers(expected.cache), strict=True):
                assert all(torch.equal(x.cpu(), same.tensors[path]) for path, x in layer.tensors.items())
        flip(files(store)[1])
        with pytest.warns(RuntimeWarning, match="is damaged and was dropped; its tokens will be computed anew"):
            assert other.get(model, ids, device=DEVICE).length == BLOCK


@pytest.mark.parametrize(("one", "two"), [(0, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("preset", ["exact", "pq3"])
def test_blocks_that_are_exchanged_are_found_by_their_names(tmp_path: Path, one: int, two: int, preset: str) -> None:
    model, ids = tiny("llama"), prompt(3 * BLOCK)
    cache, most = cached(model, ids), 1e-30 if preset == "exact" else 0.08
    with PrefixStore(tmp_path / "s", preset=preset) as store:
        store.put(model, ids, cache)
        a, b = files(store)[one], files(store)[two]
        mine, theirs = a.read_bytes(), b.read_bytes()
        a.write_bytes(theirs)
        b.write_bytes(mine)
        assert [bool(store.shelf.problems(row)) for row in store.shelf.index.all()] == [n in (one, two) for n in range(3)]
        for number in (one, two):  # the second one is found when the first one is there again
            with pytest.warns(RuntimeWarning, match="is another block than"):
                again, length = store.get(model, ids, leave=0)
            assert length == number * BLOCK
            if length:
                check_same(part(cache, length), again, most)
            assert store.put(model, ids, cache).new_tokens == BLOCK
        again, length = store.get(model, ids, leave=0)
        assert length == 3 * BLOCK
        check_same(cache, again, most)
        check_whole(store)


def test_rows_that_change_places_inside_a_file_are_found_by_verifying(tmp_path: Path) -> None:
    """Their checksums move with them: only the seals of the file's frames tell."""
    model, ids = tiny("llama"), prompt(BLOCK)
    with PrefixStore(tmp_path / "s", preset="pq3") as store:
        store.put(model, ids, cached(model, ids))
        (row,), (path,) = store.shelf.index.all(), files(store)
        with PQKVFile(path) as file:
            entry = next(file.entry(name) for name in file.names if file.entry(name).coded)
            header, end = read_header(file.stream(entry.name)), entry.body_start + entry.body_bytes
        size = header.blocks.size(header.chunks - 1)
        data = path.read_bytes()
        one, other = data[end - 2 * size : end - size], data[end - size : end]
        assert one != other
        path.write_bytes(data[: end - 2 * size] + other + one + data[end:])
        assert [f"tensor {entry.name!r}" in what and "order seal" in what for what in store.shelf.problems(row)] == [True]
        with pytest.raises(CorruptStream, match="order seal"):
            write_prefix(store.shelf, row, tmp_path / "out.pqkv")


@pytest.mark.parametrize("kind", STATEFUL)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_dropped_and_an_earlier_one_is_found(store: PrefixStore, kind: str, damage: str) -> None:
    model, ids = tiny(kind), prompt(600)
    for tokens in (300, 600):
        store.put(model, ids[:, :tokens], cached(model, ids[:, :tokens]))
    tails = [row for row in store.shelf.index.all() if not row.whole]
    DAMAGE[damage](store.shelf.folder / "blocks" / tails[-1].file)
    with pytest.warns(RuntimeWarning, match="is damaged"):
        again, length = store.get(model, ids, leave=0, stepwise=True)
    assert length == 300
    check_same(cached(model, ids[:, :300]), again, most=1e-30)
    store.put(model, ids, cached(model, ids))
    assert store.get(model, ids, leave=0).length == 600
    check_whole(store)


def test_no_byte_of_a_block_can_change_unseen(tmp_path: Path) -> None:
    model, ids, rng = tiny("llama"), prompt(BLOCK + 40), np.random.default_rng(0)
    cache = cached(model, ids)
    with PrefixStore(tmp_path / "s", preset="pq3") as store:
        store.put(model, ids, cache)
        good = store.get(model, ids, leave=0).cache
        seen = 0
        for number in range(60):
            path = files(store)[number % 2]
            data = bytearray(path.read_bytes())
            data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            path.write_bytes(data)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                again, length = store.get(model, ids, leave=0)
            seen += bool(caught)
            if length:
                for (_, a), (_, b) in zip(layers(part(good, length)), layers(again), strict=True):
                    assert all(torch.equal(x, b.tensors[path]) for path, x in a.tensors.items())
            assert bool(caught) == (length < len(ids[0]))
            if not caught:  # padding: nothing that is read
                store.shelf.drop(next(row for row in store.shelf.index.all() if path.name in row.file))
            store.put(model, ids, cache)
        assert seen > 40


INDEX_DAMAGE: dict[str, Callable[[Path], Any]] = {
    "missing": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(os.urandom(5000)),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2 // 4096 * 4096 + 100),
    "garbage behind its first page": lambda path: path.write_bytes(
        path.read_bytes()[:4096] + os.urandom(path.stat().st_size - 4096)
    ),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
def test_a_damaged_index_is_made_anew_from_the_files(tmp_path: Path, damage: str) -> None:
    model, ids = tiny("llama"), prompt(600)
    cache, other = cached(model, ids), prompt(300, seed=4)
    with PrefixStore(tmp_path / "s", preset="exact") as store:
        store.put(model, ids, cache)
        store.put(model, other, cached(model, other))
        before = [(row.name, row.parent, row.start, row.file, row.size, row.whole) for row in store.shelf.index.all()]
    assert not list((tmp_path / "s").glob("index.sqlite-*"))
    INDEX_DAMAGE[damage](tmp_path / "s" / "index.sqlite")
    with pytest.warns(RuntimeWarning, match="5 blocks were found again by their files"):
        opened = PrefixStore(tmp_path / "s", preset="exact")
    with opened as store:
        again, length = store.get(model, ids, leave=0)
        assert length == 600
        check_same(cache, again, most=1e-30)
        after = [(row.name, row.parent, row.start, row.file, row.size, row.whole) for row in store.shelf.index.all()]
        assert before == after
        assert store.put(model, ids, cache).new_tokens == 0
        check_whole(store)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PrefixStore(tmp_path / "s", preset="exact").close()


@pytest.mark.parametrize("page", [1, 2, 3, 4, 5, -1])
def test_damage_inside_an_index_is_found_when_it_is_read(tmp_path: Path, page: int) -> None:
    """One page of it is garbage: an error, or the index made anew, but never another cache; opened again, all is there."""
    model, ids = tiny("llama"), prompt(600)
    cache = cached(model, ids)
    with PrefixStore(tmp_path / "s", preset="exact") as store:
        store.put(model, ids, cache)
    path = tmp_path / "s" / "index.sqlite"
    data = bytearray(path.read_bytes())
    at = len(data) - 4096 if page == -1 else 4096 * page
    data[at : at + 4096] = np.random.default_rng(page + 1).bytes(4096)
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of what is made anew
        for _ in range(3):
            try:
                with PrefixStore(tmp_path / "s", preset="exact") as store:
                    again, length = store.get(model, ids, leave=0)
                    store.put(model, ids, cache)
                    check_whole(store)
            except CorruptStream:
                continue
            assert length == 600
            check_same(cache, again, most=1e-30)
            break
        else:
            pytest.fail("the index is not mended")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with PrefixStore(tmp_path / "s", preset="exact") as store:
            assert store.get(model, ids, leave=0).length == 600


def test_files_that_no_row_has_are_collected(store: PrefixStore) -> None:
    model, ids = tiny("llama"), prompt(300)
    store.put(model, ids, cached(model, ids))
    blocks = store.shelf.folder / "blocks"
    (blocks / "ab").mkdir(exist_ok=True)
    name = f"{'ab' * 32}-{'0' * 12}.pqkv"
    for path in (f"ab/{name}", f"ab/.{name}.00ff.part", "ab/notes.txt", "ab/other.pqkv"):
        (blocks / path).write_bytes(b"x" * 100)
    assert store.shelf.gc() == {"orphans": 0, "missing": 0, "evicted_bytes": 0}
    assert store.shelf.gc(grace=0) == {"orphans": 2, "missing": 0, "evicted_bytes": 0}
    for other in ("ab/notes.txt", "ab/other.pqkv"):
        (blocks / other).unlink()  # raises where it was taken for the store's
    check_whole(store)
    files(store)[1].unlink()
    assert store.shelf.gc(grace=0)["missing"] == 1
    assert store.get(model, ids).length == BLOCK
    check_whole(store)


# -- saving in the background, threads, processes ----------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "mamba", "falcon-h1"])
def test_saving_in_the_background_keeps_what_was(store: PrefixStore, kind: str) -> None:
    model, ids = tiny(kind), prompt(300)
    cache = cached(model, ids)
    expected = tc.cache_of(tc.frozen(tc.state_of(cache)))
    future = store.put(model, ids, cache, wait=False)
    read(model, prompt(3, seed=1), cache)  # the model goes on and changes what it holds
    store.flush()
    assert future.result().tokens == 300
    again, length = store.get(model, ids, leave=0)
    assert length == 300
    check_same(expected, again, most=1e-30)


def test_closing_waits_for_what_is_being_saved(tmp_path: Path) -> None:
    model, prompts = tiny("llama"), [prompt(300, seed=seed) for seed in range(3)]
    with PrefixStore(tmp_path / "s", preset="exact") as store:
        for ids in prompts:
            store.put(model, ids, cached(model, ids), wait=False)
    with PrefixStore(tmp_path / "s", preset="exact") as store:
        assert [store.get(model, ids, leave=0).length for ids in prompts] == [300] * 3
        store.flush()
    store.close()  # once more is no fault


def test_flush_raises_what_saving_raised(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), prompt(300)

    def full(*_: Any, **__: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pqcodec.formats.store.blocks.write_pieces", full)
    store.put(model, ids, cached(model, ids), wait=False)
    with pytest.raises(OSError, match="No space left"):
        store.flush()


def test_a_fifth_save_is_left_out_with_a_warning(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model, gate = tiny("llama"), threading.Event()
    write = store._write
    monkeypatch.setattr(store, "_write", lambda work: gate.wait(20) and write(work))
    prompts = [prompt(50, seed=seed) for seed in range(5)]
    with pytest.warns(RuntimeWarning, match="4 caches wait to be saved"):
        futures = [store.put(model, ids, cached(model, ids), wait=False) for ids in prompts]
    assert futures[-1].result().tokens == 0
    gate.set()
    store.flush()
    assert [store.get(model, ids, leave=0).length for ids in prompts] == [50, 50, 50, 50, 0]


def test_threads_share_a_store(store: PrefixStore) -> None:
    model, common, wrong = tiny("llama"), prompt(300), []
    prompts = [torch.cat([common, prompt(40 + 10 * seed, seed=seed)], 1) for seed in range(8)]
    caches = [cached(model, ids) for ids in prompts]

    def work(number: int) -> None:
        try:
            for at in np.random.default_rng(number).permutation(len(prompts)):
                store.put(model, prompts[at], caches[at])
                again, length = store.get(model, prompts[at], leave=0)
                assert length == prompts[at].shape[1]
                # the first put of the common beginning counts: caches of one beginning differ in their last bits
                for (_, a), (_, b) in zip(layers(caches[at]), layers(again), strict=True):
                    assert rel_mse(a.tensors["keys"], b.tensors["keys"]) < 1e-9
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    check_whole(store)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is forked")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_store_goes_on_in_a_fork(store: PrefixStore) -> None:
    model, prompts = tiny("llama"), [prompt(300, seed=seed) for seed in range(3)]
    caches = [cached(model, ids) for ids in prompts]
    store.put(model, prompts[0], caches[0])
    child = os.fork()
    if not child:
        code = 1
        try:
            found = store.get(model, prompts[0], leave=0).length
            code = 0 if found == 300 and store.put(model, prompts[1], caches[1]).new_tokens == 300 else 2
        finally:
            os._exit(code)
    store.put(model, prompts[2], caches[2])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [store.get(model, ids, leave=0).length for ids in prompts] == [300] * 3
    check_whole(store)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked to be killed")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("quota", [False, True])
def test_processes_that_are_killed_lose_nothing_and_find_nothing_wrong(tmp_path: Path, quota: bool) -> None:
    found = stress(tmp_path / "s", processes=4, operations=40, seed=1, quota=quota, kill_every=0.02)
    assert (found["wrong"], found["lost"], found["problems"]) == (0, 0, [])
    assert found["puts"] + found["gets"] >= 4 * 40


# -- what is refused ---------------------------------------------------------------------------------------------
def test_numbers_that_are_none_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(600)
    with PrefixStore(tmp_path / "s", preset="pq3") as store:
        for place, left in [(100, 0), (550, 2)]:  # what is whole before it may stay
            cache = cached(model, ids)
            cache.layers[1].keys[0, 1, place, 3] = float("nan")
            with pytest.raises(PQError, match=r"NaN|finite"):
                store.put(model, ids, cache)
            assert len(files(store)) == left
            assert store.get(model, ids).length == left * BLOCK
            check_whole(store)


def test_what_depends_on_more_than_one_sequence_of_tokens_is_refused(store: PrefixStore) -> None:
    model = tiny("llama")
    with pytest.raises(InvalidArgument, match="a cache of 2 sequences; put each one by itself"):
        store.put(model, prompt(20), cached(model, prompt(20, batch=2)))
    with pytest.raises(InvalidArgument, match="the ids of one sequence are expected"):
        store.get(model, prompt(20, batch=2))
    with pytest.raises(InvalidArgument, match="the ids of one sequence are expected"):
        store.get(model, np.zeros(3))
    both = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    with pytest.raises(InvalidArgument, match="depends on more than its tokens"):
        store.put(model, prompt(20), both)
    with pytest.raises(InvalidArgument, match="a config alone does not tell a model"):
        store.get(model.config, prompt(20))
    with pytest.raises(InvalidArgument, match="300 tokens, but the cache holds 400 positions"):
        store.put(tiny("mistral"), prompt(300), cached(tiny("mistral"), prompt(400)))
    cache = cached(model, prompt(20))
    cache.layers[1] = cached(model, prompt(30)).layers[1]
    with pytest.raises(InvalidArgument, match=r"layers that have seen \[20, 30\] tokens"):
        store.put(model, prompt(30), cache)
    with pytest.raises(InvalidArgument, match="one prompt"):
        store.generate(model, prompt(20, batch=2))
    with pytest.raises(InvalidArgument, match=r"attention mask \(1, 20\) leaves tokens out"):
        store.generate(model, prompt(20), attention_mask=torch.tensor([[0] + [1] * 19]))
    with pytest.raises(InvalidArgument, match="use_cache=False"):
        store.generate(model, prompt(20), use_cache=False)
    assert files(store) == []


def test_a_store_is_not_copied(store: PrefixStore) -> None:
    for way in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"a PrefixStore is not copied or pickled.*open PrefixStore\(.* again"):
            way(store)


def test_a_model_that_keeps_no_cache_by_default_answers_alone(store: PrefixStore) -> None:
    """As MPT does; use_cache=True is the user's word against it."""
    model, ids = copy.deepcopy(tiny("llama")), prompt(300)
    model.generation_config.use_cache = False
    asked = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "wait": True}
    for options in ({}, {"generation_config": copy.deepcopy(model.generation_config)}):
        with pytest.warns(RuntimeWarning, match="generates without the store: its generation config says use_cache=False"):
            alone = store.generate(model, ids, **asked, **options)
        assert files(store) == []
    assert torch.equal(alone, store.generate(model, ids, use_cache=True, **asked))
    assert files(store)


@pytest.mark.parametrize("kind", ["mamba", "gemma3", "lfm2"])
def test_recurrent_state_of_two_sequences_is_refused(store: PrefixStore, kind: str) -> None:
    model = tiny(kind)
    with pytest.raises(InvalidArgument, match="a cache of 2 sequences"):
        store.put(model, prompt(20), cached(model, prompt(20, batch=2)))
    assert files(store) == []


@pytest.mark.parametrize(("kind", "longest"), [("phi3, longrope", 64), ("llama, dynamic", 1024)])
def test_frequencies_that_change_with_the_length_end_a_prefix(store: PrefixStore, kind: str, longest: int) -> None:
    model, ids = tiny(kind), prompt(longest + 1)
    state = cached(model, ids[:, :longest])
    assert store.put(model, ids, state).tokens == longest
    assert store.get(model, ids[:, :longest]).length == longest - 1
    assert store.get(model, ids).length == 0
    with pytest.raises(InvalidArgument, match=f"changes all keys of sequences beyond {longest} tokens"):
        store.put(model, ids, cached(model, ids))
    check_whole(store)


# -- elsewhere ---------------------------------------------------------------------------------------------------
NUMBER = itertools.count()


@pytest.mark.parametrize("kind", ["llama", "falcon-h1"])
def test_blocks_below_a_url(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("fsspec")
    url = f"memory://prefixes{next(NUMBER)}/{kind}"
    model, ids = tiny(kind), prompt(600)
    cache = cached(model, ids)
    with PrefixStore(tmp_path / "one", preset="exact", data=url) as store:
        assert store.put(model, ids, cache).new_tokens == 600
        assert not (tmp_path / "one" / "blocks").exists()
        check_same(cache, store.get(model, ids, leave=0).cache, most=1e-30)
    with pytest.warns(RuntimeWarning, match="3 blocks were found again"):
        opened = PrefixStore(tmp_path / "two", preset="exact", data=url)
    with opened as store:
        again, length = store.get(model, ids, leave=0)
        assert length == 600
        check_same(cache, again, most=1e-30)
        assert store.shelf.gc(grace=0) == {"orphans": 0, "missing": 0, "evicted_bytes": 0}
        row = store.shelf.index.all()[-1]
        store.shelf.files.remove(row.file)
        with pytest.warns(RuntimeWarning, match="is damaged"):
            assert store.get(model, ids, leave=0).length == (2 * BLOCK if kind == "llama" else 0)
        store.put(model, ids, cache)
        assert store.get(model, ids, leave=0).length == 600
        for at in store.shelf.index.all():
            store.shelf.drop(at)
        assert list(store.shelf.files.all()) == []


@pytest.mark.parametrize("place", ["pqcodec.formats.places.atomic._sync", "pqcodec.formats.places.atomic.os.replace"])
def test_a_full_disk_leaves_nothing(store: PrefixStore, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    model, ids = tiny("llama"), prompt(600)
    cache = cached(model, ids)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(place, full)
        with pytest.raises(OSError, match="No space left"):
            store.put(model, ids, cache)
    assert files(store) == []
    assert store.get(model, ids).length == 0
    assert store.put(model, ids, cache).new_tokens == 600
    check_same(cache, store.get(model, ids, leave=0).cache, most=1e-30)
    check_whole(store)


def test_a_commit_that_fails_leaves_no_row(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the disk is full for the index alone: the file goes too, or is an orphan that gc collects."""
    model, ids = tiny("llama"), prompt(600)
    cache = cached(model, ids)

    def full(*_: Any) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.shelf.index, "add", full)
        with pytest.raises(OSError, match="No space left"):
            store.put(model, ids, cache)
    assert store.shelf.index.all() == []
    store.shelf.gc(grace=0)
    assert files(store) == []
    assert store.put(model, ids, cache).new_tokens == 600
    check_whole(store)


def test_gaussian_layers_of_any_shape(store: PrefixStore) -> None:
    """Layers that differ in heads and head_dim are stacked with their like, and come back where they were."""
    model, cache, ids = Identity.of(tiny("llama")), transformers.DynamicCache(), prompt(600)
    for index, (heads, dim) in enumerate([(2, 16), (1, 32), (2, 16), (4, 8)]):
        cache.update(gaussian(1, heads, 600, dim, seed=index), gaussian(1, heads, 600, dim, seed=9 + index), index)
    store.put(model, ids, cache)
    check_same(cache, store.get(model, ids, leave=0).cache, most=1e-30)


@pytest.mark.parametrize("tokens", [60, 80])
def test_generation_past_the_length_that_frequencies_change_at(store: PrefixStore, tokens: int) -> None:
    """The answer comes all the same; only what cannot be used again is left out."""
    model, ids = tiny("phi3, longrope"), prompt(tokens)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert store.generate(model, ids, wait=True, **options).shape[1] == tokens + 12
    assert store.get(model, ids[:, :64], leave=0).length == (59 if tokens == 60 else 0)


def test_a_save_that_fails_in_the_background_is_told(store: PrefixStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise OSError("no space left")

    def saved() -> BaseException | None:
        future = store.put(model, ids, cached(model, ids), wait=False)
        return future.exception()  # type: ignore[union-attr]

    model, ids = tiny("llama"), prompt(20)
    monkeypatch.setattr(store, "_write", full)
    with pytest.warns(RuntimeWarning, match="a cache of 20 tokens could not be saved: no space left"):
        assert isinstance(saved(), OSError)


# -- caches of others --------------------------------------------------------------------------------------------
def test_a_cache_that_the_model_did_not_fill_is_refused(store: PrefixStore) -> None:
    model, ids = tiny("llama"), prompt(300)
    with pytest.raises(InvalidArgument, match="of nothing; the model's own is a DynamicLayer of keys"):
        store.put(model, ids, transformers.DynamicCache(config=model.config))
    with pytest.raises(InvalidArgument, match="layer 0 of the cache"):
        store.put(model, ids, cached(tiny("llama, one kv head"), ids))
    without_config = transformers.DynamicCache()
    read(tiny("gemma3"), ids, without_config)  # which keeps all tokens, and no windows
    with pytest.raises(InvalidArgument, match="pass the cache that the model filled"):
        store.put(tiny("gemma3"), ids, without_config)
    half = cached(model, ids)
    half.layers[1].keys, half.layers[1].values = half.layers[1].keys.half(), half.layers[1].values.half()
    with pytest.raises(InvalidArgument, match=r"layer 1 .* torch.float16"):
        store.put(model, ids, half)
    with pytest.raises(InvalidArgument, match="leave=-1"):
        store.get(model, ids, leave=-1)
    assert not files(store)


def test_what_was_decoded_is_not_kept_as_exact(tmp_path: Path) -> None:
    model, ids = tiny("llama"), prompt(320)
    with PrefixStore(tmp_path / "a", preset="pq2") as coarse, PrefixStore(tmp_path / "b", preset="exact") as exact:
        coarse.put(model, ids[:, :300], cached(model, ids[:, :300]))
        cache, length = coarse.get(model, ids)
        read(model, ids[:, length:], cache)
        with pytest.raises(InvalidArgument, match="numbers of preset pq2"):
            exact.put(model, ids, cache)
        assert coarse.put(model, ids, cache).tokens == 320
        empty, length = exact.get(model, ids)
        read(model, ids[:, length:], empty)
        assert exact.put(model, ids, empty).tokens == 320
        with pytest.raises(InvalidArgument, match="extra is a bytes"):
            exact.get(model, ids, extra=b"x")


# -- several devices ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma3n"])
def test_layers_lie_where_the_models_do(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model on several devices; here its last layer is said to be on the device that has no memory."""
    model, ids = copy.deepcopy(tiny(kind)), prompt(300)
    cache = cached(model, ids)
    with PrefixStore(tmp_path / "s", preset="exact") as store:
        store.put(model, ids, cache)
        tc.save(cache, tmp_path / "a.pqkv", model)
        model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "meta"}
        places = ["cpu", *["meta"] * (len(model.get_decoder().layers) - 1)]
        for module in ("transformers_cache", "transformers_cache.files"):
            monkeypatch.setattr(f"pqcodec.formats.engines.{module}.layer_devices", lambda _: places)
        found, length = store.get(model, ids, leave=0)
        assert length == 300
        for again in (found, tc.load(tmp_path / "a.pqkv", model)):
            assert {layer.keys.device.type for layer in again.layers if layer.keys is not None} == {"cpu", "meta"}
        check_same(cache, store.get(model, ids, leave=0, device="cpu").cache, most=1e-9)
