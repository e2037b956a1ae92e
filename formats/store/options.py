"""Law: the options of ``model.generate`` that work with a store; all others are refused by name.

Accepted are options that choose tokens, stop, or select outputs. Others may change the cache unnoticed: an assistant model cuts
it, ``position_ids`` rotates it, another implementation replaces it. So unknown options are refused before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pqcodec.errors import InvalidArgument
from pqcodec.formats.store import contents

CHOOSING = """do_sample num_beams temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty
    encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    renormalize_logits forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens sequence_bias watermarking_config pad_token_id bos_token_id eos_token_id"""
STOPPING = "max_length max_new_tokens min_length min_new_tokens early_stopping max_time stop_strings"
TELLING = """num_return_sequences output_attentions output_hidden_states output_scores output_logits return_dict_in_generate"""
WITHOUT_EFFECT = """use_cache max_cache_len compile_config disable_compile decoder_start_token_id num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold max_matching_ngram_size assistant_lookbehind target_lookbehind
    assistant_ensemble_weight is_assistant transformers_version"""  # without effect, since a cache is passed and no assistant
ARGUMENTS = "generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn streamer synced_gpus tokenizer"
CONFIG = frozenset(f"{CHOOSING} {STOPPING} {TELLING} {WITHOUT_EFFECT}".split())
KNOWN = CONFIG | frozenset(ARGUMENTS.split()) | {"attention_mask"}
_NEUTRAL: dict[str, Any] = {
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
}  # values of other options that have no effect


@dataclass(frozen=True)
class Request:
    """A checked call of ``PrefixStore.generate``: one prompt, and the options to pass on."""

    ids: Any  # [1, n]
    options: Mapping[str, Any]  # for ``model.generate``, without ``shown``
    shown: Mapping[str, Any]  # images, video, sound, and the types of their placeholder tokens
    answers: int  # sequences that are generated: beams or return sequences
    inside: bool  # attentions or hidden states are requested, which a kept prefix lacks
    padded: bool  # no mask is given and the prompt has pad tokens, which generate would leave out
    caches: bool  # False: a generation config says use_cache=False, as MPT's does by default

    @classmethod
    def of(cls, model: Any, input_ids: Any, options: Mapping[str, Any]) -> Request:
        """The request for ``generate(input_ids, **options)``; raises InvalidArgument, by name, for an unsupported option."""
        asked = {name: value for name, value in options.items() if value is not None}
        for name in asked:
            if name not in KNOWN | contents.NAMES | contents.TYPES:
                raise InvalidArgument(
                    f"PrefixStore.generate does not take {name}, {_why(name)}; leave it out, or call model.generate"
                )
        if asked.get("use_cache") is False:
            raise InvalidArgument("use_cache=False: a store keeps the cache; leave it out, or call model.generate")
        own = getattr(model, "generation_config", None)
        for owner, config in (("generation_config", asked.get("generation_config")), ("model.generation_config", own)):
            _check(owner, config)
        if not hasattr(input_ids, "ndim") or not hasattr(input_ids, "is_floating_point") or input_ids.is_floating_point():
            raise InvalidArgument(f"input_ids is a {type(input_ids).__name__}; a tensor of token ids [1, n] is expected")
        ids = input_ids if input_ids.ndim == 2 else input_ids[None]
        if ids.ndim != 2 or len(ids) != 1 or not ids.shape[1]:
            raise InvalidArgument(f"input_ids {tuple(input_ids.shape)}: one prompt [1, n] is expected")
        mask = asked.get("attention_mask")
        if mask is not None and (tuple(mask.shape) != tuple(ids.shape) or not bool((mask == 1).all())):
            raise InvalidArgument(
                f"the attention mask {tuple(mask.shape)} leaves tokens out, or is not of the prompt's {ids.shape[1]} tokens; "
                "a prefix in the store is of all tokens: pass them unpadded"
            )

        def effective(name: str) -> Any:
            if name in options:  # None, too, overrides the configs
                return options[name]
            configured = (getattr(asked.get("generation_config"), name, None), getattr(own, name, None))
            return next((value for value in configured if value is not None), None)

        shown = {name: value for name, value in asked.items() if name in contents.NAMES | contents.TYPES}
        contents.check_types({name: value for name, value in shown.items() if name in contents.TYPES}, ids, model.config)
        if contents.shows_nothing(shown, model.config):  # the prompt is plain text
            shown = {}
        passed = {name: value for name, value in options.items() if name in (asked.keys() - shown.keys()) | CONFIG}
        if getattr(own, "cache_implementation", None):  # a default of the model, replaced by the cache that is passed
            passed["cache_implementation"] = None
        answers = max(int(effective(name) or 1) for name in ("num_beams", "num_return_sequences"))
        pad, ends = effective("pad_token_id"), effective("eos_token_id")
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        padded = mask is None and pad is not None and pad not in ends and pad in ids[0].tolist()
        inside = bool(effective("output_attentions") or effective("output_hidden_states"))
        return cls(ids, passed, shown, answers, inside, padded, effective("use_cache") is not False)


def _check(owner: str, config: Any) -> None:
    """Raises InvalidArgument for a generation config with options that a store does not take."""
    if config is None:
        return
    defaults = type(config)()
    for name, value in vars(config).items():
        if name in CONFIG or name.startswith("_") or value is None or value is False:
            continue
        if name == "cache_implementation" and owner.startswith("model."):
            continue
        if value != getattr(defaults, name, None) and value != _NEUTRAL.get(name):
            raise InvalidArgument(
                f"{owner}.{name}={value!r:.60}: PrefixStore.generate does not take {name}, {_why(name)}; "
                "set it to None, or call model.generate"
            )


def _why(name: str) -> str:
    if name in ("cache", "past_key_values", "cache_params"):
        return "which is the store's business here"
    if "assist" in name or "lookup" in name or name in ("use_mtp", "speculation_type"):
        return "because tokens that are taken back leave a cache of other tokens"
    if name in ("inputs_embeds", "position_ids"):
        return "because keys and values depend on more than the tokens then"
    return "for what it does to the cache is not known"
