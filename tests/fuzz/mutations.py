"""Edits of bytes and of JSON that know nothing of a format."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable, Iterator
from typing import Any


def _run(rng: random.Random, data: bytes) -> tuple[int, int]:
    """First byte and one behind the last of a run, short as a rule."""
    first = rng.randrange(len(data))
    length = rng.randrange(1, 40) if rng.random() < 0.9 else rng.randrange(1, len(data) + 1)
    return first, min(first + length, len(data))


def flip(data: bytes, rng: random.Random) -> bytes:
    """One to four bits."""
    new = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        new[rng.randrange(len(new))] ^= 1 << rng.randrange(8)
    return bytes(new)


def change(data: bytes, rng: random.Random) -> bytes:
    """One to three bytes."""
    new = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        new[rng.randrange(len(new))] ^= rng.randrange(1, 256)
    return bytes(new)


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """A run becomes random bytes, one byte again and again, or a copy of another run."""
    first, last = _run(rng, data)
    return data[:first] + _filling(data, rng, last - first)[: last - first] + data[last:]


def exchange(data: bytes, rng: random.Random) -> bytes:
    """Two runs of one length change places."""
    first, last = _run(rng, data)
    length = min(last - first, len(data) // 2)
    other = rng.randrange(len(data) - length + 1)
    low, high = sorted((min(first, len(data) - length), other))
    if low + length > high:  # they lie over each other
        return data
    return (
        data[:low] + data[high : high + length] + data[low + length : high] + data[low : low + length] + data[high + length :]
    )


def remove(data: bytes, rng: random.Random) -> bytes:
    first, last = _run(rng, data)
    return data[:first] + data[last:]


def insert(data: bytes, rng: random.Random) -> bytes:
    first, last = _run(rng, data)
    return data[:first] + _filling(data, rng, last - first) + data[first:]


def truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _filling(data: bytes, rng: random.Random, count: int) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return bytes([rng.choice((0, 0, 255, 32, rng.randrange(256)))]) * count
    if kind == 1 and count < len(data):
        other = rng.randrange(len(data) - count)
        return data[other : other + count]
    return rng.randbytes(count)


EDITS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": flip,
    "change": change,
    "overwrite": overwrite,
    "exchange": exchange,
    "remove": remove,
    "insert": insert,
    "truncate": truncate,
}


def number(data: bytes, rng: random.Random) -> bytes:
    """A little-endian number somewhere becomes one that programs stumble over."""
    size = rng.choice((1, 2, 4, 8))
    if len(data) < size:
        return data
    at = rng.randrange(len(data) - size + 1)
    value = int.from_bytes(data[at : at + size], "little")
    value = _odd_number(rng, value, len(data)) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size, "little") + data[at + size :]


def _odd_number(rng: random.Random, value: int, size: int) -> int:
    near = (value + rng.choice((-4, -1, 1, 4)), value * 2, value // 2, value ^ 1 << rng.randrange(64), size, size - value)
    edge = 1 << rng.choice((3, 7, 8, 15, 16, 24, 31, 32, 40, 47, 48, 62, 63, 64))
    return rng.choice((0, 1, 2, rng.randrange(1, 40), rng.choice(near), edge, edge - 1))


def scramble(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """One edit of bytes; ``other`` lends a part."""
    if not data:
        return other[: rng.randrange(len(other) + 1)]
    kind = rng.randrange(10)
    if kind < 3:
        return number(data, rng)
    if kind == 3 and other:
        first, last = _run(rng, other)
        at = rng.randrange(len(data))
        return data[:at] + other[first:last] + data[at + rng.choice((0, last - first)) :]
    return EDITS[rng.choice(list(EDITS))](data, rng)


ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, -1, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, 0.5, 1.0, 1e308),
    *(float("nan"), float("inf"), "", "a", "\ud800", "\0", "\u00e9", "key", "value", "other", "bool", "float16", "bfloat16"),
    *("float32", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2fnuz", "uint16", "U8", "F16", "BF16", "BOOL", "I64"),
    *("F8_E8M0", "__metadata__", [], {}, [[]], [0], [1 << 40, 1 << 40], [2, 9, 16], {"": None}),
)


def json_edit(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value with one or two places changed."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randrange(1, 3)):
        places = list(_places(value))
        if not places:
            return rng.choice(ODD)
        home, key = rng.choice(places)
        old, kind = home[key], rng.randrange(7)
        if kind == 0:
            del home[key]
        elif kind == 1:
            other, where = rng.choice(places)
            with contextlib.suppress(LookupError):
                home[key], other[where] = json.loads(json.dumps((other[where], old)))
        elif kind == 2 and isinstance(home, list):
            home.insert(rng.randrange(len(home) + 1), json.loads(json.dumps(old)))
        elif kind == 2:
            home[rng.choice(("numpy", "first_token", "previous", "name", str(key) + "x"))] = json.loads(json.dumps(old))
        elif kind < 5 and type(old) is int:
            home[key] = _odd_number(rng, old, 0)
        elif kind < 5 and isinstance(old, str) and old:
            home[key] = scramble(old.encode(errors="surrogatepass"), rng, b"key")[:200].decode(errors="replace")
        else:
            home[key] = json.loads(json.dumps(rng.choice(ODD)))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(item)


def json_text(value: Any, rng: random.Random) -> bytes:
    """JSON as some writer might put it; now and then no JSON any more."""
    options: dict[str, Any] = {"ensure_ascii": rng.random() < 0.5, "separators": rng.choice(((",", ":"), (", ", ": ")))}
    text = json.dumps(value, **options).encode(errors="surrogatepass")
    kind = rng.randrange(24)
    if kind == 0:
        return scramble(text, rng, text)
    if kind == 1 and text.startswith(b"{") and len(text) > 2:
        return text[:-1] + b"," + text[1:]  # every key twice
    if kind == 2:
        return text.replace(b"1", b"1e999", 1)
    if kind == 3:
        return b"[" * 3000 if rng.random() < 0.2 else text + b" " * rng.randrange(9)
    return text
