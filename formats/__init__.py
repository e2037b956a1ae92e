"""Law: other people's containers and files of many streams; what one stream holds is the package ``pqcodec``'s business."""

from pqcodec.formats.appender import PQKVAppender
from pqcodec.formats.cache import append_cache, load_cache, save_cache
from pqcodec.formats.offload import HostPool
from pqcodec.formats.pqkv import PQKVFile, PQKVWriter
from pqcodec.formats.store import PrefixStore
from pqcodec.formats.tensor_file import Entry

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
