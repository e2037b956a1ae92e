"""LMCache's storage manager, as its server makes it from the same arguments, in a process of its own.

``python lmcache_manager.py store|load ADAPTER SHAPE COUNT [EXPECTED]`` stores objects of random numbers, or looks for them, and
prints a JSON object: which ones were ``found``, and the ``errors`` of these, squared error over squared norm.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from typing import Any

import torch
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import add_storage_manager_args, parse_args_to_config
from lmcache.v1.distributed.internal_api import L2AdapterListener
from lmcache.v1.distributed.storage_manager import StorageManager

PATIENCE = 60  # seconds


class Stored(L2AdapterListener):
    """Knows when an adapter has stored as many objects as are expected."""

    def __init__(self, expected: int = 0) -> None:
        self.expect(expected)

    def expect(self, count: int) -> None:
        self.missing, self.all = count, threading.Event()

    def on_l2_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        self.missing -= len(keys)
        if self.missing <= 0:
            self.all.set()

    def on_l2_keys_accessed(self, keys: list[ObjectKey]) -> None: ...

    def on_l2_keys_deleted(self, keys: list[ObjectKey]) -> None: ...


def chunk_of(number: int, shape: list[int]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)


def store(manager: StorageManager, keys: list[ObjectKey], shape: list[int], expected: int) -> dict[str, Any]:
    """Store all; wait for those that are ``expected`` to be written, the others being there."""
    listener = Stored(expected)
    manager.register_l2_listener(listener)
    reserved = manager.reserve_write(keys, MemoryLayoutDesc([torch.Size(shape)], [torch.bfloat16]))
    for number, key in enumerate(keys):
        reserved[key].tensor.copy_(chunk_of(number, shape))
    manager.finish_write(keys)
    return {"stored": listener.all.wait(PATIENCE)}


def load(manager: StorageManager, keys: list[ObjectKey], shape: list[int], _: int) -> dict[str, Any]:
    layout = MemoryLayoutDesc([torch.Size(shape)], [torch.bfloat16])
    row = GroupedObjectKeys(keys=keys, object_group_id=0, layout_desc=layout)
    handle = manager.submit_prefetch_task(PrefetchTaskSpec(key_groups=[row]))
    assert manager.wait_prefetch_status(handle, PATIENCE)
    result = manager.query_prefetch_status(handle)
    found = [number for number in range(len(keys)) if result.hit_cells[0].test(number)]
    errors = []
    with manager.read_prefetched_results([keys[number] for number in found], result.l1_owners) as objects:
        for number, memory in zip(found, objects, strict=True):
            x, y = chunk_of(number, shape).double(), memory.tensor.double()
            errors.append(float(((x - y) ** 2).sum() / (x**2).sum()))
    manager.finish_read_prefetched([keys[number] for number in found], 1, result.l1_owners)
    return {"found": found, "errors": errors}


def main(verb: str, adapter: str, shape: str, count: str, expected: str = "0") -> None:
    parser = argparse.ArgumentParser()
    add_storage_manager_args(parser)
    given = ["--l1-size-gb", "1", "--eviction-policy", "LRU", "--l2-adapter", adapter]
    manager = StorageManager(parse_args_to_config(parser.parse_args(given)))
    keys = [ObjectKey(chunk_hash=n.to_bytes(16, "big"), model_name="a/model", kv_rank=0) for n in range(int(count))]
    try:
        found = {"store": store, "load": load}[verb](manager, keys, json.loads(shape), int(expected))
    finally:
        manager.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
