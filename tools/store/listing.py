"""Law: ``pqcodec store ls`` and ``stats``: the contents of a store, and how much it was used."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec.errors import PQError
from pqcodec.tools.outcome import bytes_text, print_json, shown
from pqcodec.tools.store.place import (
    NO_TENANT,
    AsJson,
    Data,
    Folder,
    Models,
    PrefixBlocks,
    models_of,
    opened,
    prefixes,
    short,
)
from pqcodec.tools.tables import console, print_table

if TYPE_CHECKING:
    from pqcodec.formats.store.index import Row
    from pqcodec.formats.store.shelf import Shelf

_WIDE = 100  # characters of the wide tables
_COUNTERS = ("gets", "hits", "asked_tokens", "found_tokens", "puts", "evicted", "damaged")
_TRIES = 3  # blocks that are tried to find the decoded size of a token
_SAMPLED = 64  # blocks of a model that are opened to find its bits per coordinate


# -- ls ----------------------------------------------------------------------------------------------------------
def ls(
    folder: Folder,
    by_block: Annotated[bool, typer.Option("--blocks", help="A row for each block, instead of one for each prefix.")] = False,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """List the prefixes of a store, those used last first.

    A prefix is called by the name of its last block. Blocks and bytes of its own are those that no other prefix shares.
    """
    with opened(folder, data) as shelf:
        models, rows = models_of(shelf), shelf.index.all()
    found = [] if by_block else prefixes(rows)
    if by_block:
        rows = sorted(rows, key=lambda row: -row.used)
        listed = {"blocks": [block_as_dict(row, models) for row in rows]}
    else:
        listed = {"prefixes": [_as_dict(prefix, models) for prefix in found]}
    if as_json:
        print_json({"folder": folder, **listed})
        return
    out, now = console(), time.time()
    wide = out.width >= _WIDE
    print(f"{shown(folder)}: {f'{len(rows)} blocks' if by_block else f'{len(found)} prefixes'}")
    if by_block and rows:
        columns = ("block", "model", "preset", "tokens", "bytes", "last used", "hits", "")
        print_table(out, columns, [_block_cells(row, models, now) for row in rows], ("block", "model", "preset", ""))
    elif found:
        blocks = ("own blocks", "shared", "own bytes") if wide else ("blocks", "own bytes")
        columns = ("prefix", "model", "preset", "tokens", *blocks, "last used", "hits", "")
        print_table(out, columns, [_cells(prefix, models, now, wide) for prefix in found], ("prefix", "model", "preset", ""))


def block_as_dict(row: Row, models: Models) -> dict[str, Any]:
    """A block's row for --json."""
    model, preset = models[row.root]
    return {
        **{key: getattr(row, key).hex() for key in ("name", "parent", "root")},
        "model": model,
        "preset": preset,
        "tokens": [row.start, row.end],
        **{key: getattr(row, key) for key in ("whole", "stateful", "file", "size", "created", "used", "hits", "pinned")},
    }


def _block_cells(row: Row, models: Models, now: float) -> list[str]:
    tokens = f"{row.start} to {row.end - 1}" if len(row.tokens) else f"after {row.start}"
    use = [ago(now - row.used), str(row.hits), "pinned" if row.pinned else ""]
    return [short(row), *models[row.root], tokens, bytes_text(row.size), *use]


def _as_dict(prefix: PrefixBlocks, models: Models) -> dict[str, Any]:
    end = prefix.end
    model, preset = models[end.root]
    return {
        "name": end.name.hex(),
        "model": model,
        "preset": preset,
        "tokens": end.end,
        "own_blocks": len(prefix.own),
        "shared_blocks": len(prefix.blocks) - len(prefix.own),
        "own_bytes": sum(row.size for row in prefix.own),
        "bytes": sum(row.size for row in prefix.blocks),
        **{key: getattr(end, key) for key in ("used", "hits", "pinned")},
        "complete": prefix.complete,
    }


def _cells(prefix: PrefixBlocks, models: Models, now: float, wide: bool) -> list[str]:
    end, own = prefix.end, len(prefix.own)
    counts = (str(own), str(len(prefix.blocks) - own))
    notes = [*(["pinned"] if end.pinned else []), *([] if prefix.complete else ["without its beginning"])]
    size = bytes_text(sum(row.size for row in prefix.own))
    use = [ago(now - end.used), str(end.hits), ", ".join(notes)]
    return [short(end), *models[end.root], str(end.end), *(counts if wide else ["+".join(counts)]), size, *use]


def ago(seconds: float) -> str:
    """An age in words.

    >>> ago(5), ago(200), ago(7300), ago(9 * 86400)
    ('just now', '3 min ago', '2 h ago', '9 days ago')
    """
    for unit, most, of in (("min", 60, 60), ("h", 24, 3600)):
        if seconds < of:
            break
        if seconds < most * of:
            return f"{seconds // of:.0f} {unit} ago"
    return "just now" if seconds < 60 else f"{seconds // 86400:.0f} day{'s' if seconds >= 172800 else ''} ago"


# -- stats -------------------------------------------------------------------------------------------------------
def stats(folder: Folder, data: Data = None, as_json: AsJson = False) -> None:
    """Show how much a store holds and of how much use it was.

    Bits are those of a coordinate as stored, all bytes of a file counted. The hits of a model are the gets that found something
    of it that is still there.
    """
    with opened(folder, data) as shelf:
        models, rows, counters = models_of(shelf), shelf.index.all(), shelf.index.counters()
        kinds: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            kinds.setdefault(models[row.root], []).append(row)
        of_prefixes = [models[prefix.end.root] for prefix in prefixes(rows)]
        each = [_totals(shelf, kind, of, of_prefixes.count(kind)) for kind, of in kinds.items()]
        tenants = _tenants(shelf, rows, counters)
    totals: dict[str, Any] = {key: sum(one[key] for one in each) for key in ("prefixes", "blocks", "tokens", "bytes")}
    plain = [one["plain_bytes"] for one in each]
    totals |= {"folder": folder, "plain_bytes": None if None in plain else sum(plain), "max_bytes": counters.get("max_bytes")}
    totals |= {"max_age": counters.get("max_age"), "tenants": tenants}
    totals |= {"counters": {name: counters.get(name, 0) for name in _COUNTERS}}
    totals |= {"models": sorted(each, key=lambda one: -one["bytes"])}
    if as_json:
        print_json(totals)
    else:
        _draw(totals)


def _totals(shelf: Shelf, kind: tuple[str, str], rows: Sequence[Row], count: int) -> dict[str, Any]:
    """The totals of a model at a preset; ``plain_bytes``: of its caches decoded, None where that is unknown."""
    by_root: dict[bytes, list[Row]] = {}
    for row in rows:
        by_root.setdefault(row.root, []).append(row)
    plain = [_plain_bytes(shelf, of) for of in by_root.values()]
    return {
        "model": kind[0],
        "preset": kind[1],
        "prefixes": count,
        "blocks": len(rows),
        "tokens": sum(len(row.tokens) for row in rows),
        "bytes": sum(row.size for row in rows),
        "plain_bytes": None if None in plain else sum(filter(None, plain)),
        "bits_per_coordinate": _bits(shelf, rows),
        "hits": sum(row.hits for row in rows if not row.start),  # every get uses one first block
    }


def _tenants(shelf: Shelf, rows: Sequence[Row], counters: dict[str, int]) -> list[dict[str, Any]]:
    """What each tenant holds, by its id ("none": blocks without one), and its limits; most bytes first."""
    from pqcodec.formats.store.index import limit_of
    from pqcodec.formats.store.keys import is_tenant_id

    owners = shelf.index.owners()
    limited = {name.partition(":")[2] for name in counters if name.startswith(("max_bytes:", "max_age:"))}
    limited = {tenant for tenant in limited if not tenant or is_tenant_id(tenant)}
    found: dict[str, dict[str, Any]] = {
        tenant: {
            "tenant": tenant or NO_TENANT,
            "blocks": 0,
            "bytes": 0,
            **{name: counters.get(limit_of(name, tenant)) for name in ("max_bytes", "max_age")},
        }
        for tenant in sorted({"", *owners.values(), *limited})
    }
    for row in rows:
        own = found[owners.get(row.root, "")]
        own["blocks"], own["bytes"] = own["blocks"] + 1, own["bytes"] + row.size
    there = [one for tenant, one in found.items() if one["blocks"] or tenant in limited]
    return sorted(there, key=lambda one: -one["bytes"])


def _plain_bytes(shelf: Shelf, rows: Sequence[Row]) -> int | None:
    """Decoded bytes of the blocks of one root, by the bytes per token of one block; None with state, or unreadable files."""
    from pqcodec.formats.store.blocks import TOKENS

    for row in [row for row in rows if len(row.tokens) and not row.stateful][:_TRIES]:
        try:
            with shelf.files.open(row.file) as file:
                size = sum(file.entry(name).tensor_bytes for name in file.names if name != TOKENS)
        except (PQError, OSError):
            continue
        return size * sum(len(row.tokens) for row in rows) // len(row.tokens)
    return None


def _bits(shelf: Shelf, rows: Sequence[Row]) -> float | None:
    """Bits of file per decoded coordinate, of the most recently used blocks; None where none can be read.

    More than the preset's rate: tails and the windows of sliding layers have a higher rate, because they are encoded again
    when the prefix has grown; first tokens, and state that is neither key nor value, are exact.
    """
    from pqcodec.formats.store.blocks import TOKENS

    size = coordinates = 0
    for row in sorted(rows, key=lambda row: -row.used)[:_SAMPLED]:
        try:
            with shelf.files.open(row.file) as file:
                counts = [math.prod(file.entry(name).shape) for name in file.names if name != TOKENS]
        except (PQError, OSError):
            continue
        size, coordinates = size + row.size, coordinates + sum(counts)
    return 8 * size / coordinates if coordinates else None


def _draw(totals: dict[str, Any]) -> None:
    from rich.progress_bar import ProgressBar

    out, counts = console(), totals["counters"]
    wide = out.width >= _WIDE
    size, plain, quota = totals["bytes"], totals["plain_bytes"], totals["max_bytes"]
    smaller = f" ({bytes_text(plain)} of caches, {plain / size:.2f}x smaller)" if plain and size else ""
    parts = f"{totals['prefixes']} prefixes, {totals['blocks']} blocks, {totals['tokens']} tokens"
    print(f"{shown(totals['folder'])}: {parts}, {bytes_text(size)}{smaller}")
    print(f"gets: {counts['gets']}, {_share(counts['hits'], counts['gets'])} found something")
    tokens = _share(counts["found_tokens"], counts["asked_tokens"])
    print(f"tokens asked for: {counts['asked_tokens']}, {tokens} found")
    print(f"puts: {counts['puts']}; blocks evicted: {counts['evicted']}, damaged: {counts['damaged']}")
    if quota is not None:
        of = f"{bytes_text(size)} of {bytes_text(quota)}, {_share(size, quota)}"
        bar = ProgressBar(total=max(quota, 1), completed=size, width=30)
        print_table(out, ("", "", ""), [["quota", bar, of]], ("",))
    if any(one["tenant"] != NO_TENANT or one["max_bytes"] or one["max_age"] for one in totals["tenants"]):
        of_tenants = [_tenant_cells(one) for one in totals["tenants"]]
        print_table(out, ("tenant", "blocks", "bytes", "quota", "lives"), of_tenants, ("tenant",))
    each = totals["models"]
    if not each:
        return
    width, rows = 24 if wide else 10, []
    most = {key: max(max(one[key] for one in each), 1) for key in ("bytes", "hits")}
    for one in each:
        bars = {key: ProgressBar(total=most[key], completed=one[key], width=width) for key in most}
        bits = "-" if one["bits_per_coordinate"] is None else f"{one['bits_per_coordinate']:.2f}"
        about = [one["model"], one["preset"], bits, *([str(one["prefixes"]), str(one["tokens"])] if wide else [])]
        rows.append([*about, bytes_text(one["bytes"]), bars["bytes"], str(one["hits"]), bars["hits"]])
    columns = ("model", "preset", "bits", *(("prefixes", "tokens") if wide else ()), "bytes", "", "hits", "")
    print_table(out, columns, rows, ("model", "preset", ""))


def _tenant_cells(one: dict[str, Any]) -> list[str]:
    quota = "-" if one["max_bytes"] is None else bytes_text(one["max_bytes"])
    lives = "-" if one["max_age"] is None else f"{one['max_age'] / 3600:,.1f} h"
    return [one["tenant"], str(one["blocks"]), bytes_text(one["bytes"]), quota, lives]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "-"
