"""The sdxl adapter against diffusers: what SDXL's own pipeline tells its UNet, zeros, sizes, and one forward."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from decant.data.picture import Frame, framed_picture
from decant.errors import UserError
from decant.models.families.of import family_of
from decant.models.generate import Sampler, generate
from decant.models.load import fingerprint, load, save, with_unet
from decant.models.taps import tap

CAPTIONS = ["a red circle", "two blue squares, one left of the other " * 9]


@pytest.fixture
def sdxl(make_sdxl: Callable[..., StableDiffusionXLPipeline]) -> StableDiffusionXLPipeline:
    return make_sdxl()


def told(pipeline: StableDiffusionXLPipeline, **options: Any) -> list[dict[str, Tensor]]:
    """Everything that diffusers' own pipeline gives its UNet for two captions: one document a call."""
    seen: list[dict[str, Tensor]] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        added = kwargs["added_cond_kwargs"]
        seen.append({"x_t": args[0], "t": args[1], "text": kwargs["encoder_hidden_states"], **added})

    handle = pipeline.unet.register_forward_pre_hook(note, with_kwargs=True)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(CAPTIONS, num_inference_steps=1, output_type="latent", **options)
    handle.remove()
    return seen


@pytest.mark.parametrize("zeros", [True, False])
def test_condition_and_null_are_the_pipelines_own(zeros: bool, make_sdxl: Callable[..., Any]) -> None:
    pipeline = make_sdxl(zeros=zeros)
    family = family_of(pipeline)
    assert (family.name, family.prediction, family.tokens) == ("sdxl", "epsilon", 77)
    (call,) = told(pipeline, guidance_scale=5.0, height=64, width=64)
    condition = family.condition(CAPTIONS) | family.framing([Frame.whole(64, 64)] * 2)
    null = family.null(condition)
    for mine, theirs in (("encoder_hidden_states", "text"), ("text_embeds",) * 2, ("time_ids",) * 2):
        torch.testing.assert_close(torch.cat([null[mine], condition[mine]]), call[theirs])
    assert {k: v.shape for k, v in condition.items()} == {k: v.shape for k, v in null.items()}
    assert bool(null["text_embeds"].any()) is not zeros


def test_denoise_is_the_pipelines_own_call(sdxl: StableDiffusionXLPipeline) -> None:
    outputs: list[Tensor] = []
    handle = sdxl.unet.register_forward_hook(lambda _m, _a, out: outputs.append(out[0]))
    frame = Frame((900, 700), (130, 0), (64, 64))
    (call,) = told(
        sdxl, guidance_scale=1.0, height=64, width=64, original_size=frame.original,
        crops_coords_top_left=frame.corner, target_size=frame.target,
    )  # fmt: skip
    handle.remove()
    family = family_of(sdxl)
    condition = family.condition(CAPTIONS) | family.framing([frame, frame])
    assert condition["time_ids"].tolist() == [[900, 700, 130, 0, 64, 64]] * 2
    with torch.no_grad():
        mine = family.denoise(sdxl.unet, call["x_t"], call["t"].expand(2), condition)
        output, features = family.denoise(tap(sdxl.unet, ["mid_block"]), call["x_t"], call["t"].expand(2), condition)
    torch.testing.assert_close(mine, outputs[0])
    assert torch.equal(output, mine) and list(features) == ["mid_block"]


def test_sizes_and_crop_change_the_output(sdxl: StableDiffusionXLPipeline) -> None:
    family = family_of(sdxl)
    x_t, t, condition = torch.randn(1, 4, 8, 8), torch.tensor([500]), family.condition(["a"])
    frames = [Frame((64, 64), (0, 0), (64, 64)), Frame((640, 64), (0, 0), (64, 64)), Frame((64, 64), (9, 0), (64, 64))]
    with torch.no_grad():
        outputs = [family.denoise(sdxl.unet, x_t, t, condition | family.framing([frame])) for frame in frames]
    assert not torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(("width", "height"), [(100, 64), (64, 100), (33, 80), (64, 64), (640, 427)])
def test_frames_are_those_of_the_training_script_of_diffusers(width: int, height: int, tmp_path: Path) -> None:
    """Shortest side resized by torchvision's rule, then a centre crop: its corner, and the pixels that lie there."""
    columns = np.linspace(0, 255, width).astype(np.uint8)
    rows = np.linspace(0, 255, height).astype(np.uint8)
    pixels = np.stack(
        [np.tile(columns, (height, 1)), np.tile(rows[:, None], (1, width)), np.zeros((height, width))], -1
    )
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "a.png")
    tensor, frame = framed_picture(tmp_path / "a.png", 32)
    short = min(width, height)
    resized = Image.open(tmp_path / "a.png").resize((int(32 * width / short), int(32 * height / short)), Image.LANCZOS)
    top, left = (max(0, round((side - 32) / 2)) for side in (resized.height, resized.width))
    assert frame == Frame((height, width), (top, left), (32, 32))
    theirs = np.asarray(resized.crop((left, top, left + 32, top + 32))).astype(float) / 127.5 - 1
    assert np.abs(tensor.permute(1, 2, 0).numpy() - theirs).max() < 0.08  # half a pixel of these ramps


def test_a_turned_picture_is_told_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60)).save(tmp_path / "a.jpg", exif=exif)
    assert framed_picture(tmp_path / "a.jpg", 32)[1] == Frame((90, 60), (8, 0), (32, 32))


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_zero_terminal_snr_is_the_schedulers_own(kind: Any, make_sdxl: Callable[..., Any]) -> None:
    pipeline = make_sdxl("v_prediction")
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, rescale_betas_zero_snr=True)
    family = family_of(pipeline)
    torch.testing.assert_close(family.schedule.alpha, pipeline.scheduler.alphas_cumprod**0.5, rtol=0, atol=0)
    assert family.prediction == "v_prediction" and family.schedule.alpha[-1] < 3e-4
    if kind is not EulerDiscreteScheduler:
        assert family.schedule.alpha[-1] == 0 and family.schedule.sigma[-1] == 1


def test_edm_noise_is_refused(sdxl: StableDiffusionXLPipeline) -> None:
    sdxl.scheduler = EDMEulerScheduler()
    with pytest.raises(UserError, match="EDM"):
        family_of(sdxl)


def test_a_folder_opens_as_its_own_class_and_round_trips(sdxl_folder: Path, sdxl: Any, tmp_path: Path) -> None:
    opened = load(sdxl_folder)
    assert type(opened) is StableDiffusionXLPipeline
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        mine, theirs = getattr(opened, name).state_dict(), getattr(sdxl, name).state_dict()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    save(with_unet(opened, opened.unet), tmp_path / "one")
    save(load(tmp_path / "one"), tmp_path / "two")
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    again = StableDiffusionXLPipeline.from_pretrained(tmp_path / "one")
    assert again.tokenizer_2.pad_token == "!" and again.config.force_zeros_for_empty_prompt is True


def test_zeros_of_the_index_survive(make_sdxl: Callable[..., Any], tmp_path: Path) -> None:
    make_sdxl(zeros=False).save_pretrained(tmp_path / "a")
    save(with_unet(load(tmp_path / "a"), load(tmp_path / "a").unet), tmp_path / "b")
    assert load(tmp_path / "b").config["force_zeros_for_empty_prompt"] is False


@pytest.mark.parametrize("sampler", ["ddim", "euler", "as-is"])
def test_pictures_are_the_plain_pipelines(sampler: Sampler, sdxl: StableDiffusionXLPipeline) -> None:
    (mine,) = generate(sdxl, ["a red circle"], [7], steps=3, guidance_scale=5.0, sampler=sampler)
    kinds = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "as-is": EulerDiscreteScheduler}
    more = {"clip_sample": False, "set_alpha_to_one": False} if sampler == "ddim" else {}
    sdxl.scheduler = kinds[sampler].from_config(sdxl.scheduler.config, **more)
    sdxl.set_progress_bar_config(disable=True)
    plain = sdxl(
        "a red circle", num_inference_steps=3, guidance_scale=5.0, generator=torch.Generator().manual_seed(7),
        output_type="np",
    )  # fmt: skip
    assert np.array_equal(mine, (plain.images[0] * 255).round().astype(np.uint8))


def edited(folder: Path, file: str, **values: Any) -> None:
    import json

    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "first text": ("text_encoder/config.json", {"hidden_size": 40}, r"40 \+ 48"),
    "second text": ("text_encoder_2/config.json", {"hidden_size": 40}, r"32 \+ 40"),
    "pooled": ("text_encoder_2/config.json", {"projection_dim": 16}, "pooled text of 24"),
    "sizes": ("unet/config.json", {"addition_time_embed_dim": 16}, "pooled text"),
    "no sizes": ("unet/config.json", {"addition_time_embed_dim": None}, "UNet of SDXL"),
    "told nothing": ("unet/config.json", {"addition_embed_type": None}, "text_time in a StableDiffusionXLPipeline"),
    "zeros are text": ("model_index.json", {"force_zeros_for_empty_prompt": "yes"}, "true or false"),
    "other class": ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "text_encoder_2"),
    "the refiner": ("model_index.json", {"text_encoder": [None, None]}, "text_encoder"),
    "image to image": ("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "Img2Img"),
    "an SD pipeline": ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "none in a Stable"),
    "inpainting": ("unet/config.json", {"in_channels": 9}, "9 is inpainting"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "values", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_what_does_not_fit_is_refused(sdxl_folder: Path, file: str, values: dict[str, Any], says: str) -> None:
    edited(sdxl_folder, file, **values)
    with pytest.raises(UserError, match=says) as refusal:
        load(sdxl_folder)
    assert "hint: " in str(refusal.value) and "allowed: " in str(refusal.value)
