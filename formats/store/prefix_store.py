"""Law: the store of prefix caches: getting the cache of the longest stored prefix of some tokens, and putting caches.

A prefix is a chain of blocks of 256 tokens and a tail (SPEC IV.2). A block's name covers all tokens up to its end and the model
that computed them (``keys``); its row commits it (``index``); its file holds it (``blocks``). Tails are kept at a high rate,
because the block that they grow into is encoded from their decoded numbers.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from types import TracebackType
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np

from pqcodec.codings.presets import DEFAULT_PRESET, check_restores
from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats.containers.pqkv.file import PQKVFile
from pqcodec.formats.engines import transformers_cache as tc
from pqcodec.formats.engines.model_identity import Identity, tokenizer_digest
from pqcodec.formats.policy.recipe import Recipe
from pqcodec.formats.store import blocks, generation, reuse
from pqcodec.formats.store.index import Row
from pqcodec.formats.store.keys import BLOCK_TOKENS, Chain, settings_of, tenant_id_of, token_ids
from pqcodec.formats.store.shelf import Shelf
from pqcodec.formats.store.writing import TAIL_PRESET, ChainWriter, PutWork, common_length
from pqcodec.sizes import seconds_of, size_of
from pqcodec.threads import threads

BLOCK_CHUNK = 64  # tokens of a chunk, which is under one checksum
PENDING = 4  # puts that may wait in the background; further ones are skipped


class Prefix(NamedTuple):
    """The result of ``PrefixStore.get``: a cache of the first ``length`` tokens; feed the model those from ``length`` on."""

    cache: Any
    length: int


@dataclass(frozen=True)
class Stored:
    """The result of ``PrefixStore.put``, after eviction."""

    tokens: int  # of the prefix that are in the store now: as many as ``get`` would find
    new_tokens: int  # added by this put and still there
    new_bytes: int  # of their blocks
    pending_tokens: int = 0  # of blocks that others were writing still; ``get`` finds them once they are done


class PrefixStore:
    """A store of prefix caches in a folder, or in Redis for many machines; for many processes and threads at once.

    ``preset``: of the blocks' keys and values; "exact" keeps all numbers as they are. ``max_bytes``: a quota, as a number or
    such as "20GB", beyond which the least recently used prefixes are dropped (None: the quota that the folder has); a prefix
    that exceeds it alone is not stored, with a warning, and nothing is dropped for it. ``max_age``: seconds, or such as "30d",
    after which what was not used is neither found nor kept (None: what the folder has). ``tenant``: a salt; a store opened with
    another one finds no prefix of this one's, and keyed hashes are stored in place of token ids. ``tenant_max_bytes`` and
    ``tenant_max_age``: the same limits for this tenant's prefixes alone, beside those of the store; whoever is over a quota
    loses prefixes of its own (``Shelf.evict``). ``tokenizer``: makes its vocabulary part of a prefix's name. ``data``: a folder
    or URL (s3://...) for the files, to be passed whenever the store is opened, and for this store alone, since ``Shelf.gc``
    removes what it does not know there; the index stays in ``folder``, on a local disk or at an address of Redis
    ("redis://host:6379/0?store=NAME", see ``RedisIndex``). ``nonfinite``: "error", or "exact" to keep vectors with NaN or Inf
    as they are. ``shared``: other users may use the store, as far as the umask allows (by default its files are 0600 and its
    folders 0700). ``identity``: how much of a model's weights every call checks, "sampled" words or all ("full"); see
    ``Identity.of``. All else that a cache depends on is checked either way; ``engines.model_identity`` lists what is not
    detected. ``shelf``: damage, quota and leftover files.

    A folder that cannot be written can be read: ``get`` works, ``put`` raises OSError; so it is with ``read_only``. After a
    fork the child has a store of its own; saves in progress remain the parent's. Raises InvalidArgument, and as ``Shelf`` does.

    >>> import tempfile, torch
    >>> from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
    >>> model, ids = LlamaForCausalLM(LlamaConfig(**sizes)).eval(), torch.arange(300)[None] % 99
    >>> with tempfile.TemporaryDirectory() as folder, PrefixStore(folder, max_bytes=1 << 30) as store, torch.inference_mode():
    ...     cache = DynamicCache(config=model.config)
    ...     out = model(ids, past_key_values=cache)
    ...     stored = store.put(model, ids, cache)
    ...     kept, length = store.get(model, ids)
    ...     stored.tokens, length, kept.get_seq_length()
    (300, 299, 299)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        preset: str = DEFAULT_PRESET,
        max_bytes: int | str | None = None,
        max_age: float | str | None = None,
        tenant: str | None = None,
        tenant_max_bytes: int | str | None = None,
        tenant_max_age: float | str | None = None,
        tokenizer: Any = None,
        data: str | os.PathLike[str] | None = None,
        seed: int = 0,
        nonfinite: str = "error",
        backend: str = "auto",
        shared: bool = False,
        read_only: bool = False,
        identity: str = "sampled",
    ) -> None:
        if identity not in ("sampled", "full"):
            raise InvalidArgument(f"identity {identity!r}: 'sampled' or 'full' is expected")
        if tenant is not None and (not isinstance(tenant, str) or not tenant):
            raise InvalidArgument(f"tenant {tenant!r:.40}: a string is expected, a long random one; None keeps nobody apart")
        if tenant is None and (tenant_max_bytes, tenant_max_age) != (None, None):
            raise InvalidArgument("tenant_max_bytes and tenant_max_age are limits of a tenant, and tenant is not given")
        own = tenant_id_of(tenant or "")
        limits = {
            (name, whose): (size_of if name == "max_bytes" else seconds_of)(given, argument)
            for name, whose, argument, given in (
                ("max_bytes", None, "max_bytes", max_bytes),
                ("max_age", None, "max_age", max_age),
                ("max_bytes", own, "tenant_max_bytes", tenant_max_bytes),
                ("max_age", own, "tenant_max_age", tenant_max_age),
            )
            if given is not None
        }
        self._preset, self._exact, self._full = preset, preset == blocks.EXACT, identity == "full"
        if not self._exact:
            check_restores(preset, "a prefix store")
        self._recipe = Recipe(
            measured="none",
            preset=TAIL_PRESET if self._exact else preset,
            seed=seed,
            nonfinite=nonfinite,
            chunk_tokens=BLOCK_CHUNK,
            backend=backend,
        )
        self._tenant, self._tokenizer = tenant or "", "" if tokenizer is None else tokenizer_digest(tokenizer)
        self.shelf = Shelf(folder, data, shared=shared, read_only=read_only)
        self._index, self._files = self.shelf.index, self.shelf.files
        self._writer = ChainWriter(self.shelf, self._recipe, self._exact)
        for (name, whose), limit in limits.items() if self.shelf.denied is None else ():
            self._index.set_limit(name, limit, whose)
        self._forget_saves()
        _open_stores.add(self)

    @property
    def tenant_id(self) -> str:
        """The id of this store's tenant in its index, which does not tell the salt; "" without a tenant.

        ``pqcodec store stats`` shows what it holds, ``gc --tenant ID`` sets its limits.
        """
        return tenant_id_of(self._tenant)

    def _forget_saves(self) -> None:
        self._saver: ThreadPoolExecutor | None = None
        self._waiting: set[Future[Stored]] = set()
        self._lock = threading.Lock()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "a PrefixStore is not copied or pickled, for it has an open index and a thread: open "
            f"PrefixStore({str(self.shelf.place)!r}) again where it is wanted; many may be open at once, in any processes"
        )

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Wait for saves in the background, and close the index; later calls raise InvalidArgument."""
        self._finish_saves()
        self.shelf.close()

    def _finish_saves(self) -> None:
        with self._lock:
            saver, self._saver = self._saver, None
        if saver is not None:
            saver.shutdown()

    # -- getting -------------------------------------------------------------------------------------------------
    def get(
        self, model: Any, tokens: Any, *, extra: str = "", leave: int = 1, device: Any = None, stepwise: bool = False
    ) -> Prefix:
        """The cache of the longest stored prefix of ``tokens`` ([n] or [1, n]); an empty cache and 0 where there is none.

        ``leave``: tokens at the end that the prefix excludes, since a model has to be fed at least one (with 0, pass
        ``generate`` more tokens than the cache's: for these alone it raises InvalidArgument). ``extra``: what keys depend on
        beyond the tokens (such as the digest of an image), as in ``put``. ``device``: of the cache (None: the layers' own).

        A damaged block is dropped with a warning, and the prefix ends before it. Where the index cannot be read, nothing is
        found, with a warning. Some models (Jamba, Mamba) compute several tokens at once wrongly on top of a cache: their
        prefixes are found only if one token is left, or with ``stepwise``, a promise to feed the rest one by one. The module
        state of a model with M-RoPE is reset to that after text. Raises InvalidArgument for a model whose prefixes cannot be
        reused.
        """
        self._index.check_open()
        if not isinstance(leave, Integral) or leave < 0:
            raise InvalidArgument(f"leave={leave!r}: a number of tokens is expected, 1 or more to go on from the cache")
        identity, ids = self._identity(model), token_ids(tokens)
        behaviour = reuse.behaviour_of(model, identity, ids, extra)
        one_left = behaviour is not None and not behaviour.runs and not stepwise
        reuse.restore_text_state(model)
        longest = tc.longest_prefix(identity.config)
        if longest is not None and len(ids) > longest:
            return Prefix(tc.empty_cache(identity.config), 0)
        chain, target = self._chain(identity, extra), identity.target(device)
        import torch

        try:
            with torch.inference_mode(False):  # inference tensors could not be updated outside of that mode
                cache, length = self._found(identity, chain, ids, leave, target, one_left)
                return Prefix(reuse.beside(cache, model) if device is None and identity.spread else cache, length)
        except (OSError, CorruptStream) as error:  # of the index; unreadable blocks are handled before
            text = f"{self.shelf.place} cannot be read, so that nothing is found in it: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return Prefix(tc.empty_cache(identity.config), 0)

    def _found(self, identity: Identity, chain: Chain, ids: np.ndarray, leave: int, device: Any, one_left: bool) -> Prefix:
        unreadable: set[bytes] = set()
        while True:
            found = self._longest(chain, ids[: max(len(ids) - leave, 0)], unreadable)
            if expired := self.shelf.expired([row for row, _ in found], chain.tenant_id):
                unreadable |= expired
                continue
            if one_left and sum(count for _, count in found) < len(ids) - 1:
                found = []
            assembly, used = self._assembled(found, device)
            if len(used) == len(found) or not (found[-1][0].stateful or one_left):
                break
            unreadable.add(found[len(used)][0].name)  # without its tail a prefix has no state: look for a shorter one
        self._index.touch(used, gets=1, hits=int(bool(used)), asked_tokens=len(ids), found_tokens=assembly.tokens)
        cache = tc.cache_of(assembly.state()) if used else tc.empty_cache(identity.config)
        tc.tell_tokens(cache, assembly.tokens)
        tc.begin(cache, identity, self._preset if used else "")
        return Prefix(cache, assembly.tokens)

    def _assembled(self, found: Sequence[tuple[Row, int]], device: Any) -> tuple[blocks.Assembly, list[Row]]:
        """Decode blocks up to the first unreadable one; returns the assembly, and the rows of the decoded blocks."""
        tokens = sum(count for _, count in found)
        assembly = blocks.Assembly(tokens, device, self._recipe.backend)
        used = self._decoded(assembly, found)
        try:
            assembly.finish()
        except CorruptStream:  # decode block by block, to find the damaged one
            assembly = blocks.Assembly(tokens, device, self._recipe.backend, together=False)
            used = self._decoded(assembly, found)
        return assembly, used

    def _decoded(self, assembly: blocks.Assembly, found: Sequence[tuple[Row, int]]) -> list[Row]:
        """Decode blocks in order up to the first unreadable one, which is given up; returns the rows of the decoded blocks."""
        used: list[Row] = []
        if not found:
            return used
        with self._files.opening([row.file for row, _ in found]) as opened, ThreadPoolExecutor(threads()) as pool:

            def decode(file: PQKVFile | None, row: Row, count: int) -> blocks.Decoded:
                with file or opened(row.file) as at:
                    return assembly.decode(at, row, count)

            row = found[0][0]
            try:
                first = opened(row.file)
                assembly.lay_out(first, row)
                works: list[Callable[[], blocks.Decoded]]
                works = [partial(decode, None if number else first, *block) for number, block in enumerate(found)]
                if self._exact:  # exact blocks are read in parallel; streams are decoded together later
                    works = [pool.submit(work).result for work in works]
                for (row, _), work in zip(found, works, strict=True):
                    assembly.accept(work())
                    used.append(row)
            except (CorruptStream, UnsupportedStream, OSError) as error:
                pool.shutdown(cancel_futures=True)
                self.shelf.give_up(row, error)
        return used

    def _longest(self, chain: Chain, ids: np.ndarray, unreadable: Collection[bytes] = frozenset()) -> list[tuple[Row, int]]:
        """The blocks of the longest stored prefix of ``ids``, each with the number of its tokens that are used."""
        found: list[tuple[Row, int]] = []
        parent = chain.root
        while len(ids) - BLOCK_TOKENS * len(found) >= BLOCK_TOKENS:
            start = BLOCK_TOKENS * len(found)
            run = ids[start : start + BLOCK_TOKENS]
            row = self._index.find(chain.child(parent, run))
            known = row is not None and row.start == start and (chain.keyed or np.array_equal(row.tokens, run))
            if row is None or not known or row.name in unreadable:
                break
            found.append((row, BLOCK_TOKENS))
            parent = row.name
        best = self._best_child(chain, parent, ids, BLOCK_TOKENS * len(found), unreadable)
        if best is not None:
            return [*found, best]
        if not found or not found[0][0].stateful:
            return found
        for end in reversed(range(len(found))):  # state that cannot be cut is stored only in tails
            name = found[end - 1][0].name if end else chain.root
            best = self._best_child(chain, name, ids, BLOCK_TOKENS * end, unreadable)
            if best is not None:
                return [*found[:end], best]
        return []

    def _best_child(
        self, chain: Chain, parent: bytes, ids: np.ndarray, start: int, unreadable: Collection[bytes]
    ) -> tuple[Row, int] | None:
        """The child of ``parent`` that shares most tokens with ``ids`` from ``start`` on, and how many; None without any."""
        best: tuple[Row, int] | None = None
        rows = [row for row in self._index.children(parent) if row.start == start]
        marks = chain.marks(parent, ids[start : start + BLOCK_TOKENS] if rows else [])
        for row in rows:
            common = common_length(row.tokens, marks)
            if row.name in unreadable or (row.stateful and (row.whole or common < len(row.tokens))):
                continue
            if best is None or common > best[1]:
                best = (row, common)
        return best if best and (best[1] or best[0].stateful) else None

    # -- putting -------------------------------------------------------------------------------------------------
    def put(
        self, model: Any, tokens: Any, cache: Any, *, extra: str = "", pin: bool = False, wait: bool = True
    ) -> Stored | Future[Stored]:
        """Store the cache of ``tokens`` [n] or [1, n]; only blocks that are missing are encoded and written.

        A block that another thread, process or node is writing is left to it (``Stored.pending_tokens``), unless it gives up.
        ``tokens`` may be longer than the cache, as after ``generate``, which does not feed its last token. A cache is then
        taken for that of the first tokens: one that lost tokens in between looks the same, and must not be put. (A purely
        recurrent cache does not know its length: pass exactly what it has seen.) ``extra``: see ``get``. ``pin``: never evict
        the prefix.
        ``wait=False``: return a Future at once and save in the background, from the tensors as they are now; beyond
        ``PENDING`` waiting saves a put is skipped with a warning. A prefix larger than the quota is skipped with a warning.
        Raises InvalidArgument for a cache that cannot be kept, and OSError; what was stored before stays.
        """
        self._index.check_writable()
        work = self._work(model, tokens, cache, extra, pin)
        if wait:
            return self._write(work)
        with self._lock:
            self._waiting = {future for future in self._waiting if not future.done()}
            if len(self._waiting) >= PENDING:
                warnings.warn(
                    f"{PENDING} caches wait to be saved in {self.shelf.place}; this one is left out", RuntimeWarning, 2
                )
                skipped: Future[Stored] = Future()
                skipped.set_result(Stored(0, 0, 0))
                return skipped
            if self._saver is None:
                self._saver = ThreadPoolExecutor(1, thread_name_prefix="pqcodec-save")
            future = self._saver.submit(self._saved, replace(work, state=tc.frozen(work.state)))
            self._waiting.add(future)
        return future

    def generate(self, model: Any, input_ids: Any, *, extra: str = "", wait: bool = False, **options: Any) -> Any:
        """``model.generate`` for one prompt [1, n], from the longest stored prefix; stores the caches of prompt and answer.

        Saves happen in the background (``wait=True``: before it returns). ``options`` and the result are those of
        ``model.generate``. Raises InvalidArgument for more than one prompt, a mask with gaps, or unsupported options.
        """
        self._index.check_open()
        return generation.generate(self, model, input_ids, extra=extra, wait=wait, **options)

    def flush(self) -> None:
        """Wait for saves in the background; raises the error of a failed one."""
        self._index.check_open()
        with self._lock:
            waiting = list(self._waiting)
        for future in waiting:
            future.result()

    def _saved(self, work: PutWork) -> Stored:
        """``_write`` in the background, where an error is also a warning, since the Future may never be read."""
        try:
            return self._write(work)
        except Exception as error:
            warnings.warn(f"a cache of {len(work.ids)} tokens could not be saved: {error}", RuntimeWarning, stacklevel=2)
            raise

    def _work(self, model: Any, tokens: Any, cache: Any, extra: str, pin: bool) -> PutWork:
        identity, ids = self._identity(model), token_ids(tokens)
        behaviour = reuse.behaviour_of(model, identity, ids, extra)
        state, count = reuse.kept_state(cache, identity, self._preset, behaviour, len(ids))
        ids = ids[:count]
        label = str(getattr(identity.config, "model_type", "model"))
        return PutWork(identity, self._chain(identity, extra), label, ids, state, pin)

    def _identity(self, model: Any) -> Identity:
        identity = Identity.of(model, full=self._full)
        if not identity.weights:
            raise InvalidArgument("a config alone does not tell a model from others of its shape; pass the model")
        return identity

    def _chain(self, identity: Identity, extra: str) -> Chain:
        codec = {"preset": self._preset, "seed": self._recipe.seed, "block_tokens": BLOCK_TOKENS, "tail": TAIL_PRESET}
        return Chain(settings_of(identity, self._tokenizer, codec, extra), self._tenant)

    def _write(self, work: PutWork) -> Stored:
        done = self._writer.write(work)
        kept = [row for row in done.new if (now := self._index.find(row.name)) is not None and now.file == row.file]
        found = sum(count for _, count in self._longest(work.chain, work.ids))
        return Stored(found, sum(len(row.tokens) for row in kept), sum(row.size for row in kept), done.pending_tokens)

    # -- pinning -------------------------------------------------------------------------------------------------
    def pin(self, model: Any, tokens: Any, *, extra: str = "", pinned: bool = True) -> int:
        """Keep the longest stored prefix of ``tokens`` from eviction (``pinned=False``: release it); returns its length."""
        chain = self._chain(self._identity(model), extra)
        found = self._longest(chain, token_ids(tokens))
        if found:
            self._index.pin(found[-1][0], pinned)
        return sum(count for _, count in found)


# -- forks, and the end of the interpreter -------------------------------------------------------------------------
_open_stores: WeakSet[PrefixStore] = WeakSet()
_left_behind: list[Any] = []  # savers of the parent, whose threads do not exist in the child and must not be joined


def _after_fork() -> None:
    for store in list(_open_stores):
        _left_behind.append((store._saver, store._waiting))
        store._forget_saves()


def _at_exit() -> None:
    for store in list(_open_stores):
        store._finish_saves()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
if hasattr(threading, "_register_atexit"):  # finish saves while threads can be started; atexit is too late
    threading._register_atexit(_at_exit)
