"""The connector for vLLM without vLLM: what is found, loaded and stored, what is a miss, and what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_vllm import ARRANGEMENTS, BLOCK, Engine, Layer, Request, config_of, plug_in

from pqcodec.errors import InvalidArgument, NonFiniteInput
from pqcodec.formats.engines.paged_layers import CacheShape
from pqcodec.formats.engines.vllm_settings import identity_of
from pqcodec.formats.store import engine_store
from pqcodec.formats.store.keys import Chain
from pqcodec.formats.store.shelf import Shelf

IDS = [17 + 31 * n % 901 for n in range(600)]
STORED = 512


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    with plug_in() as found:
        yield found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "rope_theta": 10000.0}))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def engine(module: Any, model: Path, tmp_path: Path) -> Callable[..., Any]:
    """A context with an engine; ``extra`` beside the store's folder, and what ``config_of`` and ``Engine`` take."""

    @contextmanager
    def made(arranged: Any = ARRANGEMENTS[0], split: int = 1, folder: Path = model, **given: Any) -> Iterator[Engine]:
        extra = {"store": str(tmp_path / "store"), "preset": "exact", **given.pop("extra", {})}
        found = Engine(module, *config_of(folder, extra, **given), arranged, split)
        try:
            yield found
        finally:
            found.close()

    return made


def rows_of(tmp_path: Path) -> list[Any]:
    shelf = Shelf(tmp_path / "store")
    rows = shelf.index.all()
    assert [problem for row in rows for problem in shelf.problems(row)] == []
    assert shelf.gc(grace=0) == {"orphans": 0, "missing": 0, "evicted_bytes": 0}
    shelf.close()
    return rows


# -- what is found -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("arranged", ARRANGEMENTS, ids=lambda f: f.__name__)
def test_a_second_engine_loads_the_same_numbers(engine: Any, tmp_path: Path, arranged: Any, split: int) -> None:
    with engine(arranged, split) as first:
        assert first.serve(Request("a", IDS)) == 0
    assert [len(row.tokens) for row in rows_of(tmp_path)] == [256, 256]
    with engine(ARRANGEMENTS[0]) as second:  # arranged otherwise, perhaps
        request = Request("b", [*IDS[:550], 3])
        assert second.admit(request) == STORED
        second.step(request, STORED, 551 - STORED)
        assert second.error(request, 551) == 0
        assert second.worker._store.shelf.index.counters()["hits"] == 1


@pytest.mark.parametrize(("preset", "error", "share"), [("pq3", 0.04, 0.26), ("pq4", 0.011, 0.32)])
def test_coded_blocks_are_small_and_near(engine: Any, tmp_path: Path, preset: str, error: float, share: float) -> None:
    extra = {"preset": preset}
    with engine(extra=extra) as first:
        first.serve(Request("a", IDS))
    naive = STORED * 3 * 2 * 2 * 64 * 2
    assert sum(row.size for row in rows_of(tmp_path)) < share * naive
    with engine(extra=extra) as second:
        assert second.serve(request := Request("b", IDS)) == STORED
        assert 0 < second.error(request, STORED) < error


def test_the_last_token_is_never_loaded(engine: Any) -> None:
    with engine() as first:
        first.serve(Request("a", IDS))
    with engine() as second:
        assert [second.admit(Request(str(n), IDS[:n])) for n in (512, 513, 257, 256, 16)] == [496, 512, 256, 240, 0]


def test_blocks_that_vllm_has_are_left_alone(engine: Any) -> None:
    with engine() as first:
        first.serve(Request("a", IDS))
    with engine() as second:
        request, computed = Request("b", IDS), 17 * BLOCK
        table = [second.free.pop() for _ in range(17)]
        assert second.admit(request, computed, table) == STORED - computed
        second.step(request, STORED, 600 - STORED)
        for cache in second.kv.values():
            assert not cache[table].any()
            assert bool(cache[second.tables["b"][17 : 512 // BLOCK]].any(dim=-1).all())
        assert second.admit(Request("c", IDS), 544, second.tables["b"]) == 0


def test_chunks_of_a_prompt_are_stored_once(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = engine_store.EngineStore.write

    def counted(store: Any, new: Any, *pair: Any) -> int:
        written.extend([new.row.start] * (store.shelf.place == str(tmp_path / "store")))  # not those that compile kernels
        return write(store, new, *pair)

    with engine() as first:
        monkeypatch.setattr(engine_store.EngineStore, "write", counted)
        first.serve(Request("a", IDS), chunk=100)
    with engine() as second:
        second.serve(Request("b", IDS + IDS), chunk=200)
    assert written == [0, 256, 512, 768]
    assert [row.start for row in rows_of(tmp_path)] == [0, 256, 512, 768]
    monkeypatch.undo()
    with engine() as third:
        assert third.serve(request := Request("c", IDS + IDS)) == 1024
        assert third.error(request, 1200) == 0


def test_a_block_that_another_node_encodes_is_left_to_it(tmp_path: Path) -> None:
    shape, chain, ids = CacheShape(2, 1, 64, "float16"), Chain({"model": "tiny"}, "a salt"), np.arange(300)
    x = list(torch.randn(2, 1, 256, 64).half())
    nodes = [engine_store.EngineStore(tmp_path / "store", shape) for _ in range(2)]
    (new,) = nodes[0].missing(chain, ids)
    lease = nodes[1].shelf.index.lease(new.row.name, 30.0)
    assert lease
    assert nodes[0].write(new, x, x) == 0
    nodes[1].shelf.index.release(new.row.name, lease)
    with pytest.raises(NonFiniteInput):
        nodes[0].write(new, [torch.full_like(each, float("nan")) for each in x], x)
    assert nodes[1].write(new, x, x) > 0  # the lease of the one that failed has ended
    assert nodes[0].shelf.index.tenant_bytes()[chain.tenant_id] > 0
    nodes[0].shelf.index.set_limit("max_age", 0, "")
    assert nodes[1].find(chain, ids)[0] == 256  # the limit of blocks without a tenant is not its own
    nodes[0].shelf.index.set_limit("max_age", 0, chain.tenant_id)
    assert nodes[1].find(chain, ids)[0] == 0
    for node in nodes:
        node.close()


def test_a_block_larger_than_the_quota_is_not_said_to_be_stored(tmp_path: Path) -> None:
    store = engine_store.EngineStore(tmp_path / "store", CacheShape(2, 1, 64, "float16"), max_bytes=1000)
    x, chain = list(torch.randn(2, 1, 256, 64).half()), Chain({"model": "tiny"})
    (new,) = store.missing(chain, np.arange(300))
    assert store.write(new, x, x) == 0
    store.close()


def test_a_request_that_waits_or_comes_back_asks_again(engine: Any) -> None:
    with engine() as first:
        first.serve(Request("a", IDS))
    with engine() as second:
        request = Request("b", IDS)
        asked = [second.scheduler.get_num_new_matched_tokens(request, 0) for _ in range(3)]  # no room yet
        assert asked == [(STORED, False)] * 3
        assert second.worker._store.shelf.index.counters()["gets"] == 2  # of each request one
        assert second.admit(request) == STORED
        second.step(request, STORED, 20)
        assert second.admit(request) == STORED  # it was preempted
        second.step(request, STORED, 88)
        assert second.error(request, 600) == 0


# -- what is a miss ------------------------------------------------------------------------------------------------
def test_salts_and_tenants_keep_prompts_apart(engine: Any, tmp_path: Path) -> None:
    with engine() as first:
        first.serve(Request("a", IDS, cache_salt="one"))
    rows = rows_of(tmp_path)
    assert not {int(token) for row in rows for token in row.tokens} & set(IDS)
    with engine() as second:
        found = {salt: second.admit(Request(str(salt), IDS, cache_salt=salt)) for salt in (None, "two", "one")}
        assert found == {None: 0, "two": 0, "one": STORED}
    with engine(extra={"tenant": "one"}) as third:
        assert third.serve(Request("a", IDS)) == 0


@pytest.mark.parametrize(
    "more",
    [
        {"lora_request": "an adapter"},
        {"mm_features": ("an image",)},
        {"prompt_embeds": "some"},
        {"prompt_is_token_ids": [True]},
        {"pooling_params": "some"},
        {"resumable": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_depends_on_more_than_tokens_is_neither_stored_nor_found(engine: Any, tmp_path: Path, more: Any) -> None:
    with engine() as first:
        first.serve(Request("a", IDS, **more))
        assert rows_of(tmp_path) == []
        first.serve(Request("b", IDS))
    with engine() as second:
        assert second.admit(Request("a", IDS, **more)) == 0
        assert second.admit(Request("b", IDS, skip_reading_prefix_cache=True)) == 0
        assert second.admit(Request("c", IDS)) == STORED


@pytest.mark.parametrize("change", ["weights", "config", "code", "dtype", "overrides", "quantization", "preset", "word"])
def test_another_model_finds_nothing(engine: Any, model: Path, change: str) -> None:
    with engine() as first:
        first.serve(Request("a", IDS))
    (model / "README.md").write_text("not of the model")
    with engine() as second:
        assert second.admit(Request("a", IDS)) == STORED
    given: dict[str, Any] = {}
    if change == "weights":
        (model / "model.safetensors").write_bytes(b"Weights")
    elif change == "config":
        (model / "config.json").write_text(json.dumps({"model_type": "llama", "rope_theta": 10001.0}))
    elif change == "code":
        (model / "modeling.py").write_text("pass")
    elif change in ("preset", "word"):
        given = {"extra": {"preset": "pq4"} if change == "preset" else {"weights": "a commit"}}
    else:
        changed = {"dtype": torch.float16, "overrides": {"rope_theta": 5.0}, "quantization": "awq"}[change]
        given = {"model": {"hf_overrides" if change == "overrides" else change: changed}}
    with engine(**given) as third:
        assert third.serve(Request("a", IDS)) == 0


def test_after_a_reset_nothing_of_before_is_found(engine: Any) -> None:
    with engine() as first:
        first.serve(Request("a", IDS))
        assert first.scheduler.reset_cache()
        assert first.serve(Request("b", IDS)) == 0


def test_roles(engine: Any, tmp_path: Path) -> None:
    with engine(role="kv_consumer") as reader:
        assert reader.serve(Request("a", IDS)) == 0
    assert rows_of(tmp_path) == []
    with engine(role="kv_producer") as writer:
        assert writer.serve(Request("a", IDS)) == 0
    with engine(role="kv_producer") as writer:
        assert writer.serve(Request("b", IDS)) == 0
    assert len(rows_of(tmp_path)) == 2
    with engine(role="kv_consumer") as reader:
        assert reader.serve(Request("c", IDS)) == STORED


# -- what breaks ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fault", ["flipped", "torn", "another", "gone"])
def test_a_damaged_block_is_a_miss_and_stored_anew(engine: Any, tmp_path: Path, fault: str) -> None:
    with engine() as first:
        first.serve(Request("a", IDS))
    one, two = (tmp_path / "store" / "blocks" / row.file for row in rows_of(tmp_path))
    data = two.read_bytes()
    if fault == "gone":
        two.unlink()
    else:
        flipped = data[:20000] + bytes([data[20000] ^ 1]) + data[20001:]
        two.write_bytes({"flipped": flipped, "torn": data[:-1], "another": one.read_bytes()}[fault])
    with engine() as second:
        with pytest.warns(RuntimeWarning, match="damaged and was dropped"):
            assert second.serve(request := Request("b", IDS)) == 256
        assert second.error(request, 600) == 0
    with engine() as third:
        assert third.serve(Request("c", IDS)) == STORED


def test_a_store_that_fails_costs_warnings_only(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []

    def fails(name: bytes) -> None:
        calls.append(name)
        raise OSError("no answer")

    with engine() as first:
        first.serve(Request("a", IDS))
        index = first.scheduler._store.shelf.index
        with monkeypatch.context() as patch:
            patch.setattr(index, "find", fails)
            with pytest.warns(RuntimeWarning, match="no answer"):
                assert first.serve(request := Request("b", IDS)) == 0
            assert first.error(request, 600) == 0
        assert first.serve(Request("c", IDS)) == 0  # it is left alone for a while
        assert len(calls) == 1
        first.scheduler._store._asked_from = 0.0
        assert first.serve(Request("d", IDS)) == STORED


def test_a_step_that_fails_stores_nothing(engine: Any, tmp_path: Path) -> None:
    with engine() as first:
        request = Request("a", IDS)
        first.admit(request)
        with pytest.raises(RuntimeError, match="in the middle"):
            first.step(request, 0, 600, RuntimeError("in the middle"))
    assert rows_of(tmp_path) == []


def test_checked_blocks_that_cannot_be_loaded_are_reported(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine() as first:
        first.serve(Request("a", IDS[:300]))
    with engine() as second:
        request = Request("b", IDS)
        assert second.admit(request) == 256
        with monkeypatch.context() as patch:
            patch.setattr(second.worker._store, "decode", lambda *_: 1 / 0)
            assert second.step(request, 256, 344) == set(second.tables["b"][:16])
        assert second.worker.get_block_ids_with_load_errors() == set()
        second.serve(Request("c", IDS))
    assert len(rows_of(tmp_path)) == 1  # nothing that may rest on the wrong numbers


def test_numbers_that_are_none_are_not_stored(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = torch.full((600, 2, 64), torch.nan).bfloat16()
    with engine(extra={"preset": "pq3"}) as first:
        monkeypatch.setattr("fake_vllm.numbers_of", lambda ids, layer: (nan, nan))
        with pytest.warns(RuntimeWarning, match="cannot be stored"):
            first.serve(Request("a", IDS))
    assert rows_of(tmp_path) == []


def test_what_would_wait_too_long_is_left_out(
    engine: Any, module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PENDING_BYTES", 1000)
    with engine() as first, pytest.warns(RuntimeWarning, match="left out"):
        first.serve(Request("a", IDS))
    assert rows_of(tmp_path) == []


def test_a_quota_holds(engine: Any, tmp_path: Path) -> None:
    with engine() as first:
        first.serve(Request("a", IDS))
    size = rows_of(tmp_path)[0].size
    with engine(extra={"max_bytes": 7 * size // 2}) as second, warnings.catch_warnings():
        warnings.simplefilter("error")
        second.serve(Request("b", [9, *IDS]))
    assert len(rows_of(tmp_path)) == 3


# -- what is refused -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"parallel": {"tensor_parallel_size": 2}}, "tensor_parallel_size is 2"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "decode_context_parallel_size is 2"),
        ({"groups": 2}, "2 kinds of caches"),
        ({"kind": "MLAAttentionSpec"}, "latent attention"),
        ({"kind": "SlidingWindowSpec"}, "sliding windows"),
        ({"spec": {"sliding_window": 4096}}, "sliding_window 4096"),
        ({"spec": {"non_causal": True}}, "non_causal"),
        ({"spec": {"head_size_v": 32}}, "head_size_v 32"),
        ({"spec": {"dtype": torch.uint8}, "cache_dtype": "fp8"}, "the KV cache is fp8"),
        ({"names": ["model.layers.0.attn"]}, "3 layers"),
        ({"names": ["a.0.b", "a.1.b", "draft.1.b"]}, "'draft.1.b'"),
        ({"model": {"hf_overrides": print}}, "hf_overrides"),
        ({"load_format": "dummy"}, "'weights'"),
        ({"folder": Path("an/organisation")}, "'weights'"),
        ({"extra": {"weights": ""}}, "weights is ''"),
        ({"extra": {"reset": 1}}, "'reset' is unknown"),
        ({"extra": {"store": None}}, "store is None"),
        ({"extra": {"tenant": 1}}, "tenant"),
        ({"extra": {"preset": "pq99"}}, "pq99"),
        ({"extra": {"rope": "some"}}, "rope is 'some'"),
    ],
)
def test_what_is_not_known_to_be_right_ends_the_start(engine: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words), engine(**given):
        pass


def test_another_release_of_vllm_is_refused(engine: Any, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.vllm, "__version__", "0.33.1")
    with pytest.raises(InvalidArgument, match=r"vLLM is 0.33.1"), engine():
        pass


def test_a_writer_that_does_not_copy_is_refused(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Layer.do_kv_cache_update

    def halved(layer: Layer, of: Any, keys: torch.Tensor, values: torch.Tensor, *rest: Any) -> None:
        write(layer, of, keys, values / 2, *rest)

    monkeypatch.setattr(Layer, "do_kv_cache_update", halved)
    with pytest.raises(InvalidArgument, match="in one place"), engine():
        pass


def test_what_the_operator_says_of_rope_is_for_one_length_of_texts(model: Path) -> None:
    config, _ = config_of(model, {})
    assert "max_model_len" not in identity_of(config, "1", None, False)
    assert identity_of(config, "1", None, True)["max_model_len"] == 2048
