"""Law: what LMCache's objects cost, by serde: bytes, milliseconds, error, and what a model reads out of them.

``make bench-lmcache`` runs it in LMCache's own environment. Every serde of LMCache 0.5.6, one from PyPI and pqcodec's store and
retrieve the same chunks, through LMCache's storage manager, which its server is made of. SmolLM2's chunks say what a model's
next tokens lose, beside the same cache in a file of ours; chunks of random numbers in an 8B Llama's shape say bytes and times,
from memory and over one link of 1 GB/s, LMCache's own throttled store whose loads wait for each other. Writes
results/lmcache_serdes.json.

naive: no serde. turboquant: LMCache's, which runs on CUDA alone. cachegen: of LMCache's older interface, with sizes that vary,
which its storage manager does not take; it is called directly. tqai: PyPI's lmcache-turbo-quant-serde, which knows neither the
key that LMCache hands over since 0.5 nor the exact size that stores ask for; it is given both, and nothing else is changed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

os.environ["LMCACHE_TRACK_USAGE"] = "false"  # all are read when lmcache or transformers are imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("LMCACHE_LOG_LEVEL", "CRITICAL")

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import model as lm
from benchmarks import results_file
from benchmarks.fidelity.reading import Window, windows_of
from pqcodec.formats import load_cache, save_cache

CHUNK = 256  # tokens, LMCache's default
WINDOWS, PREFIX, SCORED = 3, 1024, 256  # of each text
TEXTS = ("prose", "chat")
SHAPE, DIM = (1, 32, CHUNK, 8 * 2 * 128), 128  # a chunk of an 8B Llama: 32 layers, 8 heads of keys and values
CHUNKS, ROUNDS, SLOW_ROUNDS = 4, 7, 1
LINK = 1.0  # GB/s, of the throttled store
FREE = 1e6  # GB/s, of the store in memory
PATIENCE = 120  # seconds
DTYPE = torch.bfloat16
MAIN = "quad3"  # the default preset
PRESETS = (MAIN, "pq3", "pq4")
TURBOQUANT = "turboquant_3bit_nc"  # of LMCache's, the least bits
SERDES: dict[str, dict[str, Any] | None] = {
    "naive": None,
    "fp8": {"type": "fp8"},
    "turboquant": {"type": "turboquant", "preset": TURBOQUANT},
    "tqai 4": {"type": "tqai", "bits": 4},
    "tqai 3": {"type": "tqai", "bits": 3},
    **{preset: {"type": "pqcodec", "preset": preset} for preset in PRESETS},
}
SLOW = ("tqai 3", "tqai 4")
OVER_LINK = (("times", "naive_over_ours_1gb_s"), ("times", "naive_over_pq3_1gb_s"))
PLUG_IN = {"type": "plugin", "module_path": "pqcodec.formats.engines.lmcache", "class_name": "PQCodecL2Adapter"}
console = Console()


@dataclass
class Model:
    """What a serde is told of a model, in the words of pqcodec's."""

    head_dim: int
    kv_heads: int
    rope: dict[str, Any] = field(default_factory=lambda: {"theta": 500000.0})

    def serde(self, name: str) -> dict[str, Any] | None:
        """The serde's part of an adapter's JSON."""
        chosen = SERDES[name]
        if chosen is None or chosen["type"] == "fp8":
            return chosen
        known = {"head_dim": self.head_dim}
        return chosen | known | ({"kv_heads": self.kv_heads, "rope": self.rope} if chosen["type"] == "pqcodec" else {})

    def adapter(self, name: str, link: float) -> str:
        """The JSON of LMCache's command line for its store in memory that lets ``link`` GB/s through."""
        store = {"type": "link", "max_size_gb": 4, "mock_bandwidth_gb": link * 1e9 / 2**30}
        serde = self.serde(name)
        if serde is None:
            return json.dumps(store)
        if serde["type"] == "pqcodec":
            return json.dumps({**PLUG_IN, "adapter_params": store, "serde": serde})
        return json.dumps({**store, "serde": serde})


# -- LMCache's storage manager -------------------------------------------------------------------------------------
class Storage:
    """A storage manager with one adapter: chunks are stored in it, and retrieved from behind its own memory."""

    def __init__(self, adapter: str) -> None:
        from lmcache.v1.distributed.config import add_storage_manager_args, parse_args_to_config
        from lmcache.v1.distributed.storage_manager import StorageManager

        parser = argparse.ArgumentParser()
        add_storage_manager_args(parser)
        given = ["--l1-size-gb", "2", "--eviction-policy", "LRU", "--l2-adapter", adapter]
        self._manager = StorageManager(parse_args_to_config(parser.parse_args(given)))
        self._told = _listener()
        self._manager.register_l2_listener(self._told)

    def close(self) -> None:
        self._manager.close()

    def store(self, first: int, chunks: list[torch.Tensor]) -> tuple[float, int]:
        """Seconds until all are in the store, and the bytes of one there; raises RuntimeError."""
        keys = _keys(first, len(chunks))
        self._told.expect(len(chunks))
        reserved = self._manager.reserve_write(keys, _layout(chunks[0]))
        for key, chunk in zip(keys, chunks, strict=True):
            reserved[key].tensor.copy_(chunk)
        start = time.perf_counter()
        self._manager.finish_write(keys)
        if not self._told.all.wait(PATIENCE):
            raise RuntimeError("nothing was stored")
        spent = time.perf_counter() - start
        self._forget()
        return spent, self._told.bytes // len(chunks)

    def retrieve(self, first: int, like: torch.Tensor, count: int) -> tuple[float, list[torch.Tensor]]:
        """Seconds until all are in LMCache's memory, and copies of them; raises RuntimeError."""
        from lmcache.v1.distributed.api import GroupedObjectKeys, PrefetchTaskSpec

        keys = _keys(first, count)
        row = GroupedObjectKeys(keys=keys, object_group_id=0, layout_desc=_layout(like))
        start = time.perf_counter()
        handle = self._manager.submit_prefetch_task(PrefetchTaskSpec(key_groups=[row]))
        done = self._manager.wait_prefetch_status(handle, PATIENCE)
        spent = time.perf_counter() - start
        result = self._manager.query_prefetch_status(handle) if done else None
        if result is None or not all(result.hit_cells[0].test(number) for number in range(count)):
            raise RuntimeError("not all that was stored was found")
        with self._manager.read_prefetched_results(keys, result.l1_owners) as objects:
            found = [memory.tensor.clone() for memory in objects]
        self._manager.finish_read_prefetched(keys, 1, result.l1_owners)
        self._forget()
        return spent, found

    def _forget(self) -> None:
        """Leave nothing in LMCache's own memory, once what it still holds on to is free."""
        for _ in range(200):
            self._manager.clear()
            if not self._manager.get_l1_usage()[0]:
                return
            time.sleep(0.005)
        raise RuntimeError("LMCache keeps chunks in its memory, which would be retrieved from there")


def _listener() -> Any:
    import threading

    from lmcache.v1.distributed.internal_api import L2AdapterListener

    class Told(L2AdapterListener):
        """Knows when an adapter has stored as many objects as are expected, and their bytes."""

        def expect(self, count: int) -> None:
            self.missing, self.bytes, self.all = count, 0, threading.Event()

        def on_l2_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
            self.missing -= len(keys)
            self.bytes += sum(sizes)
            if self.missing <= 0:
                self.all.set()

        def on_l2_keys_accessed(self, keys: list[Any]) -> None: ...

        def on_l2_keys_deleted(self, keys: list[Any]) -> None: ...

    return Told()


def _keys(first: int, count: int) -> list[Any]:
    from lmcache.v1.distributed.api import ObjectKey

    return [ObjectKey(number.to_bytes(16, "big"), "a/model", 0) for number in range(first, first + count)]


def _layout(chunk: torch.Tensor) -> Any:
    from lmcache.v1.distributed.api import MemoryLayoutDesc

    return MemoryLayoutDesc([chunk.shape], [chunk.dtype])


@contextmanager
def storage(adapter: str) -> Iterator[Storage]:
    opened = Storage(adapter)
    try:
        yield opened
    finally:
        opened.close()


def register_link() -> None:
    """LMCache's store in memory as one link that all its loads share: they would else have the link's speed each."""
    import asyncio

    from lmcache.v1.distributed.l2_adapters.config import register_l2_adapter_type
    from lmcache.v1.distributed.l2_adapters.factory import register_l2_adapter_factory
    from lmcache.v1.distributed.l2_adapters.mock_l2_adapter import MockL2Adapter, MockL2AdapterConfig

    class LinkConfig(MockL2AdapterConfig):  # LMCache finds an adapter by the class of its configuration
        pass

    class Link(MockL2Adapter):
        def __init__(self, config: Any) -> None:
            self._free = asyncio.Lock()
            super().__init__(config)

        async def _execute_load_in_loop(self, keys: list[Any], objects: list[Any], task_id: int) -> None:
            async with self._free:
                await super()._execute_load_in_loop(keys, objects, task_id)

    register_l2_adapter_type("link", LinkConfig)
    register_l2_adapter_factory("link", lambda config, l1_memory_desc=None: Link(config))


def register_tqai() -> None:
    """PyPI's TurboQuant serde under its own name, given the argument and the size that it lacks."""
    from lmcache.v1.distributed.serde import AsyncSerdeProcessor, register_serde_factory
    from lmcache_turbo_quant_serde import TqaiDeserializer, TqaiSerializer

    class Serializer(TqaiSerializer):
        def serialize(self, src: Any, dst: Any, key: Any) -> int:
            return super().serialize(src, dst)

        def estimate_serialized_size(self, layout_desc: Any) -> int:
            (shape,), (dtype,) = layout_desc.shapes, layout_desc.dtypes
            numbers = shape.numel()
            head = 13 + 1 + 8 * (len(shape) + 1) + 1 + len(str(dtype).removeprefix("torch."))
            return head + 8 + -(-numbers * self.bits // 8) + 8 + 2 * (numbers // self.head_dim)

    class Deserializer(TqaiDeserializer):
        def deserialize(self, src: Any, dst: Any, key: Any) -> None:
            super().deserialize(src, dst)

    def made(options: dict[str, Any]) -> Any:
        return AsyncSerdeProcessor(Serializer(**options), Deserializer(), max_workers=1)

    register_serde_factory("tqai", made)


def turboquant_fails(layers: int, hidden: int, head_dim: int) -> str | None:
    """Why LMCache's own TurboQuant serde cannot take a chunk of its layout here, which it only logs. None where it can."""
    from lmcache.v1.distributed.serde import TurboQuantSerdeConfig, TurboQuantSerializer

    chunk = torch.ones(2, layers, CHUNK, hidden, dtype=DTYPE)
    config = TurboQuantSerdeConfig(preset=TURBOQUANT, head_dim=head_dim)
    try:
        serializer = TurboQuantSerializer(config)
        size = serializer.estimate_serialized_size(_layout(chunk))
        serializer.serialize(memory_of(chunk), memory_of(torch.empty(size, dtype=torch.uint8)), _keys(0, 1)[0])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def failures(about: Model, layers: int) -> dict[str, dict[str, Any]]:
    """Rows of the serdes that are known not to run here."""
    fails = turboquant_fails(layers, about.kv_heads * about.head_dim, about.head_dim)
    return {"turboquant": {"fails": fails}} if fails else {}


def memory_of(x: torch.Tensor) -> Any:
    """A memory object of LMCache's that holds a contiguous tensor."""
    from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

    about = MemoryObjMetadata(x.shape, x.dtype, x.data_ptr(), x.nbytes, 1, fmt=MemoryFormat.KV_2LTD)
    about.shapes, about.dtypes = [x.shape], [x.dtype]
    return TensorMemoryObj(x.flatten().view(torch.uint8) if x.dtype != torch.uint8 else x, about, parent_allocator=None)


# -- what a model makes of it --------------------------------------------------------------------------------------
def chunks_of(layers: lm.Layers) -> list[torch.Tensor]:
    """Chunks [1, layers, CHUNK, heads * 2 * dim] of layers' keys and values [heads, tokens, dim], as vLLM 0.32 has them."""
    pairs = torch.stack([torch.cat(pair, -1).transpose(0, 1) for pair in layers])  # [layers, tokens, heads, 2 * dim]
    return [part.flatten(2).to(DTYPE)[None].contiguous() for part in pairs.split(CHUNK, 1)]


def layers_of(chunks: list[torch.Tensor], heads: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Layers' keys and values [heads, tokens, dim], float32, of chunks."""
    pairs = torch.cat([chunk[0] for chunk in chunks], 1).float()
    layers, tokens, _ = pairs.shape
    keys, values = pairs.view(layers, tokens, heads, 2, -1).permute(3, 0, 2, 1, 4)
    return list(zip(keys, values, strict=True))


class Reader:
    """A model, the windows that it reads, and what it says behind their prefixes when nothing is lost."""

    def __init__(self, model: Any, windows: list[Window]) -> None:
        self.model, self.windows = model, windows
        self.layers = [lm.prefill(model, window.prefix) for window in windows]
        self.exact = [self.logits(number, layers) for number, layers in enumerate(self.layers)]

    def logits(self, number: int, layers: lm.Layers) -> torch.Tensor:
        return lm.continuation_logits(self.model, lm.cache_from(self.model, layers), self.windows[number].fed)

    def judge(self, kept: list[lm.Layers]) -> dict[str, float]:
        """relMSE of keys and values and what ``lm.compare`` tells of the windows' caches; means over windows."""
        scores = [
            lm.compare(self.exact[number], self.logits(number, layers), self.windows[number].following)
            for number, layers in enumerate(kept)
        ]
        told = {name: sum(score[name] for score in scores) / len(scores) for name in ("kl", "top1", "ppl_change")}
        for role, side in (("key", 0), ("value", 1)):
            pairs = [pair for was, now in zip(self.layers, kept, strict=True) for pair in zip(was, now, strict=True)]
            error = sum(float((now[side] - was[side]).double().square().sum()) for was, now in pairs)
            told[f"{role}_rel_mse"] = error / sum(float(was[side].double().square().sum()) for was, _ in pairs)
        return told


def in_a_file(layers: lm.Layers, rope: Any, preset: str) -> tuple[lm.Layers, int]:
    """A cache that went through a file of ours, and the file's bytes."""
    file = io.BytesIO()
    save_cache(file, [(key.to(DTYPE), value.to(DTYPE)) for key, value in layers], preset=preset, rope=rope)
    return [(key.float(), value.float()) for key, value in load_cache(file)], len(file.getvalue())


def cachegen(reader: Reader, chunks: list[list[torch.Tensor]], model: Model, folder: Path) -> tuple[list[lm.Layers], float]:
    """Caches that went through LMCache's cachegen, chunk by chunk, and the bytes of a chunk in the mean; raises as it does."""
    from lmcache.v1.config import LMCacheEngineConfig
    from lmcache.v1.metadata import LMCacheMetadata
    from lmcache.v1.storage_backend.naive_serde import CreateSerde

    layers = chunks[0][0].shape[1]
    shape = (layers, 2, CHUNK, model.kv_heads, model.head_dim)
    metadata = LMCacheMetadata(str(folder), 1, 1, 0, 0, DTYPE, shape, chunk_size=CHUNK)
    serializer, deserializer = CreateSerde("cachegen", metadata, LMCacheEngineConfig.from_defaults(chunk_size=CHUNK))
    kept, sizes = [], []
    for window in chunks:
        found = []
        for chunk in window:
            pairs = chunk[0].view(layers, CHUNK, model.kv_heads, 2, model.head_dim)
            apart = pairs.permute(3, 0, 1, 2, 4).reshape(2, layers, CHUNK, -1).contiguous()
            data = serializer.serialize(memory_of(apart))
            sizes.append(len(data.byte_array))
            back = deserializer.deserialize(data).tensor.view(2, layers, CHUNK, model.kv_heads, model.head_dim)
            found.append(back.permute(1, 2, 3, 0, 4).reshape(chunk.shape))
        kept.append(layers_of(found, model.kv_heads))
    return kept, sum(sizes) / len(sizes)


def fidelity(rounds: int, tick: Callable[[str], None]) -> dict[str, Any]:
    """SmolLM2's chunks through every serde, and through a file of ours: bytes over naive, relMSE, next-token KL.

    ``rounds`` is for times: there is nothing random here.
    """
    _, model, tokenizer = lm.load(lm.SMOLLM2, lm.cache_dir())
    folder = next(lm.cache_dir().glob(f"{Path(lm.GGUF).stem}-*"))
    texts = [lm.token_ids(tokenizer, (Path(__file__).parent / "data" / f"{text}.txt").read_text()) for text in TEXTS]
    counts = [min(WINDOWS, len(ids) // (PREFIX + SCORED + 1)) for ids in texts]
    reader = Reader(
        model,
        [
            window
            for ids, count in zip(texts, counts, strict=True)
            for window in windows_of(ids, lm.opening_ids(tokenizer), count, PREFIX, SCORED)
        ],
    )
    chunks = [chunks_of(layers) for layers in reader.layers]
    heads, _, dim = reader.layers[0][0][0].shape
    rope = lm.rope_of(model.config)
    about = Model(dim, heads, {"theta": rope.theta})
    like, naive = chunks[0][0], chunks[0][0].nbytes
    rows = failures(about, len(reader.layers[0]))
    for name in SERDES:
        if name in rows:
            continue
        tick(f"SmolLM2's chunks, {name}")
        try:
            with storage(about.adapter(name, FREE)) as store:
                kept, size = [], 0
                for number, window in enumerate(chunks):
                    size = store.store(number * len(window), window)[1]
                    kept.append(layers_of(store.retrieve(number * len(window), like, len(window))[1], heads))
        except Exception as error:
            rows[name] = {"fails": f"{type(error).__name__}: {error}"}
            continue
        rows[name] = {"bytes": size, "over_naive": size / naive, **reader.judge(kept)}
    tick("SmolLM2's chunks, cachegen")
    try:
        kept, mean = cachegen(reader, chunks, about, folder)
        rows["cachegen"] = {"bytes": mean, "over_naive": mean / naive, **reader.judge(kept)}
    except Exception as error:
        rows["cachegen"] = {"fails": f"{type(error).__name__}: {error}"}
    for preset in PRESETS:
        tick(f"SmolLM2's cache in a file of ours, {preset}")
        files = [in_a_file(layers, rope, preset) for layers in reader.layers]
        size = sum(size for _, size in files)
        whole = naive * sum(map(len, chunks))
        rows[f"{preset}, our file"] = {"bytes": size, "over_naive": size / whole, **reader.judge([kept for kept, _ in files])}
    return {
        "model": lm.MODEL,
        "windows": len(reader.windows),
        "prefix": PREFIX,
        "scored": SCORED,
        "chunk_bytes": naive,
        "rows": rows,
        "kl_over_our_file": rows[MAIN]["kl"] / rows[f"{MAIN}, our file"]["kl"],
    }


# -- bytes and times -----------------------------------------------------------------------------------------------
def random_chunks(count: int) -> list[torch.Tensor]:
    """Chunks of an 8B Llama's shape: every channel has its own mean and width, as a model's channels have."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        x = torch.randn(SHAPE, generator=generator)
        width, middle = torch.randn(2, *SHAPE[:2], 1, SHAPE[3], generator=generator)
        made.append((x * width.exp() + 2 * middle).to(DTYPE))
    return made


def rel_mse(was: torch.Tensor, now: torch.Tensor) -> float:
    return float((now.float() - was.float()).square().sum() / was.float().square().sum())


def times(rounds: int, tick: Callable[[str], None]) -> dict[str, Any]:
    """Milliseconds a chunk of an 8B Llama's shape, stored and retrieved, by turns; from memory, and over a link of 1 GB/s."""
    chunks, about = random_chunks(CHUNKS), Model(DIM, 8)
    rows = failures(about, SHAPE[1])
    spent: dict[tuple[str, str], list[float]] = {}
    for turn in range(1 + rounds):
        for name in SERDES:
            if (name in SLOW and turn > SLOW_ROUNDS) or "fails" in rows.get(name, {}):
                continue
            tick(f"an 8B Llama's chunks, {name}, turn {turn} of {rounds}")
            for link in (FREE, LINK):
                try:
                    with storage(about.adapter(name, link)) as store:
                        stored, size = store.store(0, chunks)
                        retrieved, found = store.retrieve(0, chunks[0], CHUNKS)
                except Exception as error:
                    rows[name] = {"fails": f"{type(error).__name__}: {error}"}
                    break
                if not turn:
                    error = max(rel_mse(was, now) for was, now in zip(chunks, found, strict=True))
                    rows[name] = {"bytes": size, "over_naive": size / chunks[0].nbytes, "worst_rel_mse": error}
                else:
                    spent.setdefault((name, "retrieve_1gb_s_ms" if link == LINK else "retrieve_ms"), []).append(retrieved)
                    if link == FREE:
                        spent.setdefault((name, "store_ms"), []).append(stored)
    for (name, what), seconds in spent.items():
        rows[name][what] = 1000 * median(seconds) / CHUNKS
    ours, peer, naive = rows[MAIN], rows["tqai 3"], rows["naive"]
    found: dict[str, float] = {}
    if "fails" not in peer:
        found["tqai_over_ours"] = (peer["store_ms"] + peer["retrieve_ms"]) / (ours["store_ms"] + ours["retrieve_ms"])
    found["naive_over_ours_1gb_s"] = naive["retrieve_1gb_s_ms"] / ours["retrieve_1gb_s_ms"]
    found["naive_over_pq3_1gb_s"] = naive["retrieve_1gb_s_ms"] / rows["pq3"]["retrieve_1gb_s_ms"]
    return {"shape": list(SHAPE), "chunk_bytes": chunks[0].nbytes, "chunks": CHUNKS, "rounds": rounds, "rows": rows, **found}


# -- the report ----------------------------------------------------------------------------------------------------
def show(told: dict[str, Any]) -> None:
    """Two tables, of 80 columns."""
    if "fidelity" in told:
        lost = Table(title="SmolLM2: what a model loses")
        for head in ("serde", "bytes", "keys", "values", "KL, nats", "same token"):
            lost.add_column(head, justify="left" if head == "serde" else "right")
        for name, row in _that_run(told["fidelity"]):
            errors = (f"{row[f'{role}_rel_mse']:.5f}" for role in lm.ROLES)
            lost.add_row(name, f"{row['over_naive']:.4f}x", *errors, f"{row['kl']:.5f}", f"{row['top1']:.1%}")
        console.print(lost)
    if "times" in told:
        spent = Table(title="a chunk of an 8B Llama, ms")
        for head in ("serde", "bytes", "store", "retrieve", "from 1 GB/s"):
            spent.add_column(head, justify="left" if head == "serde" else "right")
        for name, row in _that_run(told["times"]):
            figures = (f"{row[what]:.1f}" for what in ("store_ms", "retrieve_ms", "retrieve_1gb_s_ms"))
            spent.add_row(name, f"{row['over_naive']:.4f}x", *figures)
        console.print(spent)
    for part, what in (("fidelity", "kl_over_our_file"), ("times", "tqai_over_ours"), *OVER_LINK):
        if what in told.get(part, {}):
            console.print(f"{what}: {told[part][what]:.3f}")


def _that_run(part: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The rows of serdes that ran; says why others did not."""
    for name, row in part["rows"].items():
        if "fails" in row:
            console.print(f"{name}: {row['fails']}")
    return [(name, row) for name, row in part["rows"].items() if "fails" not in row]


PARTS: dict[str, Callable[[int, Callable[[str], None]], dict[str, Any]]] = {"fidelity": fidelity, "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each serde that is not slow")
    parser.add_argument("--part", choices=tuple(PARTS), nargs="+", default=tuple(PARTS), help="the other part stays as it was")
    options = parser.parse_args()
    register_link()
    register_tqai()
    path = results_file.RESULTS / "lmcache_serdes.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    told = {part: known[part] for part in PARTS if part in known}
    with console.status("starting") as status:
        for part in options.part:
            told[part] = PARTS[part](options.rounds, status.update)
    show(told)
    versions = results_file.versions("lmcache", "lmcache-turbo-quant-serde", "tqai", "torch")
    results_file.write("lmcache_serdes", "make bench-lmcache", {**versions, **told})


if __name__ == "__main__":
    main()
