"""``pqcodec encode --keep``: first and last tokens, or given positions; what inspect shows, decode gives and decode refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_cli import run, told
from test_cli_choices import error, normal
from test_keep import lists

import pqcodec
from pqcodec.formats import PQKVFile

CPU = ("--backend", "cpu")
NAMES = ("layers.0.key", "layers.0.value")


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A key and a value [2, 300, 64], a tensor that is neither, and numbers."""
    tensors = {name: normal(2, 300, 64, seed=seed) for seed, name in enumerate(NAMES)}
    save_file(tensors | {"hidden": normal(300, 64), "ids": np.arange(300)}, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


def named_tensor(coded: Path, name: str) -> dict[str, Any]:
    """What inspect tells of a tensor."""
    return next(one for one in told("inspect", coded)["tensors"] if one["name"] == name)


@pytest.mark.parametrize("kind", ["pqkv", "safetensors", "zarr"])
def test_first_and_last_tokens_come_back_with_their_positions_or_in_the_whole_shape(plain: Path, kind: str) -> None:
    pytest.importorskip("zarr") if kind == "zarr" else None
    coded, x, kept = plain.with_name(f"c.{kind}"), load_file(plain), [*range(4), *range(264, 300)]
    result = run("encode", plain, coded, "--keep", "4+36", "--preset", "pq4", *CPU)
    assert "2 with only some of their tokens (--keep): layers.0.key (40 of 300), layers.0.value (40 of 300)" in result.stderr
    with_positions, filled = plain.with_name("k.safetensors"), plain.with_name("f.safetensors")
    run("decode", coded, with_positions, "--kept", *CPU)
    run("decode", coded, filled, "--fill", -2, *CPU)
    rows, whole = load_file(with_positions), load_file(filled)
    assert sorted(rows) == sorted([*x, *(f"{name}.positions" for name in NAMES)])
    for name in NAMES:
        assert rows[f"{name}.positions"].tolist() == kept
        assert rows[name].shape == (2, 40, 64)
        assert error(x[name][:, kept], rows[name]) < 0.01
        np.testing.assert_array_equal(whole[name][:, kept], rows[name])
        assert (np.delete(whole[name], kept, 1) == -2).all()
    for found in (rows, whole):
        assert error(x["hidden"], found["hidden"]) < 0.01
        np.testing.assert_array_equal(found["ids"], x["ids"])
    run("decode", coded, filled, "--fill", 0, "--tokens", "2:270", "--force", *CPU)
    np.testing.assert_array_equal(load_file(filled)[NAMES[1]][:, :2], rows[NAMES[1]][:, 2:4])
    assert load_file(filled)[NAMES[0]].shape == (2, 268, 64)
    assert "all sound" in run("verify", coded).stdout


def test_positions_of_each_tensor_or_of_all_come_from_a_file(plain: Path) -> None:
    keep, coded, x = plain.with_name("keep.npz"), plain.with_name("c.pqkv"), load_file(plain)
    given = {NAMES[0]: lists(2, 20, 300), NAMES[1]: np.array([7, 8, 299])}
    np.savez(keep, **given)
    run("encode", plain, coded, "--keep", keep, "--exact-tokens", 30, "--nonfinite", "exact", *CPU)
    with PQKVFile(coded) as file:
        for name, positions in given.items():
            rows, found = file.decode_kept(name)
            np.testing.assert_array_equal(found, positions)
            np.testing.assert_array_equal(
                rows, np.stack([x[name][lead][np.resize(positions, (2, len(found.T)))[lead]] for lead in (0, 1)])
            )
            assert file.entry(name).rel_mse == 0
    np.save(keep.with_suffix(".npy"), np.array([0, 299]))
    outcome = told("encode", plain, coded, "--keep", keep.with_suffix(".npy"), "--check", "--force", *CPU)
    assert outcome["coordinates"] == 2 * 2 * 2 * 64 + 300 * 64
    forecast = told("encode", plain, coded, "--keep", keep, "--dry-run", "--force", *CPU)
    assert forecast["notes"][1].startswith("2 with only some of their tokens")
    assert told("encode", plain, coded, "--keep", keep, "--force", *CPU)["file_bytes"] - forecast["body_bytes"] < 2500


def test_inspect_says_how_many_tokens_are_there(plain: Path) -> None:
    coded = plain.with_name("c.pqkv")
    run("encode", plain, coded, "--keep", "0+40", "--drop", "hidden", *CPU)
    assert "40 of 300 tokens" in run("inspect", coded).stdout
    key = named_tensor(coded, NAMES[0])
    assert (key["shape"], key["stream"]["kept_of"], key["tensor_bytes"]) == ([2, 40, 64], 300, 2 * 300 * 64 * 2)
    assert key["ratio"] == key["tensor_bytes"] / key["bytes"] > 15
    run("encode", plain, coded, "--keep", "100+200", "--force", *CPU)  # all of them
    assert named_tensor(coded, NAMES[0])["stream"]["kept_of"] is None


def test_fewer_tokens_are_never_decoded_unsaid(plain: Path) -> None:
    coded, out = plain.with_name("c.pqkv"), plain.with_name("o.npz")
    run("encode", plain, coded, "--keep", "4+36", *CPU)
    words = "tensor 'layers.0.key' holds only some of its tokens: decode it with --fill NUMBER"
    for more in ((), ("--tokens", "0:4"), ("--only", NAMES[0])):
        assert words in run("decode", coded, out, *more, code=2).stderr
    run("decode", coded, out, "--only", "hidden", *CPU)
    for more in (("--fill", 0), ("--tokens", "0:4")):
        assert "leave out --fill and --tokens" in run("decode", coded, out, "--kept", *more, "--force", code=2).stderr
    assert sorted(path.name for path in plain.parent.iterdir()) == ["c.pqkv", "in.safetensors", "o.npz"]


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ("0+0", "keeps nothing"),
        (
            {NAMES[0]: np.arange(4), "other": np.arange(4)},
            "'layers.0.value': --keep: the file has no positions for this tensor",
        ),
        (
            {**dict.fromkeys(NAMES, np.arange(4)), "hidden": np.arange(4)},
            "--keep has positions of 'hidden', which is no key or value",
        ),
        ({"all": np.array([4, 2])}, "'layers.0.key': keep: positions do not ascend"),
        ({"all": np.array([300])}, "are not all below 300"),
        ({"all": np.array([1.5])}, "integers [n] or [..., n]"),
        ({"all": np.zeros((3, 1), np.int64)}, "does not go with the tensor"),
        ({}, "holds no tensor of positions"),
        ({"all": np.zeros(0, np.int64)}, "keeps nothing of 'all'; --drop leaves a tensor out"),
        ({NAMES[0]: np.arange(4), NAMES[1]: np.zeros((2, 0), np.int64)}, f"keeps nothing of '{NAMES[1]}'"),
    ],
)
def test_what_keeps_nothing_or_fits_nothing_is_refused(plain: Path, keep: str | dict[str, np.ndarray], words: str) -> None:
    if isinstance(keep, dict):
        np.savez(plain.with_name("keep.npz"), **keep)
    given = plain.with_name("keep.npz") if isinstance(keep, dict) else keep
    assert words in run("encode", plain, plain.with_name("c.pqkv"), "--keep", given, *CPU, code=2).stderr
    assert not plain.with_name("c.pqkv").exists()


def test_a_recipe_keeps_tokens_in_one_stream_alone() -> None:
    from pqcodec.formats.policy.recipe import Recipe

    with pytest.raises(pqcodec.InvalidArgument, match="keep and stream_tokens"):
        Recipe(keep={"k": [0]}, stream_tokens=8)
