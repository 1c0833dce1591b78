"""The stage `decoder`: a pipeline with a small autoencoder that has learned from its teacher's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from torchvision.models import alexnet

from decant.data.folder import Folder
from decant.errors import UserError
from decant.methods.decoder import LATENT, PICTURE, REAL, TAUGHT
from decant.models.families.latents import has_encoder
from decant.models.load import load
from decant.recipe.runner import run_stage
from decant.scenes.folder import draw_folder
from decant.stages import decoder, distill
from decant.stages.decodings import Decoding
from decant.stages.samples import Sampling
from decant.stages.stage import Inputs

FEW: dict[str, Any] = {
    "steps": 2, "batch_size": 8, "width": 8, "blocks": [1, 1, 1, 1], "held_out_most": 4, "latency_repeats": 1,
    "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decoder") / "pictures"
    draw_folder(folder, 40, "train", 0)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def made(data: Path, out: Path, cache: Path | None = None, teacher: str = "scenes", **settings: Any) -> dict[str, Any]:
    models: dict[str, str | Path] = {"teacher": teacher}
    asked: dict[str, Any] = {"teacher": teacher, "models": models, "data": data, "seed": 0, "cache": cache}
    return run_stage("decoder", decoder.STAGE, {**FEW, **settings}, **asked, out=out, talk=print)


def test_a_short_run_brings_it_nearer_and_leaves_the_rest(data: Path, cache: Path, tmp_path: Path) -> None:
    before = made(data, tmp_path / "begun", cache, steps=1, learning_rate=1e-9)
    after = made(data, tmp_path / "done", cache, steps=80, learning_rate=1e-2)
    first, last = (record["held_out"]["psnr_student"]["value"] for record in (before, after))
    assert last > first + 4 and after["held_out"]["psnr_teacher"]["value"] > 30, (first, last)
    student, teacher = load(tmp_path / "done"), load("scenes")
    assert isinstance(student.vae, AutoencoderTiny) and has_encoder(student.vae)
    for part in ("unet", "text_encoder"):
        own, theirs = (getattr(each, part).state_dict() for each in (student, teacher))
        assert all(torch.equal(own[name], theirs[name]) for name in theirs)
    picture = (np.asarray(Image.open(sorted(data.glob("*.png"))[0]), dtype=np.float32) / 127.5 - 1).transpose(2, 0, 1)
    with torch.no_grad():
        latents = [
            vae.encode(torch.from_numpy(picture)[None])
            for vae in (student.vae, teacher.vae, AutoencoderTiny.from_pretrained(tmp_path / "begun" / "vae"))
        ]
    goal = latents[1].latent_dist.mean * teacher.vae.config.scaling_factor
    ours, untrained = ((each.latents - goal).square().mean() for each in (latents[0], latents[2]))
    assert ours < 0.7 * untrained


def test_the_record_and_the_card_tell_what_it_is(data: Path, cache: Path, tmp_path: Path) -> None:
    record = made(data, tmp_path / "small", cache)
    both = record["decoder"]
    assert both["student"]["class"] == "AutoencoderTiny" and both["teacher"]["class"] == "AutoencoderKL"
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "small")
    assert both["student"]["parameters"] == sum(p.numel() for p in plain.vae.decoder.parameters())
    for figures in both.values():
        assert figures["latency_ms"]["n"] == 1 and figures["measured"]["batch_size"] == 1
    assert record["held_out"]["n"] == 4 and record["data"]["used"] > 30
    assert record["lineage"] == [] and record["figures"]["parameters"] == 11_273_924
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"{both['student']['parameters']:,} parameters" in card and "dB" in card


def test_a_student_keeps_it_when_it_is_distilled_on(data: Path, cache: Path, tmp_path: Path) -> None:
    """What it learns from is encoded by the teacher's; what it ships and draws its evaluations with is its own."""
    made(data, tmp_path / "small", cache, encoder=0)
    asked: dict[str, Any] = {"teacher": "scenes", "data": data, "seed": 0, "cache": cache}
    few = {"steps": 1, "batch_size": 2, "feature": 0, "held_out_most": 2, "evaluate_every": 1, "evaluate_images": 2,
           "sample_steps": 1, "device": "cpu"}  # fmt: skip
    models: dict[str, str | Path] = {"small": tmp_path / "small"}
    run_stage("distill", distill.STAGE, few, models=models, **asked, out=tmp_path / "on", talk=print)
    own, before = (load(tmp_path / name).vae.state_dict() for name in ("on", "small"))
    assert own.keys() == before.keys() and all(torch.equal(own[name], before[name]) for name in own)


def test_without_its_encoder_it_decodes_alone(data: Path, cache: Path, tmp_path: Path) -> None:
    record = made(data, tmp_path / "small", cache, encoder=0)
    assert not has_encoder(load(tmp_path / "small").vae)
    assert "encoder" not in record["training"][0]["losses"]


def test_what_it_learns_from_is_what_diffusers_decodes(data: Path, tmp_path: Path) -> None:
    """Rows of pictures, and of latents that the teacher drew, against the teacher's pipeline itself."""
    teacher = load("scenes")
    sampling = Sampling("samples", 2, 3.0, 0)
    decoding = Decoding(teacher, 64, sampling, torch.device("cpu"))
    part = Folder(data).scan().first(3)
    rows = decoding.of(part, Inputs("scenes", {"teacher": "scenes"}, data, 0, tmp_path), "some", n=2)
    assert rows.n == 5
    batch = rows.batch((0, 1, 2, 3, 4))
    assert batch.beside[REAL].tolist() == [1, 1, 1, 0, 0]
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(file))).movedim(2, 0) for file in part.files])
    assert torch.equal(batch.beside[PICTURE][:3], pixels)
    scale = teacher.vae.config.scaling_factor
    with torch.no_grad():
        posterior = teacher.vae.encode(pixels.float() / 127.5 - 1).latent_dist
        decoded = teacher.vae.decode(batch.beside[LATENT] / scale).sample
    assert torch.allclose(batch.mean[:3], posterior.mean * scale, atol=1e-4)
    away = (batch.beside[LATENT][:3] - batch.mean[:3]) / (posterior.std * scale)
    assert 0.8 < away.std() < 1.2, "drawn from the posterior"
    as_bytes = ((decoded.clamp(-1, 1) + 1) * 127.5).round()
    assert (as_bytes - batch.beside[TAUGHT].float()).abs().max() <= 1
    teacher.set_progress_bar_config(disable=True)
    again = rows.batch((5, 8))
    assert torch.equal(again.beside[LATENT], batch.beside[LATENT][[0, 3]]), "an epoch later they are the same"


def test_every_view_of_a_picture_has_its_turn(data: Path, cache: Path, tmp_path: Path) -> None:
    record = made(data, tmp_path / "small", cache, crops=2, flip=True, ema=0.9, distance="huber", edges=0.1, samples=3,
                  sample_steps=1)  # fmt: skip
    assert record["data"]["drawn"] == 3
    assert {"picture", "taught", "edges", "encoder"} == record["training"][0]["losses"].keys()


def test_sdxl_gets_one_too(data: Path, sdxl_saved: Path, tmp_path: Path) -> None:
    made(data, tmp_path / "small", teacher=str(sdxl_saved))
    plain = StableDiffusionXLPipeline.from_pretrained(tmp_path / "small")
    assert isinstance(plain.vae, AutoencoderTiny) and plain.vae.config.scaling_factor == 1.0
    plain.set_progress_bar_config(disable=True)
    assert plain("a", num_inference_steps=1, output_type="np").images.shape == (1, 64, 64, 3)


def test_lpips_is_a_term_where_its_weights_are(
    data: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match="LPIPS"):
        made(data, tmp_path / "none", cache, perceptual=0.1)
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    torch.save(alexnet().state_dict(), tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth")
    record = made(data, tmp_path / "small", cache, perceptual=0.1)
    assert record["training"][0]["losses"]["perceptual"] > 0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"blocks": [3, 3, 1]}, "4 numbers"),
        ({"size": 60}, "multiple of 8"),
        ({"picture": 0, "taught": 0}, "one of them above 0"),
        ({"widht": 8}, "width"),
        ({"crops": 2, "aspect": "stretch"}, "crops"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], said: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        made(data, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_prompts_alone_and_other_latents_are_refused(
    data: Path, sdxl_saved: Path, make_sdxl: Callable[..., Any], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"text": f"a circle {n}"} for n in range(20)]))
    with pytest.raises(UserError, match="prompts alone"):
        made(prompts, tmp_path / "out")
    asked: dict[str, Any] = {"teacher": "scenes", "models": {"xl": sdxl_saved}, "data": data, "seed": 0}
    with pytest.raises(UserError, match="StableDiffusionXLPipeline"):
        run_stage("decoder", decoder.STAGE, FEW, **asked, out=tmp_path / "out", talk=print)
    made(data, tmp_path / "small")
    with pytest.raises(UserError, match=r"AutoencoderTiny(.|\n)*AutoencoderKL"):
        made(data, tmp_path / "smaller", teacher=str(tmp_path / "small"))
