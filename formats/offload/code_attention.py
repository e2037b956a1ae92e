"""Law: attention of a model of transformers to a layer whose old tokens stay encoded: what stands for its keys and values.

With ``attn_implementation="pqcodec"`` a layer on the CPU gives attention no tensors but a ``CodedPart`` of its keys and one of
its values. They can be read by ``attend_to_layer`` alone: every other use of them raises. A mask, or an option of a model, that
attention from codes does not know, and queries that need gradients, make it decode, and do what the model does with ``sdpa``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pqcodec import attention
from pqcodec.errors import InvalidArgument
from pqcodec.formats.offload.old_tokens import OnCPU

NAME = "pqcodec"
_MOST_ROWS = 32  # queries that share the keys of a head; of more, decoding is quicker
_NEEDS_TENSORS = ("position_bias", "head_mask", "sliding_window")  # options that ``sdpa`` or its mask knows
_REFUSED = ("s_aux", "sinks")  # options that change the result, and that ``sdpa`` passes over
Pair = tuple[Any, Any]


@dataclass(frozen=True, eq=False)
class LayerTokens:
    """All tokens of a layer as they are kept: exact first ones, streams in chunks, exact last ones; keys and values each."""

    first: Pair  # [sequences, heads, n, head_dim]
    chunks: Sequence[Any]  # of ``old_tokens``
    last: Pair
    backend: str
    decode: Callable[[], Pair]  # all of them as tensors

    @property
    def streams_follow(self) -> bool:
        """Whether no chunk but the last one is cut, so that a range of all streams' tokens tells what is left of them."""
        return all(chunk.tokens == chunk.stored for chunk in self.chunks[:-1])

    @property
    def tokens(self) -> int:
        """Tokens of each sequence."""
        return self.encoded + sum(int(pair[0].shape[-2]) for pair in (self.first, self.last))

    @property
    def encoded(self) -> int:
        """Tokens of each sequence that are in streams."""
        return sum(chunk.tokens for chunk in self.chunks)


class CodedPart:
    """The keys, or the values, of a layer; only ``attend_to_layer`` can read them."""

    def __init__(self, layer: LayerTokens, role: int) -> None:
        like = layer.last[role]
        self.layer, self.dtype, self.device = layer, like.dtype, like.device
        self.shape = torch.Size((*like.shape[:2], layer.tokens, like.shape[-1]))

    def __getattr__(self, name: str) -> Any:
        raise InvalidArgument(f".{name} of encoded keys or values: {_ADVICE}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raise InvalidArgument: torch cannot compute with codes."""
        raise InvalidArgument(f"{getattr(function, '__name__', function)} of encoded keys or values: {_ADVICE}")


_ADVICE = "this model's attention does not read codes; call model.set_attn_implementation('sdpa')"


def coded_parts(old: OnCPU, first: Pair, last: Pair) -> tuple[CodedPart, CodedPart]:
    """What a layer gives to attention instead of its keys and values; ``last`` must not change before it is used."""
    chunks = list(old.chunks)

    def decode() -> Pair:
        before, end = int(first[0].shape[-2]), int(first[0].shape[-2]) + sum(chunk.tokens for chunk in chunks)
        whole = []
        for role in range(2):
            like = last[role]
            out = like.new_empty((*like.shape[:2], end + like.shape[2], like.shape[3]))
            out[:, :, :before], out[:, :, end:] = first[role], like
            whole.append(out)
        old.decode_chunks(chunks, (whole[0], whole[1]), before)
        return whole[0], whole[1]

    layer = LayerTokens(first, chunks, last, old.backend, decode)
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
        layer, rows = key.layer, query.shape[2] * (query.shape[1] // key.shape[1])
        known = not dropout and not (torch.is_grad_enabled() and query.requires_grad)
        known = known and not any(kwargs.get(name) is not None for name in _NEEDS_TENSORS)
        if known and rows <= _MOST_ROWS and layer.streams_follow and _sees_all(attention_mask, query.shape[2], layer.tokens):
            return _from_codes(layer, query, scaling, softcap), None
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


def _from_codes(layer: LayerTokens, query: Any, scaling: float | None, softcap: float | None) -> Any:
    found = [
        attention.attend(
            query[row],
            [chunk.keys[row] for chunk in layer.chunks],
            [chunk.values[row] for chunk in layer.chunks],
            scale=scaling,
            softcap=softcap,
            tokens=(0, layer.encoded),
            first=(layer.first[0][row], layer.first[1][row]),
            recent=(layer.last[0][row], layer.last[1][row]),
            backend=layer.backend,
        )
        for row in range(query.shape[0])
    ]
    return torch.stack(found).transpose(1, 2).contiguous()
