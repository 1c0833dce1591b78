"""Weights that others trained and that this machine may hold: opened as weights and as nothing else."""

import pickle
from pathlib import Path

import torch

from decant.errors import refuse


def check_weights(name: str, file: Path) -> None:
    """A library opens such a file as any pickle: only one that holds weights and nothing else gets so far.

    Raises:
        UserError: it holds something else, or is damaged.
    """
    try:
        torch.load(file, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        hint = "save the file again from where it came"
        raise refuse(name, f"{file.name} is damaged, or more than weights", allowed="weights", hint=hint) from error
