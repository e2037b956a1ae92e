"""Law: putting a prefix into a store, block after block; of all who put a block at once, one encodes and writes it.

A block's name is leased in the index before it is encoded. Who finds it leased leaves the block to the other, goes on with the
next one, and looks again in the end: what is there by then is there, and what nobody has leased any more is written after all.
A lease runs out, so a node that dies keeps others from a block for ``LEASE`` seconds at most.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import numpy as np

from pqcodec.errors import CorruptStream, UnsupportedStream
from pqcodec.formats.engines import transformers_cache as tc
from pqcodec.formats.engines.model_identity import Identity
from pqcodec.formats.policy.recipe import Recipe
from pqcodec.formats.store import blocks
from pqcodec.formats.store import folder as own
from pqcodec.formats.store.index import Index, Row
from pqcodec.formats.store.keys import BLOCK_TOKENS, Chain
from pqcodec.formats.store.shelf import Shelf

TAIL_PRESET = "pq6"  # a tail is decoded and encoded again when it has grown, so its error should be negligible
LEASE = 30.0  # seconds in which a block should be encoded and written; where it takes longer, another may do so, too
PATIENCE = 0.5  # seconds that a put waits in the end for blocks that others have leased
PAUSE = 0.01  # seconds between looks at them


@dataclass(frozen=True)
class PutWork:
    """A cache to be written, with its names and model."""

    identity: Identity
    chain: Chain
    label: str
    ids: np.ndarray
    state: tc.CacheState
    pin: bool


@dataclass
class Written:
    """What a put did: the blocks of its prefix that are there, those of them that are new, and what it left to others."""

    seen: list[Row] = field(default_factory=list)
    new: list[Row] = field(default_factory=list)
    left: list[Row] = field(default_factory=list)  # leased by others

    @property
    def pending_tokens(self) -> int:
        """Tokens of the blocks that were left to others."""
        return sum(len(row.tokens) for row in self.left)


@contextmanager
def released_by_errors(index: Index, name: bytes, lease: str) -> Iterator[None]:
    """Release the lease of a block that an error keeps from being committed."""
    try:
        yield
    except BaseException:
        with suppress(OSError, CorruptStream):
            index.release(name, lease)
        raise


class ChainWriter:
    """Writes prefixes to a shelf. ``recipe``: of new blocks; ``exact``: all numbers as they are."""

    def __init__(self, shelf: Shelf, recipe: Recipe, exact: bool) -> None:
        self._shelf, self._index, self._files = shelf, shelf.index, shelf.files
        self._recipe, self._exact = recipe, exact

    def write(self, work: PutWork) -> Written:
        """Write the blocks that are missing, drop what they replace, and evict; raises OSError.

        A prefix that exceeds the quota is left out, with a warning.
        """
        chain, ids, done = work.chain, work.ids, Written()
        self._index.add_root(chain.root, work.label, chain.settings, chain.tenant_id)
        presets: blocks.BlockPresets | None = None
        available, taken, last = self._shelf.available_bytes(tenant=chain.tenant_id), 0, None
        for row in self._wanted(work):
            there = self._there(row)
            if there is None:
                presets = presets or self._presets_for(work, last)
                there = self._added(row, work, presets, done)
            if there is None:
                continue
            last, taken = there, taken + there.size
            done.seen.append(there)
            to_come = (len(ids) // BLOCK_TOKENS - row.end // BLOCK_TOKENS) * there.size if row.whole else 0  # of one size
            if available is not None and done.new and taken + to_come > available:
                runs = (ids[at : at + BLOCK_TOKENS] for at in range(0, len(ids) + 1, BLOCK_TOKENS))
                names = {*accumulate(runs, chain.child, initial=chain.root), *(row.name for row in done.seen)}
                available = self._shelf.available_bytes(names, chain.tenant_id)
                if available is not None and taken + to_come > available:
                    self._leave_out(work, done, taken + to_come, available)
                    return done
        if done.left:
            self._look_again(work, presets or self._presets_for(work, last), done)
        for row in done.new:
            self._drop_what_grew_into(row)
        self._index.touch(done.seen, hit=False, puts=1)
        if work.pin and last is not None:
            self._pin(last)
        self._shelf.evict()
        return done

    def _pin(self, row: Row) -> None:
        """Pin a block, or what its tokens grew into meanwhile."""
        while True:
            self._index.pin(row, True)
            there = self._there(row)
            if there is None or there.name == row.name:
                return
            row = there

    def _wanted(self, work: PutWork) -> Iterator[Row]:
        """The rows of a prefix, with new files, as if none of its blocks were there."""
        chain, parent = work.chain, work.chain.root
        stateful = not all(layer.cuttable for layer in work.state.parts[""])
        for start in range(0, len(work.ids) + 1, BLOCK_TOKENS):
            run = work.ids[start : start + BLOCK_TOKENS]
            whole = len(run) == BLOCK_TOKENS
            if not whole and not len(run) and not stateful:
                return
            name, marks = chain.child(parent, run), chain.marks(parent, run)
            yield Row(name, parent, chain.root, start, marks, whole, stateful, own.new_block_file(name), 0)
            parent = name

    def _there(self, row: Row) -> Row | None:
        """The block as it is committed or, for a tail, another that begins with its tokens; None where it is missing."""
        there = self._index.find(row.name)
        if there is not None or row.whole or row.stateful:
            return there
        rows = self._index.children(row.parent)
        return next((other for other in rows if common_length(other.tokens, row.tokens) == len(row.tokens)), None)

    def _added(self, row: Row, work: PutWork, presets: blocks.BlockPresets, done: Written) -> Row | None:
        """The block, by this call or another's, and note in ``done`` whose; None where another has leased it.

        A prefix to be pinned is not left to others: its end has to be there in the end.
        """
        lease = self._index.lease(row.name, LEASE)
        if not lease:
            there = self._index.find(row.name)
            if there is not None:
                return there
            if not work.pin:
                done.left.append(row)
                return None
        with released_by_errors(self._index, row.name, lease):
            row, new = self._encoded(row, work, presets)
        done.new += [row] if new else []
        return row

    def _look_again(self, work: PutWork, presets: blocks.BlockPresets, done: Written) -> None:
        """Wait a little for the blocks that were left to others, and write those that nobody has leased any more."""
        until = time.monotonic() + PATIENCE
        while done.left:
            left, done.left = done.left, []
            for row in left:
                there = self._there(row) or self._added(row, work, presets, done)
                done.seen += [] if there is None else [there]
            if time.monotonic() >= until:
                return
            if done.left:
                time.sleep(PAUSE)

    def _leave_out(self, work: PutWork, done: Written, size: int, available: int) -> None:
        """Drop the new blocks of a prefix that exceeds the quota, with a warning; those that others use by now stay."""
        for row in reversed(done.new):
            self._shelf.drop(row, unused=True)
        text = f"a prefix of {len(work.ids)} tokens is left out: it takes {size} bytes, and the quota of {self._shelf.place} "
        warnings.warn(f"{text}leaves room for {max(available, 0)}", RuntimeWarning, stacklevel=5)

    # -- one block -----------------------------------------------------------------------------------------------
    def _encoded(self, row: Row, work: PutWork, presets: blocks.BlockPresets) -> tuple[Row, bool]:
        """Encode a block, write its file and commit it; returns its row, and whether this call added it."""
        cut = [_part(layer, row) for layer in work.state.parts[""]]
        about = {"label": work.label, "settings": work.chain.settings, "marked": work.chain.keyed}
        chosen = presets if row.whole or self._exact else presets.at(TAIL_PRESET)
        with self._files.writing(row.file) as path:
            rope_of = partial(tc.rope_of, work.identity.config)
            row = replace(row, size=blocks.write_block(path, row, cut, chosen, rope_of, self._recipe, about))
        return row, self._shelf.commit(row)

    def _drop_what_grew_into(self, row: Row) -> None:
        """Drop the tails whose tokens a new block includes; tails with state stay, since they are useful by themselves."""
        for tail in [] if row.stateful else self._index.children(row.parent):
            grown = common_length(tail.tokens, row.tokens) == len(tail.tokens) and tail.name != row.name
            if grown and not tail.whole and not tail.pinned:
                self._shelf.drop(tail)

    def _presets_for(self, work: PutWork, last: Row | None) -> blocks.BlockPresets:
        """The presets for new blocks: those of the block before them, ``last``, or chosen anew."""
        if last is not None and last.whole:
            try:
                with self._files.open(last.file) as file:
                    return blocks.BlockPresets.in_file(blocks.block_metadata(file)["groups"])
            except (CorruptStream, UnsupportedStream, OSError, KeyError, TypeError):
                pass  # a damaged block is reported when it is read; choose anew
        return blocks.BlockPresets.of(work.state, work.identity.config, None if self._exact else self._recipe)


def _part(layer: tc.LayerState, row: Row) -> tc.LayerState:
    """A layer's part of a block: its tokens; of a layer that cannot be cut nothing, but in a tail all of its state."""
    if layer.cuttable:
        return layer.cut(row.start, row.end)
    return layer.without_tensors() if row.whole else layer


def common_length(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """The length of the common beginning of two runs of tokens.

    >>> common_length([1, 2, 3], [1, 2, 4, 5])
    2
    """
    n = min(len(a), len(b))
    other = np.nonzero(np.asarray(a[:n]) != np.asarray(b[:n]))[0]
    return int(other[0]) if len(other) else n
