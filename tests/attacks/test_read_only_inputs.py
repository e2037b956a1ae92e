"""Tried: inputs that nobody may write (0444), as an ordinary user. Must: outputs are written, and can be removed again."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from attacks.ground import Ground


@pytest.fixture(autouse=True)
def ordinary_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system refuses to others than root: a file without its owner's bit for writing opens for reading only."""
    system_open = os.open

    def refusing(path: Any, flags: int, *more: Any, **options: Any) -> int:
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        if writes and os.path.exists(path) and not os.stat(path).st_mode & stat.S_IWUSR:
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return system_open(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.parametrize("mode", [0o444, 0o400])
@pytest.mark.parametrize("name", ["kv.pqkv", "kv.safetensors", "kv.zarr", "new/"])
def test_outputs_of_inputs_that_are_read_only(ground: Ground, mode: int, name: str) -> None:
    plain, out = ground.out / "x.npz", f"{ground.out}/{name}"
    np.savez(plain, **{"layers.0.key": np.ones((1, 8, 64), np.float16)})
    plain.chmod(mode)
    assert ground.run("encode", plain, out).exit_code == 0
    found = [path for path in Path(out).rglob("*")] or [Path(out)]
    assert {stat.S_IMODE(path.stat().st_mode) for path in found if path.is_file()} == {mode}
    folders = [path for path in (Path(out), *found) if path.is_dir()]
    assert all(path.stat().st_mode & 0o700 == 0o700 for path in folders)
