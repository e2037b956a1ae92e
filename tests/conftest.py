"""What several tests share: shapes, tensors, the stored numbers of an output, and what there is of GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import interpreter
import numpy as np
import pytest
import torch
from typer import testing

import pqcodec
from pqcodec.codings.declared import DECLARED
from pqcodec.codings.plan import Plan
from pqcodec.codings.presets import Preset
from pqcodec.stages.centre import offset_at

BACKENDS = ("reference", "cpu")
TORCH_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALONE = [name for name, preset in pqcodec.PRESETS.items() if not preset.by_vectors]  # presets that need no codebooks
RESTORING = [name for name in ALONE if not pqcodec.PRESETS[name].estimates]  # of these all but sketches

TINY = {  # sizes of a model of transformers that is made in no time
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

ALL = bool(os.environ.get("PQCODEC_ALL"))
not_always = pytest.mark.skipif(not ALL, reason="a sample is run: PQCODEC_ALL=1 runs all")


def sampled(values: Iterable[Any], of: int = 2) -> list[Any]:
    """Values of ``parametrize``, of which the ordinary run takes the first one of ``of``; PQCODEC_ALL=1 takes all."""
    given = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*value, marks=not_always if i % of else ()) for i, value in enumerate(given)]


GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its kernels run in its interpreter


def _version(package: str) -> tuple[int, ...]:
    return tuple(map(int, version(package).split(".")[:2]))


# Triton's interpreter before 3.7 makes an index of an array of one number, which numpy refuses since 2.4
HAS_TRITON = find_spec("triton") is not None and (GPU or _version("triton") >= (3, 7) or _version("numpy") < (2, 4))
HAS_CUDA = find_spec("cuda") is not None and find_spec("cuda.bindings") is not None
needs_gpu = pytest.mark.skipif(not GPU, reason="no GPU here: pytest tests/test_gpu.py on a machine with one")
needs_triton = pytest.mark.skipif(
    not HAS_TRITON, reason="triton is not installed, or too old to interpret kernels with this numpy"
)
needs_cuda = pytest.mark.skipif(
    not GPU or torch.version.hip is not None or not HAS_CUDA, reason="backend cuda needs an NVIDIA GPU and cuda-bindings"
)
GPU_BACKENDS = (pytest.param("triton", marks=needs_triton), pytest.param("cuda", marks=needs_cuda))


@pytest.fixture(autouse=True, scope="session")
def _one_command_line() -> None:
    """The parser of the command line is made once, as in any process; typer's runner would make it for every command."""
    testing._get_command = cache(testing._get_command)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True, scope="session")
def _hastened_interpreter() -> None:
    if HAS_TRITON and not GPU:
        interpreter.hasten()


@pytest.fixture(autouse=True)
def _weights_as_users_see_them(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models on the CPU are looked at as without a GPU; a test asks for a GPU's way, which the interpreter then goes."""
    if "summed_weights" not in request.fixturenames:
        monkeypatch.setattr("pqcodec.words._triton_for", lambda device: device in ("cuda", "xpu"))


@pytest.fixture
def summed_weights() -> None:
    """Models on the CPU are looked at by Triton's kernels."""


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers, the same on every machine."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)).to(dtype)


def bits(x: torch.Tensor | np.ndarray) -> np.ndarray:
    """The stored numbers as integers, so that -0, NaN and the last bit count."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().contiguous()
        x = (x if x.dtype == torch.float32 else x.view(torch.int16)).numpy()
    return x.view(np.uint16 if x.itemsize == 2 else np.uint32)


def with_means(x: torch.Tensor, rope: pqcodec.Rope | None, size: float = 5.0) -> torch.Tensor:
    """Rows [leads, tokens, head_dim], plus a mean of each leading index, which RoPE turns on from token to token."""
    leads, tokens, head_dim = x.shape
    field = rope and rope.field(head_dim)
    means = size * gaussian(leads, head_dim, seed=2).numpy()
    return x + torch.from_numpy(np.stack([offset_at(field, mean, np.arange(tokens)) for mean in means]))


def skewed(data: bytes | np.ndarray, skew: int) -> torch.Tensor:
    """A copy of bytes that begins ``skew`` bytes behind a multiple of 16."""
    flat = np.frombuffer(data, np.uint8)
    room = torch.zeros(len(flat) + 32, dtype=torch.uint8)
    at = -room.data_ptr() % 16 + skew
    room[at : at + len(flat)].numpy()[:] = flat
    return room[at : at + len(flat)]


def rel_mse(x: torch.Tensor, y: torch.Tensor) -> float:
    """||x - y||^2 / ||x||^2 in float64."""
    x, y = x.double(), y.double()
    return float(((x - y) ** 2).sum() / (x**2).sum())


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=GPU_BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders write streams as they were before there were two rounds of rotation."""

    def rounds(preset: Preset) -> int:
        known = DECLARED[preset.coding].rounds
        return 1 if 1 in known else known[-1]

    monkeypatch.setattr(Preset, "rounds", property(rounds))


@pytest.fixture
def encoders_of_before(one_round: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference encoder writes streams as it did when neither two rounds were known nor norms were kept."""
    monkeypatch.setattr(Plan, "stretch", 1.0)


@pytest.fixture
def token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of quads turn token by token, as before there were runs, and as attention to codes turns them all."""
    monkeypatch.setattr("pqcodec.options.runs_are_possible", lambda *_: False)


@pytest.fixture(scope="session")
def small_stream() -> bytes:
    """A stream of a few hundred bytes with every section: offsets, RoPE, exact tokens, an exact vector, two blocks."""
    x = gaussian(2, 9, 16, seed=3)
    x[1, 5, 2] = float("nan")
    rope = pqcodec.Rope(theta=100.0, dim=8)
    options = {"center": "rope", "rope": rope, "exact_tokens": 1, "nonfinite": "exact", "chunk_tokens": 5}
    return pqcodec.encode(x, preset="pq2", backend="reference", **options)


class Lossless:
    """In the place of the codec of an EncodedCache: all but the coding's error."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x.clone()

    def __len__(self) -> int:
        return int(self.x.nbytes)

    @classmethod
    def encode(cls, x: torch.Tensor, **options: Any) -> Lossless:
        return cls(x)

    @staticmethod
    def decode(stream: Lossless, out: torch.Tensor, tokens: tuple[int, int] | None = None, backend: str = "auto") -> None:
        assert stream.x.dtype == out.dtype
        out.copy_(stream.x if tokens is None else stream.x[:, slice(*tokens)])


@pytest.fixture
def lossless(monkeypatch: pytest.MonkeyPatch) -> None:
    """EncodedCache loses nothing on a CPU."""
    old_tokens = pytest.importorskip("pqcodec.formats.offload.old_tokens")
    monkeypatch.setattr(old_tokens, "codec", Lossless)
