"""Seconds of a picture at SD 1.5's full size, random weights: few steps, small UNets, a small decoder.

    python examples/few_step_speed.py --page docs/few_step_speed.md

The teacher in 25 steps with guidance; it and BK-SDM's Base, Small and Tiny in 8, 4, 2 and 1 without; each with SD 1.5's
own decoder and with AutoencoderTiny, whose default shape is TAESD's. Text, steps and decoder are timed in one run: what
one kind of decoder takes is added to the same seconds before it.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

from decant.bench.machine import machine
from decant.models.cost import parameters
from decant.models.device import pick
from decant.models.generate import generate_latents
from decant.models.layout import Pipeline, rebuilt
from decant.models.surgery.presets import published
from decant.models.surgery.surgery import build
from decant.models.untrained import untrained

STUDENTS = ("bk-base", "bk-small", "bk-tiny")
STEPS = (8, 4, 2, 1)
TEACHER_STEPS, GUIDANCE = 25, 7.5
PROMPT = "a photograph of a lighthouse on a cliff at dusk"
DECODERS = {"own": "SD 1.5's own", "tiny": "AutoencoderTiny"}


def seconds_of(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """The median of ``repeats`` calls, in seconds."""
    found = []
    for _ in range(repeats):
        begin = perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(perf_counter() - begin)
    return median(found)


@torch.no_grad()
def measure(dtype: torch.dtype, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """``{"decode": {decoder: s}, "latents": [{"unet", "steps", "s", "parameters"}]}``; the first is the teacher's."""
    teacher = untrained("sd15", dtype).to(device)
    small = AutoencoderTiny().to(device, dtype).eval()
    side = args.size // 8
    x_0 = torch.randn(1, 4, side, side).to(device, dtype)
    decoders = {"own": lambda: teacher.vae.decode(x_0), "tiny": lambda: small.decode(x_0)}
    decode = {}
    for name, call in decoders.items():
        call()
        decode[name] = seconds_of(call, 3, device)
        talk(f"{dtype}: decoder {name} {decode[name]:.2f} s")
    rows = [latents("sd15", teacher, TEACHER_STEPS, GUIDANCE, args, device)]
    weights = teacher.unet.state_dict()
    for name in ("sd15", *STUDENTS):
        pipeline = teacher
        if name != "sd15":
            student = build(published(dict(teacher.unet.config), weights, name)).to(device, dtype).eval()
            pipeline = rebuilt(teacher, unet=student)
        rows += [latents(name, pipeline, steps, 1.0, args, device) for steps in STEPS]
    return {"decode": decode, "latents": rows}


def latents(
    name: str, pipeline: Pipeline, steps: int, guidance_scale: float, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Seconds from the prompt to a latent, after a warm-up of one step."""

    def draw(count: int) -> object:
        return generate_latents(
            pipeline, [PROMPT], [0], steps=count, guidance_scale=guidance_scale, sampler="ddim-trailing", size=args.size
        )

    draw(1)
    found = seconds_of(lambda: draw(steps), args.repeats, device)
    talk(f"{name}, {steps} steps, guidance {guidance_scale:g}: {found:.2f} s to the latent")
    return {
        "unet": name,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "s": found,
        "parameters": parameters(pipeline.unet),
    }


def table(found: dict[str, Any]) -> list[str]:
    """One dtype's."""
    first, decode = found["latents"][0], found["decode"]
    whole = first["s"] + decode["own"]
    lines = [f"| UNet | parameters | steps | {DECODERS['own']}, s | times | {DECODERS['tiny']}, s | times |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for entry in found["latents"]:
        guided = f", guidance {GUIDANCE:g}" if entry is first else ""
        cells = [entry["unet"] + guided, f"{entry['parameters']:,}", str(entry["steps"])]
        for each in DECODERS:
            seconds = entry["s"] + decode[each]
            cells += [f"{seconds:.2f}", f"{whole / seconds:.1f} x"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["float32", "bfloat16"]
    )
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--page", type=Path)
    args = parser.parse_args(words)
    device, on = pick(args.device), machine()
    command = shlex.join(["python", "examples/few_step_speed.py", *(sys.argv[1:] if words is None else words)])
    lines = [
        "# A picture at full size in few steps",
        "",
        f"Written by `{command}`.",
        "",
        f"SD 1.5's layout with random weights at {args.size} px, one picture, on {device} ({on['processor']}, "
        f"{on['threads']} threads), torch {on['torch']}. Seconds from prompt to picture; times: as many as the first "
        f"row's with its own decoder. Repeats: {args.repeats}, decoders 3. What such students are worth is not said "
        "here, see few_steps.md.",
        "",
    ]
    everything = {}
    for name in args.dtypes:
        everything[name] = measure(getattr(torch, name), args, device)
        lines += [f"## {name}", "", *table(everything[name]), ""]
    print("\n".join(lines))
    if args.page:
        args.page.write_text("\n".join(lines), encoding="utf-8")
        document = {"machine": on, "command": command, "measured": everything}
        args.page.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def talk(line: str) -> None:
    """For people."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
