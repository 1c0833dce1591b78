"""The only sampler call in decant: prompts and seeds in, pictures out, one seed per picture."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from numpy.typing import NDArray
from torch import Tensor

from decant.errors import refuse
from decant.models.layout import Pipeline, rebuilt
from decant.models.samplers import Sampler


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 25,
    guidance_scale: float = 7.5,
    sampler: Sampler = "ddim",
    batch_size: int = 16,
    size: int | tuple[int, int] | None = None,
) -> Iterator[NDArray[np.uint8]]:
    """Draw one picture for each prompt and seed, in order, a batch at a time as they are asked for.

    A picture depends on its own prompt and seed: its noise comes from a CPU generator of its own. Floats
    still differ in the last digits between batch sizes, which moves a value of a picture by 1/255 now and
    then. The pipeline's scheduler and progress bar are as before whenever a picture is handed over.

    Args:
        pipeline: on the device and in the dtype to draw with.
        prompts: N of them; the negative prompt is empty.
        seeds: N of them, each any integer of 64 bits.
        steps: network evaluations per picture, two halves each when guided.
        guidance_scale: classifier-free guidance; 1 and below runs without the unconditional half.
        sampler: `as-is` takes the scheduler that the pipeline came with.
        batch_size: pictures drawn together.
        size: pixels, one number or (height, width), multiples of 8; None for the network's own.

    Returns:
        an iterator of N pictures (H, W, 3), uint8; nothing is drawn before the first is asked for.

    Raises:
        UserError: at once, for no prompts, lengths that differ, or steps, batch or size out of range.
    """
    _check(prompts, seeds, batch_size)
    call = _call(pipeline, sampler, steps, guidance_scale, size)
    jobs = list(zip(prompts, seeds, strict=True))
    return _batches(pipeline, call, jobs, batch_size)


def generate_latents(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance_scale: float,
    sampler: Sampler = "ddim",
    size: int | None = None,
) -> Tensor:
    """What `generate` would decode, drawn in one batch: scaled latents (B, C, h, w), as a UNet is trained on."""
    _check(prompts, seeds, len(prompts))
    call = _call(pipeline, sampler, steps, guidance_scale, size)
    jobs = list(zip(prompts, seeds, strict=True))
    drawn: Tensor = _draw(pipeline, call, jobs, "latent")
    return drawn


@dataclass(frozen=True)
class _Call:
    """What is the same for every batch: the sampler, and the pipeline's own arguments."""

    scheduler: Any
    options: dict[str, Any]


def _call(
    pipeline: Pipeline, sampler: Sampler, steps: int, guidance_scale: float, size: int | tuple[int, int] | None
) -> _Call:
    height, width = pixels(pipeline, size)
    scheduler = _scheduler(pipeline, sampler)
    _check_steps(steps, scheduler)
    options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width}
    return _Call(scheduler, options)


def _batches(
    pipeline: Pipeline, call: _Call, jobs: list[tuple[str, int]], batch_size: int
) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(jobs), batch_size):
        pictures = _draw(pipeline, call, jobs[start : start + batch_size], "np")
        yield from np.asarray((pictures * 255).round(), dtype=np.uint8)


def _draw(pipeline: Pipeline, call: _Call, jobs: list[tuple[str, int]], output_type: Literal["np", "latent"]) -> Any:
    """One call of the pipeline: (B, H, W, 3) from 0 to 1, or latents (B, C, h, w)."""
    generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in jobs]
    latents = _latents(pipeline, generators, call.options["height"], call.options["width"])
    # A second pipeline around the same networks leaves the caller's own scheduler and settings untouched.
    painter: Any = copy.copy(pipeline)
    painter.scheduler = call.scheduler
    painter.set_progress_bar_config(disable=True)
    # Without a negative prompt every pipeline takes its own unconditional twin: the empty prompt, or SDXL's zeros.
    told: dict[str, Any] = {**call.options, "generator": generators, "latents": latents, "output_type": output_type}
    return painter([prompt for prompt, _ in jobs], **told).images


def sampled_by(pipeline: Pipeline, sampler: Sampler) -> Pipeline:
    """The same pipeline with another sampler of its own, which its folder then names."""
    return rebuilt(pipeline, scheduler=_scheduler(pipeline, sampler))


def _latents(pipeline: Pipeline, generators: list[torch.Generator], height: int, width: int) -> Tensor:
    """Starting noise (B, C, h, w), drawn in float32 on the CPU: the same for every device and dtype."""
    factor = pipeline.vae_scale_factor
    shape = (1, pipeline.unet.config.in_channels, height // factor, width // factor)
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    place = next(each for each in pipeline.unet.parameters() if each.is_floating_point())
    return noise.to(place.device, place.dtype)


def _scheduler(pipeline: Pipeline, sampler: Sampler) -> Any:
    """The sampler with the betas, the prediction type and the spacing of the pipeline's own scheduler.

    "-trailing" ones space their timesteps evenly and begin at pure noise, as few steps must: see
    `maths.timesteps.trailing`. LCM's own are those of a chain of 50.
    """
    config = pipeline.scheduler.config
    kind: Any = type(pipeline.scheduler)
    changes: dict[str, Any] = {}
    plain: dict[str, Any] = {"clip_sample": False, "set_alpha_to_one": False}
    trailing = {"timestep_spacing": "trailing"}
    match sampler:
        case "ddim":
            kind, changes = DDIMScheduler, plain
        case "ddim-trailing":
            kind, changes = DDIMScheduler, plain | trailing
        case "ddpm":
            kind, changes = DDPMScheduler, {"clip_sample": False}
        case "lcm":
            kind, changes = LCMScheduler, plain
        case "lcm-trailing":
            kind, changes = LCMScheduler, {**plain, "original_inference_steps": config["num_train_timesteps"]}
        case "euler":
            kind = EulerDiscreteScheduler
        case "euler-trailing":
            kind, changes = EulerDiscreteScheduler, trailing
        case "dpm++":
            kind, changes = DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}
        case "as-is":
            return copy.deepcopy(pipeline.scheduler)
        case _:
            assert_never(sampler)
    return kind.from_config(config, **changes)


def _check(prompts: Sequence[str], seeds: Sequence[int], batch_size: int) -> None:
    if not prompts or isinstance(prompts, str):
        raise refuse("prompts", repr(prompts), allowed="a list of at least one", hint="one picture is drawn for each")
    if len(prompts) != len(seeds):
        raise refuse(
            "seeds",
            f"{len(seeds)} seeds for {len(prompts)} prompts",
            allowed="one seed for each prompt",
            hint="repeat a prompt to draw it with several seeds",
        )
    if not all(-(2**63) <= seed < 2**64 for seed in seeds):
        raise refuse("seeds", list(seeds), allowed="integers of 64 bits", hint="0, 1, 2 will do")
    if batch_size < 1:
        raise refuse("batch_size", batch_size, allowed="1 or more", hint="less memory is used by smaller batches")


def _check_steps(steps: int, scheduler: Any) -> None:
    config = scheduler.config
    most = config.original_inference_steps if isinstance(scheduler, LCMScheduler) else config.num_train_timesteps
    if not 1 <= steps <= most:
        raise refuse("steps", steps, allowed=f"1 to {most}", hint="25 for a teacher, 2 to 8 after step distillation")


def pixels(pipeline: Pipeline, size: int | tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) in pixels; None is what the network was made for."""
    factor = pipeline.vae_scale_factor
    if size is None:
        own = pipeline.unet.config.sample_size or 64
        own = (own, own) if isinstance(own, int) else own
        return own[0] * factor, own[1] * factor
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 8 or height % 8 or width % 8 or height % factor or width % factor:
        raise refuse(
            "size",
            size,
            allowed=f"multiples of {max(8, factor)} pixels",
            hint="512 is 64 latents of 8 pixels",
        )
    return height, width
