"""Tried: rows of an index whose file is a path out of the store. Must: the row is dropped with a warning, no file touched."""

from __future__ import annotations

import os
from typing import Any

import pytest

from attacks.ground import Ground

NAMES: dict[str, Any] = {
    "above": "../../beside/precious",
    "above, as a block": "../../beside/precious.pqkv",
    "absolute": "{beside}/precious",
    "a folder": "../../beside/folder",
    "of another block": "{other}",
    "a URL": "file://{beside}/precious",
    "the index": "../index.sqlite",
    "nothing": "",
    "a zero byte": "ab/\0",
    "half of a surrogate pair": b"\xff\xfe",
    "a number": 7,
}


@pytest.mark.parametrize("what", NAMES)
def test_a_row_names_another_file(ground: Ground, what: str) -> None:
    name = NAMES[what]
    if isinstance(name, str):
        other = os.path.join(*next(ground.blocks()).parts[-2:])
        name = name.format(beside=ground.beside, other=other)
    ground.change("UPDATE blocks SET file = ?", name)
    with pytest.warns(RuntimeWarning, match="a row was dropped that no store writes"):
        ground.get()
    ground.check_beside()
    ground.change("UPDATE blocks SET file = ?", name)
    ground.use_everything()


@pytest.mark.parametrize(
    "column", ["parent", "root", "tokens", "start", "whole", "stateful", "size", "created", "used", "hits", "pinned"]
)
@pytest.mark.parametrize("value", [None, -1, 2**62, "text", b"bytes", b"", float("inf")], ids=repr)
def test_a_row_holds_what_no_store_writes(ground: Ground, column: str, value: Any) -> None:
    ground.change(f"UPDATE OR IGNORE blocks SET {column} = ?", value)
    ground.use_everything()


@pytest.mark.parametrize("value", ["text", b"bytes", 1.5])
def test_counters_and_roots_that_are_none(ground: Ground, value: Any) -> None:
    for statement in ("UPDATE counters SET value = ?", "UPDATE roots SET settings = ?", "UPDATE roots SET label = ?"):
        ground.change(statement, value)
        ground.use_everything()
        ground.put()
