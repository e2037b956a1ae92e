"""What LMCache calls: sizes for its buffers, chunks in its memory objects, misses for what is damaged, and its registries."""

from __future__ import annotations

import json
import select
import threading
from typing import Any

import pytest
import torch
from conftest import gaussian, rel_mse

from pqcodec.errors import CorruptStream, InvalidArgument

pytest.importorskip("lmcache.v1.distributed.serde")
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
from lmcache.v1.distributed.serde import SerdeConfig, create_serde_processor, serialized_layout_desc
from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

from pqcodec.formats.engines import lmcache as plug_in
from pqcodec.formats.engines.chunks import ChunkCodec

OPTIONS = {"preset": "pq4", "head_dim": 32, "kv_heads": 2, "rope": {"theta": 10000}}
SHAPES = ((1, 3, 20, 2 * 2 * 32), (2, 3, 20, 2 * 32))
KEY = ObjectKey(chunk_hash=b"0123", model_name="a/model", kv_rank=0)


def memory_of(x: torch.Tensor) -> TensorMemoryObj:
    """A memory object of LMCache's, whose bytes lie in a larger, aligned buffer."""
    raw = torch.zeros(-(-x.nbytes // 4096) * 4096, dtype=torch.uint8)
    raw[: x.nbytes] = x.contiguous().flatten().view(torch.uint8)
    metadata = MemoryObjMetadata(
        shape=x.shape,
        dtype=x.dtype,
        address=raw.data_ptr(),
        phy_size=raw.nbytes,
        fmt=MemoryFormat.KV_2LTD,
        ref_count=1,
        shapes=[x.shape],
        dtypes=[x.dtype],
    )
    return TensorMemoryObj(raw, metadata, parent_allocator=None)


class Adapter:
    """Only what a deserializer calls."""

    def __init__(self) -> None:
        self.deleted: list[ObjectKey] = []

    def delete(self, keys: list[ObjectKey]) -> None:
        self.deleted += keys


@pytest.fixture(scope="module")
def chunks() -> ChunkCodec:
    return ChunkCodec.from_json(OPTIONS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_chunk_goes_through_memory_objects(chunks: ChunkCodec, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = gaussian(*shape).to(dtype)
    serializer = plug_in.PQSerializer(chunks)
    size = serializer.estimate_serialized_size(MemoryLayoutDesc([x.shape], [dtype]))
    buffer, back = memory_of(torch.zeros(size, dtype=torch.uint8)), memory_of(torch.zeros_like(x))
    assert serializer.serialize(memory_of(x), buffer, KEY) == size
    plug_in.PQDeserializer(chunks).deserialize(buffer, back, KEY)
    assert rel_mse(x, back.tensor) < 0.01


def test_what_is_damaged_or_of_another_object_is_deleted(chunks: ChunkCodec) -> None:
    x, adapter = gaussian(*SHAPES[0]).half(), Adapter()
    buffer = memory_of(torch.zeros(chunks.size(x.shape, x.dtype), dtype=torch.uint8))
    plug_in.PQSerializer(chunks).serialize(memory_of(x), buffer, KEY)
    deserializer = plug_in.PQDeserializer(chunks, adapter)
    for field, value in (
        ("chunk_hash", b"0124"),
        ("model_name", "b/model"),
        ("kv_rank", 1),
        ("object_group_id", 1),
        ("cache_salt", "s"),
    ):
        fields = {"chunk_hash": KEY.chunk_hash, "model_name": KEY.model_name, "kv_rank": KEY.kv_rank, field: value}
        other = ObjectKey(**fields)
        with pytest.raises(CorruptStream, match="of another object"):
            deserializer.deserialize(buffer, memory_of(x), other)
        assert adapter.deleted.pop() == other
    buffer.raw_data[500] ^= 1
    with pytest.raises(CorruptStream):
        deserializer.deserialize(buffer, memory_of(x), KEY)
    assert adapter.deleted == [KEY]


def test_what_cannot_be_encoded_is_not_deleted(chunks: ChunkCodec) -> None:
    adapter = Adapter()
    serializer, deserializer = plug_in.PQSerializer(chunks), plug_in.PQDeserializer(chunks, adapter)
    for shapes in ([torch.Size((1, 3, 20, 100))], [torch.Size(SHAPES[0])] * 2, []):
        layout = MemoryLayoutDesc(shapes, [torch.float16] * len(shapes))
        with pytest.raises(InvalidArgument):
            serializer.estimate_serialized_size(layout)
    x = gaussian(1, 3, 20, 100).half()
    with pytest.raises(InvalidArgument, match="which is not"):
        deserializer.deserialize(memory_of(torch.zeros(1000, dtype=torch.uint8)), memory_of(x), KEY)
    assert not adapter.deleted


# -- registration --------------------------------------------------------------------------------------------------
def made(tmp_path: Any, **adapter: Any) -> Any:
    """An adapter out of the JSON of LMCache's command line."""
    given = {
        "type": "plugin",
        "module_path": plug_in.__name__,
        "class_name": "PQCodecL2Adapter",
        "adapter_params": {"type": "fs", "base_path": str(tmp_path), **adapter},
    }
    return create_l2_adapter(get_l2_adapter_config_class("plugin").from_dict(given))


def finished(processor: Any, fd: int, query: Any, task: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(60_000)
    return query(task)


def test_the_plug_in_makes_lmcaches_adapter_and_its_serde(tmp_path: Any) -> None:
    adapter = made(tmp_path)
    assert type(adapter).__name__ == "FSL2Adapter"
    serde = create_serde_processor(SerdeConfig("pqcodec", {**OPTIONS, "max_workers": 2}))
    try:
        x = gaussian(*SHAPES[0]).half()
        layout = serialized_layout_desc(MemoryLayoutDesc([x.shape], [x.dtype]), serde)
        sources, backs = [memory_of(x), memory_of(-x)], [memory_of(torch.zeros_like(x)) for _ in range(2)]
        buffers = [memory_of(torch.zeros(layout.shapes[0], dtype=torch.uint8)) for _ in range(2)]
        task = serde.submit_serialize(sources, buffers, [KEY, KEY])
        assert finished(serde, serde.get_serialize_event_fd(), serde.query_serialize_result, task)
        assert [buffer.get_size() for buffer in buffers] == [layout.shapes[0].numel()] * 2
        task = serde.submit_deserialize(buffers, backs, [KEY, KEY])
        assert finished(serde, serde.get_deserialize_event_fd(), serde.query_deserialize_result, task)
        assert rel_mse(x, backs[0].tensor) < 0.01
        assert rel_mse(-x, backs[1].tensor) < 0.01
    finally:
        serde.close()
        adapter.close()


def test_a_request_does_not_wait_for_what_is_being_stored(chunks: ChunkCodec) -> None:
    released = threading.Event()

    class Slow(plug_in.PQSerializer):
        def serialize(self, src: Any, dst: Any, key: Any) -> int:
            assert released.wait(60)
            return super().serialize(src, dst, key)

    serde = plug_in.PQProcessor(Slow(chunks), plug_in.PQDeserializer(chunks), 1)
    x = gaussian(*SHAPES[0]).half()
    stored, back = memory_of(torch.from_numpy(chunks.encode(x, plug_in.object_name(KEY)))), memory_of(torch.zeros_like(x))
    buffer = memory_of(torch.zeros(chunks.size(x.shape, x.dtype), dtype=torch.uint8))
    store = serde.submit_serialize([memory_of(x)], [buffer], [KEY])
    load = serde.submit_deserialize([stored], [back], [KEY])
    assert finished(serde, serde.get_deserialize_event_fd(), serde.query_deserialize_result, load)
    assert serde.query_serialize_result(store) is None
    released.set()
    assert finished(serde, serde.get_serialize_event_fd(), serde.query_serialize_result, store)
    serde.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [({}, "not given"), ({**OPTIONS, "max_workers": 0}, "max_workers"), ({**OPTIONS, "typo": 1}, "option 'typo' is unknown")],
)
def test_a_wrong_configuration_ends_the_start(tmp_path: Any, options: dict[str, Any], words: str) -> None:
    adapter = made(tmp_path)
    with pytest.raises(ValueError, match=words):
        create_serde_processor(SerdeConfig("pqcodec", options))
    adapter.close()


def test_latents_go_through_memory_objects(tmp_path: Any) -> None:
    adapter, config = made(tmp_path / "objects"), tmp_path / "config.json"
    said = {"model_type": "deepseek_v3", "num_attention_heads": 8, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    config.write_text(json.dumps(said | {"rope_theta": 10000}))
    options = {"model": str(config), "preset": "pq4"}
    serde = create_serde_processor(SerdeConfig("pqcodec", options))
    x = gaussian(1, 3, 20, 576).bfloat16()  # KV_MLA_FMT
    chunks = ChunkCodec.from_json(options)
    size = plug_in.PQSerializer(chunks).estimate_serialized_size(MemoryLayoutDesc([x.shape], [x.dtype]))
    buffer, back = memory_of(torch.zeros(size, dtype=torch.uint8)), memory_of(torch.zeros_like(x))
    for submit, source, target, descriptor, query in (
        (serde.submit_serialize, x, buffer, serde.get_serialize_event_fd, serde.query_serialize_result),
        (serde.submit_deserialize, buffer, back, serde.get_deserialize_event_fd, serde.query_deserialize_result),
    ):
        task = submit([memory_of(source) if source is x else source], [target], [KEY])
        assert finished(serde, descriptor(), query, task)
    assert rel_mse(x, back.tensor) < 0.01
    serde.close()
    adapter.close()


def test_a_model_that_tells_too_little_ends_the_start(tmp_path: Any) -> None:
    adapter, config = made(tmp_path / "objects"), tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "deepseek_v3", "num_attention_heads": 8, "kv_lora_rank": 512}))
    with pytest.raises(ValueError, match="kv_lora_rank 512 and qk_rope_head_dim None"):
        create_serde_processor(SerdeConfig("pqcodec", {"model": str(config)}))
    adapter.close()


@pytest.mark.parametrize(
    ("shapes", "dtype", "words"),
    [
        ([SHAPES[0]], torch.float8_e4m3fn, "a chunk holds float8_e4m3fn; only float16, bfloat16, float32"),
        ([SHAPES[0]], torch.uint8, "a chunk holds uint8; only"),
        ([(1, 3, 20, 576)], torch.bfloat16, r"a chunk has shape \(1, 3, 20, 576\), which is not"),  # latents of MLA
        ([SHAPES[0], SHAPES[1]], torch.bfloat16, "an object holds 2 tensors"),
    ],
    ids=["fp8", "packed", "latents", "several"],
)
def test_objects_that_hold_something_else_are_refused_by_name_before_they_are_stored(
    chunks: ChunkCodec, shapes: list[tuple[int, ...]], dtype: torch.dtype, words: str
) -> None:
    layout = MemoryLayoutDesc([torch.Size(shape) for shape in shapes], [dtype] * len(shapes))
    with pytest.raises(InvalidArgument, match=words):
        plug_in.PQSerializer(chunks).estimate_serialized_size(layout)


def test_an_adapter_without_a_type_is_refused(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="'type' is missing"):
        made(tmp_path, type=None)
    assert "fs" in plug_in.PQCodecL2AdapterConfig.help()
