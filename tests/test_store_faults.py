"""Random faults of disks, indexes and processes while a store works: what is found afterwards is right, and the store is sound.

``python tests/test_store_faults.py --sequences 2000 --seed 1`` runs many; a sample runs with the tests. Files that vanish,
disks that are full or broken, locked and damaged indexes, and writers that are killed are met at random places of random work.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

pytest.importorskip("transformers")
import torch
from conftest import sampled
from store_stress import MODEL, cache_of, expected, tokens_of, wrong

from pqcodec.errors import PQError
from pqcodec.formats.containers.pqkv.file import PQKVWriter
from pqcodec.formats.places import atomic
from pqcodec.formats.store import PrefixStore, writing
from pqcodec.formats.store.connections import Connections
from pqcodec.formats.store.files import BlockFiles

PROMPTS = ("0", "0.1", "0.1.2", "0.2", "3", "3.1")
SAMPLE = 200
SYSTEM = (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS)
SQLITE = ("database is locked", "disk I/O error", "database or disk is full", "attempt to write a readonly database")
MALFORMED = 0.03  # of the faults of an index


class Faults:
    """Faults at random calls; ``share`` of them fail, before or after they have done their work."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.share = rng, 0.0
        self.met: Counter[str] = Counter()

    def meet(self, place: str, weight: float = 1) -> bool:
        hit = self.rng.random() < self.share * weight
        self.met[place] += hit
        return hit

    def of_system(self, place: str, weight: float = 1) -> None:
        if self.meet(place, weight):
            code = self.rng.choice(SYSTEM)
            raise OSError(code, os.strerror(code))

    def of_index(self, place: str, weight: float = 1) -> None:
        if self.meet(place, weight):
            if self.rng.random() < MALFORMED:
                raise sqlite3.DatabaseError("database disk image is malformed")
            raise sqlite3.OperationalError(self.rng.choice(SQLITE))

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """They are met inside the block."""
        with contextlib.ExitStack() as stack:
            for where, name in ((PQKVWriter, "_write"), (atomic, "_sync"), (BlockFiles, "remove")):
                stack.enter_context(patch.object(where, name, self._system(getattr(where, name), name)))
            stack.enter_context(patch.object(BlockFiles, "open", self._opening(BlockFiles.open)))
            stack.enter_context(patch.object(Connections, "select", self._selecting(Connections.select)))
            stack.enter_context(patch.object(Connections, "changing", self._changing(Connections.changing)))
            yield

    def _system(self, work: Any, name: str) -> Any:
        def faulty(*arguments: Any) -> Any:
            weight = 0.1 if name == "_write" else 1  # there are many
            self.of_system(f"{name}, before", weight)
            done = work(*arguments)
            self.of_system(f"{name}, after", weight)
            return done

        return faulty

    def _opening(self, work: Any) -> Any:
        def faulty(files: BlockFiles, file: str) -> Any:
            self.of_system("open")
            if self.meet("vanish"):
                Path(files.location, file).unlink(missing_ok=True)
            return work(files, file)

        return faulty

    def _selecting(self, work: Any) -> Any:
        def faulty(*arguments: Any) -> Any:
            self.of_index("select", 0.1)  # there are many
            return work(*arguments)

        return faulty

    def _changing(self, work: Any) -> Any:
        @contextlib.contextmanager
        def faulty(*arguments: Any, **options: Any) -> Iterator[Any]:
            self.of_index("begin")
            with work(*arguments, **options) as db:
                yield db
                self.of_index("commit")
            self.of_index("after the commit")

        return faulty


def right(store: PrefixStore, name: str) -> int:
    """Tokens that are found, which have to be those that were put, bit for bit."""
    cache, length = store.get(MODEL, tokens_of(name), leave=0)
    fault = wrong(cache, length, expected(name), exact=True)
    assert not fault, f"{name}: {fault}"
    return int(length)


def put(store: PrefixStore, name: str, **options: Any) -> Any:
    return store.put(MODEL, tokens_of(name), cache_of(expected(name)), **options)


def act(store: PrefixStore, rng: random.Random) -> None:
    """Something that a user does; getting never raises, all else says what is wrong by an expected error."""
    name, chance = rng.choice(PROMPTS), rng.random()
    if chance < 0.4:
        right(store, name)
        return
    with contextlib.suppress(PQError, OSError):
        if chance < 0.75:
            done = put(store, name, pin=rng.random() < 0.1)
            assert done.tokens <= len(tokens_of(name))
            assert done.pending_tokens or done.new_tokens <= done.tokens
        elif chance < 0.85:
            put(store, name, wait=False)
            store.flush()
        elif chance < 0.9:
            store.shelf.index.set_limit("max_bytes", rng.choice([None, 100_000, 400_000]))
            store.shelf.evict()
        elif chance < 0.95:
            store.shelf.gc(grace=0)
        else:
            store.pin(MODEL, tokens_of(name), pinned=rng.random() < 0.5)


def killed(folder: Path, rng: random.Random) -> None:
    """Another process works on the store until it is killed, at any moment."""
    seed, wait = rng.random(), rng.expovariate(1 / 0.01)
    child = os.fork()
    if not child:
        try:
            own = random.Random(seed)
            with PrefixStore(folder, preset="exact") as store:
                while True:
                    act(store, own)
        finally:
            os._exit(1)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@patch.multiple(writing, LEASE=0.2, PATIENCE=1.0)  # so that a put waits for what killed writers have leased
def sequence(folder: Path, seed: object) -> Counter[str]:
    """One store from its making to its check; returns the faults that were met."""
    rng = random.Random(f"faults {seed}")
    faults = Faults(rng)
    with warnings.catch_warnings(), faults.around():
        warnings.simplefilter("ignore")
        store: PrefixStore | None = None
        for _ in range(rng.randrange(4, 10)):
            faults.share = rng.choice([0, 0, 0.03, 0.1, 0.3])
            if store is None:
                with contextlib.suppress(PQError, OSError):
                    store = PrefixStore(folder, preset="exact")
            if store is not None:
                act(store, rng)
                if rng.random() < 0.2:
                    with contextlib.suppress(PQError, OSError):
                        store.close()
                    store = None
            if hasattr(os, "fork") and rng.random() < 0.05:
                faults.share = 0
                killed(folder, rng)
        faults.share = 0
        if store is not None:
            store.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(folder)
    return faults.met


def check(folder: Path) -> None:
    """It opens, all that is found is right, it is sound once it is tidied up, and takes what is put."""
    with PrefixStore(folder, preset="exact") as store:
        for name in PROMPTS:
            right(store, name)
        store.shelf.gc(grace=0)
        rows = store.shelf.index.all()
        assert [problem for row in rows for problem in store.shelf.problems(row)] == []
        there = {str(path.relative_to(folder / "blocks")): path for path in (folder / "blocks").rglob("*") if path.is_file()}
        assert set(there) == {row.file for row in rows}
        size = sum(row.size for row in rows)
        assert size == store.shelf.index.counters()["bytes"] == sum(path.stat().st_size for path in there.values())
        store.shelf.index.set_limit("max_bytes", None)
        for name in PROMPTS:
            assert put(store, name).tokens == len(tokens_of(name)) == right(store, name)


def place() -> Any:
    """A folder in memory where the system has one: many syncs would wait for a disk."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None, prefix="pqcodec-faults-")


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("part", sampled(range(4)))
def test_faults_anywhere_never_make_a_wrong_cache(part: int) -> None:
    torch.set_num_threads(1)
    met: Counter[str] = Counter()
    with place() as folder:
        for number in range(part, SAMPLE, 4):
            met += sequence(Path(folder, str(number)), number)
            shutil.rmtree(Path(folder, str(number)), ignore_errors=True)
    assert len(met) >= 8, met


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    met: Counter[str] = Counter()
    broken = 0
    with place() as folder:
        for number in range(options.sequences):
            try:
                met += sequence(Path(folder, str(number)), f"{options.seed} {number}")
            except Exception:
                broken += 1
                print(f"sequence {number} of seed {options.seed}:\n{traceback.format_exc()}", file=sys.stderr)
            shutil.rmtree(Path(folder, str(number)), ignore_errors=True)
    print({"sequences": options.sequences, "broken": broken, "faults": dict(met)})
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
