"""Law: which stages the keys and values of a cache go through before they are coded, and which shared tables they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.policy.names import TensorRole


@dataclass(frozen=True)
class Stages:
    """The options of ``pqcodec.encode`` of these names, for keys and values; ``before_rope`` for keys alone.

    ``basis`` and ``ranges``: one for all, or a mapping of (role, layer) to one each, (role, None) for all other layers; tensors
    without one have none. ``channels``: by the names of tensors; others keep all. Raises InvalidArgument.
    """

    before_rope: bool = False
    join_heads: bool = False
    block_basis: bool = False
    basis: Any = None
    ranges: Any = None
    channels: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        given = {"channels": self.channels, "block_basis": self.block_basis, "basis": self.basis is not None}
        if len(asked := [name for name, there in given.items() if there]) > 1:
            raise InvalidArgument(f"{' and '.join(asked)} are given; a stream has one linear stage")

    @property
    def linear(self) -> bool:
        """Whether a linear stage is asked for."""
        return bool(self.channels or self.block_basis or self.basis is not None)

    @property
    def by_layer(self) -> bool:
        """Whether the sizes of streams may depend on their layer."""
        return isinstance(self.basis, Mapping) or isinstance(self.ranges, Mapping)

    def options(self, tensor: TensorRole, name: str | None = None) -> dict[str, Any]:
        """Options of ``pqcodec.encode`` for a tensor, without what is about RoPE; ``name``: its own, for channels."""
        if tensor.role == "other":
            return {}
        found = {"basis": given_for(self.basis, tensor), "ranges": given_for(self.ranges, tensor)}
        found |= {"channels": self.channels.get(name or "")}
        chosen = {key: value for key, value in found.items() if value is not None}
        return chosen | {key: True for key in ("join_heads", "block_basis") if getattr(self, key)}


def given_for(given: Any, tensor: TensorRole) -> Any:
    """What is given for a tensor: for all, or by (role, layer), (role, None) for all other layers; None where nothing is."""
    if not isinstance(given, Mapping):
        return given
    return given.get((tensor.role, tensor.layer), given.get((tensor.role, None)))
