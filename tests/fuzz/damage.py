"""Random edits of sound files, for every container: what is not refused must change nothing."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .base import attempt
from .mutations import EDITS
from .seeds import grown_pqkv, seeds
from .targets import _chunk, _open_pqkv, _open_safetensors, _open_store, everything, numbers


@dataclass(frozen=True)
class Container:
    """A sound file, and how it is opened: as a reader of caches."""

    sound: bytes
    opened: Callable[[bytes], Any]
    older: tuple[bytes, ...] = ()  # states of the file that a part of it may fall back to


class _Chunk:
    """A chunk of a zarr array in the clothes of a reader of caches; zarr has no verify."""

    names, metadata, torn_bytes = (), {}, 0

    def __init__(self, data: bytes) -> None:
        self.metadata = {"numbers": numbers(_chunk(data)[...])}

    def __enter__(self) -> _Chunk:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def verify(self, **_: Any) -> list[Any]:
        return []


def _pqkv_container() -> Container:
    whole, ends = grown_pqkv()
    return Container(whole, _open_pqkv, tuple(whole[:end] for end in ends[:-1]))


CONTAINERS: dict[str, Callable[[], Container]] = {
    "pqkv": _pqkv_container,
    "safetensors": lambda: Container(seeds("safetensors")["cache.safetensors"], _open_safetensors),
    "zarr": lambda: Container(seeds("zarr")["all-sections.pqs"], _Chunk),
    "zarr-cache": lambda: Container(seeds("zarr-cache")["chunks.store"], _open_store),
}
FAULTS = ("undetected", "silent", "other errors")


def edits(name: str, count: int, seed: int) -> dict[str, Any]:
    """Random edits of a sound file; how many ended in which way, and the first ten that must not.

    "unchanged": the edit made the same bytes; "refused": the reader raises; "harmless": it tells the same as before; "older":
    the bytes are a beginning of the file, and tell a state that it had; "torn": they tell such a state, and that something
    behind it was cut off. Faults: "undetected": the reader tells something else and raises nothing; "silent": it raises,
    verify does not; "other errors".
    """
    container, rng = CONTAINERS[name](), random.Random(seed)
    sound = _told(container, container.sound)[0]
    older = [_told(container, data)[0] for data in container.older]
    counts, kinds, faults, start = Counter[str](), Counter[str](), list[dict[str, Any]](), time.monotonic()
    for number_ in range(count):
        kind = rng.choice(list(EDITS))
        data = EDITS[kind](container.sound, rng)
        kinds[kind] += 1
        if data == container.sound:
            counts["unchanged"] += 1
            continue
        try:
            ended = _judged(container, data, sound, older)
        except Exception as error:
            ended, kind = "other errors", f"{kind}: {error!r}"
        counts[ended] += 1
        if ended in FAULTS and len(faults) < 10:
            faults.append({"number": number_, "kind": kind, "ended": ended, "bytes": data.hex()})
    names = ("unchanged", "refused", "harmless", "older", "torn", *FAULTS)
    return {
        "container": name,
        "bytes": len(container.sound),
        "seed": seed,
        "edits": count,
        "kinds": dict(kinds),
        **{key.replace(" ", "_"): counts[key] for key in names},
        "seconds": round(time.monotonic() - start, 1),
        "faults": faults,
    }


def _told(container: Container, data: bytes) -> tuple[dict[str, Any], int]:
    with container.opened(data) as file:
        return everything(file), getattr(file, "torn_bytes", 0)


def _judged(container: Container, data: bytes, sound: dict[str, Any], older: list[dict[str, Any]]) -> str:
    opened, refused = attempt(container.opened, data)
    if refused:
        return "refused"
    with opened as file:
        told, refused = attempt(everything, file)
        if refused:
            return "refused" if file.verify(backend="cpu") else "silent"
        if told == sound:
            return "harmless"
        if told in older and container.sound.startswith(data):
            return "older"
        if told in older and getattr(file, "torn_bytes", 0) and file.verify(backend="cpu"):
            return "torn"
    return "undetected"
