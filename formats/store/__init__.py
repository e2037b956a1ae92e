"""Law: prefix caches that persist: blocks of tokens in files, an index over them, and the model's side of both."""

from pqcodec.formats.store.prefix_store import Prefix, PrefixStore

__all__ = ["Prefix", "PrefixStore"]
