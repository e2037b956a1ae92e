"""Edits that know a format, and make checksums hold again."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from pqcodec import constants as c
from pqcodec.codings.declared import Affine, Codebook, Sketch
from pqcodec.codings.ranges import SharedRanges
from pqcodec.codings.vectors import VectorCodebook
from pqcodec.stages.keep import bodies as keep_bodies
from pqcodec.stream.checksum import checksum
from pqcodec.stream.sections import EXACT_VECTORS, KEEP, LINEAR
from pqcodec.stream.tables import BasisTable, LevelTable, RangeTable, SharedTable, VectorTable

from .base import MAX_BYTES, attempt
from .codings import RANK, tables
from .mutations import _odd_number, json_edit, json_text, number, scramble


def word(data: bytes | bytearray | memoryview) -> bytes:
    return checksum(bytes(data)).to_bytes(c.CHECKSUM_BYTES, "little")


# Fields of a stream's header: place and bytes.
FIELDS = (
    *((at, 1) for at in (4, 5, 6, 7, 14, 15, 44)),
    (8, 4),
    (12, 2),
    *((at, 4) for at in (16, 20, 24, 28)),
    (32, 8),
    (40, 2),
)
FIELDS = (*FIELDS, (42, 2), (45, 1), (46, 2), *((at, 8) for at in (48, 56, 64, 72)))


def seal_stream(data: bytes, resize: bool = True) -> bytes:
    """A stream whose checksums hold, as far as its header can be read; ``resize``: with as many bytes as that asks for."""
    from pqcodec.stream.header import Header

    new = bytearray(data)
    if len(new) < c.HEADER_STRUCT.size:
        return data
    size = int.from_bytes(new[8:12], "little")
    if not c.HEADER_STRUCT.size + c.CHECKSUM_BYTES <= size <= len(new):
        return bytes(new)
    new[size - c.CHECKSUM_BYTES : size] = word(new[: size - c.CHECKSUM_BYTES])
    h, refused = attempt(Header.from_bytes, bytes(new))
    if refused or h.stream_bytes > MAX_BYTES:
        return bytes(new)
    if resize:
        new = new[: h.stream_bytes] + random.Random(len(new)).randbytes(max(0, h.stream_bytes - len(new)))
    places = [place for place in h.places.values() if place.entry_bytes]
    sections = [(place.start + i * place.entry_bytes, place.entry_bytes) for place in places for i in range(place.entries)]
    blocks = ((chunk, lead) for chunk in range(h.chunks if h.leading else 0) for lead in range(h.blocks.leading))
    sections += [(h.blocks.place(chunk, lead), h.blocks.size(chunk)) for chunk, lead in blocks]
    for start, count in sections:
        if start + count <= len(new):
            new[start + count - c.CHECKSUM_BYTES : start + count] = word(new[start : start + count - c.CHECKSUM_BYTES])
    return bytes(new)


def shape_stream(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """A header with other fields, or another header in front of the same bytes."""
    if len(data) < c.HEADER_STRUCT.size + c.CHECKSUM_BYTES:
        return scramble(data, rng, other)
    if rng.random() < 0.5:
        at, size = rng.choice(FIELDS)
        value = _odd_number(rng, int.from_bytes(data[at : at + size], "little"), len(data)) % (1 << 8 * size)
        return data[:at] + value.to_bytes(size, "little") + data[at + size :]
    return _other_header(data, rng)


def _other_header(data: bytes, rng: random.Random) -> bytes:
    """A header that is valid, for a small tensor of any kind, and what was behind the old one."""
    from pqcodec.stream.header import Header, RopeField
    from pqcodec.stream.header_fields import KeepField
    from pqcodec.stream.linear import LinearField, SharedBasis
    from pqcodec.stream.orders import order_for, whole_groups

    h, refused = attempt(Header.from_bytes, data)
    if refused:
        return number(data, rng)
    dim = rng.choice((1, 2, 3, 8, 15, 16, 17, 32, 40, 64, 80, 100, 128, 160, 256, 576, 1024))
    shapes = (h.shape, (dim,), (3, dim), (2, 3, dim), (1, 0, dim), (0, 5, dim), (2, 1, 1, 1, 1, 1, 2, dim), (7, 9, dim))
    shape = rng.choice(shapes)
    dim = shape[-1]
    joined = len(shape) > 2 and 0 < shape[-3] * dim <= c.MAX_HEAD_DIM and rng.random() < 0.3
    width = dim * (shape[-3] if joined else 1)
    linear = None
    if rng.random() < 0.3:
        directions = rng.choice((RANK, rng.randrange(1, width + 1))) if width >= RANK else width
        linear = LinearField(rng.choice((c.LINEAR_CHANNELS, c.LINEAR_BASIS, c.LINEAR_SHARED)), directions)
        linear = LinearField(c.LINEAR_BLOCKS, width) if width % c.LINEAR_BLOCK == 0 and rng.random() < 0.4 else linear
        width = linear.width
    order = order_for(width)
    radius = rng.randrange(11, 16)
    row_bits = rng.choice((order, 2 * order, rng.randrange(order, radius + 7 * order + 1), radius + 7 * order))
    coding: dict[str, Any] = {"coding": c.CODING_SPLIT, "row_bits": row_bits, "radius_bits": radius, "radius_exponent": 0}
    if rng.random() < 0.25:
        paper = {"row_bits": c.PAPER_BLOCK_BITS * order // c.PAPER_BLOCK, "radius_bits": c.PAPER_RADIUS_BITS}
        coding = {"coding": c.CODING_PAPER, "radius_exponent": rng.choice((0, 1, -125, 117, rng.randrange(-125, 118))), **paper}
    elif rng.random() < 0.3:
        bits = rng.randrange(4, 11)
        quads = {"row_bits": c.QUADS_RADIUS_BITS + order + bits * order // 4, "radius_bits": c.QUADS_RADIUS_BITS}
        coding = {"coding": c.CODING_QUADS, "radius_exponent": 0, **quads}
    elif rng.random() < 0.4:
        coding = _affine_coding(rng, whole_groups(width))
    elif rng.random() < 0.3:
        coding = _sketch_coding(rng, dim, order)
    elif rng.random() < 0.3:
        coding = _residual_coding(rng, width)
    rounds = {c.CODING_SPLIT: rng.choice((1, 2)), c.CODING_PAPER: 1, c.CODING_QUADS: 2}.get(coding["coding"], 0)
    offsets = rng.random() < 0.4
    pairs = min(rng.randrange(1, max(2, dim // 2 + 1)), 40)
    frequencies = tuple(rng.choice((0, 1, rng.randrange(1 << 32), (1 << 32) - 1)) for _ in range(pairs))
    before_rope = dim > 1 and rng.random() < 0.2
    position = rng.choice((0, 1, rng.randrange(1 << 63), (1 << 63) - 1))
    rope = RopeField(position, rng.choice((c.ROPE_HALF, c.ROPE_INTERLEAVED)), frequencies)
    keep = (
        KeepField(shape[-2] + rng.choice((0, 1, 9, 700)), rng.random() < 0.5) if len(shape) > 1 and rng.random() < 0.3 else None
    )
    fields = {
        "keep": keep,
        "shape": shape,
        "dtype": rng.choice((c.DTYPE_FLOAT16, c.DTYPE_BFLOAT16, c.DTYPE_FLOAT32)),
        "seed": rng.choice((0, h.seed, rng.randrange(1 << 64))),
        "chunk_tokens": rng.choice((1, 2, 5, 64, 4096)),
        "exact_tokens": rng.choice((0, 0, 1, 4, (1 << 32) - 1)),
        "exact_last": rng.choice((0, 0, 1, 3, (1 << 16) - 1)),
        "exceptions": rng.choice((0, 0, 1, 2, 5)),
        "offsets": offsets,
        "offset_exponent": rng.choice((0, -112, 111)),
        "rope": rope if before_rope or (offsets and dim > 1 and rng.random() < 0.5) else None,
        "before_rope": before_rope,
        "joined": joined,
        "linear": linear,
        "basis": SharedBasis(_table_name(rng, BasisTable)) if linear and linear.kind == c.LINEAR_SHARED else None,
        "numpy": rng.random() < 0.5,
        "rounds": rounds,
        "affine": None,
        "codebook": None,
        "sketch": None,
        "shared_ranges": None,
        **coding,
    }
    for key in ("dtype", "seed", "chunk_tokens", "exact_tokens", "exact_last", "exceptions", "numpy"):
        if rng.random() < 0.5:
            del fields[key]
    new, refused = attempt(replace, h, **fields)
    if refused:
        return number(data, rng)
    body = bytearray(data[h.header_bytes :])
    if new.exceptions and new.stream_bytes < MAX_BYTES:  # rows in order, as a rule
        body = body.ljust(new.stream_bytes - new.header_bytes, b"\x3c")
        last = new.leading * new.coded_tokens
        rows = sorted(rng.sample(range(last), min(new.exceptions, last)))
        rows = rows if rng.random() < 0.8 else [_odd_number(rng, row, last) % (1 << 64) for row in rows]
        for i, row in enumerate(rows):
            at = new.places[EXACT_VECTORS].start - new.header_bytes + i * (8 + new.vector_bytes)
            body[at : at + 8] = row.to_bytes(8, "little")
    if new.places[LINEAR].entries and new.stream_bytes < MAX_BYTES and rng.random() < 0.8:  # ascending channels, finite numbers
        body = body.ljust(new.stream_bytes - new.header_bytes, b"\x3c")
        place = new.places[LINEAR]
        for entry in range(place.entries):
            numbers = range((place.entry_bytes - c.CHECKSUM_BYTES) // 2)
            listed = np.array([n if new.linear.kind == c.LINEAR_CHANNELS else rng.randrange(0x7C00) for n in numbers], "<u2")
            at = place.start - new.header_bytes + entry * place.entry_bytes
            body[at : at + listed.nbytes] = listed.tobytes()
    if new.keep and new.stream_bytes < MAX_BYTES and rng.random() < 0.8:
        body = body.ljust(new.stream_bytes - new.header_bytes, b"\x3c")
        place = new.places[KEEP]
        for entry in range(place.entries):
            chosen = np.array(sorted(rng.sample(range(new.keep.tokens), new.tokens)), np.uint32)
            (listed,) = keep_bodies(new, chosen[None])
            at = place.start - new.header_bytes + entry * place.entry_bytes
            body[at : at + len(listed)] = listed
    return new.to_bytes() + bytes(body)


def _affine_coding(rng: random.Random, order: int) -> dict[str, Any]:
    """Fields of a header whose rows share affine fields; its chunks are of another number of tokens."""
    tokens, bits, angle_bits = rng.choice((1, 2, 5)), rng.randrange(1, 9), rng.randrange(1, 9)
    if rng.random() < 0.5:
        affine = Affine(tokens, c.PAIR_CHANNELS, c.AFFINE_POLAR, rng.choice((1, 2)), angle_bits)
        rows = {"coding": c.CODING_PAIRS, "row_bits": (bits + angle_bits) * order // 2, "radius_bits": bits}
    else:
        shared = rng.random() < 0.2
        affine = Affine(
            tokens, rng.choice((1, 3, 32, 1024)), rng.choice((1, 2)), outliers=rng.choice((0, 0, 1, tokens // 2)), shared=shared
        )
        halves = tuple(struct.unpack(f"<{1 << bits}H", struct.pack(f"<{1 << bits}e", *(i - 99 for i in range(1 << bits)))))
        codebook = rng.choice((None, Codebook(halves), Codebook(None, _table_name(rng, LevelTable))))
        rows = {"coding": c.CODING_SCALAR, "row_bits": bits * order, "radius_bits": 0, "codebook": codebook}
        rows["shared_ranges"] = SharedRanges(_table_name(rng, RangeTable)) if shared else None
    return {**rows, "radius_exponent": 0, "affine": affine, "chunk_tokens": tokens * rng.choice((1, 2, 64))}


def _table_name(rng: random.Random, kind: type[SharedTable]) -> bytes:
    """The name of a shared table: as a rule of one that is here, of that kind or another."""
    if rng.random() < 0.2:
        return rng.randbytes(c.TABLE_NAME_BYTES)
    return rng.choice([table for table in tables() if isinstance(table, kind) or rng.random() < 0.1]).digest


def _residual_coding(rng: random.Random, width: int) -> dict[str, Any]:
    """Fields of a header of residual VQ: rows that codebooks can make, those that are here or others."""
    books = VectorCodebook(_table_name(rng, VectorTable))
    stages, groups = rng.randrange(1, 9), max(width // rng.choice(c.RESIDUAL_GROUPS), 1)
    bits = rng.choice((c.RESIDUAL_INDEX_BITS[0], *c.RESIDUAL_INDEX_BITS))
    rows = {"row_bits": c.RESIDUAL_SCALE_BITS + stages * groups * bits, "radius_bits": stages, "codebook": books}
    return {"coding": c.CODING_RESIDUAL, "radius_exponent": rng.choice((0, 1, rng.randrange(-125, 118))), **rows}


def _sketch_coding(rng: random.Random, dim: int, order: int) -> dict[str, Any]:
    """Fields of a header of a sign sketch; its chunks are of another number of tokens."""
    tokens, blocks, matrix = rng.choice((1, 2, 5, 32)), rng.choice((1, 2, 8)), rng.choice((1, 1, 2))
    sketch = Sketch(blocks, matrix, tokens, rng.choice((1, dim, rng.randrange(1, dim + 1))), rng.choice((1, 3)))
    if rng.random() < 0.4:
        sketch, tokens = Sketch(blocks, matrix), 1
    rows = {"coding": c.CODING_SKETCH, "row_bits": sketch.row_bits(order), "radius_bits": c.SKETCH_NORM_BITS}
    return {**rows, "radius_exponent": 0, "sketch": sketch, "chunk_tokens": tokens * rng.choice((1, 2, 64))}


def _frames(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Place, kind, and sizes of meta and body of each frame; kind 0 is a footer. Stops where there is neither."""
    place = c.FILE_HEAD_STRUCT.size
    while place + c.FOOTER_STRUCT.size <= len(data):
        if data[place : place + 4] == c.FOOTER_MAGIC:
            yield place, 0, 0, 0
            place += c.FOOTER_STRUCT.size
            continue
        magic, kind, _, meta, body, _ = c.FRAME_STRUCT.unpack_from(data, place)
        if magic != c.FRAME_MAGIC or place + c.FRAME_STRUCT.size + meta + body > len(data):
            return
        yield place, kind, meta, body
        place += c.FRAME_STRUCT.size + meta + body


def seal_pqkv(data: bytes) -> bytes:
    """A file whose checksums hold, wherever frames and footers are found one behind the other."""
    new = bytearray(data)
    if len(new) < c.FILE_HEAD_STRUCT.size:
        return data
    new[12:16] = word(new[:12])
    for place, kind, meta, body in _frames(data):
        if not kind:
            new[place + 20 : place + 24] = word(new[place : place + 20])
            continue
        told = place + c.FRAME_STRUCT.size
        start, end, seal = told + meta, told + meta + body, b""
        if kind == c.FRAME_CODED:
            new[start:end] = seal_stream(bytes(new[start:end]), resize=False)
            seal = order_of(bytes(new[start:end])).encode()
        elif kind != c.FRAME_METADATA and body >= c.CHECKSUM_BYTES:
            new[end - c.CHECKSUM_BYTES : end] = word(new[start : end - c.CHECKSUM_BYTES])
            seal = new[end - c.CHECKSUM_BYTES : end].hex().encode()
        if seal:
            new[told:start] = re.sub(rb'(?<="seal":")[0-9a-f]{8}(?=")', seal, bytes(new[told:start]))
        new[place + 20 : told] = word(new[place : place + 20] + new[told:start])
    return bytes(new)


def order_of(data: bytes) -> str:
    """The order seal of a stream as text; empty where its header cannot be read."""
    from pqcodec.stream.seal import order_seal
    from pqcodec.stream.source import MemorySource

    found, refused = attempt(order_seal, MemorySource(data))
    return "" if refused else found.to_bytes(c.CHECKSUM_BYTES, "little").hex()


def shape_pqkv(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Frames with other metas and bodies, in another order, and an index that tells of them, right or wrong."""
    commits: list[list[tuple[int, bytes, bytes]]] = [[]]
    for place, kind, meta, body in _frames(data):
        start = place + c.FRAME_STRUCT.size
        if kind == 0:
            commits.append([])
        elif kind != c.FRAME_INDEX:
            commits[-1].append((kind, data[start : start + meta], data[start + meta : start + meta + body]))
    if not commits[-1]:
        commits.pop()
    for _ in range(rng.randrange(0, 3)):
        _other_frames(commits, rng, other)
    grown = len(commits) > 1 if rng.random() < 0.8 else rng.random() < 0.5
    new = c.FILE_HEAD_STRUCT.pack(c.FILE_MAGIC, c.GROWN_VERSION if grown else c.FILE_VERSION, bytes(7), 0)
    wrong = rng.randrange(2 * len(commits) + 1)  # the index that is edited, often none
    for number_, frames in enumerate(commits):
        previous, listed = len(new), []
        for kind, meta, body in frames:
            fields = attempt_json(meta)
            told = {"offset": len(new), "kind": kind, **{key: fields.get(key) for key in ("name", "layer", "role")}}
            listed.append(told | {"meta_bytes": len(meta), "body_bytes": len(body)})
            new += c.FRAME_STRUCT.pack(c.FRAME_MAGIC, kind, bytes(3), len(meta), len(body), 0) + meta + body
        index: Any = {"previous": previous, "frames": listed} if grown and number_ else listed
        text = json_text(json_edit(index, rng), rng) if number_ == wrong else json.dumps(index, separators=(",", ":")).encode()
        place = len(new)
        new += c.FRAME_STRUCT.pack(c.FRAME_MAGIC, c.FRAME_INDEX, bytes(3), 2, len(text) + 4, 0) + b"{}" + text + bytes(4)
        new += c.FOOTER_STRUCT.pack(c.FOOTER_MAGIC, place, len(new) + c.FOOTER_STRUCT.size, 0)
    return new if rng.random() < 0.9 else new + rng.choice((bytes(5), new[16:60], c.FRAME_MAGIC, rng.randbytes(30)))


def attempt_json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def _other_frames(commits: list[list[tuple[int, bytes, bytes]]], rng: random.Random, other: bytes) -> None:
    """One change of the frames of a file."""
    frames = rng.choice(commits) if commits else []
    kind = rng.randrange(9)
    if kind == 0 or not frames:
        commits.insert(rng.randrange(len(commits) + 1), list(frames))
        return
    at = rng.randrange(len(frames))
    what, meta, body = frames[at]
    if kind == 1:
        del frames[at]
    elif kind == 2:
        rng.choice(commits).append(frames[at])
    elif kind == 3:
        frames[at] = (rng.choice((1, 2, 3, 4, 5, 0, 255)), meta, body)
    elif kind < 7:
        frames[at] = (what, json_text(json_edit(attempt_json(meta), rng), rng), body)
    elif what == c.FRAME_CODED:
        body = seal_stream(shape_stream(body, rng, other))
        frames[at] = (what, _meta_of(meta, body) if rng.random() < 0.7 else meta, body)
    else:
        frames[at] = (what, meta, scramble(body, rng, other))


def _meta_of(meta: bytes, body: bytes) -> bytes:
    """The meta of a frame, told of the stream that it holds now."""
    import pqcodec

    info, refused = attempt(pqcodec.inspect, body)
    return meta if refused else json.dumps(attempt_json(meta) | {"shape": info.shape, "dtype": info.dtype}).encode()


# A sealed list of tensors, and the containers that hold one: a .safetensors file and a store of zarr.
KEYS = tuple(c.LISTING_PREFIX + key for key in ("format", "version", "tensors", "metadata", "checksum"))
BROKEN = (LookupError, TypeError, ValueError, AttributeError, RecursionError)  # what a list that was edited may lead to


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _seal_list(values: dict[str, Any], raw_of: Callable[[dict[str, Any]], bytes], elsewhere: Any) -> None:
    """Make seals and checksum of a list hold; ``raw_of`` gives the bytes of a tensor."""
    listed = json.loads(values[KEYS[2]])
    for fields in listed:
        raw, seals, orders = raw_of(fields), list[str](), list[str]()
        for size, _ in fields.get("streams", [[len(raw), 0]]) if fields["coded"] else ():
            one, raw = raw[:size], raw[size:]
            seals.append(word(one[: int.from_bytes(one[8:12], "little")] + one[-c.CHECKSUM_BYTES :]).hex())
            orders.append(order_of(one))
        if "order" in fields and all(orders):
            fields["order"] = "".join(orders)
        fields["seal"] = "".join(seals) if fields["coded"] else word(raw).hex()
    values[KEYS[2]] = _compact(listed)
    values[KEYS[4]] = word(_compact([*(values[key] for key in KEYS[:4]), elsewhere]).encode()).hex()


def _edit_list(values: dict[str, Any], key: str, rng: random.Random) -> None:
    """Other values in one of the two strings of a list that are JSON."""
    with contextlib.suppress(*BROKEN):
        values[key] = json_text(json_edit(json.loads(values[key]), rng), rng).decode(errors="replace")


def _retell(values: dict[str, Any], name: str, stream_: bytes) -> None:
    """What a list says of a tensor becomes what its only stream says."""
    import pqcodec

    info, refused = attempt(pqcodec.inspect, stream_)
    listed = json.loads(values[KEYS[2]])
    for fields in listed:
        if fields["name"] == name and not refused:
            fields |= {"shape": info.shape, "dtype": info.dtype}
            if "streams" in fields:
                fields["streams"] = [[len(stream_), [1, *info.shape][-2]]]
    values[KEYS[2]] = _compact(listed)


def _parted(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return attempt_json(data[8 : 8 + size]), data[8 + size :]


def _together(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def seal_safetensors(data: bytes) -> bytes:
    """A file of pqcodec whose seals and checksum hold, as far as its header can be read."""
    header, body = _parted(data)

    def raw_of(fields: dict[str, Any]) -> bytes:
        low, high = header[fields["name"]]["data_offsets"]
        return body[low:high]

    try:
        tensors = [[name, item["dtype"], item["shape"]] for name, item in header.items() if name != "__metadata__"]
        _seal_list(header["__metadata__"], raw_of, sorted(tensors))
        return _together(_compact(header).encode(), body)
    except BROKEN:
        return data


def shape_safetensors(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """A header with other values, the list inside it included, or other bodies."""
    header, body = _parted(data)
    if not header:
        return scramble(data, rng, other)
    values = header.get("__metadata__")
    kind = rng.randrange(7)
    if kind < 3 and isinstance(values, dict):
        _edit_list(values, KEYS[2 if kind else 3], rng)
    elif kind < 5 and isinstance(values, dict):
        with contextlib.suppress(*BROKEN):
            name = rng.choice([name for name, item in header.items() if item.get("dtype") == "U8"])
            low, high = header[name]["data_offsets"]
            new = seal_stream(shape_stream(body[low:high], rng, other))
            body = body[:low] + new + body[high:]
            for item in header.values():
                if "data_offsets" in item:
                    item["data_offsets"] = [at + (len(new) - (high - low)) * (at >= high) for at in item["data_offsets"]]
            header[name]["shape"] = [len(new)]
            _retell(values, name, new)
    elif kind == 5:
        body = scramble(body, rng, other) if body else body
    else:
        header = json_edit(header, rng)
    text = json_text(header, rng)
    return _together(text + b" " * (-len(text) % 8 if rng.random() < 0.5 else 0), body)


def packed(objects: dict[str, bytes]) -> bytes:
    """The objects of a store in one string of bytes: of each the sizes of name and content, u16 and u32, and these."""
    parts = (struct.pack("<HI", len(key.encode()), len(value)) + key.encode() + value for key, value in objects.items())
    return b"".join(parts)


def unpacked(data: bytes) -> dict[str, bytes]:
    objects, place = dict[str, bytes](), 0
    while place + 6 <= len(data):
        key, value = struct.unpack_from("<HI", data, place)
        start = place + 6 + key
        objects[data[place + 6 : start].decode("latin1")] = data[start : start + value]
        place = start + value
    return objects


LISTED = f"{c.ZARR_COMPLETE}/zarr.json"  # the object that holds the list of a store


def _objects_of(objects: dict[str, bytes], fields: dict[str, Any]) -> list[str]:
    """The keys of a tensor's chunks, in order."""
    keys = [key for key in objects if key.startswith(f"{fields['path']}/c")]
    return sorted(keys, key=lambda key: [int(n) for n in re.findall(r"\d+", key.removeprefix(fields["path"]))])


def seal_store(data: bytes) -> bytes:
    """A store whose list holds, as far as it can be read."""
    objects = unpacked(data)

    def raw_of(fields: dict[str, Any]) -> bytes:
        document = json.loads(objects[f"{fields['path']}/zarr.json"])
        said = {key: value for key, value in document.items() if key != "attributes"}
        fields["document"] = word(json.dumps(said, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode()).hex()
        found = [objects[key] for key in _objects_of(objects, fields)]
        if not fields["coded"]:
            return b"".join(found)[: -c.CHECKSUM_BYTES]
        sizes, raw = [size for size, _ in fields["streams"]], b""
        for one, count in zip(found, fields.get("objects", [1]), strict=True):
            raw, sizes = raw + one[: sum(sizes[:count])], sizes[count:]
        return raw

    try:
        complete = json.loads(objects[LISTED])
        _seal_list(complete["attributes"], raw_of, None)
        return packed(objects | {LISTED: _compact(complete).encode()})
    except BROKEN:
        return data


def shape_store(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """A store with other documents, another list, other chunks, or objects that are lost or lie elsewhere."""
    objects = unpacked(data)
    if LISTED not in objects:
        return scramble(data, rng, other)
    complete = attempt_json(objects[LISTED])
    values = complete.get("attributes")
    key = rng.choice(list(objects))
    kind = rng.randrange(8)
    if kind < 3 and isinstance(values, dict):
        _edit_list(values, KEYS[2 if kind else 3], rng)
        objects[LISTED] = json_text(complete, rng)
    elif kind < 5:
        with contextlib.suppress(*BROKEN):
            fields = rng.choice([one for one in json.loads(values[KEYS[2]]) if one["coded"] and len(one["streams"]) == 1])
            key = _objects_of(objects, fields)[0]
            objects[key] = seal_stream(shape_stream(objects[key], rng, other))
            _retell(values, fields["name"], objects[key])
            objects[LISTED] = _compact(complete).encode()
    elif kind == 5 and key.endswith(".json"):
        objects[key] = json_text(json_edit(attempt_json(objects[key]), rng), rng)
    elif kind < 7:
        objects[key] = scramble(objects[key], rng, other)
    else:
        there = rng.choice(list(objects))
        objects[key], objects[there] = objects[there], objects[key]
        if rng.random() < 0.5:
            del objects[key]
    return packed(objects)


# Files of plain tensors.
DESCRIPTIONS = (
    *("'<f2'", "'>f4'", "'|O'", "'O'", "'<U3'", "'V0'", "'S0'", "'<f99'", "''", "'<f'", "'|b1'", "'<M8[ns]'", "'<c16'", "'g'"),
    *("[('a', '<f2')]", "[('a', '|O')]", "('<f2', (2,))", "('<f2', 2)", "[]", "{}", "None", "1", "{'names': ['a']}", "'i4,i4'"),
    *(
        "[('', '|V4'), ('', '<f2')]",
        "[('a', '<f2'), ('a', '<f2')]",
        "'<f2', 'fortran_order': True",
        "'\\x00'",
        "b'<f2'",
        "'=f2'",
    ),
)
SHAPES = (
    *("()", "(3,)", "(2, 3)", "(-1,)", "(-2, -3)", "(0,)", "(0, 4)", f"({1 << 70},)", f"(0, {1 << 70})", f"({1 << 40},)"),
    *("(2L, 3)", "(True,)", "[6]", "6", "(6.0,)", "None", "(1, 6)", "((2, 3),)", f"({1 << 31}, {1 << 31})", "(1,) * 70"),
    *("(" + "1, " * 70 + ")", "(6", "(6,))", "(0x6,)", "(1_0,)", "(" + "-" * 900 + "6,)", "(" * 150 + "6", f"({1 << 62},)"),
)


def shape_npy(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """An .npy file with another header."""
    wide = data[6:7] == b"\2"
    size = int.from_bytes(data[8 : 12 if wide else 10], "little")
    start = 12 if wide else 10
    text, body = data[start : start + size].decode("latin1").strip(), data[start + size :]
    kind = rng.randrange(6)
    if kind == 0:
        text = re.sub(r"'descr': ('[^']*'|\[[^]]*\])", lambda _: "'descr': " + rng.choice(DESCRIPTIONS), text)
    elif kind == 1:
        text = re.sub(r"'shape': \([^)]*\)", lambda _: "'shape': " + rng.choice(SHAPES), text)
    elif kind == 2:
        text = text.replace("False", rng.choice(("True", "1", "None", "False, 'a': 1", "[]")))
    elif kind == 3:
        text = scramble(text.encode("latin1"), rng, b"(6L,)'\"\\\n\t#").decode("latin1")
    else:
        body = scramble(body, rng, other) if body else other[:40]
    version = data[6:8] if rng.random() < 0.9 else bytes([rng.randrange(5), rng.choice((0, 0, 1))])
    wide = version[:1] != b"\1"
    raw = text.encode("latin1") + b" " * rng.choice((0, 0, 1, 20, 60)) + rng.choice((b"\n", b"\n", b"", b"\n\n"))
    return data[:6] + version + len(raw).to_bytes(4 if wide else 2, "little") + raw + body


def shape_npz(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """An archive with other members, packed another way; what cannot be read of it is left out."""
    members: list[list[Any]] = []
    with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as archive:
        for info in archive.infolist()[:6]:
            with contextlib.suppress(Exception):
                members.append([info.filename, archive.read(info)[:MAX_BYTES], info.compress_type])
    if not members:
        return scramble(data, rng, other)
    member = rng.choice(members)
    kind = rng.randrange(7)
    if kind < 3:
        member[1] = shape_npy(member[1], rng, other)
    elif kind == 3:
        member[1] = scramble(member[1], rng, other)
    elif kind == 4:
        member[0] = rng.choice(("", "a", "a.npy", ".npy", "../a.npy", "\u00e9.npy", "a" * 300 + ".npy", "a.npy/", "b\0.npy"))
    elif kind == 5:
        members.append(list(rng.choice(members)))
    else:
        member[2] = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as archive:
        warnings.simplefilter("ignore")  # names that are there twice
        for name, body, how in members:
            archive.writestr(zipfile.ZipInfo(name), body, how)
    return file.getvalue()


def shape_plain(data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    kinds = {b"\x93NUM": shape_npy, b"PK\3\4": shape_npz, b"PK\5\6": shape_npz}
    return kinds.get(data[:4], shape_safetensors)(data, rng, other)
