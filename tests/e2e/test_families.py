"""Folders of SD 2.x and SDXL that diffusers wrote, through every verb, as an SD 1.x folder goes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from decant.cli.main import main
from decant.data.source import read
from decant.models.families.of import family_of
from decant.models.layout import networks
from decant.models.load import architecture, load, save, with_unet
from decant.models.untrained import TextToImage, untrained
from decant.scenes.folder import draw_folder
from decant.stages.encode import encode_data
from decant.stages.stage import Inputs

UNET = "unet/diffusion_pytorch_model.safetensors"
QUICK = (
    "steps=3",
    "batch_size=2",
    "learning_rate=1e-3",
    "held_out=0.4",
    "sample_every=3",
    "sample_steps=1",
    "device=cpu",
)


def decant(*words: object) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert left.value.code == 0


def told(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    decant(*words, "--json")
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen scenes, two of them of another size and not square."""
    folder = draw_folder(tmp_path_factory.mktemp("data") / "pictures", 16, "train")
    for file, size in zip(sorted(folder.glob("*.png")), [(100, 64), (64, 150)], strict=False):
        Image.open(file).resize(size).save(file)
    return folder


@pytest.fixture(scope="module")
def student(sdxl_saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny SDXL with another UNet, as surgery would leave it: one transformer block fewer in each attention."""
    teacher: Any = load(sdxl_saved)
    torch.manual_seed(5)
    smaller = {**teacher.unet.config, "transformer_layers_per_block": [1, 1, 1]}
    out = tmp_path_factory.mktemp("cut") / "student"
    save(with_unet(teacher, type(teacher.unet).from_config(smaller).eval()), out)
    return out


@pytest.fixture(scope="module")
def distilled(sdxl_saved: Path, student: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("distilled") / "student"
    words = [word for setting in (*QUICK, "feature=0", "caption_dropout=0.3") for word in ("--set", setting)]
    decant("distill", "--teacher", sdxl_saved, "--student", student, "--data", data, "--out", out, *words)
    return out


def test_sdxl_is_distilled(sdxl_saved: Path, student: Path, distilled: Path) -> None:
    before, after = load_file(student / UNET), load_file(distilled / UNET)
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
    changed = [name for name in before if "add_embedding" in name and not torch.equal(before[name], after[name])]
    assert changed, "pooled text and sizes reach the student"
    record = json.loads((distilled / "decant.json").read_text())
    assert record["family"] == "sdxl" and record["held_out"]["output_error_before"] > 0
    card = (distilled / "README.md").read_text()
    assert "StableDiffusionXLPipeline.from_pretrained" in card and "stable-diffusion-xl" in card
    plain = DiffusionPipeline.from_pretrained(distilled)
    assert type(plain) is StableDiffusionXLPipeline
    for name in ("vae", "text_encoder", "text_encoder_2"):
        mine, theirs = getattr(plain, name).state_dict(), getattr(load(sdxl_saved), name).state_dict()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_half_precision_and_recomputation_take_sdxl_too(
    sdxl_saved: Path, student: Path, data: Path, tmp_path: Path
) -> None:
    fast = (*QUICK, "feature=0", "precision=bf16", "gradient_checkpointing=true", "teacher_guidance_scale=5")
    words = [word for setting in fast for word in ("--set", setting)]
    places = ["--student", student, "--data", data, "--out", tmp_path / "out"]
    decant("distill", "--teacher", sdxl_saved, *places, *words)
    before, after = load_file(student / UNET), load_file(tmp_path / "out" / UNET)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(weight.isfinite().all() for weight in after.values())


def test_sizes_and_crop_belong_to_the_picture(sdxl_saved: Path, data: Path, tmp_path: Path) -> None:
    """Two pictures of one caption are told their own sizes, with the caption and without, cold and from the cache."""
    captioned = read(data)
    family = family_of(load(sdxl_saved))
    for _ in ("cold", "warm"):
        inputs = Inputs(str(sdxl_saved), {}, data, 0, tmp_path / "work", cache=tmp_path / "cache")
        batch = encode_data(family, captioned, 64, inputs, torch.device("cpu")).batch(tuple(range(4)))
        expected = {(64, 100): (0, 18), (150, 64): (43, 0), (64, 64): (0, 0)}
        for file, sizes in zip(captioned.files, batch.condition["time_ids"].tolist(), strict=False):
            width, height = Image.open(file).size
            assert sizes == [height, width, *expected[height, width], 64, 64]
        assert torch.equal(batch.null["time_ids"], batch.condition["time_ids"])
        assert not batch.null["text_embeds"].any() and batch.condition["text_embeds"].any()
    files = sorted((tmp_path / "cache").glob("pictures-*/*.safetensors"))
    with safe_open(files[0], framework="pt") as shard:
        assert "framing.time_ids" in shard.keys()  # noqa: SIM118 (not a mapping)


def test_sdxl_is_evaluated_drawn_timed_and_shown(
    sdxl_saved: Path, distilled: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [
        word
        for s in ("images=2", "steps=1", "latency_repeats=1", "held_out=0.4", "device=cpu")
        for word in ("--set", s)
    ]
    places = ["--teacher", sdxl_saved, "--data", data, "--out", tmp_path / "proof"]
    report = told(capsys, "evaluate", distilled, *places, *few)
    error = {model["name"]: model["scores"]["output_error"]["value"] for model in report["models"]}
    assert error["teacher"] == 0 < error["student"]
    assert all(model["latency_ms"]["text"]["median"] > 0 for model in report["models"])
    drawn = told(capsys, "generate", distilled, "--prompt", "a red circle", "--steps", 1, "--out", tmp_path / "drawn")
    assert "001" not in str(drawn) and len(list((tmp_path / "drawn").glob("*.png"))) == 1
    shown = told(capsys, "show", distilled)
    assert shown["family"] == "sdxl" and shown["parts"].keys() == {"unet", "vae", "text_encoder", "text_encoder_2"}
    assert shown["record"]["family"] == "sdxl" and shown["prediction"] == "epsilon"


def test_sdxl_as_one_file_is_a_teacher(
    sdxl_saved: Path, student: Path, data: Path, distilled: Path, tmp_path: Path
) -> None:
    """The same run from one file gives the same student, to the bit."""
    file, out = tmp_path / "teacher.safetensors", tmp_path / "student"
    decant("export", sdxl_saved, "--out", file)
    words = [word for setting in (*QUICK, "feature=0", "caption_dropout=0.3") for word in ("--set", setting)]
    decant("distill", "--teacher", file, "--student", student, "--data", data, "--out", out, *words)
    mine, theirs = load_file(out / UNET), load_file(distilled / UNET)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(("name", "parts"), [("sd15", 3), ("sd21", 3), ("sdxl", 4)])
def test_untrained_networks_are_of_full_size(name: TextToImage, parts: int) -> None:
    """On the meta device, which has the sizes and no memory."""
    with torch.device("meta"):
        pipeline = untrained(name, torch.bfloat16)
    made = networks(pipeline)
    assert len(made) == parts and {network.dtype for network in made.values()} == {torch.bfloat16}
    assert dict(pipeline.unet.config).items() >= {k: v for k, v in architecture(name).items() if k[0] != "_"}.items()
    family = family_of(pipeline)
    assert (family.prediction, family.tokens) == ("epsilon", 77)


def test_sdxl_at_full_size_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    shown = told(capsys, "show", "sdxl")
    assert (shown["family"], shown["parameters"]) == ("sdxl", 2_567_463_684)
    assert round(shown["macs"] / 1e9, 1) == 3380.6


@pytest.fixture(scope="module")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 2.x of the 768 px kind, as diffusers writes it: v-prediction, zero terminal SNR."""
    teacher: Any = load("scenes")
    config = {**teacher.unet.config, "use_linear_projection": True, "attention_head_dim": [2, 4, 8, 8]}
    torch.manual_seed(3)
    teacher = with_unet(teacher, type(teacher.unet).from_config({**config, "upcast_attention": True}).eval())
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    teacher.scheduler = type(teacher.scheduler).from_config(teacher.scheduler.config, **settings)
    out = tmp_path_factory.mktemp("sd2") / "teacher"
    teacher.save_pretrained(out)
    return out


@pytest.mark.parametrize("cut", ["bk-tiny"])
def test_sd2_is_cut_and_distilled(
    cut: str, sd2: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decant("prune", "--teacher", sd2, "--student", cut, "--out", tmp_path / "cut")
    words = [word for setting in (*QUICK, "min_snr_gamma=5") for word in ("--set", setting)]
    places = ["--student", tmp_path / "cut", "--data", data, "--out", tmp_path / "out"]
    decant("distill", "--teacher", sd2, *places, *words)
    shown = told(capsys, "show", tmp_path / "out")
    assert (shown["family"], shown["record"]["family"], shown["prediction"]) == ("sd2", "sd2", "v_prediction")
    assert [step["stage"] for step in shown["record"]["lineage"]] == ["prune"]
    assert all(weight.isfinite().all() for weight in load_file(tmp_path / "out" / UNET).values())


def test_the_target_of_v_prediction_is_diffusers_velocity(sd2: Path) -> None:
    from decant.maths.prediction import target

    family = family_of(load(sd2))
    theirs = DDPMScheduler.from_pretrained(sd2, subfolder="scheduler")
    x_0, noise, t = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0, 400, 998, 999])
    goal = target(family.prediction, x_0, noise, *family.schedule.at(t, 4))
    torch.testing.assert_close(goal, theirs.get_velocity(x_0, noise, t))
    torch.testing.assert_close(family.corrupt(x_0, noise, t), theirs.add_noise(x_0, noise, t))
    assert torch.equal(goal[-1], -x_0[-1])  # nothing of the picture is left at zero terminal SNR


def test_a_run_of_sdxl_is_forecast(
    sdxl_saved: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"steps": 10, "batch_size": 2, "feature": 0, "device": "cpu"}
    recipe = {"name": "mine", "stages": [{"stage": "distill", "name": "a", "from": "teacher", "settings": settings}]}
    (tmp_path / "mine.yaml").write_text(json.dumps(recipe))
    places = ["--teacher", sdxl_saved, "--data", data, "--out", tmp_path / "run", "--dry-run"]
    wanted = told(capsys, "run", tmp_path / "mine.yaml", *places)
    text_mb = 16 * 4 * (77 * 80 + 24 + 6) / 1e6
    assert wanted["disk"]["stages_mb"]["a, cache"] == pytest.approx(text_mb + 16 * 4 * 2 * 4 * 64 / 1e6, abs=0.06)
    assert wanted["time"]["how"] == "measured" and wanted["time"]["total_s"] > 0


def test_a_student_of_another_kind_is_refused(
    sdxl_saved: Path, sd2: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--teacher", sdxl_saved, "--student", sd2, "--data", data, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in ("distill", *places, "--set", "held_out=0.4")])
    assert left.value.code == 2 and "cross_attention_dim" in capsys.readouterr().err
