"""LMCache's storage manager over an adapter that holds objects back: what has come is decoded while the rest is awaited."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lmcache.v1.distributed.serde")
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class, register_l2_adapter_type
from lmcache.v1.distributed.l2_adapters.factory import register_l2_adapter_factory
from lmcache.v1.distributed.l2_adapters.mock_l2_adapter import MockL2Adapter, MockL2AdapterConfig
from lmcache_faults import SHAPE, Storage, key_of

from pqcodec.formats.engines import lmcache as plug_in
from pqcodec.formats.engines.chunks import ChunkCodec

KEYS = [key_of(number) for number in range(4)]
PARAMS = {"type": "held", "max_size_gb": 1, "mock_bandwidth_gb": 1e6}
PATIENCE = 60  # seconds


class HeldConfig(MockL2AdapterConfig):
    """LMCache finds an adapter by the class of its configuration."""


class Held(MockL2Adapter):
    """LMCache's store in memory, which gives all but the first object only when ``released``, and loads no key of ``lost``."""

    released, asked, lost = threading.Event(), threading.Event(), set[Any]()

    async def _execute_load_in_loop(self, keys: list[Any], objects: list[Any], task_id: int) -> None:
        if keys != KEYS[:1]:
            self.asked.set()
            assert await self._loop.run_in_executor(None, self.released.wait, PATIENCE)
        keys = [key_of(1000) if key in self.lost else key for key in keys]
        await super()._execute_load_in_loop(keys, objects, task_id)


register_l2_adapter_type("held", HeldConfig)
register_l2_adapter_factory("held", lambda config, l1_memory_desc=None: Held(config))


@pytest.fixture
def stored() -> Iterator[tuple[Storage, list[torch.Tensor]]]:
    """A storage manager that has stored objects, and what these stand for."""
    Held.released.set()
    Held.lost.clear()
    storage = Storage(PARAMS)
    chunks = {key: torch.randn(SHAPE).bfloat16() for key in KEYS}
    assert storage.store(chunks)
    yield storage, storage.retrieve(KEYS)
    storage.close()
    Held.released.set()


def test_an_object_is_decoded_before_the_next_one_has_come(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, before = stored
    decode = ChunkCodec.decode

    def decoded(*arguments: Any) -> None:
        decode(*arguments)
        Held.released.set()

    monkeypatch.setattr(ChunkCodec, "decode", decoded)
    Held.released.clear()
    found = storage.retrieve(KEYS)
    assert len(found) == len(KEYS) == len(before)
    assert all(map(torch.equal, found, before))


def test_where_one_does_not_come_the_next_request_gets_what_is_before_it(stored: Any) -> None:
    storage, before = stored
    Held.lost.add(KEYS[2])
    assert storage.retrieve(KEYS) == []
    for _ in range(2):
        assert all(map(torch.equal, storage.retrieve(KEYS), before[:2]))
        assert len(storage.retrieve(KEYS)) == 2
    Held.lost.clear()
    assert len(storage.retrieve(KEYS)) == len(KEYS)


def test_a_manager_ends_while_objects_are_on_their_way(stored: Any) -> None:
    storage, _ = stored
    Held.released.clear()
    Held.asked.clear()
    storage.begin(KEYS)
    assert Held.asked.wait(PATIENCE)  # the fixture closes the manager


def test_who_is_not_lmcaches_wrapper_waits_for_all(tmp_path: Path) -> None:
    config = {"type": "plugin", "module_path": plug_in.__name__, "class_name": "PQCodecL2Adapter", "adapter_params": PARAMS}
    adapter = create_l2_adapter(get_l2_adapter_config_class("plugin").from_dict(config))
    Held.lost.clear()
    Held.released.clear()
    task = adapter.submit_load_task(KEYS[1:], [None] * 3)
    assert adapter.query_load_result(task) is None
    Held.released.set()
    poll = select.poll()
    poll.register(adapter.get_load_event_fd(), select.POLLIN)
    assert poll.poll(1000 * PATIENCE)
    assert adapter.query_load_result(task).popcount() == 0
    adapter.close()
