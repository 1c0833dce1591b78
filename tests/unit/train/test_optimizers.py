"""Learning rates against torch's and diffusers' schedulers, the moving average against its closed form."""

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR

from decant.train.ema import EMA
from decant.train.optimizers import LRSchedule, adamw, lr_at


def optimizer() -> AdamW:
    return adamw([nn.Parameter(torch.zeros(1))], 1.0, 0.0, (0.9, 0.999))


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    ("ours", "theirs"), [("constant", "constant_with_warmup"), ("cosine", "cosine"), ("linear", "linear")]
)
def test_factors_are_diffusers(ours: LRSchedule, theirs: str, warmup: int) -> None:
    made = optimizer()
    scheduler = get_scheduler(theirs, made, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(20):
        assert lr_at(ours, step, 20, warmup) == pytest.approx(scheduler.get_last_lr()[0])
        made.step()
        scheduler.step()


@pytest.mark.parametrize("warmup", [0, 2, 6])
def test_one_cycle_is_torchs(warmup: int) -> None:
    made = optimizer()
    scheduler = OneCycleLR(made, max_lr=1.0, total_steps=20, pct_start=warmup / 20)
    for step in range(20):
        assert lr_at("one_cycle", step, 20, warmup) == pytest.approx(scheduler.get_last_lr()[0])
        made.step()
        if step < 19:
            scheduler.step()


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "one_cycle"])
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_factors_stay_in_bounds_also_past_the_end(schedule: LRSchedule, warmup: int) -> None:
    factors = [lr_at(schedule, step, 10, warmup) for step in range(15)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert factors[11:] == [factors[11]] * 4


def test_the_average_follows_its_warm_up() -> None:
    module = nn.Linear(1, 1, bias=False).requires_grad_(False)
    module.weight.fill_(0.0)
    ema, expected = EMA(dict(module.named_parameters()), 0.9), 0.0
    for k in range(100):
        module.weight.fill_(float(k))
        ema.update(dict(module.named_parameters()), k)
        decay = min(0.9, (1 + k) / (10 + k))
        expected = decay * expected + (1 - decay) * k
    assert ema.weights["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_the_average_is_float32_for_half_weights() -> None:
    module = nn.Linear(4, 4).half()
    before = {k: p.detach().clone() for k, p in module.named_parameters()}
    ema = EMA(dict(module.named_parameters()), 0.99)
    assert {t.dtype for t in ema.weights.values()} == {torch.float32}
    with ema.applied(module):
        assert module.weight.dtype == torch.float16
    assert all(torch.equal(p, before[k]) for k, p in module.named_parameters())


def test_a_swap_ends_also_after_an_error() -> None:
    module = nn.Linear(2, 2)
    ema, own = EMA(dict(module.named_parameters()), 0.5), module.weight.detach().clone()
    ema.weights["weight"] += 1
    with pytest.raises(KeyError), ema.applied(module):
        assert torch.equal(module.weight, own + 1)
        raise KeyError
    assert torch.equal(module.weight, own)
    ema.copy_to(module)
    assert torch.equal(module.weight, own + 1)
