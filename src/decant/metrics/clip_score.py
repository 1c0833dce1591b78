"""How well a picture fits its caption: CLIPScore, 100 x max(0, cosine) (Hessel et al. 2021); nothing is fetched."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPModel, CLIPProcessor

from decant.errors import refuse

NAME = "CLIPScore (ViT-L/14)"
MODEL = "openai/clip-vit-large-patch14"


@dataclass(frozen=True)
class Clip:
    """The network and what makes its inputs."""

    model: CLIPModel
    processor: Any


def clip() -> Clip:
    """The network, in evaluation mode on the CPU, where the hub's cache holds it.

    Raises:
        UserError: it does not; the hint says how to get it.
    """
    try:
        model = CLIPModel.from_pretrained(MODEL, local_files_only=True, use_safetensors=True)
        return Clip(model.eval(), CLIPProcessor.from_pretrained(MODEL, local_files_only=True))
    except (OSError, ValueError) as error:
        allowed = "its weights as safetensors in the hub's cache"
        raise refuse(NAME, f"no {MODEL}", allowed=allowed, hint=f"hf download {MODEL}") from error


@torch.no_grad()
def clip_scores(
    clip: Clip, pictures: Sequence[NDArray[np.uint8]], captions: Sequence[str], chunk: int = 16
) -> list[float]:
    """The score of each picture, (H, W, 3), with its caption; a caption is cut at the text encoder's length."""
    found: list[float] = []
    for start in range(0, len(pictures), chunk):
        some = slice(start, start + chunk)
        inputs = clip.processor(
            text=list(captions[some]), images=list(pictures[some]), return_tensors="pt", padding=True, truncation=True
        )
        seen = clip.model(**inputs)
        image, text = (torch.nn.functional.normalize(each, dim=-1) for each in (seen.image_embeds, seen.text_embeds))
        found += (100 * (image * text).sum(-1).clamp(min=0)).tolist()
    return found
