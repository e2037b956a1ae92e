"""The way of a tensor through the house: calls go down the floors, but for what was handed down to be called.

A trace of every call counts the functions that are called from a floor below their own. What may climb is progress, on its way
to whoever watches, and a tensor that is made when its turn comes.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import gaussian
from floors import FORMATS_ORDER, ORDER
from safetensors.numpy import save_file
from typer.testing import CliRunner

from pqcodec.formats import HostPool, PrefixStore
from pqcodec.tools.cli import app

MOST = 5  # functions that are called from below, on any of the ways

LINES = [*ORDER, *FORMATS_ORDER]
FLOORS = {name: number for number, line in enumerate(LINES) for name in line.split()} | {"tools": len(LINES)}


def floor(module: str) -> int | None:
    """The floor of a module of pqcodec, by its folder; packages that only import have none."""
    names = module.split(".")[1:]
    return FLOORS.get(names[1] if names[0] == "formats" and len(names) > 1 else names[0]) if names else None


@contextmanager
def traced() -> Iterator[set[str]]:
    """The functions that are called from a floor below their own, by module and name."""
    climbs: set[str] = set()

    def look(frame: FrameType, event: str, _: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event != "call" or not module.startswith("pqcodec."):
            return
        if frame.f_code.co_flags & inspect.CO_GENERATOR and frame.f_lasti > 0:  # it goes on
            return
        caller = frame.f_back
        while caller is not None and not caller.f_globals.get("__name__", "").startswith("pqcodec."):
            caller = caller.f_back
        to, of = floor(module), floor(caller.f_globals["__name__"]) if caller else None
        if to is not None and of is not None and to > of:
            climbs.add(f"{module}.{frame.f_code.co_qualname}")

    sys.setprofile(look)
    threading.setprofile(look)
    try:
        yield climbs
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def walk(way: Callable[[], Any]) -> None:
    """Go a way twice: what is compiled, imported or read once is not counted."""
    way()
    with traced() as climbs:
        way()
    assert len(climbs) <= MOST, sorted(climbs)


def test_encode_and_decode_on_the_command_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"layers.{layer}.{role}" for layer in range(8) for role in ("key", "value")]
    save_file({name: rng.standard_normal((1, 2, 300, 64)).astype(np.float16) for name in names}, tmp_path / "kv.safetensors")

    def run(*arguments: str) -> None:
        result = CliRunner().invoke(app, [str(tmp_path / a) if "." in a else a for a in arguments])
        assert result.exit_code == 0, result.output

    walk(lambda: run("encode", "kv.safetensors", "kv.pqkv", "--rope-theta", "10000", "--force"))
    walk(lambda: run("decode", "kv.pqkv", "back.safetensors", "--force"))


def test_put_and_get_of_a_pool() -> None:
    tensors = [gaussian(2, 64, 64), gaussian(2, 64, 64)]
    with HostPool(1 << 20, device="cpu") as pool:
        walk(lambda: pool.put("a", tensors, wait=True))
        walk(lambda: pool.get("a"))


def test_put_and_get_of_a_store_and_update_of_an_encoded_cache(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from pqcodec.formats.offload import EncodedCache

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 100, (1, 600))
    prompts = iter(torch.cat([torch.full((1, 1), n), ids], 1) for n in range(100))
    with torch.inference_mode(), PrefixStore(tmp_path / "store") as store:

        def put() -> None:
            prompt, cache = next(prompts), transformers.DynamicCache(config=config)
            model(prompt, past_key_values=cache)
            store.put(model, prompt, cache)

        walk(put)
        walk(lambda: store.get(model, torch.cat([torch.zeros((1, 1), dtype=torch.long), ids], 1)))
        cache = EncodedCache(model, place="device", window=16, chunk=64)
        walk(lambda: model(ids[:, :100], past_key_values=cache))
