"""How far apart two pictures look: LPIPS (Zhang et al. 2018) on AlexNet by torchmetrics; nothing is fetched."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _NoTrainLpips

from decant.errors import refuse
from decant.pickles import check_weights

NAME = "LPIPS (AlexNet)"
_FILE = "alexnet-owt-7be5be79.pth"
_URL = f"https://download.pytorch.org/models/{_FILE}"


def lpips() -> nn.Module:
    """The network, in evaluation mode on the CPU.

    Raises:
        UserError: the package torchvision or AlexNet's weights are not here; the hint says how to get them.
    """
    if importlib.util.find_spec("torchvision") is None:
        allowed = "the package torchvision, which holds the network"
        raise refuse(NAME, "torchvision is not installed", allowed=allowed, hint="pip install torchvision")
    file = Path(torch.hub.get_dir()) / "checkpoints" / _FILE
    if not file.is_file():
        raise refuse(NAME, f"no {file.name}", allowed="its weights", hint=f"save {_URL} in {file.parent}")
    check_weights(NAME, file)
    return _NoTrainLpips(net="alex")


@torch.no_grad()
def lpips_distances(network: nn.Module, ours: Tensor, theirs: Tensor, chunk: int = 16) -> Tensor:
    """The distance (n,) of each picture, uint8 (n, 3, H, W) of 32 pixels or more, to the one at its place."""
    pairs = zip(ours.split(chunk), theirs.split(chunk), strict=True)
    return torch.cat([network(a / 127.5 - 1, b / 127.5 - 1).flatten() for a, b in pairs])
