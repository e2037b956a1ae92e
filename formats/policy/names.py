"""Law: the role and layer of a tensor by its name, from a table of naming conventions.

The first pattern of the table that matches decides; a caller's regex replaces the table for its role.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from pqcodec.errors import InvalidArgument
from pqcodec.stages.centre import Rope


@dataclass(frozen=True)
class TensorRole:
    """What a tensor is in a KV cache: its role, layer, RoPE, and which of its tokens are at the beginning of the text."""

    role: str  # "key", "value" or "other"
    layer: int | None = None  # None: not known
    rope: Rope | None = field(default=None, repr=False)  # replaces the RoPE of the recipe for this tensor
    first_token: int = field(default=0, repr=False)  # position in the sequence of the tensor's first token
    padding: tuple[int, ...] = field(default=(), repr=False)  # tokens of left padding of each sequence


_WORDS = {
    "key": "k|keys?|k_?cache|keys?_cache|cache_(?:k|keys?)|k_states|key_states|past_keys?|present_keys?",
    "value": "v|values?|v_?cache|values?_cache|cache_(?:v|values?)|v_states|value_states|past_values?|present_values?",
}
_START, _GAP = r"(?:.*[._/\-\]])?", r"[._/\-\[\]]+"
_LAYER = r"(?P<layer>\d{1,6})"
_HOLDER = "layers?|blocks?|h|past_key_values|past|present|cache"
_PATTERNS = (  # WORD: one of the words of a role; it ends the name (k_proj.weight is no key)
    rf"{_START}(?:{_HOLDER}){_GAP}{_LAYER}(?:{_GAP}.*)?{_GAP}WORD",  # layers.3.self_attn.key
    rf"{_START}{_LAYER}(?:{_GAP}.*)?{_GAP}WORD",  # 3.keys, block3/0/k
    rf"{_START}(?:layers?|block|l){_LAYER}(?:{_GAP}.*)?{_GAP}WORD",  # layer3.key
    rf"{_START}WORD[._/\-\[]*{_LAYER}\]?",  # key_cache.3, k_3, keys[3], v3
    rf"{_START}WORD",  # keys, model.k_cache
)
_LONGEST = 256  # characters at the end of a name that are matched
TABLE = tuple(
    (role, re.compile(pattern.replace("WORD", f"(?:{words})"), re.IGNORECASE))
    for pattern in _PATTERNS
    for role, words in _WORDS.items()
)


def role_of(name: str, keys: str | None = None, values: str | None = None) -> TensorRole:
    """Role and layer of the tensor ``name``.

    ``keys``, ``values``: a regex, searched in the name, that alone decides on that role; its group called layer, if it has
    one, is the layer. Raises InvalidArgument for a bad regex, or a name that both match.

    >>> role_of("model.layers.0.self_attn.k_cache"), role_of("v.3"), role_of("layers.0.self_attn.k_proj.weight")
    (TensorRole(role='key', layer=0), TensorRole(role='value', layer=3), TensorRole(role='other', layer=None))
    """
    given = {role: _compile(role, regex) for role, regex in (("key", keys), ("value", values)) if regex is not None}
    asked = [(role, match) for role, regex in given.items() if (match := regex.search(name))]
    if len(asked) > 1:
        raise InvalidArgument(f"tensor {name!r} fits the regex of keys and that of values; make one of them narrower")
    by_table = next(((role, match) for role, regex in TABLE if (match := regex.fullmatch(name[-_LONGEST:]))), None)
    if asked:
        role, match = asked[0]
        layer = _layer(match)
        return TensorRole(role, layer if layer is not None else _layer(by_table[1]) if by_table else _only_number(name))
    if by_table is None or by_table[0] in given:
        return TensorRole("other")
    return TensorRole(by_table[0], _layer(by_table[1]))


def _compile(role: str, regex: str) -> re.Pattern[str]:
    try:
        return re.compile(regex)
    except re.error as error:
        raise InvalidArgument(f"the regex of {role}s, {regex!r}, cannot be read: {error}") from None


def _layer(match: re.Match[str]) -> int | None:
    layer = match.groupdict().get("layer")
    return int(layer) if layer is not None and re.fullmatch(r"[0-9]{1,6}", layer) else None


def _only_number(name: str) -> int | None:
    """The number in a name that matches no pattern, if there is exactly one."""
    numbers = re.findall(r"(?<!\d)\d{1,6}(?!\d)", name)
    return int(numbers[0]) if len(numbers) == 1 else None
