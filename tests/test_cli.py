"""The command line: each verb, its exit codes, and what it prints where."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import pqcodec
from pqcodec.formats import PQKVFile
from pqcodec.formats.plain.files import open_tensors
from pqcodec.tools.cli import app

REFERENCE = ("--backend", "reference")
METADATA = {"format": "pt", "model": "tiny"} | {f"note {i}": "é" for i in range(9)}


def run(*arguments: object, stdin: bytes | None = None, code: int = 0) -> Any:
    """Run a verb and check its exit code."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    assert "Traceback" not in result.stderr
    return result


def told(*arguments: object, code: int = 0) -> dict[str, Any]:
    """The JSON object that a verb prints; it is all that is on stdout."""
    return json.loads(run(*arguments, "--json", code=code).stdout)


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess:
    call = [sys.executable, "-m", "pqcodec.tools.cli", *(str(a) for a in arguments)]
    return subprocess.run(call, capture_output=True, timeout=120, **options)


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = {
        f"layers.{i}.{role}": rng.standard_normal((1, 2, 20, 64)).astype(np.float16)
        for i in range(2)
        for role in ("key", "value")
    }
    return x | {"positions": np.arange(20), "hidden": rng.standard_normal((20, 64)).astype(np.float32)}


@pytest.fixture(scope="module")
def made(tensors: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of tensors and what ``encode`` makes of it."""
    folder = tmp_path_factory.mktemp("made")
    save_file(tensors, folder / "in.safetensors", metadata=METADATA)
    run("encode", folder / "in.safetensors", folder / "c.pqkv", *REFERENCE)
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made / "in.safetensors", tmp_path))


@pytest.fixture
def coded(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made / "c.pqkv", tmp_path))


def damaged(path: Path, name: str) -> Path:
    """The file with a bit of the last block of a tensor turned."""
    with PQKVFile(path) as file:
        entry = file.entry(name)
    data = bytearray(path.read_bytes())
    data[entry.body_start + entry.body_bytes - 8] ^= 4
    path.write_bytes(data)
    return path


# -- encode and decode -------------------------------------------------------------------------------------------
def test_round_trip(cache: Path, coded: Path, tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    run("decode", coded, tmp_path / "out.safetensors", *REFERENCE)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        y = found[name]
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        assert ((x.astype(float) - y) ** 2).sum() <= 0.05 * (x.astype(float) ** 2).sum()
    np.testing.assert_array_equal(found["positions"], tensors["positions"])
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        assert file.metadata() == METADATA


def test_defaults_follow_the_role(coded: Path) -> None:
    with PQKVFile(coded) as file:
        key, value, other = (file.inspect(name) for name in ("layers.0.key", "layers.0.value", "hidden"))
        assert (file.entry("layers.1.value").role, file.entry("layers.1.value").layer) == ("value", 1)
    assert (key.centered, key.exact_tokens) == ("mean", 4)
    assert (value.centered, value.exact_tokens) == (None, 4)
    assert (other.centered, other.exact_tokens) == (None, 0)


@pytest.mark.parametrize(
    ("options", "centered"),
    [
        (["--rope-theta", "10000"], "rope"),
        (["--rope-theta", "10000", "--rope-dim", "32", "--rope-style", "interleaved", "--rope-first", "7"], "rope"),
        (["--center", "mean"], "mean"),
        (["--center", "none"], None),
    ],
)
def test_center(cache: Path, tmp_path: Path, options: list[str], centered: str | None) -> None:
    run("encode", cache, tmp_path / "o.pqkv", *options, *REFERENCE)
    with PQKVFile(tmp_path / "o.pqkv") as file:
        assert file.inspect("layers.0.key").centered == centered
        assert file.inspect("layers.0.value").centered is None


def test_encode_options_reach_the_stream(cache: Path, tmp_path: Path) -> None:
    options = ["--preset", "pq4", "--seed", "9", "--exact-tokens", "2", "--chunk-tokens", "16"]
    run("encode", cache, tmp_path / "o.pqkv", *options, *REFERENCE)
    with PQKVFile(tmp_path / "o.pqkv") as file:
        info = file.inspect("layers.0.key")
    assert (info.preset, info.seed, info.exact_tokens, info.chunk_tokens) == ("pq4", 9, 2, 16)


def test_check_tells_the_error_by_role(cache: Path, tmp_path: Path) -> None:
    outcome = told("encode", cache, tmp_path / "o.pqkv", "--check", *REFERENCE)
    assert outcome["tensors"] == 5
    assert outcome["exact_tensors"] == [{"name": "positions", "reason": "dtype int64"}]
    assert 0.01 < outcome["rel_mse"]["key"] < 0.04
    assert outcome["rel_mse"].keys() == outcome["bits_per_coordinate"].keys() == {"all", "key", "value", "other"}
    assert outcome["file_bytes"] == (tmp_path / "o.pqkv").stat().st_size
    assert 1 < outcome["ratio"] < 16


def test_last_line_and_notes_are_for_people(cache: Path, tmp_path: Path) -> None:
    result = run("encode", cache, tmp_path / "o.pqkv", "--check", *REFERENCE)
    assert "5 tensors and 1 exact" in result.stdout
    assert "relMSE" in result.stdout
    assert result.stdout.count("\n") == 1
    assert "positions" in result.stderr
    assert "hidden" in result.stderr


def test_regexes_name_keys_and_values(tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", **{f"{n}_{i}": np.ones((8, 64), np.float32) for n in ("kk", "vv") for i in range(2)})
    run("encode", tmp_path / "in.npz", tmp_path / "o.pqkv", "--keys", "^kk", "--values", "^vv", *REFERENCE)
    with PQKVFile(tmp_path / "o.pqkv") as file:
        assert [(file.entry(n).role, file.entry(n).layer) for n in file.names] == [
            ("key", 0),
            ("key", 1),
            ("value", 0),
            ("value", 1),
        ]


def test_stdin_and_stdout(cache: Path, tmp_path: Path) -> None:
    result = run("encode", "-", "-", *REFERENCE, stdin=cache.read_bytes())
    run("encode", cache, tmp_path / "o.pqkv", *REFERENCE)
    assert result.stdout_bytes == (tmp_path / "o.pqkv").read_bytes()
    assert "bits/coordinate" in result.stderr
    assert "all sound" in run("verify", "-", *REFERENCE, stdin=result.stdout_bytes).stdout


@pytest.mark.parametrize(("given", "told"), [(b"", "stdin is empty; pipe"), (b"hello", "stdin: begins with b'hello'")])
@pytest.mark.parametrize("verb", ["encode", "decode", "inspect", "verify", "train-vq"])
def test_errors_about_stdin_name_it(tmp_path: Path, verb: str, given: bytes, told: str) -> None:
    outputs = [] if verb in ("inspect", "verify") else [tmp_path / "out"] if verb == "train-vq" else ["-"]
    output = run(verb, "-", *outputs, stdin=given, code=2).output
    assert told in output
    assert "pqcodec-" not in output


def test_a_vector_of_nan_from_stdin_is_found_there(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((4, 64), np.nan, np.float16))
    output = run("encode", "-", "-", *REFERENCE, stdin=(tmp_path / "x.npy").read_bytes(), code=2).output
    assert "stdin" in output
    assert "pqcodec-" not in output


def test_a_tensor_from_stdin_is_called_so_each_time(tmp_path: Path) -> None:
    x, path = np.random.default_rng(0).standard_normal((2, 20, 64)).astype(np.float16), tmp_path / "x.npy"
    np.save(path, x)
    for data, verb in ((path.read_bytes(), "encode"), (pqcodec.encode(x, backend="reference"), "convert")):
        found = [run(verb, "-", "-", *(REFERENCE if verb == "encode" else ()), stdin=data).stdout_bytes for _ in range(2)]
        assert found[0] == found[1]
        assert PQKVFile(found[0]).names == ("stdin",)


def test_decoded_tensors_go_to_stdout(coded: Path, tmp_path: Path) -> None:
    run("decode", coded, tmp_path / "o.safetensors", *REFERENCE)
    result = run("decode", coded, "-", *REFERENCE)
    assert result.stdout_bytes == (tmp_path / "o.safetensors").read_bytes()
    assert "stdout: 6 tensors" in result.stderr
    one = run("decode", coded, "-", "--to", "npy", "--only", "layers.0.key", "--tokens", "4:9", *REFERENCE)
    assert np.load(io.BytesIO(one.stdout_bytes)).shape == (1, 2, 5, 64)
    several = run("decode", coded, "-", "--to", "npy", *REFERENCE, code=2)
    assert several.stdout_bytes == b""
    assert "holds one tensor, not 6" in several.stderr
    assert "choose from .safetensors" in run("decode", coded, "-", "--to", "pqkv", *REFERENCE, code=2).stderr


@pytest.mark.parametrize("verb", ["encode", "decode", "convert"])
def test_the_argument_that_is_missing_is_named(verb: str, coded: Path) -> None:
    assert "Missing argument 'OUTPUT'" in run(verb, coded, "--force", code=2).stderr
    assert "Missing argument 'INPUT...'" in run(verb, code=2).stderr
    assert "Missing argument 'INPUT...'" in run(verb, "--force", code=2).stderr


def test_npy_and_single_stream(tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((3, 10, 64)).astype(np.float32)
    np.save(tmp_path / "keys.npy", x)
    run("encode", tmp_path / "keys.npy", tmp_path / "k.pqkv", "--exact-tokens", 10, *REFERENCE)
    run("decode", tmp_path / "k.pqkv", tmp_path / "o.npy", *REFERENCE)
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), x)
    stream = pqcodec.encode(x, exact_tokens=10, backend="reference")
    (tmp_path / "s.pq").write_bytes(stream)
    run("decode", tmp_path / "s.pq", tmp_path / "s.npy", *REFERENCE)
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), x)
    assert told("inspect", tmp_path / "s.pq")["tensors"][0]["shape"] == [3, 10, 64]
    assert told("verify", tmp_path / "s.pq", *REFERENCE)["ok"]


def test_decode_tokens_and_only(coded: Path, tmp_path: Path) -> None:
    outcome = told(
        "decode", coded, tmp_path / "o.npz", "--tokens", "5:", "--only", "layers.1.key", "--only", "positions", *REFERENCE
    )
    assert outcome["tensors"] == 2
    with np.load(tmp_path / "o.npz") as found, PQKVFile(coded) as file:
        whole = file.decode("layers.1.key", backend="reference")
        np.testing.assert_array_equal(found["layers.1.key"], whole[:, :, 5:])
        np.testing.assert_array_equal(found["positions"], np.arange(20))


def test_bfloat16_comes_back_as_bfloat16(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    given = {"k": torch.randn(2, 8, 64).bfloat16(), "f8": torch.ones(3).to(torch.float8_e5m2), "n": torch.arange(3)}
    save_torch(given, tmp_path / "in.safetensors")
    run("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", "--exact-tokens", 8, *REFERENCE)
    run("decode", tmp_path / "o.pqkv", tmp_path / "o.safetensors", *REFERENCE)
    found = load_torch(tmp_path / "o.safetensors")
    assert all(found[name].dtype == x.dtype and torch.equal(found[name].float(), x.float()) for name, x in given.items())
    assert "numpy has no" in run("decode", tmp_path / "o.pqkv", tmp_path / "o.npz", *REFERENCE, code=2).stderr


def test_nan_is_named_or_kept(tmp_path: Path) -> None:
    x = np.ones((6, 64), np.float32)
    x[4, 3] = np.nan
    np.save(tmp_path / "keys.npy", x)
    refused = run("encode", tmp_path / "keys.npy", tmp_path / "o.pqkv", *REFERENCE, code=2).stderr
    assert "'keys': element [4, 3]" in refused
    assert "pass --nonfinite exact to keep" in refused
    assert "nonfinite=" not in refused
    assert not (tmp_path / "o.pqkv").exists()
    outcome = told("encode", tmp_path / "keys.npy", tmp_path / "o.pqkv", "--nonfinite", "exact", "--check", *REFERENCE)
    assert outcome["rel_mse"]["all"] < 0.1


@pytest.mark.parametrize("shape", [(3,), (), (2, 1025), (0, 5, 64), (2, 0)])
def test_odd_shapes_go_through(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.ones(shape, np.float16)
    save_file({"x": x}, tmp_path / "in.safetensors")
    run("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", "--check", *REFERENCE)
    run("decode", tmp_path / "o.pqkv", tmp_path / "o.safetensors", *REFERENCE)
    y = load_file(tmp_path / "o.safetensors")["x"]
    assert (y.shape, y.dtype) == (x.shape, x.dtype)


@pytest.mark.parametrize(
    "x", [np.ones((8, 64), ">f4"), np.asfortranarray(np.ones((8, 64), np.float16))], ids=["big", "fortran"]
)
@pytest.mark.parametrize("extension", ["npy", "npz"])
def test_other_byte_and_element_orders(tmp_path: Path, x: np.ndarray, extension: str) -> None:
    path = tmp_path / f"keys.{extension}"
    np.save(path, x) if extension == "npy" else np.savez_compressed(path, keys=x)
    run("encode", path, tmp_path / "o.pqkv", "--exact-tokens", 8, *REFERENCE)
    run("decode", tmp_path / "o.pqkv", tmp_path / "o.npy", *REFERENCE)
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), x)


# -- inspect and verify ------------------------------------------------------------------------------------------
def test_inspect_shows_every_tensor(coded: Path, tensors: dict[str, np.ndarray]) -> None:
    text = run("inspect", coded, "--tensors").stdout
    assert all(name in text for name in tensors)
    assert "quad3" in text
    found = {t["name"]: t for t in told("inspect", coded)["tensors"]}
    assert (found["layers.1.key"]["role"], found["layers.1.key"]["layer"]) == ("key", 1)
    assert found["layers.1.key"]["stream"]["preset"] == "quad3"
    assert not found["positions"]["coded"]


def test_names_cannot_write_to_the_terminal(tmp_path: Path) -> None:
    save_file({"\x1b[31mred": np.ones(3)}, tmp_path / "in.safetensors")
    run("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", *REFERENCE)
    assert "\x1b" not in run("inspect", tmp_path / "o.pqkv").stdout


def test_verify_names_what_is_damaged(coded: Path) -> None:
    assert told("verify", coded, *REFERENCE) == {"file": str(coded), "ok": True, "damage": [], "unsealed": []}
    damaged(coded, "layers.1.value")
    place = {"name": "layers.1.value", "part": "payload", "leading": 1, "tokens": [4, 20]}
    assert told("verify", coded, *REFERENCE, code=1)["damage"] == [place]
    assert "layers.1.value: damaged: payload" in run("verify", coded, *REFERENCE, code=1).stdout


# -- exit codes --------------------------------------------------------------------------------------------------
def test_damage_is_1_and_leaves_no_output(coded: Path, tmp_path: Path) -> None:
    damaged(coded, "layers.1.value")
    before = set(tmp_path.iterdir())
    assert "'layers.1.value'" in run("decode", coded, tmp_path / "o.npz", *REFERENCE, code=1).stderr
    assert set(tmp_path.iterdir()) == before
    coded.write_bytes(coded.read_bytes()[:-1])
    error = told("inspect", coded, code=1)["error"]
    assert (error["kind"], error["exit_code"]) == ("TruncatedStream", 1)


@pytest.mark.parametrize(
    "arguments",
    [
        "encode {cache}",
        "unknown",
        "encode {cache} {out} --preset pq9",
        "encode {cache} {out} --seed x",
        "encode {cache} {out} --seed -1",
        "encode {cache} {out} --exact-tokens -1",
        "encode {cache} {out} --chunk-tokens 0",
        "encode {cache} {out} --rope-theta -3",
        "encode {cache} {out} --rope-theta 10000 --rope-first -1",
        "encode {cache} {out} --center side",
        "encode {cache} {out} --center rope",
        "encode {cache} {out} --center none --rope-theta 10000",
        "encode {cache} {out} --rope-dim 32",
        "encode {cache} {out} --rope-theta 10000 --rope-style odd",
        "encode {cache} {out} --keys (",
        "encode {cache} {out} --keys nothing --center mean",
        "encode {cache} {out} --backend none",
        "encode {cache} {out} --nonfinite maybe",
        "encode {cache} {out} --effort most",
        "encode {cache} {cache} --force",
        "encode {cache} - --json",
        "decode {coded} - --json",
        "decode {coded} {coded} -",
        "encode {coded} {out}",
        "encode {text} {out}",
        "decode {cache} {out}.npz",
        "decode {coded} {out}",
        "decode {coded} {out}.npy",
        "decode {coded} {out}.npz --only none",
        "decode {coded} {out}.npz --tokens 5",
        "decode {coded} {out}.npz --tokens 5:99",
        "inspect {cache}",
        "verify {text}",
    ],
)
def test_wrong_use_is_2(arguments: str, cache: Path, coded: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tensors")
    places = {"cache": cache, "coded": coded, "out": tmp_path / "o", "text": tmp_path / "text"}
    before = set(tmp_path.iterdir())
    result = run(*(word.format(**places) for word in arguments.split()), code=2)
    assert result.stderr
    assert "tensor 'layers" not in result.stderr or "{coded}" in arguments
    assert set(tmp_path.iterdir()) == before


def test_a_newer_version_is_3(coded: Path) -> None:
    data = bytearray(coded.read_bytes())
    data[4] = 3
    coded.write_bytes(data)
    assert "install a newer pqcodec" in run("verify", coded, code=3).stderr


def test_a_damaged_stream_is_not_converted(coded: Path, tmp_path: Path) -> None:
    damaged(coded, "layers.0.key")
    told = run("convert", coded, tmp_path / "b.safetensors", code=1).stderr
    assert "'layers.0.key': checksum does not hold: payload, leading index 1" in told
    assert not (tmp_path / "b.safetensors").exists()
    run("convert", coded, tmp_path / "b.safetensors", "--no-check")
    assert "layers.0.key: damaged" in run("verify", tmp_path / "b.safetensors", code=1).stdout


@pytest.mark.parametrize("verb", ["encode", "decode", "convert"])
def test_a_folder_that_is_not_there_is_named(verb: str, coded: Path, tmp_path: Path) -> None:
    for folder in ("none", "none/", "none/x/"):
        for target in ("out", "out/"):
            told = run(
                verb, f"{tmp_path}/{folder}", f"{tmp_path}/{target}", *(["--to", "zarr"] if verb == "convert" else []), code=4
            )
            assert told.stderr == f"pqcodec: {tmp_path}/{folder}: No such file or directory\n"
    assert f"{coded}/: Not a directory" in run(verb, f"{coded}/", tmp_path / "out.pqkv", code=4).stderr
    assert f"{tmp_path}/none/: No such file" in run("verify", f"{tmp_path}/none/", code=4).stderr


def test_files_that_are_not_there_are_4(cache: Path, tmp_path: Path) -> None:
    assert "none.npz" in run("encode", tmp_path / "none.npz", tmp_path / "o.pqkv", code=4).stderr
    run("encode", tmp_path / "none", tmp_path / "o.pqkv", code=4)
    run("encode", cache, tmp_path / "none" / "o.pqkv", *REFERENCE, code=4)
    assert "'error'" in str(told("inspect", tmp_path / "none.pqkv", code=4))


def test_full_disk_is_4_and_leaves_nothing(cache: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = set(tmp_path.iterdir())
    full = command(
        "encode",
        cache,
        tmp_path / "o.pqkv",
        *REFERENCE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )
    assert (full.returncode, full.stdout) == (4, b"")
    assert b"o.pqkv: File too large" in full.stderr
    assert set(tmp_path.iterdir()) == before


def test_outputs_are_replaced_only_by_force(cache: Path, coded: Path, tmp_path: Path) -> None:
    before = coded.read_bytes()
    assert "--force" in run("encode", cache, coded, "--preset", "pq2", *REFERENCE, code=2).stderr
    assert coded.read_bytes() == before
    coded.chmod(0o644)
    cache.chmod(0o640)
    run("encode", cache, coded, "--preset", "pq2", "--force", *REFERENCE)
    assert coded.read_bytes() != before
    assert coded.stat().st_mode & 0o777 == 0o640  # that of the input


def test_corrupt_input_files_are_1(cache: Path, tmp_path: Path) -> None:
    cache.write_bytes(cache.read_bytes()[:-5])
    assert "in.safetensors" in run("encode", cache, tmp_path / "o.pqkv", code=1).stderr
    np.save(tmp_path / "x.npy", np.ones((8, 64)))
    (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:-5])
    assert "x.npy" in run("encode", tmp_path / "x.npy", tmp_path / "o.pqkv", code=1).stderr
    np.savez(tmp_path / "x.npz", a=np.ones((8, 64)))
    data = bytearray((tmp_path / "x.npz").read_bytes())
    data[300] ^= 1
    (tmp_path / "x.npz").write_bytes(data)
    assert "x.npz" in run("encode", tmp_path / "x.npz", tmp_path / "o.pqkv", code=1).stderr


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    objects = np.array([{}, 1], object)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "x.npz", a=objects)
    for name in ("x.npy", "x.npz"):
        assert "never loaded" in run("encode", tmp_path / name, tmp_path / "o.pqkv", code=2).stderr


def test_headers_that_promise_too_much_allocate_nothing(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.save(file, np.ones((2, 64)))
    data = file.getvalue().replace(b"(2, 64), }" + b" " * 9, b"(999999999999, 64), }")
    assert b"999999" in data
    (tmp_path / "x.npy").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", data)
    for name in ("x.npy", "x.npz"):
        assert name in run("encode", tmp_path / name, tmp_path / "o.pqkv", code=1).stderr


# -- the process -------------------------------------------------------------------------------------------------
def test_help_is_quick() -> None:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert command("--help").returncode == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


def test_torch_is_not_loaded_for_numpys_dtypes(cache: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pqcodec.tools.cli import app; assert 'numpy' not in sys.modules\n"
        "try: app()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    for arguments in (["encode", cache, tmp_path / "o.pqkv"], ["decode", tmp_path / "o.pqkv", tmp_path / "o.npz"]):
        call = [sys.executable, "-c", code, *map(str, arguments), *REFERENCE]
        assert subprocess.run(call, capture_output=True, timeout=60, check=False).returncode == 0


def test_tracebacks_only_in_debug(tmp_path: Path) -> None:
    quiet = command("inspect", tmp_path / "none")
    assert (quiet.returncode, quiet.stdout) == (4, b"")
    assert quiet.stderr.count(b"\n") == 1
    assert b"Traceback" in command("inspect", tmp_path / "none", env=os.environ | {"PQCODEC_DEBUG": "1"}).stderr


def test_readers_name_what_they_read(cache: Path, tensors: dict[str, np.ndarray]) -> None:
    with open_tensors(cache) as reader:
        assert reader.format == "safetensors"
        assert reader.metadata == METADATA
        assert set(reader.names) == set(tensors)
        np.testing.assert_array_equal(reader.read("positions"), tensors["positions"])


# -- containers, folders, many files -----------------------------------------------------------------------------
@pytest.fixture
def folder(cache: Path, tmp_path: Path) -> Path:
    """A folder of two caches, one of them deeper, and a file that is none of the codec's business."""
    place = tmp_path / "kv"
    (place / "deep").mkdir(parents=True)
    shutil.move(cache, place / "a.safetensors")
    np.savez(place / "deep" / "b.npz", k_0=np.ones((8, 64), np.float32), v_0=np.ones((8, 64), np.float32))
    (place / "notes.txt").write_text("none of the codec's business")
    return place


@pytest.mark.parametrize("kind", ["pqkv", "safetensors", "zarr"])
def test_every_container_by_its_extension(cache: Path, tmp_path: Path, tensors: dict[str, np.ndarray], kind: str) -> None:
    pytest.importorskip("zarr") if kind == "zarr" else None
    path = tmp_path / f"c.{kind}"
    outcome = told("encode", cache, path, *REFERENCE)
    size = path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    assert outcome["file_bytes"] == size
    assert run("verify", path, *REFERENCE).stdout.endswith("all sound\n")
    assert told("verify", path, *REFERENCE)["unsealed"] == []
    assert told("inspect", path)["metadata"]["safetensors"] == METADATA
    run("decode", path, tmp_path / "out.safetensors", *REFERENCE)
    found = load_file(tmp_path / "out.safetensors")
    assert {name: (x.shape, x.dtype) for name, x in found.items()} == {n: (x.shape, x.dtype) for n, x in tensors.items()}
    assert "--force" in run("encode", cache, path, *REFERENCE, code=2).stderr
    run("encode", cache, path, "--force", *REFERENCE)
    assert "all sound" in run("verify", path, *REFERENCE).stdout


def test_verify_says_that_a_single_stream_has_no_order_seal(tmp_path: Path) -> None:
    path = tmp_path / "s.pqs"
    data = pqcodec.encode(
        np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float16), preset="pq2", backend="reference"
    )
    block = pqcodec.inspect(data).payload_bytes // 2
    path.write_bytes(data[: -2 * block] + data[-block:] + data[-2 * block : -block])  # the two blocks change places
    assert "all sound but for the order of blocks, which no seal tells" in run("verify", path, *REFERENCE).stdout
    assert told("verify", path, *REFERENCE)["unsealed"] == ["s"]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert "1 damaged places" in run("verify", path, *REFERENCE, code=1).stdout


def test_to_overrides_the_extension(cache: Path, tmp_path: Path) -> None:
    run("encode", cache, tmp_path / "c.bin", "--to", "safetensors", *REFERENCE)
    with safe_open(tmp_path / "c.bin", "np") as file:
        assert file.metadata()["pqcodec_format"] == "kv-cache"
    assert "'.bin' is unknown" in run("encode", cache, tmp_path / "d.bin", *REFERENCE, code=2).stderr
    assert "encoded already" in run("encode", tmp_path / "c.bin", tmp_path / "d.pqkv", *REFERENCE, code=2).stderr


def test_convert_there_and_back(coded: Path, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    assert "nothing decoded" in run("convert", coded, tmp_path / "b.zarr").stdout
    run("convert", tmp_path / "b.zarr", tmp_path / "c.safetensors")
    outcome = told("convert", tmp_path / "c.safetensors", tmp_path / "d.pqkv")
    assert outcome["file_bytes"] == coded.stat().st_size
    assert (tmp_path / "d.pqkv").read_bytes() == coded.read_bytes()
    assert run("convert", tmp_path / "b.zarr", "-").stdout_bytes == coded.read_bytes()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_folder_goes_to_a_folder(folder: Path, tmp_path: Path, jobs: int) -> None:
    out = tmp_path / "out"
    outcome = told("encode", folder, out, "--jobs", jobs, *REFERENCE)
    assert outcome["failed"] == 0
    assert [file["output"] for file in outcome["files"]] == [str(out / "a.pqkv"), str(out / "deep" / "b.pqkv")]
    table = run("verify", out, "--jobs", jobs, *REFERENCE).stdout
    assert table.count("all sound") == 2
    run("convert", out, tmp_path / "st", "--to", "safetensors", "--jobs", jobs)
    assert {p.name for p in (tmp_path / "st").rglob("*.*")} == {"a.safetensors", "b.safetensors"}
    run("decode", tmp_path / "st", tmp_path / "plain", "--to", "npz", "--jobs", jobs, *REFERENCE)
    with np.load(tmp_path / "plain" / "deep" / "b.npz") as found:
        assert set(found) == {"k_0", "v_0"}
    assert told("inspect", tmp_path / "st")["files"][1]["file"].endswith("b.safetensors")
    assert "bits/coord" in run("inspect", tmp_path / "st").stdout


def test_patterns_and_lists(folder: Path, tmp_path: Path) -> None:
    outcome = told("encode", folder / "**" / "*.npz", tmp_path / "out", *REFERENCE)
    assert [file["output"] for file in outcome["files"]] == [str(tmp_path / "out" / "deep" / "b.pqkv")]
    run("encode", folder / "a.safetensors", folder / "deep" / "b.npz", tmp_path / "two", *REFERENCE)
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"a.pqkv", "b.pqkv"}
    run("encode", folder / "a.safetensors", tmp_path / "two", "--to", "safetensors", *REFERENCE)
    assert (tmp_path / "two" / "a.safetensors").is_file()
    assert "no file" in run("encode", folder / "*.npy", tmp_path / "out", code=2).stderr
    assert "a folder then" in run("encode", folder, tmp_path / "o.pqkv", code=2).stderr
    np.savez(folder / "a.npz", k_0=np.ones((8, 64), np.float32))
    assert "would both be written" in run("encode", folder, tmp_path / "new", code=2).stderr
    assert "--jobs 0" in run("verify", tmp_path / "two", "--jobs", 0, code=2).stderr


@pytest.mark.parametrize("jobs", [1, 2])
def test_one_failure_does_not_stop_those_that_keep_going(folder: Path, tmp_path: Path, jobs: int) -> None:
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    outcome = told("encode", folder, tmp_path / "out", "--jobs", jobs, "--keep-going", *REFERENCE, code=1)
    assert (outcome["failed"], len(outcome["files"])) == (1, 3)
    assert outcome["files"][1]["error"]["kind"] == "CorruptStream"
    result = run("encode", folder, tmp_path / "out", "--force", "--keep-going", "--jobs", jobs, *REFERENCE, code=1)
    assert "broken.npz" in result.stderr
    assert "failed" in result.stdout
    damaged(tmp_path / "out" / "a.pqkv", "layers.1.value")
    assert "1 damaged places" in run("verify", tmp_path / "out", "--jobs", jobs, *REFERENCE, code=1).stdout


def test_inspect_draws_a_table_of_layers(coded: Path, tmp_path: Path) -> None:
    text = run("inspect", coded).stdout
    rows = [line.split() for line in text.splitlines()]
    assert [row[:3] for row in rows if row and row[0] in ("0", "1")] == [["0", "quad3", "mean"], ["1", "quad3", "mean"]]
    assert all(name in text for name in ("positions", "hidden", "relMSE", "|mean|", "at"))
    found = {t["name"]: t for t in told("inspect", coded)["tensors"]}
    key = found["layers.0.key"]
    assert 0.01 < key["rel_mse"] < 0.06
    assert 0.5 < key["mean_norm"] < 4
    with PQKVFile(coded) as file:
        assert key["at"] == file.entry("layers.0.key").body_start


def test_notes_are_metadata(cache: Path, tmp_path: Path) -> None:
    run("encode", cache, tmp_path / "c.pqkv", "--note", "model=tiny", "--note", "tokens=a=b", *REFERENCE)
    metadata = told("inspect", tmp_path / "c.pqkv")["metadata"]
    assert (metadata["model"], metadata["tokens"]) == ("tiny", "a=b")
    for note in ("model", "=x", "format=x"):
        assert "--note" in run("encode", cache, tmp_path / "d.pqkv", "--note", note, *REFERENCE, code=2).stderr


def test_urls(cache: Path, tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.put_file(str(cache), "/bucket/in.safetensors")
    for kind in ("pqkv", "safetensors"):
        url = f"memory://bucket/c.{kind}"
        run("encode", "memory://bucket/in.safetensors", url, *REFERENCE)
        assert "--force" in run("encode", cache, url, *REFERENCE, code=2).stderr
        assert "all sound" in run("verify", url, *REFERENCE).stdout
        run("decode", url, f"memory://bucket/out.{kind}.npz", "--only", "positions", *REFERENCE)
        assert store.exists(f"/bucket/out.{kind}.npz")
    assert len(told("inspect", "memory://bucket/c.*")["files"]) == 2
    run("convert", "memory://bucket/*.pqkv", "memory://bucket/more", "--to", "safetensors")
    assert store.exists("/bucket/more/c.safetensors")
    assert "none.pqkv" in run("verify", "memory://bucket/none.pqkv", code=4).stderr


def test_files_of_torch_save_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"k": torch.ones(3)}, tmp_path / "x.pt")
    assert "pickles are never loaded" in run("encode", tmp_path / "x.pt", tmp_path / "o.pqkv", code=2).stderr


@pytest.mark.parametrize("name", ["../k", "a/../../k", "/etc/k", "C:/k", "..\\k"])
def test_names_that_lead_out_of_an_archive_are_refused(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "in.npz", "w") as archive:
        file = io.BytesIO()
        np.save(file, np.ones((8, 64), np.float32))
        archive.writestr(name + ".npy", file.getvalue())
    assert "leads out" in run("encode", tmp_path / "in.npz", tmp_path / "o.pqkv", code=2).stderr
    save_file({name: np.ones(3)}, tmp_path / "in.safetensors")
    run("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", *REFERENCE)
    before = set(tmp_path.rglob("*"))
    assert "outside an archive" in run("decode", tmp_path / "o.pqkv", tmp_path / "o.npz", *REFERENCE, code=2).stderr
    assert set(tmp_path.rglob("*")) == before
    run("decode", tmp_path / "o.pqkv", tmp_path / "o.safetensors", *REFERENCE)
    assert list(load_file(tmp_path / "o.safetensors")) == [name]


def test_links_in_an_archive_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("k.npy")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "in.npz", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    assert "leads out" in run("encode", tmp_path / "in.npz", tmp_path / "o.pqkv", code=2).stderr
