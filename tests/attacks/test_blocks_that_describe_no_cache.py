"""Tried: sound files whose metadata tell of layers that no cache has. Must: the prefix ends before, with a warning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attacks.edits import rewrite
from attacks.ground import Ground
from pqcodec.errors import PQError
from pqcodec.formats import PQKVFile
from pqcodec.formats.engines import transformers_cache
from pqcodec.formats.store import blocks


def kinds(key: str, value: Any) -> Callable[[Any], None]:
    return lambda told: [kind.update({key: value}) for kind in told["kinds"]] and None


def field(key: str, value: Any) -> Callable[[Any], None]:
    return lambda told: [kind["fields"].update({key: value}) for kind in told["kinds"]] and None


def groups(change: Callable[[Any], Any], tensors: bool = True) -> Callable[[Any], None]:
    def forge(told: Any) -> None:
        for group in told["groups"]:
            group.update(change(group))
        if not tensors:
            kinds("tensors", [])(told)

    return forge


def layer(kind: str, **fields: Any) -> Callable[[Any], None]:
    return lambda told: [one.update({"class": kind, "fields": fields}) for one in told["kinds"]] and None


FORGED: dict[str, Callable[[Any], None]] = {
    "fields that are none": kinds("fields", []),
    "a class that is none": kinds("class", []),
    "a class of another name": kinds("class", "Cache"),
    "a field that no layer has": field("foo", 1),
    "a dtype that is a number": field("dtype", {"torch.dtype": 5}),
    "a dtype that is a function": field("dtype", {"torch.dtype": "load"}),
    "room for more states than there is memory": layer("LinearAttentionLayer", number_of_states=10**12),
    "a window that no number holds": layer("DynamicSlidingWindowLayer", sliding_window=2**70),
    "layers behind the last": groups(lambda group: {"layers": [100 + n for n in group["layers"]]}, tensors=False),
    "layers before the first": groups(lambda group: {"layers": [n - 100 for n in group["layers"]]}, tensors=False),
    "layers by name": groups(lambda group: {"layers": [str(n) for n in group["layers"]]}, tensors=False),
    "layers between two": groups(lambda group: {"layers": [float(n) for n in group["layers"]]}),
    "a path that no layer has": groups(lambda group: {"path": "zzz"}, tensors=False),
    "a state of layers that have none": groups(lambda group: {"state": True}),
    "no layers": lambda told: told.update(layers=[]),
}


@pytest.mark.parametrize("what", FORGED)
def test_a_block(ground: Ground, what: str) -> None:
    path = ground.first()
    with PQKVFile(path.read_bytes()) as file:
        told = file.metadata[blocks.KEY]
    FORGED[what](told)
    rewrite(path, {blocks.KEY: told})
    with pytest.warns(RuntimeWarning, match=r"damaged and was dropped|cannot be read"):
        assert ground.get() == 0
    ground.put()
    ground.use_everything()


@pytest.mark.parametrize("fields", [{"number_of_states": 10**12}, {"number_of_states": -1}, {"number_of_states": True}])
def test_a_cache_in_a_file(ground: Ground, tmp_path: Path, fields: dict[str, Any]) -> None:
    layers = [{"class": "LinearAttentionLayer", "fields": fields, "tensors": []}]
    told = {"format": 1, "class": "DynamicCache", "parts": {"": layers}}
    path = tmp_path / "cache.pqkv"
    path.write_bytes(ground.first().read_bytes())
    rewrite(path, {transformers_cache.KEY: told})
    with pytest.raises(PQError, match="no such layer"):
        transformers_cache.load(path)
