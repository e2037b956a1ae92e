"""Law: the inputs and outputs of a verb: files, folders, patterns, URLs, "-"; nothing is replaced without --force."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import typer
from typer.core import TyperCommand

from pqcodec.errors import InvalidArgument, PQError
from pqcodec.tools.jobs import Done, attempted

STANDARD = "-"
STDIN = "stdin"  # the name of what is read from it, where a file is named by its path: of one tensor
PLAIN, ENCODED = (".safetensors", ".npz", ".npy"), (".pqkv", ".safetensors", ".zarr", ".pqs")
_FOLDER = ".zarr"  # the extension of folders that count as one file


class TwoEnded(TyperCommand):
    """A verb of INPUT... and OUTPUT: a single argument is the INPUT, so that it is OUTPUT that is missing."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The parsed arguments, as typer has it."""
        try:
            return super().parse_args(ctx, list(args))
        except typer.BadParameter as error:
            given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
            if error.param is not None and error.param.name == "sources" and isinstance(given["target"], str):
                params: list[Any] = [param for param in self.params if param.name == "target"]
                error.param = params[0]
            raise


@dataclass(frozen=True)
class Input:
    """A file to read."""

    path: str  # or URL, or "-"
    name: str  # relative to the folder or pattern in which it was found


@dataclass(frozen=True)
class Task:
    """A file to read and one to write."""

    source: str
    target: str


@dataclass(frozen=True)
class WorkList:
    """The work of a verb: an item each input, which is a ``Done`` if it failed before any work was begun."""

    items: list[Any]  # Task or Input, or Done
    many: bool  # whether there may be several

    @property
    def todo(self) -> list[Any]:
        """The items that did not fail."""
        return [item for item in self.items if not isinstance(item, Done)]

    def checked(self, work: Callable[[str], Any], keep_going: bool) -> WorkList:
        """The list after ``work`` was called with every input, if they are many; raises as ``jobs.attempted`` does.

        So an input that cannot be read is named before anything is written.
        """

        def check(task: Task) -> Task:
            work(task.source)
            return task

        return WorkList(_each(self.items, check, lambda task: task.source, keep_going), True) if self.many else self


def _each(items: Sequence[Any], work: Callable[[Any], Any], path: Callable[[Any], str], keep_going: bool) -> list[Any]:
    """What ``work`` makes of each item, ``jobs.attempted``; what failed before stays."""
    return [x if isinstance(x, Done) else attempted(path(x), partial(work, x), keep_going) for x in items]


def inputs(sources: Sequence[str], extensions: tuple[str, ...], keep_going: bool = True) -> WorkList:
    """The files for arguments; in folders, those with an extension of ``extensions``.

    Raises what a single argument, or with ``keep_going=False`` any one, raises: InvalidArgument for a folder or a pattern
    without files, and OSError.
    """
    many = len(sources) > 1
    if many and STANDARD in sources:
        raise InvalidArgument("INPUT '-' stands for stdin and goes with no other input")
    found = _each(sources, partial(_found, extensions=extensions), str, keep_going and many)
    items = [item for one in found for item in (one if isinstance(one, list) else [one])]
    return WorkList(items, many or _may_be_many(sources[0]))


def _may_be_many(source: str) -> bool:
    """Whether an argument is a pattern, or a folder of files."""
    folder = not _is_url(source) and os.path.isdir(source) and not _is_zarr(source)
    return folder or (glob.has_magic(source) and not os.path.exists(source))


def _found(source: str, extensions: tuple[str, ...]) -> list[Input]:
    """The files of one argument; raises InvalidArgument or OSError."""
    if source.endswith("/") and not _is_url(source) and not os.path.isdir(source):
        code = errno.ENOTDIR if os.path.exists(source.rstrip("/")) else errno.ENOENT
        raise OSError(code, os.strerror(code), source)
    if not _may_be_many(source):
        return [Input(source, PurePosixPath(source).name if _is_url(source) else os.path.basename(source))]
    if _is_url(source):
        found = [Input(url, PurePosixPath(url).name) for url in _remote_glob(source)]
    elif os.path.isdir(source):
        found = _in_folder(source, extensions)
    else:
        paths = [path for path in sorted(glob.glob(source, recursive=True)) if os.path.isfile(path) or _is_folder_file(path)]
        found = [Input(path, os.path.relpath(path, _fixed_part(source))) for path in paths]
    if not found:
        raise InvalidArgument(f"{source}: no file with an extension of {', '.join(extensions)} is there")
    return found


def _is_folder_file(path: str) -> bool:
    return path.lower().endswith(_FOLDER)


def tasks(
    sources: Sequence[str], target: str, read: tuple[str, ...], written: str, force: bool, keep_going: bool = False
) -> WorkList:
    """The files to read and to write.

    If they may be many, ``target`` is a folder, and outputs have the extension ``written``; ``read``: extensions of inputs in
    folders. Raises InvalidArgument where an output exists without ``force``, is also an input, or belongs to two inputs; with
    ``keep_going`` such an input is one that failed.
    """
    listed = inputs(sources, read, keep_going)
    found, many = listed.items, listed.many
    into = os.path.isdir(target) and not target.lower().endswith(_FOLDER)
    if not many and not into and not target.endswith("/"):
        source = found[0].path
        if source != STANDARD and not _is_url(source) and not os.path.exists(source):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)
        check_output(source, target, force)
        return WorkList([Task(source, target)], False)
    if not into and Path(target).suffix.lower() in (*PLAIN, *ENCODED):
        raise InvalidArgument(f"{target}: there are {len(found)} inputs; OUTPUT is a folder then, not a file")
    if target == STANDARD:
        raise InvalidArgument(f"OUTPUT is '-', but there are {len(found)} inputs; name a folder")
    seen: dict[str, str] = {}

    def task(item: Input) -> Task:
        name = str(Path("stdin" if item.name == STANDARD else _checked_name(item.name)).with_suffix(written))
        path = f"{target.rstrip('/')}/{name}" if _is_url(target) else os.path.join(target, name)
        if path in seen:
            raise InvalidArgument(f"{seen[path]} and {item.path} would both be written to {path}; encode them one by one")
        seen[path] = item.path
        check_output(item.path, path, force)
        return Task(item.path, path)

    return WorkList(_each(found, task, lambda item: item.path, keep_going), True)


@contextmanager
def written_like(source: str, target: str, *, folder: bool = False) -> Iterator[None]:
    """A context in which ``target`` is written with the mode of the input, less the umask; private for stdin and URLs.

    ``folder``: also make the target's folder, unless it is a URL.
    """
    from pqcodec.formats.places.atomic import PRIVATE, permissions, searchable

    local = source != STANDARD and not _is_url(source)
    mode = os.stat(source).st_mode & 0o666 if local else PRIVATE
    if folder:
        make_parents(target, searchable(mode))
    with permissions(mode):
        yield


def make_parents(target: str, mode: int = 0o700) -> None:
    """Make the missing folders above a file to be written, unless it is a URL; raises OSError."""
    from pqcodec.formats.places.atomic import make_folders

    if not _is_url(target):
        make_folders(Path(target).parent, mode)


@contextmanager
def input_file(name: str, *, local: bool = False) -> Iterator[str]:
    """A context with the path or URL of an input; stdin is copied to a temporary file, since readers need to seek.

    ``local``: a URL is downloaded first, for libraries that read local files only. Raises InvalidArgument for a terminal, and
    where nothing comes.
    """
    if _is_url(name) and local:
        from pqcodec.formats.places import remote

        with remote.downloaded(name) as path:
            yield str(path)
    elif name != STANDARD:
        yield name
    elif sys.stdin.isatty():
        raise InvalidArgument("INPUT is '-', but stdin is a terminal; pipe a file into it")
    else:
        with tempfile.TemporaryDirectory(prefix="pqcodec-") as folder:
            copy = os.path.join(folder, STDIN)
            with open(copy, "xb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
            if not os.path.getsize(copy):
                raise InvalidArgument("INPUT is '-', but stdin is empty; pipe a file into it")
            try:
                yield copy
            except PQError as error:
                _rename(error, copy, STDIN)
                raise


def _rename(error: PQError, path: str, name: str) -> None:
    """Have an error say ``name``, since the user never wrote ``path``."""
    error.args = tuple(told.replace(path, name) if isinstance(told, str) else told for told in error.args)
    vars(error).update({key: told.replace(path, name) for key, told in vars(error).items() if isinstance(told, str)})


@contextmanager
def output_file(target: str, extension: str) -> Iterator[str]:
    """A context with the path or URL to write to; "-" is a temporary file, copied to stdout when it is complete."""
    if target != STANDARD:
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="pqcodec-") as folder:
        made = os.path.join(folder, f"stdout{extension}")
        yield made
        with open(made, "rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer, 1 << 20)


def check_output(source: str, target: str, force: bool) -> None:
    """Refuse an output that is the input, or that exists without ``force``; raises InvalidArgument."""
    if target == STANDARD:
        if sys.stdout.isatty():
            raise InvalidArgument("OUTPUT is '-', but stdout is a terminal; pipe it somewhere")
        return
    if source == target:
        raise InvalidArgument(f"{target}: is the input as well; write to another file")
    if _is_url(target):
        from pqcodec.formats.places import remote

        if not force and remote.exists(target):
            raise InvalidArgument(f"{target}: exists; pass --force to replace it")
        return
    if not os.path.exists(target):
        if os.path.islink(target) and not force:
            link = f"is a link to {os.path.realpath(target)}, where nothing is"
            raise InvalidArgument(f"{target}: {link}; pass --force to write there")
        return
    if source != STANDARD and os.path.exists(source) and os.path.samefile(source, target):
        raise InvalidArgument(f"{target}: is the input as well; write to another file")
    if not force and (os.path.isfile(target) or target.lower().endswith(_FOLDER)):
        raise InvalidArgument(f"{target}: exists; pass --force to replace it")


def _is_url(text: str) -> bool:
    from pqcodec.formats.places import remote

    return remote.is_url(text)


def _checked_name(name: str) -> str:
    """The relative name of an input, which names its output; raises InvalidArgument where it leads out of the folder."""
    if not name or any(part in ("", ".", "..") for part in name.split("/")):
        raise InvalidArgument(f"{name!r}: would be written outside OUTPUT; name that input by itself, and a file as OUTPUT")
    return name


def _remote_glob(pattern: str) -> list[str]:
    from pqcodec.formats.places import remote

    return remote.matching(pattern)


def _is_zarr(folder: str) -> bool:
    return os.path.exists(os.path.join(folder, "zarr.json"))


def _fixed_part(pattern: str) -> str:
    """The part of a pattern before its first component with a wildcard."""
    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    return str(Path(*parts[:fixed])) if fixed else "."


def _in_folder(folder: str, extensions: tuple[str, ...]) -> list[Input]:
    """The files below a folder with these extensions; .safetensors files only if plain, or encoded, as the verb needs."""
    found = []
    for parent, folders, names in os.walk(folder):
        whole = [name for name in folders if _is_zarr(os.path.join(parent, name))]
        folders[:] = sorted(set(folders) - set(whole))
        for name in sorted([*names, *whole]):
            path = os.path.join(parent, name)
            usable = os.path.isfile(path) or name in whole  # no pipes, which would block
            if usable and Path(name).suffix.lower() in extensions and _holds(path, extensions):
                found.append(Input(path, os.path.relpath(path, folder)))
    return found


def _holds(path: str, extensions: tuple[str, ...]) -> bool:
    """Whether a .safetensors file holds streams, if those are wanted, or plain tensors; True for an unreadable one."""
    if not path.lower().endswith(".safetensors"):
        return True
    from pqcodec.errors import PQError
    from pqcodec.formats.plain.files import holds_streams

    try:
        return holds_streams(path) == (extensions == ENCODED)
    except (PQError, OSError):
        return True
