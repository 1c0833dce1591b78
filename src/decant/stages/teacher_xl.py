"""Train the second scenes teacher, of SDXL's layout: it learns from the first one's outputs, in the same latents."""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from decant.models.layout import Pipeline
from decant.models.load import load
from decant.models.scenes_teacher import new_scheduler
from decant.models.scenes_teacher_xl import POOLED, assemble, new_text_encoders, new_unet
from decant.scenes.classes import classes
from decant.scenes.render import SIDE
from decant.scenes.world import draw_scene
from decant.stages.teacher_parts import (
    Part,
    Reader,
    Talk,
    Training,
    encoded,
    stratified_timesteps,
    tokens_of,
    training_pictures,
    written,
)


class TextToNoiseXL(nn.Module):
    """Both text encoders and the UNet: tokens (B, L), said (B,), x_t (B, 4, 8, 8), t (B,) -> epsilon, states, pooled.

    Where nothing is ``said``, states and pooled text are zeros, as SDXL's unconditional ones.
    """

    def __init__(self, first: CLIPTextModel, second: CLIPTextModelWithProjection, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.first, self.second, self.unet = first, second, unet

    def forward(self, tokens: Tensor, said: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        second = self.second(tokens, output_hidden_states=True)
        states = [self.first(tokens, output_hidden_states=True).hidden_states[-2], second.hidden_states[-2]]
        words = torch.cat(states, dim=-1) * said.view(-1, 1, 1)
        pooled = second.text_embeds * said.view(-1, 1)
        sizes = torch.tensor([SIDE, SIDE, 0, 0, SIDE, SIDE], dtype=x_t.dtype).expand(len(x_t), -1)
        added = {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(x_t, t, encoder_hidden_states=words, added_cond_kwargs=added).sample, words, pooled


def train_xl(part: Part, seed: int, start: Path | None, out: Path, talk: Talk) -> None:
    """One part of the second teacher; writes a whole ``StableDiffusionXLPipeline`` folder.

    The loss is the error to the first teacher's epsilon, with min-SNR-gamma 5 weights (Hang et al. 2023): what it says
    is the mean of what the noise alone would teach.
    """
    torch.manual_seed(seed)
    elder = load("scenes")
    net = _net(elder, start)
    shown = [draw_scene(index, "train") for index in range(part.pictures)]
    mean, std = encoded(elder.vae, training_pictures(part.pictures))
    asked = torch.tensor([classes(scene) for scene in shown])
    readers = nn.ModuleList([Reader(net.unet.config["cross_attention_dim"]), Reader(POOLED)])
    parameters = [*net.parameters(), *readers.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=part.learning_rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    alphas_cumprod = new_scheduler().alphas_cumprod
    if part.compile:
        for network in (net, elder.unet):
            network.compile(dynamic=False)

    def losses(generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        chosen = torch.randint(0, len(shown), (part.batch_size,), generator=generator)
        tokens = tokens_of([shown[index] for index in chosen.tolist()], elder.tokenizer, 0.1, generator)
        said = tokens[:, 1] != tokens[:, 2]
        x_0 = mean[chosen] + std[chosen] * torch.randn(mean[chosen].shape, generator=generator)
        t = stratified_timesteps(len(x_0), len(alphas_cumprod), generator)
        kept = alphas_cumprod[t].view(-1, 1, 1, 1)
        x_t = kept.sqrt() * x_0 + (1 - kept).sqrt() * torch.randn(x_0.shape, generator=generator)
        with torch.no_grad():
            taught = elder.unet(x_t, t, elder.text_encoder(tokens).last_hidden_state).sample
        epsilon, words, pooled = net(tokens, said.float(), x_t, t)
        snr = (kept / (1 - kept)).flatten()
        error = (epsilon - taught).square().mean(dim=(1, 2, 3))
        loss = (snr.clamp(max=5) / snr * error).mean()
        read = readers[0](words[said], asked[chosen[said]])
        # Of the pooled text the head reads one vector, as if it were the last position of a caption.
        read = read + readers[1](pooled[said].unsqueeze(1), asked[chosen[said]], positions=1)
        return loss + part.read_weight * read, {"loss": loss, "read": read}

    def assembled(own: Any) -> Pipeline:
        return assemble(own.unet, elder.vae, (own.first, own.second), elder.tokenizer)

    training = Training(net, optimiser, 0.999, losses, tuple(readers.parameters()), fast=True)
    written(part, training, seed, out, talk, assembled)


def _net(elder: Pipeline, start: Path | None) -> TextToNoiseXL:
    if start is None:
        return TextToNoiseXL(*new_text_encoders(elder.tokenizer), new_unet())
    begun: Any = load(start)
    return TextToNoiseXL(begun.text_encoder, begun.text_encoder_2, begun.unet)
