"""Stable Diffusion 1.x and 2.x, text to image: one CLIP text encoder, latents of a scaled KL autoencoder.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv 2112.10752.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, get_args

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from decant.errors import refuse
from decant.maths.prediction import Prediction
from decant.maths.schedules import Schedule, variance_preserving
from decant.models.digest import module_digest, tokenizer_digest
from decant.models.taps import first_tensor


@dataclass(frozen=True, eq=False)
class SD1:
    """The adapter of the sd1 family; made by `SD1.of`. Holds no UNet: `denoise` is given one."""

    prediction: Prediction
    schedule: Schedule
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    vae: AutoencoderKL

    @classmethod
    def of(cls, pipeline: StableDiffusionPipeline) -> Self:
        """Read everything from a pipeline; its scheduler's config says the prediction type and the noise
        schedule.

        Raises:
            UserError: when the scheduler is of another kind, such as flow matching.
        """
        config = pipeline.scheduler.config
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in get_args(Prediction) or "beta_schedule" not in config:
            raise refuse(
                "scheduler",
                f"{type(pipeline.scheduler).__name__}, prediction {prediction!r}",
                allowed="a scheduler with betas, and prediction epsilon, v_prediction or sample",
                hint="the sd1 family has DDPM's noise schedule; flow matching belongs to other families",
            )
        # Every sampler's config holds the betas' recipe under the same keys; diffusers itself computes them.
        noise = DDPMScheduler.from_config(config)
        schedule = variance_preserving(noise.alphas_cumprod)
        return cls(prediction, schedule, pipeline.tokenizer, pipeline.text_encoder, pipeline.vae)

    @property
    def tokens(self) -> int:
        """Tokens a caption is cut or padded to: 77 for the published models."""
        return int(self.tokenizer.model_max_length)

    @torch.no_grad()
    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """The text encoder's last hidden state (B, 77, D) of B captions, cut or padded to 77 tokens."""
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.tokens,
            truncation=True,
            return_tensors="pt",
        )
        device = self.text_encoder.device
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(device) if masked else None
        hidden = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
        return {"encoder_hidden_states": hidden}

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, start and end included; `condition` reads the first `tokens` of them."""
        return [
            len(tokens)
            for start in range(0, len(captions), 1024)
            for tokens in self.tokenizer(list(captions[start : start + 1024]), verbose=False)["input_ids"]
        ]

    def null(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The empty prompt, once for each of the condition's B samples: (B, 77, D)."""
        given = condition["encoder_hidden_states"]
        empty = self.condition([""])["encoder_hidden_states"].to(given)
        return {"encoder_hidden_states": empty.expand_as(given).contiguous()}

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and standard deviation (B, 4, H/8, W/8) of the scaled latents."""
        posterior = self.vae.encode(pictures.to(self.vae.device, self.vae.dtype)).latent_dist
        scale = self.vae.config["scaling_factor"]
        shift = self.vae.config.get("shift_factor") or 0.0
        return (posterior.mean - shift) * scale, posterior.std * scale

    def made_by(self) -> dict[str, str]:
        """Digests of all that latents, and conditions, depend on: weights, configs, vocabulary."""
        return {
            "pictures": module_digest(self.vae),
            "captions": f"{module_digest(self.text_encoder)} {tokenizer_digest(self.tokenizer)}",
        }

    def corrupt(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t noise, (B, 4, h, w), at timesteps t (B,). Ho et al. 2020, eq. 4."""
        alpha, sigma = self.schedule.at(t, x_0.ndim)
        return alpha.to(x_0) * x_0 + sigma.to(x_0) * noise

    def denoise(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Any:
        """One forward of a UNet: its raw output (B, 4, h, w), or (output, features) when it is tapped."""
        output = net(x_t, t, encoder_hidden_states=condition["encoder_hidden_states"])
        # A tapped network may be wrapped or compiled by now, so what it gives tells, not its class.
        tapped = isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], dict)
        return output if tapped else first_tensor(output)
