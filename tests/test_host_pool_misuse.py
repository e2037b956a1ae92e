"""A pool that is given what few callers give it, or is looked at in an unlucky moment: nothing is wrong, and nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pqcodec.errors import InvalidArgument
from pqcodec.formats.offload import HostPool
from tests.conftest import DEVICE, GPU, gaussian
from tests.test_host_pool import SHAPE, coded, same, tensors, way

__all__ = ["way"]  # the fixture


# -- what few callers give -----------------------------------------------------------------------------------------
def test_empty_tensors_come_back_also_as_a_piece_of_their_own(way: dict[str, Any]) -> None:
    empty = [torch.empty(shape, device=way["device"]) for shape in ((0, 4, 64), (2, 0, 64), (0, 64))]
    xs = [empty[0], *tensors(way), *empty]
    with HostPool(1 << 20, piece_bytes=1, **way) as pool:
        for given in (xs, empty, empty[:1]):
            pool.put("a", given)
            strides = [x.stride() if x.numel() else [0] * x.ndim for x in given]
            outs = [x.new_empty(0).new_empty_strided(x.shape, how) for x, how in zip(given, strides, strict=True)]
            for found in (pool.get("a"), pool.get("a", out=outs)):
                assert all(x.shape == y.shape and same(y, coded(x)) for x, y in zip(given, found, strict=True))


@pytest.mark.parametrize("inside", ["pool", "put", "get"])
def test_what_was_prepared_in_inference_mode_is_used_outside_of_it(way: dict[str, Any], inside: str) -> None:
    xs = tensors(way)
    with torch.inference_mode(inside == "pool"):
        pool = HostPool(1 << 20, **way)
    with pool:
        for number, x in enumerate(xs):
            with torch.inference_mode(inside == "put" and number == 0):
                pool.put("a", x)
            with torch.inference_mode(inside == "get" and number == 0):
                found = pool.get("a")
            assert same(found, coded(x))


def test_the_default_device_changes_nothing(way: dict[str, Any]) -> None:
    xs = tensors(way)
    expected = [coded(x) for x in xs]
    with torch.device(DEVICE if GPU else "meta"), HostPool(1 << 20, **way) as pool:
        found = [(pool.put("a", x), pool.get("a"))[1] for x in xs]
    assert all(same(y, e) for y, e in zip(found, expected, strict=True))


def test_views_of_the_other_sign_are_coded_on_the_cpu_and_refused_elsewhere(way: dict[str, Any]) -> None:
    x, out = gaussian(*SHAPE).to(way["device"]), torch.zeros(SHAPE, device=way["device"])
    turned = torch._neg_view(x)
    with HostPool(1 << 20, **way) as pool:
        pool.put("a", x)  # of the same strides
        assert same(pool.get("a", out=out), coded(x))
        if way["device"] == way["backend"] == "cpu":
            assert same(pool.get("a", out=torch._neg_view(out)).resolve_neg(), coded(x))
            pool.put("a", turned)
            assert same(pool.get("a"), coded(turned.resolve_neg()))
        else:
            with pytest.raises(InvalidArgument, match="resolve_neg"):
                pool.put("a", turned)
            with pytest.raises(InvalidArgument, match="out 0"):
                pool.get("a", out=torch._neg_view(out))
            assert same(pool.get("a", out=out), coded(x))


def test_tensors_without_strides_are_refused(way: dict[str, Any]) -> None:
    with HostPool(1 << 20, **way) as pool:
        pool.put("a", gaussian(20, 64).to(way["device"]))
        with pytest.raises(InvalidArgument, match="without sizes or strides"):
            pool.get("a", out=gaussian(20, 64).to(way["device"]).to_sparse_csr())
