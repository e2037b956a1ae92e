"""Tried: a link to nothing where an output will be called so. Must: nothing is made behind it unless the user says --force."""

from __future__ import annotations

import pytest

from attacks.ground import Ground


@pytest.mark.parametrize("name", ["x.safetensors", "x.npz"])
def test_a_link_to_nothing(ground: Ground, name: str) -> None:
    (ground.out / "x.pqkv").write_bytes(ground.first().read_bytes())
    (ground.out / name).symlink_to(ground.beside / "new")
    result = ground.run("decode", ground.out / "x.pqkv", ground.out / name)
    assert result.exit_code == 2
    assert "is a link to" in result.output
    ground.check_beside()
