"""Consistency and distribution matching between real, tiny UNets: what is compared, who learns, and that it resumes."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from decant.data.batch import Batch
from decant.losses.matching import matching
from decant.maths.prediction import Prediction, target
from decant.maths.schedules import variance_preserving
from decant.methods.consistency import Consistency
from decant.methods.consistency import Knobs as ConsistencyKnobs
from decant.methods.dmd import DMD, FAKE, STUDENT
from decant.methods.dmd import Knobs as DmdKnobs
from decant.models.critic import Critic
from decant.models.families.sd1 import SD1
from decant.models.families.unet import told_guidance
from decant.models.roles import act
from decant.models.taps import tap
from decant.train.draw import Draw
from decant.train.loop import loop
from decant.train.method import Method, average_of
from decant.train.state import RunSettings, TrainState

DRAW = Draw(3, 5, (11, 12, 40))
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULE = variance_preserving(LCMScheduler(**BETAS).alphas_cumprod)
RUN = RunSettings(steps=4, seed=7, lr=1e-3)


def family(prediction: Prediction = "epsilon") -> SD1:
    """The shipped adapter; with cached conditions and latents it needs neither text encoder nor VAE."""
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None}
    return SD1(prediction, SCHEDULE, **parts)


def unet(seed: int) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=4,
    )


def batch(samples: Sequence[int] = DRAW.samples) -> Batch:
    def drawn(purpose: str, *shape: int) -> Tensor:
        return Draw(0, 0, tuple(samples)).normal(purpose, shape)

    mean, std = drawn("mean", 4, 8, 8), drawn("std", 4, 8, 8).abs()
    told, empty = ({"encoder_hidden_states": drawn(name, 7, 16)} for name in ("told", "empty"))
    return Batch(tuple(samples), mean, std, told, empty)


class Oracle(nn.Module):
    """The perfect network of a world with one picture: every way ends there. ``spoilt``: so far from it."""

    def __init__(self, picture: Tensor, prediction: Prediction, spoilt: float = 0.0) -> None:
        super().__init__()
        self.picture, self.prediction = picture, prediction
        self.spoilt = nn.Parameter(torch.tensor(spoilt))

    def forward(self, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        alpha, sigma = SCHEDULE.at(t, 4)
        x_0 = (self.picture + self.spoilt).expand_as(x_t)
        return (target(self.prediction, x_0, (x_t - alpha * x_0) / sigma, alpha, sigma),)


class Gaussian(nn.Module):
    """The perfect network where pictures are normal with ``DEVIATION``: a teacher's, which says their mean, or a
    student's, which says what leads to the way's end, or to that of each of some phases.
    """

    def __init__(self, prediction: Prediction, phases: int = 0) -> None:
        super().__init__()
        self.prediction, self.phases = prediction, phases
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        alpha, sigma = SCHEDULE.at(t, 4)
        variance = (alpha * DEVIATION) ** 2 + sigma**2
        if not self.phases:
            x_0 = x_t * alpha * DEVIATION**2 / variance
        elif self.phases == 1:
            x_0 = x_t * DEVIATION / variance.sqrt()
        else:
            there, noisy = SCHEDULE.at(ends_of_ddim(t, self.phases), 4)
            end = x_t * (((there * DEVIATION) ** 2 + noisy**2) / variance).sqrt()
            x_0 = (end - noisy / sigma * x_t) / (there - noisy / sigma * alpha)
        return (target(self.prediction, self.one * x_0, (x_t - alpha * self.one * x_0) / sigma, alpha, sigma),)


def ends_of_ddim(t: Tensor, steps: int) -> Tensor:
    """The next timestep on the way of so many steps with trailing timesteps."""
    sampler = DDIMScheduler(**BETAS, timestep_spacing="trailing")
    sampler.set_timesteps(steps)
    way = [*sampler.timesteps.tolist(), 0]
    return torch.tensor([max([each for each in way if each < now], default=0) for now in t.tolist()])


DEVIATION = 0.3


@pytest.mark.parametrize("phases", [1, 2, 4])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_student_that_knows_every_end_has_little_to_learn(prediction: Prediction, phases: int) -> None:
    """The closed form of the ways' ends agrees with steps of the solver, as far as those are short."""
    losses, others = {}, 1 if phases > 1 else 2
    for steps, known in ((500, phases), (40, phases), (500, others)):
        student, teacher = Gaussian(prediction, known), Gaussian(prediction)
        knobs = ConsistencyKnobs(distance="mse", solver_steps=steps, phases=phases)
        method = Consistency.of(family(prediction), student, teacher, knobs)
        (term,) = method.terms("student", {"student": student, **method.frozen}, batch(), DRAW, 0)
        losses[steps, known] = float(term.value.detach().mean())
    right, coarse, wrong = losses.values()
    assert right < coarse / 10 and right < wrong / 10, losses


@pytest.mark.parametrize("phases", [1, 2, 4])
def test_where_the_students_own_way_should_end(phases: int) -> None:
    """At the closed form of the phase's end, as far as the teacher's steps are short; wherever in it the phase is."""
    losses = {}
    for steps, known in ((200, phases), (5, phases), (200, 1 if phases > 1 else 2)):
        student, teacher = Gaussian("epsilon", known), Gaussian("epsilon")
        knobs = ConsistencyKnobs(distance="mse", solver_steps=40, phases=phases, own_way=1.0, own_way_steps=steps)
        method = Consistency.of(family(), student, teacher, knobs)
        draw = Draw(3, 5, tuple(range(32)))
        (term,) = method.terms("student", {"student": student, **method.frozen}, batch(draw.samples), draw, 0)
        assert term.name == "own_way"
        losses[steps, known] = float(term.value.detach().mean())
    right, coarse, wrong = losses.values()
    assert right < coarse / 10 and right < wrong / 10, losses


def test_the_own_way_is_its_part_of_the_updates() -> None:
    student, teacher = unet(0), unet(1)
    method = Consistency.of(family(), student, teacher, ConsistencyKnobs(own_way=0.3, own_way_steps=1, phases=2))
    nets = {"student": student, **method.frozen}
    names = [method.terms("student", nets, batch(), DRAW, step)[0].name for step in range(10)]
    assert names.count("own_way") == 3 and names.count("consistency") == 7


def test_the_end_next_to_the_picture_is_the_picture() -> None:
    """The boundary: without it any constant end would do."""
    picture = batch().mean[:1]
    one = replace(batch(), mean=picture.expand(3, -1, -1, -1), std=torch.zeros(3, 4, 8, 8))
    student, teacher = Oracle(picture, "epsilon", 0.1), Oracle(picture, "epsilon")
    knobs = ConsistencyKnobs(distance="mse", solver_steps=1)  # the only step is from pure noise to the picture
    method = Consistency.of(family(), student, teacher, knobs)
    (term,) = method.terms("student", {"student": student, **method.frozen}, one, DRAW, 0)
    at_zero = (1 - SCHEDULE.alpha[0]) * picture.square().mean().sqrt()  # the solver stops at t = 0, a little noisy
    assert float(term.value.detach().sqrt().mean()) == pytest.approx(0.1, abs=0.02 + float(at_zero))


def test_guidance_is_drawn_told_and_used() -> None:
    student, teacher = told_guidance(unet(0), 32), unet(1)
    seen: list[Tensor] = []
    student.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["timestep_cond"]), with_kwargs=True)
    knobs = ConsistencyKnobs(guidance_scale=(2.0, 9.0), embedding=32)
    values = {}
    for name, used in (("drawn", knobs), ("one", replace(knobs, guidance_scale=2.0))):
        method = Consistency.of(family(), student, teacher, used)
        (term,) = method.terms("student", {"student": student, **method.frozen}, batch(), DRAW, 0)
        values[name] = term.value.detach()
    assert (values["drawn"] - values["one"]).abs().min() > 0, "another solver's step"
    drawn, one = seen[0], seen[2]
    assert drawn.shape == (3, 32) and len({tuple(row.tolist()) for row in drawn}) == 3
    assert torch.equal(one[0], one[1])


def test_a_network_that_is_told_its_guidance_begins_as_it_was() -> None:
    plain = unet(0)
    told = told_guidance(plain, 32)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 7, 16)
    with torch.no_grad():
        before = plain(x, t, encoder_hidden_states=text).sample
        after = told(x, t, encoder_hidden_states=text, timestep_cond=torch.randn(2, 32)).sample
    assert torch.equal(before, after)
    assert told_guidance(told, 32) is told


@pytest.mark.parametrize("ema", [None, 0.5])
def test_the_believed_end_is_the_averages_or_the_students_own(ema: float | None) -> None:
    method = Consistency.of(family(), unet(0), unet(1), ConsistencyKnobs(ema=ema))
    state = TrainState.start(method, RUN, device="cpu")
    for _ in loop(method, lambda step: [batch()], state):
        pass
    assert (average_of("student") in state.nets) == (ema is not None)
    if ema is None:
        return
    average = dict(state.nets[average_of("student")].named_parameters())
    own = dict(state.nets["student"].named_parameters())
    for name, kept in state.ema["student"].weights.items():
        assert torch.equal(average[name], kept)
    assert any(not torch.equal(average[name], own[name]) for name in own)
    assert all(p.grad is None and not p.requires_grad for p in average.values())
    # And its opinion counts.
    found = []
    for shift in (0.0, 0.1):
        average["conv_out.bias"].data += shift
        (term,) = method.terms("student", state.nets, batch(), DRAW, 0)
        found.append(term.value.detach())
    assert (found[0] - found[1]).abs().min() > 0


def lora(net: UNet2DConditionModel, *names: str) -> UNet2DConditionModel:
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        net.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name=name)
    return net


def apart(critic: float = 0.0, **knobs: Any) -> DMD:
    fake: nn.Module = unet(2)
    if critic:
        torch.manual_seed(3)
        fake = Critic(tap(fake, ["mid_block"]), 32)
    return DMD.of(family(), unet(0), unet(1), fake, DmdKnobs(critic=critic, fake_updates=2, **knobs))


def one_network(**knobs: Any) -> DMD:
    return DMD.shared(family(), lora(unet(0), STUDENT, FAKE), DmdKnobs(fake_updates=2, **knobs))


METHODS = {
    "consistency": lambda: Consistency.of(family(), unet(0), unet(1), ConsistencyKnobs(ema=0.9)),
    "consistency, LoRA": lambda: Consistency.of(
        family(), lora(unet(0), STUDENT), unet(0), trained=lambda name: ".lora_" in name
    ),
    "three networks": apart,
    "with a critic": lambda: apart(5e-3, ema=0.9),
    "one network": one_network,
}


def reached(method: Method, player: str, nets: Mapping[str, nn.Module]) -> set[tuple[int, str]]:
    """What gets a gradient from the terms of a turn when nothing is switched off: (network, parameter)."""
    found = set()
    for net in {id(net): net for net in nets.values()}.values():
        net.zero_grad(set_to_none=True)
    state_terms = method.terms(player, nets, batch(), DRAW, 0)
    torch.stack([term.weighted.sum() for term in state_terms]).sum().backward()
    for net in {id(net): net for net in nets.values()}.values():
        found |= {(id(net), name) for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    return found


@pytest.mark.parametrize("kind", METHODS)
def test_a_turn_moves_its_own_player_and_no_one_else(kind: str) -> None:
    method = METHODS[kind]()
    state = TrainState.start(method, replace(RUN, steps=2), device="cpu")
    frozen = {name: copy.deepcopy(net.state_dict()) for name, net in method.frozen.items()}
    turns = []
    before = {name: {k: p.detach().clone() for k, p in named.items()} for name, named in state.parameters.items()}
    for step in loop(method, lambda step: [batch()], state):
        turns.append(step.player)
        for name, named in state.parameters.items():
            moved = any(not torch.equal(p, before[name][key]) for key, p in named.items())
            assert moved == (name == step.player), f"{name} in the turn of {step.player}"
            before[name] = {k: p.detach().clone() for k, p in named.items()}
    assert turns == (["fake", "fake", "student"] * 2 if "consistency" not in kind else ["student"] * 2)
    for name, weights in frozen.items():
        assert all(torch.equal(weights[key], value) for key, value in method.frozen[name].state_dict().items())


@pytest.mark.parametrize("kind", ["three networks", "with a critic", "one network"])
def test_whose_parameters_get_gradients_in_whose_turn(kind: str) -> None:
    """By the loop's own switches; what the student's terms would reach without them is told apart too."""
    method = METHODS[kind]()
    state = TrainState.start(method, RUN, device="cpu")
    for player in ("student", "fake"):
        state.focus(player)
        own = {(id(state.players[player].module), name) for name in state.parameters[player]}
        found = reached(method, player, state.nets)
        assert found and found <= own
        if kind == "three networks":
            assert len(found) > len(own) / 2
        if kind == "with a critic" and player == "fake":
            assert any(name.startswith("head.") for _, name in found)


def test_matching_pulls_from_the_fake_end_to_the_real_one() -> None:
    made = torch.Generator().manual_seed(0)
    x_0, real, fake = (torch.randn(2, 4, 8, 8, generator=made) for _ in range(3))
    x_0.requires_grad_()
    matching(x_0, real, fake).sum().backward()
    size = (x_0.detach() - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    assert x_0.grad is not None
    torch.testing.assert_close(x_0.grad, (fake - real) / size / (4 * 8 * 8))


def test_one_network_without_a_role_is_the_teacher() -> None:
    plain, net = unet(0), lora(unet(0), STUDENT, FAKE)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.randn(2, 7, 16)
    asked: list[bool] = [True, False] * 1000
    for parameter, flag in zip(net.parameters(), asked, strict=False):
        parameter.requires_grad_(flag)
    before = [parameter.requires_grad for parameter in net.parameters()]
    outputs = {}
    with torch.no_grad():
        for role in (None, STUDENT, FAKE, None):
            act(net, role)
            outputs[role] = net(x, t, encoder_hidden_states=text).sample
        torch.testing.assert_close(outputs[None], plain(x, t, encoder_hidden_states=text).sample)
    assert not torch.allclose(outputs[STUDENT], outputs[FAKE]) and not torch.allclose(outputs[None], outputs[FAKE])
    assert [parameter.requires_grad for parameter in net.parameters()] == before


def test_roles_hold_in_what_checkpointing_computes_again() -> None:
    kept = []
    for checkpointing in (False, True):
        method = one_network()
        net = method.players["student"].module
        assert isinstance(net, UNet2DConditionModel)
        if checkpointing:
            net.enable_gradient_checkpointing()
        state = TrainState.start(method, RUN, device="cpu")
        for player in ("fake", "student"):
            state.focus(player)
            terms = method.terms(player, state.nets, batch(), DRAW, 0)
            torch.stack([term.weighted.sum() for term in terms]).sum().backward()
            kept.append({name: p.grad.clone() for name, p in state.parameters[player].items() if p.grad is not None})
    torch.testing.assert_close(kept[0], kept[2])
    torch.testing.assert_close(kept[1], kept[3])


def test_the_students_way_is_its_samplers() -> None:
    """Diffusers' LCM sampler over all timesteps walks the same points, with the same noise put back."""
    method = apart(sampler_steps=4)
    nets = {"student": method.players["student"].module, "fake": method.players["fake"].module, **method.frozen}
    sampler = LCMScheduler(**BETAS, original_inference_steps=1000, set_alpha_to_one=False)
    sampler.set_timesteps(4)
    given = batch()
    with torch.no_grad():
        ours = method._drawn(nets, given, DRAW)
        stops = (DRAW.uniform("step") * 4).long()
        x_t = DRAW.normal("start", (4, 8, 8))
        ends = []
        for number, t in enumerate(sampler.timesteps):
            output = nets["student"](x_t, t, **given.condition).sample
            ends.append(sampler.step(output, t, x_t).denoised)
            if number < 3:
                noise = DRAW.normal(f"renoise {number}", (4, 8, 8))
                x_t = sampler.add_noise(ends[-1], noise, sampler.timesteps[number + 1].view(1))
    theirs = torch.stack([ends[stop][place] for place, stop in enumerate(stops.tolist())])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", METHODS)
def test_a_resumed_run_ends_in_the_same_bits(kind: str, tmp_path: Path) -> None:
    ends = []
    for stop in (None, 2, 4):
        method = METHODS[kind]()
        state = TrainState.start(method, RUN, device="cpu")
        for step in loop(method, lambda step: [batch((step, step + 1))], state):
            if step.step == stop:
                state.save(tmp_path / str(stop))
                break
        if stop is not None:
            method = METHODS[kind]()
            state = TrainState.start(method, RUN, device="cpu")
            assert state.resume(tmp_path / str(stop)) and state.step == stop
            for _ in loop(method, lambda step: [batch((step, step + 1))], state):
                pass
        ends.append((state._weights(), state._averages(), state._moments()))
    for other in ends[1:]:
        for mine, theirs in zip(ends[0], other, strict=True):
            assert mine.keys() == theirs.keys()
            assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []
