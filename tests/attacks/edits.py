"""Law: random edits of what a store or an archive says, each followed by every command; nothing beside them may change.

``python -m tests.attacks --edits 1000 --seed 1`` prints a summary and exits with 1 where a file beside the store has changed, a
command ended in a traceback, or something wrong was found. A sample runs with the tests.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attacks.ground import EXPECTED_ERRORS, Ground
from pqcodec.errors import PQError
from pqcodec.formats import PQKVFile
from pqcodec.formats.containers import listing
from pqcodec.formats.containers.pqkv.file import write_pieces
from pqcodec.formats.containers.writer import pieces_of
from pqcodec.formats.store import blocks, transfer

COLUMNS = (
    "name",
    "parent",
    "root",
    "start",
    "tokens",
    "whole",
    "stateful",
    "file",
    "size",
    "created",
    "used",
    "hits",
    "pinned",
)
TABLES = {"blocks": COLUMNS, "roots": ("name", "label", "settings"), "counters": ("name", "value"), "places": ("name", "value")}


def hostile(rng: random.Random, ground: Ground) -> Any:
    """A value that no store writes, often the name of something beside it."""
    beside = ground.beside
    names = ["../../beside/precious", "../beside/precious.pqkv", f"{beside}/precious", f"{beside}", f"file://{beside}/precious"]
    names += [
        "..",
        ".",
        "",
        "/",
        "~",
        "a/../../../beside/precious",
        "ab/\0",
        "x" * 5000,
        "memory://x",
        "redis://x",
        "\\\\host\\x",
    ]
    others = [
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**63 - 1,
        1.5,
        float("inf"),
        b"",
        os.urandom(32),
        [],
        {},
        "\ud800",
        "__class__",
        "update",
    ]
    return rng.choice(names if rng.random() < 0.6 else others)


def own(path: Path, ground: Ground) -> bool:
    """Whether a path does not lead out of the store through a link, so that an edit changes the store and nothing else."""
    return path.resolve().is_relative_to(ground.folder.resolve())


def edit_row(rng: random.Random, ground: Ground) -> None:
    table = rng.choice([*TABLES, "blocks", "blocks", "blocks"])
    column, value = rng.choice(TABLES[table]), hostile(rng, ground)
    value = json.dumps(value) if isinstance(value, (list, dict)) else value
    some = "" if rng.random() < 0.5 else " WHERE name IN (SELECT name FROM blocks ORDER BY random() LIMIT 1)"
    if table == "places" or rng.random() < 0.1:
        ground.change("INSERT OR REPLACE INTO places VALUES (?, ?)", rng.choice(["data", "tenants", "shared"]), str(value))
    else:
        ground.change(f"UPDATE OR IGNORE {table} SET {column} = ?{some}", value)


def edit_bytes(rng: random.Random, ground: Ground) -> None:
    """Bytes of any file of the store."""
    files = [path for path in ground.folder.rglob("*") if own(path, ground) and path.is_file() and path.stat().st_size]
    with open(rng.choice(files), "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(rng.randrange(size))
        file.write(os.urandom(rng.choice([1, 4, 64, 4096])))


def edit_kind(rng: random.Random, ground: Ground) -> None:
    """A link, a pipe or a folder in the place of something."""
    places = [path for path in ground.folder.rglob("*") if own(path.parent, ground)] + [
        ground.folder / "index.sqlite-journal",
        ground.folder / "index.sqlite-wal",
    ]
    path = rng.choice(places)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    target = rng.choice([ground.beside, ground.beside / "precious", ground.beside / "folder", ground.beside / "missing"])
    rng.choice([lambda: path.symlink_to(target), lambda: os.mkfifo(path), path.mkdir])()


def edited(value: Any, rng: random.Random, ground: Ground) -> Any:
    """A copy of a JSON value with one place of it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {str(hostile(rng, ground)) if k == key else k: v for k, v in value.items()}
        return {**value, key: edited(value[key], rng, ground)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        place = rng.randrange(len(value))
        return [edited(v, rng, ground) if i == place else v for i, v in enumerate(value)]
    found = hostile(rng, ground)
    return found if isinstance(found, (str, int, float, list, dict, bool, type(None))) and found != float("inf") else "odd"


def rewrite(path: Path, metadata: dict[str, Any]) -> None:
    """A .pqkv file with other metadata, sound in all else."""
    with PQKVFile(path.read_bytes()) as file:
        write_pieces(path, pieces_of(file), metadata)


def edit_block(rng: random.Random, ground: Ground) -> None:
    """What the file of a block says of itself."""
    path = rng.choice([path for path in ground.blocks() if own(path, ground) and path.is_file()])
    with PQKVFile(path.read_bytes()) as file:
        metadata = {blocks.KEY: edited(file.metadata[blocks.KEY], rng, ground)}
    rewrite(path, metadata)
    if rng.random() < 0.5:
        (ground.folder / "index.sqlite").unlink()


def edit_archive(rng: random.Random, ground: Ground) -> None:
    """What an exported prefix says of itself; it is imported into a new store."""
    ground.run("store", "export", "--all", ground.folder, ground.out / "archives", "--force")
    for path in (ground.out / "archives").glob("*.pqkv"):
        with PQKVFile(path.read_bytes()) as file:
            metadata = {transfer.KEY: edited(file.metadata[transfer.KEY], rng, ground)}
        rewrite(path, metadata)
        for verb in ("inspect", "verify"):
            ground.run(verb, path)
        ground.run("decode", path, ground.out / "archive.safetensors", "--force")
        ground.run("convert", path, ground.out / "archive.zarr", "--force")
    ground.run("store", "import", "--trust", ground.out / f"new {rng.random()}", ground.out / "archives")


def edit_listing(rng: random.Random, ground: Ground) -> None:
    """What a container says of its tensors, with a checksum that holds or does not; every command reads it."""
    source = next(ground.blocks())
    kind = rng.choice(["safetensors", "zarr"])
    path = ground.out / f"kv.{kind}"
    ground.run("convert", source, path, "--force")
    if kind == "zarr":
        place = path / "complete" / "zarr.json"
        document = json.loads(place.read_text())
        document["attributes"] = resealed(document["attributes"], None, rng, ground)
        place.write_text(json.dumps(document))
        if rng.random() < 0.2:
            edit_bytes(rng, _At(path))
    else:
        raw = path.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        tensors = [[name, x["dtype"], x["shape"]] for name, x in sorted(header.items()) if name != "__metadata__"]
        header["__metadata__"] = resealed(header["__metadata__"], tensors, rng, ground)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    for verb in ("inspect", "verify"):
        ground.run(verb, path)
    for target in ("back.safetensors", "back.npz"):
        ground.run("decode", path, ground.out / target, "--force")
    for target in ("back.pqkv", "back.zarr"):
        ground.run("convert", path, ground.out / target, "--force")


class _At:
    """A folder in the place of a store's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder


def resealed(values: dict[str, str], elsewhere: Any, rng: random.Random, ground: Ground) -> dict[str, str]:
    """A listing with a change in it, and mostly with the checksum that belongs to it."""
    tensors = edited(json.loads(values[listing.KEYS[2]]), rng, ground)
    try:
        made = listing.sealed_listing(tensors, values[listing.KEYS[3]], elsewhere, {})
    except (PQError, UnicodeError):
        return values
    return {**made, listing.KEYS[4]: "00000000"} if rng.random() < 0.1 else made


EDITS: dict[str, Callable[[random.Random, Any], None]] = {
    edit.__name__: edit for edit in (edit_row, edit_row, edit_bytes, edit_kind, edit_block, edit_archive, edit_listing)
}


def tried(seed: object, place: Path) -> str:
    """One to three edits of a new store, and all commands behind them; returns which edits. Raises AssertionError."""
    rng = random.Random(f"edit {seed}")
    ground = Ground(place, tenant=rng.choice([None, "salt"]))
    names = [rng.choice(list(EDITS)) for _ in range(rng.choice([1, 1, 2, 3]))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for name in names:
            try:
                EDITS[name](rng, ground)
            except (*EXPECTED_ERRORS, sqlite3.Error, IndexError, UnicodeError, StopIteration):
                pass  # an edit of what an earlier one has broken
        ground.use_everything()
    return " ".join(names)


def main(edits: int, first_seed: int) -> int:
    """Try many; returns how many went wrong."""
    done: Counter[str] = Counter()
    wrong = 0
    for seed in range(first_seed, first_seed + edits):
        with tempfile.TemporaryDirectory() as place:
            try:
                done[tried(seed, Path(place)).split()[0]] += 1
            except Exception as error:
                wrong += 1
                print(f"seed {seed}: {error!r}"[:2000], flush=True)
        if (seed - first_seed) % 50 == 49:
            print(f"{seed - first_seed + 1} of {edits}, {wrong} wrong", flush=True)
    print(json.dumps({"edits": edits, "wrong": wrong, "kinds of the first edit": done}))
    return wrong
