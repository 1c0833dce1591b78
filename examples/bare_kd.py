"""The least distillation: teacher forward, student forward and backward, and the update, on tensors that are there.

    python examples/bare_kd.py --teacher scenes --student bk-tiny --steps 20 --batch 16 [--compile] [--fast-products]

No data, draws, clipping, averages, checks, checkpoints or logs: what decant's own loop is measured against, by
examples/throughput.py. Losses are BK-SDM's output and feature terms (Kim et al. 2023, eqs. 2 and 3).
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from decant.models.device import pick
from decant.models.load import load
from decant.models.pace import compiled, fast_products
from decant.models.surgery.presets import published
from decant.models.surgery.surgery import build
from decant.models.taps import tap

Networks = tuple[nn.Module, nn.Module, dict[str, str]]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Inputs:
    """What one step sees: x_t (B, 4, h, w), timesteps (B,), text embeddings (B, L, D)."""

    x_t: Tensor
    t: Tensor
    words: Tensor


def networks(teacher: str, student: str) -> Networks:
    """The teacher's UNet, a student cut from it, and the pairs of their modules that features are compared at."""
    unet = load(teacher).unet
    surgery = published(dict(unet.config), {k: v.clone() for k, v in unet.state_dict().items()}, student)
    return unet, build(surgery), surgery.surgery_map.features


def random_inputs(unet: nn.Module, batch: int) -> Inputs:
    """Random tensors of the sizes that the network is made for."""
    side, channels, width = (unet.config[key] for key in ("sample_size", "in_channels", "cross_attention_dim"))
    x_t, words = torch.randn(batch, channels, side, side), torch.randn(batch, 77, width)
    return Inputs(x_t, torch.randint(0, 1000, (batch,)), words)


def steps(nets: Networks, given: Inputs, args: argparse.Namespace) -> Iterator[Tensor]:
    """One update after another, for ever; yields its loss."""
    device, dtype = pick(args.device), DTYPES[args.precision]
    teacher = tap(nn.Module.to(nets[0].requires_grad_(False).eval(), device, dtype), list(nets[2].values()))
    student = tap(nets[1].train().to(device), list(nets[2]))
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.lr, fused=True)
    if args.compile:
        teacher, student = compiled(teacher), compiled(student)
    x_t, t, words = given.x_t.to(device), given.t.to(device), given.words.to(device)
    while True:
        optimizer.zero_grad()
        with fast_products() if args.fast_products and device.type == "cpu" else nullcontext():
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                with torch.no_grad():
                    taught, inside = teacher(x_t, t, encoder_hidden_states=words)
                output, features = student(x_t, t, encoder_hidden_states=words)
            loss = mse_loss(output.float(), taught.float())
            for mine, theirs in nets[2].items():
                loss = loss + args.feature * mse_loss(features[mine].float(), inside[theirs].float())
            loss.backward()
        optimizer.step()
        yield loss.detach()


def options() -> argparse.ArgumentParser:
    """The options that decant's loop has too."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher", default="scenes")
    parser.add_argument("--student", default="bk-tiny", choices=["bk-base", "bk-small", "bk-tiny"])
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    parser.add_argument("--precision", default="no", choices=list(DTYPES))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--feature", type=float, default=0.3)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--fast-products", action="store_true")
    return parser


if __name__ == "__main__":
    chosen = options().parse_args()
    made = networks(chosen.teacher, chosen.student)
    training, begin = steps(made, random_inputs(made[0], chosen.batch), chosen), time.perf_counter()
    for number in range(1, chosen.steps + 1):
        print(f"step {number}  loss {float(next(training)):.5f}  {time.perf_counter() - begin:.2f} s")
