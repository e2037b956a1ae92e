"""Tried: exported prefixes whose metadata were forged. Must: a refusal by name (of right names, numbers are trusted)."""

from __future__ import annotations

from typing import Any

import pytest
from typer.testing import CliRunner

from attacks.edits import rewrite
from attacks.ground import Ground
from pqcodec.formats import PQKVFile
from pqcodec.formats.store import transfer
from pqcodec.tools.cli import app

FORGED: dict[str, tuple[str, Any]] = {
    "a name that is a path": ("name", "../../beside/precious"),
    "a root of another length": ("root", "00"),
    "a parent of itself": ("parent", "{name}"),
    "a beginning inside a block": ("start", 100),
    "a beginning before all": ("start", -256),
    "settings that are none": ("settings", "text"),
    "a label that is no text": ("label", 5),
    "more tokens than it has": ("whole", "yes"),
}


@pytest.mark.parametrize("what", FORGED)
def test_metadata_that_no_export_writes(ground: Ground, what: str) -> None:
    key, value = FORGED[what]
    ground.run("store", "export", "--all", ground.folder, ground.out / "exported")
    (path,) = (ground.out / "exported").glob("*.pqkv")
    with PQKVFile(path.read_bytes()) as file:
        chain = file.metadata[transfer.KEY]
    for block in chain["blocks"]:
        block[key] = value.format(name=block["name"]) if isinstance(value, str) and "{" in value else value
    rewrite(path, {transfer.KEY: chain})
    result = ground.run("store", "import", "--trust", ground.out / "new", path)
    assert result.exit_code == 1, result.output
    assert not list((ground.out / "new").rglob("*.pqkv"))
    ground.check_beside()


def test_help_says_whom_an_import_trusts() -> None:
    text = " ".join(CliRunner().invoke(app, ["store", "import", "--help"]).stdout.split())
    assert "Import only what you trust as you trust the model's weights" in text
