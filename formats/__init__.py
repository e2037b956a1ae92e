"""Law: files and stores of many streams; a single stream is the package ``pqcodec``'s concern."""

from pqcodec.formats.cache import append_cache, load_cache, save_cache
from pqcodec.formats.containers.pqkv.appender import PQKVAppender
from pqcodec.formats.containers.pqkv.file import PQKVFile, PQKVWriter
from pqcodec.formats.containers.reader import Entry
from pqcodec.formats.offload import HostPool
from pqcodec.formats.store import PrefixStore

__all__ = [
    "Entry",
    "HostPool",
    "PQKVAppender",
    "PQKVFile",
    "PQKVWriter",
    "PrefixStore",
    "append_cache",
    "load_cache",
    "save_cache",
]
