"""Law: where compiled kernels are kept on disk, and what makes a kept one stale.

numba's cache is made of pickles: who can write into its folder runs code in this process. So a folder serves only where it
belongs to this user and nobody else may write in it, one that was there before as well; and pqcodec picks none on its own
whose path others could turn elsewhere. The folders tried, in this order:

- NUMBA_CACHE_DIR, where it is set;
- ``__pycache__`` beside the kernels;
- ``pqcodec/numba`` in XDG_CACHE_HOME, or in ~/.cache;
- ``pqcodec-<user id>`` in the folder for temporary files.

Where none serves, kernels are compiled in every process, and one warning says so. Where one serves that does not hold a kernel
yet, a line of the module's logger says once a process that the wait is for compiling, at level WARNING, which Python shows on
stderr; at level INFO it names each kernel. The name of a kept file holds a hash of every source of pqcodec that reaches its
kernel: after an edit of any of them, other files are looked for. Files of former sources stay until somebody deletes them; they
may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from numba import config, njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.sigutils import normalize_signature

# Kernels name what they import as "from pqcodec.<module> import"; tests/test_disk_cache.py compares with the syntax trees
_IMPORTED = re.compile(r"^\s*(?:from|import)\s+(pqcodec\.[\w.]+)", re.MULTILINE)
_LOG = logging.getLogger(__name__)
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
COMPILING = "pqcodec: compiling kernels for this machine, once (20 to 50 s); `pqcodec warmup` does it ahead"
_IN_EVERY_PROCESS = "Kernels are compiled in every process, which takes about 20 s"


def kept(**options: Any) -> Callable[[Callable], Any]:
    """``numba.njit`` with these options, its machine code kept on disk where that can be done."""

    def decorate(function: Callable) -> Any:
        kernel = njit(**options)(function)
        if folder() is not None and sources_hash(function.__module__) is not None:
            kernel._cache = _Cache(function)  # as numba's own ``enable_caching`` does
        return kernel

    return decorate


# -- the folder --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Folder:
    """A folder for compiled code; ``named``: the user named it, so its parents are the user's own choice."""

    path: Path
    named: bool = False

    def make(self) -> None:
        """Make it unless it is there. Raises OSError where that fails or somebody else could put code in it."""
        missing = [place for place in (self.path, *self.path.parents) if not os.path.lexists(place)]
        if not self.named:
            for place in self.path.parents:
                if place not in missing:
                    _check_parent(place)
        for place in reversed(missing):
            # Python's own files stay readable for every user
            place.mkdir(0o755 if place.name == "__pycache__" else 0o700, exist_ok=True)
        _check_own(self.path)


def _check_own(folder: Path) -> None:
    """Raise OSError unless the folder is this user's alone. Windows has neither ids nor such bits: profiles are private."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(f"{folder} is no folder")
    if hasattr(os, "geteuid"):
        if found.st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to user {found.st_uid}, and this is user {os.geteuid()}")
        if found.st_mode & _OTHERS_WRITE:
            raise PermissionError(
                f"others may write in {folder}, whose mode is {stat.S_IMODE(found.st_mode):o}; 700 is expected"
            )


def _check_parent(place: Path) -> None:
    """Raise OSError where users other than this one and the machine's could put another folder into ``place``."""
    if not hasattr(os, "geteuid"):
        return
    found = os.lstat(place)
    # in a user namespace the machine's own user has another number: that of the topmost folder
    if found.st_uid not in {os.geteuid(), 0, os.lstat("/").st_uid}:
        raise PermissionError(f"{place} belongs to user {found.st_uid}, and this is user {os.geteuid()}")
    if found.st_mode & _OTHERS_WRITE and not found.st_mode & stat.S_ISVTX:
        raise PermissionError(f"others may replace what is in {place}, whose mode is {stat.S_IMODE(found.st_mode):o}")


def _candidates() -> Iterator[Folder]:
    """Folders in the order of the law; parents are resolved, so that no link stands in a path that is checked."""
    if _named():
        yield Folder(_below(_named(), _CacheLocator.get_suitable_cache_subpath(__file__)), named=True)
    yield Folder(_below(os.path.dirname(__file__), "__pycache__"))
    for home in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(home):
            yield Folder(_below(home, "pqcodec", "numba"))
            break
    with suppress(OSError):  # there is no folder for temporary files
        temporary = tempfile.gettempdir()
        yield Folder(_below(temporary, f"pqcodec-{os.geteuid()}" if hasattr(os, "geteuid") else "pqcodec"))


def _named() -> str:
    """NUMBA_CACHE_DIR, as numba read it."""
    return config.CACHE_DIR  # type: ignore[attr-defined]


def _below(parent: str, *names: str) -> Path:
    path = Path(parent, *names)
    return Path(os.path.realpath(path.parent), path.name)


@lru_cache(maxsize=1)
def folder() -> Folder | None:
    """The folder of this process. Warns where there is none, or where it is not the one that the user named."""
    refused: list[str] = []
    for candidate in _candidates():
        try:
            candidate.make()
            tempfile.TemporaryFile(dir=candidate.path).close()
        except OSError as error:
            refused.append(str(error))
            continue
        if _named() and not candidate.named:
            _warn(f"NUMBA_CACHE_DIR is not used: {refused[0]}. Compiled kernels are kept in {candidate.path}")
        return candidate
    _warn(f"{_IN_EVERY_PROCESS}: no folder can keep them ({'; '.join(refused)}). Set NUMBA_CACHE_DIR to a folder of your own")
    return None


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


@lru_cache
def _tell_of_compiling() -> None:
    """Say once that this process waits for the compiler, so that a first use does not seem to hang."""
    _LOG.warning(COMPILING)


# -- the sources -------------------------------------------------------------------------------------------------
def sources(module: str) -> dict[str, str]:
    """The text of a module, of the modules of pqcodec that it imports, of those that they import ...: by name.

    Raises ImportError where one has no source, as in a package of compiled files only.
    """
    found: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in found:
            loader: Any = getattr(find_spec(name), "loader", None)
            text = loader.get_source(name) if hasattr(loader, "get_source") else None
            if text is None:
                raise ImportError(f"{name} has no source", name=name)
            found[name] = text
            waiting += _IMPORTED.findall(text)
    return found


@lru_cache
def sources_hash(module: str) -> str | None:
    """SHA-256 of ``sources``, in hex; without sources None, and a warning, for nothing would tell a stale file."""
    total = hashlib.sha256()
    try:
        for name, text in sorted(sources(module).items()):
            total.update(f"{name} {len(text)}\n{text}".encode())
    except (ImportError, OSError) as error:
        _warn(f"{_IN_EVERY_PROCESS}: {error}, so what is kept on disk could be stale")
        return None
    return total.hexdigest()


# -- what numba asks ---------------------------------------------------------------------------------------------
class _Locator(_CacheLocator):
    """Where the files of a kernel are, and their stamp."""

    def __init__(self, function: Callable, file: str) -> None:
        self._py_file = file  # numba names it in a warning
        self._function = function

    @classmethod
    def from_function(cls, py_func: Callable, py_file: str) -> _Locator:
        return cls(py_func, py_file)

    def get_cache_path(self) -> str:
        return str(_folder().path)

    def ensure_cache_path(self) -> None:
        _folder().make()

    def get_source_stamp(self) -> str | None:
        return sources_hash(self._function.__module__)

    def get_disambiguator(self) -> str:
        return str(self._function.__code__.co_firstlineno)


def _folder() -> Folder:
    found = folder()
    assert found is not None  # ``kept`` makes no cache without one
    return found


class _Files(CompileResultCacheImpl):
    """The names of a kernel's files: numba's, and the hash of the sources.

    The stamp alone, inside the index, is too little: numba replaces a stale index before the code that it points to.
    """

    _locator_classes: ClassVar = [_Locator]  # type: ignore[misc]

    def __init__(self, function: Callable) -> None:
        self._sources = str(sources_hash(function.__module__))
        super().__init__(function)

    def get_filename_base(self, fullname: str, abiflags: str) -> str:
        return f"{super().get_filename_base(fullname, abiflags)}-{self._sources[:16]}"


class _Cache(FunctionCache):
    """numba's cache, whose faults end in a kernel that is compiled, and never in an error of encode or decode."""

    _impl_class = _Files
    _serves: ClassVar = True

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = self._unless_disk_fails(self._load, sig, target_context)
        if found is None:
            _tell_of_compiling()
            _LOG.info("compiling %s", self._py_func.__qualname__)
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        self._unless_disk_fails(super().save_overload, sig, data)

    def _load(self, sig: Any, target_context: Any) -> Any:
        """The kernel, or None. The folder is checked again: in a long life others may have removed it and made their own."""
        self._impl.locator.ensure_cache_path()
        _check_own(Path(self.cache_path))  # also where NUMBA_CACHE_LOCATOR_CLASSES names another locator
        try:
            found = super().load_overload(sig, target_context)
        except OSError:
            raise
        except Exception:  # a damaged file, as after a loss of power: an empty index takes the place of its own
            self.flush()
            return None
        # Two processes that save at once may both call their file the first, and one index then points to the other's code
        return found if found is not None and tuple(found.signature.args) == tuple(normalize_signature(sig)[0]) else None

    def _unless_disk_fails(self, work: Callable, *arguments: Any) -> Any:
        """None where it does: then nothing more is kept by this process, and one warning says so."""
        if not _Cache._serves:
            return None
        try:
            return work(*arguments)
        except OSError as error:
            _Cache._serves = False
            _warn(f"{_IN_EVERY_PROCESS}, until they can be kept on disk: {error}")
            return None
