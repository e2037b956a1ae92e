"""What a connector sees of vLLM, without vLLM: its modules' few names, and an engine whose numbers follow from its tokens."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from conftest import DEVICE

BASE = "vllm.distributed.kv_transfer.kv_connector.v1.base"
PLUG_IN = "pqcodec.formats.engines.vllm"
LAYERS, HEADS, DIM, BLOCK, BLOCKS = 3, 2, 64, 16, 250


class KVConnectorRole(Enum):
    SCHEDULER = 0
    WORKER = 1


class KVConnectorMetadata:
    pass


class KVConnectorBase_V1:  # noqa: N801 - vLLM's name
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        self._vllm_config, self._role, self._kv_cache_config = vllm_config, role, kv_cache_config

    def bind_connector_metadata(self, metadata: KVConnectorMetadata) -> None:
        self._metadata = metadata

    def _get_connector_metadata(self) -> KVConnectorMetadata:
        return self._metadata


@contextmanager
def plug_in() -> Iterator[Any]:
    """The connector's module, imported beside modules that stand for vLLM's; all of them are gone afterwards."""
    names = [".".join(BASE.split(".")[:count]) for count in range(1, 1 + len(BASE.split(".")))]
    fakes = {name: ModuleType(name) for name in [*names, "vllm.logger"]}
    fakes["vllm"].__dict__["__version__"] = "0.32.0"
    fakes["vllm.logger"].__dict__["init_logger"] = logging.getLogger
    fakes[BASE].__dict__.update({kind.__name__: kind for kind in (KVConnectorRole, KVConnectorMetadata, KVConnectorBase_V1)})
    before = {name: sys.modules.pop(name, None) for name in [*fakes, PLUG_IN]}
    sys.modules.update(fakes)
    try:
        yield importlib.import_module(PLUG_IN)
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


# -- how an attention backend keeps a block ------------------------------------------------------------------------
def side_by_side(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [blocks, heads, block, dim] as GPUs have them: those of a token follow each other."""
    keys, values = cache.split(DIM, dim=-1)
    return keys, values


def one_after_another(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As CPUs have them: all keys of a block, then all values."""
    keys, values = cache.view(*cache.shape[:2], 2 * cache.shape[2], DIM).chunk(2, dim=2)
    return keys, values


def keys_turned(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As kernels for vectors have them: the tokens of a channel follow each other."""
    keys, values = one_after_another(cache)
    return keys.reshape(*keys.shape).view(*keys.shape[:2], DIM, -1).transpose(2, 3), values


ARRANGEMENTS = (side_by_side, one_after_another, keys_turned)


@dataclass
class Layer:
    """A layer of attention, whose ``impl`` is itself."""

    arranged: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

    @property
    def impl(self) -> Layer:
        return self

    def do_kv_cache_update(
        self, layer: Any, keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor
    ) -> None:
        size = cache.shape[2]
        if self.arranged is keys_turned:
            keys_at = cache.view(*cache.shape[:2], 2 * size, DIM)[:, :, :size].view(*cache.shape[:2], DIM, size)
            cache.view(*cache.shape[:2], 2 * size, DIM)[slots // size, :, size + slots % size] = values
            for token, slot in enumerate(slots.tolist()):
                keys_at[slot // size, :, :, slot % size] = keys[token]
            return
        for at, x in zip(self.arranged(cache), (keys, values), strict=True):
            at[slots // size, :, slots % size] = x


# -- an engine -----------------------------------------------------------------------------------------------------
@dataclass
class Request:
    """A request as far as a connector looks at it."""

    request_id: str
    prompt_token_ids: list[int] | None
    cache_salt: str | None = None
    lora_request: Any = None
    mm_features: tuple[Any, ...] = ()
    prompt_embeds: Any = None
    prompt_is_token_ids: Any = None
    pooling_params: Any = None
    resumable: bool = False
    skip_reading_prefix_cache: bool = False

    @property
    def all_token_ids(self) -> list[int]:
        return list(self.prompt_token_ids or [])

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    num_prompt_tokens = num_tokens


def config_of(folder: Path, extra: dict[str, Any], *, role: str = "kv_both", block: int = BLOCK, **changes: Any) -> Any:
    """VllmConfig and KVCacheConfig of a model in a folder; ``changes`` by the name of what has them."""

    class FullAttentionSpec(SimpleNamespace):
        pass

    text = {"model_type": "llama", "rope_theta": 10000.0, "num_hidden_layers": LAYERS}
    spec = {"block_size": block, "num_kv_heads": HEADS, "head_size": DIM, "head_size_v": DIM, "dtype": torch.bfloat16}
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(LAYERS)]
    model = {"model": str(folder), "dtype": torch.bfloat16, "quantization": None, "model_impl": "auto", "hf_overrides": {}}
    config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config=extra,
            is_kv_consumer=role != "kv_producer",
            is_kv_producer=role != "kv_consumer",
        ),
        parallel_config=SimpleNamespace(**{"tensor_parallel_size": 1, **changes.get("parallel", {})}),
        cache_config=SimpleNamespace(cache_dtype=changes.get("cache_dtype", "auto")),
        load_config=SimpleNamespace(load_format=changes.get("load_format", "auto")),
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(to_dict=lambda: text),
            hf_text_config=SimpleNamespace(to_dict=lambda: text, num_hidden_layers=LAYERS),
            max_model_len=2048,
            **{**model, **changes.get("model", {})},
        ),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    kind = type(changes.get("kind", "FullAttentionSpec"), (FullAttentionSpec,), {})
    group = SimpleNamespace(layer_names=changes.get("names", names), kv_cache_spec=kind(**{**spec, **changes.get("spec", {})}))
    caches = SimpleNamespace(kv_cache_groups=[group] * changes.get("groups", 1), num_blocks=BLOCKS)
    return config, caches


def numbers_of(ids: list[int], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [tokens, heads, dim] of a layer, those of each token from all tokens up to it."""
    running = torch.tensor(ids, dtype=torch.float64).cumsum(0) % 997
    waves = torch.arange(1, HEADS * DIM + 1, dtype=torch.float64) * (0.37 + layer)
    keys = torch.sin(running[:, None] * waves).view(-1, HEADS, DIM).bfloat16()
    return keys, (0.5 * torch.cos(running[:, None] * waves)).view(-1, HEADS, DIM).bfloat16()


@dataclass
class Engine:
    """An engine of one process with both sides of the connector, and ``split`` kernels' blocks in each of its own."""

    module: Any
    config: Any
    caches: Any
    arranged: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = side_by_side
    split: int = 1
    free: list[int] = field(default_factory=lambda: list(range(BLOCKS - 1, 0, -1)))

    def __post_init__(self) -> None:
        self.block = self.caches.kv_cache_groups[0].kv_cache_spec.block_size
        names = self.caches.kv_cache_groups[0].layer_names
        size = self.block // self.split
        self.layers = {name: Layer(self.arranged) for name in names}
        self.kv = {
            name: torch.zeros(BLOCKS * self.split, HEADS, size, 2 * DIM, dtype=torch.bfloat16, device=DEVICE) for name in names
        }
        self.config.compilation_config.static_forward_context.update(self.layers)
        make = self.module.PQCodecConnector
        self.scheduler, self.worker = (make(self.config, role, self.caches) for role in KVConnectorRole)
        self.worker.register_kv_caches(self.kv)
        self.tables: dict[str, list[int]] = {}

    def admit(self, request: Request, computed: int = 0, table: list[int] | None = None) -> int:
        """Begin a request of which ``computed`` tokens are in the blocks of ``table`` already; returns tokens to be loaded."""
        found, later = self.scheduler.get_num_new_matched_tokens(request, computed)
        assert not later
        table = list(table or ())
        table += [self.free.pop() for _ in range(-(-request.num_tokens // self.block) - len(table))]
        self.tables[request.request_id] = table
        self.scheduler.update_state_after_alloc(request, None, found)
        return found

    def step(self, request: Request, computed: int, scheduled: int, fault: Exception | None = None) -> set[int]:
        """One step of one request, whose tokens are computed; returns the blocks that could not be loaded."""
        name = request.request_id
        table = self.tables[name]
        output = SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=name, num_computed_tokens=computed)],
            scheduled_cached_reqs=SimpleNamespace(req_ids=[], num_computed_tokens=[]),
            num_scheduled_tokens={name: scheduled},
            kv_connector_block_state=SimpleNamespace(get_block_ids=lambda _: (table,)),
        )
        self.worker.bind_connector_metadata(self.scheduler.build_connector_meta(output))
        self.worker.start_load_kv(None)
        try:
            if fault:
                raise fault
            self.compute(request, computed, computed + scheduled)
        finally:
            self.worker.wait_for_save()
        return self.worker.get_block_ids_with_load_errors()

    def compute(self, request: Request, first: int, last: int) -> None:
        tokens = torch.arange(first, last)
        slots = torch.tensor(self.tables[request.request_id])[tokens // self.block] * self.block + tokens % self.block
        for number, (name, layer) in enumerate(self.layers.items()):
            keys, values = (x[first:last].to(DEVICE) for x in numbers_of(request.all_token_ids, number))
            layer.do_kv_cache_update(layer, keys, values, self.kv[name], slots.to(DEVICE))

    def serve(self, request: Request, chunk: int = 1 << 20) -> int:
        """All steps of a request's prompt, then its end; returns how many of its tokens were loaded."""
        computed = found = self.admit(request)
        while computed < request.num_tokens:
            scheduled = min(chunk, request.num_tokens - computed)
            assert not self.step(request, computed, scheduled)
            computed += scheduled
        self.scheduler.request_finished(request, [])
        self.worker._working._saver.submit(int).result()  # what the thread has to write is written
        return found

    def error(self, request: Request, tokens: int) -> float:
        """The relative error of the first ``tokens`` tokens in the engine's cache, all layers together."""
        positions = torch.arange(tokens)
        size = self.block // self.split
        slots = torch.tensor(self.tables[request.request_id])[positions // self.block] * self.block + positions % self.block
        wrong = norm = 0.0
        for number, name in enumerate(self.layers):
            for at, x in zip(self.arranged(self.kv[name].cpu()), numbers_of(request.all_token_ids, number), strict=True):
                truth = x[:tokens].double()
                wrong += float((at[slots // size, :, slots % size].double() - truth).square().sum())
                norm += float(truth.square().sum())
        return wrong / norm

    def close(self) -> None:
        """As vLLM ends: all that is under way is written."""
        self.worker.shutdown()
        self.scheduler.shutdown()
