"""Law: the index of a store that many machines share, in Redis or Valkey; each change is one of ``redis_scripts``.

Keys begin with ``{pqcodec:STORE}:`` and lie in one slot of a cluster:

    block:NAME      hash: the fields of a row (``index.Row``), times as decimal text, tokens as little-endian int64; tenant
    children:NAME   set: the names of the blocks that follow a block or root
    all             sorted set: the names of all blocks, by start
    leaves          sorted set: the blocks that may be evicted (without children, not pinned), by the time of their last use
    leaves:TENANT   those of a tenant, which are not in ``leaves``
    owners, sums    hashes: the tenant of a root; the bytes of a tenant's blocks
    pinned          set
    roots           hash: JSON of label and settings, by name
    lease:NAME      who encodes the block now; the server lets it run out
    counters        hash; data: the place of the files, if recorded
"""

from __future__ import annotations

import errno
import json
import re
import secrets
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import parse_qsl, urlencode

import numpy as np

from pqcodec.errors import CorruptStream, InvalidArgument, UnsupportedStream
from pqcodec.formats.store import redis_scripts as scripts
from pqcodec.formats.store.breaker import CircuitBreaker
from pqcodec.formats.store.index import Evicted, Row, limit_of, problem_of, warn_of_row
from pqcodec.formats.store.keys import is_tenant_id

VERSION, OLDER = b"2", (b"1",)  # an older index is used as it is, and has no tenants
SCHEMES = ("redis", "rediss", "unix")
CONNECT_SECONDS, ANSWER_SECONDS = 0.5, 2.0  # that a server may take, unless its address says otherwise
RETRIES = 1  # of a command whose connection breaks
AT_ONCE = 512  # rows that are asked for together
_STORE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NUMBER = re.compile(rb"-?[0-9]{1,18}")
_PASSWORD = re.compile(r"(?<=://)([^:@/]*):.*(?=@)|(?<=[?&]password=)[^&#]*")
_PARAMETERS = re.compile(
    "db|username|password|client_name|protocol|health_check_interval|socket_(connect_timeout|timeout|keepalive)|ssl_[a-z_]+"
)
_FIELDS = ("parent", "root", "start", "tokens", "whole", "stateful", "file", "size", "created", "used", "hits", "pinned")


def is_address(place: Any) -> bool:
    """Whether a store's place is a URL of Redis or Valkey: redis://, rediss:// (TLS) or unix:// (a socket)."""
    return isinstance(place, str) and place.split("://")[0] in SCHEMES and "://" in place


def server_and_store(address: str) -> tuple[str, str]:
    """The server's URL and the store's name, which is the parameter "store" of ``address`` ("default" without).

    >>> server_and_store("redis://cache.local:6379/0?store=team-a")
    ('redis://cache.local:6379/0', 'team-a')
    """
    base, _, query = address.partition("?")
    asked = dict(parse_qsl(query, keep_blank_values=True))
    store = asked.pop("store", "default")
    if not _STORE.fullmatch(store):
        raise InvalidArgument(f"store={store!r:.80}: a name of letters, digits, '.', '_' and '-' is expected, 64 at most")
    for name in asked:
        if not _PARAMETERS.fullmatch(name):
            shown = "a parameter" if "@" in query else repr(name)  # which may be the rest of a password
            raise InvalidArgument(
                f"{without_password(address)}: {shown:.40} is unknown; store, db, username, password, client_name, "
                "protocol, health_check_interval, socket_... timeouts and ssl_... are known"
            )
    return base + ("?" + urlencode(asked) if asked else ""), store


def without_password(address: str) -> str:
    """An address without its password, for messages.

    >>> without_password("redis://me:a/b@host/0?password=c&store=s")
    'redis://me@host/0?password=&store=s'
    """
    return _PASSWORD.sub(lambda found: found[1] or "", address)


class RedisIndex:
    """The index in a server; safe for threads, processes and forks. ``Index`` says what each method does.

    ``address``: redis://host:port/database?store=NAME, also rediss:// (TLS) and unix:// (``server_and_store``); its
    "socket_connect_timeout" and "socket_timeout" are seconds that the server may take. One that took longer, or was gone, is
    not asked again for a while (``breaker``): calls raise OSError at once. ``read_only``: methods that change the index raise
    OSError. What the server holds is trusted as little as a stranger's file. Raises InvalidArgument, OSError, and
    UnsupportedStream for an index of a newer version.
    """

    def __init__(self, address: str, read_only: bool = False) -> None:
        try:
            import redis
            from redis.backoff import ExponentialBackoff
            from redis.retry import Retry
        except ImportError as missing:
            raise InvalidArgument(
                f"{without_password(address)}: a store in Redis needs a package: pip install 'pqcodec[redis]'"
            ) from missing
        server, store = server_and_store(address)
        self.label, self._tag = without_password(address), f"{{pqcodec:{store}}}:".encode()
        self._closed, self._read_only = False, read_only
        self._breaker = CircuitBreaker()
        self._data = ""  # the place of the files, once it is recorded
        try:
            self.client: Any = redis.Redis.from_url(
                server,
                socket_connect_timeout=CONNECT_SECONDS,
                socket_timeout=ANSWER_SECONDS,
                retry=Retry(ExponentialBackoff(cap=0.1, base=0.02), RETRIES),
                retry_on_error=[redis.ConnectionError, redis.TimeoutError],
            )
            with self.named():
                version = self.client.get(self.key("version"))
        except (ValueError, TypeError, LookupError, AttributeError):  # an OSError is none of them; the text may hold a password
            raise InvalidArgument(
                f"{self.label}: is no address that can be used; redis://user:password@host:port/database?store=NAME is "
                "expected, with %2F for / in a password, %3F for ? and so on"
            ) from None
        self._warn_of_eviction()
        self.new = version is None
        if version not in (None, VERSION, *OLDER):
            raise UnsupportedStream(f"{self.label}: an index of version {version!r:.20}; install a newer pqcodec")
        if version in OLDER and not read_only:
            with suppress(OSError), self.named():  # who may only read it, reads it
                self.client.set(self.key("version"), VERSION, xx=True)

    def _warn_of_eviction(self) -> None:
        """Warn where the server drops any keys when its memory is full, the quota and other parts of an index among them."""
        import redis

        with suppress(redis.RedisError):  # not everyone may ask
            memory = self.client.info("memory")
            policy = memory.get("maxmemory_policy", "")
            if policy.startswith("allkeys") and memory.get("maxmemory"):
                text = f"{self.label}: the server drops keys of the index when its memory is full ({policy}), the quota too"
                advice = "set its maxmemory-policy to noeviction or volatile-lru, and limit the store by max_bytes"
                warnings.warn(f"{text}; {advice}", RuntimeWarning, stacklevel=5)

    def begun(self) -> None:
        """Say that the index is complete: until then whoever opens it adds the rows of all files."""
        with self.named():
            self.client.set(self.key("version"), VERSION, nx=True)

    def is_lost(self) -> bool:
        """Whether the server has forgotten the index since it was opened."""
        with self.named():
            return not self.client.exists(self.key("version"))

    def _run(self, script: str, *values: Any) -> Any:
        """Run a script of ``redis_scripts`` with the arguments ``values``; returns what it returns."""
        self.check_writable()
        with self.named():
            return self.client.register_script(script)(keys=[self._tag], args=values)

    def key(self, kind: str, name: bytes = b"") -> bytes:
        """The key of one kind, of a block or root if ``name`` is given."""
        return self._tag + kind.encode() + (b":" + name if name else b"")

    def close(self) -> None:
        """Close for good: all later calls raise InvalidArgument."""
        self._closed = True
        self.client.close()

    def check_open(self) -> None:
        """Raises InvalidArgument after ``close``."""
        if self._closed:
            raise InvalidArgument(f"{self.label}: the store is closed; open it anew")

    def check_writable(self) -> None:
        """Raises OSError where the index is only to be read, and InvalidArgument after ``close``."""
        self.check_open()
        if self._read_only:
            raise OSError(errno.EROFS, "the store can be read, but not changed (it was opened so)", self.label)

    @contextmanager
    def named(self) -> Iterator[None]:
        """A context that turns errors of the server into OSError or, for a key of another type, CorruptStream."""
        import redis

        self.check_open()
        if pause := self._breaker.remaining():
            raise OSError(errno.ECONNREFUSED, f"it did not answer, and is asked again in {pause:.1f} s", self.label)
        try:
            yield
            self._breaker.answered()
        except (redis.OutOfMemoryError, redis.ReadOnlyError) as error:
            full = isinstance(error, redis.OutOfMemoryError)
            raise OSError(errno.ENOSPC if full else errno.EROFS, str(error), self.label) from error
        except redis.AuthenticationError as error:
            advice = "does the address name the user and the password? redis://user:password@host"
            raise OSError(errno.EACCES, f"{error}; {advice}", self.label) from error
        except redis.exceptions.NoPermissionError as error:
            raise OSError(errno.EACCES, str(error), self.label) from error
        except redis.TimeoutError as error:
            self._breaker.failed()
            raise OSError(errno.ETIMEDOUT, str(error), self.label) from error
        except redis.ConnectionError as error:
            self._breaker.failed()
            raise OSError(errno.ECONNREFUSED, str(error), self.label) from error
        except redis.RedisError as error:
            text = str(error)
            if "WRONGTYPE" in text:
                advice = f"without the keys that begin with {self._tag.decode()} it is made anew from the files at data"
                raise CorruptStream(
                    f"{self.label}: the index is damaged, some of its keys are of another type; {advice}"
                ) from error
            code = next((code for word, code in _ERRNOS.items() if word in text), errno.EIO)
            raise OSError(code, text, self.label) from error

    # -- reading -------------------------------------------------------------------------------------------------
    def find(self, name: bytes) -> Row | None:
        """The block called ``name``; None where it is not committed."""
        return next(iter(self._rows([name])), None)

    def children(self, parent: bytes) -> list[Row]:
        """The blocks that follow the block or root called ``parent``."""
        with self.named():
            names = sorted(self.client.smembers(self.key("children", parent)))
        return [row for row in self._rows(names) if row.parent == parent]

    def all(self) -> list[Row]:
        """Every block, parents before their children."""
        with self.named():
            names = self.client.zrange(self.key("all"), 0, -1)
        return sorted(self._rows(names), key=lambda row: (row.root, row.start, row.name))

    def _rows(self, names: Sequence[bytes]) -> list[Row]:
        """The rows of those names that are there."""
        rows = []
        for first in range(0, len(names), AT_ONCE):
            part = names[first : first + AT_ONCE]
            with self.named():
                asked = self.client.pipeline(transaction=False)
                for name in part:
                    asked.hgetall(self.key("block", name))
                found = asked.execute(raise_on_error=False)
            for name, fields in zip(part, found, strict=True):
                if isinstance(fields, Exception):
                    with self.named():
                        self._check_type(name, fields)
                elif fields:
                    try:
                        rows.append(_row(name, fields))
                    except ValueError as error:
                        self._forget(name, fields, str(error))
        return rows

    def _check_type(self, name: bytes, error: Exception) -> None:
        """Drop what is under the key of a row and is of another type, with a warning; raises any other error."""
        if "WRONGTYPE" not in str(error):
            raise error
        dropped = False
        with suppress(OSError, CorruptStream), self.named():
            self.check_writable()
            self.client.delete(self.key("block", name))
            self.client.zrem(self.key("all"), name)
            dropped = True
        warn_of_row(self.label, "its key is of another type", dropped)

    def _forget(self, name: bytes, fields: Mapping[bytes, bytes], problem: str) -> None:
        """Drop a row that no store has written, with a warning; its file is not touched."""
        dropped = False
        with suppress(OSError, CorruptStream):
            dropped = bool(self._run(scripts.REMOVE, name, fields.get(b"parent", b""), b""))
        warn_of_row(self.label, problem, dropped)

    def roots(self) -> dict[bytes, tuple[str, dict[str, Any]]]:
        """(label, settings) of each root by its name; raises CorruptStream."""
        with self.named():
            listed = self.client.hgetall(self.key("roots"))
        found = {}
        for name, text in listed.items():
            try:
                label, settings = json.loads(text)
            except (TypeError, ValueError, RecursionError):
                label, settings = None, None
            if not isinstance(label, str) or not isinstance(settings, dict):
                raise CorruptStream(f"{self.label}: the index is damaged: what it says of a root is no label and no settings")
            found[name] = (label, settings)
        return found

    def counters(self) -> dict[str, int]:
        """The counters by name: "bytes" of all blocks, "max_bytes" and "max_age" if they are set, "gets", "hits", "puts" ..."""
        with self.named():
            listed = self.client.hgetall(self.key("counters"))
        if not all(_NUMBER.fullmatch(value) for value in listed.values()):
            raise CorruptStream(f"{self.label}: the index is damaged: its counters are no numbers")
        return {"bytes": 0} | {name.decode(errors="replace"): int(value) for name, value in listed.items()}

    @property
    def data(self) -> str | None:
        """The folder or URL of the files, as it was recorded; None where they are the index's own."""
        with self.named():
            found = self.client.get(self.key("data"))
        return None if found is None else found.decode(errors="replace")

    def owners(self) -> dict[bytes, str]:
        """The tenant's id of each root that has one."""
        with self.named():
            found = self.client.hgetall(self.key("owners"))
        named = {root: tenant.decode(errors="replace") for root, tenant in found.items()}
        return {root: tenant for root, tenant in named.items() if is_tenant_id(tenant)}

    def tenant_bytes(self) -> dict[str, int]:
        """Bytes of the blocks of each tenant, by its id; "": of those without one."""
        with self.named():
            asked = self.client.pipeline(transaction=False)
            listed, total = asked.hgetall(self.key("sums")).hget(self.key("counters"), "bytes").execute()
        if not all(_NUMBER.fullmatch(value) for value in (*listed.values(), total or b"0")):
            raise CorruptStream(f"{self.label}: the index is damaged: its sums are no numbers")
        sums = {tenant.decode(errors="replace"): int(value) for tenant, value in listed.items()}
        return {"": int(total or 0) - sum(sums.values()), **sums}

    def held(self, tenant: str | None = None) -> dict[bytes, int]:
        """Bytes, by name, of the blocks that are never evicted: pinned ones and their ancestors; ``tenant``: only its own."""
        with self.named():
            names = list(self.client.smembers(self.key("pinned")))
        owners = {} if tenant is None or not names else self.owners()
        held: dict[bytes, int] = {}
        while names:
            rows = [row for row in self._rows(names) if row.name not in held]
            rows = [row for row in rows if tenant in (None, owners.get(row.root, ""))]
            held |= {row.name: row.size for row in rows}
            names = list({row.parent for row in rows})
        return held

    # -- writing -------------------------------------------------------------------------------------------------
    def add_root(self, name: bytes, label: str, settings: dict[str, Any], tenant: str = "") -> None:
        """Record what a root stands for, and whose it is; a known one stays as it is."""
        self._run(scripts.ADD_ROOT, name, json.dumps([label, settings], sort_keys=True), tenant)

    def lease(self, name: bytes, seconds: float) -> str:
        """Take the lease of a block's name for ``seconds``; "" where another has it, or the block is there."""
        lease = secrets.token_hex(16)
        return lease if self._run(scripts.LEASE, name, lease, int(1000 * seconds)) else ""

    def release(self, name: bytes, lease: str) -> None:
        """End a lease that ``lease`` gave; another's stays."""
        self._run(scripts.RELEASE, name, lease)

    def add(self, row: Row) -> bool:
        """Commit a block, and end its lease; False where a block of that name is committed already."""
        now = repr(time.time())
        values = {
            **row.__dict__,
            "tokens": row.tokens.astype("<i8").tobytes(),
            "whole": int(row.whole),
            "stateful": int(row.stateful),
            "pinned": 0,
            "created": now,
            "used": now,
        }
        fields = [part for name in _FIELDS for part in (name, values[name])]
        added = self._run(scripts.ADD, row.name, row.parent, row.root, row.start, now, row.size, self._data, *fields)
        if added and row.pinned:
            self.pin(row, True)
        return bool(added)

    def remove(self, row: Row, little: bool = False, unused: bool = False) -> bool:
        """Remove a block's row if it still names the same file; False otherwise. The caller removes the file afterwards.

        ``unused``: only if it is not pinned, no block follows it, and it was not used since it was added.
        """
        return bool(self._run(scripts.REMOVE, row.name, row.parent, row.file, int(unused)))

    def evict(self, most: int = AT_ONCE) -> list[Evicted]:
        """Remove the rows that ``Shelf.evict`` says, ``most`` at once; the caller removes the files afterwards."""
        found = self._run(scripts.EVICT, repr(time.time()), most)
        each = (found[at : at + 4] for at in range(0, len(found), 4))
        return [
            Evicted(name, file.decode(errors="replace"), int(size) if _NUMBER.fullmatch(size) else -1, why == b"expired")
            for name, file, size, why in each
        ]

    def touch(self, rows: Sequence[Row], hit: bool = True, **counts: int) -> None:
        """Set the blocks' time of use to now, and their hits one up if ``hit``; add ``counts`` to the counters. Best effort."""
        self.check_open()
        names = [row.name for row in rows]
        added = [part for name, count in counts.items() for part in (name, int(count))]
        with suppress(OSError, CorruptStream):
            self._run(scripts.TOUCH, repr(time.time()), int(hit), len(names), *names, *added)

    def pin(self, row: Row, pinned: bool) -> None:
        """Keep a block and its ancestors from eviction, or release them."""
        self._run(scripts.PIN, row.name, int(pinned))

    def set_limit(self, name: str, limit: int | None, tenant: str | None = None) -> None:
        """Set "max_bytes", the quota, or "max_age", seconds that an unused block lives, as a counter; None: no limit."""
        name = limit_of(name, tenant)
        self.check_writable()
        with self.named():
            if limit is None:
                self.client.hdel(self.key("counters"), name)
            else:
                self.client.hset(self.key("counters"), name, limit)

    def set_data(self, data: str) -> None:
        """Record the folder or URL of the files, unless another is recorded; ``add`` does so again if the server forgot it."""
        self.check_writable()
        self._data = data
        with self.named():
            self.client.set(self.key("data"), data, nx=True)


_ERRNOS = {  # by words of a server's error
    "MISCONF": errno.ENOSPC,
    "NOPERM": errno.EACCES,
    "LOADING": errno.EBUSY,
}


def _row(name: bytes, fields: Mapping[bytes, bytes]) -> Row:
    """The row of a hash; raises ValueError for one that no store writes."""
    missing = [field for field in _FIELDS if field.encode() not in fields]
    if missing:
        raise ValueError(f"it has no {missing[0]}")
    found = {field: fields[field.encode()] for field in _FIELDS}
    if len(found["tokens"]) % 8 or any(found[field] not in (b"0", b"1") for field in ("whole", "stateful", "pinned")):
        raise ValueError("its fields are of other kinds")
    if not all(_NUMBER.fullmatch(found[field]) for field in ("start", "size", "hits")):
        raise ValueError("its numbers are none")
    row = Row(
        name=name,
        parent=found["parent"],
        root=found["root"],
        start=int(found["start"]),
        tokens=np.frombuffer(found["tokens"], "<i8"),
        whole=found["whole"] == b"1",
        stateful=found["stateful"] == b"1",
        file=found["file"].decode(errors="replace"),
        size=int(found["size"]),
        created=float(found["created"]),
        used=float(found["used"]),
        hits=int(found["hits"]),
        pinned=found["pinned"] == b"1",
    )
    if not row.file or (problem := problem_of(row)):
        raise ValueError(problem if row.file else "it has no file")
    return row
