"""Law: tensors that are asked for by name, from whatever holds them; and those of a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pqcodec.errors import InvalidArgument
from pqcodec.formats.plain import numbers as exact


class Tensors(Protocol):
    """Tensors by name, each read when its turn comes."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype."""
        ...

    def read(self, name: str) -> Any: ...


class InMemory:
    """Tensors of torch or numpy that are there; raises InvalidArgument for anything else."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = dict(tensors)
        self.names = tuple(self._tensors)
        for name, x in self._tensors.items():
            if not exact.is_tensor(x):
                raise InvalidArgument(f"tensor {name!r}: a torch.Tensor or numpy.ndarray is expected, not {type(x).__name__}")

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        x = self._tensors[name]
        return tuple(int(n) for n in x.shape), exact.dtype_name(x)

    def read(self, name: str) -> Any:
        return self._tensors[name]
