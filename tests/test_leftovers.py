"""What writers that are ended leave beside an output: nothing after a signal; what SIGKILL left goes with the next save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pqcodec.formats.places import leftovers
from pqcodec.formats.places.atomic import replacing, replacing_folder

CALL = [sys.executable, "-m", "pqcodec.tools.cli"]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="process numbers are asked for on POSIX systems only")


def ended_process() -> int:
    """The number of a process that is gone."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    return process.pid


def name_of(final: Path, process: int, monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: process)
        return leftovers.temporary_name(final)


def test_what_a_dead_writer_left_goes_with_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, dead = tmp_path / "c.pqkv", ended_process()
    (tmp_path / (name_of(final, dead, monkeypatch) + ".part")).write_bytes(b"half")
    folder = tmp_path / (name_of(final, dead, monkeypatch) + ".part")
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "chunk").write_bytes(b"half")
    with replacing(final) as path:
        path.write_bytes(b"whole")
    assert [one.name for one in tmp_path.iterdir()] == ["c.pqkv"]


def test_what_may_be_alive_or_is_unknown_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, dead = tmp_path / "c.pqkv", ended_process()
    mine = leftovers.temporary_name(final) + ".part"
    with monkeypatch.context() as patch:  # of another machine, container or boot
        patch.setattr(leftovers, "_place", lambda: "00000000")
        other = name_of(final, dead, monkeypatch) + ".part"
    kept = [mine, other, ".c.pqkv.0123abcd.part", name_of(tmp_path / "d.pqkv", dead, monkeypatch) + ".part"]
    for name in kept:
        (tmp_path / name).write_bytes(b"half")
    with replacing(final) as path:
        path.write_bytes(b"whole")
    assert {one.name for one in tmp_path.iterdir()} == {*kept, "c.pqkv"}


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_was_set_aside_goes_or_comes_back(there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "c.zarr"
    aside = tmp_path / (name_of(final, ended_process(), monkeypatch) + ".old")
    aside.mkdir()
    (aside / "mark").write_text("old")
    if there:
        final.mkdir()
        (final / "mark").write_text("new")
    with pytest.raises(ZeroDivisionError), replacing_folder(final, "mark"):
        raise ZeroDivisionError
    assert [one.name for one in tmp_path.iterdir()] == ["c.zarr"]
    assert (final / "mark").read_text() == ("new" if there else "old")


def test_a_link_is_removed_without_what_it_leads_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, precious = tmp_path / "c.pqkv", tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    (tmp_path / (name_of(final, ended_process(), monkeypatch) + ".part")).symlink_to(precious)
    leftovers.remove_dead(final)
    assert [one.name for one in tmp_path.iterdir()] == ["precious"]
    assert (precious / "file").read_text() == "kept"


# -- signals -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "kv.npz"
    x = np.random.default_rng(0).standard_normal((1, 4, 256, 64)).astype(np.float16)
    np.savez(path, **{f"layers.{i}.{role}": x for i in range(12) for role in ("key", "value")})
    return path


@pytest.mark.parametrize(
    ("number", "name"), [("SIGTERM", "o.zarr"), ("SIGHUP", "o.zarr"), ("SIGINT", "o.zarr"), ("SIGHUP", "o.pqkv")]
)
def test_a_signal_leaves_nothing(number: str, name: str, plain: Path, tmp_path: Path) -> None:
    if name == "o.zarr":
        pytest.importorskip("zarr")
    which = getattr(signal, number)
    call = [*CALL, "encode", plain, tmp_path / name, "--backend", "reference"]

    def heed() -> None:
        """Let the signal reach the command: what `nohup` or a shell's background job starts would ignore it."""
        signal.signal(which, signal.SIG_DFL)

    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed) as process:
        while not any(tmp_path.iterdir()) and process.poll() is None:
            time.sleep(0.002)
        time.sleep(0.05)
        process.send_signal(which)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, b"pqcodec: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_nohup_is_respected() -> None:
    code = (
        "import signal, sys; from pqcodec.tools import cli; sys.argv = ['pqcodec', '--version']\n"
        "try: cli.main()\n"
        "except SystemExit: print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert ended.stdout.splitlines()[-1] == "True"
