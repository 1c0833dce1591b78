"""Pictures as scaled latents of an autoencoder and back, and latents with noise."""

from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor

from decant.errors import refuse
from decant.maths.schedules import Schedule

VAE = AutoencoderKL | AutoencoderTiny


def moments(vae: VAE, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) in [-1, 1] -> mean and standard deviation (B, 4, H/8, W/8) of the scaled latents.

    A small autoencoder knows no distribution: its standard deviation is 0.

    Raises:
        UserError: a small autoencoder without an encoder.
    """
    known: Any = vae
    pictures = pictures.to(known.device, known.dtype)
    if isinstance(vae, AutoencoderTiny):
        _check_encoder(vae)
        mean = known.encode(pictures).latents * _scale(vae)
        return mean, mean.new_zeros(mean.shape)
    posterior = known.encode(pictures).latent_dist
    return (posterior.mean - _shift(vae)) * _scale(vae), posterior.std * _scale(vae)


def decoded(vae: VAE, latents: Tensor) -> Tensor:
    """Scaled latents (B, 4, h, w), as a UNet gives them -> pictures (B, 3, 8 h, 8 w), about -1 to 1."""
    known: Any = vae
    picture: Tensor = known.decode(latents.to(known.device, known.dtype) / _scale(vae) + _shift(vae)).sample
    return picture


def has_encoder(vae: VAE) -> bool:
    """False for a small autoencoder whose encoder is all zeros: one that was made to decode alone."""
    return not isinstance(vae, AutoencoderTiny) or any(bool(weight.any()) for weight in vae.encoder.parameters())


def noisy(schedule: Schedule, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t noise, (B, 4, h, w), at timesteps t (B,). Ho et al. 2020, eq. 4."""
    alpha, sigma = schedule.at(t, x_0.ndim)
    return alpha.to(x_0) * x_0 + sigma.to(x_0) * noise


def _check_encoder(vae: AutoencoderTiny) -> None:
    if not has_encoder(vae):
        hint = "encode with its teacher; or make it with an encoder, decant decoder ... --set encoder=1"
        raise refuse("vae", "a small decoder without an encoder", allowed="an autoencoder that can encode", hint=hint)


def _scale(vae: VAE) -> float:
    return float(vae.config["scaling_factor"])


def _shift(vae: VAE) -> float:
    return float(vae.config.get("shift_factor") or 0.0)
