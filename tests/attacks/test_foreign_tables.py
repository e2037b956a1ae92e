"""Tried: an index with a stranger's triggers, views or tables, a journal that names a file. Must: it is made anew."""

from __future__ import annotations

import struct

import pytest

from attacks.ground import Ground

OBJECTS = [
    "CREATE TRIGGER t AFTER UPDATE ON blocks BEGIN UPDATE blocks SET file = '../../beside/precious'; END",
    "CREATE TRIGGER t AFTER INSERT ON counters BEGIN DELETE FROM blocks; END",
    "CREATE VIEW v AS SELECT * FROM blocks",
    "CREATE TABLE other (x)",
    "ALTER TABLE blocks ADD COLUMN more TEXT",
]


@pytest.mark.parametrize("statement", OBJECTS)
def test_objects_that_no_store_makes(ground: Ground, statement: str) -> None:
    found = ground.get()
    ground.change(statement)
    with pytest.warns(RuntimeWarning, match="was damaged and is set aside"):
        assert ground.get() == found
    ground.use_everything()


@pytest.mark.parametrize("statement", ["DROP TRIGGER removed", "DROP INDEX by_parent", "DELETE FROM counters"])
def test_objects_that_are_missing_are_made_again(ground: Ground, statement: str) -> None:
    found = ground.get()
    ground.change(statement)
    assert ground.get() == found
    ground.use_everything()


def test_a_view_in_the_place_of_the_blocks(ground: Ground) -> None:
    ground.change("ALTER TABLE blocks RENAME TO hidden")
    ground.change("CREATE VIEW blocks AS SELECT * FROM hidden")
    with pytest.warns(RuntimeWarning, match="was damaged"):
        assert ground.get() > 0
    ground.use_everything()


def test_a_journal_that_names_a_file_to_delete(ground: Ground) -> None:
    """A rollback journal ends with the name of another, which SQLite deletes when it has played the journal back."""
    name = str(ground.beside / "precious").encode()
    tail = struct.pack(">I", 0) + name + struct.pack(">II", len(name), sum(name)) + bytes.fromhex("d9d505f920a163d7")
    header = bytes.fromhex("d9d505f920a163d7") + struct.pack(">IIIII", 0, 0, 4, 512, 4096)
    (ground.folder / "index.sqlite-journal").write_bytes(header.ljust(512, b"\0") + tail)
    with pytest.warns(RuntimeWarning, match="was damaged"):
        assert ground.get() > 0
    assert not (ground.folder / "index.sqlite-journal").exists()
    ground.use_everything()


def test_sizes_whose_sum_no_number_holds(ground: Ground) -> None:
    total = ground.get()
    ground.change("UPDATE blocks SET size = ?", 2**62)
    assert ground.get() == total
    ground.use_everything()
