"""Law: the store of prefixes for engines with paged caches: whole blocks, found by tokens, checked before they are promised.

The blocks are those of ``blocks`` (SPEC IV.3) under roots of their own: quota, pins, damage and leftovers are the shelf's. An
engine is told of no token whose block is not in its process's memory, every byte checked: it waits for none that does not come.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pqcodec.codings.presets import DEFAULT_PRESET, check_restores
from pqcodec.errors import CorruptStream, UnsupportedStream
from pqcodec.formats.containers.pqkv.file import PQKVFile
from pqcodec.formats.engines import transformers_cache as tc
from pqcodec.formats.engines.paged_layers import CacheShape
from pqcodec.formats.plain.in_memory import InMemory
from pqcodec.formats.policy.names import TensorRole
from pqcodec.formats.policy.recipe import Recipe
from pqcodec.formats.store import blocks
from pqcodec.formats.store import folder as own
from pqcodec.formats.store.index import Row
from pqcodec.formats.store.keys import BLOCK_TOKENS, Chain
from pqcodec.formats.store.prefix_store import BLOCK_CHUNK
from pqcodec.formats.store.shelf import Shelf
from pqcodec.formats.store.writing import LEASE, TAIL_PRESET, released_by_errors
from pqcodec.sizes import seconds_of, size_of
from pqcodec.stages.centre import Rope

PAUSE = 10.0  # seconds for which a store that failed is not asked again
_LAYER = "DynamicLayer"  # a layer of full attention, as in a cache of transformers
_UNSOUND = (KeyError, TypeError, IndexError, ValueError, AttributeError)  # what metadata that no store writes lead to


@dataclass(frozen=True)
class HeldBlock:
    """A stored block in memory: its file's bytes, all of which were checked."""

    row: Row
    data: bytes


@dataclass(frozen=True)
class NewBlock:
    """A block that is not stored yet: its row, still without a size, what its root stands for, and the id of its tenant."""

    row: Row
    settings: dict[str, Any]
    tenant: str
    marked: bool  # the row's tokens are a tenant's marks


class EngineStore:
    """A store of prefixes in a folder, or in Redis for many machines, for engines whose caches have a ``shape``.

    ``folder``, ``data``, ``max_bytes``, ``max_age`` and ``shared`` are as of ``PrefixStore``. ``preset``: of keys and values,
    or "exact". ``rope``: of the keys, from position 0 on; None: they are centred plainly. ``label``: a word for the model in
    lists. Raises InvalidArgument, OSError and UnsupportedStream.

    >>> import tempfile, torch
    >>> shape, chain = CacheShape(2, 1, 64, "float16"), Chain({"model": "tiny"})
    >>> x, ids = torch.randn(2, 1, 256, 64).half(), np.arange(300)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = EngineStore(folder, shape, preset="pq4")
    ...     written = [store.write(new, list(x), list(x)) for new in store.missing(chain, ids)]
    ...     tokens, (held,) = store.find(chain, ids)
    ...     keys, values = store.decode(held)
    ...     store.close()
    >>> tokens, held.row.size == written[0], bool((keys[1] - x[1]).norm() < 0.1 * x[1].norm())
    (256, True, True)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        shape: CacheShape,
        *,
        data: str | os.PathLike[str] | None = None,
        preset: str = DEFAULT_PRESET,
        rope: Rope | None = None,
        max_bytes: int | str | None = None,
        max_age: float | str | None = None,
        shared: bool = False,
        label: str = "model",
        backend: str = "auto",
    ) -> None:
        limits = {
            "max_bytes": None if max_bytes is None else size_of(max_bytes, "max_bytes"),
            "max_age": None if max_age is None else seconds_of(max_age, "max_age"),
        }
        self._shape, self._rope, self._label, self._exact = shape, rope, label, preset == blocks.EXACT
        if not self._exact:
            check_restores(preset, "an engine's prefix store")
        self._recipe = Recipe(
            TAIL_PRESET if self._exact else preset, measured="none", chunk_tokens=BLOCK_CHUNK, backend=backend
        )
        self._backend = backend
        self._asked_from = 0.0  # the time from which on the store is asked again
        self.shelf = Shelf(folder, data, shared=shared)
        self._index, self._files = self.shelf.index, self.shelf.files
        for name, limit in limits.items():
            if limit is not None and self.shelf.denied is None:
                self._index.set_limit(name, limit)

    def warm(self) -> None:
        """Compile the kernels that blocks take, so that the first one does not wait: up to a minute where none are on disk."""
        import torch

        shape, ids = self._shape, np.zeros(BLOCK_TOKENS, np.int64)
        x = torch.ones(shape.kv_heads, BLOCK_TOKENS, shape.head_dim, dtype=getattr(torch, shape.dtype))
        chain, preset = Chain({}), blocks.EXACT if self._exact else self._recipe.preset
        with tempfile.TemporaryDirectory(prefix="pqcodec-") as folder:
            store = EngineStore(folder, shape, preset=preset, rope=self._rope, backend=self._backend)
            for new in store.missing(chain, ids):
                store.write(new, [x] * shape.layers, [x] * shape.layers)
            for held in store.find(chain, ids)[1]:
                store.decode(held)
            store.close()

    def close(self) -> None:
        """Close the index; later calls raise InvalidArgument."""
        self.shelf.close()

    # -- finding -------------------------------------------------------------------------------------------------
    def find(self, chain: Chain, ids: np.ndarray, first: int = 0) -> tuple[int, list[HeldBlock]]:
        """How many first tokens of ``ids`` are stored, and the blocks of those behind token ``first``, read and checked.

        A damaged block is dropped with a warning, and the prefix ends before it. A store that cannot be read costs a warning,
        and is not asked for ``PAUSE`` seconds: nothing is found.
        """
        if time.monotonic() < self._asked_from:
            return 0, []
        try:
            rows = self._rows(chain, ids)
            expired = self.shelf.expired(rows, chain.tenant_id)
            rows = rows[: next((number for number, row in enumerate(rows) if row.name in expired), len(rows))]
            known = [row for row in rows if row.end <= first]
            held = self._held(rows[len(known) :])
            used = [*known, *(block.row for block in held)]
            found = max(len(used) * BLOCK_TOKENS - first, 0)
            counts = {"gets": 1, "hits": int(bool(held)), "asked_tokens": len(ids) - first, "found_tokens": found}
            self._index.touch(used, hit=bool(held), **counts)
            return len(used) * BLOCK_TOKENS, held
        except (OSError, CorruptStream) as error:  # of the index; unreadable blocks are handled before
            self.fail("found", error)
            return 0, []

    def fail(self, what: str, error: Exception) -> None:
        """Warn that nothing is ``what`` in the store because of an error, and leave it alone for ``PAUSE`` seconds."""
        self._asked_from = time.monotonic() + PAUSE
        text = f"{self.shelf.place} cannot be used, so that nothing is {what} in it for {PAUSE:.0f} seconds: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=3)

    def _rows(self, chain: Chain, ids: np.ndarray) -> list[Row]:
        """The rows of the longest chain of whole blocks of ``ids``."""
        rows: list[Row] = []
        parent = chain.root
        for start in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            run = ids[start : start + BLOCK_TOKENS]
            row = self._index.find(chain.child(parent, run))
            if row is None or row.start != start or not (chain.keyed or np.array_equal(row.tokens, run)):
                break
            rows.append(row)
            parent = row.name
        return rows

    def _held(self, rows: Sequence[Row]) -> list[HeldBlock]:
        """Blocks in order up to the first unreadable one, which is given up."""
        held: list[HeldBlock] = []
        with self._files.opening([row.file for row in rows]) as opened:
            for row in rows:
                try:
                    with opened(row.file) as file:
                        data = file.all_bytes()
                    self._check(data, row)
                except (CorruptStream, UnsupportedStream, OSError) as error:
                    self.shelf.give_up(row, error)
                    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                        self._asked_from = time.monotonic() + PAUSE
                    break
                held.append(HeldBlock(row, data))
        return held

    def _check(self, data: bytes, row: Row) -> None:
        """Raises CorruptStream or UnsupportedStream for what is not the whole and sound block of a row."""
        shape = self._shape
        with PQKVFile(data) as file:
            metadata = blocks.block_metadata(file)
            try:
                blocks.check_same_block(file, metadata, row)
                groups = blocks.groups_in(metadata)
                covered = sorted((layer, group.path) for group in groups.values() for layer in group.layers)
                for name, group in groups.items():
                    entry = file.entry(name)
                    wanted = (len(group.layers), 1, shape.kv_heads, BLOCK_TOKENS, shape.head_dim)
                    if group.state or (entry.shape, entry.dtype) != (wanted, shape.dtype):
                        raise CorruptStream(f"{name!r} is {entry.dtype} {entry.shape}; {shape.dtype} {wanted} is expected")
            except _UNSOUND as error:
                raise CorruptStream(f"its metadata does not describe a block ({error!r})") from error
            if covered != [(layer, path) for layer in range(shape.layers) for path in sorted(tc.ROLES)]:
                raise CorruptStream(f"it is not of the keys and values of {shape.layers} layers")
            if damage := file.verify(backend=self._backend):
                raise CorruptStream("; ".join(f"{'' if name is None else f'tensor {name!r}: '}{what}" for name, what in damage))

    def decode(self, held: HeldBlock, device: Any = None) -> tuple[list[Any], list[Any]]:
        """Keys and values of each layer, torch tensors [kv_heads, 256, head_dim] on a device; raises as ``decode`` does."""
        found: dict[str, dict[int, Any]] = {path: {} for path in tc.ROLES}
        with PQKVFile(held.data) as file:
            for name, group in blocks.groups_in(blocks.block_metadata(file)).items():
                stacked = file.decode(name, device=device, backend=self._backend)
                found[group.path] |= dict(zip(group.layers, stacked[:, 0], strict=True))
        keys, values = ([found[path][layer] for layer in range(self._shape.layers)] for path in tc.ROLES)
        return keys, values

    # -- storing -------------------------------------------------------------------------------------------------
    def missing(self, chain: Chain, ids: np.ndarray, first: int = 0) -> list[NewBlock]:
        """The whole blocks of ``ids`` that end behind token ``first`` and are not stored; none of a store that failed."""
        if self.shelf.denied is not None or time.monotonic() < self._asked_from:
            return []
        found: list[NewBlock] = []
        parent = chain.root
        try:
            for start in range(0, len(ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
                run = ids[start : start + BLOCK_TOKENS]
                name = chain.child(parent, run)
                if start + BLOCK_TOKENS > first and self._index.find(name) is None:
                    marks = chain.marks(parent, run)
                    row = Row(name, parent, chain.root, start, marks, True, False, own.new_block_file(name), 0)
                    found.append(NewBlock(row, chain.settings, chain.tenant_id, chain.keyed))
                parent = name
        except (OSError, CorruptStream) as error:
            self.fail("stored", error)
            return []
        return found

    def write(self, new: NewBlock, keys: Sequence[Any], values: Sequence[Any]) -> int:
        """Encode a block, write its file and commit it; the file's bytes, or 0 where it, or not yet its parent, is stored.

        So it is, too, where another node encodes the block now. ``keys``, ``values``: of each layer, tensors [kv_heads, 256,
        head_dim]. Raises OSError, CorruptStream for a damaged
        index, and NonFiniteInput.
        """
        row = new.row
        if self._index.find(row.name) is not None or (row.start and self._index.find(row.parent) is None):
            return 0
        layers = [tc.LayerState(_LAYER, {"keys": k[None], "values": v[None]}, {}) for k, v in zip(keys, values, strict=True)]
        about = {"label": self._label, "settings": new.settings, "marked": new.marked}
        self._index.add_root(row.root, self._label, new.settings, new.tenant)
        lease = self._index.lease(row.name, LEASE)
        if not lease:
            return 0
        with released_by_errors(self._index, row.name, lease):
            presets = self._presets(layers, row.start)
            with self._files.writing(row.file) as path:
                size = blocks.write_block(path, row, layers, presets, self._rope_of, self._recipe, about)
            row = replace(row, size=size)
            if not self.shelf.commit(row):
                return 0
        self._index.touch([row], hit=False, puts=1)
        self.shelf.evict()
        return size if self._index.find(row.name) is not None else 0  # of a block that is larger than the quota

    def _rope_of(self, _layer: int, _head_dim: int, pairing: str | None) -> Rope | None:
        return self._rope if pairing else None

    def _presets(self, layers: Sequence[tc.LayerState], first: int) -> blocks.BlockPresets:
        """The presets of a block's keys and values, which share its bits as its own energies say."""
        if self._exact:
            return blocks.BlockPresets({})
        named, roles = {}, {}
        for number, layer in enumerate(layers):
            for path, role in tc.ROLES.items():
                named[f"layers.{number}.{role}"] = layer.tensors[path]
                rope = self._rope if role == "key" else None
                roles[f"layers.{number}.{role}"] = TensorRole(role, number, rope, first)
        chosen = self._recipe.presets(InMemory(named), roles, list(named))
        style = None if self._rope is None else self._rope.style
        return blocks.BlockPresets(
            {
                (number, path): (chosen[f"layers.{number}.{role}"], style if role == "key" else None)
                for number in range(len(layers))
                for path, role in tc.ROLES.items()
            }
        )


def engine_settings(identity: dict[str, Any], preset: str) -> dict[str, Any]:
    """The settings of a root whose blocks an engine wrote (SPEC IV.2), from what tells its model from others."""
    codec = {"preset": preset, "seed": 0, "block_tokens": BLOCK_TOKENS}
    return {"model": identity, "tokenizer": "", "codec": codec, "extra": ""}
