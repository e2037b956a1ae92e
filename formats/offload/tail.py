"""Law: the exact last tokens of a layer, in memory that stays where it is while tokens are appended."""

from __future__ import annotations

from typing import Any

import torch

from pqcodec.errors import InvalidArgument
from pqcodec.formats.offload.workspace import PairKind

ROLES = ("keys", "values")
_FIRST_ROOM = 64  # tokens that a tail has room for at first


class Tail:
    """The exact last tokens of a layer: the first ``tokens`` of ``memory``, a pair [sequences, heads, ``room``, head_dim].

    Of these, ``later`` are not there yet: keys and values that are copied when somebody wants to read the memory, unless a
    kernel that read them has put them there.
    """

    def __init__(self, keys: Any, values: Any) -> None:
        self.tokens = 0
        self.later: tuple[Any, Any] | None = None
        self._use(room_for(keys, 0), room_for(values, 0))

    def _use(self, keys: Any, values: Any) -> None:
        self.memory = keys, values
        self.room = int(keys.shape[-2])
        self.kind = PairKind.of(keys, values)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory, with its room for more tokens."""
        return sum(x.nbytes for x in self.memory)

    def read(self) -> tuple[Any, Any]:
        """Views of the keys and values [sequences, heads, tokens, head_dim]."""
        self.settle()
        keys, values = (x[:, :, : self.tokens] for x in self.memory)
        return keys, values

    def settle(self) -> None:
        """Copy what is ``later``, so that the memory holds all tokens."""
        if self.later is not None:
            more = int(self.later[0].shape[-2])
            for room, x in zip(self.memory, self.later, strict=True):
                room.narrow(2, self.tokens - more, more).copy_(x)
            self.later = None

    def check(self, keys: Any, values: Any) -> None:
        """Raise InvalidArgument for new tokens of another batch, of other heads, or of a dtype that the tail's would round."""
        given = PairKind.of(keys, values)
        if given.keys[0] != self.kind.keys[0]:
            raise InvalidArgument(f"{given.keys[0]} sequences are given to a cache of {self.kind.keys[0]}")
        if (given.keys, given.values) != (self.kind.keys, self.kind.values):
            raise InvalidArgument(
                f"heads and head_dim {given.keys[1:]} (keys) and {given.values[1:]} (values) are given to a cache of "
                f"{self.kind.keys[1:]} and {self.kind.values[1:]}: it is another model's"
            )
        for role, new, kept in zip(ROLES, given.dtypes, self.kind.dtypes, strict=True):
            if new != kept and torch.promote_types(new, kept) != kept:
                raise InvalidArgument(
                    f"{role} of {new} are given to a cache that holds them as {kept}: "
                    "read a whole text under one autocast, or begin anew with reset()"
                )

    def fits(self, keys: Any) -> bool:
        """Whether there is room for the tokens of ``keys``."""
        return self.tokens + int(keys.shape[-2]) <= self.room

    def append(self, keys: Any, values: Any) -> None:
        """Copy tokens behind the others; the memory stays the same while there is room."""
        self.append_later(keys, values)
        self.settle()

    def append_later(self, keys: Any, values: Any, counted: bool = True) -> None:
        """Take tokens that are copied later. Not ``counted``: those of a step that is captured, for which there is room."""
        more = int(keys.shape[-2])
        if not self.fits(keys):
            self._move(max(_FIRST_ROOM, (self.tokens + more) * 3 // 2))
        if counted:
            self.settle()
            self.tokens += more
        self.later = keys, values

    def _move(self, room: int) -> None:
        old = self.read()
        self._use(*(room_for(x, room) for x in old))
        for new, x in zip(self.memory, old, strict=True):
            new[:, :, : self.tokens] = x

    def replace(self, keys: Any, values: Any, *, room: int) -> None:
        """Hold other tokens instead, in memory for ``room`` of them; they must not be views of the tail's own memory."""
        self.tokens, self.later = 0, None
        if self.kind != PairKind.of(keys, values) or self.room != room:
            self._use(room_for(keys, room), room_for(values, room))
        self.append(keys, values)

    def cut(self, tokens: int) -> None:
        """Keep the first ``tokens``."""
        self.settle()
        self.tokens = min(self.tokens, tokens)

    def select(self, rows: Any) -> None:
        """Make the batch one of sequences ``rows`` (int64 tensor) of it."""
        self.settle()
        self._use(*(selected(x, rows) for x in self.memory))


def room_for(x: Any, tokens: int) -> Any:
    """Uninitialised memory for ``tokens`` like those of x [sequences, heads, n, head_dim]."""
    with torch.inference_mode(False):
        return torch.empty((*x.shape[:2], tokens, x.shape[-1]), dtype=x.dtype, device=x.device)


def selected(x: Any, rows: Any) -> Any:
    """A copy of sequences ``rows`` (int64 tensor, on any device) of x [sequences, ...]."""
    with torch.inference_mode(False), torch.no_grad():
        return x.index_select(0, rows.to(x.device))
