"""Tried: reading the prompts of a tenant from the store's files. Must: none lies there, and their prefixes are found."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_stress import MODEL, cache_of, expected, tokens_of

from attacks.ground import PROMPTS, Ground
from pqcodec.formats import PQKVFile, PrefixStore
from pqcodec.formats.store import blocks
from pqcodec.formats.store.keys import Chain

SALT = "a long salt"


def holds_ids(folder: Path, prompt: str = PROMPTS[0]) -> bool:
    """Whether eight of a prompt's token ids lie one behind the other in any file of a store."""
    run = np.asarray(tokens_of(prompt)[:8], "<i8").tobytes()
    return any(run in path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_no_ids_lie_in_the_store(tmp_path: Path) -> None:
    plain, salted = Ground(tmp_path / "plain"), Ground(tmp_path / "salted", tenant=SALT)
    assert holds_ids(plain.folder)
    assert not holds_ids(salted.folder)
    for prompt in (*PROMPTS, "0.2"):
        assert salted.get(prompt) == plain.get(prompt)
    longer = np.concatenate([tokens_of(PROMPTS[1])[:-5], [99] * 50])  # ends inside a block
    for ground in (plain, salted):
        with PrefixStore(ground.folder, **ground.options) as store:
            assert store.get(MODEL, longer).length == len(tokens_of(PROMPTS[1])) - 5
            assert store.put(MODEL, tokens_of("0.1"), cache_of(expected("0.1"))).new_tokens == 0
    salted.options["tenant"] = "another salt"
    assert salted.get() == 0


def test_what_a_tenant_exports_and_imports(tmp_path: Path) -> None:
    ground = Ground(tmp_path, tenant=SALT)
    total = ground.get()
    ground.run("store", "export", "--all", ground.folder, ground.out / "exported")
    assert not holds_ids(ground.out / "exported")
    ground.folder = ground.out / "new"
    ground.run("store", "import", "--trust", ground.folder, ground.out / "exported")
    assert ground.get() == total
    ground.run("store", "verify", ground.folder)
    (ground.folder / "index.sqlite").unlink()
    with pytest.warns(RuntimeWarning, match="found again"):
        assert ground.get() == total
    ground.use_everything()


def with_ids(folder: Path, tenant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store as the version before wrote it: ids in the index and in the files, nothing said of marks."""
    with monkeypatch.context() as patch:
        patch.setattr(Chain, "marks", lambda self, parent, tokens: np.ascontiguousarray(tokens, "<i8"))
        write = blocks.write_block

        def old_write(*arguments: Any) -> int:
            about = {key: value for key, value in arguments[-1].items() if key != "marked"}
            return write(*arguments[:-1], about)

        patch.setattr(blocks, "write_block", old_write)
        with PrefixStore(folder, preset="exact", tenant=tenant or None) as store:
            for prompt in PROMPTS:
                store.put(MODEL, tokens_of(prompt), cache_of(expected(prompt)))
    with closing(sqlite3.connect(folder / "index.sqlite", isolation_level=None)) as db:
        db.execute("DELETE FROM places WHERE name = 'tenants'")


@pytest.mark.parametrize("tenant", ["", SALT])
@pytest.mark.parametrize("index", ["kept", "lost"])
def test_a_store_of_the_version_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tenant: str, index: str) -> None:
    """Whole blocks are found; the index forgets the ids of tenants, and with them the beginnings of tails."""
    ground = Ground(tmp_path / "new", tenant=tenant or None)
    total = ground.get()
    shutil.rmtree(ground.folder)
    with_ids(ground.folder, tenant, monkeypatch)
    assert holds_ids(ground.folder)
    if index == "lost":
        (ground.folder / "index.sqlite").unlink()
        with pytest.warns(RuntimeWarning, match="found again"):
            ground.get()
    assert ground.get() == (total // 256 * 256 if tenant else total)
    with PQKVFile(next(ground.blocks())) as file:
        assert file.decode(blocks.TOKENS).min() >= 0
    if tenant:
        shutil.rmtree(ground.folder / "blocks")
        assert not holds_ids(ground.folder)
    else:
        ground.put()
        ground.run("store", "verify", ground.folder)


def test_rows_that_the_version_before_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their ids lie in pages that are free, where SQLite was not built to overwrite them."""
    with_ids(tmp_path, SALT, monkeypatch)
    with closing(sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)) as db:
        db.execute("PRAGMA secure_delete = OFF")
        db.execute("DELETE FROM blocks WHERE name > x''")
    shutil.rmtree(tmp_path / "blocks")
    assert holds_ids(tmp_path)
    PrefixStore(tmp_path, tenant=SALT).close()
    assert not holds_ids(tmp_path)
