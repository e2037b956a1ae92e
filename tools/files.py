"""Law: the inputs and outputs of a verb: files, folders, patterns, URLs, "-"; nothing is replaced without --force."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import typer
from typer.core import TyperCommand

from pqcodec.errors import InvalidArgument

STANDARD = "-"
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
            if error.param is not None and error.param.name == "sources" and given["target"] is not None:
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


def inputs(sources: Sequence[str], extensions: tuple[str, ...]) -> tuple[list[Input], bool]:
    """The files for arguments (in folders, those with an extension of ``extensions``), and whether they may be many.

    Raises InvalidArgument for a folder or a pattern without files.
    """
    found: list[Input] = []
    many = len(sources) > 1
    for source in sources:
        if source == STANDARD and len(sources) > 1:
            raise InvalidArgument("INPUT '-' stands for stdin and goes with no other input")
        pattern = glob.has_magic(source) and not os.path.exists(source)
        if _is_url(source):
            found += [Input(url, PurePosixPath(url).name) for url in (_remote_glob(source) if pattern else [source])]
        elif pattern:
            root = Path(_fixed_part(source))
            for path in sorted(glob.glob(source, recursive=True)):
                if os.path.isfile(path) or path.lower().endswith(_FOLDER):
                    found.append(Input(path, os.path.relpath(path, root)))
        elif os.path.isdir(source) and not _is_zarr(source):
            pattern = True
            found += _in_folder(source, extensions)
        else:
            found.append(Input(source, os.path.basename(source)))
        many = many or pattern
        if pattern and not found:
            raise InvalidArgument(f"{source}: no file with an extension of {', '.join(extensions)} is there")
    return found, many


def tasks(sources: Sequence[str], target: str, read: tuple[str, ...], written: str, force: bool) -> tuple[list[Task], bool]:
    """The files to read and to write, and whether they are many.

    If so, ``target`` is a folder, and outputs have the extension ``written``; ``read``: extensions of inputs in folders. Raises
    InvalidArgument where an output exists without ``force``, is also an input, or belongs to two inputs.
    """
    found, many = inputs(sources, read)
    into = os.path.isdir(target) and not target.lower().endswith(_FOLDER)
    if not many and not into and not target.endswith("/"):
        source = found[0].path
        if source != STANDARD and not _is_url(source) and not os.path.exists(source):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)
        check_output(source, target, force)
        return [Task(source, target)], False
    if not into and Path(target).suffix.lower() in (*PLAIN, *ENCODED):
        raise InvalidArgument(f"{target}: there are {len(found)} inputs; OUTPUT is a folder then, not a file")
    if target == STANDARD:
        raise InvalidArgument(f"OUTPUT is '-', but there are {len(found)} inputs; name a folder")
    seen: dict[str, str] = {}
    made = []
    for item in found:
        name = str(Path("stdin" if item.name == STANDARD else _checked_name(item.name)).with_suffix(written))
        path = f"{target.rstrip('/')}/{name}" if _is_url(target) else os.path.join(target, name)
        if path in seen:
            raise InvalidArgument(f"{seen[path]} and {item.path} would both be written to {path}; encode them one by one")
        seen[path] = item.path
        check_output(item.path, path, force)
        made.append(Task(item.path, path))
    return made, True


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

    ``local``: a URL is downloaded first, for libraries that read local files only. Raises InvalidArgument for a terminal.
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
        with tempfile.NamedTemporaryFile(prefix="pqcodec-", suffix=".stdin") as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy, 1 << 20)
            copy.flush()
            yield copy.name


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
    from pqcodec.formats.places.remote import is_url

    return is_url(text)


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
