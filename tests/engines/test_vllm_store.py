"""vLLM with SmolLM2's weights in front of a store of prefixes, by pqcodec's own connector: a writer, readers, and what breaks.

``make test-vllm`` makes the environment and the weights' folder. A reader says what one says that loads the same blocks as they
decode in this process (kept exactly, in another store), and after a fault what the writer computed.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm installs it")
from servers import RedisServer, redis_server
from vllm_processes import Answers, VLLMProcess, prompts_of, vllm_process, weights_folder

from pqcodec.formats.engines.paged_layers import CacheShape
from pqcodec.formats.store.engine_store import PAUSE, EngineStore
from pqcodec.formats.store.keys import Chain
from pqcodec.formats.store.shelf import Shelf

PROMPTS, LENGTH, HITS = 2, 600, 512
SHAPE = CacheShape(30, 3, 64, "bfloat16")
NAIVE = 2 * 30 * 3 * 64 * 2  # bytes of a token without a codec
NEAR = 0.35  # nats: how far pq3 may move the first token's logprob, which is measured against what the writer computed


@dataclass
class StorePlace:
    """Where a store is, as the connector's configuration says it."""

    extra: dict[str, Any]
    server: RedisServer | None = None

    def shelf(self) -> Shelf:
        return Shelf(self.extra["store"], self.extra.get("data"))

    def blocks(self) -> int:
        with closing(self.shelf()) as shelf:
            return len(shelf.index.all())

    def flip(self) -> int:
        """Change a byte of every block of the first 256 tokens; returns how many there are."""
        with closing(self.shelf()) as shelf:
            first = [row.file for row in shelf.index.all() if not row.start]
        for file in first:
            path = Path(self.extra.get("data") or f"{self.extra['store']}/blocks", file)
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        return len(first)


@pytest.fixture(scope="module")
def folder() -> Path:
    return weights_folder()


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    return prompts_of(folder, PROMPTS, LENGTH)


@contextmanager
def store_place(kind: str, root: Path) -> Iterator[StorePlace]:
    if kind == "folder":
        yield StorePlace({"store": str(root / "store"), "preset": "pq3"})
        return
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed")
    root.mkdir(exist_ok=True)
    with redis_server(str(root)) as server:
        extra = {"store": f"{server.address}?store=vllm", "data": str(root / "data"), "preset": "pq3"}
        yield StorePlace(extra, server)


@contextmanager
def vllm(folder: Path, extra: dict[str, Any], logs: Path) -> Iterator[VLLMProcess]:
    with vllm_process(folder, json.dumps(extra), logs) as made:
        yield made


def decoded_beforehand(place: StorePlace, prompts: list[list[int]], root: Path) -> dict[str, Any]:
    """A store of exact blocks that hold what the blocks of a place decode to in this process."""
    store = EngineStore(place.extra["store"], SHAPE, data=place.extra.get("data"))
    ((_, settings),) = store.shelf.index.roots().values()
    plain = {**settings, "codec": {**settings["codec"], "preset": "exact"}}
    extra = {"store": str(root / "exact"), "preset": "exact"}
    exact = EngineStore(extra["store"], SHAPE, preset="exact")
    for prompt in prompts:
        ids = np.array(prompt, "<i8")
        tokens, held = store.find(Chain(settings), ids)
        assert tokens == HITS
        for new, block in zip(exact.missing(Chain(plain), ids), held, strict=True):
            assert exact.write(new, *store.decode(block)) > NAIVE * 256
    store.close()
    exact.close()
    return extra


def tokens_of(said: Answers) -> list[list[int]]:
    return [answer["tokens"] for answer in said]


def cached(said: Answers) -> list[int]:
    return [answer["cached"] for answer in said]


def test_exact_blocks_go_on_as_the_writer_does(folder: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    extra = {"store": str(tmp_path / "store"), "preset": "exact"}
    with vllm(folder, extra, tmp_path) as writer:
        computed = writer.answers(prompts)
    with vllm(folder, extra, tmp_path) as reader:
        said = reader.answers([*prompts, prompts[0][:HITS]])
    assert cached(computed) == [0, 0]
    assert cached(said) == [HITS, HITS, HITS - 128]  # whole blocks of vLLM's, and never the last token
    assert tokens_of(said)[:2] == tokens_of(computed)
    for one, other in zip(said, computed, strict=False):
        token = str(other["tokens"][0])
        assert one["logprobs"][token] == pytest.approx(other["logprobs"][token], abs=0.02)  # bfloat16's rounding


@pytest.mark.parametrize("kind", ["folder", "redis"])
def test_a_reader_says_what_the_blocks_stand_for_and_after_a_fault_what_it_computes(
    kind: str, folder: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    with store_place(kind, tmp_path / "objects") as place:
        with vllm(folder, place.extra, tmp_path) as writer:
            computed = writer.answers(prompts)
        assert cached(computed) == [0, 0]
        with closing(place.shelf()) as shelf:
            rows = shelf.index.all()
            assert [row.start for row in rows] == [0, 0, 256, 256]
            assert not [problem for row in rows for problem in shelf.problems(row)]
            assert sum(row.size for row in rows) < 0.21 * PROMPTS * HITS * NAIVE
        exact = decoded_beforehand(place, prompts, tmp_path)
        with vllm(folder, exact, tmp_path) as reader:
            decoded = reader.answers(prompts)
        assert cached(decoded) == [HITS, HITS]

        with vllm(folder, place.extra, tmp_path) as reader:
            said = reader.answers(prompts)
            assert cached(said) == [HITS, HITS]
            assert tokens_of(said) == tokens_of(decoded)
            assert [answer["logprobs"] for answer in said] == [answer["logprobs"] for answer in decoded]
            for one, other in zip(said, computed, strict=True):
                token = str(other["tokens"][0])
                assert one["logprobs"][token] == pytest.approx(other["logprobs"][token], abs=NEAR)
            print(json.dumps({"computed": computed, "loaded": said, "bytes": [row.size for row in rows]}))

            salted = [{"prompt_token_ids": prompts[0], "cache_salt": salt} for salt in ("one", "two")]
            said = reader.answers(salted)
            assert cached(said) == [0, 0]
            assert tokens_of(said) == [computed[0]["tokens"]] * 2

            until = time.monotonic() + 60
            while place.blocks() < 2 * (PROMPTS + 2) and time.monotonic() < until:
                time.sleep(0.2)
            assert place.flip() == PROMPTS + 2  # those with salts, too
            said = reader.answers(prompts)
            assert cached(said) == [0, 0]
            assert tokens_of(said) == tokens_of(computed)
            assert "damaged and was dropped" in (tmp_path / "vllm.log").read_text()
            until = time.monotonic() + 60
            while cached(again := reader.answers(prompts)) != [HITS, HITS] and time.monotonic() < until:
                time.sleep(1)  # what is stored anew is written by a thread
            assert tokens_of(again) == tokens_of(decoded)

            if place.server:
                place.server.stop()
                said = reader.answers(prompts)
                assert cached(said) == [0, 0]
                assert tokens_of(said) == tokens_of(computed)
                place.server.start()
                time.sleep(PAUSE)
                assert cached(reader.answers(prompts)) == [HITS, HITS]


def test_another_model_and_another_tenant_find_nothing(folder: Path, prompts: list[list[int]], tmp_path: Path) -> None:
    extra = {"store": str(tmp_path / "store"), "preset": "pq3"}
    with vllm(folder, extra, tmp_path) as writer:
        writer.answers(prompts[:1])
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "config.json").read_bytes())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 2 * config["rms_norm_eps"]}))
    for model, more in ((other, {}), (folder, {"tenant": "one"})):
        with vllm(model, extra | more, tmp_path) as reader:
            assert cached(reader.answers(prompts[:1])) == [0]
    with closing(Shelf(tmp_path / "store")) as shelf:
        assert len(shelf.index.roots()) == 3
