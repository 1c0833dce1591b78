"""The shipped attribute classifier: what it reads, and that its command makes one file."""

from importlib.resources import files
from pathlib import Path

import torch

from decant.scenes.classes import CLASSES, NOTHING, QUESTIONS, classes
from decant.scenes.classifier.network import FEATURES, features, shipped
from decant.scenes.world import draw_scene
from decant.stages.classifier import accuracy, renders, spoiled, standardise, train_classifier


def test_it_reads_every_attribute_of_held_out_renders() -> None:
    pictures, asked = renders(400, "held-out", first_seed=5_000_000)
    noisy = spoiled(pictures, torch.Generator().manual_seed(1))
    for shown in (pictures, noisy):
        right = accuracy(shipped(), shown, asked)
        assert right.keys() == {"shape", "colour", "size", "background", "arrangement"}
        assert min(right.values()) > 0.95, right


def test_features_do_not_depend_on_the_chunk() -> None:
    pictures, _ = renders(20, "held-out", first_seed=6_000_000)
    network = shipped()
    whole, single = features(network, pictures), features(network, pictures, chunk=1)
    assert whole.shape == (20, FEATURES)
    assert torch.allclose(whole, single, atol=1e-4)


def test_features_are_of_size_one() -> None:
    given = features(shipped(), renders(500, "train", first_seed=7_000_000)[0])
    assert given.mean(dim=0).abs().max() < 0.3
    assert 0.8 < given.std(dim=0).min() <= given.std(dim=0).max() < 1.2


def test_standardising_leaves_the_answers() -> None:
    network, (pictures, _) = shipped(), renders(40, "train")
    before = network.answers(features(network, pictures))
    network.body[-1].weight.mul_(7)
    network.head.weight.div_(7)
    network.body[-1].bias.mul_(7)
    standardise(network, pictures)
    after = network.answers(features(network, pictures))
    assert all(torch.allclose(a, b, atol=1e-2) for a, b in zip(before, after, strict=True))
    assert torch.allclose(features(network, pictures).std(dim=0), torch.ones(FEATURES), atol=1e-3)


def test_it_is_small() -> None:
    file = Path(str(files("decant.scenes.classifier") / "classifier.safetensors"))
    assert file.stat().st_size <= 2_000_000


def test_its_training_is_a_function_of_its_settings(tmp_path: Path) -> None:
    made = [train_classifier(tmp_path / name, lambda line: None, pictures=40, steps=2, tested=10) for name in "ab"]
    assert made[0].read_bytes() == made[1].read_bytes()


def test_both_ways_to_tell_a_scene_have_the_same_classes() -> None:
    for seed in range(50):
        scene = draw_scene(seed, "train")
        row = classes(scene)
        assert row == classes(scene.mirrored())
        assert len(row) == len(CLASSES) == len(QUESTIONS)
        assert all(number == NOTHING or 0 <= number < n for number, n in zip(row, CLASSES, strict=True))
        assert (NOTHING in row) == (len(scene.things) == 1)
