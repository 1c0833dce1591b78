"""Stable Diffusion 1.x and 2.x, text to image: one CLIP text encoder, latents of a scaled KL autoencoder.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from decant.data.picture import Frame
from decant.maths.prediction import Prediction
from decant.maths.schedules import Schedule
from decant.models.digest import module_digest, tokenizer_digest
from decant.models.families import clip, latents, unet
from decant.models.families.family import Name
from decant.models.families.latents import VAE
from decant.models.families.noise import noise_of


@dataclass(frozen=True, eq=False)
class SD1:
    """The adapter of the sd1 and sd2 families; made by `SD1.of`. Holds no UNet: `denoise` is given one."""

    prediction: Prediction
    schedule: Schedule
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: VAE
    name: Name = "sd1"

    @classmethod
    def of(cls, pipeline: StableDiffusionPipeline) -> Self:
        """Read everything from a pipeline; its scheduler says the prediction type and the noise schedule.

        Raises:
            UserError: when the scheduler is of another kind, such as flow matching.
        """
        parts = (pipeline.tokenizer, pipeline.text_encoder, pipeline.vae)
        return cls(*noise_of(pipeline.scheduler), *parts, name=sd_name(pipeline.unet.config))

    @property
    def tokens(self) -> int:
        """Tokens a caption is cut or padded to: 77 for the published models."""
        return int(self.tokenizer.model_max_length)

    @torch.no_grad()
    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The text encoder's last hidden state (B, 77, D) of B captions, cut or padded to 77 tokens."""
        tokens, mask = clip.tokenized(self.tokenizer, self.text_encoder, captions)
        return {"encoder_hidden_states": self.text_encoder(tokens, attention_mask=mask)[0]}

    def framing(self, frames: Sequence[Frame]) -> dict[str, Tensor]:
        """Nothing: this kind is not told how its pictures were framed."""
        return {}

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, start and end included; `condition` reads the first `tokens` of them."""
        return clip.lengths(self.tokenizer, captions)

    def unread(self, captions: Sequence[str]) -> list[str]:
        """The end of each caption that `condition` leaves out, in its own words; "" where it reads all."""
        return clip.unread(self.tokenizer, captions)

    def null(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The empty prompt, once for each of the condition's B samples: (B, 77, D)."""
        given = condition["encoder_hidden_states"]
        empty = self.condition([""])["encoder_hidden_states"].to(given)
        return {"encoder_hidden_states": empty.expand_as(given).contiguous()}

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and standard deviation (B, 4, H/8, W/8) of the scaled latents."""
        return latents.moments(self.vae, pictures)

    def encoders(self) -> dict[str, tuple[nn.Module, ...]]:
        """The networks that `encode`, and `condition` and `null`, run."""
        return {"pictures": (self.vae,), "captions": (self.text_encoder,)}

    def made_by(self) -> dict[str, str]:
        """Digests of all that latents, and conditions, depend on: weights, configs, vocabulary."""
        return {
            "pictures": module_digest(self.vae),
            "captions": f"{module_digest(self.text_encoder)} {tokenizer_digest(self.tokenizer)}",
        }

    def corrupt(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t noise, (B, 4, h, w), at timesteps t (B,)."""
        return latents.noisy(self.schedule, x_0, noise, t)

    def denoise(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Any:
        """One forward of a UNet: its raw output (B, 4, h, w), or (output, features) when it is tapped."""
        return unet.forward(net, x_t, t, condition)


def sd_name(unet_config: Mapping[str, Any]) -> Name:
    """Stable Diffusion 2.x projects into its attention by matrices, 1.x by convolutions; so do students."""
    return "sd2" if unet_config["use_linear_projection"] else "sd1"
