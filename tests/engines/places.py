"""Where LMCache keeps objects: a folder, a Redis server, an S3 bucket; and the same objects from outside, to damage them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from servers import Proxy, RedisServer, proxy, redis_server

BUCKET = "kv-cache"
IDLE = 600.0  # seconds: LMCache connects to Redis once, when it starts
PLACES = ("fs", "resp", "s3")


class FolderPlace:
    """LMCache's adapter "fs"."""

    proxy: Proxy | None = None
    server: RedisServer | None = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.params: dict[str, Any] = {"type": "fs", "base_path": str(folder)}

    def names(self) -> list[str]:
        return sorted(path.name for path in self._folder.glob("*.data"))

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        (self._folder / name).write_bytes(data)


@dataclass
class RedisPlace:
    """LMCache's adapter "resp", to a server through a proxy that can break its connections."""

    server: RedisServer
    proxy: Proxy

    def __post_init__(self) -> None:
        import redis

        self._client = redis.Redis.from_url(self.server.address)

    @property
    def params(self) -> dict[str, Any]:
        port = urlsplit(self.proxy.url).port
        return {"type": "resp", "host": "127.0.0.1", "port": port, "num_workers": 2}

    def names(self) -> list[str]:
        return sorted(name.decode() for name in self._client.scan_iter() if self._client.type(name) == b"string")

    def read(self, name: str) -> bytes:
        return bytes(self._client.get(name))

    def write(self, name: str, data: bytes) -> None:
        self._client.set(name, data)


@dataclass
class BucketPlace:
    """LMCache's adapter "s3", to moto through a proxy. A host is a bucket there: the server takes every path to be in one."""

    port: int
    proxy: Proxy
    server: RedisServer | None = None

    def __post_init__(self) -> None:
        import boto3

        named = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
        self._client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{self.port}", **named)

    @property
    def params(self) -> dict[str, Any]:
        return {
            "type": "s3",
            "s3_endpoint": self.proxy.url.removeprefix("http://"),
            "s3_region": "us-east-1",
            "s3_num_io_threads": 2,
            "s3_prefer_http2": False,
            "disable_tls": True,
            "aws_access_key_id": "a",
            "aws_secret_access_key": "b",
        }

    def names(self) -> list[str]:
        return sorted(found["Key"] for found in self._client.list_objects_v2(Bucket=BUCKET).get("Contents", ()))

    def read(self, name: str) -> bytes:
        return self._client.get_object(Bucket=BUCKET, Key=name)["Body"].read()

    def write(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=name, Body=data)


Place = FolderPlace | RedisPlace | BucketPlace


@contextmanager
def s3_bucket() -> Iterator[tuple[int, int]]:
    """Ports on loopback of an S3 store, and of the same whose every path is in the bucket, as S3's virtual hosts are."""
    import threading

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    whole = DomainDispatcherApplication(create_backend_app)

    def bucket(environ: dict[str, Any], start: Any) -> Any:
        for name in ("PATH_INFO", "REQUEST_URI", "RAW_URI"):
            environ[name] = f"/{BUCKET}{environ.get(name, '')}"
        return whole(environ, start)

    servers = [make_server("127.0.0.1", 0, app, threaded=True) for app in (whole, bucket)]
    threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield servers[0].port, servers[1].port
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()


@contextmanager
def place(kind: str, folder: Path) -> Iterator[Place]:
    """An empty place of a kind; skips the test where there is no Redis server."""
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "fs":
        yield FolderPlace(folder)
    elif kind == "resp":
        if not shutil.which("redis-server"):
            pytest.skip("redis-server is not installed")
        with redis_server(str(folder)) as server, proxy(("127.0.0.1", urlsplit(server.address).port), IDLE) as between:
            yield RedisPlace(server, between)
    else:
        with s3_bucket() as (port, bucket), proxy(("127.0.0.1", bucket), IDLE) as between:
            made = BucketPlace(port, between)
            made._client.create_bucket(Bucket=BUCKET)
            yield made
