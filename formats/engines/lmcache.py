"""Law: LMCache (0.5, from 0.5.6 on) stores pqcodec's streams: a serializer, a deserializer, a plug-in that registers both.

An adapter of type "plugin" is what makes LMCache import this module before it looks the serde up; it hands everything on to the
adapter that ``adapter_params`` describes. What a deserializer raises makes LMCache count the objects of a task as not found. It
would find a damaged one again and again, because adapters do not store what they have: so such an object is deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmcache.logging import init_logger
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase, get_l2_adapter_config_class
from lmcache.v1.distributed.serde import AsyncSerdeProcessor, Deserializer, SerdeProcessor, Serializer, register_serde_factory

from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.formats.engines.chunks import ChunkCodec

SERDE = "pqcodec"  # the "type" of the serde in LMCache's configuration
_WORKERS = 1  # tasks of a kind at a time: each has the kernels' threads, of which there are as many as cores
_awaiting: list[Any] = []  # the adapter that was made last, until its serde is
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


class PQProcessor(SerdeProcessor):
    """LMCache's processor twice, so that a request never waits for what is being stored, which may be all of a long prompt."""

    def __init__(self, serializer: Serializer, deserializer: Deserializer, workers: int) -> None:
        self._serializing, self._deserializing = (AsyncSerdeProcessor(serializer, deserializer, workers) for _ in range(2))

    def get_serialize_event_fd(self) -> int:
        """Signalled when a chunk is encoded."""
        return self._serializing.get_serialize_event_fd()

    def get_deserialize_event_fd(self) -> int:
        """Signalled when a chunk is decoded."""
        return self._deserializing.get_deserialize_event_fd()

    def submit_serialize(self, src_objs: list[Any], dst_objs: list[Any], keys: list[Any]) -> int:
        """Begin to encode; returns the task."""
        return self._serializing.submit_serialize(src_objs, dst_objs, keys)

    def query_serialize_result(self, task_id: int) -> bool | None:
        """Whether a task has succeeded, once; None: it has not ended."""
        return self._serializing.query_serialize_result(task_id)

    def submit_deserialize(self, src_objs: list[Any], dst_objs: list[Any], keys: list[Any]) -> int:
        """Begin to decode; returns the task."""
        return self._deserializing.submit_deserialize(src_objs, dst_objs, keys)

    def query_deserialize_result(self, task_id: int) -> bool | None:
        """Whether a task has succeeded, once; None: it has not ended."""
        return self._deserializing.query_deserialize_result(task_id)

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """As ``PQSerializer``."""
        return self._serializing.estimate_serialized_size(layout_desc)

    def close(self) -> None:
        """Wait for all tasks."""
        self._serializing.close()
        self._deserializing.close()


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
        _awaiting[:] = [adapter]
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

    ``options``: those of ``ChunkCodec.from_json``, and ``max_workers``, tasks of a kind at a time.
    """
    adapter = _awaiting.pop() if _awaiting else None
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
    return PQProcessor(PQSerializer(chunks), PQDeserializer(chunks, adapter), workers)


register_serde_factory(SERDE, serde_of)
