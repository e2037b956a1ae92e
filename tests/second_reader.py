"""A second reader of .pqkv files, written from formats/SPEC.md Part II: which error a file makes, and nothing else."""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass, field
from typing import Any, NoReturn

import second_decoder as second

ITEMS = {"complex128": 16, "complex64": 8, "float64": 8, "int64": 8, "uint64": 8, "float32": 4, "int32": 4, "uint32": 4}
ITEMS |= dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2) | dict.fromkeys(("bool", "int8", "uint8"), 1)
ITEMS |= dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1)
KEYS = ("offset", "kind", "name", "layer", "role", "meta_bytes", "body_bytes")


class Refused(Exception):
    """The file's error: "corrupt", "truncated" or "unsupported"."""


def expect(sound: object, error: str = "corrupt") -> None:
    if not sound:
        raise Refused(error)


def refusal(data: bytes) -> str:
    """The error of a file whose tensors are all decoded, one after the other; "" for none."""
    try:
        frames = opened(data)
        for frame in frames:
            if frame["kind"] == 3:
                at(data, frame["offset"], end_of(frame), frame)
        for name in dict.fromkeys(frame["name"] for frame in frames if frame["kind"] not in (3, 6)):
            tensor(
                data, [frame for frame in frames if frame["name"] == name], [frame for frame in frames if frame["kind"] == 6]
            )
    except Refused as error:
        return str(error)
    return ""


# -- II.1 to II.4: a file is opened --------------------------------------------------------------------------------
def opened(data: bytes) -> list[dict[str, Any]]:
    """The frames that the indexes list, in the order of the file."""
    expect(b"\x89PQF".startswith(data[:4]))
    expect(len(data) >= 16, "truncated")
    version = data[4]
    expect(version in (1, 2), "unsupported")
    expect(second.holds(data[:16]))
    expect(not any(data[5:12]), "unsupported")
    end = len(data) if footer(data, len(data)) is not None else walk(data, version)
    frames: list[dict[str, Any]] = []
    while end:
        listed, end = index(data, end, version)
        frames = listed + frames
    for n, frame in enumerate(frames):
        for other in frames[:n]:
            if frame["name"] == other["name"] and 6 not in (frame["kind"], other["kind"]):
                expect(version == 2 and frame["kind"] == other["kind"] == 1)
                expect((frame["layer"], frame["role"]) == (other["layer"], other["role"]))
    return frames


def footer(data: bytes, end: int) -> int | None:
    """Where the index of the footer is that ends at a byte; None where none does."""
    if not 40 <= end <= len(data):
        return None
    record = data[end - 24 : end]
    place, size = struct.unpack_from("<QQ", record, 4)
    return place if record[:4] == b"PQFE" and second.holds(record) and size == end else None


def index(data: bytes, end: int, version: int) -> tuple[list[dict[str, Any]], int]:
    """The frames of the index whose footer ends at a byte, and where the footer before it ends (0: there is none)."""
    place = footer(data, end)
    expect(place is not None)
    assert place is not None
    expect(16 <= place <= end - 24)
    found = at(data, place, end - 24)
    expect(found["kind"] == 4 and end_of(found) == end - 24 and found["body_bytes"] <= 2**26 + 4)
    body = data[end - 24 - found["body_bytes"] : end - 24]
    expect(len(body) >= 4 and second.holds(body))
    listed, first, previous = document(body[:-4]), 16, 0
    if version == 2 and isinstance(listed, dict):
        first = previous = listed.get("previous")
        expect(natural(previous) and 16 < previous <= place)
        listed = listed.get("frames")
    expect(isinstance(listed, list))
    for item in listed:
        expect(isinstance(item, dict) and set(KEYS) <= set(item))
        expect(type(item["kind"]) is int and item["kind"] in (1, 2, 3, 4, 6), "unsupported")
        expect(all(natural(item[key]) for key in ("offset", "meta_bytes", "body_bytes")))
        expect(item["kind"] != 4)
        if item["kind"] in (3, 6):
            expect(item["name"] is item["layer"] is item["role"] is None)
        else:
            expect(isinstance(item["name"], str) and item["name"] and not re.search("[\ud800-\udfff]", item["name"]))
            expect(item["layer"] is None or natural(item["layer"]))
            expect(item["role"] in ("key", "value", "other"))
    for item in listed:
        expect(item["offset"] == first)
        first = end_of(item)
    expect(first == place)
    return [{key: item[key] for key in KEYS} for item in listed], previous


def walk(data: bytes, version: int) -> int:
    """Where the last footer ends that frames and footers lead to."""
    place, met = 16, list[int]()
    while len(data) - place >= 24 and not (met and version == 1):
        if footer(data, place + 24) is not None:
            place += 24
            met.append(place)
        elif data[place : place + 4] == b"PQFR" and not begins_a_frame(data, place):
            place = end_of(at(data, place, len(data)))
        else:
            break
    rest = data[place:]
    expect((len(rest) < 24 and b"PQFE".startswith(rest[:4])) or begins_a_frame(data, place))
    expect(met, "truncated")
    expect(version == 2)
    expect(all(footer(data, end) is None for end in range(place + 24, len(data) + 1)))
    return met[-1]


def begins_a_frame(data: bytes, place: int) -> bool:
    rest = data[place:]
    if not any(f"PQFR{chr(kind)}\0\0\0".encode().startswith(rest[:8]) for kind in (1, 2, 3, 4, 6)):
        return False
    if len(rest) < 24:
        return True
    meta, body, stored = struct.unpack_from("<IQI", rest, 8)
    if meta > 2**24 or 24 + meta > len(rest):
        return meta <= 2**24
    return second.checksum(rest[:20] + rest[24 : 24 + meta]) == stored and 24 + meta + body > len(rest)


# -- II.2: frames and tensors --------------------------------------------------------------------------------------
def end_of(frame: dict[str, Any]) -> int:
    return frame["offset"] + 24 + frame["meta_bytes"] + frame["body_bytes"]


def at(data: bytes, place: int, end: int, listed: dict[str, Any] | None = None) -> dict[str, Any]:
    """The frame at a byte, which must end by ``end``: the keys of an index, and its meta."""
    expect(place + 24 <= end)
    magic, kind, reserved, meta_bytes, body_bytes, stored = struct.unpack_from("<4sB3sIQI", data, place)
    expect(magic == b"PQFR" and meta_bytes <= 2**24 and place + 24 + meta_bytes <= end)
    raw = data[place + 24 : place + 24 + meta_bytes]
    expect(stored == second.checksum(data[place : place + 20] + raw))
    expect(place + 24 + meta_bytes + body_bytes <= end)
    expect(kind in (1, 2, 3, 4, 6) and not any(reserved), "unsupported")
    meta = document(raw)
    expect(isinstance(meta, dict) and not (kind == 3 and body_bytes))
    name, layer, role = (meta.get(key) if kind < 3 else None for key in ("name", "layer", "role"))
    found = dict(zip(KEYS, (place, kind, name, layer, role, meta_bytes, body_bytes), strict=True))
    expect(listed is None or json.dumps(found) == json.dumps(listed))  # a layer of 1.0 or true is not 1
    return found | {"meta": meta}


@dataclass
class Part:
    """What a frame says of its tensor."""

    frame: dict[str, Any]
    shape: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        meta = self.frame["meta"]
        shape, seal, error = meta.get("shape"), meta.get("seal", "0" * 8), meta.get("rel_mse", 0)
        expect(isinstance(shape, list) and all(map(natural, shape)) and len(shape) <= 32)
        expect(math.prod(max(n, 1) for n in shape) <= 2**48)
        expect(isinstance(meta.get("layout"), str))
        self.shape, self.dtype = shape, meta.get("dtype")
        expect(isinstance(self.dtype, str) and self.dtype in ITEMS, "unsupported")
        expect(type(meta.get("numpy", False)) is bool)
        expect(type(error) in (int, float) and 0 <= error <= 2**1024 - 2**971)
        expect(isinstance(seal, str) and re.fullmatch("[0-9a-f]{8}", seal))
        expect(not (meta.get("numpy") and (self.dtype == "bfloat16" or self.dtype.startswith("float8"))))
        self.bytes = math.prod(shape) * ITEMS[self.dtype]
        expect(self.frame["kind"] == 1 or self.bytes + 4 == self.frame["body_bytes"])

    def tokens(self) -> int:
        return self.shape[-2] if len(self.shape) > 1 else 1


def tensor(data: bytes, frames: list[dict[str, Any]], tables: list[dict[str, Any]]) -> None:
    parts, tokens = list[Part](), 0
    for frame in frames:
        part = Part(at(data, frame["offset"], end_of(frame), frame))
        first = part.frame["meta"].get("first_token")
        if parts:
            expect(len(part.shape) > 1 and len(parts[0].shape) > 1 and part.dtype == parts[0].dtype)
            expect(part.shape[:-2] == parts[0].shape[:-2] and part.shape[-1] == parts[0].shape[-1])
            expect(natural(first) and first == tokens)
        else:
            expect("first_token" not in part.frame["meta"])
        parts.append(part)
        tokens += part.tokens()
    if frames[0]["kind"] == 1:
        expect(sum(math.prod(part.shape) for part in parts) <= 2048 * sum(frame["body_bytes"] for frame in frames))
    for part in parts:
        body(data, part, tables)


def table(data: bytes, listed: dict[str, Any]) -> bytes:
    """The shared table of a frame."""
    frame = at(data, listed["offset"], end_of(listed), listed)
    raw = data[end_of(frame) - frame["body_bytes"] : end_of(frame)]
    expect(4 <= len(raw) <= 4196376 and second.holds(raw))
    name = frame["meta"].get("table")
    error = second.table_refusal(name, raw[:-4])
    expect(not error, error)
    return raw[:-4]


def body(data: bytes, part: Part, tables: list[dict[str, Any]]) -> None:
    end = end_of(part.frame)
    raw, seal = data[end - part.frame["body_bytes"] : end], part.frame["meta"].get("seal")
    if part.frame["kind"] == 2:
        expect(second.holds(raw) and seal in (None, raw[-4:].hex()))
        return
    error = second.refusal(raw)
    expect(not error, error)
    dtype, ndim = {1: "float16", 2: "bfloat16", 3: "float32"}[raw[6]], raw[7]
    expect((list(struct.unpack_from(f"<{ndim}Q", raw, 48)), dtype) == (part.shape, part.dtype))
    if second.names(raw):
        error = second.missing(raw, [table(data, frame) for frame in tables])
        expect(not error, error)
    expect(not second.damage(raw) and seal in (None, struct.pack("<I", second.order_seal(raw)).hex()))


# -- JSON ----------------------------------------------------------------------------------------------------------
def natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def document(raw: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        expect(len(dict(pairs)) == len(pairs))
        return dict(pairs)

    def constant(name: str) -> NoReturn:
        raise Refused("corrupt")

    try:
        return json.JSONDecoder(object_pairs_hook=unique, parse_constant=constant).decode(raw.decode())
    except (ValueError, RecursionError):
        raise Refused("corrupt") from None
