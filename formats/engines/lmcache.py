"""Law: LMCache (0.5, from 0.5.6 on) stores pqcodec's streams: a serializer, a deserializer, a plug-in that registers both.

An adapter of type "plugin" is what makes LMCache import this module before it looks the serde up; it hands everything on to the
adapter that ``adapter_params`` describes. What a deserializer raises makes LMCache count the objects of a task as not found. It
would find a damaged one again and again, because adapters do not store what they have: so such an object is deleted.

LMCache decodes nothing before all objects of a task are loaded. Here an adapter says at once that they are (``Arrivals``), and
whoever decodes an object waits for that one, while the others are still on their way.
"""

from __future__ import annotations

import select
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any

from lmcache.lmcache_native import Bitmap
from lmcache.logging import init_logger
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase, get_l2_adapter_config_class
from lmcache.v1.distributed.l2_adapters.serde_wrapper import SerdeL2AdapterWrapper
from lmcache.v1.distributed.serde import AsyncSerdeProcessor, Deserializer, SerdeProcessor, Serializer, register_serde_factory
from lmcache.v1.platform import consume_fd, create_event_notifier

from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.formats.engines.chunks import ChunkCodec

SERDE = "pqcodec"  # the "type" of the serde in LMCache's configuration
_WORKERS = 2  # chunks decoded at a time: Python's part of one hides behind the kernels of the other
_MOST_FAILED = 1 << 12  # keys whose loading has failed that are known at a time
_awaiting: list[Arrivals] = []  # those of the adapter that was made last, until its serde is
logger = init_logger(__name__)


class PQSerializer(Serializer):
    """Chunks of keys and values to bytes, as many as ``estimate_serialized_size`` says."""

    def __init__(self, chunks: ChunkCodec) -> None:
        self._chunks = chunks

    def serialize(self, src: Any, dst: Any, key: Any) -> int:
        """Encode the chunk in ``src`` into the first bytes of ``dst``; returns how many. Raises InvalidArgument."""
        import torch

        data = self._chunks.encode(_chunk_of(src), object_name(key))
        _bytes_of(dst)[: data.nbytes].copy_(torch.from_numpy(data))
        return data.nbytes

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """The exact size of an encoded chunk; raises InvalidArgument for one that cannot be encoded: it is not stored."""
        _refuse_several(layout_desc.shapes)
        return self._chunks.size(layout_desc.shapes[0], layout_desc.dtypes[0])


class PQDeserializer(Deserializer):
    """Bytes to chunks of keys and values; an error is a miss. ``adapter``: what stores the bytes, where that is known."""

    def __init__(self, chunks: ChunkCodec, adapter: Any = None) -> None:
        self._chunks, self._adapter = chunks, adapter

    def deserialize(self, src: Any, dst: Any, key: Any) -> None:
        """Decode ``src`` into the chunk in ``dst``; raises CorruptStream, UnsupportedStream or InvalidArgument."""
        try:
            self._chunks.decode(_bytes_of(src).cpu().numpy(), _chunk_of(dst), object_name(key))
        except CorruptStream as error:
            if self._adapter is not None:
                logger.warning("%s is deleted, so that it is stored anew: %s", key, error)
                self._adapter.delete([key])
            raise


class Arrivals:
    """Loads of an adapter, four of whose methods are replaced: a task ends at once, and each object comes by itself.

    Only LMCache's wrapper around the serde that waits for objects is told so. Where one does not come, all of its task are
    misses, because a serde cannot say which one is; the next task with its key is loaded by the adapter's rule, which can.
    """

    def __init__(self, adapter: Any) -> None:
        self.adapter: Any = adapter
        self.serde: Any = None  # that which waits
        self._submit, self._query, self._close = adapter.submit_load_task, adapter.query_load_result, adapter.close
        self._fd, self._ended, self._stop = adapter.get_load_event_fd(), create_event_notifier(), create_event_notifier()
        self._lock = threading.Lock()
        self._promises: dict[int, int] = {}  # tasks that have ended at once, and how many objects each has
        self._numbers = count(-1, -1)  # of these tasks: the adapter's own are from 0 on
        self._tasks: dict[int, Future[bool]] = {}  # the adapter's own, of one object each
        self._coming: dict[int, Future[bool]] = {}  # the same by the object's id, until the serde asks
        self._failed: dict[Any, None] = {}  # keys that are not promised
        adapter.submit_load_task, adapter.query_load_result, adapter.close = self.submit, self.query, self.close
        adapter.get_load_event_fd = self._ended.fileno
        self._watch = threading.Thread(target=self._watching, name="pqcodec-arrivals", daemon=True)
        self._watch.start()

    def submit(self, keys: list[Any], objects: list[Any]) -> int:
        """Begin to load objects; returns the task. As LMCache's ``submit_load_task``."""
        caller = sys._getframe(1).f_locals.get("self")
        waits = isinstance(caller, SerdeL2AdapterWrapper) and getattr(caller, "_serde", caller) is self.serde
        if not waits or any(key in self._failed for key in keys):
            return self._submit(keys, objects)  # type: ignore[no-any-return]
        with self._lock:
            for key, memory in zip(keys, objects, strict=True):
                self._coming[id(memory)] = came = Future[bool]()
                try:
                    self._tasks[self._submit([key], [memory])] = came
                except Exception as error:  # others are under way, and write into memory until they have come
                    came.set_exception(error)
            task = next(self._numbers)
            self._promises[task] = len(keys)
        self._ended.notify()
        return task

    def query(self, task: int) -> Any:
        """The bitmap of objects of an ended task, once; None: it has not. As LMCache's ``query_load_result``."""
        with self._lock:
            promised = self._promises.pop(task, None)
        return self._query(task) if promised is None else Bitmap(promised, promised)

    def of(self, memory: Any) -> Future[bool] | None:
        """Whether an object has come, once that is known; None of one that was not promised."""
        with self._lock:
            return self._coming.pop(id(memory), None)

    def check(self, came: Future[bool], key: Any) -> None:
        """Raises OSError where an object has not come."""
        if came.exception() is None and came.result():
            return
        if len(self._failed) >= _MOST_FAILED:
            self._failed.clear()
        self._failed[key] = None
        raise OSError(f"{key} was not loaded; what was loaded together with it is computed") from came.exception()

    def close(self) -> None:
        """Close the adapter; nothing comes any more."""
        self._stop.notify()
        self._watch.join()
        self._close()
        for came in self._tasks.values():
            came.set_result(False)
        self._ended.close()
        self._stop.close()

    def _watching(self) -> None:
        """Note what has come, and tell LMCache of the tasks that it knows."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.register(self._stop.fileno(), select.POLLIN)
        while self._stop.fileno() not in dict(poll.poll()):
            consume_fd(self._fd)
            with self._lock:
                asked = {task: self._query(task) for task in self._tasks}
                ended = [(self._tasks.pop(task), found) for task, found in asked.items() if found is not None]
            for came, found in ended:
                came.set_result(found.test(0))
            self._ended.notify()


class PQProcessor(SerdeProcessor):
    """Encodes as LMCache's processor does, and decodes ``workers`` chunks at a time, each as soon as it has come.

    Both have threads of their own, so that a request never waits for what is being stored, which may be all of a long prompt.
    """

    def __init__(
        self, serializer: Serializer, deserializer: Deserializer, workers: int, arrivals: Arrivals | None = None
    ) -> None:
        self._serializing = AsyncSerdeProcessor(serializer, deserializer)
        self._deserializer, self._arrivals = deserializer, arrivals
        self._pool, self._decoded = ThreadPoolExecutor(workers, "pqcodec-decoding"), create_event_notifier()
        self._lock, self._numbers = threading.Lock(), count()
        self._tasks: dict[int, tuple[int, list[bool]]] = {}  # how many objects each has, and whether those that ended succeeded

    def get_serialize_event_fd(self) -> int:
        """Signalled when a task's chunks are encoded."""
        return self._serializing.get_serialize_event_fd()

    def get_deserialize_event_fd(self) -> int:
        """Signalled when a task's chunks are decoded."""
        return self._decoded.fileno()

    def submit_serialize(self, src_objs: list[Any], dst_objs: list[Any], keys: list[Any]) -> int:
        """Begin to encode; returns the task."""
        return self._serializing.submit_serialize(src_objs, dst_objs, keys)

    def query_serialize_result(self, task_id: int) -> bool | None:
        """Whether a task has succeeded, once; None: it has not ended."""
        return self._serializing.query_serialize_result(task_id)

    def submit_deserialize(self, src_objs: list[Any], dst_objs: list[Any], keys: list[Any]) -> int:
        """Begin to decode; returns the task."""
        task_id = next(self._numbers)
        self._tasks[task_id] = len(keys), []
        for src, dst, key in zip(src_objs, dst_objs, keys, strict=True):
            decode = partial(self._decode, task_id, src, dst, key)
            came = self._arrivals.of(src) if self._arrivals else None
            if came is None:
                self._pool.submit(decode, None)
            else:
                came.add_done_callback(partial(self._pool.submit, decode))
        return task_id

    def query_deserialize_result(self, task_id: int) -> bool | None:
        """Whether a task has succeeded, once; None: it has not ended."""
        with self._lock:
            expected, ended = self._tasks.get(task_id, (1, []))
            if len(ended) < expected:
                return None
            del self._tasks[task_id]
        return all(ended)

    def _decode(self, task_id: int, src: Any, dst: Any, key: Any, came: Future[bool] | None) -> None:
        succeeded = False
        try:
            if self._arrivals and came:
                self._arrivals.check(came, key)
            self._deserializer.deserialize(src, dst, key)
            succeeded = True
        except Exception:
            logger.exception("%s is not decoded", key)
        with self._lock:
            expected, ended = self._tasks[task_id]
            ended.append(succeeded)
        if len(ended) == expected:
            self._decoded.notify()

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """As ``PQSerializer``."""
        return self._serializing.estimate_serialized_size(layout_desc)

    def close(self) -> None:
        """Wait for all tasks."""
        self._serializing.close()
        self._pool.shutdown()
        self._decoded.close()


def object_name(key: Any) -> bytes:
    """What tells an object from all others: every field of LMCache's ObjectKey."""
    return repr((key.model_name, key.kv_rank, key.object_group_id, key.cache_salt, bytes(key.chunk_hash))).encode()


def _chunk_of(memory: Any) -> Any:
    _refuse_several(memory.get_shapes())
    return _tensor_of(memory)


def _bytes_of(memory: Any) -> Any:
    import torch

    return _tensor_of(memory).flatten().view(torch.uint8)


def _tensor_of(memory: Any) -> Any:
    if memory.tensor is None:
        raise InvalidArgument("LMCache's memory object has no tensor any more")
    return memory.tensor


def _refuse_several(shapes: Any) -> None:
    if len(shapes) != 1:
        raise InvalidArgument(f"an object holds {len(shapes)} tensors {list(map(tuple, shapes))}; one is expected")


# -- registration --------------------------------------------------------------------------------------------------
class PQCodecL2Adapter(L2AdapterInterface):
    """LMCache's own adapter of the type that ``adapter_params`` names; importing this module for it registers the serde."""

    def __new__(cls, config: Any, l1_memory_desc: Any = None) -> Any:
        """An adapter of LMCache's, which makes the adapter's serde next."""
        adapter = create_l2_adapter(config, l1_memory_desc)
        _awaiting[:] = [Arrivals(adapter)]
        return adapter


class PQCodecL2AdapterConfig(L2AdapterConfigBase):
    """Its configuration: that of the adapter whose "type" is among the parameters."""

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Any:
        """The configuration of the adapter of that type; raises ValueError."""
        if not isinstance(d.get("type"), str):
            raise InvalidArgument(f"adapter_params {d!r}: 'type' is missing, the adapter that stores the bytes, such as \"fs\"")
        return get_l2_adapter_config_class(d["type"]).from_dict(d)

    @classmethod
    def help(cls) -> str:
        """What the parameters are."""
        return "adapter_params: 'type', the adapter that stores the bytes (fs, s3, resp ...), and that adapter's own parameters"


def serde_of(options: Mapping[str, Any]) -> PQProcessor:
    """The serde of a configuration, its kernels compiled; raises InvalidArgument (a ValueError), which ends LMCache's start.

    ``options``: those of ``ChunkCodec.from_json``, and ``max_workers``, chunks decoded at a time.
    """
    arrivals = _awaiting.pop() if _awaiting else None
    chosen = dict(options)
    workers = chosen.pop("max_workers", _WORKERS)
    if type(workers) is not int or workers < 1:
        raise InvalidArgument(f"max_workers is {workers!r}; a whole number from 1 on is expected")
    chunks = ChunkCodec.from_json(chosen)
    if not {"model", "rope"} & chosen.keys():
        logger.warning("pqcodec: neither 'model' nor 'rope' is given; keys under RoPE have several times less error with it")
    logger.info("pqcodec: %r; compiling kernels, once for this machine (up to a minute)", chunks)
    chunks.warm()
    logger.info("pqcodec: ready")
    adapter = arrivals and arrivals.adapter
    serde = PQProcessor(PQSerializer(chunks), PQDeserializer(chunks, adapter), workers, arrivals)
    if arrivals is not None:
        arrivals.serde = serde
    return serde


register_serde_factory(SERDE, serde_of)
