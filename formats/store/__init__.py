"""Persistent caches of prompt prefixes (SPEC IV.2 to IV.4): blocks in files, an index over them, and the model's side."""

from pqcodec.formats.store.prefix_store import Prefix, PrefixStore

__all__ = ["Prefix", "PrefixStore"]
