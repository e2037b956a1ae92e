"""Law: which model a cache belongs to: all that the numbers of a cache depend on, looked at on every call.

``Identity.of(model)`` reads a model once in full and then, on each call, looks for what has changed:

- weights, buffers and tensors kept as plain attributes (``tensors``);
- modules, attributes, hooks, configs and the ``forward`` of classes (``watch``);
- and tells what of it is other than the config alone makes it (``deviation``), or refuses it by name (``refusals``).

What is not seen: functions of a library replaced in their module (``modeling_llama.apply_rotary_pos_emb = ...``), attributes
of classes other than ``forward``, contents of objects that are neither modules, configs, tensors nor plain containers, and,
unless ``full``, edits past torch's version counters that miss all sampled words (``Identity.of``).
"""

from pqcodec.formats.model_identity.identity import Identity, forget, tokenizer_digest
from pqcodec.formats.model_identity.wrappers import unwrapped

__all__ = ["Identity", "forget", "tokenizer_digest", "unwrapped"]
