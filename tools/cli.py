"""Law: the wiring of the command ``pqcodec`` and its verbs; numpy, torch and numba are loaded inside a verb."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

import typer
from typer.core import TyperCommand

import pqcodec
from pqcodec.tools import calibrate, convert, decode, doctor, encode, inspect, store, train_vq, verify
from pqcodec.tools.files import TwoEnded
from pqcodec.tools.outcome import CLOSED_PIPE, INTERRUPTED, discard_output, reported

app = typer.Typer(
    name="pqcodec",
    help="Compress KV-cache tensors to polar-angle streams and back.",
    epilog="Exit codes: 0 ok, 1 damaged data, 2 wrong usage or input, 3 unsupported version or a missing table, "
    "4 I/O error, 130 interrupted, 141 closed pipe.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS: tuple[tuple[Callable[..., None], type[TyperCommand]], ...] = (
    (encode.encode, TwoEnded),
    (decode.decode, TwoEnded),
    (convert.convert, TwoEnded),
    (inspect.inspect, TyperCommand),
    (verify.verify, TyperCommand),
    (train_vq.train_vq, TwoEnded),
    (calibrate.calibrate, TwoEnded),
    (doctor.doctor, TyperCommand),
    (doctor.warmup, TyperCommand),
)
for verb, parser in VERBS:
    app.command(cls=parser)(reported(verb))
app.add_typer(store.app)
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pqcodec {pqcodec.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version and stop."),
) -> None:
    """Compress KV-cache tensors to polar-angle streams and back."""


def main() -> None:
    """Entry point of the console script."""
    for number in _ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _interrupt)  # removes an unfinished output, as Ctrl-C does
    try:
        app(prog_name="pqcodec")  # also where Python runs the module, so that completion is of that name
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):
            raise
        discard_output()  # typer and rich end so where nobody reads help and tables, with 1
        sys.exit(CLOSED_PIPE)


def _interrupt(number: int, frame: object) -> None:
    for each in _ENDING:  # often both come, or one twice: the second must not interrupt the removal
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
