"""Law: attention of a model of transformers to a layer whose old tokens stay encoded: what stands for its keys and values.

With ``attn_implementation="pqcodec"`` a layer whose streams are on the device that attends gives attention no tensors but a
``CodedPart`` of its keys and one of its values. They can be read by ``attend_to_layer`` alone: every other use of them raises.
A mask, or an option of a model, that attention from codes does not know, and queries that need gradients, make it decode, and
do what the model does with ``sdpa``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pqcodec import attend_layer, attention
from pqcodec.errors import InvalidArgument
from pqcodec.formats.offload.old_tokens import Chunk, OldTokens, OnCPU, OnDevice
from pqcodec.formats.offload.tail import Tail
from pqcodec.placed import Placed

NAME = "pqcodec"
_MOST_ROWS = 32  # queries that share the keys of a head; of more, decoding is quicker
_NEEDS_TENSORS = ("position_bias", "head_mask", "sliding_window")  # options that ``sdpa`` or its mask knows
_REFUSED = ("s_aux", "sinks")  # options that change the result, and that ``sdpa`` passes over
Pair = tuple[Any, Any]


class LayerTokens:
    """All tokens of a layer as they are now: exact first ones, streams in chunks, exact last ones; keys and values each.

    ``first``: [sequences, heads, n, head_dim]; ``last``: how many there are. None may change before this is used.
    """

    def __init__(self, chunks: Sequence[Chunk], first: Pair, last: int) -> None:
        self.chunks, self.first = list(chunks), first
        self.before = int(first[0].shape[-2])
        self.encoded = sum(chunk.tokens for chunk in self.chunks)  # of each sequence, in streams
        self.tokens = self.before + self.encoded + last

    def attend(self, query: Any, scale: float | None, softcap: float | None) -> Any:
        """What each query sees of all tokens up to its own, like ``query`` [sequences, heads, n, head_dim].

        None where codes are not read, or not as fast.
        """
        raise NotImplementedError

    def decode(self) -> Pair:
        """All keys and values as tensors, valid until the next layer's."""
        raise NotImplementedError


class TokensOnCPU(LayerTokens):
    """A layer's tokens on the CPU."""

    def __init__(self, old: OnCPU, first: Pair, last: Pair) -> None:
        super().__init__(old.chunks, first, int(last[0].shape[-2]))
        self._old, self._last = old, last

    def attend(self, query: Any, scale: float | None, softcap: float | None) -> Any:
        """See ``LayerTokens.attend``."""
        rows = query.shape[2] * (query.shape[1] // self.first[0].shape[1])
        if rows > _MOST_ROWS or any(chunk.tokens != chunk.stored for chunk in self.chunks[:-1]):
            return None
        found = [
            attention.attend(
                query[row],
                [chunk.keys[row] for chunk in self.chunks],
                [chunk.values[row] for chunk in self.chunks],
                scale=scale,
                softcap=softcap,
                tokens=(0, self.encoded),
                first=(self.first[0][row], self.first[1][row]),
                recent=(self._last[0][row], self._last[1][row]),
                backend=self._old.backend,
            )
            for row in range(query.shape[0])
        ]
        return torch.stack(found)

    def decode(self) -> Pair:
        """See ``LayerTokens.decode``."""
        end = self.before + self.encoded
        whole = []
        for first, like in zip(self.first, self._last, strict=True):
            out = like.new_empty((*like.shape[:2], end + like.shape[2], like.shape[3]))
            out[:, :, : self.before], out[:, :, end:] = first, like
            whole.append(out)
        self._old.decode_chunks(self.chunks, (whole[0], whole[1]), self.before)
        return whole[0], whole[1]


class TokensOnDevice(LayerTokens):
    """A layer's tokens on a GPU, whose streams are there; the last ones are the tail's."""

    def __init__(self, old: OnDevice, first: Pair, tail: Tail) -> None:
        super().__init__(old.chunks, first, tail.tokens)
        self._old, self._tail, self._all = old, tail, old.chunks

    def attend(self, query: Any, scale: float | None, softcap: float | None) -> Any:
        """See ``LayerTokens.attend``. What is prepared is kept until the layer's streams or its memory change."""
        workspace, key = self._old.workspace, (tuple(query.shape), query.dtype, scale, softcap)
        kept = (self.first, self._tail.memory)
        way = workspace.attention(self._old.number, key, kept, lambda: self._prepared(query, scale, softcap))
        if way is None:
            return None
        found = way.run(query, workspace.recent(self._tail.tokens), self._tail.later)
        self._tail.later = None  # the kernel has put them there
        return found

    def _prepared(self, query: Any, scale: float | None, softcap: float | None) -> attend_layer.AttendLayer | None:
        if any(chunk.tokens != chunk.stored for chunk in self.chunks):
            return None
        rows = range(query.shape[0])
        streams = [[(chunk.keys[row], chunk.values[row]) for chunk in self.chunks] for row in rows]
        headers = [(k.header, v.header) for k, v in streams[0]]
        if attend_layer.why_decoded(query, headers, self._old.backend) is not None:
            return None
        placed = [[(_placed(k), _placed(v)) for k, v in own] for own in streams]
        return attend_layer.AttendLayer(query, placed, self.first, self._tail.memory, scale=scale, softcap=softcap)

    def decode(self) -> Pair:
        """See ``LayerTokens.decode``."""
        if self._old.workspace.step is not None:
            raise RuntimeError("attention reads tensors, not codes")
        self._tail.settle()
        end = self.before + self.encoded
        whole = self._old.workspace.scratch(self._tail.kind, end + self._tail.room)
        if self._old.chunks is self._all:
            self._old.decode(whole, self.first, self._tail.memory)
        else:  # more was encoded since
            self._old.decode_chunks(self.chunks, whole, self.before)
            for out, first, last in zip(whole, self.first, self._tail.read(), strict=True):
                out[:, :, : self.before], out[:, :, end : self.tokens] = first, last
        return whole[0].narrow(2, 0, self.tokens), whole[1].narrow(2, 0, self.tokens)


def _placed(stream: Any) -> Placed:
    return Placed.whole(stream.header, stream.data.data_ptr(), stream.data)


class CodedPart:
    """The keys, or the values, of a layer; only ``attend_to_layer`` can read them."""

    def __init__(self, layer: LayerTokens, role: int) -> None:
        like = layer.first[role]
        self.layer, self.dtype, self.device = layer, like.dtype, like.device
        self.shape = torch.Size((*like.shape[:2], layer.tokens, like.shape[-1]))

    def __getattr__(self, name: str) -> Any:
        raise InvalidArgument(f".{name} of encoded keys or values: {_ADVICE}")

    def __getitem__(self, key: Any) -> Any:  # not looked up by __getattr__
        raise InvalidArgument(f"a part of encoded keys or values: {_ADVICE}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise InvalidArgument: torch cannot compute with codes."""
        raise InvalidArgument(f"{getattr(function, '__name__', function)} of encoded keys or values: {_ADVICE}")


_ADVICE = "this model's attention does not read codes; call model.set_attn_implementation('sdpa')"


def has_codes(old: OldTokens | None) -> bool:
    """Whether a layer's streams are where attention can read them."""
    return isinstance(old, OnCPU) or type(old) is OnDevice


def coded_parts(old: OldTokens, first: Pair, tail: Tail) -> tuple[CodedPart, CodedPart]:
    """What a layer that ``has_codes`` gives to attention instead of its keys and values."""
    if isinstance(old, OnCPU):
        layer: LayerTokens = TokensOnCPU(old, first, tail.read())
    else:
        assert isinstance(old, OnDevice)
        layer = TokensOnDevice(old, first, tail)
    return CodedPart(layer, 0), CodedPart(layer, 1)


@torch.compiler.disable  # codes are no tensors: a compiled model breaks its graph here, as at ``EncodedLayer.update``
def attend_to_layer(
    otherwise: Callable[..., Any],
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """An attention function of transformers: query [sequences, heads, n, head_dim] to [sequences, n, heads, head_dim].

    ``otherwise``: ``sdpa``'s, which takes tensors; it has its way with layers that are not encoded, too. Raises InvalidArgument
    for options of a model that neither knows.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise InvalidArgument(f"'pqcodec' does not know the option {name}: call model.set_attn_implementation('eager')")
    if softcap is not None:
        kwargs["softcap"] = softcap
    if isinstance(key, CodedPart):
        layer = key.layer
        known = not dropout and not (torch.is_grad_enabled() and query.requires_grad)
        known = known and not any(kwargs.get(name) is not None for name in _NEEDS_TENSORS)
        if known and _sees_all(attention_mask, query.shape[2], layer.tokens):
            found = layer.attend(query, scaling, softcap)
            if found is not None:
                return found.transpose(1, 2).contiguous(), None
        key, value = layer.decode()
    return otherwise(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)  # type: ignore[no-any-return]


def _sees_all(mask: Any, queries: int, tokens: int) -> bool:
    """Whether each query sees all tokens up to its own."""
    if mask is None:
        return queries == 1
    if mask.dtype != torch.bool or mask.shape[-2:] != (queries, tokens):
        return False
    own = torch.arange(tokens - queries, tokens, device=mask.device)[:, None]
    return bool((mask == (torch.arange(tokens, device=mask.device) <= own)).all())
