"""Law: ``pqcodec store gc``, ``verify`` and ``rm``: removing leftovers, damaged blocks and chosen blocks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pqcodec.errors import InvalidArgument
from pqcodec.sizes import seconds_of, size_of
from pqcodec.tools.encode import Jobs
from pqcodec.tools.jobs import Show, run
from pqcodec.tools.outcome import DAMAGED, bytes_text, print_json, shown
from pqcodec.tools.store.listing import block_as_dict
from pqcodec.tools.store.place import AsJson, Data, Folder, check_place, models_of, named, opened, short, tenant_of

if TYPE_CHECKING:
    from pqcodec.formats.store.index import Row


# -- gc ----------------------------------------------------------------------------------------------------------
def gc(
    folder: Folder,
    grace: Annotated[
        float, typer.Option("--older-than", "--grace", metavar="SECONDS", help="Age from which a leftover file is removed.")
    ] = 3600.0,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The store's quota from now on, such as 20GB or 4GiB; none: no quota.")
    ] = None,
    max_age: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="How long what is not used lives from now on, such as 30d; none: for ever."),
    ] = None,
    tenant: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Whose limits these are, as stats tells; none: those of blocks without a tenant."),
    ] = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Remove leftovers, what is over the quota, and what was not used for longer than the store keeps it.

    Leftovers are files without a block, as killed writers leave them (young ones may be being written and stay), and blocks
    without a file. The quota drops the prefixes that were used longest ago, of the tenant that holds most; that of a tenant
    drops its own.
    """
    if tenant is not None and max_bytes is None and max_age is None:
        raise InvalidArgument("--tenant: says whose --max-bytes or --max-age it is; give one of them")
    if not grace >= 0:
        raise InvalidArgument(f"--older-than {grace:g}: a number of seconds is expected, 0 or more")
    quota = None if max_bytes in (None, "none") else size_of(str(max_bytes), "--max-bytes")
    age = None if max_age in (None, "none") else seconds_of(str(max_age), "--max-age")
    with opened(folder, data) as shelf:
        check_place(shelf)
        whose = None if tenant is None else tenant_of(shelf, tenant)
        if max_bytes is not None:
            shelf.index.set_limit("max_bytes", quota, whose)
        if max_age is not None:
            shelf.index.set_limit("max_age", age, whose)
        done = shelf.gc(grace)
        now = {"bytes": shelf.index.counters()["bytes"], "max_bytes": shelf.max_bytes, "max_age": shelf.max_age}
    if as_json:
        print_json({"folder": folder, **done, **now})
        return
    removed = f"{done['orphans']} leftover files and {done['missing']} blocks without a file removed"
    limit = "no quota" if now["max_bytes"] is None else f"the quota is {bytes_text(now['max_bytes'])}"
    there = f"{bytes_text(done['evicted_bytes'])} evicted; {bytes_text(now['bytes'] or 0)} are there, {limit}"
    print(f"{shown(folder)}: {removed}, {there}")


# -- verify ------------------------------------------------------------------------------------------------------
def verify(
    folder: Folder,
    drop: Annotated[bool, typer.Option("--drop", help="Remove the blocks that are damaged.")] = False,
    backend: Annotated[str, typer.Option(help="auto, or the name of a backend.")] = "auto",
    jobs: Jobs = 1,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a store's blocks.

    What is damaged is named; the exit code is 1 then, also where it is removed.
    """
    with opened(folder, data) as shelf:
        check_place(shelf)

        def work(row: Row, show: Show) -> list[str]:
            wrong = shelf.problems(row, backend)
            now = shelf.index.find(row.name) if wrong else None
            return wrong if now is not None and now.file == row.file else []  # else dropped by another process

        models, rows = models_of(shelf), shelf.index.all()
        done = run(rows, work, lambda row: row.name.hex(), jobs, "verify")
        for one in done:
            if one.error is not None:
                raise one.error
        damaged = [(row, one.outcome) for row, one in zip(rows, done, strict=True) if one.outcome]
        dropped = [row for row, _ in damaged if shelf.drop(row)] if drop else []
        if dropped:
            shelf.index.touch([], damaged=len(dropped))
    if as_json:
        each = [{**block_as_dict(row, models), "damage": wrong} for row, wrong in damaged]
        print_json({"folder": folder, "ok": not damaged, "blocks": len(rows), "damaged": each, "dropped": len(dropped)})
    else:
        for row, wrong in damaged:
            where = f"{shown(models[row.root][0])}, tokens {row.start} to {row.end - 1}"
            print(f"block {short(row)} ({where}): damaged: {shown(wrong[0])}")
        verdict = f"{len(damaged)} damaged" + (f", {len(dropped)} of them removed" if drop else "") if damaged else "all sound"
        print(f"{shown(folder)}: {len(rows)} blocks, {bytes_text(sum(row.size for row in rows))}, {verdict}")
    if damaged:
        raise typer.Exit(DAMAGED)


# -- rm ----------------------------------------------------------------------------------------------------------
def rm(
    folder: Folder,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Blocks, by the first digits of their names (6 or more).")
    ] = None,
    unused_for: Annotated[float | None, typer.Option(metavar="DAYS", help="Blocks that were not used for so long.")] = None,
    model: Annotated[str | None, typer.Option(metavar="LABEL", help="Blocks of a model, by the label that ls shows.")] = None,
    preset: Annotated[str | None, typer.Option(help="Blocks that were encoded by it, as ls shows it.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All blocks; needs --yes.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove all indeed.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Remove pinned blocks too.")] = False,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Remove blocks and what follows them.

    Of NAME, --unused-for, --model and --preset, all that are given have to hold. A block that stays, such as a pinned one,
    keeps those before it.
    """
    if everything == bool(names or unused_for is not None or model is not None or preset is not None):
        raise InvalidArgument(
            "what is to be removed? Name blocks, or pass --unused-for, --model or --preset; or --all and nothing else"
        )
    if everything and not yes:
        raise InvalidArgument("--all removes every block; pass --yes as well if that is meant")
    if unused_for is not None and not unused_for >= 0:
        raise InvalidArgument(f"--unused-for {unused_for:g}: a number of days is expected, 0 or more")
    with opened(folder, data) as shelf:
        check_place(shelf)
        models, rows = models_of(shelf), shelf.index.all()
        labels, presets = ({models[row.root][i] for row in rows} for i in range(2))
        if model is not None and model not in labels:
            raise InvalidArgument(f"no model is called {model!r}; there are {', '.join(sorted(labels)) or 'none'}")
        if preset is not None and preset not in presets:
            raise InvalidArgument(f"no block is encoded by {preset!r}; there are {', '.join(sorted(presets)) or 'none'}")
        chosen = _from(rows, [named(rows, name) for name in names]) if names else rows
        before = time.time() - 86400 * (unused_for or 0)
        old = [row for row in chosen if unused_for is None or row.used < before]
        wanted = [row for row in old if model in (None, models[row.root][0]) and preset in (None, models[row.root][1])]
        held = 0 if force else sum(row.pinned for row in wanted)
        gone = [row for row in _removable(rows, wanted, force) if shelf.drop(row)]
    freed = sum(row.size for row in gone)
    if as_json:
        print_json({"folder": folder, "removed": [row.name.hex() for row in gone], "freed_bytes": freed, "pinned": held})
        return
    stay = f"; {held} pinned stay, with those before them (--force removes them)" if held else ""
    print(f"{shown(folder)}: {len(gone)} blocks removed, {bytes_text(freed)} freed{stay}")


def _from(rows: Sequence[Row], tops: Sequence[Row]) -> list[Row]:
    """``tops`` and all their descendants."""
    names = {top.name for top in tops}
    for row in rows:  # parents come before their children
        if row.parent in names:
            names.add(row.name)
    return [row for row in rows if row.name in names]


def _removable(rows: Sequence[Row], wanted: Sequence[Row], force: bool) -> list[Row]:
    """The wanted blocks all of whose descendants go too, last ones first; pinned ones only with ``force``."""
    names = {row.name for row in wanted if force or not row.pinned}
    needed: set[bytes] = set()
    found = []
    for row in reversed(rows):  # children come before their parents
        if row.name in names and row.name not in needed:
            found.append(row)
        else:
            needed.add(row.parent)
    return found
