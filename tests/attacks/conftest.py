from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
from attacks.ground import Ground


@pytest.fixture
def ground(tmp_path: Path) -> Any:
    return Ground(tmp_path)
