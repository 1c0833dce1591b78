"""Taps: the outputs of chosen modules, beside the output of the network they sit in.

A hook added after `torch.compile` never fires, and one under checkpointing fires again in the backward pass.
So hooks sit on module objects, are made once and before any wrapping, and record only while `Tapped.forward`
runs: what is recomputed later is not seen.
"""

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from decant.errors import nearest, refuse


class Tapped(nn.Module):
    """A network whose call gives `(output, features)`; made by `tap`, undone by `close` or by leaving a
    `with`.

    Parameters appear as `module.<name>`. The output is the plain tensor, also of networks that wrap theirs.
    """

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module = module
        self.names = tuple(dict.fromkeys(names))
        self._recorder = _Recorder()
        hooked = _find(module, self.names)
        self._handles = [hooked[name].register_forward_hook(_Hook(name, module, self._recorder)) for name in self.names]

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """One forward of the network: its output tensor, and the output of every tapped module by name.

        Raises:
            RuntimeError: when a feature carries no gradient though it should (re-entrant checkpointing
                detaches what is inside), or when a hook never fired.
        """
        self._recorder.start()
        try:
            output = first_tensor(self.module(*args, **kwargs))
        finally:
            features = self._recorder.stop()
        missing = [name for name in self.names if name not in features]
        if missing:
            raise RuntimeError(f"taps {missing} never fired: tap a network before it is compiled, and before close()")
        return output, {name: features[name] for name in self.names}

    def close(self) -> nn.Module:
        """Remove every hook and give the network back as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self.module

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def tap(module: nn.Module, names: Sequence[str]) -> Tapped:
    """Tap a network at the named modules. Do it once, before the network is compiled, wrapped or prepared.

    Raises:
        UserError: for a name that no module of the network has.
    """
    return Tapped(module, names)


def first_tensor(output: Any) -> Tensor:
    """The tensor of a module's output: itself, the first of a tuple, or a diffusers output's `sample`."""
    if isinstance(output, Mapping):
        output = output["sample"]
    while isinstance(output, tuple | list):
        output = output[0]
    assert isinstance(output, Tensor), f"a network should give a tensor, not {type(output).__name__}"
    return output


class _Recorder:
    """What one forward captured. Its own object, not the module, so that hooks and network copy as one."""

    def __init__(self) -> None:
        self.features: dict[str, Tensor] = {}
        self.recording = False
        self.grad = False

    def start(self) -> None:
        self.features = {}
        self.recording = True
        self.grad = torch.is_grad_enabled()

    def stop(self) -> dict[str, Tensor]:
        """What was captured; nothing of it is held on to afterwards."""
        features, self.features = self.features, {}
        self.recording = False
        return features


class _Hook:
    """A forward hook that puts its module's output on record."""

    def __init__(self, name: str, network: nn.Module, recorder: _Recorder) -> None:
        self.name = name
        self.network = network
        self.recorder = recorder

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not self.recorder.recording:
            return
        feature = first_tensor(output)
        if self.recorder.grad and not feature.requires_grad and self._should_train(module, inputs):
            raise RuntimeError(
                f"tap {self.name!r}: its output carries no gradient, so a loss on it would train nothing; "
                "use non-reentrant checkpointing (use_reentrant=False), or tap outside the checkpoint"
            )
        self.recorder.features[self.name] = feature

    def _should_train(self, module: nn.Module, inputs: tuple[Any, ...]) -> bool:
        """True when gradients ought to reach this module: by itself, by its inputs, or from further out."""
        # A re-entrant checkpoint runs its inside without gradients, so there the inputs no longer tell.
        around = module if torch.is_grad_enabled() else self.network
        through = any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
        return through or any(parameter.requires_grad for parameter in around.parameters())


def _find(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    modules = {name: child for name, child in module.named_modules() if name}
    for name in names:
        if name not in modules:
            raise refuse("tap", repr(name), allowed="a module of the network", hint=nearest(name, modules))
    return modules
