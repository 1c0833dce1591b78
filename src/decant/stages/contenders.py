"""What a comparison compares: models, how each is sampled, and at which numbers of steps."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers.schedulers.scheduling_lcm import LCMScheduler

from decant.errors import nearest, refuse
from decant.models.layout import Pipeline, rebuilt, scheduler_of
from decant.models.load import cast, fingerprint, load, place_of
from decant.models.move.lora_file import FILE, lora_header, merge_lora
from decant.models.samplers import Sampler
from decant.stages.record import read_record

Role = Literal["teacher", "student", "control"]
TEACHER = "teacher"
_NAMED = re.compile(r"([\w.-]+)=(.+)")


@dataclass(frozen=True)
class Sampling:
    """How a model is sampled; None is open."""

    sampler: Sampler | None = None
    guidance_scale: float | None = None
    steps: tuple[int, ...] | None = None

    def over(self, other: "Sampling") -> "Sampling":
        """This one, what it leaves open from another."""
        return Sampling(
            other.sampler if self.sampler is None else self.sampler,
            other.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            other.steps if self.steps is None else self.steps,
        )


@dataclass(frozen=True)
class Contender:
    """One model of a comparison, with a LoRA put on it where ``lora`` is one."""

    name: str
    source: str
    lora: Path | None = None

    @property
    def path(self) -> str:
        """As it stands on the command line."""
        return self.source + (f"+{self.lora}" if self.lora else "")

    def open(self, dtype: torch.dtype) -> Pipeline:
        """On the CPU, the LoRA merged into its weights in single precision; with the scheduler of the LoRA's folder,
        where that is a student's whose record leaves the sampling to it.

        Raises:
            UserError: as `load` and `merge_lora`.
        """
        pipeline = load(self.source)
        if self.lora is not None:
            merge_lora(pipeline, self.lora)
        if self._scheduler is not None:
            pipeline = rebuilt(pipeline, scheduler=scheduler_of(self._scheduler))
        return cast(pipeline, dtype)

    def fingerprints(self) -> dict[str, str]:
        """Of all that its pictures are made by."""
        made_by = {"model": fingerprint(place_of(self.source))}
        if self.lora is not None:
            made_by["lora"] = fingerprint(lora_header(self.lora).file)
        if self._scheduler is not None:
            made_by["scheduler"] = fingerprint(self._scheduler / "scheduler")
        return made_by

    def told(self, pipeline: Pipeline) -> Sampling:
        """What its own files say of how it is sampled: ``sampling`` in the record of the LoRA or of the model, or a
        scheduler for consistency models, which take no guidance.
        """
        for place in (self._lora_folder, place_of(self.source)):
            said = read_record(place).get("sampling") if place else None
            if place and isinstance(said, dict):
                return _sampling(said, place / "decant.json")
        return Sampling("as-is", 1.0) if isinstance(pipeline.scheduler, LCMScheduler) else Sampling()

    @property
    def _lora_folder(self) -> Path | None:
        """Where the record of what made the LoRA would be."""
        return self.lora if self.lora is None or self.lora.is_dir() else self.lora.parent

    @property
    def _scheduler(self) -> Path | None:
        """The LoRA's folder, where its scheduler is the one to draw with."""
        folder = self._lora_folder
        said = read_record(folder).get("sampling") if folder and (folder / "scheduler").is_dir() else None
        return folder if isinstance(said, dict) and said.get("sampler", "as-is") == "as-is" else None


@dataclass(frozen=True)
class Arm:
    """A model at one number of steps: one column of pictures, one line of the table."""

    model: str
    role: Role
    steps: int
    sampler: Sampler
    guidance_scale: float

    @property
    def name(self) -> str:
        return f"{self.model} at {self.steps} step{'s' * (self.steps != 1)}"

    @property
    def folder(self) -> str:
        return f"{self.model}-{self.steps}"


def contenders(teacher: str, students: Sequence[str]) -> tuple[Contender, ...]:
    """The teacher and its students, each under a name of its own.

    Args:
        students: ``MODEL``, ``MODEL+LORA`` or ``NAME=`` one of both; the word ``teacher`` for MODEL is the teacher.

    Raises:
        UserError: a LoRA is not there, or two are to have one name.
    """
    found = {TEACHER: Contender(TEACHER, *_model_and_lora(teacher))}
    for text in students:
        named = None if Path(text).exists() else _NAMED.fullmatch(text)
        given, rest = named.groups() if named else ("", text)
        source, lora = _model_and_lora(rest)
        source = teacher if source == TEACHER else source
        name = given or _name(source, lora)
        if given in found:
            allowed = "a name for each, and the teacher is called teacher"
            raise refuse("--student", f"{given!r} stands twice", allowed=allowed, hint=f"{given}-2={rest}")
        while name in found:
            name += "-2"
        found[name] = Contender(name, source, lora)
    return tuple(found.values())


def _model_and_lora(text: str) -> tuple[str, Path | None]:
    """``MODEL+LORA`` taken apart; either may have a plus in its own name."""
    if "+" not in text or Path(text).exists():
        return text, None
    places = [at for at, letter in enumerate(text) if letter == "+" and at]
    at = next((at for at in places if Path(text[at + 1 :]).exists()), places[-1] if places else 0)
    model, lora = text[:at], Path(text[at + 1 :])
    if not model or not lora.exists():
        allowed = "MODEL+LORA, the LoRA a .safetensors file or a folder with one"
        raise refuse("--student", f"{text}: no file {lora}", allowed=allowed, hint="check the path behind the plus")
    if lora.is_dir() and not (lora / FILE).is_file():
        inside = sorted(file.name for file in lora.glob("*.safetensors"))
        hint = f"name the file: {lora / inside[0]}" if inside else "check the path behind the plus"
        raise refuse("--student", f"{lora} holds no {FILE}", allowed="a LoRA", hint=hint)
    return model, lora


def _name(source: str, lora: Path | None) -> str:
    """The last part of a path, and the LoRA's file or folder; what no file system minds."""
    name = Path(source).name.removesuffix(".safetensors") or source
    if lora is not None:
        name += f"+{lora.parent.name if lora.name == FILE else lora.name.removesuffix('.safetensors')}"
    return re.sub(r"[^\w.+-]+", "-", name)


def _sampling(said: Mapping[str, Any], place: Path) -> Sampling:
    """A record's ``{"sampler", "guidance_scale"}``; without a sampler the folder's own scheduler."""
    sampler, guidance_scale = said.get("sampler", "as-is"), said.get("guidance_scale")
    known: tuple[Sampler, ...] = get_args(Sampler)
    if sampler not in known:
        raise refuse(
            f"{place}, sampling", repr(sampler)[:80], allowed=", ".join(known), hint=nearest(str(sampler), known)
        )
    return Sampling(sampler, None if guidance_scale is None else float(guidance_scale))
