"""Law: the identity of a model: digests of all that the numbers of its caches depend on, checked on every call.

``Identity.of(model)`` reads a model in full once; each later call looks for changes:

- of weights, buffers, and tensors that are plain attributes (``tensors``);
- of modules, attributes, hooks, configs and the ``forward`` of classes (``watch``).

What differs from a model made from the config alone enters the identity (``deviation``), or is refused by name (``refusals``).
In modules whose code is not transformers', torch's, peft's or accelerate's ("foreign" code), private attributes count too,
functions by their code, and plain objects by their fields; not what such code itself writes while it computes (``written``).

Not detected: functions of transformers replaced elsewhere than in the model's own Python module; private attributes of
transformers' modules, which its code does not read; fields of objects of libraries, or of objects nested more than three deep;
what foreign code writes while it computes, or numbers that it reads from its Python module or from modules in lists; and,
unless ``full``, edits that bypass torch's version counters and miss all sampled words (``Identity.of``).
"""

from pqcodec.formats.engines.model_identity.identity import Identity, forget, tokenizer_digest
from pqcodec.formats.engines.model_identity.wrappers import unwrapped

__all__ = ["Identity", "forget", "tokenizer_digest", "unwrapped"]
