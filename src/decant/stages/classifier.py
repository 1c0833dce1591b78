"""Train the attribute classifier of scenes, whose features FID and KID use."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor, nn

from decant.scenes.classes import NOTHING, QUESTIONS, classes
from decant.scenes.classifier.network import NAME, AttributeClassifier, features
from decant.scenes.render import render
from decant.scenes.world import Split, draw_scene

Talk = Callable[[str], None]
PICTURES, STEPS, BATCH, LEARNING_RATE = 24_000, 1_800, 128, 2e-3
_TEST_SEED = 4_000_000


def renders(n: int, split: Split, first_seed: int = 0) -> tuple[Tensor, Tensor]:
    """Pictures uint8 (n, 3, 64, 64) of a split and their class numbers (n, 8)."""
    drawn = [(draw_scene(seed, split), seed) for seed in range(first_seed, first_seed + n)]
    pictures = torch.stack([torch.from_numpy(render(scene, seed)) for scene, seed in drawn])
    return pictures.permute(0, 3, 1, 2).contiguous(), torch.tensor([classes(scene) for scene, _ in drawn])


def spoiled(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Half of uint8 pictures (B, 3, 64, 64) softened, and noise on all: a network's pictures are not renders."""
    softness_px = float(torch.rand((), generator=generator) * 1.2)
    half = len(pictures) // 2
    soft = torch.from_numpy(ndimage.gaussian_filter(pictures[:half].float().numpy(), (0, 0, softness_px, softness_px)))
    noisy = torch.cat([soft, pictures[half:].float()])
    strength = 12 * torch.rand(len(pictures), 1, 1, 1, generator=generator)
    return (noisy + strength * torch.randn(noisy.shape, generator=generator)).round().clamp(0, 255)


def train_classifier(
    out: Path, talk: Talk, *, pictures: int = PICTURES, steps: int = STEPS, tested: int = 1000
) -> Path:
    """Train on renders of the training split and write ``out/classifier.safetensors``; minutes on one core.

    Everything is drawn from seed 0, so a machine writes the same file twice.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = AttributeClassifier().train()
    shown, asked = renders(pictures, "train")
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=steps + 1, pct_start=0.1)
    for step in range(steps):
        chosen = torch.randint(0, pictures, (BATCH,), generator=generator)
        answers = network.answers(network(spoiled(shown[chosen], generator)))
        losses = [nn.functional.cross_entropy(a, w) for a, w in zip(answers, asked[chosen].unbind(-1), strict=True)]
        loss = torch.stack(losses).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            talk(f"classifier  {step + 1}/{steps}  loss {loss.item():.4f}")
    standardise(network.eval(), shown[:2000])
    out.mkdir(parents=True, exist_ok=True)
    file = out / "classifier.safetensors"
    made = {"made_by": f"decant scenes train --classifier: {NAME}"}  # one key: their order would vary
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, file, made)
    for question, right in accuracy(network, *renders(tested, "held-out", _TEST_SEED)).items():
        talk(f"classifier  {question}: {right:.1%} of held-out renders")
    return file


@torch.no_grad()
def standardise(network: AttributeClassifier, pictures: Tensor) -> None:
    """Bring every feature to mean 0 and spread 1 on these pictures; the answers stay the same.

    KID's kernel (x.y / D + 1)^3 wants features of about that size.
    """
    last, head = network.body[-1], network.head
    assert isinstance(last, nn.Linear)
    given = features(network, pictures)
    mean, spread = given.mean(dim=0), given.std(dim=0)
    last.weight.div_(spread[:, None])
    last.bias.sub_(mean).div_(spread)
    head.bias.add_(head.weight @ mean)
    head.weight.mul_(spread)


def accuracy(network: AttributeClassifier, pictures: Tensor, asked: Tensor) -> dict[str, float]:
    """The share of right answers by attribute, both things together."""
    answers = network.answers(features(network, pictures))
    right: dict[str, list[Tensor]] = {}
    for question, answer, wanted in zip(QUESTIONS, answers, asked.unbind(-1), strict=True):
        there = wanted != NOTHING
        right.setdefault(question, []).append((answer.argmax(-1) == wanted)[there])
    return {question: float(torch.cat(each).float().mean()) for question, each in right.items()}
