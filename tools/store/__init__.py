"""Law: the wiring of ``pqcodec store`` and its verbs."""

from collections.abc import Callable

import typer

from pqcodec.tools.outcome import reported
from pqcodec.tools.store import listing, moving, upkeep

app = typer.Typer(name="store", no_args_is_help=True, rich_markup_mode=None)
VERBS: dict[str, Callable[..., None]] = {
    "ls": listing.ls,
    "stats": listing.stats,
    "gc": upkeep.gc,
    "verify": upkeep.verify,
    "rm": upkeep.rm,
    "export": moving.export,
    "import": moving.import_,
}
for name, verb in VERBS.items():
    app.command(name)(reported(verb))


@app.callback()
def _store() -> None:
    """Look after a store of prefix caches."""
