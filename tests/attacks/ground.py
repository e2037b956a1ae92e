"""Law: the ground that attacks are tried on: a store of prefixes, a folder beside it that nobody may change, every command."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
import time
import traceback
import warnings
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from store_stress import MODEL, cache_of, expected, tokens_of, wrong
from typer.testing import CliRunner

from pqcodec.errors import PQError
from pqcodec.formats import PrefixStore
from pqcodec.tools.cli import app

PROMPTS = ("0", "0.1", "0.1.2")  # paths that share their beginnings: blocks, and a tail
EXPECTED_ERRORS = (PQError, OSError)


class Ground:
    """A store in ``folder`` that a stranger may change, ``beside`` it what they want to reach, ``out`` for what is written."""

    def __init__(self, place: Path, **options: Any) -> None:
        self.folder, self.beside, self.out = place / "store", place / "beside", place / "out"
        self.options = {"preset": "exact", **options}
        with PrefixStore(self.folder, **self.options) as store:
            for prompt in PROMPTS:
                store.put(MODEL, tokens_of(prompt), cache_of(expected(prompt)))
        self.beside.mkdir()
        self.out.mkdir()
        (self.beside / "precious").write_bytes(b"a letter that nobody else may read or remove")
        (self.beside / "precious.pqkv").write_bytes(next(self.blocks()).read_bytes())
        (self.beside / "folder").mkdir()
        (self.beside / "folder" / "kept").write_bytes(b"kept")
        self.before = self.print_of_beside()

    def blocks(self) -> Any:
        return iter(sorted((self.folder / "blocks").glob("*/*.pqkv")))

    def first(self) -> Path:
        """The file of the block that every prompt begins with."""
        (name,) = self.asked("SELECT file FROM blocks WHERE start = 0 AND whole = 1")[0]
        return self.folder / "blocks" / str(name)

    def asked(self, statement: str) -> list[tuple[Any, ...]]:
        with closing(sqlite3.connect(self.folder / "index.sqlite")) as db:
            return db.execute(statement).fetchall()

    def change(self, statement: str, *values: Any) -> None:
        """Change the index as a stranger would, who has no pipes and links there; raises OSError where there are some."""
        for path in self.folder.glob("index.sqlite*"):
            if not stat.S_ISREG(path.lstat().st_mode):
                raise OSError(f"{path.name} is no regular file")
        with closing(sqlite3.connect(self.folder / "index.sqlite", isolation_level=None)) as db:
            db.execute(statement, values)

    def print_of_beside(self) -> dict[str, tuple[int, str]]:
        """Mode and digest of everything beside the store."""
        found = {}
        for path in sorted([self.beside, *self.beside.rglob("*")]):
            mode = path.lstat().st_mode
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(mode) else ""
            found[str(path.relative_to(self.beside))] = (mode, digest)
        return found

    def check_beside(self) -> None:
        assert self.print_of_beside() == self.before

    # -- everything that people do with a store ------------------------------------------------------------------
    def get(self, prompt: str = PROMPTS[-1]) -> int:
        """Tokens that are found of a prompt; what is found is right."""
        with PrefixStore(self.folder, **self.options) as store:
            cache, length = store.get(MODEL, tokens_of(prompt), leave=0)
        assert not wrong(cache, length, expected(prompt), exact=True)
        return int(length)

    def put(self) -> None:
        with PrefixStore(self.folder, **self.options) as store:
            store.put(MODEL, tokens_of("2"), cache_of(expected("2")))

    def run(self, *arguments: object) -> Any:
        """A verb of the command line; whatever it meets, it ends with an exit code and a line, not with a traceback."""
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise AssertionError("".join(traceback.format_exception(result.exception)))
        assert result.exit_code in range(5), (arguments, result.exit_code, result.output)
        return result

    def use_everything(self) -> None:
        """Every use and command once, those that remove at the end; then nothing beside the store has changed."""
        start = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for use in (self.get, self.put):
                with suppress(*EXPECTED_ERRORS):
                    use()
            name = os.urandom(4).hex()
            for verb in (
                ("ls",),
                ("ls", "--blocks"),
                ("stats",),
                ("verify",),
                ("export", "--all", self.out / name),
                ("gc", "--older-than", 0),
                ("verify", "--drop"),
                ("gc", "--older-than", 0, "--max-bytes", 1000),
                ("rm", "--all", "--yes", "--force"),
            ):
                self.run("store", verb[0], self.folder, *verb[1:])
            self.run("store", "import", "--trust", self.folder, self.out / name)
        self.check_beside()
        assert time.monotonic() - start < 60  # nothing waits for ever
