"""One network, several roles: a LoRA for each, and none for the network itself."""

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


def act(net: nn.Module, role: str | None) -> None:
    """From here on ``net``, which may be wrapped, runs with the LoRA of that name alone, or with none.

    Which parameters require gradients stays as it is: peft would switch on those of the role.
    """
    for layer in (module for module in net.modules() if isinstance(module, BaseTunerLayer)):
        learning = {name: parameter.requires_grad for name, parameter in layer.named_parameters()}
        if role is not None:
            layer.set_adapter([role])
        layer._disable_adapters = role is None  # its own switch changes what requires gradients as well
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(learning[name])
