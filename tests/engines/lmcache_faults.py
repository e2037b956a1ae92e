"""Stores through LMCache's storage manager whose files are then damaged: what is found is what was stored, bit for bit.

``python tests/engines/lmcache_faults.py --stores 10000 --seed 1`` prints a summary as JSON and exits with 1 where a law is
broken: an object that is found has the numbers that its bytes stand for (else it is ``wrong``), one that nobody damaged is
found (else it is ``lost``), and a damaged one is stored anew. Of the stores two thirds meet with a fault (``FAULTS``).
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import add_storage_manager_args, parse_args_to_config
from lmcache.v1.distributed.storage_manager import StorageManager
from lmcache_manager import Stored
from lmcache_processes import plug_in

from pqcodec import constants as c
from pqcodec.formats.engines.chunks import ChunkCodec
from pqcodec.formats.engines.lmcache import object_name
from pqcodec.stream.checksum import checksum

OPTIONS = {"head_dim": 32, "kv_heads": 2, "rope": {"theta": 10000}, "preset": "pq3"}
SHAPE = torch.Size((1, 8, 12, 2 * 2 * 32))  # as many layers as share bits
BATCH = 50
PATIENCE = 60  # seconds
LAYOUT = MemoryLayoutDesc([SHAPE], [torch.bfloat16])


# -- faults: what a file holds afterwards, of what it held, another object's file, and chance --------------------------
def flip(data: bytes, other: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def torn(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """A write that was cut, over what lay there before: another object, or zeros."""
    at = rng.randrange(1, len(data))
    return data[:at] + rng.choice((other, bytes(len(data))))[at:]


def another(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return other


def foreign(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Bytes that somebody else wrote, as many; half the time behind a head of ours."""
    kept = rng.choice((0, c.CHUNK_STRUCT.size))
    return data[:kept] + rng.randbytes(len(data) - kept)


def version(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """A chunk of an older or a newer version, whose head is whole."""
    head = bytearray(data[: c.CHUNK_STRUCT.size - c.CHECKSUM_BYTES])
    struct.pack_into("<I", head, 4, rng.choice((c.CHUNK_VERSION - 1, c.CHUNK_VERSION + 1)))
    return bytes(head) + checksum(bytes(head)).to_bytes(c.CHECKSUM_BYTES, "little") + data[c.CHUNK_STRUCT.size :]


def remove(data: bytes, other: bytes, rng: random.Random) -> None:
    return None


FAULTS: dict[str, Callable[[bytes, bytes, random.Random], bytes | None]] = {
    fault.__name__: fault for fault in (flip, truncate, torn, another, foreign, version, remove)
}


# -- LMCache -------------------------------------------------------------------------------------------------------
class Storage:
    """A storage manager over one adapter of LMCache's."""

    def __init__(self, params: dict[str, Any]) -> None:
        parser = argparse.ArgumentParser()
        add_storage_manager_args(parser)
        adapter = plug_in(params, {"type": "pqcodec", **OPTIONS})
        given = ["--l1-size-gb", "0.25", "--eviction-policy", "LRU", "--l2-adapter", adapter]
        self._manager = StorageManager(parse_args_to_config(parser.parse_args(given)))
        self._told = Stored()
        self._manager.register_l2_listener(self._told)

    def store(self, chunks: dict[ObjectKey, torch.Tensor]) -> bool:
        """Whether LMCache said of all that they are stored."""
        self._told.expect(len(chunks))
        reserved = self._manager.reserve_write(list(chunks), LAYOUT)
        for key, chunk in chunks.items():
            reserved[key].tensor.copy_(chunk)
        self._manager.finish_write(list(chunks))
        done = self._told.all.wait(PATIENCE)
        self._forget()
        return done

    def begin(self, keys: list[ObjectKey]) -> Any:
        """Ask for objects; returns LMCache's handle."""
        row = GroupedObjectKeys(keys=keys, object_group_id=0, layout_desc=LAYOUT)
        return self._manager.submit_prefetch_task(PrefetchTaskSpec(key_groups=[row]))

    def retrieve(self, keys: list[ObjectKey]) -> list[torch.Tensor]:
        """Those that LMCache finds, up to the first one that it does not."""
        handle = self.begin(keys)
        assert self._manager.wait_prefetch_status(handle, PATIENCE)
        result, found = self._manager.query_prefetch_status(handle), []
        hit = list(takewhile(result.hit_cells[0].test, range(len(keys))))
        if hit:
            with self._manager.read_prefetched_results(keys[: len(hit)], result.l1_owners) as objects:
                found = [memory.tensor.clone() for memory in objects]
            self._manager.finish_read_prefetched(keys[: len(hit)], 1, result.l1_owners)
        self._forget()
        return found

    def _forget(self) -> None:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            self._manager.clear()
            if not self._manager.get_l1_usage()[0]:
                return
            time.sleep(0.001)
        raise TimeoutError("LMCache keeps objects in its own memory")

    def close(self) -> None:
        self._manager.close()


def key_of(number: int) -> ObjectKey:
    return ObjectKey(chunk_hash=number.to_bytes(16, "big"), model_name="model", kv_rank=0)


def file_of(folder: Path, key: ObjectKey) -> Path:
    (path,) = folder.glob(f"*{key.chunk_hash.hex()}.data")
    return path


def run(stores: int, seed: int, folder: Path) -> Counter[str]:
    """Counts of stores, of faults by name, and of found, missed, wrong, lost objects and those that were stored anew."""
    rng, told, codec = random.Random(seed), Counter(), ChunkCodec.from_json(OPTIONS)
    generator = torch.Generator().manual_seed(seed)
    storage = Storage({"type": "fs", "base_path": str(folder)})
    try:
        for first in range(0, stores, BATCH):
            keys = [key_of(number) for number in range(first, min(first + BATCH, stores))]
            chunks = {key: torch.randn(SHAPE, generator=generator).bfloat16() for key in keys}
            stands_for = {}
            for key, chunk in chunks.items():
                stands_for[key] = torch.empty_like(chunk)
                codec.decode(codec.encode(chunk, object_name(key)), stands_for[key], object_name(key))
            told["unstored"] += 0 if storage.store(chunks) else len(keys)
            told["stores"] += len(keys)
            good = {key: file_of(folder, key).read_bytes() for key in keys}
            again = {}
            for key in keys:
                name = rng.choice((*FAULTS, *FAULTS, *["none"] * len(FAULTS)))
                told[name] += 1
                bad = good[key]
                if name != "none":
                    bad = FAULTS[name](good[key], good[rng.choice([other for other in keys if other != key])], rng)
                    file_of(folder, key).write_bytes(bad) if bad is not None else file_of(folder, key).unlink()
                found = storage.retrieve([key])
                told["found" if found else "missed"] += 1
                told["wrong"] += any(not torch.equal(one, stands_for[key]) for one in found)
                told["lost"] += not found and bad == good[key]
                if not found and not list(folder.glob(f"*{key.chunk_hash.hex()}.data")):
                    again[key] = chunks[key]
            if again:
                told["unstored"] += 0 if storage.store(again) else len(again)
                told["anew"] += len(again)
                for key in again:
                    found = storage.retrieve([key])
                    told["lost"] += not found
                    told["wrong"] += any(not torch.equal(one, stands_for[key]) for one in found)
            for path in folder.glob("*.data"):
                path.unlink()
    finally:
        storage.close()
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--stores", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        told = run(options.stores, options.seed, Path(folder))
    print(json.dumps(told))
    sys.exit(1 if told["wrong"] or told["lost"] or told["unstored"] else 0)


if __name__ == "__main__":
    main()
