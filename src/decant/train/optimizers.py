"""Optimisers, and learning rates as pure functions of the step."""

from collections.abc import Iterable
from math import cos, pi
from typing import Any, Literal, assert_never

import torch
from torch import nn

from decant.errors import refuse

Optimizer = Literal["adamw", "adamw8bit"]
LRSchedule = Literal["constant", "cosine", "one_cycle", "linear"]

# OneCycle's start and end, as fractions of the peak (Smith and Topin 2018; torch's OneCycleLR has the same).
_ONE_CYCLE_START = 1 / 25
_ONE_CYCLE_END = 1 / 25 / 1e4


def adamw(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """Adam with decoupled weight decay, in one pass over the parameters. Loshchilov and Hutter 2019."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=betas, fused=True)


def adamw8bit(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """AdamW that keeps its two moments in 8 bits, in blocks of 256. Dettmers et al. 2022, arXiv:2110.02861.

    Raises UserError where torchao is not installed.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        hint = "pip install torchao, or set optimizer=adamw"
        raise refuse("optimizer", "adamw8bit", allowed="adamw without torchao", hint=hint) from error
    own: Any = AdamW8bit(list(parameters), lr=lr, weight_decay=weight_decay, betas=betas)
    return own


def ready_8bit() -> None:
    """Have torchao make its code tables, which it does once and with numbers: to be called before there are none."""
    parameter = nn.Parameter(torch.zeros(4096))
    parameter.grad = torch.zeros_like(parameter)
    with torch.compiler.set_stance("force_eager"):
        adamw8bit([parameter], 0.0, 0.0, (0.9, 0.999)).step()


def lr_at(schedule: LRSchedule, step: int, steps: int, warmup: int) -> float:
    """The factor of the peak learning rate at update ``step`` of ``steps``, both counted from 0.

    ``warmup`` updates rise linearly from 0 (one_cycle: on a cosine from 1/25). Beyond ``steps`` the last
    value stays.
    """
    assert 0 <= warmup <= steps, f"{warmup} steps of warm-up in {steps}"
    if schedule == "one_cycle":
        return _one_cycle(min(step, steps - 1), steps, warmup)
    if step < warmup:
        return step / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    match schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1 + cos(pi * progress))
        case "linear":
            return 1 - progress
        case _:
            assert_never(schedule)


def _one_cycle(step: int, steps: int, warmup: int) -> float:
    peak = warmup - 1
    if step <= peak:
        return _anneal(_ONE_CYCLE_START, 1.0, step / peak if peak else 1.0)
    return _anneal(1.0, _ONE_CYCLE_END, (step - peak) / (steps - 1 - peak))


def _anneal(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2 * (1 + cos(pi * progress))
