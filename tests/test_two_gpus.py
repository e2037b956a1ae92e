"""Two GPUs of one host: pools, caches and stores of tensors that lie on both, with the bits of each GPU by itself.

``pytest tests/test_two_gpus.py`` is the whole command, on a machine with two GPUs; elsewhere all is skipped.
"""

from __future__ import annotations

import copy
import gc
import itertools
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, bits, gaussian, rel_mse

import pqcodec
from pqcodec.errors import InvalidArgument, NonFiniteInput
from pqcodec.formats.offload import HostPool, pinned

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="two GPUs are needed: pytest tests/test_two_gpus.py on a machine with them"
)
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
BOTH = (FIRST, SECOND)
SHAPE = (2, 300, 128)
TOKENS = 300


def tensors(*places: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """On the first GPU where a place is 0, on the second where it is 1."""
    return [gaussian(*SHAPE, seed=seed + i, dtype=dtype).to(BOTH[place]) for i, place in enumerate(places)]


def empty(*places: int) -> list[torch.Tensor]:
    return [torch.full(SHAPE, float("nan"), dtype=torch.bfloat16, device=BOTH[place]) for place in places]


def coded(x: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """What a tensor is after encode and decode, where it lies."""
    return pqcodec.decode(pqcodec.encode(x, backend=backend), backend="cpu")


def same(x: torch.Tensor, y: torch.Tensor) -> bool:
    return bool((bits(x) == bits(y)).all())


def check(xs: Sequence[torch.Tensor], ys: Sequence[torch.Tensor], backend: str = "auto") -> None:
    """That ys are what the codec makes of xs."""
    assert all(same(y, coded(x, backend)) for x, y in zip(xs, ys, strict=True))


def pool_of(backend: str = "auto", capacity: int = 32 << 20, device: Any = BOTH, **options: Any) -> HostPool:
    return HostPool(capacity, device=device, backend=backend, **options)


# -- in and out ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pieces", [1, 2, 9])
@pytest.mark.parametrize("current", BOTH, ids=str)
def test_blocks_come_back_to_their_gpus(gpu_backend: str, pieces: int, current: torch.device) -> None:
    """Again and again, until launches are graphs; whichever GPU is the current one."""
    with torch.cuda.device(current), pool_of(gpu_backend, piece_bytes=pieces * 2 * 300 * 128 * 2) as pool:
        for seed, places in enumerate(2 * [(0, 0, 1, 1), (0, 1, 0, 1), (1, 1, 1, 0)]):
            xs = tensors(*places, seed=10 * seed)
            pool.put("a", xs, wait=seed % 2 == 0)
            if seed % 3 == 2:
                assert pool.prefetch("a")
            found = pool.get("a")
            assert [y.device for y in found] == [x.device for x in xs]
            check(xs, found, gpu_backend)
        assert torch.cuda.current_device() == current.index
        one = tensors(1)[0]
        pool.put("one", one)
        assert pool.get("one").device == SECOND
        check([one], [pool.get("one")], gpu_backend)


@pytest.mark.parametrize("prefetched", [False, True])
def test_outs_may_lie_on_either_gpu(prefetched: bool, gpu_backend: str) -> None:
    xs = tensors(0, 0, 0, 1)
    with pool_of(gpu_backend) as pool:
        pool.put("a", xs)
        for places in itertools.product((0, 1), repeat=4):
            assert not prefetched or pool.prefetch("a")
            outs = empty(*places)
            found = pool.get("a", out=outs)
            assert all(x is y for x, y in zip(found, outs, strict=True))
            check(xs, found, gpu_backend)


def test_parts_of_caches_are_filled_on_the_other_gpu() -> None:
    """Outs of any strides, of a tensor that is several pieces."""
    x = gaussian(5, 300, 128, dtype=torch.bfloat16).to(FIRST)
    cache = torch.full((300, 8, 128), float("nan"), dtype=torch.bfloat16, device=SECOND)
    with pool_of(piece_bytes=2 * x[0].nbytes) as pool:
        pool.put("a", x)
        out = cache[:, 1:6].transpose(0, 1)
        pool.get("a", out=out)
        check([x], [out])
        assert cache[:, 0].isnan().all()
        assert cache[:, 6:].isnan().all()


def test_no_device_means_every_gpu_and_none_is_opened_that_nobody_uses() -> None:
    with pool_of(device=None) as pool:
        assert pool.device == FIRST
        assert set(BOTH) <= set(pool.devices)
        xs = tensors(0, 0)
        pool.put("a", xs)
        check(xs, pool.get("a"))
        assert set(pool._lanes._made) == {FIRST}
        xs = tensors(0, 1)
        pool.put("b", xs)
        check(xs, pool.get("b"))
    with torch.cuda.device(SECOND), pool_of(device="cuda") as pool:
        assert pool.devices == (SECOND,)


def test_what_is_on_no_gpu_of_the_pool_is_refused() -> None:
    with pool_of(device=SECOND) as pool:
        with pytest.raises(InvalidArgument, match="tensor 1 lies on cuda:0, this pool's are on cuda:1"):
            pool.put("a", tensors(1, 0))
        pool.put("a", tensors(1))
        with pytest.raises(InvalidArgument, match="tensor 0 lies on cuda:0"):
            pool.get("a", out=empty(0))
    with pytest.raises(InvalidArgument, match="cpu, cuda:1 are of several kinds"):
        pool_of(device=["cpu", SECOND])


def test_a_pool_of_the_second_gpu_alone_pins_and_gives_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """While the first one is current."""
    codes: list[int] = []
    monkeypatch.setattr(pinned, "_unpin", lambda address: codes.append(int(torch.cuda.cudart().cudaHostUnregister(address))))
    for turn in range(2):
        with pool_of(device=SECOND) as pool:
            for seed in range(4):
                xs = tensors(1, 1, seed=seed)
                pool.put("a", xs)
                pool.prefetch("a")
                check(xs, pool.get("a"))
        del pool
        gc.collect()
        assert codes == [0] * (turn + 1)


# -- disk ----------------------------------------------------------------------------------------------------------
def test_blocks_are_spilled_and_read_again(tmp_path: Path) -> None:
    blocks = {key: tensors(0, 1, seed=10 * seed) for seed, key in enumerate("abcd")}
    with pool_of() as pool:
        pool.put("a", blocks["a"], wait=True)
        room = 2 * pool.usage().used_bytes
    with pool_of(capacity=room, spill=tmp_path) as pool:
        for key, xs in blocks.items():
            pool.put(key, xs)
        for key, xs in 2 * [*blocks.items()]:
            assert key != "b" or pool.prefetch(key)
            check(xs, pool.get(key, out=empty(1, 0) if key in "ab" else None))
        assert pool.counters.spilled >= 2
        assert pool.counters.reloaded >= 4
    assert not list(tmp_path.iterdir())


# -- failures ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_on_either_gpu_do_not_replace_a_block(place: int, value: float, gpu_backend: str) -> None:
    xs, bad = tensors(0, 1), tensors(0, 1, seed=5)
    bad[place][1, 3, 5] = value
    with pool_of(gpu_backend) as pool:
        pool.put("a", xs, wait=True)
        used = pool.usage().used_bytes
        with pytest.raises(NonFiniteInput):
            pool.put("a", bad, wait=True)
        check(xs, pool.get("a"), gpu_backend)
        assert pool.usage().used_bytes == used


def test_host_memory_that_is_overwritten_is_told_by_the_gpu_that_reads_it() -> None:
    xs = tensors(0, 1)
    with pool_of() as pool:
        pool.put("a", xs, wait=True)
        pool._blocks["a"].hosts[1][-40] ^= 1  # of the second GPU's tensor
        for outs in (None, empty(1, 0)):
            with pytest.raises(pqcodec.CorruptStream):
                pool.get("a", out=outs)


# -- who waits for whom --------------------------------------------------------------------------------------------
def test_tensors_are_read_behind_their_own_gpus_work_and_may_be_written_behind_a_put() -> None:
    """Nothing here waits on the host between filling, put, and writing over what was put."""
    last = [gaussian(8, 2048, 128, seed=place, dtype=torch.bfloat16).to(BOTH[place]) for place in (0, 1)]
    xs = [torch.zeros_like(x) for x in last]
    expected = [coded(x) for x in last]
    for device in BOTH:
        torch.cuda.synchronize(device)
    with pool_of(capacity=64 << 20) as pool:
        pool.put("warm", xs, wait=True)
        for _ in range(4):
            for device, x, numbers in zip(BOTH, xs, last, strict=True):
                with torch.cuda.device(device):
                    torch.cuda._sleep(20_000_000)
                    x.copy_(numbers)
            put = pool.put("a", xs)
            for device, x in zip(BOTH, xs, strict=True):
                put.read(torch.cuda.current_stream(device))
                x.zero_()
            put.wait()
            found = pool.fetch("a")
            assert found is not None
            copies = [y.clone() for y in found.tensors]  # on the current streams, which have to see them filled
            crossed = [found.tensors[0].to(SECOND), found.tensors[1].to(FIRST)]
            found.wait()
            for ys in (copies, crossed, found.tensors):
                assert all(same(x, y) for x, y in zip(expected, ys, strict=True))


def test_a_put_may_be_waited_for_on_a_stream_of_either_gpu() -> None:
    """``Put.read`` waits for the tensors of both GPUs."""
    xs = [gaussian(8, 2048, 128, seed=place, dtype=torch.bfloat16).to(BOTH[place]) for place in (0, 1)]
    expected = [coded(x) for x in xs]
    with pool_of(capacity=64 << 20) as pool:
        pool.put("warm", xs, wait=True)
        for device in BOTH:
            kept = [x.clone() for x in xs]
            for each in BOTH:
                torch.cuda.synchronize(each)
            with torch.cuda.device(SECOND):
                torch.cuda._sleep(20_000_000)
            put = pool.put("a", kept)
            stream = torch.cuda.Stream(device)
            put.read(stream)
            stream.synchronize()  # both have been read now, so that whoever may write them
            for x in kept:
                with torch.cuda.stream(torch.cuda.Stream(x.device)):
                    x.zero_()
            for each in BOTH:
                torch.cuda.synchronize(each)
            put.wait()
            assert all(same(x, y) for x, y in zip(expected, pool.get("a"), strict=True))


@pytest.mark.parametrize("spill", [False, True])
def test_threads_put_and_get_on_both_gpus(spill: bool, tmp_path: Path) -> None:
    """What a key gives is always a whole block that was put under it."""
    places = [(0, 1), (1, 0), (0, 0), (1, 1)]
    blocks = {(key, turn): tensors(*places[key], seed=10 * key + 5 * turn) for key in range(4) for turn in range(2)}
    expected = {at: [bits(coded(x)) for x in xs] for at, xs in blocks.items()}
    for device in BOTH:
        torch.cuda.synchronize(device)

    def work(pool: HostPool, seed: int) -> None:
        rng = random.Random(seed)
        with torch.cuda.device(BOTH[seed % 2]):
            for _ in range(60):
                key, dice = rng.randrange(4), rng.random()
                if dice < 0.4:
                    pool.put(key, blocks[key, rng.randrange(2)], wait=rng.random() < 0.5)
                elif dice < 0.8:
                    outs = empty(rng.randrange(2), rng.randrange(2))
                    found = pool.get(key, out=outs if rng.random() < 0.5 else None)
                    if found is not None:
                        told = [bits(x) for x in found]
                        held = [all((x == y).all() for x, y in zip(told, expected[key, turn], strict=True)) for turn in (0, 1)]
                        assert any(held)
                elif dice < 0.9:
                    pool.prefetch(key)
                else:
                    pool.drop(key)

    with pool_of() as pool:
        pool.put(0, blocks[0, 0], wait=True)
        room = 3 * pool.usage().used_bytes
    with pool_of(capacity=room, spill=tmp_path if spill else None) as pool, ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(work, pool, seed) for seed in range(4)]:
            done.result(timeout=120)
        for key in range(4):
            pool.drop(key)
        assert pool.usage().used_bytes == 0
    assert not list(tmp_path.iterdir())


# -- models --------------------------------------------------------------------------------------------------------
def models() -> tuple[Any, Any]:
    """A llama of four layers on the first GPU, and the same one with two layers on each."""
    transformers = pytest.importorskip("transformers")
    accelerate = pytest.importorskip("accelerate")
    sizes = {**TINY, "hidden_size": 256, "num_hidden_layers": 4}  # head_dim 64
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    one = copy.deepcopy(model).to(FIRST)
    firsts = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1")
    seconds = ("model.layers.2", "model.layers.3", "model.norm", "lm_head")
    device_map = {**dict.fromkeys(firsts, FIRST.index), **dict.fromkeys(seconds, SECOND.index)}
    split = accelerate.dispatch_model(model, device_map, skip_keys=getattr(model, "_skip_keys_device_placement", None))
    return one, split


def prompt(tokens: int = TOKENS, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 100, (1, tokens), generator=torch.Generator().manual_seed(seed)).to(FIRST)


def read(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of tokens behind a cache, which they are added to."""
    from pqcodec.formats.engines import transformers_cache as tc

    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, **{tc.argument_of(model): cache}).logits


def check_layers(cache: Any, other: Any) -> None:
    """Caches hold the same numbers, but for the last bits; the first one's layers lie on both GPUs."""
    assert [layer.keys.device for layer in cache.layers] == [FIRST, FIRST, SECOND, SECOND]
    for mine, its in zip(cache.layers, other.layers, strict=True):
        assert rel_mse(mine.keys.cpu(), its.keys.cpu()) < 1e-6
        assert rel_mse(mine.values.cpu(), its.values.cpu()) < 1e-6


def close(x: torch.Tensor, y: torch.Tensor) -> bool:
    return rel_mse(x.cpu(), y.cpu()) < 1e-6


@pytest.mark.parametrize("preset", ["pq3", "pq6"])
def test_a_pool_keeps_the_cache_of_a_split_model(preset: str) -> None:
    transformers = pytest.importorskip("transformers")
    _, split = models()
    cache = transformers.DynamicCache(config=split.config)
    read(split, cache, prompt())
    xs = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    with HostPool(32 << 20, preset=preset) as pool:
        pool.put("request", xs)
        pool.prefetch("request")
        found = pool.get("request")
        for x, y in zip(xs, found, strict=True):
            assert x.device == y.device
            assert same(y, pqcodec.decode(pqcodec.encode(x, preset=preset)))
        for layer, keys, values in zip(cache.layers, found[::2], found[1::2], strict=True):
            layer.keys, layer.values = keys, values
        assert bool(torch.isfinite(read(split, cache, prompt(5, seed=2))).all())


@pytest.mark.parametrize("place", ["host", "device"])
def test_an_encoded_cache_of_a_split_model(place: str) -> None:
    """In steps enough that launches become graphs, reordered, cropped and copied on the way."""
    pytest.importorskip("transformers")
    from pqcodec.formats.offload import EncodedCache

    one, split = models()
    options = {"preset": "pq6", "place": place, "window": 4, "chunk": 8, "exact_tokens": 2}
    caches = [EncodedCache(model, **options) for model in (one, split)]

    def on(pieces: Sequence[int], seed: int) -> None:
        for number, size in enumerate(pieces):
            ids = prompt(size, seed=100 * seed + number)
            assert close(*(read(model, cache, ids) for model, cache in zip((one, split), caches, strict=True)))

    on([100, *[1] * 20, 7], seed=1)
    assert {layer.device for layer in caches[1].encoded_layers} == set(BOTH)
    for cache in caches:
        cache.crop(-30)
        cache.reorder_cache(torch.tensor([0], device=FIRST))
    on([20, 1, 1, 1, 30, 1], seed=2)
    caches = [copy.deepcopy(cache) for cache in caches]
    on([9, 1, 1, 1], seed=3)


def test_text_through_an_encoded_cache_of_a_split_model() -> None:
    pytest.importorskip("transformers")
    from pqcodec.formats.engines import transformers_cache as tc
    from pqcodec.formats.offload import EncodedCache

    options = {"do_sample": False, "max_new_tokens": 24}
    texts = []
    for model in models():
        cache = EncodedCache(model, preset="pq6", window=4, chunk=8)
        texts.append(model.generate(prompt(), **{tc.argument_of(model): cache}, **options).cpu())
    assert torch.equal(*texts)


@pytest.mark.parametrize("preset", ["exact", "pq6"])
def test_a_store_gives_a_split_model_its_layers_where_they_are(tmp_path: Path, preset: str) -> None:
    """And is the same store to the model on one GPU."""
    transformers = pytest.importorskip("transformers")
    from pqcodec.formats import PrefixStore

    one, split = models()
    ids, more = prompt(), prompt(5, seed=2)
    cache = transformers.DynamicCache(config=split.config)
    read(split, cache, ids)
    with PrefixStore(tmp_path / "store", preset=preset) as store:
        assert store.put(split, ids, cache).tokens == TOKENS
        found, length = store.get(split, torch.cat([ids, more], 1))
        by_one, length_of_one = store.get(one, torch.cat([ids, more], 1))
        assert length == length_of_one == TOKENS
        check_layers(found, by_one)
        if preset == "exact":
            assert all(torch.equal(x.keys, y.keys) for x, y in zip(found.layers, cache.layers, strict=True))
            assert close(read(split, copy.deepcopy(found), more), read(split, cache, more))
        assert close(read(split, found, more), read(one, by_one, more))


def test_a_store_generates_with_a_split_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from pqcodec.formats import PrefixStore

    one, split = models()
    ids, options = prompt(), {"do_sample": False, "max_new_tokens": 8}
    expected = one.generate(ids, **options)
    with PrefixStore(tmp_path / "store", preset="exact") as store:
        for model in (split, split, one):
            assert torch.equal(store.generate(model, ids, wait=True, **options), expected)
        assert store.get(split, expected).length == expected.shape[1] - 1
        longer = torch.cat([expected, prompt(250, seed=3)], 1)
        assert torch.equal(store.generate(split, longer, wait=False, **options), one.generate(longer, **options))
        store.flush()


@pytest.mark.parametrize("extension", ["pqkv", "safetensors"])
def test_a_file_gives_a_split_model_its_layers_where_they_are(tmp_path: Path, extension: str) -> None:
    transformers = pytest.importorskip("transformers")
    from pqcodec.formats.engines import transformers_cache as tc

    one, split = models()
    path = tmp_path / f"a.{extension}"
    cache = transformers.DynamicCache(config=split.config)
    read(split, cache, prompt())
    tc.save(cache, path, split, preset="pq6")
    found, by_one = tc.load(path, split), tc.load(path, one)
    check_layers(found, by_one)
    assert {layer.keys.device for layer in by_one.layers} == {FIRST}
    more = prompt(5, seed=2)
    assert close(read(split, found, more), read(one, by_one, more))
