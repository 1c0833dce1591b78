"""Take out steps and guidance: a student that leads from noise to the picture in a few steps."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from decant.errors import UnfitError, refuse
from decant.methods.consistency import Consistency, Knobs
from decant.models.families.unet import told_guidance
from decant.models.samplers import Drawing, Sampler
from decant.stages.lora import is_lora
from decant.stages.midway import Midway
from decant.stages.players import Players, open_players
from decant.stages.stage import Inputs, Stage
from decant.stages.training import encode, look, record_of, save_student, ship, train
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
    distance: Literal["mse", "huber"] = Field("huber", description="between the ends of two points of one way")
    sample_steps: int = Field(4, ge=1, description="sampler steps that its folder recommends, and of sample pictures")
    sampler: Sampler | None = Field("lcm", description="what the student's folder says it is sampled by")

    @model_validator(mode="after")
    def _told(self) -> Self:
        check_scales(self.teacher_guidance_scale)
        if self.guidance_embedding and self.lora is not None:
            hint = "set guidance_embedding=false, or train all weights: lora=null"
            raise UnfitError("guidance_embedding", True, allowed="false: a LoRA has no place for it", hint=hint)
        return self


def run(settings: ConsistencySettings, inputs: Inputs, out: Path) -> dict[str, Any]:
    """Train the student in ``inputs.source`` towards ``inputs.teacher``; writes the student's pipeline folder."""
    found = look(settings, inputs, out)
    players = open_players(settings, inputs, found.shown)
    if settings.guidance_embedding:
        players = replace(players, student=told_guidance(players.student, _EMBEDDING))
    method = _method(settings, players)
    encoded = encode(players, settings, inputs, found)
    student = Drawing(settings.sample_steps, drawn_guidance(settings), "as-is")
    midway = Midway(settings, inputs, players, student, Drawing(settings.prompt_steps, settings.prompt_guidance_scale))
    curve = train(method, encoded.train, settings, inputs, midway)
    inputs.ranks.meet()
    midway.take_best(players.student)
    players, said = ship(players, settings, inputs, out)
    if not inputs.ranks.first:
        return {}
    save_student(players, inputs, out)
    return {**record_of(players, inputs, found, encoded, curve, midway), **said, "sampling": student.to_json()}


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
        distance=settings.distance,
        ema=settings.ema,
    )
    trained = is_lora if settings.lora is not None else lambda name: True
    return Consistency.of(
        players.family, players.student, players.teacher.unet, knobs, prediction=players.prediction, trained=trained
    )


STAGE = Stage(settings=ConsistencySettings, run=run, data="required", ranks="all")
