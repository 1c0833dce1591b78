"""Take out steps and guidance: a student that leads from noise to the picture in a few steps."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from decant.errors import UnfitError, refuse
from decant.methods.consistency import Consistency, Knobs
from decant.models.families.unet import told_guidance
from decant.models.samplers import Drawing, Sampler
from decant.stages.few_steps import few_steps
from decant.stages.lora import is_lora
from decant.stages.players import Players
from decant.stages.stage import Inputs, Stage
from decant.stages.training_settings import Scale, Training, check_scales

_EMBEDDING = 256  # width of what a student is told about its guidance, as LCM's


class ConsistencySettings(Training):
    """How to distil by consistency. Defaults are the paper's, but for the batch."""

    learning_rate: float = Field(1e-4, gt=0, description="of AdamW, at its highest")
    ema: float | None = Field(
        0.95,
        gt=0,
        lt=1,
        description="decay of the average that is believed, and shipped; null: the student itself is, as for a LoRA",
    )
    teacher_guidance_scale: Scale | tuple[Scale, Scale] = Field(
        7.5, description="of the teacher's solver, which the student then draws with by itself; two: drawn between them"
    )
    guidance_embedding: bool = Field(
        False, description="tell the student its guidance, so that it can be chosen when it draws"
    )
    solver_steps: int = Field(50, ge=1, description="of the teacher's whole way; a training step bridges one of them")
    phases: int = Field(
        1, ge=1, description="parts of that way, each led to its own end; several: drawn in as many steps of DDIM"
    )
    own_way: float = Field(
        0.0,
        ge=0,
        le=1,
        description="part of the updates that begin where the student's own steps do, and learn where the teacher's "
        "whole way leads from there: dearer, and what it has to do when it draws",
    )
    own_way_steps: int = Field(5, ge=1, le=1000, description="steps of the teacher's solver in a phase of these")
    distance: Literal["mse", "huber"] = Field("huber", description="between the ends of two points of one way")
    sample_steps: int = Field(4, ge=1, description="sampler steps that its folder recommends, and of sample pictures")
    sampler: Sampler | None = Field("lcm", description="what the student's folder says it is sampled by")

    @model_validator(mode="before")
    @classmethod
    def _drawn_in_phases(cls, said: Any) -> Any:
        phases = said.get("phases") if isinstance(said, dict) else None
        if not isinstance(phases, int) or phases < 2:
            return said
        return {"sample_steps": phases, "sampler": "ddim-trailing", **said}

    @model_validator(mode="after")
    def _told(self) -> Self:
        check_scales(self.teacher_guidance_scale)
        if self.guidance_embedding and self.lora is not None:
            hint = "set guidance_embedding=false, or train all weights: lora=null"
            raise UnfitError("guidance_embedding", True, allowed="false: a LoRA has no place for it", hint=hint)
        if self.solver_steps % self.phases:
            hint = f"set solver_steps={self.phases * max(1, round(40 / self.phases))}"
            raise UnfitError(
                "phases", self.phases, allowed=f"what divides solver_steps, {self.solver_steps}", hint=hint
            )
        return self


def run(settings: ConsistencySettings, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Train the student in ``inputs.source`` towards ``inputs.teacher``; writes the student's pipeline folder."""

    def made(players: Players) -> tuple[Players, Consistency]:
        if settings.guidance_embedding:
            players = replace(players, student=told_guidance(players.student, _EMBEDDING))
        return players, _method(settings, players)

    return few_steps(settings, inputs, out, Drawing(settings.sample_steps, drawn_guidance(settings), "as-is"), made)


def drawn_guidance(settings: ConsistencySettings) -> float:
    """What the student is drawn with: no guidance, or where it is told one, the middle of what it has learned."""
    scales = settings.teacher_guidance_scale
    middle = sum(scales) / 2 if isinstance(scales, tuple) else scales
    return middle if settings.guidance_embedding else 1.0


def _method(settings: ConsistencySettings, players: Players) -> Consistency:
    timesteps = len(players.family.schedule.alpha)
    if settings.solver_steps > timesteps:
        allowed = f"1 to {timesteps}, the teacher's timesteps"
        raise refuse("solver_steps", settings.solver_steps, allowed=allowed, hint="the paper's is 50")
    width = int(players.student.config["time_cond_proj_dim"] or 0)
    knobs = Knobs(
        guidance_scale=settings.teacher_guidance_scale,
        embedding=width or None,
        solver_steps=settings.solver_steps,
        phases=settings.phases,
        own_way=settings.own_way,
        own_way_steps=settings.own_way_steps,
        distance=settings.distance,
        ema=settings.ema,
    )
    trained = is_lora if settings.lora is not None else lambda name: True
    return Consistency.of(
        players.family, players.student, players.teacher.unet, knobs, prediction=players.prediction, trained=trained
    )


STAGE = Stage(settings=ConsistencySettings, run=run, data="required", ranks="all")
