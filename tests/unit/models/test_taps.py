"""Taps: what they capture, when they do not, and that they leave nothing behind."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from decant.errors import UserError
from decant.models.taps import Tapped, tap

NAMES = ["down_blocks.1", "mid_block", "up_blocks.0", "down_blocks.0.attentions.1.proj_out"]
INSIDE = "down_blocks.1.resnets.1.conv1"


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64, 64, 64), cross_attention_dim=16, attention_head_dim=4
    )


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(2, 4, 8, 8, generator=generator)
    return x_t, torch.tensor([3, 900]), torch.randn(2, 5, 16, generator=generator)


def plain_hooks(net: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """The same outputs by hand, as the independent word."""
    seen: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        seen[name] = output[0] if isinstance(output, tuple) else output

    handles = [net.get_submodule(name).register_forward_hook(partial(note, name)) for name in names]
    net(*inputs())
    for handle in handles:
        handle.remove()
    return seen


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def reentrant(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=True)


def test_output_and_features_are_the_modules_own() -> None:
    net = unet()
    expected, output = plain_hooks(net, NAMES), net(*inputs()).sample
    with tap(net, NAMES) as tapped:
        mine, features = tapped(*inputs())
    assert torch.equal(mine, output)
    assert list(features) == NAMES
    assert all(torch.equal(features[name], expected[name]) for name in NAMES)


def test_tuple_outputs_of_the_network_are_unwrapped() -> None:
    net = unet()
    output, _ = tap(net, ["mid_block"])(*inputs(), return_dict=False)
    assert torch.equal(output, net(*inputs()).sample)


def test_close_leaves_no_hook() -> None:
    net = unet()
    tapped = tap(net, NAMES)
    assert any(module._forward_hooks for module in net.modules())
    assert tapped.close() is net
    assert not any(module._forward_hooks for module in net.modules())


def test_nothing_is_kept_or_recorded_outside_the_tapped_call() -> None:
    net = unet()
    tapped = tap(net, NAMES)
    _, features = tapped(*inputs())
    before = {name: feature.clone() for name, feature in features.items()}
    net(*(value * 2 for value in inputs()))
    assert all(torch.equal(features[name], before[name]) for name in NAMES)
    assert not tapped._recorder.features


def test_parameters_keep_their_names_behind_module() -> None:
    net = unet()
    assert [name for name, _ in tap(net, NAMES).named_parameters()] == [
        f"module.{name}" for name, _ in net.named_parameters()
    ]


def test_unknown_module_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'down_blocks"):
        tap(unet(), ["down_block.1"])


@pytest.mark.parametrize("name", [*NAMES, INSIDE])
def test_gradients_are_the_same_with_checkpointing(name: str) -> None:
    plain, saving = unet().train(), unet().train()
    saving.enable_gradient_checkpointing()
    for net in (plain, saving):
        with tap(net, [name]) as tapped:
            _, features = tapped(*inputs())
            features[name].square().mean().backward()
    expected, found = gradients(plain), gradients(saving)
    assert expected.keys() == found.keys() and expected
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-4)


def test_recomputation_in_the_backward_pass_is_not_recorded() -> None:
    net = unet().train()
    net.enable_gradient_checkpointing()
    with tap(net, [INSIDE]) as tapped:
        fired: list[bool] = []
        net.get_submodule(INSIDE).register_forward_hook(lambda *_: fired.append(tapped._recorder.recording))
        output, features = tapped(*inputs())
        first = features[INSIDE]
        (output.mean() + first.mean()).backward()
    assert fired == [True, False]
    assert not tapped._recorder.features


def test_block_outputs_survive_reentrant_checkpointing() -> None:
    net = unet().train()
    net.enable_gradient_checkpointing(reentrant)
    x_t, t, text = inputs()
    _, features = tap(net, NAMES)(x_t.requires_grad_(), t, text)
    features["down_blocks.1"].mean().backward()
    assert net.down_blocks[1].downsamplers[0].conv.weight.grad.abs().sum() > 0


def test_a_feature_detached_by_reentrant_checkpointing_raises() -> None:
    net = unet().train()
    net.enable_gradient_checkpointing(reentrant)
    tapped = tap(net, [INSIDE])
    with pytest.raises(RuntimeError, match="would train nothing"):
        tapped(*inputs())
    with torch.no_grad():
        tapped(*inputs())


def test_a_frozen_module_inside_reentrant_checkpointing_raises_too() -> None:
    net = unet().train()
    net.enable_gradient_checkpointing(reentrant)
    net.get_submodule(INSIDE).requires_grad_(False)
    with pytest.raises(RuntimeError, match="would train nothing"):
        tap(net, [INSIDE])(*inputs())


def test_a_frozen_teacher_needs_no_gradient() -> None:
    net = unet().requires_grad_(False)
    _, features = tap(net, NAMES)(*inputs())
    assert not any(feature.requires_grad for feature in features.values())


def test_a_hook_that_never_fires_is_an_error() -> None:
    net = unet()
    tapped = tap(net, NAMES)
    tapped.close()
    with pytest.raises(RuntimeError, match="never fired"):
        tapped(*inputs())


def test_a_failed_forward_does_not_leave_the_tap_recording() -> None:
    net = unet()
    tapped = tap(net, NAMES)
    with pytest.raises(RuntimeError):
        tapped(torch.randn(2, 3, 8, 8), *inputs()[1:])
    net(*inputs())
    assert not tapped._recorder.features


def test_a_deep_copy_taps_itself() -> None:
    tapped = tap(unet(), NAMES)
    twin = copy.deepcopy(tapped)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    _, theirs = tapped(*inputs())
    _, mine = twin(*inputs())
    assert not any(torch.equal(mine[name], theirs[name]) for name in NAMES)
    assert not any(module._forward_hooks for module in twin.close().modules())
    assert any(module._forward_hooks for module in tapped.module.modules())


class Small(nn.Module):
    """Few operations, so that compiling takes a second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.second(torch.relu(self.first(x))),)


def test_compiled_taps_give_what_eager_ones_give() -> None:
    torch.manual_seed(0)
    tapped = tap(Small(), ["first", "second"])
    x = torch.randn(3, 4)
    expected_output, expected = tapped(x)
    compiled = torch.compile(tapped, backend="aot_eager")
    for _ in range(2):
        output, features = compiled(x)
        torch.testing.assert_close(output, expected_output)
        torch.testing.assert_close(features, expected)
    features["first"].sum().backward()
    assert tapped.module.first.weight.grad.abs().sum() > 0
    torch._dynamo.reset()


def test_a_compiled_unet_is_still_tapped() -> None:
    net = unet().eval()
    tapped = tap(net, NAMES)
    with torch.no_grad():
        expected_output, expected = tapped(*inputs())
        output, features = torch.compile(tapped, backend="aot_eager")(*inputs())
    torch.testing.assert_close(output, expected_output, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)
    torch._dynamo.reset()


def test_tapped_under_ddp_reaches_the_gradients(tmp_path: Any) -> None:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        tapped: Tapped = tap(Small(), ["first"])
        wrapped = nn.parallel.DistributedDataParallel(tapped, find_unused_parameters=True)
        _, features = wrapped(torch.randn(3, 4))
        features["first"].sum().backward()
        assert tapped.module.first.weight.grad.abs().sum() > 0
    finally:
        torch.distributed.destroy_process_group()
