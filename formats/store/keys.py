"""Law: the names of blocks (SPEC IV.2): a chain of hashes over the tokens, from a root made of model, settings and tenant.

A name covers all tokens up to the block's end and everything that their keys and values depend on. The hash is BLAKE2b with 32
bytes, keyed by the tenant's salt: without the salt no name can be computed, and so no block requested.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pqcodec.errors import InvalidArgument
from pqcodec.formats.engines.model_identity import Identity

BLOCK_TOKENS = 256
NAME_BYTES = 32
TENANT_BYTES = 16
MARK_BYTES = 8  # as many as a token id has
PERSON = b"pqcodec-prefix"
FORMAT = 1


def token_ids(tokens: Any) -> np.ndarray:
    """Token ids as int64 [n], from a list, an array or a tensor [n] or [1, n]; raises InvalidArgument."""
    if hasattr(tokens, "detach"):
        tokens = tokens.detach().cpu().numpy()
    try:
        ids = np.asarray(tokens)
    except ValueError as error:  # lists of several lengths
        raise InvalidArgument(f"tokens: the ids of one sequence are expected, integers [n] or [1, n]: {error}") from None
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise InvalidArgument(f"tokens {ids.dtype} {ids.shape}: the ids of one sequence are expected, integers [n] or [1, n]")
    return np.ascontiguousarray(ids, "<i8")


class Chain:
    """The names of blocks under one root.

    ``settings``: what the root stands for (``settings_of``); ``tenant``: a salt, "" for none.

    >>> chain = Chain({"model": "tiny"}, tenant="a")
    >>> one = chain.child(chain.root, [1, 2, 3])
    >>> one == Chain({"model": "tiny"}, tenant="b").child(chain.root, [1, 2, 3])
    False
    """

    def __init__(self, settings: Mapping[str, Any], tenant: str = "") -> None:
        self._key = _key_of(tenant)
        self.keyed = bool(tenant)
        self.tenant_id = tenant_id_of(tenant)
        self.settings = {"format": FORMAT, **settings}
        self.root = self._hash(json.dumps(self.settings, sort_keys=True).encode())

    def child(self, parent: bytes, tokens: Sequence[int] | np.ndarray) -> bytes:
        """The name (32 bytes) of the block of ``tokens`` after the block or root called ``parent``."""
        ids = np.ascontiguousarray(tokens, "<i8")
        return self._hash(parent + len(ids).to_bytes(8, "little") + ids.tobytes())

    def marks(self, parent: bytes, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """What the store keeps of a block's tokens, int64 [n]: the ids or, with a tenant's salt, a keyed hash for each.

        Each hash covers ``parent`` and the tokens up to its own. So two runs share as many leading marks as tokens, and the
        tokens cannot be found without the salt.

        >>> chain = Chain({"model": "tiny"}, tenant="a")
        >>> one, two = (chain.marks(chain.root, tokens) for tokens in ([7, 8, 9], [7, 8, 1]))
        >>> (one == two).tolist(), 7 in one
        ([True, True, False], False)
        """
        ids = np.ascontiguousarray(tokens, "<i8")
        if not self.keyed:
            return ids
        running = hashlib.blake2b(parent, digest_size=MARK_BYTES, key=self._key, person=PERSON)
        marks = []
        for token in ids:
            running.update(token.tobytes())
            marks.append(running.digest())  # of all tokens so far
        return np.frombuffer(b"".join(marks), "<i8")

    def _hash(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=NAME_BYTES, key=self._key, person=PERSON).digest()


def tenant_id_of(tenant: str) -> str:
    """What an index calls a tenant by, 32 hexadecimal digits that do not tell the salt; "" without a salt.

    >>> tenant_id_of("a"), tenant_id_of("")
    ('8164a9df593b5bb16a4a76d49ef91724', '')
    """
    if not tenant:
        return ""
    return hashlib.blake2b(b"tenant", digest_size=TENANT_BYTES, key=_key_of(tenant), person=PERSON).hexdigest()


def is_tenant_id(text: object) -> bool:
    """Whether ``text`` is of the form of a tenant's id."""
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{32}", text) is not None


def _key_of(tenant: str) -> bytes:
    return hashlib.blake2b(tenant.encode(), person=PERSON).digest() if tenant else b""


def is_keyed(root: bytes, settings: Mapping[str, Any]) -> bool:
    """Whether the name of a root with these settings includes a tenant's salt."""
    return Chain(settings).root != root


def unknown(tokens: np.ndarray) -> np.ndarray:
    """Placeholders, -1 each, for tokens that are not kept; no token id equals them."""
    return np.full_like(tokens, -1)


def settings_of(identity: Identity, tokenizer: str, codec: Mapping[str, Any], extra: str) -> dict[str, Any]:
    """The settings of a root: the model, the digest of its tokenizer, the codec's settings, and the caller's ``extra`` string.

    Raises InvalidArgument for an ``extra`` that is no string.
    """
    if not isinstance(extra, str):
        raise InvalidArgument(f"extra is a {type(extra).__name__}; a string is expected, such as a digest")
    model = identity.as_dict()
    return {"model": model, "tokenizer": tokenizer, "codec": dict(codec), "extra": extra}
