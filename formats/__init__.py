"""Law: other people's containers and files of many streams; what one stream holds is the package ``pqcodec``'s business."""

from pqcodec.formats.cache import load_cache, save_cache
from pqcodec.formats.pqkv import Entry, PQKVFile, PQKVWriter

__all__ = ["Entry", "PQKVFile", "PQKVWriter", "load_cache", "save_cache"]
