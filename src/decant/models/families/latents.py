"""Pictures as scaled latents of a KL autoencoder, and latents with noise."""

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from decant.maths.schedules import Schedule


def moments(vae: AutoencoderKL, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) in [-1, 1] -> mean and standard deviation (B, 4, H/8, W/8) of the scaled latents."""
    posterior = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist
    scale = vae.config["scaling_factor"]
    shift = vae.config.get("shift_factor") or 0.0
    return (posterior.mean - shift) * scale, posterior.std * scale


def noisy(schedule: Schedule, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t x_0 + sigma_t noise, (B, 4, h, w), at timesteps t (B,). Ho et al. 2020, eq. 4."""
    alpha, sigma = schedule.at(t, x_0.ndim)
    return alpha.to(x_0) * x_0 + sigma.to(x_0) * noise
