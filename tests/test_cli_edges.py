"""The command line's edges: completion, options that contradict each other, the line before a long first wait."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from test_cli import REFERENCE, coded, command, made, run, tensors  # noqa: F401 (fixtures)

import pqcodec
from pqcodec.errors import InvalidArgument
from pqcodec.formats import PQKVFile, PQKVWriter
from pqcodec.kernels.cpu.disk_cache import COMPILING


# -- completion --------------------------------------------------------------------------------------------------
def completed(*words: str) -> list[str]:
    """What a bash offers behind these words, of which the last is begun."""
    asked = {"_PQCODEC_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(("pqcodec", *words)), "COMP_CWORD": str(len(words))}
    return command(env=os.environ | asked).stdout.decode().split()


def test_words_are_completed() -> None:
    assert completed("enc") == ["encode"]
    assert completed("encode", "--pres") == ["--preset"]
    assert completed("encode", "--preset", "quad2.") == ["quad2.25", "quad2.5", "quad2.75"]
    assert completed("verify", "--backend", "re") == ["reference"]
    assert completed("convert", "--to", "p") == ["pqkv"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(shell: str) -> None:
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    assert b"_PQCODEC_COMPLETE" in command("--show-completion", shell, env=environment).stdout


# -- options that contradict each other ----------------------------------------------------------------------------
def test_decode_heeds_to_or_refuses_it(coded: Path, tmp_path: Path) -> None:  # noqa: F811
    refused = run("decode", coded, tmp_path / "o.npz", "--to", "npy", *REFERENCE, code=2).stderr
    assert "--to npy and OUTPUT" in refused
    assert not (tmp_path / "o.npz").exists()
    run("decode", coded, tmp_path / "o.npz", "--to", "NPZ", *REFERENCE)
    run("decode", coded, coded, tmp_path / "none", "--to", "npz", *REFERENCE, code=2)  # both would be c.npz


# -- a full disk -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["o.safetensors", "o.npz", "o.zarr"])
def test_a_full_disk_is_named(coded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:  # noqa: F811
    pytest.importorskip("zarr") if name == "o.zarr" else None

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    verb, *options = ["convert"] if name == "o.zarr" else ["decode", *REFERENCE]
    assert f"{tmp_path / name}: No space left on device" in run(verb, coded, tmp_path / name, *options, code=4).stderr
    assert not list(tmp_path.glob("*o.*"))


# -- what a writer refuses ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("rel_mse", [-1, float("nan"), float("inf"), True, "0.1"])
def test_an_error_that_no_tensor_can_have_is_not_written(rel_mse: float, tmp_path: Path) -> None:
    stream = pqcodec.encode(np.ones((4, 64), np.float16), backend="reference")
    with PQKVWriter(tmp_path / "c.pqkv") as writer:
        with pytest.raises(InvalidArgument, match="a finite number from 0 is expected"):
            writer.add_stream("k", stream, rel_mse=rel_mse)
        writer.add_stream("k", stream, rel_mse=0.5)
    with PQKVFile(tmp_path / "c.pqkv") as file:
        assert file.entry("k").rel_mse == 0.5


# -- the line before a long first wait -----------------------------------------------------------------------------
def test_what_is_compiled_already_is_not_told(coded: Path, tmp_path: Path) -> None:  # noqa: F811
    for name in ("a.npz", "b.npz"):
        told = command("decode", coded, tmp_path / name).stderr.decode()
    assert COMPILING not in told
    assert (
        COMPILING
        not in command("verify", coded, *REFERENCE, env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}).stderr.decode()
    )
