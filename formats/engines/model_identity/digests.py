"""Law: the digests of an identity, 32 hexadecimal digits of BLAKE2b, and which settings of a config enter them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

PERSON = b"pqcodec-model"
_AT_RUN_TIME = {  # settings of a config that do not change a cache's numbers
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "use_cache",
    "attn_implementation",
    "experts_implementation",
}


def new_hash() -> Any:
    """A BLAKE2b of hashlib with 32 bytes and the person of model identities."""
    return hashlib.blake2b(digest_size=32, person=PERSON)


def json_digest(value: Any) -> str:
    """The digest of a value's JSON, keys sorted: 32 hexadecimal digits."""
    hashed = new_hash()
    hashed.update(json.dumps(value, sort_keys=True, default=str).encode())
    return str(hashed.hexdigest()[:32])


def is_config(value: Any) -> bool:
    """Whether a value is a config of transformers, or such a class."""
    return hasattr(value, "to_dict") and hasattr(value, "get_text_config")


def config_digest(config: Any) -> str:
    """The digest of a config's settings, without those of ``_AT_RUN_TIME``: 32 hexadecimal digits."""
    return json_digest(_lasting(config.to_dict()))


def _lasting(value: Any) -> Any:
    """A config's settings, also nested ones, without private ones and those of ``_AT_RUN_TIME``."""
    if isinstance(value, dict):
        kept = {str(key): _lasting(member) for key, member in value.items()}
        return {key: member for key, member in kept.items() if key not in _AT_RUN_TIME and not key.startswith("_")}
    return [_lasting(member) for member in value] if isinstance(value, (list, tuple)) else value
