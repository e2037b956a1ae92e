"""Arguments of the wrong kind are refused by name, never by an error of Python's; sizes may be written as people write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pqcodec
from pqcodec.errors import BackendUnavailable, InvalidArgument
from pqcodec.formats import HostPool, PrefixStore, load_cache, save_cache
from pqcodec.formats.cache import save_safetensors, save_zarr
from pqcodec.formats.offload import encode_blocks
from pqcodec.formats.offload.pinned import PinnedArena
from pqcodec.sizes import size_of
from pqcodec.stages.centre import Rope

transformers = pytest.importorskip("transformers")
from pqcodec.formats.engines import transformers_cache as tc  # noqa: E402
from pqcodec.formats.offload.encoded_cache import EncodedCache  # noqa: E402

X = np.ones((2, 8, 64), np.float16)
TORCH = torch.ones(2, 64, 64)
PAGED = "2,blocks,block,heads,dim"
PAGES = torch.ones(2, 4, 16, 2, 64)
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}


# -- sizes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("given", "size"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), (4096, 4096), (2e6, 2 * 10**6)])
def test_a_size(given: Any, size: int) -> None:
    assert size_of(given, "max_bytes") == size


@pytest.mark.parametrize("given", ["much", "-5", "", -1, float("nan"), None, [1], True, b"5GB"])
def test_what_is_no_size(given: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^max_bytes .* a size such as 20GB"):
        size_of(given, "max_bytes")


def test_sizes_in_public_classes(tmp_path: Path) -> None:
    with PrefixStore(tmp_path / "store", max_bytes="512MiB") as store:
        assert store.shelf.max_bytes == 512 << 20
    with HostPool("1MiB", device="cpu", piece_bytes="64kiB") as pool:
        assert pool.usage().capacity_bytes == 1 << 20
    assert PinnedArena("4KiB", pinned=False).capacity_bytes == 4096
    for name, make in (
        ("max_bytes", lambda: PrefixStore(tmp_path / "other", max_bytes="5 apples")),
        ("capacity_bytes", lambda: HostPool("5 apples", device="cpu")),
        ("piece_bytes", lambda: HostPool("1MiB", device="cpu", piece_bytes="5 apples")),
    ):
        with pytest.raises(InvalidArgument, match=f"^{name} '5 apples': a size"):
            make()
    assert not (tmp_path / "other").exists()


# -- kinds -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def stream() -> bytes:
    return pqcodec.encode(X, backend="reference")


@pytest.mark.parametrize("device", ["nope", "mps", "meta"])
def test_a_device_is_called_a_device(device: str, stream: bytes, tmp_path: Path) -> None:
    words = f"device '{device}'.* there"
    with pytest.raises(BackendUnavailable, match=words):
        pqcodec.decode(stream, device=device)
    save_cache(tmp_path / "c.pqkv", [(X, X)], backend="reference")
    with pytest.raises(BackendUnavailable, match=words):
        load_cache(tmp_path / "c.pqkv", device=device)
    if device == "nope":
        with pytest.raises(BackendUnavailable, match=words):
            HostPool(1 << 20, device=device)


WRONG: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: pqcodec.encode(X, preset=[]), r"^preset \[\]: one is expected here; save_cache and EncodedCache take a pair"),
    (lambda path: pqcodec.encode(X, backend=[]), r"^backend \[\] is unknown"),
    (lambda path: pqcodec.encode(X, center="rope", rope=5), "^rope is a int; a pqcodec.Rope is expected"),
    (lambda path: pqcodec.encode(X, exact_vectors=5.0, backend="reference"), "^exact_vectors .* pairs"),
    (lambda path: pqcodec.decode(pqcodec.encode(X, backend="reference"), tokens=5), "^tokens 5: two whole numbers"),
    (lambda path: pqcodec.decode(pqcodec.encode(X, backend="reference"), tokens=("a", 1)), "^tokens .* two whole numbers"),
    (lambda path: save_cache(path, None), "^layers is a NoneType: a list of"),
    (lambda path: save_cache(path, [None]), "^layers is a list: a list of"),
    (lambda path: save_cache(path, [(X, X, X)]), "^layers is a list: a list of"),
    (lambda path: save_cache(None, [(X, X)]), "^target is a NoneType; a path, a URL or a binary file"),
    (lambda path: save_cache(path, [(X, X)], metadata=5), "^metadata is a int; a dict"),
    (lambda path: save_safetensors(path, None), "^layers is a NoneType"),
    (lambda path: save_safetensors(path, [(X, X)], metadata=[]), "^metadata is a list; a dict"),
    (lambda path: save_zarr(None, [(X, X)]), "^store is a NoneType; a path or URL"),
    (lambda path: tc.load(None, transformers.LlamaConfig(**SIZES)), "^path is a NoneType; a path or URL"),
    (lambda path: PrefixStore(None), "^folder is a NoneType; a path or URL"),
    (lambda path: PrefixStore(path, data=5), "^data is a int; a path or URL"),
    (lambda path: PrefixStore(""), "^folder is empty; a path or URL is expected"),
    (lambda path: PrefixStore("~/store"), r"^folder ~/store: only a shell .* os.path.expanduser\('~/store'\)"),
    (lambda path: PrefixStore(path, data="~"), "^data ~: only a shell"),
    (lambda path: HostPool(1 << 20, device="cpu", spill=""), "^spill is empty"),
    (lambda path: save_zarr("", [(X, X)]), "^store is empty"),
    (lambda path: save_cache("", [(X, X)]), "^path is empty"),
    (lambda path: save_cache("~/kv.pqkv", [(X, X)]), "^path ~/kv.pqkv: only a shell"),
    (lambda path: save_zarr(Path("~/kv.zarr"), [(X, X)]), "^store ~/kv.zarr: only a shell"),
    (lambda path: PrefixStore(path, tenant=5), "^tenant 5: a string is expected"),
    (lambda path: PrefixStore(path, tenant=""), "^tenant '': a string is expected, a long random one"),
    (lambda path: PrefixStore(path, tenant_max_bytes="1MB"), "^tenant_max_bytes and tenant_max_age are limits of a tenant"),
    (lambda path: save_cache(path / "a.zarr", []), "a.zarr: save_cache writes a .pqkv file; call save_zarr for a .zarr"),
    (lambda path: save_cache(path / "a", [np.ones((2, 8, 64), np.float16)] * 2), "layer 0 is a ndarray"),
    (
        lambda path: save_cache(path / "a", [(X, X), (X, X[:, :5])]),
        r"^layer 1: keys \(2, 8, 64\) and values \(2, 5, 64\) are not",
    ),
    (
        lambda path: save_zarr(path / "a", [(X, X[:1])]),
        r"^layer 0: keys \(2, 8, 64\) and values \(1, 8, 64\) are not of the same",
    ),
    (
        lambda path: save_safetensors(path / "a", [(X[0, 0], X[0, 0])]),
        r"^layer 0: keys \(64,\) and values \(64,\); \[..., tokens",
    ),
    (lambda path: save_cache(path / "a", [(X, X)], rope=5e5), "^rope is a float; a pqcodec.Rope is expected, such as"),
    (lambda path: save_cache(path / "a", [(X, X)], preset=("pq3",)), "^1 presets are given; give one for all, or one of keys"),
    (lambda path: save_cache(path / "a", [(X, X)], preset=("pq3", "pq9")), "^preset 'pq9' is unknown"),
    (lambda path: save_cache(path / "a", [(X, X)], preset=("pq4", None)), "^preset None is unknown"),
    (lambda path: encode_blocks(PAGES, PAGED, [1], 3, preset=None), "^preset None is unknown"),
    (lambda path: encode_blocks(PAGES, PAGED, [1], 3, preset=("quad3",)), "^1 presets are given"),
    (
        lambda path: pqcodec.encoded_size((2, 8, 64), exact_vectors=[(0, 1)]),
        r"^exact_vectors \[\(0, 1\)\]: how many of each",
    ),
    (lambda path: PrefixStore(path, preset=("pq4", "pq3")), r"^preset \('pq4', 'pq3'\): one is expected here"),
    (lambda path: HostPool(1 << 20, device="cpu", preset=5), "^preset 5 is unknown"),
    (lambda path: HostPool(1 << 20, device="cpu", spill=5), "^spill is a int; a path or URL"),
    (lambda path: EncodedCache(None), "^a transformers model or its config is expected, not NoneType"),
    (lambda path: EncodedCache(transformers.LlamaConfig(**SIZES), preset=5), "^preset 5 is unknown"),
]


@pytest.mark.parametrize(("call", "words"), WRONG, ids=[words[:30] for _, words in WRONG])
def test_a_wrong_argument_is_named(call: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=words):
        call(tmp_path / "c")


def test_wrong_arguments_of_a_pool() -> None:
    with HostPool(1 << 20, device="cpu", backend="reference") as pool:
        for tensors in (None, 5):
            with pytest.raises(InvalidArgument, match=r"^tensors is a "):
                pool.put("a", tensors)
        for options in ({"preset": 5}, {"center": 5}, {"rope": 5}):
            with pytest.raises(InvalidArgument, match=f"^{next(iter(options))} is a int; one for all"):
                pool.put("a", TORCH, **options)


def test_wrong_arguments_of_a_store(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    with PrefixStore(tmp_path / "store", backend="reference") as store:
        for leave in ("1", None, -5):
            with pytest.raises(InvalidArgument, match=f"^leave={leave!r}: a number of tokens"):
                store.get(model, [1, 2], leave=leave)
        with pytest.raises(InvalidArgument, match=r"^tokens: the ids of one sequence"):
            store.get(model, [[1, 2], [3]])
        for ids in ([1, 2], [[1, 2]], None):
            with pytest.raises(InvalidArgument, match=r"^input_ids is a .*; a tensor of token ids \[1, n\]"):
                store.generate(model, ids)
        with pytest.raises(InvalidArgument, match=r"^a transformers model is expected, not NoneType"):
            store.generate(None, torch.tensor([[1, 2]]))


def test_an_unknown_device_is_not_taken_for_a_damaged_file(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        model(torch.arange(40)[None], past_key_values=cache)
    tc.save(cache, tmp_path / "c.pqkv", model, backend="reference")
    for options in ({"device": "nope"}, {"backend": "nope"}):
        with pytest.raises(BackendUnavailable, match="nope"):
            tc.load(tmp_path / "c.pqkv", model, **options)


def test_a_rope_is_still_a_rope() -> None:
    assert pqcodec.inspect(pqcodec.encode(X, center="rope", rope=Rope(), backend="reference")).centered == "rope"
