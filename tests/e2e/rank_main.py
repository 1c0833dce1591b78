"""One rank of a command line: what test_ranks starts, without a launcher's or another import's seconds."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import Decoder, Encoder
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

import decant.cli.main
import decant.cli.work
from decant.ranks import here


def rank_main(rank: int, count: int, port: int, words: list[str], where: Path) -> None:
    """``decant WORDS`` in ``where``, with its output in ``stdout-RANK`` and ``stderr-RANK``, and in ``rows-RANK`` how
    many pictures its VAE has encoded and decoded.
    """
    os.chdir(where)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{name}-{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    if count > 1:  # what a launcher sets
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in own.items()})
    here.cache_clear()
    torch.set_num_threads(1)
    rows: Counter[str] = Counter()

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, Encoder | Decoder):
            rows[type(module).__name__] += len(inputs[0])

    register_module_forward_pre_hook(note)
    try:
        decant.cli.main.main(words)
    finally:
        Path(f"rows-{rank}").write_text(json.dumps(rows))
        sys.stdout.flush()
