"""Inception's features by torchmetrics, where its weights are on this machine; nothing is fetched."""

import importlib.util
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.image.fid import NoTrainInceptionV3

from decant.errors import refuse
from decant.pickles import check_weights

NAME = "Inception v3"
_FILE = "weights-inception-2015-12-05-6726825d.pth"
_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{_FILE}"


def inception() -> NoTrainInceptionV3:
    """The network whose 2,048 features the published FID figures use, in evaluation mode on the CPU.

    Raises:
        UserError: the package torch-fidelity or the weights are not here; the hint says how to get them.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        allowed = "the package torch-fidelity, which holds the network"
        raise refuse("Inception", "not installed", allowed=allowed, hint="pip install torch-fidelity")
    file = Path(torch.hub.get_dir()) / "checkpoints" / _FILE
    if not file.is_file():
        raise refuse("Inception", f"no {file.name}", allowed="its weights", hint=f"save {_URL} in {file.parent}")
    check_weights("Inception", file)
    return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file))


@torch.no_grad()
def inception_features(network: NoTrainInceptionV3, pictures: Tensor, chunk: int = 16) -> Tensor:
    """Features (n, 2048) of uint8 pictures (n, 3, H, W), brought to 299 x 299 by the network itself."""
    return torch.cat([network(part) for part in pictures.split(chunk)])
