"""A store whose files lie in S3, spoken by a server that goes away or hangs: that costs one time-out, and nothing else."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("moto.server", reason="needs a server that speaks S3: pip install 'moto[server]'")
s3fs = pytest.importorskip("s3fs", reason="needs s3fs: pip install s3fs")
import fsspec  # noqa: E402
import servers  # noqa: E402
from store_stress import MODEL, cache_of, expected, tokens_of, wrong  # noqa: E402

from pqcodec.formats.places import remote  # noqa: E402
from pqcodec.formats.store import PrefixStore, breaker, files  # noqa: E402

PROMPT, OTHER = "1.2.3", "0"
ANSWER, PAUSE = 0.5, 1.0  # seconds: the time-outs, and for how long the place is not asked then


@pytest.fixture
def line(monkeypatch: pytest.MonkeyPatch) -> Iterator[servers.Proxy]:
    """A proxy before an empty bucket; the client has no time-outs of its own and s3fs's own number of tries."""
    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)  # a line for each request
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(files, "PATIENCE", remote.Patience(2, ANSWER, ANSWER))
    monkeypatch.setattr(breaker, "FIRST_PAUSE", PAUSE)
    monkeypatch.setattr(fsspec.config, "conf", {})
    with servers.s3_server() as server, servers.proxy(server) as proxy:
        settings = {"FSSPEC_S3_ENDPOINT_URL": proxy.url, "FSSPEC_S3": json.dumps({"key": "key", "secret": "secret"})}
        fsspec.config.set_conf_env(fsspec.config.conf, settings)
        fsspec.filesystem("s3").makedirs("bucket", exist_ok=True)
        yield proxy


@pytest.mark.parametrize("how", ["gone", "hung"])
def test_a_place_that_does_not_answer_costs_one_time_out(tmp_path: Path, line: servers.Proxy, how: str) -> None:
    ids, numbers = tokens_of(PROMPT), expected(PROMPT)
    with PrefixStore(tmp_path / "index", data=f"s3://bucket/{how}", preset="exact") as store:
        store.put(MODEL, ids, cache_of(numbers))
        line.silent.set() if how == "hung" else line.stop()
        start = time.monotonic()
        with pytest.warns(RuntimeWarning, match="cannot be read, the prefix ends before it"):
            assert store.get(MODEL, ids, leave=0).length == 0
        assert time.monotonic() < start + 2 * ANSWER + 1  # seconds of a machine that is busy
        start = time.monotonic()
        for _ in range(3):
            with pytest.warns(RuntimeWarning, match="it did not answer, and is asked again in"):
                assert store.get(MODEL, ids, leave=0).length == 0
            with pytest.raises(OSError, match="it did not answer, and is asked again in"):
                store.put(MODEL, tokens_of(OTHER), cache_of(expected(OTHER)))
        assert time.monotonic() < start + PAUSE
        if how == "gone":
            return
        line.silent.clear()
        time.sleep(PAUSE)
        cache, length = store.get(MODEL, ids, leave=0)
        assert length == len(ids)
        assert not wrong(cache, length, numbers, exact=True)
        store.put(MODEL, tokens_of(OTHER), cache_of(expected(OTHER)))
        assert store.get(MODEL, tokens_of(OTHER), leave=0).length == len(tokens_of(OTHER))
