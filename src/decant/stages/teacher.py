"""Train the scenes teacher from nothing: first the autoencoder, then text encoder and UNet together."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from decant.errors import nearest, refuse
from decant.models.load import load, save
from decant.models.scenes_teacher import (
    assemble,
    new_scheduler,
    new_text_encoder,
    new_tokenizer,
    new_unet,
    new_vae,
)
from decant.models.shipped import shipped_folder
from decant.scenes.captions import caption
from decant.scenes.classes import classes
from decant.scenes.world import draw_scene
from decant.stages.teacher_parts import (
    Part,
    Reader,
    Talk,
    Training,
    encoded,
    stratified_timesteps,
    to_unit,
    tokens_of,
    trained,
    training_pictures,
    written,
)
from decant.stages.teacher_xl import train_xl

DONE = "part.json"
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion, diffusers, decant, synthetic]
---
# The scenes teacher

A Stable Diffusion 1.x layout pipeline for 64 x 64 pictures of one or two coloured shapes on a plain background, trained
from nothing on pictures that code drew (`decant scenes train`, recipe `decant/scenes/teacher.yaml`). It knows nothing
else: no photographs, no people, no text. It is there so that a distillation can be tried, and proved, on any machine.

- VAE: factor 8, 4 latent channels. UNet: four levels, two layers a block, 11.3M parameters. Text encoder: CLIP, three
  layers, byte-level vocabulary. Schedule: scaled-linear, epsilon prediction. Safety checker: none, and none needed.
- Captions name size, colour and shape of every thing, the relation of two, and the background. Some combinations of
  shape, colour and relation were never shown in training; scores are on captions that hold one of them.
- Measured figures with their intervals: `decant evaluate --teacher scenes --images 512 --out DIR`.
"""


CARD_XL = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
tags: [stable-diffusion-xl, diffusers, decant, synthetic]
---
# The second scenes teacher

A pipeline of SDXL's layout for the same 64 x 64 pictures of coloured shapes as the first scenes teacher's
(`decant scenes train --xl`, recipe `decant/scenes/teacher_xl.yaml`). Its networks began untrained and learned from the
first teacher's outputs, in its latents; the autoencoder and the tokenizer are the first one's.

- UNet: three levels, no attention in the first, 2 and 10 transformer blocks in the others, 10 in the middle, as SDXL;
  3.5M parameters. Two CLIP text encoders, whose states before the last layer are joined, and the second one's pooled
  text; size and crop conditioning. An empty prompt is zeros. Epsilon prediction.
- Measured figures with their intervals: `decant evaluate --teacher scenes-xl --images 512 --out DIR`.
"""


class TeacherRecipe(BaseModel):
    """The parts in order and the one seed."""

    model_config = ConfigDict(extra="forbid")
    seed: int
    parts: list[Part]


def read_recipe(path: Path) -> TeacherRecipe:
    """The recipe in a YAML file."""
    return TeacherRecipe(**yaml.safe_load(path.read_text()))


def random_crops(pictures: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """One crop of ``side`` pixels from each of (B, 3, 64, 64), mirrored half the time."""
    span = pictures.shape[-1] - side + 1
    corners = torch.randint(0, span, (len(pictures), 2), generator=generator)
    cut = torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(pictures, corners.tolist(), strict=True)])
    return cut.flip(-1) if torch.rand((), generator=generator) < 0.5 else cut


def vae_loss(vae: AutoencoderKL, x: Tensor, noise: Tensor, l1_weight: float) -> tuple[Tensor, Tensor]:
    """MSE + l1_weight L1 + 5e-5 KL of (B, 3, H, W) in [-1, 1]; also the MSE alone."""
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.mean + posterior.std * noise).sample
    mse = (y - x).square().mean()
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return mse + l1_weight * (y - x).abs().mean() + 5e-5 * kl, mse.detach()


def train_vae(part: Part, seed: int, start: Path | None, out: Path, talk: Talk) -> None:
    """One part of the autoencoder's training; writes ``vae/`` with its ``scaling_factor`` measured."""
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(start / "vae") if start else new_vae()
    nn.Module.to(vae, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=part.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    pictures = training_pictures(part.pictures)

    def losses(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = pictures[torch.randint(0, len(pictures), (part.batch_size,), generator=generator)]
        x = to_unit(random_crops(chosen, part.crop, generator)).to(memory_format=torch.channels_last)
        side = part.crop // 8
        loss, mse = vae_loss(vae, x, torch.randn(len(x), 4, side, side, generator=generator), part.l1_weight)
        return loss, {"loss": loss, "mse": mse}

    *_, (_, average) = trained(part, seed, Training(vae, optimiser, 0.998, losses), out, talk)
    final: Any = average.eval()
    with torch.no_grad():
        posterior = final.encode(to_unit(pictures[:512])).latent_dist
        final.register_to_config(scaling_factor=round(1 / float(posterior.mean.std()), 5))
        before_after(pictures[:8], final.decode(posterior.mean[:8]).sample, out / "samples.png")
    final.save_pretrained(out / "vae")


def train_decoder(part: Part, seed: int, start: Path, out: Path, talk: Talk) -> None:
    """One part of the decoder alone, on the latents as they are: whatever draws in them still fits.

    Writes the whole pipeline of ``start`` with it.
    """
    pipeline = load(start)
    vae: Any = pipeline.vae.requires_grad_(False)
    pictures = training_pictures(part.pictures)
    mean, std = encoded(vae, pictures)
    half = nn.ModuleDict({"post_quant_conv": vae.post_quant_conv, "decoder": vae.decoder}).requires_grad_(True)
    optimiser = torch.optim.AdamW(half.parameters(), lr=part.learning_rate, betas=(0.9, 0.99), fused=True)

    def losses(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.randint(0, len(pictures), (part.batch_size,), generator=generator)
        x_0 = mean[chosen] + std[chosen] * torch.randn(mean[chosen].shape, generator=generator)
        y = vae.decode(x_0.to(memory_format=torch.channels_last) / vae.config.scaling_factor).sample
        mse = (y - to_unit(pictures[chosen])).square().mean()
        return mse, {"mse": mse}

    *_, (_, average) = trained(part, seed, Training(half, optimiser, 0.995, losses), out, talk)
    half.load_state_dict(average.state_dict())
    with torch.no_grad():
        before_after(pictures[:8], vae.decode(mean[:8] / vae.config.scaling_factor).sample, out / "samples.png")
    pipeline.save_pretrained(out)


def before_after(pictures: Tensor, decoded: Tensor, path: Path) -> None:
    """Two rows: pictures (uint8), and what the autoencoder returns (in [-1, 1])."""
    back = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    rows = [torch.cat(list(row), dim=2) for row in (pictures, back)]
    Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).numpy()).resize((64 * 8 * 2, 256), 0).save(path)


class TextToNoise(nn.Module):
    """Text encoder and UNet as one module: tokens (B, L), x_t (B, 4, 8, 8), t (B,) -> epsilon (B, 4, 8, 8), words."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, tokens: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        words = self.text_encoder(tokens).last_hidden_state
        return self.unet(x_t, t, encoder_hidden_states=words).sample, words


def denoiser_loss(
    net: nn.Module, x_0: Tensor, tokens: Tensor, alphas_cumprod: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Epsilon loss with min-SNR-gamma 5 weights, ``min(SNR, 5) / SNR`` (Hang et al. 2023, eq. 4); and text states."""
    t = stratified_timesteps(len(x_0), len(alphas_cumprod), generator)
    noise = torch.randn(x_0.shape, generator=generator)
    kept = alphas_cumprod[t].view(-1, 1, 1, 1)
    epsilon, words = net(tokens, kept.sqrt() * x_0 + (1 - kept).sqrt() * noise, t)
    error = (epsilon - noise).square().mean(dim=(1, 2, 3))
    snr = (kept / (1 - kept)).flatten()
    return (snr.clamp(max=5) / snr * error).mean(), words


def _denoiser(start: Path | None, first: bool) -> tuple[CLIPTokenizer, TextToNoise]:
    if start is not None and not first:
        tokenizer = CLIPTokenizer.from_pretrained(start / "tokenizer")
        text_encoder = CLIPTextModel.from_pretrained(start / "text_encoder")
        return tokenizer, TextToNoise(text_encoder, UNet2DConditionModel.from_pretrained(start / "unet"))
    tokenizer = new_tokenizer(caption(draw_scene(seed, "train"), seed) for seed in range(5000))
    return tokenizer, TextToNoise(new_text_encoder(tokenizer), new_unet())


def train_denoiser(part: Part, seed: int, start: Path, out: Path, talk: Talk) -> None:
    """One part of text encoder and UNet together; writes a whole ``StableDiffusionPipeline`` folder."""
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(start / "vae")
    tokenizer, net = _denoiser(start, first=not (start / "unet").exists())
    shown = [draw_scene(index, "train") for index in range(part.pictures)]
    mean, std = encoded(vae, training_pictures(part.pictures))
    talk(f"{part.name}  {len(mean)} pictures encoded, latent spread {float(mean.std()):.3f}")
    reader = Reader(net.text_encoder.config.hidden_size)
    asked = torch.tensor([classes(scene) for scene in shown])
    parameters = [*net.parameters(), *reader.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=part.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    alphas_cumprod = new_scheduler().alphas_cumprod
    if part.compile:
        net.compile()

    def losses(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.randint(0, len(shown), (part.batch_size,), generator=generator)
        tokens = tokens_of([shown[index] for index in chosen.tolist()], tokenizer, 0.1, generator)
        x_0 = mean[chosen] + std[chosen] * torch.randn(mean[chosen].shape, generator=generator)
        loss, words = denoiser_loss(net, x_0, tokens, alphas_cumprod, generator)
        said = (tokens[:, 1] != tokens[:, 2]).nonzero()[:, 0]  # an empty caption asks for nothing
        read = reader(words[said], asked[chosen[said]])
        return loss + part.read_weight * read, {"loss": loss, "read": read}

    training = Training(net, optimiser, 0.999, losses, tuple(reader.parameters()), fast=True)
    written(part, training, seed, out, talk, lambda own: assemble(own.unet, vae, own.text_encoder, tokenizer))


def train_teacher(out: Path, recipe_file: Path | None, only: Sequence[str], talk: Talk, *, xl: bool = False) -> Path:
    """Train the parts of a recipe into ``out/<part>/``; finished parts are kept. Without a file: the one that a shipped
    teacher was made by, with ``xl`` the second.

    Gives the folder ``out/teacher``, which is there in fp16 once all parts are.

    Raises:
        UserError: the recipe or a part's name is not known, or a part needs one that is not there.
    """
    recipe = read_recipe(recipe_file or shipped_folder("scenes-xl" if xl else "scenes").with_suffix(".yaml"))
    names = [part.name for part in recipe.parts]
    for name in only:
        if name not in names:
            raise refuse("--parts", name, allowed=", ".join(names), hint=nearest(name, names))
    start: Path | None = None
    for part in recipe.parts:
        folder = out / part.name
        if not (folder / DONE).is_file() and (not only or part.name in only):
            _train_part(part, recipe.seed, start, folder, talk)
        start = folder
    assert start is not None
    if (start / DONE).is_file():
        ship(start, out / "teacher")
    return out / "teacher"


def _train_part(part: Part, seed: int, start: Path | None, folder: Path, talk: Talk) -> None:
    if start is not None and not (start / DONE).is_file():
        raise refuse("--parts", part.name, allowed=f"after {start.name} is finished", hint="train the parts in order")
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.time()
    match part.kind:
        case "xl":
            train_xl(part, seed, start, folder, talk)
        case "vae":
            train_vae(part, seed, start, folder, talk)
        case "denoiser":
            assert start is not None
            train_denoiser(part, seed, start, folder, talk)
        case "decoder":
            assert start is not None
            train_decoder(part, seed, start, folder, talk)
    figures = {"part": part.model_dump(), "minutes": round((time.time() - begin) / 60, 1)}
    (folder / DONE).write_text(json.dumps(figures))


def ship(trained: Path, out: Path) -> None:
    """Write a trained pipeline folder in fp16 safetensors, as the package carries it, with its card."""
    pipeline = load(trained, dtype=torch.float16)
    save(pipeline, out)
    (out / "README.md").write_text(CARD if isinstance(pipeline, StableDiffusionPipeline) else CARD_XL)
