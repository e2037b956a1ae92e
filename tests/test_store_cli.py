"""``pqcodec store``: each verb, its exit codes, and prefixes that go from store to store."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from pqcodec import constants as c
from pqcodec.errors import PQError
from pqcodec.formats import PQKVFile, PrefixStore
from pqcodec.formats.containers.pqkv.file import write_pieces
from pqcodec.formats.containers.writer import pieces_of
from pqcodec.formats.store import blocks
from pqcodec.formats.store.folder import new_block_file
from pqcodec.formats.store.index import Row
from pqcodec.formats.store.shelf import Shelf
from pqcodec.formats.store.transfer import add_prefix
from pqcodec.tools.cli import app
from pqcodec.tools.store.place import models_of

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

A, B, C = (np.random.default_rng(n).integers(0, 100, size).tolist() for n, size in enumerate((600, 144, 300)))
PROMPTS = {"pq3": (A, A[:256] + B), "exact": (C,)}


def run(*arguments: object, code: int = 0) -> Any:
    """Run a verb of ``store`` and check its exit code."""
    result = CliRunner().invoke(app, ["store", *(str(a) for a in arguments)])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    assert "Traceback" not in result.stderr
    return result


def told(*arguments: object, code: int = 0) -> dict[str, Any]:
    """The JSON object that a verb prints; it is all that is on stdout."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 100}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


@pytest.fixture(scope="module")
def made(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three prefixes: two that share a block, of which one was got, and one that is kept exactly."""
    folder = tmp_path_factory.mktemp("made") / "store"
    for preset, prompts in PROMPTS.items():
        with PrefixStore(folder, preset=preset) as store, torch.no_grad():
            for tokens in prompts:
                store.put(model, tokens, model(torch.tensor([tokens])).past_key_values)
    with PrefixStore(folder, preset="pq3") as store:
        assert store.get(model, A).length == 599
        assert store.get(model, [99, 98, 97]).length == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "store"))


def rows(folder: Path) -> list[Row]:
    shelf = Shelf(folder)
    found = shelf.index.all()
    shelf.close()
    return found


def end_of(folder: Path, tokens: int) -> str:
    """The name of the prefix of so many tokens."""
    return next(one["name"] for one in told("ls", folder)["prefixes"] if one["tokens"] == tokens)


def damaged(folder: Path, row: Row) -> None:
    """A bit of a block's keys is turned."""
    path = folder / "blocks" / row.file
    with PQKVFile(path) as file:
        entry = file.entry(file.names[0])
    data = bytearray(path.read_bytes())
    data[entry.body_start + entry.body_bytes - 8] ^= 4
    path.write_bytes(data)


def numbers(cache: Any) -> list[bytes]:
    return [x.contiguous().numpy().tobytes() for layer in cache.layers for x in (layer.keys, layer.values)]


def rewritten(source: Path, target: Path, change: Any) -> Path:
    """An exported file whose "prefix.chain" was changed."""
    with PQKVFile(source) as file:
        metadata = json.loads(json.dumps(file.metadata))
        change(metadata["prefix.chain"])
        write_pieces(target, pieces_of(file), metadata)
    return target


# -- ls and stats ------------------------------------------------------------------------------------------------
def test_ls_tells_each_prefix(made: Path) -> None:
    found = told("ls", made)["prefixes"]
    assert [one["used"] for one in found] == sorted((one["used"] for one in found), reverse=True)
    about = {one["tokens"]: [one[k] for k in ("model", "preset", "own_blocks", "shared_blocks", "hits")] for one in found}
    assert about == {600: ["llama", "pq3", 2, 1, 1], 400: ["llama", "pq3", 1, 1, 0], 300: ["llama", "exact", 2, 0, 0]}
    sizes = {row.name.hex(): row.size for row in rows(made)}
    shared = next(row for row in rows(made) if row.tokens.tolist() == A[:256])
    assert sum(one["own_bytes"] for one in found) == sum(sizes.values()) - shared.size
    assert sum(one["bytes"] for one in found) == sum(sizes.values()) + shared.size
    assert all(one["complete"] and not one["pinned"] for one in found)
    text = run("ls", made).stdout
    assert all(one["name"][:12] in text for one in found)
    assert all(word in text for word in ("3 prefixes", "just now", "own bytes"))


def test_ls_tells_each_block(made: Path) -> None:
    found = told("ls", made, "--blocks")["blocks"]
    assert {one["name"] for one in found} == {row.name.hex() for row in rows(made)}
    assert sorted(one["tokens"] for one in found) == [[0, 256], [0, 256], [256, 300], [256, 400], [256, 512], [512, 600]]
    assert "512 to 599" in run("ls", made, "--blocks").stdout


def test_ls_marks_what_is_pinned_and_what_lost_its_beginning(folder: Path) -> None:
    shelf = Shelf(folder)
    shelf.index.pin(shelf.index.find(bytes.fromhex(end_of(folder, 300))), True)
    shelf.drop(next(row for row in shelf.index.all() if row.tokens.tolist() == A[256:512]))
    shelf.close()
    text = run("ls", folder).stdout
    assert [line.split()[0] for line in text.splitlines() if line.rstrip().endswith("pinned")] == [end_of(folder, 300)[:12]]
    assert text.count("without its beginning") == 1
    found = {one["tokens"]: (one["complete"], one["pinned"]) for one in told("ls", folder)["prefixes"]}
    assert found == {600: (False, False), 400: (True, False), 300: (True, True)}


def test_stats_tells_totals_and_use(made: Path) -> None:
    found = told("stats", made)
    assert (found["prefixes"], found["blocks"], found["tokens"]) == (3, 6, 600 + 144 + 300)
    assert found["bytes"] == sum(row.size for row in rows(made))
    assert found["plain_bytes"] == found["tokens"] * 2 * 2 * 64 * 4  # layers, keys and values, float32
    counters = {"gets": 2, "hits": 1, "asked_tokens": 603, "found_tokens": 599, "puts": 3, "evicted": 0, "damaged": 0}
    assert found["counters"] == counters
    each = {one["preset"]: (one["model"], one["prefixes"], one["hits"]) for one in found["models"]}
    assert each == {"pq3": ("llama", 2, 1), "exact": ("llama", 1, 0)}
    for one in found["models"]:
        of = [row for row in rows(made) if models_of(Shelf(made))[row.root][1] == one["preset"]]
        coordinates = sum(len(row.tokens) for row in of) * 2 * 2 * 64
        assert one["bits_per_coordinate"] == pytest.approx(8 * sum(row.size for row in of) / coordinates)
    text = run("stats", made).stdout
    assert all(word in text for word in ("50.0% found something", "99.3% found", "smaller", "━━━"))


def test_stats_draws_the_quota(folder: Path) -> None:
    assert told("stats", folder)["max_bytes"] is None
    run("gc", folder, "--max-bytes", "20GB")
    assert "of 20 GB, 0.0%" in run("stats", folder).stdout


def test_an_empty_store(tmp_path: Path) -> None:
    Shelf(tmp_path / "store").close()
    assert "0 prefixes" in run("ls", tmp_path / "store").stdout
    assert "-" in run("stats", tmp_path / "store").stdout
    assert told("stats", tmp_path / "store")["plain_bytes"] == 0
    assert "0 blocks, 0 B, all sound" in run("verify", tmp_path / "store").stdout
    run("gc", tmp_path / "store")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_terminal(made: Path, columns: int) -> None:
    for verb, wide_only in (("ls", "shared"), ("stats", "prefixes  tokens")):
        terminal, side = os.openpty()
        call = [sys.executable, "-m", "pqcodec.tools.cli", "store", verb, str(made)]
        environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm"}
        with subprocess.Popen(call, stdout=side, env=environment) as process:
            os.close(side)
            text = b""
            while part := _read(terminal):
                text += part
        os.close(terminal)
        assert process.returncode == 0
        lines = re.sub(r"\x1b\[[0-9;]*m", "", text.decode()).splitlines()
        table = lines[-4 if verb == "ls" else -3 :]
        assert table[0].startswith(("prefix ", "model "))
        assert max(map(len, table)) <= columns
        assert "…" not in "".join(table)
        assert (wide_only in table[0]) == (columns > 100)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other side is closed
        return b""


# -- gc ----------------------------------------------------------------------------------------------------------
def test_gc_removes_leftovers(folder: Path) -> None:
    leftover = folder / "blocks" / "ab" / f"{'ab' * 32}-{'0' * 12}.pqkv"
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(b"half")
    (folder / "blocks" / rows(folder)[-1].file).unlink()
    done = told("gc", folder)
    assert (done["orphans"], done["missing"], done["evicted_bytes"]) == (0, 1, 0)
    assert "1 leftover files and 0 blocks" in run("gc", folder, "--older-than", 0).stdout
    assert not leftover.exists()
    assert len(rows(folder)) == 5


def test_gc_sets_the_quota(folder: Path) -> None:
    whole = told("gc", folder)["bytes"]
    limit = whole // 2
    done = told("gc", folder, "--max-bytes", limit)
    assert done["max_bytes"] == limit
    assert done["bytes"] + done["evicted_bytes"] == whole
    assert done["bytes"] == sum(row.size for row in rows(folder)) <= limit
    shelf = Shelf(folder)
    for row in shelf.index.all():
        shelf.index.pin(row, True)
    shelf.close()
    warned = run("gc", folder, "--max-bytes", "1kB").stderr
    assert warned.startswith("pqcodec: ")
    assert "all of it is pinned" in warned
    assert warned.count("\n") == 1


@pytest.mark.parametrize("size", ["", "much", "20XB", "-5", "5iB", "1.2.3GB"])
def test_sizes_that_are_none(folder: Path, size: str) -> None:
    assert "a size such as 20GB" in run("gc", folder, f"--max-bytes={size}", code=2).stderr


# -- verify ------------------------------------------------------------------------------------------------------
def test_verify_names_and_drops_what_is_damaged(folder: Path) -> None:
    assert "6 blocks" in run("verify", folder).stdout
    assert told("verify", folder, "--jobs", 2)["ok"]
    bad, gone = (row for row in rows(folder) if row.tokens.tolist() in (A[256:512], C[:256]))
    damaged(folder, bad)
    (folder / "blocks" / gone.file).unlink()
    text = run("verify", folder, code=1).stdout
    assert all(f"block {row.name.hex()[:12]} (llama, tokens {row.start} to" in text for row in (bad, gone))
    assert "2 damaged" in text
    found = told("verify", folder, "--drop", code=1)
    assert {one["name"] for one in found["damaged"]} == {bad.name.hex(), gone.name.hex()}
    assert found["dropped"] == 2
    assert told("verify", folder)["blocks"] == 4
    assert told("stats", folder)["counters"]["damaged"] == 2


def test_verify_does_not_take_a_missing_backend_for_damage(folder: Path) -> None:
    run("verify", folder, "--drop", "--backend", "none", code=2)
    assert len(rows(folder)) == 6


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs permissions that hold")
def test_verify_does_not_take_what_it_cannot_read_for_damage(folder: Path) -> None:
    (folder / "blocks" / rows(folder)[0].file).chmod(0)
    run("verify", folder, "--drop", code=4)
    assert len(rows(folder)) == 6


# -- rm ----------------------------------------------------------------------------------------------------------
def test_rm_removes_a_block_and_what_follows(folder: Path) -> None:
    first = next(row for row in rows(folder) if row.tokens.tolist() == A[:256])
    before = rows(folder)
    done = told("rm", folder, first.name.hex()[:6].upper())
    left = rows(folder)
    assert [row.end for row in left] == [256, 300]
    assert len(done["removed"]) == 4
    assert done["freed_bytes"] == sum(row.size for row in before) - sum(row.size for row in left)
    assert {path.name for path in (folder / "blocks").rglob("*.pqkv")} == {Path(row.file).name for row in left}
    assert "1 blocks removed" in run("rm", folder, end_of(folder, 300)[:12]).stdout


def test_rm_leaves_what_is_pinned_and_what_that_needs(folder: Path) -> None:
    shelf = Shelf(folder)
    shelf.index.pin(next(row for row in shelf.index.all() if row.tokens.tolist() == A[256:512]), True)
    shelf.close()
    done = told("rm", folder, "--all", "--yes")
    assert done["pinned"] == 1
    assert [row.tokens.tolist() for row in rows(folder)] == [A[:256], A[256:512]]
    assert "1 pinned stay" in run("rm", folder, "--model", "llama").stdout
    run("rm", folder, "--all", "--yes", "--force")
    assert not rows(folder)


def test_rm_by_use_and_model(folder: Path) -> None:
    shelf = Shelf(folder)
    with shelf.index._changing() as db:
        db.execute("UPDATE blocks SET used = used - 86400 * 3 WHERE start = 0 OR start = 512")
    shelf.close()
    assert told("rm", folder, "--unused-for", 4)["removed"] == []
    assert len(told("rm", folder, "--unused-for", 2.5, "--model", "llama")["removed"]) == 1  # what follows others' use stays
    assert sorted(row.end for row in rows(folder)) == [256, 256, 300, 400, 512]
    assert "there are llama" in run("rm", folder, "--model", "qwen", code=2).stderr
    assert len(told("rm", folder, "--model", "llama")["removed"]) == 5


def test_rm_by_preset_leaves_what_others_encoded(folder: Path) -> None:
    each = Counter(models_of(Shelf(folder))[row.root][1] for row in rows(folder))
    gone = next(iter(each))
    assert len(each) > 1
    assert f"there are {', '.join(sorted(each))}" in run("rm", folder, "--preset", "pq6", code=2).stderr
    assert len(told("rm", folder, "--preset", gone)["removed"]) == each[gone]
    assert len(rows(folder)) == each.total() - each[gone]


# -- names -------------------------------------------------------------------------------------------------------
def test_names_that_are_none_or_several(folder: Path, tmp_path: Path) -> None:
    shelf = Shelf(folder)
    root = shelf.index.all()[0].root
    for last in (1, 2):
        name = bytes.fromhex("abcdef") + bytes(28) + bytes([last])
        shelf.index.add(Row(name, root, root, 0, np.arange(3), False, False, new_block_file(name), 5))
    shelf.close()
    before = len(rows(folder))
    for verb in (("rm", folder, "{}"), ("export", folder, "{}", tmp_path / "o.pqkv")):
        for name, message in {
            "abcdef": "2 blocks are called so: abcdef000000, abcdef000000",
            "abcde": "6 of its hexadecimal digits",
            "nothing": "6 of its hexadecimal digits",
            "0123456789": "no block is called so",
        }.items():
            text = run(*(str(word).format(name) for word in verb), code=2).stderr
            assert message in text
            assert text.count("\n") == 1
    assert len(rows(folder)) == before
    assert told("rm", folder, "0123456789", code=2)["error"]["kind"] == "InvalidArgument"


# -- export and import -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("preset", list(PROMPTS))
def test_what_goes_out_comes_in_again(made: Path, model: Any, tmp_path: Path, preset: str) -> None:
    tokens = PROMPTS[preset][0]
    name = end_of(made, len(tokens))
    out = told("export", made, name[:12], tmp_path / "p.pqkv")
    assert (out["name"], out["tokens"], out["file_bytes"]) == (name, len(tokens), (tmp_path / "p.pqkv").stat().st_size)
    assert "all sound" in CliRunner().invoke(app, ["verify", str(tmp_path / "p.pqkv")]).stdout
    done = told("import", "--trust", tmp_path / "new", tmp_path / "p.pqkv")
    assert (done["name"], done["tokens"], done["present_blocks"]) == (name, len(tokens), 0)
    assert told("ls", tmp_path / "new")["prefixes"][0]["name"] == name
    sources, copies = ({row.name: (at, row) for row in rows(at)} for at in (made, tmp_path / "new"))
    assert len(copies) == done["new_blocks"]
    for key, (place, row) in copies.items():
        there, before = sources[key]
        assert (place / "blocks" / row.file).read_bytes() == (there / "blocks" / before.file).read_bytes()
        assert (row.size, row.tokens.tolist(), row.whole) == (before.size, before.tokens.tolist(), before.whole)
    shutil.copytree(made, tmp_path / "old")
    with PrefixStore(tmp_path / "old", preset=preset) as one, PrefixStore(tmp_path / "new", preset=preset) as other:
        expected, found = one.get(model, tokens), other.get(model, tokens)
    assert expected.length == found.length == len(tokens) - 1
    assert numbers(expected.cache) == numbers(found.cache)


def test_what_is_there_is_skipped(folder: Path, tmp_path: Path) -> None:
    run("export", folder, end_of(folder, 600), tmp_path / "p.pqkv")
    files = {row.file for row in rows(folder)}
    assert "0 blocks added, 3 there already" in run("import", "--trust", folder, tmp_path / "p.pqkv").stdout
    run("rm", folder, end_of(folder, 600))
    assert told("import", "--trust", folder, tmp_path / "p.pqkv")["new_blocks"] == 1
    assert len({row.file for row in rows(folder)} - files) == 1


def test_every_prefix_goes_into_a_folder(made: Path, tmp_path: Path) -> None:
    out = told("export", made, tmp_path / "out", "--all")
    assert {Path(one["output"]) for one in out["files"]} == set((tmp_path / "out").iterdir())
    assert len(out["files"]) == 3
    assert "pass --force" in run("export", made, tmp_path / "out", "--all", code=2).stderr
    assert run("export", made, tmp_path / "out", "--all", "--force").stdout.count(".pqkv") == 3
    done = told("import", "--trust", tmp_path / "new", tmp_path / "out")
    assert sum(one["new_blocks"] for one in done["files"]) == 6
    assert {row.name for row in rows(tmp_path / "new")} == {row.name for row in rows(made)}
    assert "there already" in run("import", "--trust", tmp_path / "new", tmp_path / "out").stdout


def test_stdout_stdin_and_urls(made: Path, tmp_path: Path) -> None:
    name = end_of(made, 400)
    assert run("export", made, name, "-").stdout_bytes[:4] == c.FILE_MAGIC
    pytest.importorskip("fsspec")
    url = f"memory://prefixes/{tmp_path.name}.pqkv"
    run("export", made, name, url)
    assert "pass --force" in run("export", made, name, url, code=2).stderr
    assert told("import", "--trust", tmp_path / "new", url)["new_blocks"] == 2


def test_files_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    elsewhere = shutil.move(folder / "blocks", tmp_path / "files")
    name = end_of(folder, 600)
    for verb in (["gc"], ["verify"], ["verify", "--drop"], ["rm", "--all", "--yes"]):
        assert "pass by --data" in run(verb[0], folder, *verb[1:], code=2).stderr
    assert len(rows(folder)) == 6
    run("verify", folder, "--data", elsewhere)
    run("export", folder, name, tmp_path / "p.pqkv", "--data", elsewhere)
    run("import", "--trust", tmp_path / "new", tmp_path / "p.pqkv", "--data", tmp_path / "more")
    assert len(list((tmp_path / "more").rglob("*.pqkv"))) == 3
    assert told("gc", folder, "--data", elsewhere, "--grace", 0)["orphans"] == 0
    assert len(told("rm", folder, "--all", "--yes", "--data", elsewhere)["removed"]) == 6


def test_a_lost_index_is_made_anew_and_said(folder: Path) -> None:
    for path in folder.glob("index.sqlite*"):
        path.unlink()
    said = run("ls", folder).stderr
    assert said.startswith("pqcodec: ")
    assert said.count("\n") == 1
    assert len(rows(folder)) == 6


# -- damage ------------------------------------------------------------------------------------------------------
def test_a_damaged_block_does_not_go_out(folder: Path, tmp_path: Path) -> None:
    damaged(folder, next(row for row in rows(folder) if row.tokens.tolist() == A[256:512]))
    assert "damaged" in run("export", folder, end_of(folder, 600), tmp_path / "p.pqkv", code=1).stderr
    assert not (tmp_path / "p.pqkv").exists()
    done = told("export", folder, tmp_path / "out", "--all", code=1)
    assert done["failed"] == 1
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_prefix_without_its_beginning_does_not_go_out(folder: Path, tmp_path: Path) -> None:
    shelf = Shelf(folder)
    shelf.drop(next(row for row in shelf.index.all() if row.tokens.tolist() == A[256:512]))
    shelf.close()
    assert "not in the store" in run("export", folder, end_of(folder, 600), tmp_path / "p.pqkv", code=2).stderr


def test_a_damaged_block_does_not_come_in(made: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.pqkv"
    run("export", made, end_of(made, 600), path)
    with PQKVFile(path) as file:
        places = {name: file.entry(name) for name in file.names if name.startswith("1/")}
    whole = path.read_bytes()
    for number, entry in enumerate(places.values()):
        data = bytearray(whole)
        data[entry.body_start + entry.body_bytes // 2] ^= 1
        path.write_bytes(data)
        new = tmp_path / f"new{number}"
        assert str(path) in run("import", "--trust", new, path, code=1).stderr
        assert not new.exists()  # not even an empty store
        run("import", "--trust", made, path, code=1)
    path.write_bytes(whole[:-100])
    run("import", "--trust", tmp_path / "cut", path, code=1)
    assert not (tmp_path / "cut").exists()
    assert len(rows(made)) == 6


def test_files_that_hold_no_prefix(made: Path, tmp_path: Path) -> None:
    name = end_of(made, 400)
    run("export", made, name, tmp_path / "p.pqkv")
    block = next((made / "blocks").rglob("*.pqkv"))
    assert "holds no prefix" in run("import", "--trust", tmp_path / "new", block, code=2).stderr
    (tmp_path / "empty").mkdir()
    run("import", "--trust", tmp_path / "empty", block, code=2)
    assert not (tmp_path / "new").exists()
    assert not list((tmp_path / "empty").iterdir())
    (tmp_path / "text.pqkv").write_text("no tensors at all")
    run("import", "--trust", tmp_path / "new", tmp_path / "text.pqkv", code=1)
    done = told("import", "--trust", tmp_path / "new", tmp_path / "p.pqkv", block, code=2)
    assert (done["failed"], done["files"][0]["new_blocks"]) == (1, 2)


def _set(number: int, key: str, value: Any) -> Any:
    return lambda chain: chain["blocks"][number].update({key: value})


CHANGES = {
    "another format": (lambda chain: chain.update(format=9), 3),
    "a format that is no number": (lambda chain: chain.update(format=True), 3),
    "a block of another format": (_set(1, "format", 9), 3),
    "a block of a format that is no number": (_set(1, "format", 1.0), 3),
    "no list": (lambda chain: chain.update(blocks={}), 1),
    "no blocks": (lambda chain: chain.update(blocks=[]), 1),
    "a block is gone": (lambda chain: chain["blocks"].pop(0), 1),
    "turned round": (lambda chain: chain["blocks"].reverse(), 1),
    "another name": (_set(1, "name", "ab" * 32), 1),
    "a short name": (_set(0, "name", "ab"), 1),
    "no hexadecimal": (_set(0, "name", "xyz"), 1),
    "another parent": (_set(1, "parent", "ab" * 32), 1),
    "another root": (_set(1, "root", "ab" * 32), 1),
    "another start": (_set(1, "start", 255), 1),
    "a start that is no number": (_set(0, "start", False), 1),
    "a tail that is whole": (_set(1, "whole", True), 1),
    "a whole block that is not": (_set(0, "whole", False), 1),
    "another label": (_set(1, "label", "other"), 1),
    "no label": (_set(0, "label", None), 1),
    "other settings": (_set(0, "settings", {}), 1),
    "no layers": (_set(0, "layers", None), 1),
    "layers of no kind": (_set(0, "layers", [9]), 1),
    "tensors that are not there": (_set(0, "groups", []), 1),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_blocks_that_make_no_prefix(made: Path, tmp_path: Path, change: str) -> None:
    run("export", made, end_of(made, 400), tmp_path / "p.pqkv")
    work, code = CHANGES[change]
    path = rewritten(tmp_path / "p.pqkv", tmp_path / "q.pqkv", work)
    assert run("import", "--trust", tmp_path / "new", path, code=code).stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_names_of_a_tenant_come_in_unchecked_but_found(model: Any, tmp_path: Path) -> None:
    with PrefixStore(tmp_path / "a", tenant="secret") as store, torch.no_grad():
        store.put(model, A[:300], model(torch.tensor([A[:300]])).past_key_values)
    run("export", tmp_path / "a", end_of(tmp_path / "a", 300), tmp_path / "p.pqkv")
    run("import", "--trust", tmp_path / "b", tmp_path / "p.pqkv")
    with PrefixStore(tmp_path / "b", tenant="secret") as store:
        assert store.get(model, A[:300]).length == 299
    with PrefixStore(tmp_path / "b") as store:
        assert store.get(model, A[:300]).length == 0


def test_a_name_that_is_taken_by_other_tokens(made: Path, folder: Path, tmp_path: Path) -> None:
    run("export", made, end_of(made, 400), tmp_path / "p.pqkv")
    shelf = Shelf(folder)
    row = shelf.index.find(bytes.fromhex(end_of(folder, 400)))
    shelf.drop(row)
    shelf.index.add(Row(**{**row.__dict__, "tokens": np.arange(144)}))
    shelf.close()
    assert "the name of another block" in run("import", "--trust", folder, tmp_path / "p.pqkv", code=1).stderr


def test_importing_keeps_the_quota(folder: Path, tmp_path: Path) -> None:
    run("export", folder, end_of(folder, 400), tmp_path / "p.pqkv")
    run("rm", folder, end_of(folder, 400))
    run("gc", folder, "--max-bytes", sum(row.size for row in rows(folder)))
    assert told("import", "--trust", folder, tmp_path / "p.pqkv")["evicted_bytes"] > 0
    assert any(row.end == 400 for row in rows(folder))


def test_an_import_wants_the_digest_that_export_told_or_trust(made: Path, tmp_path: Path) -> None:
    """Numbers that were forged under right names, with checksums that hold, come in on the user's word alone."""
    path, new = tmp_path / "p.pqkv", tmp_path / "new"
    line = run("export", made, end_of(made, 300), path).stdout
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert line.rstrip().endswith(f"SHA-256 {digest}")
    assert told("export", made, end_of(made, 300), path, "--force")["sha256"] == digest
    refused = run("import", new, path, code=2).stderr
    assert all(word in refused for word in ("--sha256", "--trust", "trust the model's weights"))
    with PQKVFile(path) as file:
        pieces = [
            p if p.name.endswith("tokens") else replace(p, body=partial(np.zeros, p.shape, p.dtype)) for p in pieces_of(file)
        ]
        write_pieces(tmp_path / "forged.pqkv", pieces, file.metadata)
    assert (
        "is not the file that was exported" in run("import", new, tmp_path / "forged.pqkv", "--sha256", digest, code=1).stderr
    )
    for word in ("abc", digest[1:], digest + "0", "z" * 64):
        assert "64 hexadecimal digits" in run("import", new, path, "--sha256", word, code=2).stderr
    assert "is not the file" in run("import", new, path, "--trust", "--sha256", "0" * 64, code=1).stderr
    assert not new.exists()
    assert told("import", new, path, "--sha256", digest.upper())["new_blocks"] == 2
    shelf = Shelf(tmp_path / "other")
    with PQKVFile(path) as file:
        for options in ({}, {"sha256": "0" * 64}, {"sha256": "0" * 64, "trust": True}):
            with pytest.raises(PQError, match=r"sha256=|is not the file that was exported"):
                add_prefix(shelf, file, **options)
        assert shelf.index.all() == []
        assert add_prefix(shelf, file, sha256=digest).tokens == 300
    with PQKVFile(tmp_path / "forged.pqkv") as file:
        assert add_prefix(shelf, file, trust=True).present_blocks == 2
    shelf.close()


def test_one_wrong_digest_among_several_files_imports_nothing(made: Path, tmp_path: Path) -> None:
    lines = [line.split("  ") for line in run("export", made, tmp_path / "out", "--all").stdout.splitlines() if "/out/" in line]
    assert {Path(path): digest for digest, path in lines} == {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out").iterdir()
    }
    words = [word for digest, _ in lines for word in ("--sha256", digest)]
    run("import", tmp_path / "new", tmp_path / "out", *words[2:], code=1)
    assert not (tmp_path / "new").exists()
    assert len(told("import", tmp_path / "new", tmp_path / "out", *words)["files"]) == 3
    pytest.importorskip("fsspec")
    url = f"memory://digests/{tmp_path.name}.pqkv"
    digest = told("export", made, end_of(made, 300), url)["sha256"]
    assert told("import", tmp_path / "other", url, "--sha256", digest)["new_blocks"] == 2


def test_an_import_that_is_larger_than_the_quota_drops_nothing(folder: Path, made: Path, tmp_path: Path) -> None:
    run("export", made, end_of(made, 300), tmp_path / "p.pqkv")  # exact, the largest one
    run("rm", folder, end_of(folder, 300))
    run("gc", folder, "--max-bytes", (tmp_path / "p.pqkv").stat().st_size - 1)
    before = rows(folder)
    assert before
    assert "the quota of" in run("import", "--trust", folder, tmp_path / "p.pqkv", code=2).stderr
    assert [row.name for row in rows(folder)] == [row.name for row in before]


# -- wrong use ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [
        "ls",
        "ls {empty}",
        "ls s3://bucket/store",
        "gc {empty}",
        "gc {store} --older-than -1",
        "rm {store} --unused-for -1",
        "rm {store}",
        "rm {store} --all",
        "rm {store} abcdef --all --yes",
        "export {store} abcdef",
        "export {store} --all abcdef {out}",
        "export {store} abcdef {out}.safetensors",
        "export {store} --all {out}.pqkv",
        "export {store} --all -",
        "export {store} abcdef - --json",
        "import --trust {store}",
        "import --trust {store} {empty}",
    ],
)
def test_wrong_use_is_2(arguments: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    places = {"store": folder, "empty": tmp_path / "empty", "out": tmp_path / "o"}
    assert run(*(word.format(**places) for word in arguments.split()), code=2).stderr
    assert not list((tmp_path / "empty").iterdir())
    assert set(tmp_path.iterdir()) == {folder, tmp_path / "empty"}


def test_what_is_not_there_is_4(made: Path, tmp_path: Path) -> None:
    for verb in ("ls", "stats", "gc", "verify"):
        assert "none" in run(verb, tmp_path / "none", code=4).stderr
    assert "none.pqkv" in run("import", "--trust", tmp_path / "new", tmp_path / "none.pqkv", code=4).stderr
    run("export", made, end_of(made, 300), tmp_path / "none" / "p.pqkv", code=4)
    assert not list(tmp_path.iterdir())


def test_a_file_is_no_store(tmp_path: Path) -> None:
    file = tmp_path / "cache.pqkv"
    file.write_bytes(b"some")
    for verb in ("ls", "stats", "gc", "verify"):
        assert "cache.pqkv: is a file, no prefix store" in run(verb, file, code=2).stderr
    with pytest.raises(PQError, match="is a file, no prefix store"):
        PrefixStore(file)
    assert file.read_bytes() == b"some"


def test_help_stays_quick_and_names_the_verbs() -> None:
    start = time.perf_counter()
    code = "import sys; from pqcodec.tools.cli import app; assert not {'numpy', 'rich', 'torch', 'sqlite3'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.perf_counter() - start < 3
    assert all(verb in run("--help").stdout for verb in ("ls", "stats", "gc", "verify", "rm", "export", "import"))


def test_metadata_is_that_of_the_blocks(made: Path, tmp_path: Path) -> None:
    run("export", made, end_of(made, 400), tmp_path / "p.pqkv")
    chain = [row for row in rows(made) if row.tokens.tolist() in (A[:256], B)]
    with PQKVFile(tmp_path / "p.pqkv") as file:
        assert set(file.metadata) == {"prefix.chain"}
        assert file.metadata["prefix.chain"]["format"] == 1
        for number, row in enumerate(chain):
            with PQKVFile(made / "blocks" / row.file) as block:
                assert file.metadata["prefix.chain"]["blocks"][number] == block.metadata[blocks.KEY]
                assert [n for n in file.names if n.startswith(f"{number}/")] == [f"{number}/{n}" for n in block.names]
