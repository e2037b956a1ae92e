"""Law: digests of 32 hexadecimal digits, and what of a config enters them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

PERSON = b"pqcodec-model"
_AT_RUN_TIME = {  # settings of a config that leave the cache's numbers as they are, or say where it came from
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
    return hashlib.blake2b(digest_size=32, person=PERSON)


def json_digest(value: Any) -> str:
    hashed = new_hash()
    hashed.update(json.dumps(value, sort_keys=True, default=str).encode())
    return str(hashed.hexdigest()[:32])


def is_config(value: Any) -> bool:
    """Whether it is a config of transformers (or a class of one)."""
    return hasattr(value, "to_dict") and hasattr(value, "get_text_config")


def config_digest(config: Any) -> str:
    return json_digest(_lasting(config.to_dict()))


def _lasting(value: Any) -> Any:
    """A config's settings, nested ones too, without those that do not count."""
    if isinstance(value, dict):
        kept = {str(key): _lasting(member) for key, member in value.items()}
        return {key: member for key, member in kept.items() if key not in _AT_RUN_TIME and not key.startswith("_")}
    return [_lasting(member) for member in value] if isinstance(value, (list, tuple)) else value
