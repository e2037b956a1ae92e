"""vLLM with SmolLM2's weights, LMCache's server and pqcodec's serde: a node writes, another reads, and things break.

``make test-vllm`` makes the environment and the weights' folder. What the reader says is compared with what a node says that
has the same streams decoded beforehand, as LMCache's own plain objects; and where a fault makes a prompt a miss, with what the
writer said, which had to compute it.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm installs it")
pytest.importorskip("lmcache.v1.distributed.serde")
from lmcache_processes import ENVIRONMENT, plug_in, server
from places import PLACES, FolderPlace, Place, place
from vllm_processes import HERE as VLLM
from vllm_processes import PATIENCE, Answers, VLLMProcess, prompts_of, vllm_process, weights_folder

from pqcodec.formats.engines.chunks import ChunkCodec

PROMPTS, LENGTH, CHUNK = 2, 600, 256
HITS = LENGTH // CHUNK * CHUNK  # tokens of a prompt that are stored
OBJECTS = PROMPTS * HITS // CHUNK
SHAPE = (1, 30, CHUNK, 3 * 2 * 64)
NAIVE = 2 * torch.Size(SHAPE).numel()  # bytes of an object without a serde
HERE = ENVIRONMENT | VLLM | {"LMCACHE_MP_TRANSFER_MODE": "lmcache_driven"}
FAULTS = (
    lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    lambda data: data[: len(data) // 2].ljust(len(data), b"\0"),
    lambda data: data[:48] + data[: len(data) - 48],
)


# -- nodes ---------------------------------------------------------------------------------------------------------
@dataclass
class Node:
    """A node of ``vllm_node.py``, and the port for HTTP of the LMCache server that it has to itself."""

    vllm: VLLMProcess
    http: int

    def answers(self, prompts: list[list[int]]) -> Answers:
        """What it says of prompts, once what LMCache's server holds in memory is forgotten."""
        self.forget()
        return self.vllm.answers(prompts)

    def forget(self) -> None:
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.http}/cache/clear",
            data=json.dumps({"tier": "l1"}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
            assert answer.status == 200


@contextmanager
def node(adapter: str, folder: Path, logs: Path) -> Iterator[Node]:
    """An LMCache server with an adapter, and an engine in front of it, both new."""
    with server(adapter, logs / "lmcache.log", CHUNK, HERE) as (port, http):
        pid = 0
        try:
            with vllm_process(folder, str(port), logs, HERE) as made:
                pid = made.process.pid
                yield Node(made, http)
        finally:
            for left in Path("/dev/shm").glob(f"lmcache_kv_{pid}_*"):
                left.unlink()


# -- what is compared ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def folder() -> Path:
    return weights_folder()


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    return prompts_of(folder, PROMPTS, LENGTH)


@pytest.fixture(scope="module")
def serde(folder: Path) -> dict[str, Any]:
    return {"type": "pqcodec", "preset": "pq3", "model": str(folder)}


@dataclass
class Reference:
    """What a node says that computes all prompts, and one that has their streams decoded; the streams by their keys' hashes."""

    computed: Answers
    decoded: Answers
    streams: dict[str, bytes]


@pytest.fixture(scope="module")
def reference(
    folder: Path, prompts: list[list[int]], serde: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Reference:
    root = tmp_path_factory.mktemp("reference")
    coded, plain = FolderPlace(root / "coded"), FolderPlace(root / "plain")
    computed = written(coded, folder, prompts, serde, root)
    codec = ChunkCodec.from_json({name: value for name, value in serde.items() if name != "type"})
    (root / "plain").mkdir(exist_ok=True)
    for name in coded.names():
        model, rank, group, digest = name.removesuffix(".data").split("@")
        key = (model.replace("-SEP-", "/"), int(rank, 16), int(group, 16), "", bytes.fromhex(digest))
        chunk = torch.empty(SHAPE, dtype=torch.bfloat16)
        codec.decode(torch.frombuffer(bytearray(coded.read(name)), dtype=torch.uint8).numpy(), chunk, repr(key).encode())
        plain.write(name, chunk.view(torch.uint8).numpy().tobytes())
    with node(json.dumps(plain.params), folder, root) as reader:
        decoded = reader.answers(prompts)
    assert [answer["cached"] for answer in decoded] == PROMPTS * [HITS]
    return Reference(computed, decoded, {digest_of(name): coded.read(name) for name in coded.names()})


def written(made: Place, folder: Path, prompts: list[list[int]], serde: dict[str, Any], logs: Path) -> Answers:
    """What a new node says that computes all prompts and stores them in a place; it ends."""
    with node(plug_in(made.params, serde), folder, logs) as writer:
        said = writer.answers(prompts)
        until = time.monotonic() + PATIENCE
        while len(made.names()) < OBJECTS and time.monotonic() < until:
            time.sleep(0.2)
    assert [answer["cached"] for answer in said] == PROMPTS * [0]
    assert len(made.names()) == OBJECTS
    return said


def digest_of(name: str) -> str:
    return name.removesuffix(".data").split("@")[3]


def tokens_of(said: Answers) -> list[list[int]]:
    return [answer["tokens"] for answer in said]


# -- the tests -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", PLACES)
def test_a_reader_says_what_the_streams_stand_for_and_after_a_fault_what_it_computes(
    kind: str, folder: Path, prompts: list[list[int]], serde: dict[str, Any], reference: Reference, tmp_path: Path
) -> None:
    with place(kind, tmp_path / "objects") as made:
        said = written(made, folder, prompts, serde, tmp_path)
        assert tokens_of(said) == tokens_of(reference.computed)
        assert {digest_of(name): made.read(name) for name in made.names()} == reference.streams

        with node(plug_in(made.params, serde), folder, tmp_path) as reader:
            before = sum(exchange.received for exchange in made.proxy.exchanges) if made.proxy else 0
            said = reader.answers(prompts)
            assert [answer["cached"] for answer in said] == PROMPTS * [HITS]
            assert tokens_of(said) == tokens_of(reference.decoded)
            size = sum(map(len, reference.streams.values()))
            assert size < 0.215 * OBJECTS * NAIVE
            if made.proxy:
                assert size <= sum(exchange.received for exchange in made.proxy.exchanges) - before < 1.05 * size

            names = {digest_of(name): name for name in made.names()}
            for fault in FAULTS:
                for name in names.values():
                    made.write(name, fault(made.read(name)))
                said = reader.answers(prompts)
                assert [answer["cached"] for answer in said] == PROMPTS * [0]
                assert tokens_of(said) == tokens_of(reference.computed)
                for _ in range(2 * HITS // CHUNK):  # LMCache looks no further than the first damaged object of a prompt
                    if whole(made, names, reference):
                        break
                    check(reader.answers(prompts), reference)
                assert whole(made, names, reference)  # stored anew

            if made.proxy:
                made.proxy.cut(1000, after=1000)
                check(reader.answers(prompts), reference)
                made.proxy.mend()
            if made.server:
                made.server.stop()
                said = reader.answers(prompts)
                assert [answer["cached"] for answer in said] == PROMPTS * [0]
                assert tokens_of(said) == tokens_of(reference.computed)
                made.server.start()

        if made.proxy:  # LMCache connects to Redis only when it starts
            with node(plug_in(made.params, serde), folder, tmp_path) as reader:
                said = reader.answers(prompts)
                assert [answer["cached"] for answer in said] == PROMPTS * [HITS]
                assert tokens_of(said) == tokens_of(reference.decoded)


def whole(made: Place, names: dict[str, str], reference: Reference) -> bool:
    """Whether all objects are what the writer stored, once what is under way is written."""
    until = time.monotonic() + 5
    while sorted(names.values()) != made.names() and time.monotonic() < until:
        time.sleep(0.2)
    found = set(made.names())
    return all(name in found and made.read(name) == reference.streams[digest] for digest, name in names.items())


def check(said: Answers, reference: Reference) -> None:
    """A prompt goes on as it does from all of its streams where these came from the cache, and else as it does from nothing."""
    for answer, computed, decoded in zip(said, reference.computed, reference.decoded, strict=True):
        assert answer["cached"] in (0, HITS)
        assert answer["tokens"] == (decoded if answer["cached"] else computed)["tokens"]
