"""Tried: a table whose checks take a second for each row when SQLite looks for damage. Must: they are never worked out."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing

from attacks.ground import Ground


def test_checks_of_a_foreign_table(ground: Ground) -> None:
    total = ground.get()
    with closing(sqlite3.connect(ground.folder / "index.sqlite", isolation_level=None)) as db:
        db.execute("CREATE TABLE other (x, CHECK (length(hex(zeroblob(300000000 + x))) > 0))")
        db.execute("PRAGMA ignore_check_constraints = ON")
        db.executemany("INSERT INTO other VALUES (?)", [(x,) for x in range(40)])
    start = time.monotonic()
    assert ground.get() == total  # its index is made anew
    assert time.monotonic() - start < 20
    ground.use_everything()
