"""Law: JSON and checksums as the files of pqcodec hold them (SPEC 4.2, II.2, III.1): written compactly, read strictly."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

import numpy as np

from pqcodec import constants as c
from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.stream.checksum import checksum

_CHECKSUM_TEXT = re.compile(f"[0-9a-f]{{{2 * c.CHECKSUM_BYTES}}}")


def json_bytes(value: Any, what: str, most: int) -> bytes:
    """``value`` as JSON in UTF-8 without spaces.

    Raises InvalidArgument, naming ``what``, for a value that is not JSON or takes more than ``most`` bytes.
    """
    try:
        data = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"{what} cannot be written as JSON: {error}") from None
    if len(data) > most:
        raise InvalidArgument(f"{what} takes {len(data)} bytes of JSON, at most {most} are allowed; split the file")
    return data


def metadata_bytes(metadata: dict[str, Any] | None, most: int) -> bytes:
    """A file's metadata (None: an empty object) as JSON; raises InvalidArgument as ``json_bytes`` does, or for no dict."""
    if metadata is not None and not isinstance(metadata, dict):
        raise InvalidArgument(f"metadata is a {type(metadata).__name__}; a dict is expected, which becomes a JSON object")
    return json_bytes(metadata or {}, "metadata", most)


def json_value(data: bytes, what: str) -> Any:
    """A value from strict JSON: UTF-8, no NaN, no key twice; raises CorruptStream, naming ``what``."""
    try:
        return _STRICT.decode(data.decode())
    except (ValueError, RecursionError) as error:
        raise CorruptStream(f"{what}: not JSON: {error}") from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number of JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return found


def natural(value: object) -> bool:
    """Whether a value is an int (no bool) from 0 to 2^63 - 1."""
    return type(value) is int and 0 <= value < 1 << 63


def is_format(value: object, *known: int) -> bool:
    """Whether a document's ``format`` is one of these numbers; true and 1.0, which are 1 to Python, are none."""
    return type(value) is int and value in known


def shape_problem(shape: object) -> str:
    """What is wrong with a tensor's shape, or an empty string."""
    if not isinstance(shape, (list, tuple)) or not all(map(natural, shape)):
        return f"shape {shape!r:.60}: a list of numbers from 0 is expected"
    if len(shape) > c.MAX_EXACT_NDIM or math.prod(max(n, 1) for n in shape) > c.MAX_ELEMENTS:
        caps = f"{c.MAX_EXACT_NDIM} dimensions and {c.MAX_ELEMENTS} elements"
        return f"shape {list(shape)!r:.200} is outside the caps of {caps}"
    return ""


def tensor_problem(name: object, layer: object, role: object) -> str:
    """What is wrong with a tensor's name, layer or role, or an empty string."""
    if not isinstance(name, str) or not name:
        return f"the name is {name!r}; a string that is not empty is expected"
    if not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
        return "the name is not Unicode text (it holds half a surrogate pair)"
    if layer is not None and not natural(layer):
        return f"layer is {layer!r}; None or a number from 0 is expected"
    if role not in c.ROLES:
        return f"role is {role!r}; choose from {', '.join(c.ROLES)}"
    return ""


def checksum_bytes(data: bytes | np.ndarray) -> bytes:
    """The checksum of data (SPEC 4.2) as 4 bytes, little-endian."""
    return checksum(data).to_bytes(c.CHECKSUM_BYTES, "little")


def checksum_text(value: int) -> str:
    """A checksum as 8 hexadecimal digits of its four bytes, little-endian (SPEC III.1)."""
    return value.to_bytes(c.CHECKSUM_BYTES, "little").hex()


def checksum_of_text(text: object) -> int:
    """The checksum that ``checksum_text`` wrote as text; raises CorruptStream for any other text."""
    if not isinstance(text, str) or not _CHECKSUM_TEXT.fullmatch(text):
        raise CorruptStream(f"a seal is {text!r:.60}; {2 * c.CHECKSUM_BYTES} hexadecimal digits are expected")
    return int.from_bytes(bytes.fromhex(text), "little")


_STRICT = json.JSONDecoder(parse_constant=_refuse, object_pairs_hook=_unique)
