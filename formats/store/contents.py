"""Law: prompts with images, video or sound ("shown" inputs): a digest of them is part of a prefix's name.

A model's config names the placeholder tokens that stand for them. After the last placeholder a prompt is text, and a model can
continue from a kept prefix without the inputs; where placeholders follow the prefix, the prompt is computed anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from pqcodec.errors import InvalidArgument

PERSON = b"pqcodec-shown"
_NAMES = """pixel_values pixel_values_videos pixel_values_images pixel_values_local pixel_mask pixel_attention_mask image_sizes
    image_sizes_videos image_grid_thw video_grid_thw second_per_grid_ts image_patches image_patches_indices patches_grid
    num_local_patches high_res_pixel_values image_token_pooling image_grids video_token_pooling video_grids spatial_shapes
    input_features input_features_mask feature_attention_mask input_values input_values_mask"""
NAMES = frozenset(_NAMES.split())
TYPES = frozenset({"token_type_ids", "mm_token_type_ids"})  # inputs with the type of each token of the prompt: 0 is text
_TOKENS = tuple(f"{what}_token_{how}" for what in ("image", "video", "audio") for how in ("id", "index"))


def digest(shown: Mapping[str, Any], ids: Any) -> str:
    """The digest of shown tensors (names, dtypes, shapes, all bytes) and of the types of ``ids`` [1, n]: 64 hexadecimal digits.

    A longer prompt with the same inputs has the same digest. Raises InvalidArgument for an input that is no tensor.
    """
    import torch

    hashed = hashlib.blake2b(digest_size=32, person=PERSON)
    for name in sorted(shown):
        value = shown[name]
        if not isinstance(value, torch.Tensor):
            raise InvalidArgument(f"{name} is a {type(value).__name__}; a tensor is expected, as processors make it")
        if name in TYPES:
            kinds = sorted(set(zip(ids.flatten().tolist(), value.flatten().tolist(), strict=True)))
            hashed.update(f"{name}|{[kind for kind in kinds if kind[1]]}|".encode())
            continue
        hashed.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        hashed.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def stand_ins(config: Any) -> set[int]:
    """The ids of the placeholder tokens in a config; empty without any."""
    found = {value for name in _TOKENS if isinstance(value := getattr(config, name, None), int)}
    for part in vars(config).values() if hasattr(config, "__dict__") else ():
        if hasattr(part, "get_text_config"):  # a config in a config
            found |= stand_ins(part)
    return found


def is_text(ids: Iterable[int], config: Any) -> bool:
    """Whether no token is a placeholder."""
    return stand_ins(config).isdisjoint(ids)


def shows_nothing(shown: Mapping[str, Any], config: Any) -> bool:
    """Whether the only input is ``mm_token_type_ids`` and all of it is 0, so that the prompt is text."""
    return shown.keys() == {"mm_token_type_ids"} and bool(stand_ins(config)) and not bool(shown["mm_token_type_ids"].any())


def check_types(types: Mapping[str, Any], ids: Any, config: Any) -> None:
    """Raises InvalidArgument for token types that are not nonzero at exactly the placeholders in ``ids`` [1, n]."""
    import torch

    shown = torch.isin(ids.cpu(), torch.tensor(sorted(stand_ins(config)), dtype=ids.dtype))
    for name, value in types.items():
        if tuple(value.shape) != tuple(ids.shape) or not torch.equal(value.cpu() != 0, shown):
            raise InvalidArgument(
                f"{name} is not that of the prompt's {ids.shape[1]} tokens, some of which stand for what is shown; "
                "keys and values would depend on it: leave it out, or call model.generate"
            )
