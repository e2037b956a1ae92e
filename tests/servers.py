"""Servers on loopback for tests: a store that speaks S3, and a proxy before it that breaks connections when it is told to."""

from __future__ import annotations

import re
import select
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

PATIENCE = 10.0  # seconds that a connection may be silent, and that a server may take to stop
MOST = 4096  # connections that a proxy takes in its life
KEPT = 4096  # bytes of a request's beginning that are kept, enough for its headers
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset


@contextmanager
def s3_server() -> Iterator[tuple[str, int]]:
    """Host and port of an empty S3 store in this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()
    finally:
        server.stop()


class RedisServer:
    """A Redis server of its own on loopback, which keeps what it was told: ``address`` is that of a store in it.

    ``tls``: files of a certificate and its key; then it speaks nothing else.
    """

    def __init__(self, folder: str, tls: tuple[str, str] | None = None) -> None:
        self._folder, self._tls = folder, tls
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> str:
        return f"redis{'s' if self._tls else ''}://127.0.0.1:{self._port}/0"

    @property
    def place(self) -> tuple[str, int]:
        """Host and port."""
        return "127.0.0.1", self._port

    def start(self) -> None:
        options = ["--bind", "127.0.0.1", "--dir", self._folder, "--save", ""]
        if self._tls:
            files = ["--tls-cert-file", self._tls[0], "--tls-key-file", self._tls[1], "--tls-auth-clients", "no"]
            options += ["--port", "0", "--tls-port", str(self._port), *files]
        else:
            options += ["--port", str(self._port)]
        self._process = subprocess.Popen(
            ["redis-server", *options, "--appendonly", "yes", "--appendfsync", "always"], stdout=subprocess.DEVNULL
        )
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            with suppress(OSError), self._connected() as asked:
                asked.sendall(b"PING\r\n")
                if asked.recv(16).startswith(b"+PONG"):
                    return
            time.sleep(0.02)
        raise TimeoutError("redis-server does not answer")

    def _connected(self) -> socket.socket:
        asked = socket.create_connection(self.place, timeout=1.0)
        if not self._tls:
            return asked
        return ssl.create_default_context(cafile=self._tls[0]).wrap_socket(asked, server_hostname="127.0.0.1")

    def send(self, what: int) -> None:
        """Send the server a signal."""
        assert self._process is not None
        self._process.send_signal(what)

    def kill_and_start(self, pause: float = 0.3) -> None:
        self.stop(signal.SIGKILL)
        time.sleep(pause)
        self.start()

    def stop(self, how: int = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(PATIENCE)
            self._process = None


@contextmanager
def redis_server(folder: str) -> Iterator[RedisServer]:
    """A server that is stopped at the end."""
    server = RedisServer(folder)
    try:
        yield server
    finally:
        server.stop()


@dataclass
class Exchange:
    """What went through one connection."""

    head: bytes = b""  # the first bytes of the request
    sent: int = 0  # bytes of the request that reached the server
    received: int = 0  # bytes of the response that reached the client
    cut: bool = False

    @property
    def line(self) -> str:
        """Method and target of the request."""
        return self.head.split(b"\r\n", 1)[0].decode("latin-1")

    @property
    def asked(self) -> int | None:
        """Bytes that the request's Range header names."""
        found = re.search(rb"\r\nrange: *bytes=(\d+)-(\d+)\r\n", self.head, re.IGNORECASE)
        return int(found[2]) - int(found[1]) + 1 if found else None


@dataclass(frozen=True)
class _Cut:
    after: int
    side: str
    request: str
    reset: bool


class Proxy:
    """Passes connections on to a server; ``cut`` breaks some of them. To be used through ``proxy``.

    ``speed``: bytes a second of all connections together, in either direction; None: as fast as they come.
    """

    def __init__(self, target: tuple[str, int], patience: float = PATIENCE, speed: float | None = None) -> None:
        self._target, self._patience, self._speed = target, patience, speed
        self._free = 0.0  # time at which the line has passed on what it has
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._cuts: list[_Cut] = []
        self._ends = threading.Event()
        self.silent = threading.Event()  # while it is set, nothing is passed on, as if the server hung
        self.exchanges: list[Exchange] = []

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self._listener.getsockname())

    def cut(self, connections: int, after: int = 0, *, side: str = "response", request: str = "", reset: bool = True) -> None:
        """Break the next ``connections``, once ``after`` bytes of a side have passed.

        ``side``: "request" or "response". ``request``: a part of the first lines of the requests that are meant, such as
        "PUT ". ``reset``: by a reset; else the connection is closed as if all were said.
        """
        with self._lock:
            self._cuts += [_Cut(after, side, request, reset)] * min(connections, MOST)

    def mend(self) -> None:
        """Break no more connections."""
        with self._lock:
            self._cuts.clear()

    def serve(self) -> None:
        while not self._ends.is_set() and len(self._threads) < MOST:
            if not select.select([self._listener], [], [], 0.05)[0]:
                continue
            client, _ = self._listener.accept()
            thread = threading.Thread(target=self._pass_on, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()
        self._listener.close()

    def stop(self) -> None:
        self._ends.set()
        until = time.monotonic() + PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _pass_on(self, client: socket.socket) -> None:
        exchange = Exchange()
        self.exchanges.append(exchange)
        with client, suppress(OSError), socket.create_connection(self._target, self._patience) as server:
            for end in (client, server):
                end.settimeout(self._patience)
            self._shuttle(exchange, client, server)

    def _shuttle(self, exchange: Exchange, client: socket.socket, server: socket.socket) -> None:
        plan: _Cut | None = None
        while not self._ends.is_set():
            ready, _, _ = select.select([client, server], [], [], self._patience)
            for end in ready:
                data = end.recv(1 << 16)
                if not data:
                    return
                while self.silent.is_set() and not self._ends.is_set():
                    time.sleep(0.01)
                side, other = ("request", server) if end is client else ("response", client)
                if side == "request":
                    plan = plan if exchange.head else self._planned(data)
                    exchange.head = (exchange.head + data)[:KEPT]
                passed = exchange.sent if side == "request" else exchange.received
                cuts = plan is not None and plan.side == side and passed + len(data) >= plan.after
                if plan and cuts:
                    data = data[: plan.after - passed]
                self._take_time(len(data))
                other.sendall(data)
                if side == "request":
                    exchange.sent += len(data)
                else:
                    exchange.received += len(data)
                if plan and cuts:
                    exchange.cut = True
                    for each in (client, server) if plan.reset else ():
                        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    return
            if not ready:
                return

    def _take_time(self, count: int) -> None:
        """Wait until a line of this speed has passed on ``count`` more bytes."""
        if self._speed is not None:
            with self._lock:
                self._free = max(self._free, time.monotonic()) + count / self._speed
                wait = max(0.0, self._free - time.monotonic())
            time.sleep(wait)

    @property
    def passed(self) -> int:
        """Bytes that have gone through all connections, in both directions."""
        return sum(exchange.sent + exchange.received for exchange in self.exchanges)

    def _planned(self, data: bytes) -> _Cut | None:
        """The cut for a connection whose request begins with these bytes."""
        line = data.split(b"\r\n", 1)[0].decode("latin-1")
        with self._lock:
            plan = next((plan for plan in self._cuts if plan.request in line), None)
            if plan:
                self._cuts.remove(plan)
            return plan


@contextmanager
def proxy(target: tuple[str, int], patience: float = PATIENCE, speed: float | None = None) -> Iterator[Proxy]:
    """A proxy on loopback before a server; ``patience``: seconds that a connection may be silent."""
    made = Proxy(target, patience, speed)
    thread = threading.Thread(target=made.serve, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.stop()
        thread.join(PATIENCE)
