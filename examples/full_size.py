"""Two optimiser steps at full size: SD 1.5's configuration with random weights, 256 px, on whatever is here.

    python examples/full_size.py WORK [RESULT.json]

Writes a full-size pipeline folder (4.3 GB) and forty pictures into WORK, distils BK-SDM Tiny from it for two steps by
the preset, and records the peak memory of that process. Random weights are right for counts, speed and memory only.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from decant.bench.machine import machine
from decant.models.load import architecture
from decant.models.scenes_teacher import assemble, new_tokenizer
from decant.scenes.folder import draw_folder

VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 512,
}
TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SETTINGS = [
    "tiny.steps=2 tiny.size=256 tiny.batch_size=1 tiny.accumulation=1 tiny.ema=null tiny.held_out=0.2",
    "evaluate.images=1 evaluate.steps=1 evaluate.size=256 evaluate.latency_repeats=1 evaluate.captions=data",
    "evaluate.held_out=0.2",
]


def make_teacher(folder: Path) -> None:
    """SD 1.5 as plain diffusers saves it, weights random."""
    torch.manual_seed(0)
    tokenizer = new_tokenizer(["a picture of a thing"])
    tokenizer.model_max_length = 77
    text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, eos_token_id=tokenizer.eos_token_id, **TEXT))
    unet = UNet2DConditionModel.from_config(architecture("sd15"))
    assemble(unet, AutoencoderKL(**VAE), text, tokenizer).save_pretrained(folder)


def main(work: Path, result: Path | None) -> None:
    """Make what is missing, run the preset in a process of its own, and print its peak memory and time."""
    teacher, data, out = work / "sd15", work / "data", work / "run"
    if not (teacher / "model_index.json").is_file():
        make_teacher(teacher)
    if not data.is_dir():
        draw_folder(data, 40, "train")
    sets = [word for line in SETTINGS for setting in line.split() for word in ("--set", setting)]
    places = ["--teacher", str(teacher), "--data", str(data), "--out", str(out)]
    begin = time.time()
    child = subprocess.Popen([sys.executable, "-m", "decant.cli.main", "run", "bk-sdm-tiny", *places, *sets])
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, f"the run failed with status {status}"
    record = json.loads((out / "02-tiny" / "decant.json").read_text())
    figures = {
        "peak_memory_mb": round(usage.ru_maxrss * 1024 / 1e6),
        "seconds": round(time.time() - begin, 1),
        "distill_seconds": record["seconds"],
        "losses": record["training"],
        "student_parameters": record["figures"]["parameters"],
        "machine": machine(),
    }
    print(json.dumps(figures, indent=1))
    if result is not None:
        result.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
