"""Compiled kernels on disk: an edit of any source makes them stale, and only a folder of the user's own serves."""

from __future__ import annotations

import ast
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
from numba import config
from numba.core.dispatcher import Dispatcher

from pqcodec.kernels.cpu import bits, blocks, disk_cache, numbers, offsets, paper, rotation, samples, sides, split

ROOT = Path(__file__).parents[1]
BLOCKS = "pqcodec.kernels.cpu.blocks"
KERNELS = """
from pqcodec.constants import GRID
from pqcodec.kernels.cpu.disk_cache import kept

@kept(nogil=True)
def inner(x):
    return x * GRID

@kept(nogil=True)
def outer(x):
    return inner(x) + 1
"""
CALL = """
import json, os, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from pqcodec.kernels.cpu import disk_cache, small
    {between}
    results = [small.outer(x) for x in {arguments}]
print(json.dumps({{
    "folder": str(disk_cache.folder().path),
    "results": results,
    "misses": sum(small.outer.stats.cache_misses.values()),
    "warnings": [str(w.message) for w in caught if w.category is RuntimeWarning],
}}))
"""


# -- sources -----------------------------------------------------------------------------------------------------
def _reached(module: str) -> set[str]:
    """The modules of pqcodec that a module's syntax tree imports, and theirs, and so on."""
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        path = ROOT.joinpath(*name.split("."))
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names if alias.name.split(".")[0] == "pqcodec"]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{name} imports by a relative name, which the key does not see"
                below = [f"{node.module}.{alias.name}" for alias in node.names]
                if str(node.module).split(".")[0] == "pqcodec":
                    waiting += [b if ROOT.joinpath(*b.split(".")).with_suffix(".py").is_file() else node.module for b in below]
    return found


def test_the_key_sees_every_source_that_reaches_a_kernel() -> None:
    seen = disk_cache.sources(BLOCKS)
    assert set(seen) == _reached(BLOCKS)
    assert {BLOCKS, "pqcodec.kernels.cpu.split", "pqcodec.kernels.cpu.lanes", "pqcodec.constants"} <= set(seen)
    assert all(text == ROOT.joinpath(*name.split(".")).with_suffix(".py").read_text() for name, text in seen.items())


def test_every_kernel_goes_through_the_key() -> None:
    modules = (bits, blocks, numbers, offsets, paper, rotation, samples, sides, split)
    kernels = {value for module in modules for value in vars(module).values() if isinstance(value, Dispatcher)}
    assert blocks.decode_stream_blocks in kernels
    if disk_cache.folder() is not None:
        assert all(isinstance(kernel._cache, disk_cache._Cache) for kernel in kernels)
        digests = {kernel: str(disk_cache.sources_hash(kernel.py_func.__module__)) for kernel in kernels}
        assert all(digest[:16] in kernel._cache._impl.filename_base for kernel, digest in digests.items())
    for path in (ROOT / "pqcodec").rglob("*.py"):
        if path.stem != "disk_cache":
            assert "njit" not in path.read_text(), f"{path} compiles beside disk_cache.kept"


@pytest.mark.parametrize("name", ["kernels/cpu/blocks", "kernels/cpu/split", "kernels/cpu/lanes", "constants"])
def test_an_edit_changes_the_hash(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = disk_cache.sources(BLOCKS)
    before = disk_cache.sources_hash(BLOCKS)
    module = "pqcodec." + name.replace("/", ".")
    monkeypatch.setattr(disk_cache, "sources", lambda _: seen | {module: seen[module] + "#"})
    assert disk_cache.sources_hash.__wrapped__(BLOCKS) != before


def test_without_sources_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_cache, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match=f"{BLOCKS} has no source"):
        assert disk_cache.sources_hash.__wrapped__(BLOCKS) is None


# -- small kernels in a copy of the package, a process each ------------------------------------------------------
@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the package and two kernels more."""
    shutil.copytree(ROOT / "pqcodec", tmp_path / "pqcodec", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pqcodec" / "kernels" / "cpu" / "small.py").write_text(KERNELS)
    return tmp_path


def run(code: str, copy: Path, **variables: str) -> str:
    """What Python prints that imports the copy and writes no bytecode, whose time stamps are too coarse for quick edits."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")} | {"XDG_CACHE_HOME": str(copy / "xdg")}
    made = [sys.executable, "-B", "-c", code]
    done = subprocess.run(made, cwd=copy, env=environment | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def call(copy: Path, arguments: str = "[3]", between: str = "", **variables: str) -> dict:
    return json.loads(run(CALL.format(arguments=arguments, between=between), copy, **variables))


def test_what_is_compiled_is_logged_and_what_is_kept_is_not(copy: Path) -> None:
    logged = "import logging; logging.basicConfig(level=logging.INFO, format='%(message)s')"
    code = f"{logged}; from pqcodec.kernels.cpu import small; small.outer(3)"
    heard = [run(f"import sys; sys.stderr = sys.stdout; {code}", copy).splitlines() for _ in range(2)]
    assert heard == [[disk_cache.COMPILING, "compiling outer", "compiling inner"], []]


def test_a_program_that_logs_nothing_is_told_once_that_it_waits(copy: Path) -> None:
    code = "import sys; sys.stderr = sys.stdout; from pqcodec.kernels.cpu import small; small.outer(3); small.outer(3.5)"
    assert [run(code, copy).splitlines() for _ in range(2)] == [[disk_cache.COMPILING], []]


def test_an_edited_constant_is_compiled_anew(copy: Path) -> None:
    constants = copy / "pqcodec" / "constants.py"
    old = constants.read_text()
    new = old.replace("GRID = 2048", "GRID = 1024")
    assert new != old
    for text, expected in ((old, (6145, 1)), (old, (6145, 0)), (new, (3073, 1)), (new, (3073, 0)), (old, (6145, 0))):
        constants.write_text(text)
        found = call(copy)
        assert (*found["results"], found["misses"]) == expected
        assert found["warnings"] == []


def test_damaged_files_are_replaced(copy: Path) -> None:
    call(copy)
    place = Path(call(copy)["folder"])
    for ending in ("nbi", "nbc"):
        damaged = list(place.glob(f"small.*.{ending}"))
        assert len(damaged) == 2
        for path in damaged:
            path.write_bytes(path.read_bytes()[:-7])
        for misses in (1, 0):
            found = call(copy)
            assert (found["results"], found["misses"], found["warnings"]) == ([6145], misses, [])


def test_code_of_other_types_is_not_taken(copy: Path) -> None:
    """What two processes leave that save their first files at once."""
    both = "[3, 0.5]"
    place = Path(call(copy, both)["folder"])
    first, second = sorted(place.glob("small.outer*.nbc"))
    codes = first.read_bytes(), second.read_bytes()
    second.write_bytes(codes[0])
    first.write_bytes(codes[1])
    for misses in (2, 0):
        found = call(copy, both)
        assert (found["results"], found["misses"]) == ([6145, 1025.0], misses)


@pytest.mark.parametrize(
    ("between", "told"),
    [("os.chmod(disk_cache.folder().path, 0o777)", "others may write"), ("disk_cache.os.lstat = no", "no disk")],
)
def test_a_folder_that_fails_later_costs_one_warning(between: str, told: str, copy: Path) -> None:
    call(copy, NUMBA_CACHE_DIR=str(copy / "named"))
    failing = f"no = lambda path: (_ for _ in ()).throw(OSError('no disk')); {between}"
    found = call(copy, "[3, 0.5]", failing, NUMBA_CACHE_DIR=str(copy / "named"))
    assert (found["results"], found["misses"]) == ([6145, 1025.0], 2)
    (warning,) = found["warnings"]
    assert told in warning


def test_the_codec_works_without_any_folder(copy: Path) -> None:
    """A read-only install, an unwritable HOME and no folder for temporary files; root too can make nothing under a file."""
    file = copy / "file"
    file.touch()
    (copy / "pqcodec" / "kernels" / "cpu" / "__pycache__").touch()
    code = (
        "import json, tempfile, warnings; import numpy as np, pqcodec; from pqcodec.kernels.cpu import disk_cache\n"
        f"tempfile.tempdir = {str(file / 'temp')!r}; disk_cache.folder.cache_clear()\n"
        "x = np.linspace(-3, 3, 2 * 70 * 64).astype(np.float16).reshape(2, 70, 64)\n"
        "stream = pqcodec.encode(x, preset='int4', backend='reference')\n"  # its kernel is the quickest to compile
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    y = pqcodec.decode(stream, backend='cpu')\n"
        "same = np.array_equal(y.view(np.uint16), pqcodec.decode(stream, backend='reference').view(np.uint16))\n"
        "print(json.dumps([disk_cache.folder() is None, same, [str(w.message) for w in caught]]))"
    )
    home = str(file / "home")
    nowhere, same, caught = json.loads(run(code, copy, HOME=home, XDG_CACHE_HOME="", NUMBA_CACHE_DIR=str(file / "named")))
    assert nowhere
    assert same
    assert len(caught) == 1
    assert "compiled in every process" in caught[0]


# -- the folder --------------------------------------------------------------------------------------------------
@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The folders of the law, none made yet."""
    home = Path(os.path.realpath(tmp_path))
    for name in ("install", "temp"):
        (home / name).mkdir(mode=0o700)
    monkeypatch.setattr(config, "CACHE_DIR", "")
    monkeypatch.setattr(disk_cache, "__file__", str(home / "install" / "disk_cache.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "xdg"))
    monkeypatch.setenv("HOME", str(home / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(home / "temp"))
    monkeypatch.setattr(disk_cache, "folder", disk_cache.folder.__wrapped__)
    return {
        "install": home / "install" / "__pycache__",
        "user": home / "xdg" / "pqcodec" / "numba",
        "temporary": home / "temp" / f"pqcodec-{os.geteuid()}",
    }


def _chosen() -> Path | None:
    """The folder that is chosen without any warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = disk_cache.folder()
    return found and found.path


def test_folders_are_tried_in_order(places: dict[str, Path]) -> None:
    for path in places.values():
        assert _chosen() == path
        assert stat.S_IMODE(path.stat().st_mode) & 0o22 == 0
        path.rmdir()
        path.touch()
    assert stat.S_IMODE(places["user"].parent.stat().st_mode) == 0o700
    with pytest.warns(RuntimeWarning, match=r"(?s)compiled in every process.*install.*xdg.*temp.*NUMBA_CACHE_DIR") as told:
        assert disk_cache.folder() is None
    assert len(told) == 1


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o1777])
def test_a_folder_that_others_may_write_is_passed_over(mode: int, places: dict[str, Path]) -> None:
    places["install"].mkdir()
    places["install"].chmod(mode)
    assert _chosen() == places["user"]
    places["user"].chmod(mode)
    assert _chosen() == places["temporary"]
    places["temporary"].chmod(mode)
    with pytest.warns(RuntimeWarning, match="others may write"):
        assert disk_cache.folder() is None


def test_a_parent_that_others_may_change_is_passed_over(places: dict[str, Path]) -> None:
    """Unless it is sticky, like /tmp: there nobody replaces what is another's."""
    for path in list(places.values())[:2]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.parent.chmod(0o777)
    places["temporary"].parent.chmod(0o1777)
    assert _chosen() == places["temporary"]
    assert not places["user"].exists()


def test_a_link_is_no_folder_of_ones_own(places: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    places["install"].symlink_to(tmp_path / "elsewhere")
    assert _chosen() == places["user"]


def test_a_folder_of_another_user_is_refused(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    places["install"].mkdir()
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(PermissionError, match=f"belongs to user {owner}, and this is user {owner + 1}"):
        disk_cache.Folder(places["install"], named=True).make()
    with pytest.warns(RuntimeWarning, match="belongs to user"):
        assert disk_cache.folder() is None


def test_the_folder_that_the_user_names_comes_first(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parents are the user's choice; the folder itself has to be the user's own."""
    named = tmp_path / "named"
    named.mkdir()
    named.chmod(0o777)
    monkeypatch.setattr(config, "CACHE_DIR", str(named))
    chosen = _chosen()
    assert chosen is not None
    assert chosen.parent == Path(os.path.realpath(named))
    chosen.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR is not used: others may write .* kept in .*__pycache__") as told:
        assert disk_cache.folder() == disk_cache.Folder(places["install"])
    assert len(told) == 1


def test_a_named_folder_that_cannot_be_made_is_told(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "file" / "named"))
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR is not used: .*Not a directory") as told:
        assert disk_cache.folder() == disk_cache.Folder(places["install"])
    assert len(told) == 1


@pytest.mark.parametrize("relative", ["", "caches"])
def test_a_relative_cache_home_is_ignored(
    relative: str, places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", relative)
    places["install"].touch()
    assert _chosen() == Path(os.path.realpath(tmp_path)) / "home" / ".cache" / "pqcodec" / "numba"
