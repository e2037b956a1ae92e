"""Law: which blocks of an index in SQLite go, in one transaction; ``redis_scripts.EVICT`` is the same in Redis."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pqcodec.formats.store.index import Evicted, limit_of

TENANT_BYTES = "SELECT tenant, CAST(TOTAL(bytes) AS INTEGER) FROM owners GROUP BY tenant"
OWN = "b.root IN (SELECT root FROM owners WHERE tenant = :tenant)"
_LEAF = "pinned = 0 AND NOT EXISTS (SELECT 1 FROM blocks c WHERE c.parent = b.name)"  # may go


def evicted(db: Any, limits: Mapping[str, int], now: float, most: int) -> list[Evicted]:
    """Remove, in the open transaction of ``db``, ``most`` rows of those that ``Shelf.evict`` says.

    ``limits``: the counters of the store; ``now``: Unix time.
    """
    choice = _Choice(db, most)
    if (age := limits.get("max_age")) is not None:
        while choice.dropped(None, now - age):
            pass
    for tenant in choice.held:
        age, quota = (limits.get(limit_of(name, tenant)) for name in ("max_age", "max_bytes"))
        while age is not None and choice.dropped(tenant, now - age):
            pass
        while quota is not None and choice.held[tenant] > quota and choice.dropped(tenant):
            pass
    stuck: set[str] = set()
    while choice.total > limits.get("max_bytes", choice.total) and (left := choice.held.keys() - stuck):
        largest = max(left, key=lambda tenant: (choice.held[tenant], str(tenant)))
        if not choice.dropped(largest):
            stuck.add(largest)
    return choice.gone


class _Choice:
    """The blocks that went, and the bytes that each tenant holds after that."""

    def __init__(self, db: Any, most: int) -> None:
        self._db, self._most = db, most
        self.gone: list[Evicted] = []
        self.held: dict[str, int] = {"": 0, **dict(db.execute(TENANT_BYTES))}

    @property
    def total(self) -> int:
        """Bytes of all blocks."""
        return sum(self.held.values())

    def dropped(self, tenant: str | None, before: float | None = None) -> bool:
        """Whether a block was there to drop: the least recently used one (of a tenant), last used before ``before``."""
        own = _LEAF if tenant is None else f"{_LEAF} AND {OWN}"
        text = f"SELECT b.name, b.root, b.file, b.size, b.used FROM blocks b WHERE {own} ORDER BY b.used LIMIT 1"
        found = self._db.execute(text, {} if tenant is None else {"tenant": tenant}).fetchone()
        if found is None or len(self.gone) >= self._most:
            return False
        name, root, file, size, used = found
        if before is not None and (type(used) is not float or used >= before):
            return False
        size = size if type(size) is int else -1
        self._db.execute("DELETE FROM blocks WHERE name IS ?", (name,))
        (owner,) = self._db.execute("SELECT tenant FROM owners WHERE root IS ?", (root,)).fetchone() or ("",)
        self.held[owner] -= max(size, 0)
        self.gone.append(Evicted(name, file, size, before is not None))
        return True
