"""The core of the tests against the oldest and the newest dependencies that pyproject.toml allows, on every Python found.

``make test-matrix`` runs it with nox. torch comes first and stays: a CPU build, since others are of several GB. At the floor it
is the oldest that is allowed; at the ceiling, and where no index has that one, the Makefile's. A Python that is missing, or
without such a build, is left out, and nox's summary says so.
"""

from __future__ import annotations

import re
from pathlib import Path

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).parent.parent
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
EXTRAS = ".[cuda,redis,remote,transformers,zarr]"
CORE = (  # each dependency is touched: numpy, numba, torch; safetensors; zarr, fsspec, redis; typer, rich; transformers; triton
    *("golden", "codec", "options", "quads"),
    *("safetensors", "pqkv", "containers", "zarr", "remote", "cli", "index"),
    *("transformers_cache", "encoded_cache", "host_pool"),
)


def _versions(bound: str) -> list[str]:
    """Versions of torch, the best one first."""
    pinned = re.findall(r"torch==([\d.]+)", (ROOT / "Makefile").read_text())
    oldest = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    return [*oldest, *pinned] if bound == "floor" else pinned


def _install_torch(session: nox.Session, bound: str) -> None:
    """The first version of which there is a CPU build; without any, the session is skipped."""
    for version in _versions(bound):
        try:
            return session.install(f"torch=={version}+cpu", silent=True)
        except CommandFailed:
            session.warn(
                f"no CPU build of torch {version} for Python {session.python}; PIP_EXTRA_INDEX_URL can name an index of them"
            )
    session.skip("torch is missing")


@nox.session(python=PYTHONS, venv_backend="venv")
@nox.parametrize("bound", ["floor", "ceiling"])
def core(session: nox.Session, bound: str) -> None:
    """All dependencies at one bound, and the newest tools to test with."""
    session.chdir(ROOT)
    _install_torch(session, bound)
    excludes = Path(session.create_tmp()) / "excludes.txt"
    excludes.write_text("torch\n")
    resolution = {"floor": "lowest-direct", "ceiling": "highest"}[bound]
    session.install("uv")
    install = ("python", "-m", "uv", "pip", "install", "--quiet")
    session.run(*install, "--resolution", resolution, "--excludes", excludes, "--editable", EXTRAS)
    session.run(*install, "pytest", "pytest-xdist", "hypothesis")
    tests = [f"tests/test_{name}.py" for name in CORE]
    options = ["-q", "-n", "2", "--dist", "worksteal", "--deselect", "tests/test_cli.py::test_help_is_quick"]
    session.run("pytest", *options, *tests, env={"NUMBA_CACHE_DIR": str(excludes.parent / "numba"), "OMP_NUM_THREADS": "1"})
