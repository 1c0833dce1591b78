"""What a run wants before it is begun: megabytes of disk by stage, and seconds.

Seconds are counted in multiply-accumulates and a pace. The pace is that of one step with this run's own networks where
they are small enough to be tried at once, else that of one large convolution; which of the two is always said.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from decant.data.captioned import check_share, unwatched
from decant.data.picture import View
from decant.data.source import Data, find
from decant.models.cost import latent_of, macs, parameters, size_mb
from decant.models.device import pick
from decant.models.families.unet import blank, forward
from decant.models.load import condition_tokens, known_architectures, place_of, stored_dtype, unet_config, vae_config
from decant.models.small_vae import decode_macs, encode_macs, new_small_vae, small_config
from decant.models.surgery.cut import cut
from decant.models.surgery.surgery import skeleton
from decant.recipe.runner import Job
from decant.stages.consistency import ConsistencySettings
from decant.stages.decoder import SmallDecoder
from decant.stages.dmd import DmdSettings
from decant.stages.prune import Prune, damage_of
from decant.stages.training_settings import Training

_FLOAT32 = 4
_KEPT_CHECKPOINTS = 2
_TRIED_AT_MOST_GMACS = 20.0
_MARGIN_MB = 50.0
_LEFT_OUT = "reading and encoding pictures, decoding, text, timing and writing files are not counted"


@dataclass(frozen=True)
class _Net:
    """One model of a run: its UNet on the meta device, and what a forward of it costs."""

    unet: UNet2DConditionModel
    tokens: int
    parameters: int
    macs: int

    @classmethod
    def of(cls, config: Mapping[str, Any], tokens: int) -> "_Net":
        unet = skeleton(config)
        return cls(unet, tokens, parameters(unet), macs(unet, latent_of(unet.config, None), tokens))


@dataclass(frozen=True)
class _Pace:
    """Multiply-accumulates a second, and how that is known."""

    macs_per_second: float
    how: str
    assumes: tuple[str, ...]


def forecast(jobs: Sequence[Job], teacher: str, data: Data | None, out: Path) -> dict[str, Any]:
    """Disk and time that a run wants: ``{"data": {...}, "disk": {...}, "time": {...}}``.

    The data is looked at (without data there is no such key); nothing is written and no weights are read.

    Raises:
        UserError: the teacher or the data is not there, or a device is not.
    """
    nets = _nets(jobs, teacher)
    found = _data(data) if data is not None else {}
    disk = _disk(jobs, nets, teacher, found)
    free = shutil.disk_usage(_existing(out)).free / 1e6
    return {
        **({"data": found} if found else {}),
        "disk": {
            "stages_mb": {name: round(mb, 1) for name, mb in disk.items()},
            "total_mb": round(sum(disk.values()), 1),
            "free_mb": round(free, 1),
            "enough": free > sum(disk.values()) + _MARGIN_MB,
        },
        "time": _time(jobs, nets, teacher),
    }


def told(document: Mapping[str, Any]) -> str:
    """A forecast in words, a line each as YAML comments."""
    disk, times = document["disk"], document["time"]
    enough = "" if disk["enough"] else ": NOT ENOUGH"
    data = document.get("data")
    lines = [f"data: {data['told']}", f"  {data['pictures']:,} used, {data['skipped']:,} skipped"] if data else []
    lines += [f"disk wanted: {disk['total_mb']:,.0f} MB, free {disk['free_mb']:,.0f} MB{enough}"]
    lines += [f"  {name}: {mb:,.1f} MB" for name, mb in disk["stages_mb"].items()]
    lines += [f"time wanted: about {_clock(times['total_s'])} on {times['device']} ({times['how']})"]
    lines += [f"  {name}: {_clock(seconds)}" for name, seconds in times["stages_s"].items()]
    lines += [f"  assumes: {text}" for text in times["assumes"]]
    return "\n".join(f"# {line}" for line in lines)


def _nets(jobs: Sequence[Job], teacher: str) -> dict[str, _Net]:
    """Every model that a stage takes or gives, by name."""
    tokens = condition_tokens(teacher)
    nets = {"teacher": _Net.of(unet_config(teacher), tokens)}
    for job in jobs:
        source = nets[job.takes[0]]
        match job.kind:
            case "prune":
                config = dict(source.unet.config)
                assert isinstance(job.settings, Prune)
                keep, damage = job.settings.description(config), damage_of(job.settings.importance)
                nets[job.name] = _Net.of(cut(config, source.unet.state_dict(), keep, damage=damage).config, tokens)
            case _ if job.stage.gives_pipeline:
                nets[job.name] = source
            case _:
                pass
    return nets


def _data(data: Data) -> dict[str, Any]:
    source = find(data)
    found = source.scan(unwatched, None)
    check_share(found, 1.0, needs=source.needs)
    captions = sum(map(len, found.choices))
    counts = {"pictures": len(found.files), "captions": captions, "skipped": len(found.skipped)}
    return {"told": source.told, **counts}


def _disk(jobs: Sequence[Job], nets: Mapping[str, _Net], teacher: str, data: Mapping[str, Any]) -> dict[str, float]:
    """Megabytes by stage; checkpoints of a distillation are gone after it, and wanted all the same."""
    whole, stored = _teacher_mb(teacher, nets["teacher"])
    beside = whole - nets["teacher"].parameters * stored / 1e6
    wanted: dict[str, float] = {}
    for job in jobs:
        if not job.stage.gives_pipeline:
            continue
        wanted[job.name] = beside + nets[job.name].parameters * stored / 1e6
        if isinstance(job.settings, Training):
            copies = 3 + (job.settings.ema is not None)  # weights, two moments, average
            one = nets[job.name].parameters * _FLOAT32 * copies / 1e6
            if isinstance(job.settings, DmdSettings):
                one += nets["teacher"].parameters * _FLOAT32 * 3 / 1e6  # of the fake score
            wanted[f"{job.name}, checkpoints"] = one * (_KEPT_CHECKPOINTS + 1)
            wanted[f"{job.name}, cache"] = _cached_bytes(job, nets["teacher"], data) / 1e6 if data else 0.0
        if isinstance(job.settings, SmallDecoder):
            one = parameters(_small(job.settings, teacher)) * _FLOAT32 * 3 / 1e6
            wanted[f"{job.name}, checkpoints"] = one * (_KEPT_CHECKPOINTS + 1)
            wanted[f"{job.name}, cache"] = _decoded_bytes(job.settings, nets["teacher"], data) / 1e6 if data else 0.0
    return wanted


def _teacher_mb(teacher: str, net: _Net) -> tuple[float, int]:
    """(megabytes of a teacher, bytes of a number of its UNet)."""
    if teacher in known_architectures():
        return net.parameters * _FLOAT32 / 1e6, _FLOAT32
    return size_mb(place_of(teacher)), stored_dtype(teacher).itemsize


def _cached_bytes(job: Job, net: _Net, data: Mapping[str, Any]) -> float:
    """Bytes of all pictures' moments, in every view, and of all captions' states, in float32."""
    config = net.unet.config
    channels, height, width = latent_of(config, _setting(job, "size"))
    told = sum(value.numel() for value in blank(config, 1, net.tokens, "meta").values())
    views = len(View.several("crop", _setting(job, "crops") or 0, flip=bool(_setting(job, "flip"))))
    return _FLOAT32 * (2 * channels * height * width * views * data["pictures"] + told * data["captions"])


def _small(settings: SmallDecoder, teacher: str) -> AutoencoderTiny:
    """The small autoencoder that a stage makes, before training."""
    config = small_config(vae_config(teacher), settings.width, settings.blocks)
    return new_small_vae(config, 0, encoder=settings.encoder > 0)


def _decoded_bytes(settings: SmallDecoder, net: _Net, data: Mapping[str, Any]) -> float:
    """Bytes of latents in float32 and of two pictures in 8 bits, of every view and of what is drawn."""
    channels, height, width = latent_of(net.unet.config, settings.size)
    latent_bytes, picture_bytes = _FLOAT32 * channels * height * width, 3 * 64 * height * width
    views = len(View.several("crop", settings.crops, flip=settings.flip))
    row = latent_bytes + picture_bytes
    return float(row * (2 * views * data["pictures"] + settings.samples))


def _time(jobs: Sequence[Job], nets: Mapping[str, _Net], teacher: str) -> dict[str, Any]:
    devices = {str(pick(_setting(job, "device"))) for job in jobs if _setting(job, "device")} or {"cpu"}
    device = sorted(devices)[-1]
    pace = _pace(jobs, nets, torch.device(device))
    seconds = {job.name: _macs(job, nets, teacher) / pace.macs_per_second for job in jobs}
    return {
        "stages_s": {name: round(value, 1) for name, value in seconds.items()},
        "total_s": round(sum(seconds.values()), 1),
        "device": device,
        "how": pace.how,
        "assumes": [*pace.assumes, _LEFT_OUT],
    }


def _macs(job: Job, nets: Mapping[str, _Net], teacher: str) -> float:
    """Multiply-accumulates of a stage: a backward pass is two forward passes."""
    match job.kind:
        case "distill" | "consistency" | "dmd":
            samples = _setting(job, "steps") * _setting(job, "batch_size") * _setting(job, "accumulation")
            size = _setting(job, "size")
            student, elder = (_at(nets[name], size) for name in (job.name, job.teacher))
            return float(samples * _sample_macs(job, student, elder))
        case "decoder":
            assert isinstance(job.settings, SmallDecoder)
            small, latent = _small(job.settings, teacher), latent_of(nets["teacher"].unet.config, job.settings.size)
            pixels = (8 * latent[1], 8 * latent[2])
            both = decode_macs(small, latent) + (encode_macs(small, pixels) if job.settings.encoder else 0)
            return 3.0 * both * job.settings.steps * job.settings.batch_size
        case "evaluate":
            halves = 2 if _setting(job, "guidance_scale") > 1 else 1
            size = _setting(job, "size")
            calls = _setting(job, "images") * _setting(job, "steps") * halves
            return float(calls * sum(_at(nets[name], size) for name in {"teacher", *job.takes}))
        case _:
            return 0.0


def _sample_macs(job: Job, student: int, teacher: int) -> float:
    """Multiply-accumulates for one sample of an update of the student's."""
    match job.settings:
        case ConsistencySettings() as told:  # the believed end, and both halves of the teacher
            own = (told.phases + 2.0) * student + 2 * told.own_way_steps * teacher
            return told.own_way * own + (1 - told.own_way) * (4.0 * student + 2 * teacher)
        case DmdSettings() as told:  # on its way a student runs half its steps; the fake score is as large as a teacher
            way = (told.sample_steps - 1) / 2
            fake = told.fake_updates * ((way + 1) * student + 3 * teacher)
            return (way + 3.0) * student + 3 * teacher + fake
        case _:
            return 3.0 * student + teacher


def _at(net: _Net, size: int | None) -> int:
    return net.macs if size is None else macs(net.unet, latent_of(net.unet.config, size), net.tokens)


def _pace(jobs: Sequence[Job], nets: Mapping[str, _Net], device: torch.device) -> _Pace:
    """Measured with the first training's own networks where they are small, else with one convolution."""
    job = next((job for job in jobs if isinstance(job.settings, Training)), None)
    student, teacher = nets[job.name if job else "teacher"], nets[job.teacher if job else "teacher"]
    bytes_needed = _FLOAT32 * (teacher.parameters + 4 * student.parameters)
    room = psutil.virtual_memory().available if device.type == "cpu" else torch.cuda.mem_get_info()[0]
    small = device.type != "cpu" or (3 * student.macs + teacher.macs) / 1e9 < _TRIED_AT_MOST_GMACS
    if job is None or not small or bytes_needed > room / 2:
        rate = _convolution_rate(device)
        return _Pace(rate, "estimated", ("the networks run as fast as one 320-channel convolution at 64 x 64 here",))
    sample = 3 * student.macs + teacher.macs
    # Small networks are the slower the smaller the batch: try the run's own, as far as that takes no time.
    batch = max(1, min(_setting(job, "batch_size"), int(_TRIED_AT_MOST_GMACS * 1e9 / sample)))
    rate = batch * sample / _step_seconds(student, teacher, batch, device)
    said = f"a step of {batch} pictures was timed just now, with these networks in float32 and zero weights"
    return _Pace(rate, "measured", (said, "other batch sizes, precisions and torch.compile keep that pace"))


def _step_seconds(student: _Net, teacher: _Net, batch: int, device: torch.device) -> float:
    """Seconds of one forward of a teacher, and one forward and backward of a student, at the network's own size."""
    networks = [_materialized(net.unet, device) for net in (teacher, student)]
    config = student.unet.config
    x_t = torch.zeros(batch, *latent_of(config), device=device)
    told = blank(config, batch, student.tokens, device)
    t = torch.zeros(batch, device=device)

    def step() -> None:
        with torch.no_grad():
            forward(networks[0], x_t, t, told)
        forward(networks[1], x_t, t, told).sum().backward()

    return _seconds_of(step, device)


def _convolution_rate(device: torch.device) -> float:
    layer = torch.nn.Conv2d(320, 320, 3, padding=1, device=device)
    x = torch.zeros(1, 320, 64, 64, device=device)
    with torch.no_grad():
        return 9 * 320 * 320 * 64 * 64 / _seconds_of(lambda: layer(x), device)


def _seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """The median of three calls after one to warm up."""
    times = []
    for _ in range(4):
        _wait(device)
        begin = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - begin)
    return sorted(times[1:])[1]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def _materialized(unet: UNet2DConditionModel, device: torch.device) -> UNet2DConditionModel:
    own = skeleton(dict(unet.config)).to_empty(device=device)
    for tensor in (*own.parameters(), *own.buffers()):
        tensor.data.zero_()
    return own


def _setting(job: Job, key: str) -> Any:
    return getattr(job.settings, key, None)


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.is_dir())


def _clock(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
