"""One UNet call of SDXL, SSD-1B and Vega at full size, random weights: docs/sdxl_speed.md.

    python examples/sdxl_speed.py --page docs/sdxl_speed.md

The students are cut from the teacher. The networks are timed in turns, so that what drifts meets all alike; in float32
they take 19 GB together. The published figures are of whole pictures on a GPU.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from decant.bench.machine import machine
from decant.bench.timer import Latency, time_rounds
from decant.models.cost import macs, parameters
from decant.models.device import pick
from decant.models.families.unet import blank, forward
from decant.models.load import architecture
from decant.models.surgery.presets import published
from decant.models.surgery.surgery import build, skeleton

PUBLISHED = {"sdxl": 1.0, "ssd-1b": 1.6, "vega": 2.0}


def networks(dtype: torch.dtype, device: torch.device) -> dict[str, nn.Module]:
    """Teacher and students, on the device."""
    teacher = skeleton(architecture("sdxl")).to_empty(device=device).to(dtype).requires_grad_(False)
    for parameter in teacher.parameters():
        parameter.normal_(std=0.02)
    students = {name: build(published(teacher.config, teacher.state_dict(), name)) for name in ("ssd-1b", "vega")}
    return {"sdxl": teacher, **{name: student.requires_grad_(False) for name, student in students.items()}}


@torch.no_grad()
def measure(nets: dict[str, nn.Module], side: int, device: torch.device, repeats: int) -> dict[str, Latency]:
    """One call each at a latent of side x side, batch 1."""
    config = dict(nets["sdxl"].config)
    dtype = next(nets["sdxl"].parameters()).dtype
    x_t = torch.randn(1, 4, side, side, device=device, dtype=dtype)
    told = {key: value.to(dtype) for key, value in blank(config, 1, 77, device).items()}
    t = torch.full((1,), 500, device=device)
    calls = {name: partial(forward, net, x_t, t, told) for name, net in nets.items()}
    return time_rounds(calls, warmup=1, repeats=repeats)


def main(words: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--page", type=Path)
    args = parser.parse_args(words)
    device = pick(args.device)
    nets = networks(getattr(torch, args.dtype), device)
    found = measure(nets, args.side, device, args.repeats)
    on, whole = machine(), found["sdxl"].median
    command = shlex.join(["python", "examples/sdxl_speed.py", *(sys.argv[1:] if words is None else words)])
    lines = [
        "# SDXL's students, one call",
        "",
        f"Written by `{command}`.",
        "",
        f"One UNet call at batch 1, a latent of {args.side} x {args.side}, {args.dtype}, random weights, on {device} "
        f"({on['processor']}, {on['threads']} threads), torch {on['torch']}; median and range of {args.repeats} in "
        "turns, after one untimed. Published: whole pictures, on GPUs.",
        "",
        "| network | parameters | GMACs | one call, s | faster than SDXL | published |",
        "|---|---|---|---|---|---|",
    ]
    for name, net in nets.items():
        latency = found[name]
        counted = macs(net, (4, args.side, args.side), 77) / 1e9
        seconds = f"{latency.median / 1e3:.2f} ({latency.low / 1e3:.2f}-{latency.high / 1e3:.2f})"
        times = f"{whole / latency.median:.2f} x"
        lines.append(
            f"| {name} | {parameters(net):,} | {counted:.1f} | {seconds} | {times} | {PUBLISHED[name]:.1f} x |"
        )
    text = "\n".join([*lines, ""])
    print(text)
    if args.page:
        args.page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
