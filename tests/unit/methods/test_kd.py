"""Knowledge distillation between real, tiny UNets: what every term is, and whom it trains."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from decant.data.batch import Batch
from decant.errors import UserError
from decant.losses.cosine import cosine_distance
from decant.losses.output import huber
from decant.losses.term import Term
from decant.maths.prediction import Prediction
from decant.maths.ramp import Ramp
from decant.maths.schedules import variance_preserving
from decant.methods.kd import KD, Knobs, Timesteps
from decant.models.families.sd1 import SD1
from decant.models.projection import Projected, Projection
from decant.models.taps import Tapped, tap
from decant.train.draw import Draw
from decant.train.loop import loop
from decant.train.state import RunSettings, TrainState

PAIRS = {f"{side}_blocks.{level}": f"{side}_blocks.{level}" for side in ("down", "up") for level in range(4)}
DRAW = Draw(3, 5, (11, 12, 40))
ALL = Knobs(task=1.0, output=1.0, feature=1.0)
NAMES = ["task", "output", *(f"feature/{name}" for name in PAIRS)]


def scheduler(prediction: Prediction = "epsilon") -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction)


def family(prediction: Prediction = "epsilon") -> SD1:
    """The shipped adapter; with cached conditions and latents it needs neither text encoder nor VAE."""
    parts: dict[str, Any] = {"tokenizer": None, "text_encoder": None, "vae": None}
    return SD1(prediction, variance_preserving(scheduler(prediction).alphas_cumprod), **parts)


def unet(layers: int, seed: int, widths: tuple[int, ...] = (32, 64, 64, 64)) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=4,
    )


def batch() -> Batch:
    made = torch.Generator().manual_seed(0)
    mean, tokens, empty = (torch.randn(3, *s, generator=made) for s in ((4, 8, 8), (7, 16), (7, 16)))
    names = ("encoder_hidden_states",)
    return Batch(DRAW.samples, mean, torch.rand(3, 4, 8, 8), dict.fromkeys(names, tokens), dict.fromkeys(names, empty))


def kd(knobs: Knobs = ALL, prediction: Prediction = "epsilon") -> KD:
    return KD.of(family(prediction), unet(1, 0), unet(2, 1), PAIRS, knobs)


def nets(method: KD) -> dict[str, nn.Module]:
    """The networks as they come: the method itself must keep gradients from the teacher."""
    for net in method.frozen.values():
        net.eval()
    return {"student": method.players["student"].module.train(), **method.frozen}


def terms(method: KD, given: Batch) -> dict[str, Term]:
    return {term.name: term for term in method.terms("student", nets(method), given, DRAW, 5)}


def plain(net: nn.Module) -> nn.Module:
    return net.close() if isinstance(net, Tapped) else net


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_term_alone_trains_the_student_and_never_the_teacher(checkpointing: bool) -> None:
    method = kd()
    student, teacher = method.players["student"].module, method.frozen["teacher"]
    if checkpointing:
        plain_student = student.module
        assert isinstance(plain_student, UNet2DConditionModel)
        plain_student.enable_gradient_checkpointing()
    found = terms(method, batch())
    assert list(found) == NAMES
    for name, term in found.items():
        student.zero_grad()
        term.weighted.sum().backward(retain_graph=True)
        reached = gradients(student)
        block = name.removeprefix("feature/") if "/" in name else "conv_out"
        assert any(key.startswith(f"module.{block}") for key in reached), f"{name} does not reach {block}"
        assert "module.conv_in.weight" in reached
        assert all(p.grad is None for p in teacher.parameters())


def test_checkpointing_changes_no_gradient() -> None:
    kept: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        method, given = kd(), batch()
        module = method.players["student"].module.module
        assert isinstance(module, UNet2DConditionModel)
        if checkpointing:
            module.enable_gradient_checkpointing()
        given = replace(given, std=torch.ones_like(given.std))
        torch.stack([term.weighted.sum() for term in terms(method, given).values()]).sum().backward()
        kept.append(gradients(module))
    torch.testing.assert_close(kept[0], kept[1])


def drawn(given: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, noise and t as the method must have drawn them."""
    x_0 = given.mean + given.std * DRAW.normal("latent", (4, 8, 8))
    return x_0, DRAW.normal("noise", (4, 8, 8)), (DRAW.uniform("timestep") * 1000).long()


def each(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([mse_loss(x, y) for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_terms_are_those_of_a_loop_written_with_diffusers(prediction: Prediction) -> None:
    method, given = kd(prediction=prediction), batch()
    found = {name: term.value.detach() for name, term in terms(method, given).items()}
    student, teacher = plain(method.players["student"].module), plain(method.frozen["teacher"])
    x_0, noise, t = drawn(given)
    theirs = scheduler(prediction)
    goals = {"epsilon": noise, "sample": x_0, "v_prediction": theirs.get_velocity(x_0, noise, t)}
    x_t, tokens = theirs.add_noise(x_0, noise, t), given.condition["encoder_hidden_states"]
    with torch.no_grad():
        answer, taught = student(x_t, t, tokens).sample, teacher(x_t, t, tokens).sample
    torch.testing.assert_close(found["task"], each(answer, goals[prediction]))
    torch.testing.assert_close(found["output"], each(answer, taught))


def test_features_are_the_outputs_of_the_named_blocks() -> None:
    method, given = kd(), batch()
    found = terms(method, given)["feature/up_blocks.1"].value.detach()
    x_0, noise, t = drawn(given)
    seen: list[Tensor] = []
    for net in (plain(method.players["student"].module), plain(method.frozen["teacher"])):
        handle = net.get_submodule("up_blocks.1").register_forward_hook(lambda _m, _i, out: seen.append(out))
        with torch.no_grad():
            net(scheduler().add_noise(x_0, noise, t), t, given.condition["encoder_hidden_states"])
        handle.remove()
    torch.testing.assert_close(found, each(*seen))


def test_a_guided_teacher_changes_the_output_term_alone() -> None:
    given = batch()
    plainly, guided = terms(kd(), given), terms(kd(replace(ALL, guidance_scale=7.5)), given)
    assert [n for n in plainly if not torch.allclose(plainly[n].value, guided[n].value, rtol=1e-4)] == ["output"]
    student, teacher = unet(1, 0), unet(2, 1)
    x_0, noise, t = drawn(given)
    x_t = scheduler().add_noise(x_0, noise, t)
    with torch.no_grad():
        with_caption = teacher(x_t, t, given.condition["encoder_hidden_states"]).sample
        without = teacher(x_t, t, given.null["encoder_hidden_states"]).sample
        answer = student(x_t, t, given.condition["encoder_hidden_states"]).sample
    expected = each(answer, without + 7.5 * (with_caption - without))
    torch.testing.assert_close(guided["output"].value.detach(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weighs_outputs_and_not_features(prediction: Prediction) -> None:
    found = terms(kd(replace(ALL, min_snr_gamma=5.0, output=0.5), prediction), batch())
    snr = compute_snr(scheduler(), drawn(batch())[2])
    below = snr if prediction == "epsilon" else snr + 1
    expected = snr.clamp(max=5) / below
    torch.testing.assert_close(found["task"].weight, expected)
    torch.testing.assert_close(found["output"].weight, 0.5 * expected)
    assert found["feature/down_blocks.0"].weight == 1.0


def test_a_dropped_caption_is_the_empty_one_for_student_and_teacher() -> None:
    given = batch()
    dropped = terms(kd(replace(ALL, caption_dropout=1.0)), given)
    empty = terms(kd(), replace(given, condition=given.null))
    assert all(torch.equal(dropped[name].value, empty[name].value) for name in NAMES)
    share = DRAW.uniform("dropout")
    some = terms(kd(replace(ALL, caption_dropout=share.sort().values[1].item())), given)
    kept, lost = terms(kd(), given), share == share.min()
    expected = torch.where(lost, dropped["output"].value, kept["output"].value)
    torch.testing.assert_close(some["output"].value, expected)


def test_guidance_is_drawn_for_each_sample_between_its_bounds() -> None:
    given = batch()
    found = terms(kd(replace(ALL, feature=0.0, guidance_scale=(3.0, 13.0))), given)["output"].value.detach()
    scales = 3 + 10 * DRAW.uniform("guidance")
    fixed = [terms(kd(replace(ALL, feature=0.0, guidance_scale=float(w))), given)["output"].value for w in scales]
    torch.testing.assert_close(found, torch.stack([each[i] for i, each in enumerate(fixed)]).detach())


def test_weights_and_dropout_follow_the_run() -> None:
    falling, rising = Ramp(((0, 1.0), (1, 0.5))), Ramp(((0, 0.0), (1, 1.0)))
    method, given = kd(replace(ALL, output=falling, feature=falling, caption_dropout=rising, steps=11)), batch()
    weights, values = [], []
    for step in (0, 5, 10):
        found = {term.name: term for term in method.terms("student", nets(method), given, DRAW, step)}
        weights.append([found[name].weight for name in ("task", "output", "feature/down_blocks.0")])
        values.append(found["output"].value)
    assert weights == [[1.0, 1.0, 1.0], [1.0, 0.75, 0.75], [1.0, 0.5, 0.5]]
    assert torch.equal(values[0], terms(kd(), given)["output"].value)
    assert torch.equal(values[2], terms(kd(replace(ALL, caption_dropout=1.0)), given)["output"].value)


def test_a_progressive_chain_draws_from_fewer_timesteps_as_it_shortens() -> None:
    chain = Timesteps("trailing", Ramp(((0, 1000), (0.5, 4)), "steps"))
    method, seen = kd(Knobs(1.0, 0.0, 0.0, timesteps=chain, steps=101)), list[int]()
    net = method.players["student"].module
    net.register_forward_pre_hook(lambda _m, args: seen.extend(args[1].tolist()))
    for step in (0, 99):
        for sample in range(30):
            method.terms("student", nets(method), batch(), Draw(0, step, (sample, sample + 100, sample + 200)), step)
    assert len(set(seen[:90])) > 80 and set(seen[90:]) == {999, 749, 499, 249}


def test_teachers_take_turns_at_the_steps_that_are_named() -> None:
    teachers = [unet(2, seed) for seed in (1, 2, 3)]
    method = KD.of(family(), unet(1, 0), teachers, PAIRS, replace(ALL, switches=(4, 9), steps=20))
    given = batch()
    assert list(method.frozen) == ["teacher", "teacher-2", "teacher-3"]
    for step, number in ((0, 0), (3, 0), (4, 1), (8, 1), (9, 2), (19, 2)):
        alone = KD.of(family(), unet(1, 0), unet(2, number + 1), PAIRS, replace(ALL, steps=20))
        found = method.terms("student", nets(method), given, DRAW, step)
        for mine, theirs in zip(found, alone.terms("student", nets(alone), given, DRAW, step), strict=True):
            assert torch.equal(mine.value, theirs.value), f"{mine.name} at step {step}"


@pytest.mark.parametrize(("kind", "loss"), [("huber", huber), ("cosine", cosine_distance)])
def test_other_distances_are_taken_where_they_are_asked_for(kind: Any, loss: Any) -> None:
    seen: list[Tensor] = []
    method, given = kd(replace(ALL, output_distance=kind, feature_distance=kind)), batch()
    found = terms(method, given)
    x_0, noise, t = drawn(given)
    for net in (plain(method.players["student"].module), plain(method.frozen["teacher"])):
        handle = net.get_submodule("up_blocks.1").register_forward_hook(lambda _m, _i, out: seen.append(out))
        seen.append(net(scheduler().add_noise(x_0, noise, t), t, batch().condition["encoder_hidden_states"]).sample)
        handle.remove()
    torch.testing.assert_close(found["feature/up_blocks.1"].value, loss(seen[0], seen[2]))
    torch.testing.assert_close(found["output"].value, loss(seen[1], seen[3]))
    assert torch.equal(found["task"].value, terms(kd(), given)["task"].value)


def test_features_of_other_widths_are_compared_through_a_map_that_learns_too() -> None:
    narrow, teacher = unet(1, 0, (32, 32, 64, 64)), unet(2, 1)
    maps = {"down_blocks.1": Projection(32, 64, list(range(0, 64, 2)))}
    method = KD.of(family(), narrow, teacher, {"down_blocks.1": "down_blocks.1"}, Knobs(0, 0, 1.0, ema=0.9), maps)
    student = method.players["student"]
    assert "projections.0.weight" in student.parameters
    assert len(student.parameters) == 1 + len(list(narrow.parameters()))
    (term,) = terms(method, batch()).values()
    term.weighted.sum().backward()
    gradient = maps["down_blocks.1"].weight.grad
    assert gradient is not None and gradient.any() and gradients(narrow)
    feature = torch.randn(2, 32, 4, 4)
    mapped = maps["down_blocks.1"](feature)
    assert torch.equal(mapped[:, 0:64:2], feature) and not mapped[:, 1:64:2].any()
    torch.testing.assert_close(maps["down_blocks.1"](feature.flatten(2).mT), mapped.flatten(2).mT)
    assert isinstance(student.module, Projected) and student.module.close() is narrow


def test_of_a_student_with_a_lora_only_that_is_trained() -> None:
    student = unet(1, 0)
    student.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    method = KD.of(family(), student, unet(2, 1), PAIRS, ALL, trained=lambda name: "lora_" in name)
    learns = method.players["student"].parameters
    assert learns and all("lora_" in name for name in learns)


def calls(module: nn.Module) -> list[int]:
    counted: list[int] = []
    module.register_forward_hook(lambda *_: counted.append(1))
    return counted


@pytest.mark.parametrize(
    ("knobs", "names", "runs"),
    [
        (Knobs(1.0, 0.0, 0.0), ["task"], 0),
        (Knobs(0.0, 1.0, 0.0), ["output"], 1),
        (Knobs(0.0, 0.0, 1.0), NAMES[2:], 1),
        (Knobs(1.0, 0.0, 1.0, guidance_scale=7.5), ["task", *NAMES[2:]], 1),
        (Knobs(0.0, 1.0, 0.0, guidance_scale=7.5), ["output"], 1),
        (Knobs(1.0, Ramp(((0, 1.0), (1, 0.0))), 0.0), ["task", "output"], 1),
        (Knobs(1.0, Ramp(((0, 0.0),)), 0.0), ["task"], 0),
    ],
)
def test_what_no_term_needs_is_not_run(knobs: Knobs, names: list[str], runs: int) -> None:
    teacher = unet(2, 1)
    counted = calls(teacher)
    method = KD.of(family(), unet(1, 0), teacher, PAIRS, knobs)
    assert list(terms(method, batch())) == names and len(counted) == runs
    assert isinstance(method.players["student"].module, Tapped) == bool(knobs.feature)


def test_networks_tapped_before_are_taken_as_they_are() -> None:
    student, teacher = tap(unet(1, 0), list(PAIRS)), tap(unet(2, 1), list(PAIRS.values()))
    method = KD.of(family(), student, teacher, PAIRS)
    assert method.players["student"].module is student and method.frozen["teacher"] is teacher
    assert list(terms(method, batch())) == NAMES


def test_a_pair_that_is_not_in_the_network_is_refused() -> None:
    with pytest.raises(UserError, match=r"down_blocks\.9"):
        KD.of(family(), unet(1, 0), unet(2, 1), {"down_blocks.9": "down_blocks.3"})


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_student_learns_and_the_teacher_does_not(precision: Any) -> None:
    method = kd(replace(ALL, ema=0.9))
    teacher, student = plain_weights(method.frozen["teacher"]), method.players["student"].module
    before = plain_weights(student)
    state = TrainState.start(method, RunSettings(steps=8, lr=2e-3, precision=precision), device="cpu")
    given = batch()
    steps = list(loop(method, lambda step: [given], state))
    assert steps[-1].total < steps[0].total and set(steps[0].losses) == set(NAMES)
    after = plain_weights(student)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    with state.ema["student"].applied(student):
        assert any(not torch.equal(after[name], plain_weights(student)[name]) for name in after)
    for name, tensor in plain_weights(method.frozen["teacher"]).items():
        assert torch.equal(tensor.float(), teacher[name].to(tensor.dtype).float())


def plain_weights(net: nn.Module) -> Mapping[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("gamma", [None, 5.0])
def test_a_student_may_answer_v_where_its_teacher_answers_epsilon(gamma: float | None) -> None:
    """A student that says as v what its teacher says as epsilon is not apart from it, and is weighed as one of v."""
    knobs = Knobs(output=1.0, feature=0.0, prediction="v_prediction", min_snr_gamma=gamma)
    student, teacher = unet(2, 1), unet(2, 1)
    seen, kept = batch(), scheduler().alphas_cumprod

    def as_v(net: nn.Module, args: tuple[Tensor, Tensor], output: Any) -> Any:
        alpha, sigma = kept[args[1]].sqrt().view(-1, 1, 1, 1), (1 - kept[args[1]]).sqrt().view(-1, 1, 1, 1)
        return replace(output, sample=(output.sample - sigma * args[0]) / alpha)

    plain_answer = terms(KD.of(family(), student, teacher, {}, knobs), seen)
    student.register_forward_hook(as_v)
    found = terms(KD.of(family(), student, teacher, {}, knobs), seen)
    assert plain_answer["output"].value.min() > 1e-2 and found["output"].value.abs().max() < 1e-5
    like_v = terms(KD.of(family("v_prediction"), student, teacher, {}, replace(knobs, prediction=None)), seen)
    torch.testing.assert_close(found["task"].value, like_v["task"].value)
    torch.testing.assert_close(torch.as_tensor(found["task"].weight), torch.as_tensor(like_v["task"].weight))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_teachers_own_way_is_its_samplers(prediction: Prediction) -> None:
    """The student is asked wherever DDIM with trailing timesteps stands while it draws with the teacher."""
    method, given = kd(Knobs(task=0, feature=0.5, timesteps=Timesteps("own_way", 4)), prediction), batch()
    asked: list[tuple[Tensor, Tensor]] = []
    student = method.players["student"].module
    assert isinstance(student, Tapped)
    student.module.register_forward_pre_hook(lambda net, args: asked.append((args[0], args[1])))
    found = terms(method, given)
    assert set(found) == {*NAMES} - {"task"}
    ((x_t, t),) = asked
    sampler = DDIMScheduler.from_config(
        scheduler(prediction).config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False
    )
    sampler.set_timesteps(4)
    assert t.tolist() == sampler.timesteps.repeat_interleave(3).tolist()
    walked, apart = DRAW.normal("noise", (4, 8, 8)), torch.zeros(3)
    with torch.no_grad():
        for place, now in enumerate(sampler.timesteps):
            torch.testing.assert_close(x_t[3 * place : 3 * place + 3], walked, atol=1e-4, rtol=1e-4)
            mine, teacher = (net(walked, now, **given.condition).sample for net in (unet(1, 0), unet(2, 1)))
            apart += each(mine, teacher) / 4
            walked = sampler.step(teacher, now, walked).prev_sample
    torch.testing.assert_close(found["output"].value.detach(), apart, atol=1e-4, rtol=1e-4)


def test_outputs_are_compared_as_what_is_asked_for() -> None:
    """Between two answers of epsilon, the distance of what they mean for v: further apart where there is more noise."""
    given, plainly, as_v = batch(), Knobs(task=0, feature=0), Knobs(task=0, feature=0, compared_as="v_prediction")
    (epsilon,), (v,) = (terms(kd(knobs), given).values() for knobs in (plainly, as_v))
    *_, t = drawn(given)
    torch.testing.assert_close(v.value, epsilon.value / scheduler().alphas_cumprod[t], rtol=1e-3, atol=1e-6)
