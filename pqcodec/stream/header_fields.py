"""Law: what may follow the fixed part of a header, from its bytes (SPEC 13.1, 16.1, 17.1, 21.1); it refuses reserved values."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pqcodec import constants as c
from pqcodec.codings.declared import Affine, Codebook, Declared, Sketch
from pqcodec.codings.vectors import VectorCodebook
from pqcodec.errors import UnsupportedStream
from pqcodec.stream.header_ranges import PAIRING_NAMES


@dataclass(frozen=True)
class KeepField:
    """What a stream of kept tokens says of the tensor that they are of (SPEC 17)."""

    tokens: int  # of the whole tensor
    each: bool  # whether each leading index keeps tokens of its own


def read_affine(body: bytes, at: int, kept: bool, scalar: bool) -> Affine:
    """The affine fields from their bytes; ``kept``: whether outliers are; ``scalar``: of scalar coding.

    Raises UnsupportedStream and struct.error.
    """
    tokens, channels, fields, place, pairing, angle_bits, outliers, reserved = c.AFFINE_STRUCT.unpack_from(body, at)
    unknown = {
        "groups of all tokens": tokens == c.AFFINE_ALL_TOKENS,
        "groups of all channels": channels == 0,
        "fields": fields not in c.AFFINE_FIELD_BYTES,
        "place of fields": place != c.AFFINE_IN_BLOCKS and not (scalar and place == c.AFFINE_IN_TABLE),
        "pairing": pairing and pairing not in PAIRING_NAMES,
        "reserved bytes": any(reserved) or (outliers and not kept),
    }
    if any(unknown.values()):
        names = ", ".join(name for name, bad in unknown.items() if bad)
        raise UnsupportedStream(f"header: affine {names} are such as this release does not know: install a newer pqcodec")
    return Affine(tokens, channels, fields, pairing, angle_bits, outliers, place == c.AFFINE_IN_TABLE)


def possible_codebooks(coding: Declared) -> tuple[int, ...]:
    """What a header's codebook may be for a coding."""
    if coding.by_vectors:
        return (c.CODEBOOK_NAMED,)
    return (c.CODEBOOK_CLOSED_FORM, *((c.CODEBOOK_CARRIED, c.CODEBOOK_NAMED) if coding.takes_levels else ()))


def read_codebook(kind: int, raw: bytes, by_vectors: bool) -> Codebook | VectorCodebook:
    """The codebook from all bytes between what is before it and the header's checksum."""
    if by_vectors:
        return VectorCodebook(raw)
    if kind == c.CODEBOOK_NAMED:
        return Codebook(None, raw)
    return Codebook(struct.unpack(f"<{len(raw) // 2}H", raw[: len(raw) // 2 * 2]))


def read_sketch(body: bytes, at: int) -> Sketch:
    """The sketch from its bytes; raises UnsupportedStream and struct.error."""
    matrix, blocks, outlier_blocks, *rest = c.SKETCH_STRUCT.unpack_from(body, at)
    reserved, channels, also, tokens, last = rest
    if matrix not in c.SKETCH_ERRORS or reserved or also or last:
        raise UnsupportedStream("header: the sketch is such as this release does not know: install a newer pqcodec")
    return Sketch(blocks, matrix, tokens, channels, outlier_blocks)


def read_keep(body: bytes, at: int) -> KeepField:
    """The keep list's field from its bytes; raises UnsupportedStream and struct.error."""
    tokens, lists, reserved = c.KEEP_STRUCT.unpack_from(body, at)
    if lists not in (c.KEEP_SHARED, c.KEEP_EACH) or any(reserved):
        raise UnsupportedStream("header: the keep list is such as this release does not know: install a newer pqcodec")
    return KeepField(tokens, lists == c.KEEP_EACH)
