"""Model folders and files from strangers: each is refused with a place and a hint, runs nothing, costs no memory."""

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from decant.cli.main import main
from decant.models.load import load
from decant.models.single_file import write_single_file

Break = Callable[[Path], Path | None]
UNET = "unet/diffusion_pytorch_model.safetensors"
WEIGHTS = (UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")
CONFIGS = ("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json")
JSONS = ("model_index.json", *CONFIGS, "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
# What a process needs beside the files themselves: Python objects, the names of a network.
SLACK_MB = 24


def mark_of(folder: Path) -> Path:
    return folder.parent / "the-payload-ran"


class Bomb:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def configured(file: str, **values: Any) -> Break:
    return lambda folder: edit(folder / file, **values)


def replaced(file: str, content: bytes) -> Break:
    return lambda folder: (folder / file).write_bytes(content) and None


def truncated(file: str, share: float) -> Break:
    def cut(folder: Path) -> None:
        data = (folder / file).read_bytes().rstrip()
        (folder / file).write_bytes(data[: int(share * (len(data) - 1))])

    return cut


def gone(name: str) -> Break:
    def remove(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def linked(name: str, target: str) -> Break:
    """A file or folder moved elsewhere, or any place of the machine, behind a link."""

    def link(folder: Path) -> None:
        path, outside = folder / name, folder.parent / "outside"
        outside.mkdir(exist_ok=True)
        moved = path.rename(outside / path.name)
        path.symlink_to(target or moved)

    return link


def with_header(change: Callable[[dict[str, Any], int], Any], file: str = UNET) -> Break:
    """A weights file whose header is another: a document, or raw bytes; and by a tuple also its stated length."""

    def write(folder: Path) -> None:
        data = (folder / file).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        body = data[8 + length :]
        made = change(json.loads(data[8 : 8 + length]), len(body))
        stated, made = made if isinstance(made, tuple) else (None, made)
        text = made if isinstance(made, bytes) else json.dumps(made).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text) if stated is None else stated) + text + body)

    return write


def tensor(**values: Any) -> Callable[[dict[str, Any], int], Any]:
    def change(header: dict[str, Any], size: int) -> Any:
        name = sorted(key for key in header if key != "__metadata__")[0]
        return {**header, name: {**header[name], **values}}

    return change


HEADERS: dict[str, Callable[[dict[str, Any], int], Any]] = {
    "length 2**60": lambda h, n: (2**60, h),
    "length 2**63": lambda h, n: (2**63, h),
    "length 2**64-1": lambda h, n: (2**64 - 1, h),
    "length 0": lambda h, n: (0, h),
    "length of the file": lambda h, n: (n, h),
    "length one short": lambda h, n: (len(json.dumps(h)) - 1, h),
    "no JSON": lambda h, n: b"x" * 200,
    "a list": lambda h, n: [],
    "no tensors": lambda h, n: {},
    "nested deep": lambda h, n: b"[" * 500_000,
    "all overlap": lambda h, n: {k: {**v, "data_offsets": [0, 4]} if "shape" in v else v for k, v in h.items()},
    "overlap": tensor(data_offsets=[4, 132]),
    "beyond the end": tensor(data_offsets=[2**40, 2**40 + 128]),
    "backwards": tensor(data_offsets=[128, 0]),
    "negative": tensor(data_offsets=[-128, 0]),
    "fractions": tensor(data_offsets=[0.5, 128.5]),
    "huge shape": tensor(shape=[2**40, 2**40]),
    "shape overflows": tensor(shape=[2**62, 4]),
    "negative shape": tensor(shape=[-32]),
    "other shape": tensor(shape=[31]),
    "unknown dtype": tensor(dtype="F7"),
    "other dtype": tensor(dtype="F16"),
    "no offsets": lambda h, n: {k: {"dtype": "F32", "shape": [1]} for k in h},
    "metadata no text": lambda h, n: {**h, "__metadata__": {"format": {"a": 1}}},
}


def retensored(file: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Break:
    def write(folder: Path) -> None:
        save_file(change(load_file(folder / file)), folder / file, metadata={"format": "pt"})

    return write


def first(weights: dict[str, torch.Tensor]) -> str:
    return next(name for name in sorted(weights) if weights[name].ndim > 1 and len(set(weights[name].shape[:2])) == 2)


TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "one lost": lambda w: {n: v for n, v in w.items() if n != first(w)},
    "one turned": lambda w: {**w, first(w): w[first(w)].transpose(0, 1).contiguous()},
    "one renamed": lambda w: {("x" if n == first(w) else n): v for n, v in w.items()},
    "one of integers": lambda w: {**w, first(w): w[first(w)].long()},
    "one of bytes": lambda w: {**w, first(w): w[first(w)].to(torch.uint8)},
    "one of truths": lambda w: {**w, first(w): w[first(w)] > 0},
    "one larger": lambda w: {**w, first(w): torch.zeros(2000, 100)},
    "none": lambda w: {"x": torch.zeros(1)},
}


def indexed(weight_map: Any, prepare: Break = lambda folder: None) -> Break:
    """A folder whose UNet is in shards, as its index says."""

    def write(folder: Path) -> None:
        prepare(folder)
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "unet/diffusion_pytorch_model.safetensors.index.json").write_text(text)

    return write


def moved_out(folder: Path) -> None:
    (folder / UNET).rename(folder.parent / "out.safetensors")


def linked_out(folder: Path) -> None:
    moved_out(folder)
    (folder / "unet/shard.safetensors").symlink_to(folder.parent / "out.safetensors")


INDEXES: dict[str, Break] = {
    "index to the parent": indexed({"conv_in.weight": "../../out.safetensors"}, moved_out),
    "index to a root": indexed({"conv_in.weight": "/etc/passwd"}),
    "index to a link": indexed({"conv_in.weight": "shard.safetensors"}, linked_out),
    "index to a sub-folder": indexed({"conv_in.weight": "a/b.safetensors"}),
    "index with backslashes": indexed({"conv_in.weight": "..\\out.safetensors"}, moved_out),
    "index with a zero byte": indexed({"conv_in.weight": "a\0.safetensors"}),
    "index to a pickle": indexed({"conv_in.weight": "model.bin"}),
    "index to itself": indexed({"conv_in.weight": "diffusion_pytorch_model.safetensors.index.json"}),
    "index to nothing": indexed({"conv_in.weight": "lost.safetensors"}),
    "index to a long name": indexed({"conv_in.weight": "a" * 5000 + ".safetensors"}),
    "index of numbers": indexed({"conv_in.weight": 7}),
    "index empty": indexed({}),
    "index a list": indexed([]),
    "index null": indexed(None),
}


def pickled(file: str) -> Break:
    """Weights replaced by a pickle with a payload, plain and as torch writes it."""

    def write(folder: Path) -> None:
        (folder / file).unlink()
        bomb = {"conv_in.weight": Bomb(mark_of(folder))}
        torch.save(bomb, (folder / file).with_suffix(".bin"))
        (folder / file).with_suffix(".ckpt").write_bytes(pickle.dumps(bomb))

    return write


def disguised(dump: Callable[[Any, Path], object]) -> Break:
    """A pickle under the name of a safetensors file."""
    return lambda folder: dump({"x": Bomb(mark_of(folder))}, folder / UNET) and None


def one_pickle(suffix: str) -> Break:
    def write(folder: Path) -> Path:
        torch.save({"state_dict": Bomb(mark_of(folder))}, folder.parent / f"model{suffix}")
        return folder.parent / f"model{suffix}"

    return write


def code(name: str, **index: Any) -> Break:
    """A folder with Python beside the weights, and a config that names it."""

    def write(folder: Path) -> None:
        payload = f"import os\nos.mkdir({str(mark_of(folder))!r})\nclass Evil: pass\n"
        for place in (folder, folder / "unet", folder / "scheduler", folder / "tokenizer"):
            for module in ("evil", "pipeline", "modeling_evil", name):
                (place / f"{module}.py").write_text(payload)
        edit(folder / "model_index.json", **index)

    return write


def pipe(folder: Path) -> None:
    (folder / "unet/config.json").unlink()
    os.mkfifo(folder / "unet/config.json")


def folder_for_file(folder: Path) -> None:
    (folder / "unet/config.json").unlink()
    (folder / "unet/config.json").mkdir()


def file_for_folder(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    (folder / "vae").write_text("")


def loop_of_links(folder: Path) -> None:
    (folder / "vae/config.json").unlink()
    (folder / "vae/config.json").symlink_to("config.json")


def forget(folder: Path, name: str) -> None:
    """A component that model_index.json does not name, though its folder is there."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({key: value for key, value in index.items() if key != name}))


def swap(folder: Path, a: str, b: str) -> None:
    (folder / a).rename(folder / "between")
    (folder / b).rename(folder / a)
    (folder / "between").rename(folder / b)


EVIL = {"auto_map": {"AutoModel": "evil.Evil"}, "trust_remote_code": True}
FOLDERS: dict[str, Break] = {
    **{f"{file} {name}": with_header(change, file) for file in (UNET,) for name, change in HEADERS.items()},
    **{f"{file} {name}": retensored(file, change) for file in WEIGHTS for name, change in TENSORS.items()},
    **INDEXES,
    **{f"no {name}": gone(name) for name in (*JSONS[:5], *WEIGHTS, "unet", "vae", "text_encoder", "scheduler")},
    "no tokenizer": gone("tokenizer"),
    **{f"empty {name}": replaced(name, b"") for name in (*JSONS, *WEIGHTS)},
    **{f"pickle for {name}": pickled(name) for name in WEIGHTS},
    "pickle in disguise": disguised(lambda value, path: path.write_bytes(pickle.dumps(value))),
    "torch pickle in disguise": disguised(torch.save),
    **{f"link of {name}": linked(name, "") for name in (*WEIGHTS, "unet/config.json", "model_index.json", "unet")},
    "link to a device": linked("unet/config.json", "/dev/zero"),
    "link to a secret": linked("vae/config.json", "/etc/passwd"),
    "loop of links": loop_of_links,
    "a pipe": pipe,
    "a folder for a file": folder_for_file,
    "a file for a folder": file_for_folder,
    **{f"{file} brings code": configured(file, **EVIL) for file in (*CONFIGS, JSONS[-1])},
    **{f"{file} of another class": configured(file, _class_name="Evil", model_type="evil") for file in CONFIGS[:3]},
    "class is a list": configured("model_index.json", _class_name=["evil", "Evil"]),
    "class is none": configured("model_index.json", _class_name=None),
    "class of the folder": code("evil", _class_name="Evil"),
    "UNet of a module": code("evil", unet=["evil", "Evil"]),
    "UNet of os": code("evil", unet=["os", "system"]),
    "scheduler of a module": code("evil", scheduler=["evil", "Evil"]),
    "scheduler of another class": code("evil", scheduler=["diffusers", "StableDiffusionPipeline"]),
    "scheduler by a dotted name": code("evil", scheduler=["diffusers", "utils.logging"]),
    "tokenizer of a module": code("evil", tokenizer=["evil", "CLIPTokenizer"]),
    "tokenizer of another class": code("evil", tokenizer=["transformers", "AutoTokenizer"]),
    "component is text": configured("model_index.json", unet="diffusers.UNet2DConditionModel"),
    "component is a deep list": configured("model_index.json", vae=[["diffusers"], ["AutoencoderKL"]]),
    "quantised": configured("unet/config.json", quantization_config={"quant_method": "bitsandbytes"}),
    "ten million layers": configured("text_encoder/config.json", num_hidden_layers=10**7),
    "a billion words": configured("text_encoder/config.json", vocab_size=10**9),
    "many words": configured("text_encoder/config.json", vocab_size=9 * 10**6),
    "wide text": configured("text_encoder/config.json", hidden_size=10**6),
    "wide UNet": configured("unet/config.json", block_out_channels=[10**6] * 4),
    "many levels": configured("unet/config.json", block_out_channels=[32] * 1000),
    "many layers": configured("unet/config.json", layers_per_block=10**6),
    "many nested layers": configured("unet/config.json", transformer_layers_per_block=[[10**6]]),
    "negative channels": configured("vae/config.json", block_out_channels=[-16, 16, 32, 32]),
    "no groups": configured("unet/config.json", norm_num_groups=0),
    "no heads": configured("unet/config.json", attention_head_dim=0),
    "channels are text": configured("unet/config.json", block_out_channels="32"),
    "channels are null": configured("unet/config.json", block_out_channels=None),
    "layers are text": configured("text_encoder/config.json", num_hidden_layers="2"),
    "unknown block": configured("vae/config.json", down_block_types=["Evil"] * 4),
    "infinite": configured("scheduler/scheduler_config.json", num_train_timesteps=float("inf")),
    "endless steps": configured("scheduler/scheduler_config.json", num_train_timesteps=10**12),
    "unknown betas": configured("scheduler/scheduler_config.json", beta_schedule="evil"),
    "betas are text": configured("scheduler/scheduler_config.json", beta_start="evil"),
    **{f"{name} nested deep": replaced(name, b'{"a":' * 100_000) for name in JSONS[:3]},
    "a number of many digits": replaced("unet/config.json", b'{"in_channels": ' + b"9" * 10_000 + b"}"),
    "a config of megabytes": replaced("unet/config.json", b'{"a": "' + b"a" * 5_000_000 + b'"}'),
    "a config of binary": replaced("unet/config.json", bytes(range(256))),
    "a list for a config": replaced("unet/config.json", b"[1, 2]"),
    "a list for a vocabulary": replaced("tokenizer/tokenizer.json", b"[1, 2]"),
    "a vocabulary of nothing": replaced("tokenizer/tokenizer.json", b"{}"),
    "a vocabulary of megabytes": replaced("tokenizer/tokenizer.json", b'{"a": "' + b"a" * 20_000_000 + b'"}'),
    "a vocabulary of another kind": replaced("tokenizer/tokenizer.json", b'{"model": {"type": "Evil"}}'),
    **{f"a model as {suffix}": one_pickle(suffix) for suffix in (".ckpt", ".pt", ".bin", ".pth")},
    "an empty folder": lambda folder: folder.parent / "empty",
    "no such folder": lambda folder: folder.parent / "techer",
}
RANDOM = random.Random(3)
CUTS = {
    f"{name} cut at {share:.4f}": truncated(name, share)
    for name in (*WEIGHTS, *JSONS)
    for share in (RANDOM.random() for _ in range(4))
}
# What SDXL has besides: a second text encoder, its tokenizer, and a network that is told sizes.
TEXT_2 = "text_encoder_2/model.safetensors"
CONFIG_2 = "text_encoder_2/config.json"
VOCABULARY_2 = "tokenizer_2/tokenizer.json"
JSONS_2 = (CONFIG_2, VOCABULARY_2, "tokenizer_2/tokenizer_config.json")
TOLD = "unet/config.json"
SDXL_FOLDERS: dict[str, Break] = {
    **{f"{TEXT_2} {name}": with_header(change, TEXT_2) for name, change in HEADERS.items()},
    **{f"{TEXT_2} {name}": retensored(TEXT_2, change) for name, change in TENSORS.items()},
    **{f"no {name}": gone(name) for name in (CONFIG_2, TEXT_2, "text_encoder_2", "tokenizer_2", VOCABULARY_2)},
    **{f"empty {name}": replaced(name, b"") for name in (*JSONS_2, TEXT_2)},
    **{f"{name} nested deep": replaced(name, b'{"a":' * 100_000) for name in JSONS_2},
    **{f"link of {name}": linked(name, "") for name in (TEXT_2, CONFIG_2, "tokenizer_2")},
    **{f"{name} brings code": configured(name, **EVIL) for name in (CONFIG_2, JSONS_2[-1])},
    "pickle for the second encoder": pickled(TEXT_2),
    "link to a device": linked(CONFIG_2, "/dev/zero"),
    "second encoder of another class": configured(CONFIG_2, _class_name="Evil", model_type="evil"),
    "second encoder of a module": code("evil", text_encoder_2=["evil", "Evil"]),
    "second encoder of another index": configured("model_index.json", text_encoder_2=["transformers", "CLIPModel"]),
    "second encoder is null": configured("model_index.json", text_encoder_2=[None, None]),
    "second encoder is absent": lambda folder: forget(folder, "text_encoder_2"),
    "second tokenizer of a module": code("evil", tokenizer_2=["evil", "CLIPTokenizer"]),
    "second tokenizer is absent": lambda folder: forget(folder, "tokenizer_2"),
    "first tokenizer is gone": gone("tokenizer"),
    "encoders swapped": lambda folder: swap(folder, "text_encoder", "text_encoder_2"),
    "few words": configured(CONFIG_2, vocab_size=100),
    "a billion words": configured(CONFIG_2, vocab_size=10**9),
    "many words": configured(CONFIG_2, vocab_size=9 * 10**6),
    "another width": configured(CONFIG_2, hidden_size=64),
    "another projection": configured(CONFIG_2, projection_dim=64),
    "a wide projection": configured(CONFIG_2, projection_dim=10**7),
    "a projection of text": configured(CONFIG_2, projection_dim="24"),
    "told nothing": configured(TOLD, addition_embed_type=None),
    "told something else": configured(TOLD, addition_embed_type="image_hint"),
    "told a list": configured(TOLD, addition_embed_type=["text_time"]),
    "no sizes": configured(TOLD, addition_time_embed_dim=None),
    "sizes of text": configured(TOLD, addition_time_embed_dim="8"),
    "wide sizes": configured(TOLD, addition_time_embed_dim=10**6),
    "no pooled text": configured(TOLD, projection_class_embeddings_input_dim=None),
    "a wide pooled text": configured(TOLD, projection_class_embeddings_input_dim=10**7),
    "depths for other levels": configured(TOLD, transformer_layers_per_block=[1, 2]),
    "endless depths": configured(TOLD, transformer_layers_per_block=[1, 2, 10**6]),
    "zeros are a list": configured("model_index.json", force_zeros_for_empty_prompt=[True]),
    "zeros are code": configured("model_index.json", force_zeros_for_empty_prompt=["evil", "Evil"]),
    "another kind": configured("model_index.json", _class_name="StableDiffusionPipeline"),
    "the refiner": configured("model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline"),
}
SDXL_CUTS = {
    f"{name} cut at {share:.4f}": truncated(name, share)
    for name in (TEXT_2, *JSONS_2)
    for share in (RANDOM.random() for _ in range(2))
}
FILE_CASES = {
    **{f"one file, {name}": with_header(change, "model.safetensors") for name, change in HEADERS.items()},
    **{f"one file cut at {s:.4f}": truncated("model.safetensors", s) for s in (RANDOM.random() for _ in range(8))},
    "one empty file": replaced("model.safetensors", b""),
    "one file of text": replaced("model.safetensors", b"hello, I am a model" * 50),
    "one file that is a pickle": lambda folder: torch.save(Bomb(mark_of(folder)), folder / "model.safetensors"),
}


def test_there_are_more_than_a_hundred() -> None:
    assert len(FOLDERS) + len(CUTS) + len(FILE_CASES) > 200 and len(SDXL_FOLDERS) + len(SDXL_CUTS) > 80


@pytest.fixture(scope="module")
def one_file(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("one") / "model.safetensors"
    write_single_file(load(saved), file)
    return file


@pytest.fixture
def peak() -> Iterator[Callable[[], float]]:
    """Megabytes that this process's memory rose above what it was, at most, since the test began."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    yield lambda: _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def refused(source: Path, mark: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Exit status 2 by the command line, with place, allowed values and a hint; nothing else happened."""
    with pytest.raises(SystemExit) as left:
        main(["show", str(source)])
    said = capsys.readouterr()
    assert left.value.code == 2, said.err
    assert "Traceback" not in said.err and said.out == ""
    assert "  allowed: " in said.err and "  hint: " in said.err
    assert str(source.parent) in said.err
    assert not mark.exists(), "a payload ran"
    return said.err


linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")


@linux
@pytest.mark.parametrize("name", [*FOLDERS, *CUTS])
def test_a_malformed_folder_is_refused(
    name: str, folder: Path, peak: Callable[[], float], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder.parent / "empty").mkdir()
    source = {**FOLDERS, **CUTS}[name](folder) or folder
    size = sum(path.lstat().st_size for path in folder.rglob("*")) / 1e6
    refused(source, mark_of(folder), capsys)
    assert peak() < 2 * size + SLACK_MB


@linux
@pytest.mark.parametrize("name", [*SDXL_FOLDERS, *SDXL_CUTS])
def test_a_malformed_folder_of_two_text_encoders_is_refused(
    name: str, sdxl_folder: Path, peak: Callable[[], float], capsys: pytest.CaptureFixture[str]
) -> None:
    {**SDXL_FOLDERS, **SDXL_CUTS}[name](sdxl_folder)
    size = sum(path.lstat().st_size for path in sdxl_folder.rglob("*")) / 1e6
    refused(sdxl_folder, mark_of(sdxl_folder), capsys)
    assert peak() < 2 * size + SLACK_MB


@linux
@pytest.mark.parametrize("name", FILE_CASES)
def test_a_malformed_file_is_refused(
    name: str, one_file: Path, tmp_path: Path, peak: Callable[[], float], capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(one_file, home)
    FILE_CASES[name](home)
    refused(home / "model.safetensors", mark_of(home), capsys)
    assert peak() < 2 * (home / "model.safetensors").stat().st_size / 1e6 + SLACK_MB


def large(file: Path, name: str, dtype: str = "F32", numbers: int = 10**8) -> None:
    """A weights file of 400 MB that takes no disk: one tensor of zeros."""
    header = {name: {"dtype": dtype, "shape": [numbers], "data_offsets": [0, 4 * numbers]}}
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(out.tell() + 4 * numbers)


LARGE: dict[str, Callable[[Path], Path]] = {
    "weights of another network": lambda d: (large(d / UNET, "conv_in.weight"), d)[1],
    "weights of integers": lambda d: (large(d / UNET, "conv_in.weight", "I32"), d)[1],
    "one file of another layout": lambda d: (large(d / "m.safetensors", CONV_IN), d / "m.safetensors")[1],
    "one file of something else": lambda d: (large(d / "m.safetensors", "x"), d / "m.safetensors")[1],
    "a header of zeros": lambda d: (zeros(d / "m.safetensors"), d / "m.safetensors")[1],
}


def zeros(file: Path) -> None:
    """A header of 90 MB, within what the format allows."""
    with file.open("wb") as out:
        out.write(struct.pack("<Q", 90 * 10**6))
        out.truncate(400 * 10**6)


@linux
@pytest.mark.parametrize("name", LARGE)
def test_a_large_malformed_file_is_refused_unread(
    name: str, folder: Path, peak: Callable[[], float], capsys: pytest.CaptureFixture[str]
) -> None:
    refused(LARGE[name](folder), mark_of(folder), capsys)
    assert peak() < SLACK_MB


def test_a_huge_tensor_that_the_config_asks_for_is_never_made(
    folder: Path, peak: Callable[[], float], capsys: pytest.CaptureFixture[str]
) -> None:
    """4 GB of embeddings by the config's word, in a folder of one megabyte."""
    edit(folder / "text_encoder/config.json", vocab_size=9_999_999, hidden_size=96)
    refused(folder, mark_of(folder), capsys)
    assert peak() < SLACK_MB
