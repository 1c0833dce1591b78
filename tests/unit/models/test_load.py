"""The one loader: what opens, what is refused with one message, and what a saved folder holds."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from decant.errors import UserError
from decant.models.load import architecture, fingerprint, load, place_of, save, unet_config, with_unet

PARTS = ("unet", "vae", "text_encoder")
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def assert_same_weights(a: StableDiffusionPipeline, b: StableDiffusionPipeline) -> None:
    for part in PARTS:
        mine, theirs = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_folder_opens_as_it_was_saved(folder: Path, pipeline: StableDiffusionPipeline) -> None:
    opened = load(folder)
    assert_same_weights(opened, pipeline)
    assert opened.safety_checker is None
    assert not any(getattr(opened, part).training for part in PARTS)
    assert load(str(folder)).scheduler.config.steps_offset == 1
    assert place_of(str(folder)) == folder


def test_opened_weights_lie_where_kernels_round_alike(folder: Path, pipeline: StableDiffusionPipeline) -> None:
    x_t, t, text = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 4, 32)
    with torch.no_grad():
        mine = load(folder).unet(x_t, t, encoder_hidden_states=text).sample
        theirs = pipeline.unet(x_t, t, encoder_hidden_states=text).sample
    assert torch.equal(mine, theirs)


def test_dtype_is_that_of_every_part(folder: Path) -> None:
    opened = load(folder, dtype=torch.bfloat16)
    assert {getattr(opened, part).dtype for part in PARTS} == {torch.bfloat16}


def test_half_precision_files_open_in_full(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    pipeline.to(dtype=torch.float16).save_pretrained(tmp_path, variant="fp16")
    opened = load(tmp_path)
    assert {getattr(opened, part).dtype for part in PARTS} == {torch.float32}
    assert_same_weights(opened, pipeline.to(dtype=torch.float32))


def test_sharded_weights_open_and_a_lost_shard_is_named(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    pipeline.save_pretrained(tmp_path, max_shard_size="500KB")
    shards = sorted((tmp_path / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    assert_same_weights(load(tmp_path), pipeline)
    shards[0].unlink()
    with pytest.raises(UserError, match=shards[0].name):
        load(tmp_path)


def test_save_and_load_are_inverse_also_for_another_memory_format(
    tmp_path: Path, pipeline: StableDiffusionPipeline
) -> None:
    pipeline.unet.to(memory_format=torch.channels_last)
    save(pipeline, tmp_path)
    assert not pipeline.unet.conv_in.weight.is_contiguous()
    assert_same_weights(load(tmp_path), pipeline)
    assert_same_weights(StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None), pipeline)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt")]


def test_saved_folder_names_no_place_of_this_machine(tmp_path: Path, folder: Path) -> None:
    save(load(folder), tmp_path / "again")
    for path in (tmp_path / "again").rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path


def test_with_unet_shares_all_but_the_unet(pipeline: StableDiffusionPipeline) -> None:
    other = UNet2DConditionModel.from_config(pipeline.unet.config)
    changed = with_unet(pipeline, other)
    assert changed.unet is other
    assert changed.vae is pipeline.vae and changed.text_encoder is pipeline.text_encoder
    assert pipeline.unet is not other


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda d: (d / "model_index.json").unlink(), "model_index.json is missing"),
    "index is not JSON": (lambda d: (d / "model_index.json").write_text("{"), "a JSON file"),
    "index is a list": (lambda d: (d / "model_index.json").write_text("[]"), "a JSON object"),
    "SDXL": (
        lambda d: edit(d / "model_index.json", _class_name="StableDiffusionXLPipeline"),
        "text_encoder_2",
    ),
    "transformer": (
        lambda d: edit(d / "model_index.json", unet=["diffusers", "SD3Transformer2DModel"]),
        "SD3Transformer2DModel",
    ),
    "no vae": (lambda d: shutil.rmtree(d / "vae"), "folder vae is missing"),
    "no tokenizer": (lambda d: shutil.rmtree(d / "tokenizer"), "folder tokenizer is missing"),
    "empty tokenizer": (lambda d: [path.unlink() for path in (d / "tokenizer").iterdir()], "tokenizer"),
    "alien tokenizer": (lambda d: edit(d / "text_encoder/config.json", vocab_size=100), "text_encoder"),
    "no config": (lambda d: (d / "unet/config.json").unlink(), "config.json is missing"),
    "no weights": (lambda d: (d / "unet" / WEIGHTS["unet"]).unlink(), "weights: none"),
    "MuseTalk": (lambda d: edit(d / "unet/config.json", in_channels=8), "wrong latent channels"),
    "inpainting": (lambda d: edit(d / "unet/config.json", in_channels=9), "9 is inpainting"),
    "wide VAE": (lambda d: edit(d / "vae/config.json", latent_channels=16), "wrong latent channels"),
    "other text": (lambda d: edit(d / "unet/config.json", cross_attention_dim=64), "text encoder gives 32"),
    "other widths": (lambda d: edit(d / "unet/config.json", block_out_channels=[32, 32, 64, 64]), "unet"),
    "more layers": (lambda d: edit(d / "unet/config.json", layers_per_block=3), "two different networks"),
    "unknown block": (lambda d: edit(d / "unet/config.json", mid_block_type="Nonsense"), "cannot be opened"),
}


@pytest.mark.parametrize(("break_it", "says"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_folder_is_refused_with_a_hint(folder: Path, break_it: Callable[[Path], object], says: str) -> None:
    break_it(folder)
    with pytest.raises(UserError, match=says) as refusal:
        load(folder)
    assert "hint: " in str(refusal.value) and "allowed: " in str(refusal.value)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("left", [0, 4, 200, -100])
def test_truncated_weights_are_refused_by_name(folder: Path, part: str, left: int) -> None:
    file = folder / part / WEIGHTS[part]
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(UserError, match=f"{part}/{WEIGHTS[part]}"):
        load(folder)


def test_weights_that_lack_a_tensor_are_refused(folder: Path) -> None:
    for part in PARTS:
        file = folder / part / WEIGHTS[part]
        weights = load_file(file)
        lost = next(name for name in weights if name.endswith("weight"))
        save_file({name: w for name, w in weights.items() if name != lost}, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match="two different networks"):
            load(folder)
        save_file(weights, file, metadata={"format": "pt"})
    load(folder)


class Bomb:
    """A pickle that would make a file when opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def to_pickle(folder: Path) -> Path:
    file = folder / "unet" / WEIGHTS["unet"]
    pickled = file.with_suffix(".bin")
    torch.save(load_file(file), pickled)
    file.unlink()
    return pickled


def test_pickled_weights_need_a_flag(folder: Path, pipeline: StableDiffusionPipeline) -> None:
    to_pickle(folder)
    with pytest.raises(UserError, match="is a pickle"):
        load(folder)
    assert_same_weights(load(folder, allow_pickle=True), pipeline)


@pytest.mark.parametrize("dump", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_hostile_pickle_is_never_run(folder: Path, tmp_path: Path, dump: Callable[..., Any]) -> None:
    mark = tmp_path / "mark"
    dump({"conv_in.weight": Bomb(mark)}, to_pickle(folder))
    for allow in (False, True):
        with pytest.raises(UserError):
            load(folder, allow_pickle=allow)
    assert not mark.exists()


def test_a_missing_folder_names_its_nearest_sibling(folder: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'teacher'"):
        load(folder.parent / "techer")
    with pytest.raises(UserError, match="holds no folders"):
        load("/nowhere/at/all")


def test_a_relative_misspelling_is_not_taken_for_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    with pytest.raises(UserError, match="did you mean 'teacher'"):
        load(f"{folder.parent.name}/techer")


def test_a_component_is_not_a_model(folder: Path) -> None:
    with pytest.raises(UserError, match="one component of a diffusers folder"):
        load(folder / "unet" / WEIGHTS["unet"])


@pytest.mark.parametrize("name", ["sd15", "sd21", "musetalk"])
def test_an_architecture_has_no_weights(name: str) -> None:
    with pytest.raises(UserError, match="--dry-run"):
        load(name)
    assert architecture(name)["block_out_channels"] == [320, 640, 1280, 1280]


def test_an_unknown_architecture_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'sd15'"):
        architecture("sd1.5")


HUB = """
import sys
from decant.errors import UserError
from decant.models.load import load
for hub_id in sys.argv[1:]:
    try:
        print("opened", load(hub_id).unet.config.in_channels, end=";")
    except UserError as refusal:
        print(refusal, end=";")
"""


def test_hub_ids_offline_are_opened_from_the_cache_or_refused(tmp_path: Path, saved: Path, sdxl_saved: Path) -> None:
    commit = f"{zlib.crc32(b'commit'):040x}"
    for name, folder in (("sd", saved), ("sdxl", sdxl_saved)):
        repository = tmp_path / f"models--someone--{name}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", HUB, "nobody/nothing", "someone/sd", "someone/sdxl"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *refusal, sd, sdxl, _ = done.stdout.split(";")
    said = ";".join(refusal)
    assert "nobody/nothing" in said and "hint: no such folder here" in said and "Traceback" not in said
    assert sd == sdxl == "opened 4"


def test_fingerprint_follows_names_and_contents_alone(folder: Path, tmp_path: Path) -> None:
    print_ = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "twin")
    assert fingerprint(tmp_path / "twin") == print_
    (folder / "decant.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    assert fingerprint(folder) == print_
    (folder / "unet" / "config.json").rename(folder / "unet" / "other.json")
    renamed = fingerprint(folder)
    assert renamed != print_
    file = folder / "unet" / WEIGHTS["unet"]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert fingerprint(folder) not in (print_, renamed)
    with pytest.raises(UserError):
        fingerprint(tmp_path / "nothing")


def test_unet_config_reads_no_weights(folder: Path, pipeline: StableDiffusionPipeline) -> None:
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    assert unet_config(folder)["block_out_channels"] == [32, 64, 64, 64]
    built = UNet2DConditionModel.from_config(unet_config(folder))
    assert built.state_dict().keys() == pipeline.unet.state_dict().keys()
    assert unet_config("sd21") == architecture("sd21")
    with pytest.raises(UserError, match="did you mean 'teacher'"):
        unet_config(folder.parent / "techer")
