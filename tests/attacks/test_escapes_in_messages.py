"""Tried: labels and places that a terminal would obey. Must: they are escaped, in errors and warnings as well."""

from __future__ import annotations

import pytest

from attacks.ground import Ground

ESCAPE = "\x1b]0;title\x07\x1b[2J"


@pytest.mark.parametrize("statement", ["UPDATE roots SET label = ?", "INSERT OR REPLACE INTO places VALUES ('data', ?)"])
def test_what_an_index_says(ground: Ground, statement: str) -> None:
    ground.change(statement, ESCAPE)
    for words in (("ls",), ("stats",), ("verify",), ("rm", "--model", "x")):
        result = ground.run("store", words[0], ground.folder, *words[1:])
        assert "\x1b" not in result.output
