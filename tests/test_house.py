"""The house: who may import whom, what importing costs, and that a clean wheel works in an empty folder."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from floors import FORMATS_ORDER, ORDER

ROOT = Path(__file__).parents[1]
FLOORS = {"pqcodec": set(), "formats": {"pqcodec.formats"}, "tools": {"pqcodec.formats", "pqcodec.tools"}}
HOMES = {  # third-party modules that are imported in one place only
    "numba": {"pqcodec/kernels/cpu/"},
    "llvmlite": {"pqcodec/kernels/cpu/"},
    "safetensors": {"formats/plain/files.py"},
    "zarr": {"formats/containers/zarr/"},
    "typer": {"tools"},
    "rich": {"tools"},
    "fsspec": {"formats/places/remote.py"},
    "transformers": {"formats/engines/transformers_cache/", "formats/offload/encoded_cache.py"},
    "lmcache": {"formats/engines/lmcache.py"},
    "vllm": {"formats/engines/vllm.py"},
    "redis": {"formats/store/redis_index.py"},
    "sqlite3": {"formats/store/connections.py", "formats/store/sqlite_index.py"},
    "triton": {"pqcodec/kernels/on_triton/"},
    "cuda": {"pqcodec/kernels/on_cuda/", "formats/offload/graphs.py"},
}


GALLERY = ROOT / "tools" / "docs" / "gallery"  # programs of users, not modules of ours


def sources() -> list[Path]:
    found = [path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))]
    return [path for path in found if path.parent != GALLERY]


def imports(path: Path) -> set[str]:
    """What a module imports when it runs, inside functions too; types are another matter."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way_and_libraries_have_one_home(path: Path) -> None:
    place = str(path.relative_to(ROOT))
    floor = place.split("/")[0]
    for name in imports(path):
        for upper in ("pqcodec.formats", "pqcodec.tools"):
            assert not (name.startswith(upper) and upper not in FLOORS[floor]), f"{place} reaches up to {name}"
        home = HOMES.get(name.split(".")[0])
        assert home is None or any(place.startswith(h) for h in home), f"{place} imports {name}, whose home is {home}"


@pytest.mark.parametrize(
    ("folder", "package", "order"), [("pqcodec", "pqcodec.", ORDER), ("formats", "pqcodec.formats.", FORMATS_ORDER)]
)
def test_modules_import_downwards_and_in_no_circle(folder: str, package: str, order: list[str]) -> None:
    """From their own folder and from floors below; every folder, and every module beside them, has its place in the order."""
    rank = {name: i for i, names in enumerate(order) for name in names.split()}
    graph = modules(folder, package)
    rooms = {name: name if name in rank else name.split(".")[0] for name in graph}
    assert set(rooms.values()) == set(rank)
    for name, below in graph.items():
        high = [other for other in below if rank[rooms[other]] > rank[rooms[name]]]
        assert not high, f"{name} imports {high} from above"
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_formats_and_tools_import_no_kernels() -> None:
    for folder in ("formats", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            found = [name for name in imports(path) if name.startswith("pqcodec.kernels")]
            assert not found, f"{path} imports {found}"


def modules(folder: str, package: str) -> dict[str, set[str]]:
    """The modules of a folder, by their dotted names below its package, and those of them that each imports."""
    places = {path.relative_to(ROOT / folder).with_suffix(""): path for path in (ROOT / folder).rglob("*.py")}
    paths = {".".join(place.parts): path for place, path in places.items() if place.name != "__init__"}
    return {name: {other.removeprefix(package) for other in imports(path)} & set(paths) for name, path in paths.items()}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_public_name_says_what_it_is(path: Path) -> None:
    """Functions, classes, methods and properties without a leading underscore, but for those inside functions."""

    def silent(node: ast.AST, prefix: str = "") -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
                if not ast.get_docstring(child):
                    yield f"{prefix}{child.name}, line {child.lineno}"
                if isinstance(child, ast.ClassDef):
                    yield from silent(child, f"{child.name}.")

    assert not list(silent(ast.parse(path.read_text())))


def test_no_two_public_classes_have_one_name() -> None:
    found: dict[str, list[str]] = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: paths for name, paths in found.items() if len(paths) > 1}


SAME_VERBS = [  # (names, None: any; modules and folders, in each of which such a name may occur once)
    (  # the public verbs: where the tensor is, how it is coded, what files and the command line call so
        {"encode", "decode", "decode_kept", "decode_together", "inspect", "verify", "means", "convert", "train_vq"},
        "pqcodec/codec.py pqcodec/training.py pqcodec/host.py pqcodec/device.py "
        "pqcodec/codings/split.py pqcodec/codings/paper.py pqcodec/codings/quads.py "
        "pqcodec/codings/pairs.py pqcodec/codings/scalar.py pqcodec/codings/residual.py pqcodec/codings/sketch.py "
        "formats/containers/kinds.py tools/ tools/store/",
    ),
    (  # kernel families, with the definition of what they compute
        None,
        "pqcodec/kernels/reference.py pqcodec/kernels/cpu/ pqcodec/kernels/on_triton/ pqcodec/kernels/on_cuda/ "
        "pqcodec/codings/split.py pqcodec/stream/checksum.py pqcodec/words.py",
    ),
    (  # a new container writes pieces, too
        {"write_pieces"},
        "formats/containers/pqkv/file.py formats/containers/safetensors.py formats/containers/zarr/writer.py",
    ),
    (  # a cache out of a file; a register out of memory, as processors call it
        {"load"},
        "formats/engines/transformers_cache/files.py pqcodec/kernels/cpu/lane_memory.py",
    ),
]


def test_no_two_public_functions_have_one_name_but_for_one_verb() -> None:
    found: dict[str, list[str]] = {}
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))

    def one_verb(name: str, modules: list[str]) -> bool:
        for names, places in SAME_VERBS:
            homes = [max((p for p in places.split() if m.startswith(p)), key=len, default="") for m in modules]
            if (names is None or name in names) and all(homes) and len(set(homes)) == len(homes):
                return True
        return False

    assert not {name: at for name, at in found.items() if len(at) > 1 and not one_verb(name, at)}


def test_importing_pqcodec_loads_nothing_heavy() -> None:
    heavy = "('torch', 'numba', 'numpy', 'safetensors', 'rich', 'typer', 'triton', 'cuda')"
    code = f"import sys, pqcodec; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_numpy_in_numpy_out_never_loads_torch() -> None:
    code = (
        "import sys, numpy as np, pqcodec; pqcodec.decode(pqcodec.encode(np.ones((4, 64), np.float16)));"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_help_is_quick() -> None:
    """Half a second is asked for; three are allowed here, because the machine may be busy."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pqcodec.tools.cli", "--help"], capture_output=True, check=True)
    assert time.perf_counter() - start < 3


def test_a_second_process_compiles_nothing(tmp_path: Path) -> None:
    """The kernels come from numba's cache on disk: no miss for a stream like one that was made before."""
    code = (
        "import json, numpy as np, pqcodec; from pqcodec.kernels.cpu.affine_blocks import decode_affine_blocks;"
        "stream = pqcodec.encode(np.ones((2, 80, 64), np.float16), preset='int4', backend='reference');"
        "pqcodec.decode(stream, backend='cpu'); print(sum(decode_affine_blocks.stats.cache_misses.values()))"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    for expected in (1, 0):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout
        assert json.loads(out) == expected


def test_a_clean_wheel_works_in_an_empty_folder(tmp_path: Path) -> None:
    """Built without isolation and unpacked beside nothing else: package-dir maps formats and tools into pqcodec."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    pytest.importorskip("setuptools", reason="building a wheel without isolation needs setuptools")
    subprocess.run([*build, str(ROOT)], check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    cuda = {path.name for path in (ROOT / "pqcodec/kernels/on_cuda").glob("*.cu*")}
    code = (
        "import numpy as np, pqcodec; from pqcodec.formats import PQKVFile; import pqcodec.tools.cli;"
        "from importlib.resources import files; assert files('pqcodec.formats').joinpath('SPEC.md').is_file();"
        f"cuda = files('pqcodec.kernels.on_cuda'); assert {cuda} <= {{file.name for file in cuda.iterdir()}};"
        "x = np.ones((3, 64), np.float16); print(pqcodec.__file__);"
        "assert pqcodec.decode(pqcodec.encode(x, backend='reference'), backend='reference').shape == (3, 64)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path))
