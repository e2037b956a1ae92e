"""Which tensors the command line encodes, keeps exactly or leaves out, and in which order of dimensions it takes them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_cli import REFERENCE, run, told

from pqcodec.errors import CorruptStream
from pqcodec.formats import PQKVFile, PQKVWriter
from pqcodec.formats.plain.layouts import LAYOUTS_KEY, TensorLayout, Turned, layouts_of


def normal(*shape: int, dtype: type = np.float16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def error(x: np.ndarray, y: np.ndarray) -> float:
    return float(((x.astype(float) - y) ** 2).sum() / (x.astype(float) ** 2).sum())


# -- files that would grow ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("x", [normal(512, 2, 64), normal(3, 1), normal(2, 4, 64)], ids=["tokens first", "tiny", "all exact"])
def test_a_tensor_that_would_grow_is_kept_exactly(x: np.ndarray, tmp_path: Path) -> None:
    save_file({"layers.0.key": x, "layers.0.value": normal(2, 400, 64)}, tmp_path / "in.safetensors")
    result = run("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", *REFERENCE)
    assert "1 tensors and 1 exact" in result.stdout
    assert "1 kept exactly (a stream would not be smaller" in result.stderr
    assert "see --layout): layers.0.key" in result.stderr
    run("decode", tmp_path / "o.pqkv", tmp_path / "o.safetensors", *REFERENCE)
    np.testing.assert_array_equal(load_file(tmp_path / "o.safetensors")["layers.0.key"], x)


def test_dimensions_that_are_probably_in_another_order_are_told_of(tmp_path: Path) -> None:
    save_file({"layers.0.key": normal(512, 8, 64), "layers.0.value": normal(8, 512, 64)}, tmp_path / "in.safetensors")
    result = run("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", "--exact-tokens", 1, *REFERENCE)
    (line,) = [line for line in result.stderr.splitlines() if "few tokens" in line]
    assert "which names 3: layers.0.key; 512 x 8 x 64 is read as [..., tokens, head_dim]" in line
    assert line.endswith("see --layout")
    run("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", "--force", "--drop", "*key", *REFERENCE)


def test_a_tensor_that_grows_by_vectors_that_are_not_finite_is_told_of(tmp_path: Path) -> None:
    np.save(tmp_path / "keys.npy", np.full((40, 64), np.nan, np.float16))
    result = run("encode", tmp_path / "keys.npy", tmp_path / "o.pqkv", "--nonfinite", "exact", *REFERENCE)
    assert "larger than before, for so many vectors are not finite: keys" in result.stderr


# -- other orders of dimensions ----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["pqkv", "safetensors", "zarr"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_layout_is_encoded_as_its_turn_is_and_given_back(kind: str, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("zarr") if kind == "zarr" else None
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    given = {f"layers.0.{role}": torch.from_numpy(normal(300, 2, 64)).to(getattr(torch, dtype)) for role in ("key", "value")}
    plain = {"layers.0.mask": torch.ones(300, 2, 3, dtype=torch.int64), "scale": torch.ones(5)}
    turned = {name: x.permute(1, 0, 2).contiguous() for name, x in given.items()}
    save_torch(given | plain, tmp_path / "given.safetensors")
    save_torch(turned | plain, tmp_path / "turned.safetensors")
    layout = ("--layout", "tokens,heads,head_dim")
    run("encode", tmp_path / "given.safetensors", tmp_path / f"coded.{kind}", *layout, *REFERENCE)
    run("encode", tmp_path / "turned.safetensors", tmp_path / "turned.pqkv", *REFERENCE)
    run("convert", tmp_path / f"coded.{kind}", tmp_path / "again.pqkv")
    with PQKVFile(tmp_path / "again.pqkv") as file, PQKVFile(tmp_path / "turned.pqkv") as other:
        for name in given:
            assert file.entry(name).shape == (2, 300, 64)
            np.testing.assert_array_equal(file.stream(name).read(0, 900), other.stream(name).read(0, 900))
    run("decode", tmp_path / f"coded.{kind}", tmp_path / "out.safetensors", *REFERENCE)
    run("decode", tmp_path / "turned.pqkv", tmp_path / "other.safetensors", *REFERENCE)
    found, other = load_torch(tmp_path / "out.safetensors"), load_torch(tmp_path / "other.safetensors")
    for name in given:
        assert torch.equal(found[name], other[name].permute(1, 0, 2))
    assert all(torch.equal(found[name], x) for name, x in plain.items())
    run("decode", tmp_path / f"coded.{kind}", tmp_path / "cut.safetensors", "--tokens", "7:20", *REFERENCE)
    cut = load_torch(tmp_path / "cut.safetensors")
    assert torch.equal(cut["layers.0.key"], found["layers.0.key"][7:20])
    assert torch.equal(cut["layers.0.mask"], plain["layers.0.mask"])


def test_a_layout_of_exact_keys_is_given_back_and_cut_by_tokens(tmp_path: Path) -> None:
    keys = {"k_0": normal(30, 2, 64, dtype=np.float64), "k_1": normal(30, 2, 64)}
    np.savez(tmp_path / "in.npz", **keys)
    options = ("--layout", "tokens,heads,head_dim", "--exclude", "k_1")
    run("encode", tmp_path / "in.npz", tmp_path / "o.pqkv", *options, *REFERENCE)
    for ends in ((0, 30), (3, 9)):
        run("decode", tmp_path / "o.pqkv", tmp_path / "o.npz", "--tokens", "{}:{}".format(*ends), "--force", *REFERENCE)
        with np.load(tmp_path / "o.npz") as found:
            for name, x in keys.items():
                np.testing.assert_array_equal(found[name], x[slice(*ends)])


def test_head_dim_need_not_be_last_and_dots_are_any_dimensions(tmp_path: Path) -> None:
    x = normal(2, 3, 64, 200, dtype=np.float32)
    np.save(tmp_path / "keys.npy", x)
    run("encode", tmp_path / "keys.npy", tmp_path / "o.pqkv", "--layout", "..., head_dim, tokens", "--check", *REFERENCE)
    run("decode", tmp_path / "o.pqkv", tmp_path / "o.npy", *REFERENCE)
    assert error(x, np.load(tmp_path / "o.npy")) < 0.05


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ("tokens,head_dim,tokens", "each once"),
        ("tokens,heads", "among them tokens and head_dim"),
        ("tokens,,head_dim", "names of dimensions"),
        ("...,tokens,...,head_dim", "each once"),
        ("heads,tokens,head_dim,more", "is a key of 3 dimensions, which --layout"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout: str, message: str, tmp_path: Path) -> None:
    save_file({"layers.0.key": normal(2, 40, 64)}, tmp_path / "in.safetensors")
    refused = run("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", "--layout", layout, *REFERENCE, code=2)
    assert message in refused.stderr
    assert not (tmp_path / "o.pqkv").exists()


def test_a_layout_that_fits_no_tensor_is_refused_and_one_that_fits_some_says_so(tmp_path: Path) -> None:
    save_file({"hidden": normal(40, 64)}, tmp_path / "in.safetensors")
    options = ("--layout", "tokens,heads,head_dim", *REFERENCE)
    assert "fits no tensor" in run("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", *options, code=2).stderr
    save_file({"hidden": normal(40, 64), "k": normal(40, 2, 64)}, tmp_path / "in.safetensors")
    told_of = run("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", *options).stderr
    assert "kept exactly (--layout names other dimensions than its 2): hidden" in told_of


def test_nan_in_a_tensor_that_is_turned_is_placed_where_it_is_counted(tmp_path: Path) -> None:
    x = normal(40, 2, 64)
    x[30, 1, 5] = np.nan
    np.save(tmp_path / "keys.npy", x)
    refused = run("encode", tmp_path / "keys.npy", tmp_path / "o.pqkv", "--layout", "tokens,heads,head_dim", *REFERENCE, code=2)
    assert "element [1, 30, 5]" in refused.stderr
    assert "in the order ..., tokens, head_dim" in refused.stderr


def test_layouts_in_a_file_are_checked(tmp_path: Path) -> None:
    for told_of in ([], {"k": 3}, {"k": "tokens"}, {"k": "tokens,heads,head_dim"}):
        with pytest.raises(CorruptStream, match=LAYOUTS_KEY):
            layouts_of({LAYOUTS_KEY: told_of}, {"k": (40, 64)})
    assert layouts_of({LAYOUTS_KEY: {"gone": "tokens"}}, {"k": (40, 64)}) == {}
    with PQKVWriter(tmp_path / "c.pqkv", {LAYOUTS_KEY: {"n": "tokens,heads,head_dim"}}) as writer:
        writer.add_exact("n", np.arange(4))
    assert "not tokens,heads" in run("decode", tmp_path / "c.pqkv", tmp_path / "o.npz", *REFERENCE, code=1).stderr
    note = ("--note", f"{LAYOUTS_KEY}=x")
    assert "--note" in run("encode", tmp_path / "c.pqkv", tmp_path / "o.pqkv", *note, *REFERENCE, code=2).stderr


def test_tokens_of_a_turned_tensor_are_read_as_it_is_turned() -> None:
    x = normal(30, 2, 8)

    class Given:
        names = ("k", "n")

        def describe(self, name: str) -> tuple[tuple[int, ...], str]:
            return x.shape, "float16"

        def read(self, name: str) -> np.ndarray:
            return x

        def read_tokens(self, name: str, first: int, step: int = 1) -> np.ndarray:
            return x[..., first::step, :]

    turned = Turned(Given(), ("k", "n"), {"k": TensorLayout.of("tokens,heads,head_dim")})
    assert turned.describe("k")[0] == turned.read("k").shape == (2, 30, 8)
    np.testing.assert_array_equal(turned.read_tokens("k", 3, 4), x.transpose(1, 0, 2)[:, 3::4])
    np.testing.assert_array_equal(turned.read_tokens("n", 1), x[:, 1:])


# -- which tensors -----------------------------------------------------------------------------------------------
def test_patterns_choose_what_is_encoded_kept_and_left_out(tmp_path: Path) -> None:
    given = {f"layers.{i}.{role}": normal(2, 40, 64, seed=i) for i in range(2) for role in ("key", "value")}
    save_file(given | {"hidden": normal(40, 64)}, tmp_path / "in.safetensors")
    options = ("--include", "layers.*", "--exclude", "layers.1.*", "--drop", "layers.1.v*")
    outcome = told("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", *options, *REFERENCE)
    assert outcome["tensors"] == 2
    assert outcome["left_out"] == ["layers.1.value"]
    reasons = {one["name"]: one["reason"] for one in outcome["exact_tensors"]}
    assert reasons == {"hidden": "--include names others", "layers.1.key": "--exclude"}
    run("decode", tmp_path / "o.pqkv", tmp_path / "o.safetensors", *REFERENCE)
    found = load_file(tmp_path / "o.safetensors")
    assert found.keys() == given.keys() - {"layers.1.value"} | {"hidden"}
    np.testing.assert_array_equal(found["layers.1.key"], given["layers.1.key"])


def test_a_name_with_brackets_is_a_pattern_of_itself(tmp_path: Path) -> None:
    save_file({"keys[3]": normal(2, 40, 64), "keys[4]": normal(2, 40, 64)}, tmp_path / "in.safetensors")
    result = run("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", "--drop", "keys[3]", *REFERENCE)
    assert "1 left out (--drop): keys[3]" in result.stderr
    with PQKVFile(tmp_path / "o.pqkv") as file:
        assert file.names == ("keys[4]",)


@pytest.mark.parametrize("option", ["include", "exclude", "drop"])
def test_a_pattern_that_fits_nothing_is_named(option: str, tmp_path: Path) -> None:
    save_file({"layers.0.key": normal(2, 40, 64)}, tmp_path / "in.safetensors")
    refused = run("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", f"--{option}", "keys*", *REFERENCE, code=2)
    assert f"--{option} 'keys*' fits no tensor; there are layers.0.key" in refused.stderr
    assert not (tmp_path / "o.pqkv").exists()


# -- dtypes that are no numbers of the codec's -------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["pqkv", "safetensors", "zarr"])
def test_scales_of_float8_are_kept_bit_for_bit(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("zarr") if kind == "zarr" else None
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    save_torch({"scales": scales, "k": torch.from_numpy(normal(2, 40, 64))}, tmp_path / "in.safetensors")
    run("encode", tmp_path / "in.safetensors", tmp_path / f"coded.{kind}", *REFERENCE)
    assert "all sound" in run("verify", tmp_path / f"coded.{kind}", *REFERENCE).stdout
    run("decode", tmp_path / f"coded.{kind}", tmp_path / "o.safetensors", *REFERENCE)
    found = load_torch(tmp_path / "o.safetensors")["scales"]
    assert found.dtype == torch.float8_e8m0fnu
    assert torch.equal(found.view(torch.uint8), scales.view(torch.uint8))


@pytest.mark.parametrize(
    "x",
    [np.array(["a", "bc"]), np.array([b"a"]), np.array([1, 2], "M8[s]"), np.ones(3, np.longdouble), np.array([{}], object)],
    ids=["text", "bytes", "times", "longdouble", "objects"],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_no_container_holds_is_named_and_can_be_left_out(x: np.ndarray, save: object, tmp_path: Path) -> None:
    save(tmp_path / "in.npz", names=x, k=normal(2, 40, 64))  # type: ignore[operator]
    refused = run("encode", tmp_path / "in.npz", tmp_path / "o.pqkv", *REFERENCE, code=2).stderr
    assert "in.npz: tensor 'names': " in refused
    assert "or leave it out (--drop 'names')" in refused
    result = run("encode", tmp_path / "in.npz", tmp_path / "o.pqkv", "--drop", "names", *REFERENCE)
    assert "1 left out (--drop): names" in result.stderr
    run("decode", tmp_path / "o.pqkv", tmp_path / "o.npz", *REFERENCE)
    with np.load(tmp_path / "o.npz") as found:
        assert list(found) == ["k"]


def test_numbers_of_less_than_a_byte_are_named_and_can_be_left_out(tmp_path: Path) -> None:
    save_file({"k": normal(2, 40, 64), "n": np.arange(8, dtype=np.uint8)}, tmp_path / "in.safetensors")
    data = (tmp_path / "in.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["n"] |= {"dtype": "F4", "shape": [16]}
    packed = json.dumps(header).encode()
    (tmp_path / "in.safetensors").write_bytes(len(packed).to_bytes(8, "little") + packed + data[8 + size :])
    try:
        with safe_open(tmp_path / "in.safetensors", "np"):
            pass
    except Exception:
        pytest.skip("this safetensors knows no numbers of four bits")
    refused = run("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", *REFERENCE, code=2).stderr
    assert "tensor 'n': is of dtype F4, which is unknown" in refused
    run("encode", tmp_path / "in.safetensors", tmp_path / "o.pqkv", "--drop", "n", *REFERENCE)
