"""A ControlNet that tells the scenes teacher where things stand; then moved to students, untrained, and measured.

    python examples/move_controlnet.py train --out runs/where          minutes on one core
    python examples/move_controlnet.py measure --controlnet runs/where/controlnet --out runs/where --students DIR ...

Captions of scenes never say where on the grid a thing stands, and of a pair only which side. The map marks every thing
with a white disc on black. By chance one picture in nine has its things there.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, DDIMScheduler, DDPMScheduler, StableDiffusionControlNetPipeline
from move_lora import percent
from numpy.typing import NDArray
from torch import Tensor

from decant.metrics.interval import wilson
from decant.models.load import load
from decant.scenes.captions import caption
from decant.scenes.checker import Reading, read, score
from decant.scenes.render import coverage, places, render
from decant.scenes.world import Scene, scenes
from decant.stages.move import move_controlnet_folder

NEAR_PX = 4.0
DISC_PX = 5.0
Picture = NDArray[np.uint8]


def marks(scene: Scene, seed: int) -> Tensor:
    """The map: (3, 64, 64) in [0, 1], a disc where each thing stands."""
    discs = [coverage("circle", DISC_PX, place) for place in places(scene, seed)]
    return torch.from_numpy(np.max(discs, axis=0)).float().expand(3, -1, -1)


def train(out: Path, steps: int, lr: float, begin: Path | None = None, seed: int = 0, pictures: int = 2000) -> Path:
    """Zhang et al. 2023: the teacher stays; a copy of its way down learns the map on the teacher's own loss."""
    torch.manual_seed(seed)
    pipeline = load("scenes")
    unet = pipeline.unet.requires_grad_(False)
    if begin is None:
        network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 32, 64))
    else:
        network = ControlNetModel.from_pretrained(begin)
    network.requires_grad_(True).train()
    told = list(scenes(pictures, "train"))
    latents, words = _encoded(pipeline, told)
    maps = torch.stack([marks(scene, seed) for seed, scene in told])
    empty = _words(pipeline, [""])[0]
    new = [parameter for name, parameter in network.named_parameters() if name.startswith("controlnet_")]
    copy = [parameter for name, parameter in network.named_parameters() if not name.startswith("controlnet_")]
    optimizer = torch.optim.AdamW([{"params": new, "lr": 5 * lr}, {"params": copy}], lr=lr)
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    for step in range(1, steps + 1):
        chosen = torch.randint(0, len(told), (16,))
        dropped = torch.rand(16, 1, 1) < 0.1
        hidden = torch.where(dropped, empty, words[chosen])
        # Where a thing stands is decided while there is much noise: more of the steps are there.
        noise, t = torch.randn(16, *latents.shape[1:]), (1000 * (1 - torch.rand(16).square())).long().clamp(0, 999)
        x_t = noise_schedule.add_noise(latents[chosen], noise, t)
        down, mid = network(x_t, t, hidden, maps[chosen], return_dict=False)
        given = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        loss = (unet(x_t, t, hidden, **given).sample - noise).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}  loss {float(loss.detach()):.4f}", flush=True)
            network.save_pretrained(out / "controlnet")
    network.save_pretrained(out / "controlnet")
    return out / "controlnet"


@torch.no_grad()
def _encoded(pipeline: Any, told: list[tuple[int, Scene]]) -> tuple[Tensor, Tensor]:
    """Latents (N, 4, 8, 8) and text embeddings (N, L, D) of scenes as they are drawn."""
    latents, words = [], []
    for begin in range(0, len(told), 64):
        part = told[begin : begin + 64]
        pixels = torch.from_numpy(np.stack([render(scene, seed) for seed, scene in part])).permute(0, 3, 1, 2)
        latents.append(pipeline.vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean)
        words.append(_words(pipeline, [caption(scene, seed) for seed, scene in part]))
    return torch.cat(latents) * pipeline.vae.config.scaling_factor, torch.cat(words)


@torch.no_grad()
def _words(pipeline: Any, captions: list[str]) -> Tensor:
    tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return pipeline.text_encoder(tokens.input_ids)[0]


def right(model: str | Path, n: int, controlnet: Path | None) -> dict[str, Any]:
    """How many pictures of held-out scenes have their things where the map says; and show all that is told as well."""
    drawing: Any = load(model)
    drawing.scheduler = DDIMScheduler.from_config(drawing.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    if controlnet is not None:
        parts = {**drawing.components, "controlnet": ControlNetModel.from_pretrained(controlnet)}
        drawing = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    drawing.set_progress_bar_config(disable=True)
    told = list(scenes(n, "held-out", 1_000_000))
    there, both, shown = 0, 0, 0
    for begin in range(0, n, 16):
        part = told[begin : begin + 16]
        drawn = _drawn(drawing, part, with_map=controlnet is not None)
        for picture, (seed, scene) in zip(drawn, part, strict=True):
            seen, exact = read(picture), score(read(picture), scene).exact
            stands = _stands(seen, read(render(scene, seed)))
            there, both, shown = there + stands, both + (stands and exact), shown + exact
    return {"there": wilson(there, n).to_json(), "both": wilson(both, n).to_json(), "right": wilson(shown, n).to_json()}


def _drawn(drawing: Any, part: list[tuple[int, Scene]], *, with_map: bool) -> list[Picture]:
    generators = [torch.Generator().manual_seed(seed) for seed, _ in part]
    maps = {"image": torch.stack([marks(scene, seed) for seed, scene in part])} if with_map else {}
    words = [caption(scene, seed) for seed, scene in part]
    asked = {"num_inference_steps": 25, "guidance_scale": 4.0, "generator": generators, "output_type": "np"}
    found = drawing(words, **asked, **maps).images
    return [(255 * picture).round().astype(np.uint8) for picture in found]


def _stands(seen: Reading, asked: Reading) -> bool:
    """As many things as were marked, and one near every mark (where the checker sees the middle of the drawn shape)."""
    near = [any(np.hypot(a.x - b.x, a.y - b.y) < NEAR_PX for a in seen.seen) for b in asked.seen]
    return len(seen.seen) == len(asked.seen) and all(near)


def measure(controlnet: Path, students: list[Path], out: Path, n: int) -> list[dict[str, Any]]:
    """Teacher and students, each with the ControlNet (moved where it must be) and without."""
    rows = [{"model": "teacher", "without": right("scenes", n, None), "with": right("scenes", n, controlnet)}]
    for student in students:
        folder = out / student.name
        shutil.rmtree(folder, ignore_errors=True)
        moved = move_controlnet_folder(controlnet, str(student), folder)
        row = {"model": student.name, "without": right(student, n, None), "with": right(student, n, folder)}
        rows.append({**row, "parameters": moved["parameters"], "parameters_before": moved["parameters_before"]})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line a model."""
    head = "| model | parameters moved | there, % | there and right, % | there without it, % | right without it, % |"
    lines = [head, "|" + "---|" * 6]
    for row in rows:
        kept = f"{100 * row['parameters'] / row['parameters_before']:.0f} %" if "parameters" in row else "all"
        cells = [row["with"]["there"], row["with"]["both"], row["without"]["there"], row["without"]["right"]]
        lines.append(f"| {row['model']} | {kept} | {' | '.join(map(percent, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["train", "measure"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--begin", type=Path, help="go on from this ControlNet")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--controlnet", type=Path)
    parser.add_argument("--students", type=Path, nargs="*", default=[])
    parser.add_argument("--images", type=int, default=128)
    args = parser.parse_args()
    if args.verb == "train":
        folder = train(args.out, args.steps, args.lr, args.begin, args.seed, args.pictures)
        (args.out / "trained.json").write_text(json.dumps({"how": f"{args.steps} steps of 16"}))
        print(folder)
    else:
        found = measure(args.controlnet, args.students, args.out, args.images)
        how = json.loads((args.controlnet.parent / "trained.json").read_text())["how"]
        document = {"images": args.images, "how": how, "table": table(found), "models": found}
        (args.out / "measured.json").write_text(json.dumps(document, indent=1))
        print(document["table"])
