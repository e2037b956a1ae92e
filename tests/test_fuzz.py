"""Every input that fuzzing kept, short random sessions of each target and coding, edits of each container (``tests/fuzz``)."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import fuzz
import pytest

from pqcodec.codings.declared import DECLARED
from pqcodec.errors import CorruptStream

INPUTS = int(os.environ.get("PQCODEC_FUZZ_INPUTS", "250"))  # of a random session
EDITS = int(os.environ.get("PQCODEC_FUZZ_EDITS", "300"))
NEEDS = {"zarr": "zarr", "zarr-cache": "zarr"}  # target or container -> what it needs beside pqcodec

# What is known and not mended yet: an input under found/ -> the fault that it shows. An entry leaves with the fault, its input
# stays.
OPEN: dict[str, str] = {}


def kept(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def needed(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])


def kind(ended: str) -> str:
    """A signature without its lines, which move."""
    return re.sub(r" \S+\.py:\d+", "", ended)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_inputs_that_were_kept_are_read_or_refused(name: str) -> None:
    needed(name)
    fuzz.warm(name)
    session = fuzz.Session(name, strict=True)
    for path in kept(fuzz.FOLDER / name):
        session.run(path.read_bytes())
        assert session.found == {}, path.name
    assert session.reached["read"] >= 3
    assert session.reached.total() - session.reached["read"] >= 3


def found() -> list[Any]:
    paths = [path.relative_to(fuzz.FOLDER / "found") for path in kept(fuzz.FOLDER / "found")]
    marks = {name: pytest.mark.xfail(reason=fault, strict=True) for name, fault in OPEN.items()}
    return [pytest.param(path, id=str(path), marks=marks.get(str(path), ())) for path in paths]


@pytest.mark.parametrize("path", found())
def test_faults_that_were_found_are_mended(path: Path) -> None:
    needed(path.parts[0])
    fuzz.warm(path.parts[0])
    session = fuzz.Session(path.parts[0], strict=True)
    session.run((fuzz.FOLDER / "found" / path).read_bytes())
    assert session.found == {}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_a_random_session_finds_nothing_new(name: str) -> None:
    needed(name)
    fuzz.warm(name)
    known = fuzz.Session(name)
    for path in OPEN:
        if path.startswith(f"{name}/"):
            known.run((fuzz.FOLDER / "found" / path).read_bytes())
    session = fuzz.Session(name)
    inputs = list(fuzz.corpus(name).values())
    fuzz.random_session(session, inputs, random.Random(0), lambda session, _: session.executions >= len(inputs) + INPUTS)
    assert len(session.reached) > 5
    assert {kind(ended) for ended in session.found} <= {kind(ended) for ended in known.found}, session.found


@pytest.mark.parametrize("coding", fuzz.CODINGS)
def test_a_random_session_of_a_coding_finds_nothing_new(coding: str) -> None:
    fuzz.warm("stream")
    session = fuzz.Session("stream", coding=coding)
    inputs = session.inputs()
    assert all(fuzz.is_of(coding, data) for data in inputs)
    begun = Counter(map(session.run, inputs))
    assert begun["read"] > len(inputs) / 2
    fuzz.random_session(session, inputs, random.Random(0), lambda session, _: session.executions >= 2 * len(inputs) + INPUTS)
    assert session.found == {}
    assert session.reached["read"] > 2 * begun["read"] + INPUTS / 10


def test_every_coding_has_sessions_and_they_keep_to_it() -> None:
    assert sorted(fuzz.CODINGS.values()) == sorted(DECLARED)
    rng = random.Random(0)
    for coding in fuzz.CODINGS:
        inputs = fuzz.Session("stream", coding=coding).inputs()
        made = [fuzz.mutated("stream", rng.choice(inputs), rng, rng.choice(inputs), coding) for _ in range(200)]
        assert sum(fuzz.is_of(coding, data) for data in made) > 190


def test_the_command_runs_a_session_of_a_coding(tmp_path: Path) -> None:
    options = ["--coding", "sketch", "--seconds", "2", "--engine", "plain", "--findings", str(tmp_path)]
    command = [sys.executable, "-m", "tests.fuzz", "stream", *options, "--corpus", str(tmp_path / "corpus")]
    ran = subprocess.run(command, cwd=fuzz.FOLDER.parents[2], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"stream of sketch: 2 s, \d+ executions .* findings 0", ran.stdout)
    assert all(fuzz.is_of("sketch", path.read_bytes()) for path in (tmp_path / "corpus").iterdir())


@pytest.mark.parametrize("name", fuzz.CONTAINERS)
def test_random_edits_are_found(name: str) -> None:
    needed(name)
    told = fuzz.edits(name, EDITS, seed=0)
    assert told["faults"] == []
    assert told["refused"] > EDITS // 2
    assert sum(told["kinds"].values()) == EDITS
    assert set(told["kinds"]) == set(fuzz.EDITS)


# -- the harness itself --------------------------------------------------------------------------------------------
def test_what_is_no_refusal_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def read(data: bytes) -> None:
        if data[:1] == b"a":
            raise CorruptStream("refused")
        if data[:1] == b"b":
            raise KeyError("not refused")

    monkeypatch.setitem(fuzz.TARGETS, "fake", fuzz.Target(read, lambda data, rng, other: data, lambda data: data))
    session = fuzz.Session("fake", tmp_path)
    assert session.run(b"") == session.run(b"x") == "read"
    assert kind(session.run(b"a")) == "CorruptStream"
    assert session.found == {}
    assert kind(session.run(b"b1")) == kind(session.run(b"b2")) == "KeyError"
    assert list(session.found.values()) == [b"b1"]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"b1"]


class Summed:
    """A file of some bytes and their CRC-32; ``loose``: one whose CRC is not looked at."""

    names, metadata, loose = (), b"", False

    def __init__(self, data: bytes) -> None:
        self.metadata = data[:-4]
        if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little") and not self.loose:
            raise CorruptStream("CRC")

    def __enter__(self) -> Summed:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Loose(Summed):
    loose = True


def test_what_is_no_damage_to_a_reader_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    body = bytes(range(100))
    sound = body + zlib.crc32(body).to_bytes(4, "little")
    for opened in (Summed, Loose):
        monkeypatch.setitem(fuzz.CONTAINERS, "fake", lambda opened=opened: fuzz.Container(sound, opened))
        told = fuzz.edits("fake", 200, seed=1)
        assert bool(told["undetected"]) == bool(told["faults"]) == opened.loose
        assert told["refused"] + told["unchanged"] + told["undetected"] + told["harmless"] == 200


def test_sealing_makes_checksums_hold() -> None:
    for name in ("stream", "pqkv", "safetensors", "zarr-cache"):
        target = fuzz.TARGETS[name]
        for path in kept(fuzz.FOLDER / name):
            data = path.read_bytes()
            try:
                target.read(data)
            except target.allowed:
                continue
            assert target.read(target.seal(data)) is None
    data = bytearray(fuzz.corpus("stream")["all-sections.pqs"])
    data[-20] ^= 1
    with pytest.raises(CorruptStream, match="checksum"):
        fuzz.TARGETS["stream"].read(bytes(data))
    fuzz.TARGETS["stream"].read(fuzz.TARGETS["stream"].seal(bytes(data)))
