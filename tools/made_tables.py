"""Law: what verbs that make shared tables have in common: keys and values of files, held-out tokens, a table for each layer."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pqcodec import constants as c
from pqcodec.errors import InvalidArgument
from pqcodec.tools.files import ENCODED, PLAIN, STANDARD, check_output, input_file, inputs, make_parents
from pqcodec.tools.jobs import Show, report, run
from pqcodec.tools.outcome import bytes_text
from pqcodec.tools.shared_tables import Key, table_file

if TYPE_CHECKING:
    from pqcodec.stream.tables import SharedTable

Texts = Annotated[
    list[str], typer.Argument(metavar="INPUT...", help="Files of keys and values, plain or encoded, folders or patterns.")
]
Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="Where key.0.pqt, value.0.pqt and so on are written.")]
Together = Annotated[bool, typer.Option("--together", help="One table for the keys of all layers, and one for their values.")]
Keys = Annotated[str | None, typer.Option(metavar="REGEX", help="Tensors that are keys (default: by naming conventions).")]
Values = Annotated[str | None, typer.Option(metavar="REGEX", help="Tensors that are values (default: likewise).")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")]
KEY_AND_VALUE = c.ROLES[:2]
_HELD_OUT = 10  # one of so many tokens, the last ones of each tensor, on which the error is measured
_MOST_HELD_OUT = 512  # tokens of a tensor


def keys_and_values(
    sources: Sequence[str],
    keys: str | None,
    values: str | None,
    together: bool,
    roles: Sequence[str] = KEY_AND_VALUE,
    taken: Callable[[Key, Any], Any] = lambda key, x: x,
) -> dict[Key, list[Any]]:
    """Keys and values of plain or encoded files by role and layer, or by role alone.

    ``keys``, ``values``: as the options of these names. ``roles``: those that are read. ``taken``: what is made of each tensor.
    Raises InvalidArgument where none is there, and as reading files and ``taken`` do, with the tensor's file and name.
    """
    from pqcodec.formats.containers.reader import named

    found: dict[Key, list[Any]] = {}
    for item in inputs(sources, (*PLAIN, *ENCODED), keep_going=False).todo:
        with input_file(item.path, local=True) as path:
            for name, key, tensor in _of_file(path, keys, values, roles):
                with named(f"{item.path}: tensor {name!r}"):
                    found.setdefault((key[0], None) if together else key, []).append(taken(key, tensor))
    if not found:
        options = " and ".join(f"--{role}s" for role in roles)
        raise InvalidArgument(f"no tensor is a {' or a '.join(roles)} by name; use {options}")
    return found


def _of_file(path: str, keys: str | None, values: str | None, roles: Sequence[str]) -> Iterator[tuple[str, Key, Any]]:
    """Keys and values of a file, each with its name, role and layer; raises as opening the file does."""
    from pqcodec.formats.containers.kinds import kind_of, open_encoded
    from pqcodec.formats.plain.files import holds_streams, open_tensors
    from pqcodec.formats.policy.names import role_of

    kind = kind_of(path)
    encoded = kind in ("pqkv", "zarr") or (kind == "safetensors" and holds_streams(path))
    opened: Any = open_encoded(path) if encoded else open_tensors(path)
    with opened as file:
        for name in file.names:
            tensor = role_of(name, keys, values)
            if tensor.role in roles:
                yield name, (tensor.role, tensor.layer), file.decode(name) if encoded else file.read(name)


def write_tables(
    found: dict[Key, list[Any]],
    target: str,
    title: str,
    make: Callable[[Key, list[Any], Show], SharedTable],
    measure: Callable[[Key, list[Any], Any], float | None],
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Make a table of all but the last tokens of each key's tensors, measure its relMSE on these, write it, and tell of all.

    ``found`` is emptied on the way. Raises InvalidArgument for what is no local folder, and for a file that is there already
    without ``force``.
    """
    from pqcodec.formats.places.remote import check_local

    check_local(target, "tables are written to a local folder")
    if target == STANDARD:
        raise InvalidArgument("FOLDER is '-', but tables are several files: name a folder, './-' for one that is called so")
    paths = {key: os.path.join(target, table_file(key)) for key in sorted(found, key=str)}
    for path in paths.values():
        check_output("", path, force)
    make_parents(os.path.join(target, "key"))

    def work(key: Key, show: Show) -> _Outcome:
        from pqcodec.formats.containers.reader import named
        from pqcodec.formats.places.atomic import replacing

        start, tensors = time.perf_counter(), found.pop(key)
        ends = [x.shape[-2] - min(x.shape[-2] // _HELD_OUT, _MOST_HELD_OUT) for x in tensors]
        with named(paths[key]):
            table = make(key, [x[..., :end, :] for x, end in zip(tensors, ends, strict=True)], show)
            rel_mse = measure(key, [x[..., end:, :] for x, end in zip(tensors, ends, strict=True)], table)
        with replacing(paths[key]) as part:
            part.write_bytes(table.to_bytes())
        size, seconds = len(table.to_bytes()), time.perf_counter() - start
        return _Outcome(paths[key], table.name, table.content, size, rel_mse, seconds)

    done = run(list(paths), work, lambda key: paths[key], 1, title, keep_going=False)
    if len(done) == 1 and not as_json:
        print(done[0].outcome.line())
    report(done, _Outcome.COLUMNS, len(done) > 1, as_json)


def coded_error(tensors: list[Any], **options: Any) -> float | None:
    """relMSE of tensors that are coded by options of ``pqcodec.encode``, tables among them; None without a number."""
    from pqcodec.formats.containers.writer import encoded_source
    from pqcodec.formats.policy.measure import Error, error_of

    error = Error()
    for x in tensors:
        error += error_of(x, encoded_source(x, options | {"nonfinite": "exact"}), sample=False)
    return error.rel_mse


@dataclass(frozen=True)
class _Outcome:
    """The outcome for a table."""

    file: str
    name: str
    content: str
    size: int
    rel_mse: float | None
    seconds: float

    COLUMNS = ("relMSE", "seconds", "bytes", "SHA-256")
    exit_code = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "file": self.file,
            "table": self.name,
            "content": self.content,
            "bytes": self.size,
            "rel_mse": self.rel_mse,
            "seconds": self.seconds,
        }

    def cells(self) -> list[str]:
        error = "-" if self.rel_mse is None else f"{self.rel_mse:.5f}"
        return [error, f"{self.seconds:.1f}", bytes_text(self.size), self.name[:16]]

    def line(self) -> str:
        error, seconds, size, _ = self.cells()
        return f"{self.file}: {self.content}, {size}; relMSE {error} of tokens that were held out; {seconds} s"
