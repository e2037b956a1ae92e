"""Law: the listing, five strings that describe the tensors of a container other than .pqkv (SPEC III.1).

A seal ties a name to its bytes: the checksum of an exact tensor, or for each stream that of its header and last four bytes.
An order seal (SPEC 4.3) ties all checksums of a stream to their positions.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pqcodec import codec
from pqcodec import constants as c
from pqcodec.errors import CorruptStream, UnsupportedStream
from pqcodec.formats.containers.reader import Entry, StreamPart, stream_of
from pqcodec.formats.containers.writer import Piece, rel_mse_of
from pqcodec.formats.plain.documents import (
    checksum_bytes,
    checksum_of_text,
    checksum_text,
    json_bytes,
    json_value,
    natural,
    shape_problem,
    tensor_problem,
)
from pqcodec.stream.source import Extent, Source, fetched, read_many
from pqcodec.stream.tables import Tables, table_called

KEYS = tuple(c.LISTING_PREFIX + key for key in ("format", "version", "tensors", "metadata", "checksum"))
TABLES = c.LISTING_PREFIX + "tables"  # a sixth string, of shared tables
Fields = dict[str, Any]  # the object that describes one tensor in the listing
_SEAL = 2 * c.CHECKSUM_BYTES  # hexadecimal digits of a stream's seal


# -- writing -----------------------------------------------------------------------------------------------------
def listing_fields(piece: Piece, seal: str, **more: Any) -> Fields:
    """The description of a tensor: what its piece states, ``more`` fields of the container, and its seal."""
    fields: Fields = {"name": piece.name, "layer": piece.layer, "role": piece.role, "layout": piece.layout}
    fields |= {"coded": piece.coded} | ({"shape": list(piece.shape), "dtype": piece.dtype} if piece.coded else {}) | more
    return fields | {"seal": seal}


def coded_fields(streams: Sequence[Source], orders: Sequence[int], rel_mse: float | None) -> Fields:
    """The fields of a coded tensor that follow from its streams; ``orders``: the order seal of each stream."""
    several = [[stream.size, _tokens(stream)] for stream in streams] if len(streams) > 1 else []
    order = {"order": "".join(map(checksum_text, orders))}
    return order | ({"streams": several} if several else {}) | ({} if rel_mse is None else {"rel_mse": rel_mse})


def seal_of(streams: Sequence[Source]) -> str:
    """The seals of streams, 8 hexadecimal digits each: the checksum of a stream's header and last four bytes."""
    return "".join(map(_seal, streams))


def _seal(stream: Source) -> str:
    size = codec.inspect(stream).header_bytes
    ends = read_many(stream, [(0, size), (stream.size - c.CHECKSUM_BYTES, c.CHECKSUM_BYTES)])
    return checksum_bytes(np.concatenate(ends)).hex()


def _tokens(stream: Source) -> int:
    shape = codec.inspect(stream).shape
    return shape[-2] if len(shape) > 1 else 1


def sealed_listing(tensors: Sequence[Fields], metadata: str, elsewhere: Any, tables: Tables) -> dict[str, str]:
    """The five strings by key, and one of the shared ``tables`` where there are any.

    ``metadata``: JSON; ``elsewhere``: the container's own description, which the checksum covers. Raises InvalidArgument where
    the list is too long.
    """
    values = [
        c.LISTING_FORMAT,
        c.LISTING_VERSION,
        json_bytes(tensors, "the list of tensors", c.MAX_INDEX_BYTES).decode(),
        metadata,
    ]
    found = dict(zip(KEYS, [*values, _checksum(values, elsewhere)], strict=True))
    texts = {table.name: table.to_bytes().hex() for table in tables.values()}
    return found | ({TABLES: json_bytes(texts, "the shared tables", c.MAX_INDEX_BYTES).decode()} if texts else {})


def _checksum(values: Sequence[str], elsewhere: Any) -> str:
    return checksum_bytes(json_bytes([*values, elsewhere], "the header", 2 * c.MAX_INDEX_BYTES)).hex()


# -- reading -----------------------------------------------------------------------------------------------------
def read_listing(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fields]]:
    """The caller's metadata and the fields of each tensor, checked one by one; the checksum is left to ``check_listing``.

    Raises CorruptStream, or UnsupportedStream for another version.
    """
    missing = [key for key in KEYS if not isinstance(values.get(key), str)]
    if missing:
        raise CorruptStream(f"metadata: {', '.join(missing)} not there; the header is damaged, fetch the file again")
    form, version, tensors, metadata, _ = (values[key] for key in KEYS)
    if (form, version) != (c.LISTING_FORMAT, c.LISTING_VERSION):
        known = f"this release reads {c.LISTING_FORMAT!r} version {c.LISTING_VERSION!r}"
        found_version = f"{form!r:.40} version {version!r:.20}; {known}"
        raise UnsupportedStream(f"metadata: {found_version}: install a newer pqcodec")
    listed, found = (
        json_value(text.encode("utf-8", "surrogatepass"), key) for text, key in ((tensors, KEYS[2]), (metadata, KEYS[3]))
    )
    if not isinstance(listed, list) or not isinstance(found, dict):
        raise CorruptStream("pqcodec_tensors and pqcodec_metadata: a JSON list and a JSON object are expected")
    for number, fields in enumerate(listed):
        if problem := _problem(fields):
            raise CorruptStream(f"pqcodec_tensors: tensor {number}: {problem}")
    return found, listed


def read_tables(values: Mapping[str, Any]) -> Tables:
    """The shared tables that a container carries, by the bytes of their names; raises CorruptStream or UnsupportedStream."""
    text = values.get(TABLES, "{}")
    given = json_value(text.encode("utf-8", "surrogatepass"), TABLES) if isinstance(text, str) else None
    if not isinstance(given, dict):
        raise CorruptStream(f"{TABLES}: a JSON object is expected")
    found = {}
    for name, raw in given.items():
        if not isinstance(raw, str) or len(raw) > 2 * c.MAX_TABLE_BYTES or not re.fullmatch("(?:[0-9a-f]{2})*", raw):
            raise CorruptStream(f"{TABLES}: {name:.80} is not at most {c.MAX_TABLE_BYTES} bytes as hexadecimal digits")
        table = table_called(name, bytes.fromhex(raw))
        found[table.digest] = table
    return found


def check_listing(values: Mapping[str, Any], elsewhere: Any) -> None:
    """Raises CorruptStream where the checksum of the listing and of ``elsewhere`` does not hold."""
    if values[KEYS[4]] != _checksum([values[key] for key in KEYS[:4]], elsewhere):
        raise CorruptStream("header: checksum does not hold; names, shapes or metadata were changed, fetch the file again")


def _problem(fields: object) -> str:
    """What is wrong with a tensor's fields, or an empty string; unknown keys are ignored."""
    if not isinstance(fields, dict):
        return "a JSON object is expected"
    coded, numpy = fields.get("coded"), fields.get("numpy", False)
    if type(coded) is not bool or type(numpy) is not bool:
        return f"coded is {coded!r}, numpy {numpy!r}; true or false is expected"
    if not coded and "numpy" not in fields:
        return "numpy is not there; true or false is expected"
    if not isinstance(fields.get("layout"), str) or not isinstance(fields.get("seal"), str):
        return f"layout is {fields.get('layout')!r}, seal {fields.get('seal')!r}; strings are expected"
    if coded and (problem := numbers_problem(fields) or _streams_problem(fields)):
        return problem
    return tensor_problem(fields.get("name"), fields.get("layer"), fields.get("role"))


def numbers_problem(fields: Fields) -> str:
    """What is wrong with a tensor's shape or dtype, or an empty string."""
    dtype = fields.get("dtype")
    known = isinstance(dtype, str) and dtype in c.EXACT_ITEM_BYTES
    return shape_problem(fields.get("shape")) or ("" if known else f"dtype {dtype!r:.40} is unknown")


def _streams_problem(fields: Fields) -> str:
    streams = fields.get("streams", [[0, 0]])
    pairs = isinstance(streams, list) and all(isinstance(s, list) and len(s) == 2 and all(map(natural, s)) for s in streams)
    if not pairs or not streams or len(fields["seal"]) != _SEAL * len(streams):
        return f"streams is {streams!r:.60}; a list of [bytes, tokens], with a seal of each, is expected"
    if len(streams) > 1 and (len(fields["shape"]) < 2 or sum(tokens for _, tokens in streams) != fields["shape"][-2]):
        return "its streams do not hold as many tokens as it has"
    order = fields.get("order", "0" * _SEAL * len(streams))
    if not isinstance(order, str) or len(order) != _SEAL * len(streams) or not set(order) <= set("0123456789abcdef"):
        return f"order is {order!r:.60}; {_SEAL} hexadecimal digits of each stream are expected"
    return ""


# -- tensors -----------------------------------------------------------------------------------------------------
def entry_of(fields: Fields, shape: Sequence[int], dtype: str, offset: int, size: int) -> Entry:
    """The entry of a listed tensor whose body is ``size`` bytes at offset ``offset`` of the file."""
    return Entry(
        fields["name"],
        fields["coded"],
        fields.get("layer"),
        fields["role"],
        tuple(shape),
        dtype,
        fields["layout"],
        offset,
        size,
        parts=len(fields.get("streams", [0])),
        numpy=fields.get("numpy", False),
        rel_mse=rel_mse_of(fields),
    )


def streams_in(body: Source, fields: Fields) -> list[Extent]:
    """The streams of a coded tensor, which follow each other in ``body``; raises CorruptStream."""
    sizes = [size for size, _ in fields.get("streams", [[body.size, 0]])]
    if sum(sizes) != body.size:
        raise CorruptStream(f"streams of {sum(sizes)} bytes are listed, {body.size} are there")
    starts = [0, *itertools.accumulate(sizes)]
    return [Extent(body, start, size) for start, size in zip(starts, sizes, strict=False)]


def parts_of(entry: Entry, fields: Fields, streams: Sequence[Extent], tables: Callable[[], Tables]) -> list[StreamPart]:
    """The parts of a coded tensor, from its streams; the seal of each is checked when it is first opened.

    ``tables``: the file's, asked for where a stream names one.
    """
    sizes = fields.get("streams", [[0, entry.tokens]])
    seals, orders = (_each(fields[key]) if key in fields else [] for key in ("seal", "order"))
    for stream, order in zip(streams, orders, strict=False):
        stream.seal = checksum_of_text(order)
    each = zip(sizes, streams, seals, strict=True)
    return [_part(entry, tokens, stream, seal, tables) for (_, tokens), stream, seal in each]


def _each(seals: str) -> list[str]:
    return [seals[at : at + _SEAL] for at in range(0, len(seals), _SEAL)]


def _part(entry: Entry, tokens: int, stream: Extent, seal: str, tables: Callable[[], Tables]) -> StreamPart:
    looked_at = False

    def opened(whole: bool) -> Source:
        nonlocal looked_at
        source = stream_of(fetched(stream) if whole else stream, entry, tables, None if entry.parts == 1 else tokens)
        if not looked_at and _seal(source) != seal:
            raise CorruptStream("is not the stream that was written under this name (its seal does not hold)")
        looked_at = True
        return source

    return StreamPart(tokens, opened)
