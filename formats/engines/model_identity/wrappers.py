"""Law: the transformers model inside its wrappers."""

from __future__ import annotations

from typing import Any

from pqcodec.errors import InvalidArgument


def unwrapped(model: Any) -> Any:
    """The model inside ``torch.compile(model)``, a PeftModel or DataParallel; an unwrapped model is returned as it is.

    The modules of a PeftModel's base hold its adapters, so nothing is lost. Raises InvalidArgument for a PeftModel that puts
    virtual tokens before the prompt (prompt tuning, prefix tuning, P-tuning): its caches hold more positions than tokens.
    """
    while True:
        original = getattr(model, "_modules", {}).get("_orig_mod")
        if original is not None:  # torch.compile's OptimizedModule
            model = original
        elif callable(getattr(type(model), "get_base_model", None)) and hasattr(model, "base_model"):
            if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
                kind = getattr(model.active_peft_config, "peft_type", "prompt learning")
                raise InvalidArgument(
                    f"{type(model).__name__} of {getattr(kind, 'value', kind)}: it puts virtual tokens before each prompt, so "
                    "its caches do not belong to the tokens alone: pass the base model, or one with LoRA in its modules"
                )
            model = model.get_base_model()
        elif type(model).__name__ in ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"):
            model = model.module
        else:
            return model
