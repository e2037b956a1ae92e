"""pqcodec: KV-cache tensors to self-describing polar-angle streams and back.

Importing this package imports neither torch nor numba; what is used first is loaded then.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pqcodec.errors import (
    BackendUnavailable,
    CorruptStream,
    InvalidArgument,
    MissingTable,
    NonFiniteInput,
    PQError,
    TruncatedStream,
    UnsupportedStream,
)

if TYPE_CHECKING:
    from pqcodec.attend_batch import AttendBatch
    from pqcodec.batch import DecodeBatch, EncodeBatch
    from pqcodec.codec import decode, decode_kept, encode, encoded_size, given_tables, inspect, verify
    from pqcodec.codings.presets import PRESETS
    from pqcodec.stages.centre import Rope
    from pqcodec.stream.report import Damage, StreamInfo
    from pqcodec.stream.tables import BasisTable, LevelTable, RangeTable, SharedTable, VectorTable
    from pqcodec.training import train_vq

__version__ = "0.1.0"

_LAZY = {
    "encode": "codec",
    "decode": "codec",
    "decode_kept": "codec",
    "inspect": "codec",
    "verify": "codec",
    "encoded_size": "codec",
    "AttendBatch": "attend_batch",
    "EncodeBatch": "batch",
    "DecodeBatch": "batch",
    "Damage": "stream.report",
    "StreamInfo": "stream.report",
    "Rope": "stages.centre",
    "BasisTable": "stream.tables",
    "LevelTable": "stream.tables",
    "RangeTable": "stream.tables",
    "SharedTable": "stream.tables",
    "VectorTable": "stream.tables",
    "train_vq": "training",
    "given_tables": "codec",
    "PRESETS": "codings.presets",
}

__all__ = [
    "PRESETS",
    "AttendBatch",
    "BackendUnavailable",
    "BasisTable",
    "CorruptStream",
    "Damage",
    "DecodeBatch",
    "EncodeBatch",
    "InvalidArgument",
    "LevelTable",
    "MissingTable",
    "NonFiniteInput",
    "PQError",
    "RangeTable",
    "Rope",
    "SharedTable",
    "StreamInfo",
    "TruncatedStream",
    "UnsupportedStream",
    "VectorTable",
    "__version__",
    "decode",
    "decode_kept",
    "encode",
    "encoded_size",
    "given_tables",
    "inspect",
    "train_vq",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'pqcodec' has no attribute {name!r}")
    return getattr(import_module(f"pqcodec.{_LAZY[name]}"), name)
