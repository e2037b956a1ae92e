"""A target at work: what it is given, how it ended, and what is kept."""

from __future__ import annotations

import contextlib
import faulthandler
import hashlib
import io
import mmap
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .base import (
    DEAD_SECONDS,
    FOLDER,
    GROWTH_BYTES,
    HANG_SECONDS,
    KEPT_BYTES,
    MAX_BYTES,
    ROOM_BYTES,
    ROOT,
    SLOW_SECONDS,
    Hang,
    signature,
)
from .codings import coding_seeds, is_of
from .seeds import corpus, seeds
from .table import TARGETS, mutated
from .targets import scratch


@dataclass
class Session:
    """Runs inputs through a target, counts, and keeps what is found."""

    name: str
    findings: Path | None = None  # a folder for what is found
    strict: bool = False  # measure time and memory here; ``guard`` does it for a whole process, and faster
    coding: str | None = None  # streams of it alone, as a rule
    found: dict[str, bytes] = field(default_factory=dict)  # signature -> the first input that gave it
    reached: Counter[str] = field(default_factory=Counter)  # how inputs ended
    executions: int = 0
    slowest: float = 0.0
    _resident: int = 0
    _armed: float = float("-inf")
    _last: mmap.mmap | None = None  # the input at work: if the process dies of it, the next one finds it there

    def guard(self) -> None:
        """Hold this process to a time and a memory for each input; for a process that does nothing else."""
        import resource

        signal.signal(signal.SIGALRM, _hang)
        faulthandler.enable()
        assert self.findings is not None
        self.findings.mkdir(parents=True, exist_ok=True)
        path = self.findings / ".at-work"
        before = path.read_bytes() if path.exists() else bytes(8)
        if size := int.from_bytes(before[:8], "little"):
            self._keep("died", before[8 : 8 + size])
        path.write_bytes(bytes(MAX_BYTES + 8))
        with open(path, "r+b") as file:
            self._last = mmap.mmap(file.fileno(), 0)
        with contextlib.suppress(OSError), open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * mmap.PAGESIZE
            resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM_BYTES, resource.RLIM_INFINITY))
        self._resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def inputs(self) -> list[bytes]:
        """Sound inputs, and what was kept of others, to begin with."""
        kept = [data for data in corpus(self.name).values() if is_of(self.coding, data)]
        return [*kept, *(coding_seeds(self.coding).values() if self.coding else ())]

    def close(self) -> None:
        """Nothing is at work any more."""
        faulthandler.cancel_dump_traceback_later()
        if self._last is not None:
            self._last[:8] = bytes(8)

    def run(self, data: bytes) -> str:
        """How an input ended: "read", or the signature of an error."""
        target, self.executions = TARGETS[self.name], self.executions + 1
        if self._last is not None:
            self._last[:8], self._last[8 : 8 + len(data)] = len(data).to_bytes(8, "little"), data
            signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
            if time.monotonic() > self._armed + HANG_SECONDS / 2:
                self._armed = time.monotonic()
                faulthandler.dump_traceback_later(DEAD_SECONDS, exit=True)
        if self.strict:
            tracemalloc.start()
        start, ended, allowed = time.perf_counter(), "read", True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", RuntimeWarning)  # numpy's overflows and NaN
                target.read(data)
        except target.allowed as error:
            ended = signature(error)
        except (Exception, Hang) as error:
            ended, allowed = signature(error), False
        finally:
            if self._last is not None:
                signal.setitimer(signal.ITIMER_REAL, 0)
        taken = time.perf_counter() - start
        self.slowest = max(self.slowest, taken)
        self.reached[ended] += 1
        taken_bytes = self._taken_bytes()
        if allowed and taken > SLOW_SECONDS and self._again(data) > SLOW_SECONDS:
            ended, allowed = f"slow: {ended}", False
        elif allowed and taken_bytes > GROWTH_BYTES:
            ended, allowed = f"memory: {ended}", False
        if not allowed:
            self._keep(ended, data)
        return ended

    def _again(self, data: bytes) -> float:
        """Seconds that an input takes when its tables are there and its kernels compiled."""
        start = time.perf_counter()
        with contextlib.suppress(*TARGETS[self.name].allowed):
            TARGETS[self.name].read(data)
        return time.perf_counter() - start

    def _taken_bytes(self) -> int:
        """Memory that the last input took."""
        if self.strict:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            return peak
        if self._last is None:
            return 0
        import resource

        before, self._resident = self._resident, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return 1024 * (self._resident - before) if self.executions > 100 else 0

    def _keep(self, ended: str, data: bytes) -> None:
        if ended in self.found:
            return
        self.found[ended] = data
        print(f"finding: {ended} ({len(data)} bytes)", flush=True)
        if self.findings:
            slug = re.sub(r"\W+", "-", ended)[:60].strip("-").lower()
            (self.findings / f"{slug}-{hashlib.sha256(data).hexdigest()[:8]}").write_bytes(data)

    def told(self, seconds: float, kept: int) -> str:
        rate = self.executions / max(seconds, 1e-9)
        counts = f"{self.executions} executions ({rate:.0f}/s), corpus {kept}, findings {len(self.found)}"
        name = f"{self.name} of {self.coding}" if self.coding else self.name
        return f"{name}: {seconds:.0f} s, {counts}, {len(self.reached)} ways to end, slowest {self.slowest:.2f} s"


def _hang(*_: object) -> None:
    raise Hang(f"{HANG_SECONDS} s")


Until = Callable[[Session, int], bool]  # told how many inputs there are


def random_session(session: Session, inputs: list[bytes], rng: random.Random, until: Until) -> list[bytes]:
    """Inputs and what comes of them; the list grows by those that end in a new way."""
    inputs, seen = list(inputs), set()
    for data in inputs:
        seen.add(session.run(data))
    while not until(session, len(inputs)):
        data = mutated(session.name, rng.choice(inputs), rng, rng.choice(inputs), session.coding)
        ended = session.run(data)
        if ended not in seen:
            seen.add(ended)
            inputs.append(data)
    return inputs


def _clock(seconds: float, every: float = 5.0) -> Until:
    """Tells when time is up, and meanwhile how things stand."""
    start = time.monotonic()
    due = [start + every]

    def up(session: Session, kept: int) -> bool:
        now = time.monotonic()
        if now >= due[0]:
            print(session.told(now - start, kept), flush=True)
            due[0] = now + every
        return now - start >= seconds

    return up


def warm(name: str) -> None:
    """Import and compile what a target needs, and fill what it caches."""
    for data in seeds(name).values():
        with contextlib.suppress(Exception):  # a session is to judge
            TARGETS[name].read(data)


def _plain_engine(session: Session, seconds: float, seed: int, folder: Path) -> None:
    warm(session.name)
    session.guard()
    inputs = [*session.inputs(), *(p.read_bytes() for p in sorted(folder.iterdir()))]
    kept = random_session(session, inputs, random.Random(seed), _clock(seconds))
    for data in kept[len(inputs) :]:
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
    session.close()
    print(session.told(seconds, len(kept)))


def _atheris_engine(session: Session, seconds: float, seed: int, folder: Path) -> None:
    """Coverage of pqcodec's Python decides what is kept; what numba compiles is left as it is."""
    import atheris

    package = ROOT / "pqcodec"
    compiled = [path for path in package.rglob("*.py") if re.search(r"^(import|from) numba", path.read_text(), re.MULTILINE)]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in compiled]
    with atheris.instrument_imports(include=["pqcodec"], exclude=names), contextlib.redirect_stderr(io.StringIO()):
        warm(session.name)
    inputs, begun = session.inputs(), Path(tempfile.mkdtemp(prefix="seeds-"))
    for i, data in enumerate(inputs):
        (begun / str(i)).write_bytes(data)
    up, start = _clock(seconds), time.monotonic()
    session.guard()

    def one(data: bytes) -> None:
        session.run(data)
        if session.executions % 32 == 0 and up(session, len(os.listdir(folder))):
            print(session.told(time.monotonic() - start, len(os.listdir(folder))), flush=True)
            session.close()
            for path in (scratch().parent, begun):
                shutil.rmtree(path, ignore_errors=True)
            os._exit(bool(session.found))  # the engine would go on

    def custom(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.25:
            new = atheris.Mutate(data, max_size)
            return TARGETS[session.name].seal(new)[:max_size] if rng.random() < 0.5 else new
        return mutated(session.name, bytes(data), rng, rng.choice(inputs), session.coding)[:max_size]

    options = ["-timeout=0", "-verbosity=0", f"-max_len={MAX_BYTES}", f"-seed={seed % (1 << 31) or 1}", "-rss_limit_mb=0"]
    options.append(f"-artifact_prefix={session.findings}/")
    atheris.Setup([sys.argv[0], *options, str(folder), str(begun)], one, custom_mutator=custom)
    atheris.Fuzz()


ENGINES = {"atheris": _atheris_engine, "plain": _plain_engine}


def _engine() -> str:
    from importlib.util import find_spec

    return "atheris" if find_spec("atheris") else "plain"


def distil(name: str, folder: Path, most: int) -> None:
    """Keep beside the tests the smallest inputs of a folder that end as none there does yet."""
    warm(name)
    session = Session(name, strict=True)
    for data in corpus(name).values():
        session.run(data)
    seen, kept = set(session.reached), 0
    for data in sorted((path.read_bytes() for path in folder.iterdir()), key=lambda data: (len(data), data)):
        if len(data) > KEPT_BYTES:
            break
        ended = session.run(data)
        if ended not in seen and ended not in session.found and kept < most:
            (FOLDER / name / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
            kept += 1
        seen.add(ended)
    print(f"{name}: {kept} of {len(seen)} ways to end are new")
