"""Law: the protocol of tensors that are read by name (``Tensors``), and its form for a mapping in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from pqcodec.errors import InvalidArgument
from pqcodec.formats.plain import numbers as exact


class Tensors(Protocol):
    """Named tensors, of which each is read when it is needed."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names, in order."""
        ...

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a tensor, without reading its numbers."""
        ...

    def read(self, name: str) -> Any:
        """A tensor of torch or numpy."""
        ...


class CuttableTensors(Tensors, Protocol):
    """``Tensors`` of which some tokens can be read without the others."""

    def read_tokens(self, name: str, first: int, step: int = 1) -> Any:
        """Every ``step``-th token from ``first`` on of a tensor [..., tokens, head_dim]."""
        ...


class InMemory:
    """A mapping of names to torch or numpy tensors as ``CuttableTensors``; raises InvalidArgument for any other value."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = dict(tensors)
        self.names = tuple(self._tensors)
        for name, x in self._tensors.items():
            if not exact.is_tensor(x):
                raise InvalidArgument(f"tensor {name!r}: a torch.Tensor or numpy.ndarray is expected, not {type(x).__name__}")

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a tensor."""
        x = self._tensors[name]
        return tuple(int(n) for n in x.shape), exact.dtype_name(x)

    def read(self, name: str) -> Any:
        """The tensor itself, not a copy."""
        return self._tensors[name]

    def read_tokens(self, name: str, first: int, step: int = 1) -> Any:
        """Every ``step``-th token from ``first`` on, a view."""
        return self._tensors[name][..., first::step, :]
