"""What models cost when they run: time by part, pictures a second, memory; every figure with its conditions."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import torch

from decant.bench.alone import alone
from decant.bench.timer import Latency, peak_memory_mb, time_rounds
from decant.data.picture import Frame
from decant.models.cost import size_mb
from decant.models.device import Device, pick
from decant.models.families.of import family_of
from decant.models.generate import generate, pixels
from decant.models.layout import Pipeline, networks
from decant.models.load import load, place_of
from decant.models.samplers import Drawing, Sampler
from decant.models.untrained import TextToImage, untrained
from decant.stages.progress import Tick, progress
from decant.stages.record import figures_of

Precision = Literal["float32", "bfloat16", "float16"]
Entry = dict[str, Any]
PROMPT, SEED = "a large red circle left of a small blue star on a white background", 0
# Models are timed in turns, round by round, while they fit in this part of the memory that is free.
_SHARE = 0.4


@dataclass(frozen=True)
class How:
    """The conditions of a measurement. ``repeats`` 0 measures nothing; ``batch_size`` 0 leaves the rate out.

    ``compile``: the networks run as torch.compile makes them, in the untimed rounds that come first.
    """

    steps: int = 25
    guidance_scale: float = 7.5
    sampler: Sampler = "ddim"
    size: int | None = None
    batch_size: int = 0
    warmup: int = 1
    repeats: int = 5
    device: Device = "auto"
    dtype: Precision = "float32"
    compile: bool = False


def drawn_as(how: How, drawing: Drawing) -> How:
    """The same conditions with other steps, guidance and sampler."""
    return replace(how, steps=drawing.steps, guidance_scale=drawing.guidance_scale, sampler=drawing.sampler)


def bench(
    models: Mapping[str, str | Path], how: How, talk: Callable[[str], None], own: Mapping[str, How] | None = None
) -> dict[str, Entry]:
    """Counts, times and memory of every model, by name: the entries of ``report.json``, without scores.

    ``own``: of models that are drawn in another way than the others; they differ in nothing else.
    Models of the same networks differ in weights alone, which cost nothing: the first of them is measured, and the
    others say so in ``measured_as``.
    """
    hows = dict.fromkeys(models, how) | dict(own or {})
    entries: dict[str, Entry] = {}
    first: dict[str, str] = {}
    opened: dict[str, Pipeline] = {}
    for name, source in models.items():
        pipeline = open_model(source, how.dtype)
        entries[name] = _counts(source, pipeline, hows[name])
        twin = first.setdefault(f"{work_of(pipeline)} {hows[name]}", name)
        if twin != name:
            entries[name]["measured_as"] = twin
        elif fits([*opened.values(), pipeline], how):
            opened[name] = pipeline
    distinct = {name: models[name] for name in first.values()}
    if how.repeats:
        memory = dict(
            zip(distinct, alone(_memory, [(source, hows[name]) for name, source in distinct.items()]), strict=True)
        )
        found = _timed(distinct, opened if opened.keys() == distinct.keys() else {}, hows, talk)
        for name, entry in entries.items():
            source_name = entry.get("measured_as", name)
            entries[name] = {**entry, **memory[source_name], **found[source_name]}
    return entries


def open_model(source: str | Path, dtype: Precision) -> Pipeline:
    """A source of `load`, or the name of an architecture with random weights, on the CPU."""
    known: tuple[TextToImage, ...] = get_args(TextToImage)
    for name in known:
        if source == name:
            return untrained(name, getattr(torch, dtype))
    return load(source, dtype=getattr(torch, dtype))


def _counts(source: str | Path, pipeline: Pipeline, how: How) -> Entry:
    folder = None if source in get_args(TextToImage) else place_of(source)
    return {
        "path": str(source),
        **figures_of(pipeline.unet, family_of(pipeline).tokens),
        **({"size_mb": round(size_mb(folder), 3)} if folder else {}),
        "dtype": how.dtype,
        "device": str(pick(how.device)),
        "sampler": how.sampler,
        "steps": how.steps,
        "guidance_scale": how.guidance_scale,
        "latency_ms": {},
    }


def work_of(pipeline: Pipeline) -> str:
    """The configs of everything that computes: equal texts are equal work."""
    configs: list[Any] = [part.config for part in networks(pipeline).values()]
    parts = [config if isinstance(config, dict) else config.to_dict() for config in configs]
    plain = [{key: value for key, value in part.items() if not key.startswith("_")} for part in parts]
    return json.dumps([*plain, family_of(pipeline).tokens], sort_keys=True, default=str)


def fits(pipelines: list[Pipeline], how: How) -> bool:
    """Whether models can be held at once: in a part of the memory that is free."""
    cuda = pick(how.device).type == "cuda"
    free = torch.cuda.mem_get_info()[0] if cuda else psutil.virtual_memory().available
    parts = [part for pipeline in pipelines for part in networks(pipeline).values()]
    return sum(weight.nbytes for network in parts for weight in network.parameters()) <= _SHARE * free


def _timed(
    distinct: Mapping[str, str | Path],
    opened: Mapping[str, Pipeline],
    hows: Mapping[str, How],
    talk: Callable[[str], None],
) -> dict[str, Entry]:
    """Times of every model: in turns where all are open at once, else one model after the other."""
    how = next(iter(hows.values()))
    device, interleaved = pick(how.device), bool(opened)
    groups = [distinct] if interleaved else [{name: source} for name, source in distinct.items()]
    found: dict[str, Entry] = {}
    rounds = how.warmup + how.repeats
    with progress("timing", len(distinct) * rounds * (5 if how.batch_size else 4), talk) as tick:
        for number, group in enumerate(groups):
            pipelines = {n: (opened.get(n) or open_model(s, how.dtype)).to(device) for n, s in group.items()}
            for pipeline in pipelines.values():
                _compile(pipeline, how)
            calls = {(n, part): call for n, p in pipelines.items() for part, call in calls_of(p, hows[n]).items()}
            told = partial(_tick, tick, number * rounds * len(calls))
            with torch.no_grad():
                times = time_rounds(calls, warmup=how.warmup, repeats=how.repeats, tick=told)
            for name, pipeline in pipelines.items():
                own = {part: latency for (model, part), latency in times.items() if model == name}
                conditions = {**conditions_of(pipeline, hows[name]), "interleaved": interleaved and len(group) > 1}
                found[name] = {**_figures(own, hows[name]), "measured": conditions}
    return found


def _compile(pipeline: Pipeline, how: How) -> None:
    """Networks are compiled in place, at their first call, and again for every other shape."""
    if how.compile:
        for network in (pipeline.unet, pipeline.vae.decoder, *family_of(pipeline).encoders()["captions"]):
            network.compile(dynamic=False)


def _tick(tick: Tick, before: int, done: int) -> None:
    tick(before + done)


def calls_of(pipeline: Pipeline, how: How) -> dict[str, Callable[[], object]]:
    """What is timed: one picture at batch 1, its parts (text, one UNet call, decoder), and a batch if asked."""
    family, unet = family_of(pipeline), pipeline.unet
    size = pixels(pipeline, how.size)
    framing = {key: value.to(unet.device) for key, value in family.framing([Frame.whole(*size)]).items()}
    condition = family.condition([PROMPT]) | framing
    height, width = (side // pipeline.vae_scale_factor for side in size)
    generator = torch.Generator().manual_seed(SEED)
    x_t = torch.randn(1, unet.config["in_channels"], height, width, generator=generator).to(unet.device, unet.dtype)
    t = torch.full((1,), 500, device=unet.device)
    calls: dict[str, Callable[[], object]] = {
        "picture": lambda: _draw(pipeline, how, 1),
        "text": lambda: family.condition([PROMPT]),
        "unet": lambda: family.denoise(unet, x_t, t, condition),
        "decode": lambda: pipeline.vae.decode(x_t),
    }
    return calls | ({"batch": lambda: _draw(pipeline, how, how.batch_size)} if how.batch_size else {})


def _draw(pipeline: Pipeline, how: How, n: int) -> list[Any]:
    drawn = generate(
        pipeline,
        [PROMPT] * n,
        range(SEED, SEED + n),
        steps=how.steps,
        guidance_scale=how.guidance_scale,
        sampler=how.sampler,
        batch_size=n,
        size=how.size,
    )
    return list(drawn)


def _figures(times: Mapping[str, Latency], how: How) -> Entry:
    latency = {part: figure.to_json() for part, figure in times.items() if part != "batch"}
    if "batch" not in times:
        return {"latency_ms": latency}
    batch = times["batch"]
    median, low, high = (1000 * how.batch_size / ms for ms in (batch.median, batch.high, batch.low))
    counts = {"n": batch.n, "warmup": batch.warmup, "batch_size": how.batch_size}
    return {"latency_ms": latency, "images_per_second": {"median": median, "low": low, "high": high, **counts}}


def conditions_of(pipeline: Pipeline, how: How) -> Entry:
    """What stands beside a model's times."""
    return {
        "device": str(pick(how.device)),
        "dtype": how.dtype,
        "size": list(pixels(pipeline, how.size)),
        "steps": how.steps,
        "guidance_scale": how.guidance_scale,
        "sampler": how.sampler,
        "warmup": how.warmup,
        "repeats": how.repeats,
        "compile": how.compile,
        "threads": torch.get_num_threads(),
    }


def _memory(source: str | Path, how: How) -> Entry:
    """The most memory that opening a model and drawing one picture takes. For a process that did nothing before."""
    before = peak_memory_mb()
    pipeline = open_model(source, how.dtype).to(pick(how.device))
    size = list(pixels(pipeline, how.size))
    # Every step needs the same memory, from the second on also what a solver remembers.
    quick = How(min(how.steps, 3), how.guidance_scale, how.sampler, how.size)
    _draw(pipeline, quick, 1)
    peak = peak_memory_mb()
    on_cuda = peak.cuda_mb is not None
    mb = round(peak.cuda_mb if peak.cuda_mb is not None else peak.process_mb, 1)
    libraries_mb = 0.0 if on_cuda else round(before.process_mb, 1)
    what = "cuda" if on_cuda else "process"
    told = {"mb": mb, "libraries_mb": libraries_mb, "what": what, "batch_size": 1, "size": size}
    return {"peak_memory_mb": mb, "peak_memory": told}
