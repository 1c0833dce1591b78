"""SDXL, text to image: two CLIP text encoders, a pooled text embedding, and the sizes and crop of the picture.

Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis", arXiv 2307.01952.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from decant.data.picture import Frame
from decant.maths.prediction import Prediction
from decant.maths.schedules import Schedule
from decant.models.digest import module_digest, tokenizer_digest
from decant.models.families import clip, latents, unet
from decant.models.families.family import Name
from decant.models.families.latents import VAE
from decant.models.families.noise import noise_of


@dataclass(frozen=True, eq=False)
class SDXL:
    """The adapter of the sdxl family; made by `SDXL.of`. Holds no UNet: `denoise` is given one.

    zeros: the unconditional twin of a caption is zeros (SDXL base says so), else the empty prompt.
    """

    prediction: Prediction
    schedule: Schedule
    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]
    vae: VAE
    zeros: bool = True
    name: Name = "sdxl"

    @classmethod
    def of(cls, pipeline: StableDiffusionXLPipeline) -> Self:
        """Read everything from a pipeline; its scheduler says the prediction type and the noise schedule.

        Raises:
            UserError: when the scheduler is of another kind, such as EDM's.
        """
        return cls(
            *noise_of(pipeline.scheduler),
            (pipeline.tokenizer, pipeline.tokenizer_2),
            (pipeline.text_encoder, pipeline.text_encoder_2),
            pipeline.vae,
            bool(pipeline.config["force_zeros_for_empty_prompt"]),
        )

    @property
    def tokens(self) -> int:
        """Tokens a caption is cut or padded to: 77 for the published models."""
        return int(self.tokenizers[0].model_max_length)

    @torch.no_grad()
    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Of B captions, both encoders' hidden states before the last layer joined (B, 77, D1 + D2), and the second's
        pooled and projected text (B, P).
        """
        first, second = (
            encoder(clip.tokenized(tokenizer, encoder, captions)[0], output_hidden_states=True)
            for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True)
        )
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return {"encoder_hidden_states": states, "text_embeds": second.text_embeds}

    def framing(self, frames: Sequence[Frame]) -> dict[str, Tensor]:
        """Original height and width, crop top and left, target height and width: (B, 6). Section 2.2 of the paper."""
        sizes = [[*frame.original, *frame.corner, *frame.target] for frame in frames]
        return {"time_ids": torch.tensor(sizes, dtype=torch.float32)}

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, start and end included; `condition` reads the first `tokens` of them."""
        return clip.lengths(self.tokenizers[0], captions)

    def unread(self, captions: Sequence[str]) -> list[str]:
        """The end of each caption that `condition` leaves out, in its own words; "" where it reads all."""
        return clip.unread(self.tokenizers[0], captions)

    def null(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Zeros or the empty prompt, as the pipeline has it, once for each of the condition's B samples."""
        texts = {key: value for key, value in condition.items() if key != "time_ids"}
        if self.zeros:
            return {**condition, **{key: torch.zeros_like(value) for key, value in texts.items()}}
        empty = self.condition([""])
        return {
            **condition,
            **{key: empty[key].to(value).expand_as(value).contiguous() for key, value in texts.items()},
        }

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and standard deviation (B, 4, H/8, W/8) of the scaled latents."""
        return latents.moments(self.vae, pictures)

    def encoders(self) -> dict[str, tuple[nn.Module, ...]]:
        """The networks that `encode`, and `condition` and `null`, run."""
        return {"pictures": (self.vae,), "captions": self.text_encoders}

    def made_by(self) -> dict[str, str]:
        """Digests of all that latents and framing, and conditions, depend on: weights, configs, vocabularies."""
        texts = [module_digest(encoder) for encoder in self.text_encoders]
        words = [tokenizer_digest(tokenizer) for tokenizer in self.tokenizers]
        return {
            "pictures": f"{module_digest(self.vae)} time_ids",
            "captions": " ".join([*texts, *words, "zeros" if self.zeros else "empty"]),
        }

    def corrupt(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t noise, (B, 4, h, w), at timesteps t (B,)."""
        return latents.noisy(self.schedule, x_0, noise, t)

    def denoise(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Any:
        """One forward of a UNet told text and sizes: its raw output (B, 4, h, w), or (output, features)."""
        return unet.forward(net, x_t, t, condition)
