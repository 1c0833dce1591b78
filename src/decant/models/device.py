"""Where to compute."""

from typing import Literal

import torch

from decant.errors import refuse

Device = Literal["auto", "cpu", "cuda", "mps"]


def pick(device: Device) -> torch.device:
    """The device that a setting means: ``auto`` is the accelerator if there is one.

    Raises:
        UserError: this machine has no such device.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = accelerator.type if accelerator else "cpu"
    if device not in ("auto", "cpu", here):
        raise refuse(
            "device",
            device,
            allowed=f"auto, cpu{'' if here == 'cpu' else ', ' + here}",
            hint="this machine has no such device",
        )
    return torch.device(here if device == "auto" else device)
