"""Law: what a pool tells of itself: how often something happened, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """How often something happened since a pool was made; one block counts 1."""

    puts: int = 0
    hits: int = 0  # gets and fetches of a key that the pool has
    misses: int = 0  # ... and of one that it has not
    prefetches: int = 0
    evicted: int = 0  # dropped to make room
    spilled: int = 0  # moved to disk to make room
    reloaded: int = 0  # read from disk again
    failed: int = 0  # puts and gets that raised


@dataclass(frozen=True)
class Usage:
    """What a pool holds at one moment.

    ``used_bytes``: of host memory, including blocks that are gone while transfers still use them. ``blocks``: all of them, in
    memory and on disk; ``blocks_on_disk``: those that are only there. ``disk_bytes``: of all files. ``logical_bytes``: of the
    tensors that the blocks decode to.
    """

    capacity_bytes: int
    used_bytes: int
    blocks: int
    blocks_on_disk: int
    disk_bytes: int
    logical_bytes: int
