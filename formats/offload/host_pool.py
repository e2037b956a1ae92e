"""Law: a bounded pool of encoded blocks in pinned host memory: which block gets memory, which one makes way, and who waits.

``pieces`` cuts tensors into pieces, ``pipeline`` encodes, copies and decodes these, and ``lanes`` finds the pipeline of each
GPU. A block's memory is given to another block only when no transfer reads or writes it any more. A block that is put under a
key which the pool has replaces the old block when all of it has arrived and is sound.
"""

from __future__ import annotations

import os
import uuid
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Condition, get_ident
from types import TracebackType
from typing import Any

from pqcodec.codings.presets import DEFAULT_PRESET, check_restores
from pqcodec.errors import CorruptStream, InvalidArgument, NonFiniteInput
from pqcodec.formats.offload.block import Block, unlink
from pqcodec.formats.offload.handles import Get, Put, not_kept
from pqcodec.formats.offload.lanes import Lanes, Shares
from pqcodec.formats.offload.pieces import Kinds, kinds_of, layout_of, plain_options
from pqcodec.formats.offload.pinned import PinnedArena, PinnedSlice, free_all, slice_bytes
from pqcodec.formats.offload.pipeline import Transfer
from pqcodec.formats.offload.usage import Counters, Usage
from pqcodec.formats.places import remote
from pqcodec.formats.places.atomic import PRIVATE, make_folders, searchable
from pqcodec.options import EncodeOptions, each
from pqcodec.sizes import size_of
from pqcodec.stages.centre import Rope
from pqcodec.tensors.numbers import is_torch

PIECE_BYTES = 128 << 20  # of tensors: what one step of the pipeline encodes, copies and decodes


class HostPool:
    """Encoded blocks by key, in ``capacity_bytes`` of host memory. A context manager; thread-safe.

    A block is one tensor [..., tokens, head_dim] or a list of them. Each tensor is encoded on its device, copied to the host
    while the GPU does other work, and decoded later: into a new tensor on the device that it came from, or into one of the
    caller's on any device of the pool.

    ``device``: one device or several GPUs, such as those of a model that is spread over them (None: all GPUs that torch finds,
    the current one first, or the CPU). The attribute ``devices`` holds them, and the attribute ``device`` the first of them.
    ``preset``, ``backend``: those of ``pqcodec.encode``; ``put`` can choose another preset. ``spill``: a folder. A full pool
    moves the blocks that were used longest ago to files there; without a folder it evicts them. Closing the pool deletes the
    files. ``on_displaced`` is called with the key and "spilled" or "evicted". Sizes are numbers of bytes, or such as "8GiB".
    ``piece_bytes``: bytes of tensors that one step of a pipeline encodes, copies or decodes; the first and the last step of a
    block take half of it. Each GPU holds the streams of two steps and a half in each direction. While matrix products fill the
    GPU, a step runs between two of them: small steps delay the products less, large steps move more bytes. Work on a stream of
    a higher priority (-1) is delayed least.

    Raises InvalidArgument (also for devices of different types), BackendUnavailable, and MemoryError where so much memory
    cannot be pinned.

    >>> import torch
    >>> with HostPool(1 << 20, device="cpu") as pool:
    ...     put = pool.put("layer 0", [torch.ones(2, 64, 64), torch.ones(2, 64, 64)], wait=True)
    ...     keys, values = pool.get("layer 0")
    ...     keys.shape, pool.usage().blocks, pool.get("layer 1")
    (torch.Size([2, 64, 64]), 1, None)
    """

    def __init__(
        self,
        capacity_bytes: int | str,
        *,
        device: Any = None,
        preset: str = DEFAULT_PRESET,
        spill: str | os.PathLike[str] | None = None,
        backend: str = "auto",
        piece_bytes: int | str = PIECE_BYTES,
        on_displaced: Callable[[Hashable, str], None] | None = None,
    ) -> None:
        piece_bytes = size_of(piece_bytes, "piece_bytes")
        if piece_bytes < 1:
            raise InvalidArgument(f"piece_bytes {piece_bytes}: 1 and more are possible")
        check_restores(preset, "a pool")
        self._lanes = Lanes(device, backend)
        self.devices, self.device = self._lanes.devices, self._lanes.devices[0]
        self.preset, self._piece_bytes, self._on_displaced = preset, piece_bytes, on_displaced
        if spill is not None:
            remote.check_path(spill, "spill")
            remote.check_local(spill, "blocks spill to a local folder")
        self._folder = Path(spill).absolute() if spill is not None else None
        if self._folder is not None:
            make_folders(self._folder, searchable(PRIVATE))
        self._arena = PinnedArena(capacity_bytes, pinned=self.device.type == "cuda", device=self.device)
        self._blocks: OrderedDict[Hashable, Block] = OrderedDict()  # the first is the one that was used longest ago
        self._leaving: list[Block] = []  # blocks that are gone, but are still being read or written
        self._putting: list[int] = []  # threads of calls of ``put`` under way
        self._changed = Condition()
        self.counters = Counters()
        self._closed = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a HostPool is not copied or pickled, for it has pinned memory and streams: make another, and put again"
        )

    def __enter__(self) -> HostPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        """Wait for the transfers of a pool that is dropped, not closed: its host memory goes next, and their flags do.

        Its pipelines may live longer, since batches refer to themselves.
        """
        with suppress(Exception):
            self._lanes.drain()

    def close(self) -> None:
        """Wait for all calls and transfers under way, drop all blocks, and delete their files."""
        with self._changed:
            self._closed = True
            for key in list(self._blocks):
                self._forget(key)
            while {*self._putting} - {get_ident()} or any(block.users for block in self._leaving):
                self._changed.wait()
            self._reclaim(wait=True)
        self._lanes.close()

    # -- in ------------------------------------------------------------------------------------------------------
    def put(
        self,
        key: Hashable,
        tensors: Any,
        *,
        preset: str | Sequence[str] | None = None,
        center: str | Sequence[str | None] | None = None,
        rope: Rope | Sequence[Rope | None] | None = None,
        exact_tokens: int = 0,
        wait: bool = False,
    ) -> Put:
        """Encode a tensor or a list of them, and keep the block under ``key`` in place of the one there.

        The options are those of ``pqcodec.encode``: ``preset``, ``center`` and ``rope`` are one for all tensors or one each.
        Without ``wait`` this returns when the GPU's work is queued. The tensors must not be written before that work has read
        them; ``Put.read`` makes a stream wait until it has.

        Raises InvalidArgument (also for a block larger than the pool), OSError of a spill, and with ``wait`` NonFiniteInput.
        After an error the pool holds what it held before, except for blocks that made room.
        """
        hash(key)  # raises TypeError before memory is taken
        single = is_torch(tensors)
        if not single and not isinstance(tensors, Iterable):
            raise InvalidArgument(f"tensors is a {type(tensors).__name__}; a torch tensor or a list of them is expected")
        given = [tensors] if single else list(tensors)
        options = self._options(len(given), preset, center, rope, exact_tokens)
        kinds, shares = self._seen(given)
        block = Block(key, layout_of(kinds, options, self._piece_bytes), single)
        with self._changed:
            self._check_open()
            self._putting.append(get_ident())
        try:
            handle = self._put(block, given, shares)
        finally:
            with self._changed:
                self._putting.remove(get_ident())
                self._changed.notify_all()
        if wait:
            handle.wait()
        return handle

    def _put(self, block: Block, given: Sequence[Any], shares: Shares) -> Put:
        """Give a block memory, and begin to encode its tensors into it."""
        displaced: list[tuple[Hashable, str]] = []
        transfer = Transfer()
        try:
            block.slices = slices = self._room(block, displaced)
            self._lanes.encode(block.layout.pieces, given, shares, slices or (), transfer)
        except BaseException as error:
            with self._changed:
                self.counters.failed += 1
            self._give_back(block)
            if isinstance(error, NonFiniteInput):
                raise not_kept(block.key) from error
            raise
        block.put = transfer
        with self._changed:
            if self._closed:
                self._leave(block)
            self._check_open()
            self.counters.puts += 1
            block.before = self._blocks.pop(block.key, None)
            self._blocks[block.key] = block
            self._reclaim()
        return Put(block, transfer, displaced, self._settle)

    def _check_open(self) -> None:
        """Raises InvalidArgument for a pool that is closed."""
        if self._closed:
            raise InvalidArgument("the pool is closed; make a new one")

    def _options(self, count: int, preset: Any, center: Any, rope: Any, exact_tokens: int) -> Sequence[EncodeOptions]:
        """The options of all tensors, or of each; equal ones are one object, because making one checks it."""
        preset = self.preset if preset is None else preset
        if isinstance(preset, str) and center is None and rope is None and type(exact_tokens) is int:
            return (plain_options(preset, exact_tokens),)
        presets = each("preset", preset, count, str)
        for name in set(presets):
            check_restores(name, "a pool")
        centers = each("center", center, count, (str, type(None)))
        ropes = each("rope", rope, count, (Rope, type(None)))
        made: dict[Any, EncodeOptions] = {}
        options = []
        for preset_, center_, rope_ in zip(presets, centers, ropes, strict=True):
            kind = preset_, center_, id(rope_)
            if kind not in made:
                made[kind] = EncodeOptions(preset_, center=center_, rope=rope_, exact_tokens=exact_tokens)
            options.append(made[kind])
        return options

    def _seen(self, tensors: Sequence[Any], strides: bool = False) -> tuple[Kinds, Shares]:
        """What tensors are, and those of each device; raises InvalidArgument where the pool does not take one."""
        self._check_open()
        self._lanes.check(tensors)
        kinds = kinds_of(tensors, strides)
        return kinds, self._lanes.shares(tensors, kinds.devices)

    # -- out -----------------------------------------------------------------------------------------------------
    def get(self, key: Hashable, out: Any = None) -> Any:
        """Wait for the tensors of a block, and check them: new ones, or ``out`` filled; None if there is no such block.

        ``out``: one tensor or a list, as was put, of the same shapes and dtypes; the last dimension is contiguous, the other
        strides are free. Raises InvalidArgument, CorruptStream (what ``out`` holds is undefined then), and OSError of a block
        on disk.
        """
        found = self.fetch(key, out)
        if found is None:
            return None
        try:
            return found.wait()
        except CorruptStream:
            with self._changed:
                self.counters.failed += 1
            raise

    def fetch(self, key: Hashable, out: Any = None) -> Get | None:
        """As ``get``, but return before the tensors are filled: ``Get.wait`` waits for them, and checks them.

        A block that is only on disk is read before this returns.
        """
        block = self._use(key)
        if block is None:
            return None
        try:
            outs, shares = self._outs(block, out)
            hosts, staged = self._in_memory(block)
            transfer = Transfer()
            try:
                self._lanes.decode(block.layout.pieces, hosts, staged, outs, shares, transfer)
            except BaseException:
                self._lanes.drain()
                raise
            with self._changed:
                block.reads = [*(read for read in block.reads if not read.done()), transfer]
            return Get(key, outs, block.single, transfer)
        except BaseException:
            with self._changed:
                self.counters.failed += 1
            raise
        finally:
            self._used(block)

    def prefetch(self, key: Hashable) -> bool:
        """Read a block from disk if it is only there, and begin to copy its encoded bytes to the GPUs that it came from.

        The next ``get`` or ``fetch`` uses these copies for tensors on the same GPUs, and lets go of them. False if there is no
        such block.
        """
        block = self._use(key, count=False)
        if block is None:
            return False
        try:
            hosts, staged = self._in_memory(block)
            staged = self._lanes.moved(block.layout.pieces, block.devices, hosts, staged)
            with self._changed:
                self.counters.prefetches += 1
                block.staged = staged
        finally:
            self._used(block)
        return True

    def _outs(self, block: Block, out: Any) -> tuple[list[Any], Shares]:
        """The tensors to fill, and those of each device; raises InvalidArgument for given ones that the block does not fill."""
        expected = block.layout
        if out is None:
            outs = expected.new_tensors(block.devices)
            return outs, self._seen(outs)[1]
        outs = [out] if block.single else list(out)
        kinds, shares = self._seen(outs, strides=True)
        if len(outs) != len(expected.shapes):
            raise InvalidArgument(f"out: {len(outs)} tensors are given, block {block.key!r} holds {len(expected.shapes)}")
        expected.check_outs(outs, kinds)
        return outs, shares

    def _use(self, key: Hashable, count: bool = True) -> Block | None:
        """The block of a key, known to be sound; its bytes stay where they are until ``_used``."""
        while True:
            with self._changed:
                self._check_open()
                block = self._blocks.get(key)
                if block is None:
                    self.counters.misses += count
                    return None
                if block.put is None:
                    self._blocks.move_to_end(key)
                    self.counters.hits += count
                    block.users += 1
                    return block
            self._settle(block)

    def _used(self, block: Block) -> None:
        with self._changed:
            block.users -= 1
            self._changed.notify_all()

    # -- upkeep --------------------------------------------------------------------------------------------------
    def drop(self, key: Hashable) -> bool:
        """Forget a block; False if there is none. Transfers of it that are under way still complete."""
        with self._changed:
            return self._forget(key)

    def __contains__(self, key: Hashable) -> bool:
        with self._changed:
            return key in self._blocks

    def __len__(self) -> int:
        with self._changed:
            return len(self._blocks)

    def usage(self) -> Usage:
        """The bytes and blocks that the pool holds now."""
        with self._changed:
            self._reclaim()
            written = [block.path for block in self._blocks.values() if block.path is not None]
            return Usage(
                self._arena.capacity_bytes,
                self._arena.used_bytes,
                len(self._blocks),
                sum(block.slices is None for block in self._blocks.values()),
                sum(path.stat().st_size for path in written),
                sum(block.layout.logical_bytes for block in self._blocks.values()),
            )

    def _settle(self, block: Block) -> None:
        """Wait for a put; then forget the block that it replaced, or bring that one back if the new one is not sound."""
        put = block.put
        if put is None:
            return
        put.wait()
        with self._changed:
            if block.put is None:
                return
            block.put, before, block.before = None, block.before, None
            if put.sound():
                self._leave(before, reclaim=False)
            elif unlink(self._blocks, block, before):
                self._leave(block)
                self.counters.failed += 1
            self._changed.notify_all()

    def _forget(self, key: Hashable) -> bool:
        """``drop``, with the lock held."""
        block = self._blocks.pop(key, None)
        self._leave(block)
        return block is not None

    def _leave(self, block: Block | None, reclaim: bool = True) -> None:
        """Let go of a block and of all blocks that it would have replaced, with the lock held.

        Their memory and files are given back once no call and no transfer uses them; without ``reclaim`` not before the next
        call that puts, drops or counts: who waits for a put need not wait for that.
        """
        while block is not None:
            self._leaving.append(block)
            before, block.before = block.before, None
            block = before
        if reclaim:
            self._reclaim()
        self._changed.notify_all()

    def _reclaim(self, wait: bool = False) -> bool:
        """Take back memory and files of blocks that were let go, with the lock held; whether any came back.

        Blocks that transfers still use are skipped, or waited for with ``wait``; those that calls use are skipped.
        """
        kept, freed = [], False
        for block in self._leaving:
            transfers = [*block.reads, *([block.put] if block.put else [])]
            if block.users == 0 and wait:
                for transfer in transfers:
                    transfer.wait()
            if block.users or not all(transfer.done() for transfer in transfers):
                kept.append(block)
                continue
            block.give_back()
            freed = True
        self._leaving = kept
        return freed

    def _give_back(self, block: Block) -> None:
        """Free the memory of a block whose put has failed."""
        with suppress(Exception):  # the caller raises the error of the put, not one that follows from it
            self._lanes.drain()
        block.give_back()
        with self._changed:
            self._changed.notify_all()

    # -- room ----------------------------------------------------------------------------------------------------
    def _room(self, block: Block, displaced: list[tuple[Hashable, str]]) -> list[PinnedSlice] | None:
        """A slice for each piece of a block, once others have made way; None if another thread has given the block memory."""
        while True:
            with self._changed:
                if block.slices is not None:
                    return None
                slices = self._arena.allocate_all(block.layout.sizes)
                if slices is not None:
                    return slices
                self._check_size(block)
                if self._reclaim() or self._reclaim(wait=True):
                    continue
                coldest = self._coldest()
                if coldest is None:
                    self._changed.wait(0.05)  # calls use all blocks: try again when one has ended
                    continue
                coldest.users += 1
            try:
                self._make_way(coldest, displaced)
            finally:
                self._used(coldest)

    def _check_size(self, block: Block) -> None:
        """Raises InvalidArgument for a block that the pool has no room for, even alone."""
        needed = sum(map(slice_bytes, block.layout.sizes))
        if needed > self._arena.capacity_bytes:
            raise InvalidArgument(
                f"block {block.key!r} takes {needed} bytes, the pool has {self._arena.capacity_bytes} in all; "
                "put fewer tensors under one key, or make the pool larger"
            )

    def _coldest(self) -> Block | None:
        """The block that makes way next: one that still keeps the block it replaces, or else the one used longest ago."""
        there = [block for block in self._blocks.values() if block.slices is not None and not block.users]
        return next((block for block in there if block.before is not None), there[0] if there else None)

    def _make_way(self, block: Block, displaced: list[tuple[Hashable, str]]) -> None:
        """Spill or evict a block, which the caller counts as used; or free what it has replaced, if that is kept."""
        replaced = block.before is not None
        self._settle(block)
        if replaced:
            return
        if self._folder is not None and block.path is None and self._blocks.get(block.key) is block:
            path = self._folder / f"{uuid.uuid4().hex}.pqkv"
            block.write(path)
            block.path = path
        with self._changed:
            if self._blocks.get(block.key) is not block or block.users > 1 or block.slices is None:
                return  # it was dropped, replaced, or is wanted again
            for read in block.reads:
                read.wait()
            what = "evicted" if self._folder is None else "spilled"
            if what == "evicted":
                del self._blocks[block.key]
            free_all(block.slices)
            block.slices, block.staged, block.reads = None, None, []
            setattr(self.counters, what, getattr(self.counters, what) + 1)
            displaced.append((block.key, what))
        if self._on_displaced is not None:
            self._on_displaced(block.key, what)

    def _in_memory(self, block: Block) -> tuple[list[Any], list[Any]]:
        """The pieces of a block in host memory, read from disk if need be; and the copy of each on its device, or None."""
        with self._changed:
            staged, block.staged = block.staged or [None] * len(block.layout.pieces), None
            if block.slices is not None:
                return block.hosts, staged
        slices = self._room(block, [])
        if slices is None:
            return block.hosts, staged
        try:
            assert block.path is not None
            block.read(block.path, slices)
        except BaseException:
            free_all(slices)
            raise
        with self._changed:
            if block.slices is None:
                block.slices = slices
                self.counters.reloaded += 1
            else:  # another thread has read it first
                free_all(slices)
            return block.hosts, staged
