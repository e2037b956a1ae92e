"""Tried: URLs where a local path is needed, of schemes that nobody serves, with one slash. Must: a refusal, and no folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attacks.ground import Ground
from pqcodec.errors import InvalidArgument
from pqcodec.formats import HostPool, PQKVAppender, PQKVFile, PQKVWriter, PrefixStore, load_cache, save_cache
from pqcodec.formats.containers.kinds import convert, open_encoded
from pqcodec.formats.plain.files import write_tensors
from pqcodec.formats.plain.in_memory import InMemory

LAYERS = [(np.ones((1, 8, 64), np.float16), np.ones((1, 8, 64), np.float16))]
UNKNOWN = (
    "mongodb://host/0",
    "nonsense://x",
    "s4://bucket/x.pqkv",
    "redis:/host",
    "s3:/bucket/x.pqkv",
    Path("s3://bucket/x.pqkv"),
)
LOCAL_ONLY: dict[str, Callable[[Any], Any]] = {
    "PrefixStore": PrefixStore,
    "HostPool": lambda url: HostPool(1 << 20, device="cpu", spill=url),
    "PQKVAppender": lambda url: PQKVAppender(url).__enter__(),
}
ANY: dict[str, Callable[[Any], Any]] = {
    "data": lambda url: PrefixStore("store", data=url),
    "PQKVWriter": lambda url: PQKVWriter(url).__enter__(),
    "PQKVFile": PQKVFile,
    "save_cache": lambda url: save_cache(url, LAYERS),
    "load_cache": load_cache,
    "open_encoded": open_encoded,
    "convert": lambda url: convert("in.pqkv", url, to="zarr"),
    "write_tensors": lambda url: write_tensors(f"{url}.npz", InMemory({"x": LAYERS[0][0]}), {}),
}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    save_cache("in.pqkv", LAYERS)
    yield
    assert {path.name for path in Path().iterdir()} <= {"in.pqkv", "store"}


@pytest.mark.parametrize("url", [*UNKNOWN, "s3://bucket/x", "memory://x", "file:///tmp/x"], ids=repr)
@pytest.mark.parametrize("who", LOCAL_ONLY)
def test_where_only_a_local_path_can_be(who: str, url: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"is a URL|files of a store|one slash"):
        LOCAL_ONLY[who](url)


@pytest.mark.parametrize("url", UNKNOWN, ids=repr)
@pytest.mark.parametrize("who", ANY)
def test_schemes_that_nobody_serves(who: str, url: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"Protocol not known|one slash"):
        ANY[who](url)


@pytest.mark.parametrize("url", [str(url) for url in UNKNOWN])
def test_on_the_command_line(ground: Ground, url: str) -> None:
    for words in (
        ("encode", url, "x.pqkv"),
        ("decode", "in.pqkv", f"{url}.npz"),
        ("decode", "in.pqkv", "in.pqkv", f"{url}/"),
        ("convert", "in.pqkv", f"{url}.zarr"),
        ("verify", url),
        ("inspect", url),
        ("store", "ls", url),
        ("store", "import", url, "in.pqkv"),
        ("store", "ls", ground.folder, "--data", url),
    ):
        assert ground.run(*words).exit_code == 2, words


@pytest.mark.parametrize("place", ["./exp:/x", "./layer:0", "layer:0", "exp:x/y"])
def test_names_with_a_colon(place: str) -> None:
    """They are local, as the message about one slash advises."""
    PrefixStore(place).close()
    PrefixStore(f"{place}/other", data=f"{place}/data").close()
    with HostPool(40_000, device="cpu", spill=place) as pool:
        for number in range(8):
            pool.put(number, [torch.zeros(1, 512, 64)])
        assert pool.counters.spilled
    shutil.rmtree(Path(place).parts[0])
