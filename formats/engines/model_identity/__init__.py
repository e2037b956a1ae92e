"""Law: which model a cache belongs to: all that the numbers of a cache depend on, looked at on every call.

``Identity.of(model)`` reads a model once in full and then, on each call, looks for what has changed:

- weights, buffers and tensors kept as plain attributes (``tensors``);
- modules, attributes, hooks, configs and the ``forward`` of classes (``watch``);
- and tells what of it is other than the config alone makes it (``deviation``), or refuses it by name (``refusals``).

Of modules whose code is not transformers', torch's, peft's or accelerate's, private attributes are told as well, and plain
objects by their fields, but for what this code itself writes while it computes (``written``); and its functions by their code.

What is not seen: functions of transformers replaced elsewhere than in the model's own module, private attributes of
transformers' modules (which its code does not read), fields of objects of libraries, and of objects more than three deep; what
foreign code writes while it computes, and numbers that it reads from its Python module or hides in modules that are in lists;
and, unless ``full``, edits past torch's version counters that miss all sampled words (``Identity.of``).
"""

from pqcodec.formats.engines.model_identity.identity import Identity, forget, tokenizer_digest
from pqcodec.formats.engines.model_identity.wrappers import unwrapped

__all__ = ["Identity", "forget", "tokenizer_digest", "unwrapped"]
