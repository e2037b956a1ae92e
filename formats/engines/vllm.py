"""Law: vLLM (0.32) finds prefixes in a store of pqcodec's and stores its prompts there, without another program between.

The scheduler's side looks prompts up. What it promises is in its memory, every byte checked (``EngineStore``), and goes to the
worker's side with the step: no request is scheduled for keys and values that do not come. The worker's side decodes them for
the engine's own writer. Of what a step has computed it copies whole blocks, which a thread encodes and writes.
"""

from __future__ import annotations

import json
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.logger import init_logger

from pqcodec.codings.presets import DEFAULT_PRESET
from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.formats.engines.chunks import given_rope, refuse_unknown
from pqcodec.formats.engines.model_config import config_rope
from pqcodec.formats.engines.paged_layers import PagedLayers
from pqcodec.formats.engines.vllm_settings import identity_of, shape_of
from pqcodec.formats.store.engine_store import EngineStore, HeldBlock, NewBlock, engine_settings
from pqcodec.formats.store.keys import BLOCK_TOKENS, Chain

_KNOWN = "0.32."  # how the releases of vLLM begin whose caches and scheduler this module knows
_OPTIONS = ("store", "data", "preset", "max_bytes", "max_age", "tenant", "shared", "rope", "weights")
_STORE = ("data", "preset", "max_bytes", "max_age", "shared")
_PENDING_BYTES = 1 << 30  # of copied blocks that wait to be written; further ones are not stored
logger = init_logger("vllm.pqcodec")  # below vLLM's own, which has a handler


@dataclass(frozen=True)
class Load:
    """Tokens ``first`` to ``last`` - 1 of a request, whose numbers are in ``held``, and its block table."""

    table: list[int]
    first: int
    last: int
    held: list[HeldBlock]


@dataclass(frozen=True)
class Save:
    """Blocks of a prompt that a step completes, and the block table of its request."""

    table: list[int]
    new: list[NewBlock]


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vLLM's classes have no types
    """What the worker's side does in one step."""

    loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)


# -- the scheduler's side ------------------------------------------------------------------------------------------
@dataclass
class _Prompt:
    """What is known of a request."""

    chain: Chain
    request: Any
    asked: tuple[int, int] | None = None  # tokens that vLLM had, and all tokens, when the store was asked
    held: list[HeldBlock] = field(default_factory=list)
    stored: int = 0  # tokens that are in the store, or on their way
    load: tuple[int, int] | None = None  # tokens that the next step loads


class Scheduling:
    """Which tokens of which request are loaded and stored, step by step.

    ``block``: tokens of a block of vLLM's; ``settings``: of the roots; ``finds``, ``stores``: whether it does.
    """

    def __init__(
        self, store: EngineStore, block: int, settings: dict[str, Any], tenant: str, *, finds: bool, stores: bool
    ) -> None:
        self._store, self._block, self._settings, self._tenant = store, block, settings, tenant
        self._finds, self._stores = finds, stores
        self._prompts: dict[str, _Prompt] = {}
        self._resets = 0

    def matched(self, request: Any, computed: int) -> int:
        """Tokens behind the first ``computed`` ones of a request that are in this process's memory, to be loaded."""
        prompt = self._prompt(request)
        if prompt is None:
            return 0
        tokens = request.num_tokens
        if prompt.asked != (computed, tokens):
            prompt.asked, prompt.held = (computed, tokens), []
            if self._finds and not request.skip_reading_prefix_cache and self._most(tokens) > computed:
                found, prompt.held = self._store.find(prompt.chain, _ids(request, tokens), computed)
                prompt.stored = max(prompt.stored, found)
        end = prompt.held[-1].row.end if prompt.held else 0
        return max(min(end, self._most(tokens)) // self._block * self._block - computed, 0)

    def _most(self, tokens: int) -> int:
        """The most tokens of a request that may be loaded: whole blocks of vLLM's, and never the last token."""
        return (tokens - 1) // self._block * self._block

    def allocated(self, request: Any, external: int) -> None:
        """A request has blocks for ``external`` tokens of those that ``matched`` promised; 0: it does not load them."""
        prompt = self._prompts.get(request.request_id)
        if prompt is None or prompt.asked is None:
            return
        first = prompt.asked[0]
        prompt.load = (first, first + external) if external else None
        prompt.asked = None
        if not external:
            prompt.held = []

    def step(self, output: Any) -> StepMetadata:
        """What the worker's side does in the step that vLLM's SchedulerOutput describes."""
        told = StepMetadata()
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name, scheduled in output.num_scheduled_tokens.items():
            prompt = self._prompts.get(name)
            if prompt is None:
                continue
            whole = min(computed[name] + scheduled, prompt.request.num_prompt_tokens) // BLOCK_TOKENS * BLOCK_TOKENS
            new: list[NewBlock] = []
            if self._stores and whole > prompt.stored:
                new = self._store.missing(prompt.chain, _ids(prompt.request, whole), prompt.stored)
                prompt.stored = whole
            if prompt.load is None and not new:
                continue
            (table,) = output.kv_connector_block_state.get_block_ids(name)
            if prompt.load is not None:
                told.loads.append(Load(list(table), *prompt.load, prompt.held))
                prompt.load, prompt.held = None, []
            if new:
                told.saves.append(Save(list(table), new))
        return told

    def finished(self, request: Any) -> None:
        """A request has ended."""
        self._prompts.pop(request.request_id, None)

    def reset(self) -> None:
        """Find nothing any more of what was stored before: the weights may be others now, and no file tells which."""
        self._resets += 1
        self._settings = {**self._settings, "extra": f"reset {self._resets} of {id(self)} at {np.datetime64('now')}"}
        self._prompts.clear()

    def _prompt(self, request: Any) -> _Prompt | None:
        """What is known of a request; None for one whose keys and values depend on more than its tokens."""
        found = self._prompts.get(request.request_id)
        plain = request.prompt_token_ids is not None and request.prompt_embeds is None and request.prompt_is_token_ids is None
        if request.lora_request is not None or request.mm_features or request.pooling_params is not None or request.resumable:
            plain = False
        if found is None and plain:
            salt = request.cache_salt or ""
            tenant = json.dumps([self._tenant, salt]) if self._tenant or salt else ""
            found = self._prompts[request.request_id] = _Prompt(Chain(self._settings, tenant), request)
        return found if plain else None


def _ids(request: Any, tokens: int) -> np.ndarray:
    return np.array(request.all_token_ids[:tokens], "<i8")


# -- the worker's side ---------------------------------------------------------------------------------------------
class Working:
    """Loads into, and copies out of, an engine's cache; a thread encodes and writes what was copied."""

    def __init__(self, store: EngineStore, layers: PagedLayers, count: int, block: int) -> None:
        self._store, self._layers, self._count, self._block = store, layers, count, block
        self._saver = ThreadPoolExecutor(1, thread_name_prefix="pqcodec-save")
        self._lock = threading.Lock()
        self._pending = 0  # bytes of copies that wait
        self._unsure = False  # a load failed, so that what is computed on top of it may be wrong

    def load(self, loads: Sequence[Load]) -> set[int]:
        """Fill blocks of the engine's cache; returns those that could not be filled, for vLLM to deal with.

        Blocks were checked before they were promised: what fails here is memory, or a fault of this program. As it is not
        known what the engine computes from such blocks before it hears of them, nothing is stored any more.
        """
        failed: set[int] = set()
        for load in loads:
            try:
                for held in load.held:
                    self._fill(load, held)
            except Exception as error:
                failed |= set(load.table[load.first // self._block : load.last // self._block])
                self._unsure = True
                logger.exception("pqcodec: checked blocks could not be loaded (%s); nothing is stored until a restart", error)
        return failed

    def _fill(self, load: Load, held: HeldBlock) -> None:
        start = held.row.start
        first, last = max(load.first, start), min(load.last, held.row.end)
        if first >= last:
            return
        keys, values = self._store.decode(held, None if self._layers.device.type == "cpu" else self._layers.device)
        for layer in range(self._count):
            pair = (x[layer][:, first - start : last - start] for x in (keys, values))
            self._layers.write(layer, load.table, first, *pair)

    def save(self, saves: Sequence[Save]) -> None:
        """Copy new blocks, and have them written; none where the step has failed."""
        if not saves or self._unsure or sys.exc_info()[0] is not None:  # vLLM calls this in a "finally", too
            return
        for save in saves:
            for new in save.new:
                pairs = [self._layers.read(layer, save.table, new.row.start, BLOCK_TOKENS) for layer in range(self._count)]
                copies = [tuple(x.cpu() for x in pair) for pair in pairs]
                size = sum(x.nbytes for pair in copies for x in pair)
                with self._lock:
                    if self._pending + size > _PENDING_BYTES:
                        text = f"{self._pending} bytes of blocks wait to be stored; those of a prompt are left out"
                        warnings.warn(text, RuntimeWarning, stacklevel=2)
                        break
                    self._pending += size
                self._saver.submit(self._write, new, copies, size)

    def _write(self, new: NewBlock, pairs: Sequence[Any], size: int) -> None:
        try:
            self._store.write(new, [keys for keys, _ in pairs], [values for _, values in pairs])
        except (OSError, CorruptStream) as error:
            self._store.fail("stored", error)
        except Exception as error:  # nobody reads the future's
            text = f"a block of a prompt (tokens {new.row.start} to {new.row.end - 1}) cannot be stored: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        finally:
            with self._lock:
                self._pending -= size

    def close(self) -> None:
        """Wait until all is written."""
        self._saver.shutdown()


# -- the connector -------------------------------------------------------------------------------------------------
class PQCodecConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """vLLM's connector: ``kv_connector="PQCodecConnector"``, ``kv_connector_module_path="pqcodec.formats.engines.vllm"``.

    ``kv_connector_extra_config``: ``store``, a folder or an address of Redis; ``data``, ``preset``, ``max_bytes``, ``max_age``,
    ``tenant`` and ``shared`` as of ``PrefixStore``; ``rope``, the model's RoPE where its config.json does not tell: "none" or
    an object of theta, dim, style, frequencies; ``weights``, a word that stands for the model's weights where they are not in a
    local folder. Raises InvalidArgument (a ValueError) for what cannot be served, and OSError; either ends vLLM's start.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        if not vllm.__version__.startswith(_KNOWN):
            raise InvalidArgument(f"vLLM is {vllm.__version__}; pqcodec's connector knows {_KNOWN}x")
        transfer = vllm_config.kv_transfer_config
        options = dict(transfer.kv_connector_extra_config)
        refuse_unknown("kv_connector_extra_config's member", options, _OPTIONS)
        if not isinstance(options.get("store"), str):
            raise InvalidArgument(f"store is {options.get('store')!r}; a folder, or an address of Redis, is expected")
        if "tenant" in options and (not isinstance(options["tenant"], str) or not options["tenant"]):
            raise InvalidArgument("tenant: a string is expected, a long random one; without it nobody is kept apart")
        self._shape, self._block, self._names = shape_of(vllm_config, kv_cache_config)
        text = vllm_config.model_config.hf_text_config.to_dict()
        rope = given_rope(options["rope"]) if "rope" in options else config_rope(text, self._shape.head_dim)
        known = {name: options[name] for name in _STORE if name in options}
        label = str(text.get("model_type", "model"))
        self._scheduling: Scheduling | None = None
        self._working: Working | None = None
        self._failed: set[int] = set()
        identity: dict[str, Any] = {}
        if role == KVConnectorRole.SCHEDULER:
            identity = identity_of(vllm_config, vllm.__version__, options.get("weights"), "rope" in options)
        self._store = EngineStore(options["store"], self._shape, rope=rope, label=label, **known)
        if role == KVConnectorRole.SCHEDULER:
            settings = engine_settings(identity, str(options.get("preset", DEFAULT_PRESET)))
            roles = {"finds": transfer.is_kv_consumer, "stores": transfer.is_kv_producer}
            self._scheduling = Scheduling(self._store, self._block, settings, options.get("tenant", ""), **roles)
            logger.info("pqcodec: prefixes in %s, of %s", self._store.shelf.place, settings)

    # -- the scheduler's side ------------------------------------------------------------------------------------
    @property
    def requires_kv_delivery(self) -> bool:
        """False: what is not stored is computed again."""
        return False

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Tokens that can be loaded behind the first ``num_computed_tokens``, and False: they are loaded with the step."""
        assert self._scheduling is not None
        return self._scheduling.matched(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """vLLM has blocks for the tokens to be loaded."""
        assert self._scheduling is not None
        self._scheduling.allocated(request, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        """What the worker's side does in a step."""
        assert self._scheduling is not None
        return self._scheduling.step(scheduler_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, None]:
        """A request has ended; its blocks are free, for what is stored of them was copied."""
        assert self._scheduling is not None
        self._scheduling.finished(request)
        return False, None

    def reset_cache(self) -> bool:
        """Find nothing any more of what was stored before."""
        if self._scheduling is not None:
            self._scheduling.reset()
        return True

    # -- the worker's side ---------------------------------------------------------------------------------------
    def register_kv_caches(self, kv_caches: Mapping[str, Any]) -> None:
        """Find out how the caches are arranged, and compile the kernels; raises InvalidArgument."""
        layers = self._vllm_config.compilation_config.static_forward_context
        writers = [partial(_written, layers[name]) for name in self._names]
        caches = [kv_caches[name] for name in self._names]
        blocks = self._kv_cache_config.num_blocks
        paged = PagedLayers(caches, writers, self._shape, blocks=blocks, block=self._block)
        self._working = Working(self._store, paged, self._shape.layers, self._block)
        logger.info("pqcodec: compiling kernels, once for this machine (up to a minute)")
        self._store.warm()

    def start_load_kv(self, forward_context: Any, **_: Any) -> None:
        """Load what the scheduler's side promised, all layers before the step's forward."""
        metadata = self._get_connector_metadata()
        if self._working is not None and metadata.loads:
            self._failed |= self._working.load(metadata.loads)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: all layers are loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **_: Any) -> None:
        """Nothing: a block is of all layers."""

    def wait_for_save(self) -> None:
        """Copy the blocks that the step has completed; they are written later."""
        if self._working is not None:
            self._working.save(self._get_connector_metadata().saves)

    def get_block_ids_with_load_errors(self) -> set[int]:
        """The blocks that could not be loaded since this was asked last."""
        failed, self._failed = self._failed, set()
        return failed

    def shutdown(self) -> None:
        """Wait until all is written, and close the store."""
        if self._working is not None:
            self._working.close()
        self._store.close()


def _written(layer: Any, keys: Any, values: Any, cache: Any, slots: Any) -> None:
    """Keys and values [tokens, heads, dim], put into a layer's cache by vLLM's own kernel."""
    layer.impl.do_kv_cache_update(layer, keys, values, cache, slots)
