"""The site's pages: what they show runs, what they include and link to is there, and what is public is in the reference.

``make docs`` builds the site; nothing of mkdocs is needed here.
"""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import servers
import torch
from conftest import needs_gpu
from pages import BLOCK, blocks, run

import pqcodec
import pqcodec.formats
from benchmarks.tables import MARK, TABLES, with_tables
from pqcodec.formats import offload
from pqcodec.formats.engines.chunks import ChunkCodec
from tools.docs import command_line

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "tools" / "docs"
PAGES = sorted((DOCS / "pages").rglob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]*)(#[^)]*)?\)")
REFERENCE = "\n".join(page.read_text() for page in (DOCS / "pages" / "reference").glob("*.md"))


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS / "pages"))


@pytest.fixture(autouse=True)
def _nothing_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and an empty file system in memory."""
    monkeypatch.chdir(tmp_path)
    fsspec.filesystem("memory").store.clear()


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=name_of)
def test_its_blocks_run(page: Path) -> None:
    run(page)


def test_start_takes_twelve_lines() -> None:
    first = blocks(DOCS / "pages" / "index.md", "python")[0]
    assert len([line for line in first.splitlines() if line]) <= 12


def test_attention_from_codes_is_that_to_decoded_numbers() -> None:
    names = run(DOCS / "pages" / "how-to" / "attention.md")
    k, v = (torch.from_numpy(pqcodec.decode(names[name])).repeat_interleave(4, 0) for name in "kv")
    expected = torch.nn.functional.scaled_dot_product_attention(torch.from_numpy(names["q"]), k, v)
    found = torch.from_numpy(pqcodec.attention.attend(names["q"], names["k"], names["v"]))
    assert float((found - expected).abs().max()) < 1e-4


@needs_gpu
def test_attention_on_a_gpu_runs() -> None:
    names = run(DOCS / "pages" / "how-to" / "attention.md", "cuda")
    assert names["batch"].from_codes, names["batch"].why


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An S3 store with the pages' bucket, found as users' own is: by the environment."""
    pytest.importorskip("moto.server", reason="needs a server that speaks S3: pip install 'moto[server]'")
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs: pip install s3fs")
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # a line for each request
    with servers.s3_server() as (host, port):
        known = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        known |= {"AWS_CONFIG_FILE": os.devnull, "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1"}
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.delenv(name, raising=False)
        for name, value in known.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket")
        yield
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("s3")
def test_s3_and_redis_run(tmp_path: Path) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server here: apt install redis-server")
    with servers.redis_server(str(tmp_path)) as server:
        names = run(DOCS / "pages" / "how-to" / "remote.md", "s3", "redis", replaced={"redis": server.address})
    assert names["out"].shape[1] > 300


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_it_includes_and_links_to_is_there(page: Path) -> None:
    text = page.read_text()
    for included in re.findall(r'^--8<-- "(.+)"$', text, re.MULTILINE):
        assert (ROOT / included).is_file(), included
    for target, _ in LINK.findall(text):
        assert not target or (page.parent / target).is_file(), target


def test_the_menu_lists_every_page() -> None:
    listed = re.findall(r"(\S+\.md)$", (DOCS / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(map(name_of, PAGES))


def test_every_table_is_shown_with_its_machine_and_command() -> None:
    page, neighbours = ((DOCS / "pages" / name).read_text() for name in ("benchmarks.md", "neighbours.md"))
    assert sorted(MARK.findall(page + neighbours)) == sorted(TABLES)
    typed = re.sub("<!-- figures.*end of figures -->", "", page, flags=re.DOTALL)  # test_readme compares what is between
    prose = re.sub(r"head_dim 128|fp16|bf16|float32", "", MARK.sub("", typed))
    assert not re.search(r"\d", prose), "figures come from files"
    found = with_tables(page + neighbours)
    assert found.count("\nMachine: ") == len(TABLES)
    assert all(f"`benchmarks/results/{name}.json`" in found for table in TABLES.values() for name in table.files)


def test_what_is_public_is_in_the_reference() -> None:
    wanted = {f"pqcodec.{name}" for name in pqcodec.__all__ if not name.startswith("_")}
    wanted |= {f"pqcodec.formats.{name}" for name in pqcodec.formats.__all__}
    elsewhere = ("HostPool", "EncodedCache", "CapturedSteps")  # by the module that imports transformers, or with the formats
    wanted |= {f"pqcodec.formats.offload.{name}" for name in offload.__all__ if name not in elsewhere}
    listed = set(re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE))
    assert not wanted - listed


def test_the_page_of_the_command_line_is_what_verbs_say() -> None:
    assert command_line.PAGE.read_text() == command_line.page(), "run python -m tools.docs.command_line"


def test_verbs_on_pages_are_verbs_of_the_command_line() -> None:
    shown = {
        verb
        for page in PAGES
        for block in blocks(page, "sh")
        for verb in re.findall(r"^pqcodec ((?:store )?[a-z]+)", block, re.MULTILINE)
    }
    from typer.main import get_command

    from pqcodec.tools.cli import app

    command: Any = get_command(app)
    known = set(command.commands) | {f"store {name}" for name in command.commands["store"].commands}
    assert shown <= known
    assert len(shown) > 5


def test_the_options_of_lmcache_are_known() -> None:
    (text,) = re.findall(r"--l2-adapter '(.*?)'", (DOCS / "pages" / "how-to" / "lmcache.md").read_text(), re.DOTALL)
    options = json.loads(text)["serde"]
    assert options.pop("type") == "pqcodec"
    assert options.pop("model")
    assert ChunkCodec.from_json(options | {"head_dim": 128, "kv_heads": 8, "rope": "none"}).preset == options["preset"]


def test_the_citation_and_the_changes_have_the_release() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    said = {key: ast.literal_eval(value) for key, value in re.findall(r'^([\w-]+): (".+")$', citation, re.MULTILINE)}
    assert said["version"] == pqcodec.__version__
    sections = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[:2] == ["Unreleased", f"{said['version']} ({said['date-released']})"]
