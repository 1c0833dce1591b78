"""Distil a pipeline's autoencoder into a small one, so that decoding costs little beside a few steps of a UNet."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from pydantic import Field, model_validator
from torch import Tensor, nn

from decant.bench.timer import peak_memory_mb, time_rounds
from decant.data.captioned import Captioned, split
from decant.data.picture import View
from decant.errors import UnfitError, refuse
from decant.methods.decoder import LATENT, PICTURE, TAUGHT, Decoder, Distance, Weights, in_range
from decant.metrics.interval import bootstrap_mean
from decant.metrics.lpips import lpips
from decant.models.cost import latent_of, parameters
from decant.models.device import pick
from decant.models.families.latents import VAE, decoded
from decant.models.families.of import family_of
from decant.models.generate import pixels
from decant.models.layout import Pipeline, rebuilt
from decant.models.load import cast, load, save, stored_dtype
from decant.models.samplers import Drawing
from decant.models.small_vae import Halves, check_teacher, decode_macs, encode_macs, new_small_vae, small_config
from decant.stages.decodings import Decoding, Decodings
from decant.stages.record import carried, data_of, drawing_of, drawn_alike, figures_of
from decant.stages.samples import Sampling
from decant.stages.scan import scan_data
from decant.stages.scoring import number
from decant.stages.stage import Inputs, Stage
from decant.stages.training import check_ranks, plain_run, train
from decant.stages.training_settings import Updates
from decant.train.optimizers import LRSchedule

_PROOF_AT_ONCE = 8  # pictures decoded together for the proof
_BETAS = (0.9, 0.99)  # no noise levels here whose gradients differ a thousandfold: a shorter memory will do
_PEAK = 2.0  # what pictures go from -1 to 1 over
Weight = Annotated[float, Field(ge=0)]


class SmallDecoder(Updates):
    """A small autoencoder, diffusers' AutoencoderTiny, that learns from the teacher's. Defaults are TAESD's shape."""

    width: int | None = Field(
        None, ge=1, description="channels at every level; null: as the teacher's narrowest, 64 at most"
    )
    blocks: tuple[Annotated[int, Field(ge=0, le=16)], ...] | None = Field(
        None, description="blocks of each level of the decoder, from latents to pixels; null: 3 each, 1 at the pixels"
    )
    steps: int = Field(1500, ge=1, description="updates")
    learning_rate: float = Field(3e-3, gt=0, description="of AdamW, at its highest")
    schedule: LRSchedule = Field("one_cycle", description="how the learning rate goes over the steps")
    warmup: int = Field(50, ge=0, description="steps in which it grows; at most the half of them")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    channels_last: bool = Field(True, description="channels innermost in memory: faster convolutions")
    picture: Weight = Field(1.0, description="weight of the error to the picture that a latent was encoded from")
    taught: Weight = Field(1.0, description="weight of the error to the teacher's picture of the latent")
    edges: Weight = Field(0.0, description="weight of the error of edges to those of the teacher's picture")
    perceptual: Weight = Field(0.0, description="weight of LPIPS to the teacher's picture; needs AlexNet's weights")
    encoder: Weight = Field(
        1.0, description="weight of the encoder's error to the teacher's latents; 0: it decodes alone, half the work"
    )
    distance: Distance = Field("mixed", description="of two pictures; mixed: squared, and 0.3 of the absolute")
    samples: int = Field(
        0, ge=0, description="captions of the data for which the teacher draws latents, to learn from as well"
    )
    sample_steps: int | None = Field(
        None, ge=1, description="sampler steps of these; null: as the teacher's record says, else 25"
    )
    sample_guidance_scale: float | None = Field(
        None, ge=0, description="guidance of these; null: as the teacher's record says, else 7.5"
    )
    latency_repeats: int = Field(5, ge=0, description="timed decodings of each decoder in the end; 0: no timing")

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if not (self.picture or self.taught):
            raise UnfitError("taught", "0, and picture too", allowed="one of them above 0", hint="set taught=1")
        return self


@dataclass(frozen=True)
class _Players:
    """The teacher's pipeline, the one that gets the small autoencoder, and that."""

    teacher: Pipeline
    source: Pipeline
    vae: AutoencoderTiny

    @property
    def student(self) -> Pipeline:
        return rebuilt(self.source, vae=self.vae)


def run(settings: SmallDecoder, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Teach a small autoencoder what that of ``inputs.teacher`` does, and put it into the pipeline ``inputs.source``.

    Goes on from the newest checkpoint in ``inputs.work``. The errors on held-out pictures are measured in the end.
    """
    ranks = inputs.ranks
    ranks.join()
    check_ranks(settings, ranks)
    perceptual = lpips() if settings.perceptual else None
    players = _open(settings, inputs)
    captioned = ranks.on_first(lambda: scan_data(inputs, settings.max_skipped, out))
    if captioned.alone:
        value, hint = f"{captioned.place} holds prompts alone", "name a folder of pictures"
        raise refuse("data", value, allowed="pictures", hint=hint)
    learned, held = _decode(settings, inputs, players, *split(captioned, settings.held_out, inputs.seed))
    weights = Weights(settings.picture, settings.taught, settings.edges, settings.perceptual, settings.encoder)
    method = Decoder.of(Halves(players.vae), weights, settings.distance, perceptual, settings.ema)
    run = replace(plain_run(settings, inputs.seed), betas=_BETAS, warmup=min(settings.warmup, settings.steps // 2))
    curve = train(method, learned, settings, run, inputs)
    stored = stored_dtype(inputs.source)
    nn.Module.to(players.vae, dtype=stored).float()  # so that what is measured is what is stored
    device = pick(settings.device)
    if not ranks.first:
        return {}
    errors = _errors(players, held, device)
    inputs.talk(_told(errors))
    found = {name: _figures(vae, players, device) for name, vae in _both(players).items()}
    times = _times(players, settings, device)
    save(cast(players.student, stored), out)
    family = family_of(players.source)
    counts = {"used": learned.n_pictures, "held_out": held.n, "drawn": learned.n_drawn}
    return {
        "family": family.name,
        **carried(inputs.source),
        **drawn_alike(inputs.source),
        "data": data_of(inputs.data, captioned.skipped, [*learned.replaced, *held.replaced], **counts),
        "figures": figures_of(players.source.unet, family.tokens),
        "decoder": {name: {**figures, **times.get(name, {})} for name, figures in found.items()},
        "held_out": {"n": held.n, **errors},
        "training": curve.thinned(),
        "pace": {
            "images_per_second": round(curve.images_per_second, 2),
            "peak_memory_mb": round(peak_memory_mb().process_mb, 1),
        },
    }


def _open(settings: SmallDecoder, inputs: Inputs) -> _Players:
    """Teacher, source and an untrained small autoencoder.

    Raises:
        UserError: a teacher from which none can be made, or a source of other latents than the teacher's.
    """
    teacher = load(inputs.teacher)
    config = dict(check_teacher(teacher, f"teacher {inputs.teacher}").config)
    source = teacher if str(inputs.source) == inputs.teacher else load(inputs.source)
    _check_same(source, teacher, str(inputs.source))
    small = small_config(config, settings.width, settings.blocks)
    return _Players(teacher, source, new_small_vae(small, inputs.seed, encoder=settings.encoder > 0))


def _check_same(source: Pipeline, teacher: Pipeline, name: str) -> None:
    """Refuse a pipeline whose UNet draws other latents than the teacher's autoencoder decodes."""
    kinds: dict[str, tuple[Any, Any]] = {"pipeline": (type(source).__name__, type(teacher).__name__)}
    for key in ("latent_channels", "scaling_factor") if isinstance(source.vae, type(teacher.vae)) else ():
        kinds[f"vae {key}"] = source.vae.config[key], teacher.vae.config[key]
    kinds["in_channels"] = source.unet.config["in_channels"], teacher.unet.config["in_channels"]
    kinds["pixels of a latent"] = source.vae_scale_factor, teacher.vae_scale_factor
    for what, (own, theirs) in kinds.items():
        if own != theirs:
            hint = "a small decoder is for the latents that its teacher decodes: take the teacher of this model"
            raise refuse(f"model {name}: {what}", own, allowed=f"{theirs}, as the teacher's", hint=hint)


def _decode(
    settings: SmallDecoder, inputs: Inputs, players: _Players, train: Captioned, held: Captioned
) -> tuple[Decodings, Decodings]:
    """Both parts as latents and the teacher's pictures of them, which the cache keeps."""
    factor = players.teacher.vae_scale_factor
    size = settings.size or pixels(players.teacher, None)[0]
    if size % factor:
        raise refuse("decoder.size", size, allowed=f"a multiple of {factor}", hint="pixels of one latent")
    decoding = Decoding(players.teacher, size, _sampling(settings, inputs), pick(settings.device))
    several, plain = View.several(settings.aspect, settings.crops, flip=settings.flip), (View(settings.aspect),)

    def both() -> tuple[Decodings, Decodings]:
        seen = decoding.of(train, inputs, "training", several, settings.samples)
        return seen, decoding.of(held.first(settings.held_out_most), inputs, "held-out", plain)

    if inputs.ranks.count > 1:
        inputs.ranks.on_first(lambda: bool(both()))  # the others then read what it wrote
    return both()


def _sampling(settings: SmallDecoder, inputs: Inputs) -> Sampling:
    """How latents are drawn to learn from: as the settings say, and where they do not, as the teacher is drawn."""
    own = drawing_of(inputs.teacher) or Drawing()
    steps = own.steps if settings.sample_steps is None else settings.sample_steps
    scale = own.guidance_scale if settings.sample_guidance_scale is None else settings.sample_guidance_scale
    return Sampling("samples", steps, scale, inputs.seed, own.sampler)


@torch.no_grad()
def _errors(players: _Players, held: Decodings, device: torch.device) -> dict[str, Any]:
    """Peak signal-to-noise ratios in dB on held-out pictures, the mean with its interval: the teacher's decoding to the
    picture, the small decoder's to it, and the small decoder's to the teacher's.
    """
    nn.Module.to(players.vae, device)
    found: dict[str, list[float]] = {name: [] for name in ("teacher", "student", "student_to_teacher")}
    for start in range(0, held.n, _PROOF_AT_ONCE):
        beside = held.batch(tuple(range(start, min(start + _PROOF_AT_ONCE, held.n)))).to(device).beside
        picture, taught = in_range(beside[PICTURE]), in_range(beside[TAUGHT])
        drawn = decoded(players.vae, beside[LATENT]).clamp(-1, 1)
        pairs = {"teacher": (taught, picture), "student": (drawn, picture), "student_to_teacher": (drawn, taught)}
        for name, pair in pairs.items():
            found[name] += _psnr_db(*pair).tolist()
    better = {"unit": "dB", "better": "higher"}
    return {f"psnr_{name}": number(bootstrap_mean(values)) | better for name, values in found.items()}


def _psnr_db(a: Tensor, b: Tensor) -> Tensor:
    """(B,) of pictures (B, 3, H, W) from -1 to 1; 100 where they are equal."""
    error = (a - b).square().flatten(1).mean(1)
    return 10 * torch.log10(_PEAK**2 / error.clamp_min(_PEAK**2 * 1e-10))


def _told(errors: dict[str, Any]) -> str:
    teacher, student, between = (
        errors[f"psnr_{each}"]["value"] for each in ("teacher", "student", "student_to_teacher")
    )
    return (
        f"held-out pictures: {teacher:.1f} dB by the teacher's decoder, {student:.1f} dB by the small one, "
        f"{between:.1f} dB between them"
    )


def _both(players: _Players) -> dict[str, VAE]:
    return {"teacher": players.teacher.vae, "student": players.vae}


def _figures(vae: Any, players: _Players, device: torch.device) -> dict[str, Any]:
    """Parameters and multiply-accumulates of both halves, at the pipeline's own size and batch 1."""
    height, width = pixels(players.source, None)
    return {
        "class": type(vae).__name__,
        "parameters": parameters(vae.decoder) + parameters(getattr(vae, "post_quant_conv", None) or nn.Identity()),
        "macs": decode_macs(vae, latent_of(players.source.unet.config)),
        "encoder_parameters": parameters(vae.encoder) + parameters(getattr(vae, "quant_conv", None) or nn.Identity()),
        "encoder_macs": encode_macs(vae, (height, width)),
    }


def _times(players: _Players, settings: SmallDecoder, device: torch.device) -> dict[str, dict[str, Any]]:
    """Milliseconds of decoding one picture at the pipeline's own size, both in turns, with the conditions."""
    if not settings.latency_repeats:
        return {}
    latent = torch.randn(1, *latent_of(players.source.unet.config), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    vaes = {name: nn.Module.to(vae, device, torch.float32) for name, vae in _both(players).items()}
    with torch.no_grad():
        calls = {name: (lambda vae=vae: decoded(vae, latent)) for name, vae in vaes.items()}
        times = time_rounds(calls, warmup=1, repeats=settings.latency_repeats)
    conditions = {"device": str(device), "dtype": "float32", "threads": torch.get_num_threads(), "batch_size": 1}
    return {name: {"latency_ms": latency.to_json(), "measured": conditions} for name, latency in times.items()}


STAGE = Stage(settings=SmallDecoder, run=run, data="required", ranks="all")
