"""Captions as tokens of CLIP."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedModel


def tokenized(
    tokenizer: CLIPTokenizer, encoder: PreTrainedModel, captions: Sequence[str]
) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, L) of B captions, cut or padded, on the encoder's device; their mask where its config asks."""
    tokens = tokenizer(
        list(captions), padding="max_length", max_length=int(tokenizer.model_max_length), truncation=True,
        return_tensors="pt",
    )  # fmt: skip
    device: torch.device = encoder.device
    masked = getattr(encoder.config, "use_attention_mask", False)
    return tokens.input_ids.to(device), tokens.attention_mask.to(device) if masked else None


def unread(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[str]:
    """The end of each caption for which there is no room, in its own words; "" where all of it is read."""
    last = int(tokenizer.model_max_length) - 1  # where the end's own token stands
    found = []
    for caption in captions:
        places = tokenizer(caption, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        found.append(caption[places[last][0] :] if len(places) > last + 1 else "")
    return found


def lengths(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> list[int]:
    """Tokens of each caption, start and end included."""
    return [
        len(tokens)
        for start in range(0, len(captions), 1024)
        for tokens in tokenizer(list(captions[start : start + 1024]), verbose=False)["input_ids"]
    ]
