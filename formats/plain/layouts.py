"""Law: the order of a tensor's dimensions by their names, and tensors of another order as [..., tokens, head_dim].

A layout is named, never guessed from a shape: "tokens,heads,head_dim". ``...`` stands for any number of dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pqcodec.errors import CorruptStream, InvalidArgument
from pqcodec.formats.plain.in_memory import CuttableTensors
from pqcodec.formats.plain.numbers import is_torch

LAYOUTS_KEY = "encode.layouts"  # of a file's metadata: the layout in which each tensor was given that was turned (SPEC IV.5)
_LAST, _ANY = ("tokens", "head_dim"), "..."
T = TypeVar("T")


@dataclass(frozen=True)
class TensorLayout:
    """The order of dimensions, each by its name: "tokens" and "head_dim", others as the caller likes, at most one "...".

    Raises InvalidArgument.

    >>> layout = TensorLayout.of("tokens,heads,head_dim")
    >>> layout.turned((512, 2, 64)), layout.given((2, 512, 64)), layout.fits(2)
    ((2, 512, 64), (512, 2, 64), False)
    """

    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names) or "" in self.names or not set(_LAST) <= set(self.names):
            raise InvalidArgument(
                f"layout {str(self)!r:.200}: names of dimensions are expected, each once, among them tokens and head_dim, "
                "such as tokens,heads,head_dim or ...,tokens,heads,head_dim"
            )

    @classmethod
    def of(cls, text: str) -> TensorLayout:
        """The layout of a text, names with commas between them."""
        return cls(tuple(name.strip() for name in text.split(",")))

    def __str__(self) -> str:
        return ",".join(self.names)

    def fits(self, dimensions: int) -> bool:
        """Whether a tensor of so many dimensions can have this layout."""
        return dimensions >= len(self.names) - 1 if _ANY in self.names else dimensions == len(self.names)

    def axes(self, dimensions: int) -> tuple[int, ...]:
        """The dimensions of a tensor in the order [..., tokens, head_dim]."""
        more = dimensions - len(self.names)  # that "..." stands for, beside one
        names = [name for each in self.names for name in [each] * (1 + more if each == _ANY else 1)]
        return (*(axis for axis, name in enumerate(names) if name not in _LAST), *map(names.index, _LAST))

    def turned(self, sizes: Sequence[T]) -> tuple[T, ...]:
        """The shape as [..., tokens, head_dim] of a tensor that has ``sizes`` in this layout."""
        return tuple(sizes[axis] for axis in self.axes(len(sizes)))

    def given(self, sizes: Sequence[T]) -> tuple[T, ...]:
        """The shape in this layout of a tensor [..., tokens, head_dim]."""
        return tuple(sizes[axis] for axis in _inverse(self.axes(len(sizes))))

    def turn(self, x: Any) -> Any:
        """A tensor of this layout as a view [..., tokens, head_dim]."""
        return _transposed(x, self.axes(x.ndim))

    def turn_back(self, x: Any) -> Any:
        """A tensor [..., tokens, head_dim] as a view in this layout."""
        return _transposed(x, _inverse(self.axes(x.ndim)))


def layouts_of(metadata: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, TensorLayout]:
    """The layouts in which tensors were given, by name, out of a file's metadata; ``shapes``: of all its tensors.

    Raises CorruptStream for a layout that is none, or that a tensor cannot have.
    """
    told = metadata.get(LAYOUTS_KEY, {})
    if not isinstance(told, dict) or not all(isinstance(text, str) for text in told.values()):
        raise CorruptStream(f"metadata: {LAYOUTS_KEY} is {told!r:.60}; an object of names and layouts is expected")
    found = {}
    for name in told.keys() & shapes.keys():
        try:
            found[name] = TensorLayout.of(told[name])
        except InvalidArgument as error:
            raise CorruptStream(f"metadata: {LAYOUTS_KEY}: tensor {name!r}: {error}") from None
        if not found[name].fits(len(shapes[name])):
            raise CorruptStream(
                f"metadata: {LAYOUTS_KEY}: tensor {name!r} has {len(shapes[name])} dimensions, not {told[name]}"
            )
    return found


class Turned:
    """Some ``names`` of other tensors, of which those with a layout are turned to [..., tokens, head_dim]."""

    def __init__(self, tensors: CuttableTensors, names: Sequence[str], layouts: Mapping[str, TensorLayout]) -> None:
        self._tensors, self._layouts, self.names = tensors, layouts, tuple(names)

    def describe(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape, turned, and dtype of a tensor."""
        shape, dtype = self._tensors.describe(name)
        return self._layouts[name].turned(shape) if name in self._layouts else shape, dtype

    def read(self, name: str) -> Any:
        """The tensor, or a view that is turned."""
        x = self._tensors.read(name)
        return self._layouts[name].turn(x) if name in self._layouts else x

    def read_tokens(self, name: str, first: int, step: int = 1) -> Any:
        """Every ``step``-th token from ``first`` on; of a tensor that is turned, all is read for it."""
        if name in self._layouts:
            return self.read(name)[..., first::step, :]
        return self._tensors.read_tokens(name, first, step)


def _inverse(axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(axes)), key=axes.__getitem__))


def _transposed(x: Any, axes: Sequence[int]) -> Any:
    return x.permute(*axes) if is_torch(x) else x.transpose(axes)
