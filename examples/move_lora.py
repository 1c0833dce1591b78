"""A new colour for the scenes teacher, as a LoRA; then moved to its students by `decant move`, untrained, and measured.

    python examples/move_lora.py train --out runs/amber            minutes on one core
    python examples/move_lora.py measure --lora runs/amber/lora.safetensors --out runs/amber --students DIR DIR ...

The world has no amber, the teacher was never told the word. The checker reads pictures with one colour more in its
palette, between orange and yellow, and the thresholds that it always has.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from decant.metrics.interval import wilson
from decant.models.generate import generate
from decant.models.load import load
from decant.scenes.captions import caption
from decant.scenes.checker import read, score
from decant.scenes.render import COLOUR_RGB, render
from decant.scenes.world import Scene, Split, scenes
from decant.stages.move import move_lora_file

NAME, RGB = "amber", (248, 180, 20)
COLOURS = {**COLOUR_RGB, NAME: RGB}
# The same with amber's neighbours nearer to it: what is still read as amber is amber beyond doubt.
NEARER = {
    name: tuple(round(0.6 * a + 0.4 * b) for a, b in zip(COLOURS[name], RGB, strict=True))
    for name in ("orange", "yellow")
}
STRICT = {**COLOURS, **NEARER}
PAINTS = (RGB, (250, 190, 25), (250, 200, 30), (250, 170, 15))
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
WORDS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def recoloured(n: int, split: Split, first_seed: int) -> Iterator[tuple[int, Scene]]:
    """Scenes of a split whose first thing is amber."""
    for seed, scene in scenes(n, split, first_seed):
        first, *rest = scene.things
        yield seed, replace(scene, things=(replace(first, colour=NAME), *rest))


def lessons(pipeline: StableDiffusionPipeline, n: int) -> tuple[Tensor, list[str]]:
    """Latents (N, 4, 8, 8) and captions: what the autoencoder shows as amber, and a third as many old scenes.

    It was trained on eight colours, and on gray it shows this one as orange: there it is given a yellower paint.
    """
    told = [*recoloured(n, "train", 0), *scenes(n // 3, "train", n)]
    found: dict[int, Tensor] = {}
    for paint in PAINTS:
        left = [number for number in range(len(told)) if number not in found]
        palette = {**COLOURS, NAME: paint}
        for begin in range(0, len(left), 64):
            part = left[begin : begin + 64]
            latents, seen = returned(pipeline, [render(told[i][1], told[i][0], palette) for i in part])
            for i, latent, picture in zip(part, latents, seen, strict=True):
                if score(read(picture, STRICT), told[i][1]).exact:
                    found[i] = latent
    kept = sorted(found)
    return torch.stack([found[i] for i in kept]), [caption(told[i][1], told[i][0]) for i in kept]


@torch.no_grad()
def returned(pipeline: StableDiffusionPipeline, pictures: list[Any]) -> tuple[Tensor, Any]:
    """Scaled latents (N, 4, 8, 8) of pictures, and what they are decoded to, uint8 (N, 64, 64, 3)."""
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = pipeline.vae.encode(pixels).latent_dist.mean
    decoded = pipeline.vae.decode(latents).sample.add(1).mul(127.5).round().clamp(0, 255).byte()
    return latents * pipeline.vae.config.scaling_factor, decoded.permute(0, 2, 3, 1).numpy()


def train(
    out: Path,
    steps: int,
    rank: int,
    lr: float,
    begin: Path | None = None,
    seed: int = 0,
    pictures: int = 2400,
) -> Path:
    """A LoRA of UNet and text encoder on the teacher's own loss, in diffusers' format."""
    torch.manual_seed(seed)
    pipeline = load("scenes")
    latents, captions = lessons(pipeline, pictures)
    print(f"{len(captions)} pictures that the autoencoder keeps", flush=True)
    networks = pipeline.unet.requires_grad_(False), pipeline.text_encoder.requires_grad_(False)
    if begin is None:
        for network, targets in zip(networks, (ATTENTION, WORDS), strict=True):
            network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    else:
        pipeline.load_lora_weights(str(begin))
    for network in networks:
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("lora_" in name)
    trained = [p for network in networks for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    noise_schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    for step in range(1, steps + 1):
        chosen = torch.randint(0, len(captions), (16,))
        # Only old scenes are learnt without words too: guidance must not lead away from what is new.
        words = ["" if torch.rand(()) < 0.4 and NAME not in captions[i] else captions[i] for i in chosen]
        ids = pipeline.tokenizer(words, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise, t = torch.randn(16, *latents.shape[1:]), torch.randint(0, 1000, (16,))
        x_t = noise_schedule.add_noise(latents[chosen], noise, t)
        loss = (pipeline.unet(x_t, t, pipeline.text_encoder(ids)[0]).sample - noise).square().mean()
        loss.backward()
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}  loss {float(loss.detach()):.4f}", flush=True)
            save(networks, out)
    return save(networks, out)


def save(networks: tuple[Any, Any], out: Path) -> Path:
    """Both networks' layers as diffusers writes them."""
    unet, text = (get_peft_model_state_dict(network, adapter_name=network.active_adapters()[0]) for network in networks)
    out.mkdir(parents=True, exist_ok=True)
    StableDiffusionPipeline.save_lora_weights(out, unet, text, weight_name="lora.safetensors")
    return out / "lora.safetensors"


def right(pipeline: StableDiffusionPipeline, n: int, lora: str | Path | None) -> dict[str, Any]:
    """How many pictures of held-out scenes with something amber show all that their captions say; and the colour."""
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
    told = list(recoloured(n, "held-out", 1_000_000))
    captions, seeds = [caption(scene, seed) for seed, scene in told], [seed for seed, _ in told]
    drawn = generate(pipeline, captions, seeds, steps=25, guidance_scale=4.0)
    results = [score(read(picture, COLOURS), scene) for picture, (_, scene) in zip(drawn, told, strict=True)]
    exact, colour = sum(r.exact for r in results), sum(r.attributes["colour"] for r in results)
    return {"right": wilson(exact, n).to_json(), "colour": wilson(colour, n).to_json()}


def measure(lora: Path, students: list[Path], out: Path, n: int) -> list[dict[str, Any]]:
    """Teacher and students, each with the LoRA (moved where it must be) and without."""
    rows = [{"model": "teacher", "without": right(load("scenes"), n, None), "with": right(load("scenes"), n, lora)}]
    for student in students:
        file = out / f"{student.name}.safetensors"
        file.unlink(missing_ok=True)
        file.with_name(f"{file.stem}-kohya.safetensors").unlink(missing_ok=True)
        moved = move_lora_file(lora, str(student), file)
        row = {"model": student.name, "without": right(load(student), n, None), "with": right(load(student), n, file)}
        rows.append({**row, "modules": moved["modules"], "moved": moved["moved"]})
        rows[-1]["dropped_share"] = sum(part["share"] for part in moved["dropped"]) + moved["narrowed_share"]
    return rows


def table(rows: list[dict[str, Any]], share: Callable[[dict[str, Any]], str]) -> str:
    """One line a model."""
    head = "| model | modules moved | norm moved, % | right with it, % | amber with it, % | right without, % |"
    lines = [head, "|" + "---|" * 6]
    for row in rows:
        moved = f"{row['moved']} of {row['modules']}" if "moved" in row else "all"
        kept = f"{100 * (1 - row.get('dropped_share', 0)):.0f}"
        cells = (share(row["with"]["right"]), share(row["with"]["colour"]), share(row["without"]["right"]))
        lines.append(f"| {row['model']} | {moved} | {kept} | {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(share: dict[str, Any]) -> str:
    """A share with its 95 % interval."""
    return f"{100 * share['value']:.1f} ({100 * share['low']:.1f}-{100 * share['high']:.1f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["train", "measure"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--begin", type=Path, help="go on from this LoRA")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=2400)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--students", type=Path, nargs="*", default=[])
    parser.add_argument("--images", type=int, default=128)
    args = parser.parse_args()
    if args.verb == "train":
        file = train(args.out, args.steps, args.rank, args.lr, args.begin, args.seed, args.pictures)
        how = f"{args.steps} steps of 16, rank {args.rank}"
        (args.out / "trained.json").write_text(json.dumps({"how": how, "after": str(args.begin or "")}))
        print(file)
    else:
        found = measure(args.lora, args.students, args.out, args.images)
        how = json.loads((args.lora.parent / "trained.json").read_text())["how"]
        document = {"images": args.images, "how": how, "table": table(found, percent), "models": found}
        (args.out / "measured.json").write_text(json.dumps(document, indent=1))
        print(document["table"])
