"""Tried: random edits of index, files, listings and archives. Must: no file beside the store changes, no command breaks.

``python -m tests.attacks --edits 1000`` tries more of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from attacks.edits import tried


@pytest.mark.parametrize("seed", range(30))
def test_an_edit(tmp_path: Path, seed: int) -> None:
    tried(f"of the tests {seed}", tmp_path)
