"""A recipe's distillations with settings that fit into so much memory, found before anything runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from decant.models.load import condition_tokens, unet_config
from decant.models.surgery.cut import cut
from decant.models.surgery.surgery import SurgeryMap, skeleton
from decant.recipe.runner import Job, resolve
from decant.recipe.schema import Recipe
from decant.stages.distill_settings import Distill
from decant.stages.fit import Pair, fit
from decant.stages.prune import Prune, damage_of
from decant.stages.stage import Stage
from decant.stages.training_settings import Training


@dataclass(frozen=True)
class _Model:
    """A model of a run by its UNet's config, and where it comes from in the run's teacher; None for the teacher."""

    config: dict[str, Any]
    origin: SurgeryMap | None = None


def fitted(
    recipe: Recipe, stages: Mapping[str, Stage], teacher: str, limit_mb: float, talk: Callable[[str], None]
) -> Recipe:
    """The recipe with every distillation changed so that its predicted peak is at most ``limit_mb``.

    Raises:
        UserError: a distillation that cannot be made to fit.
    """
    jobs = resolve(recipe, stages)
    models = {"teacher": _Model(dict(skeleton(unet_config(teacher)).config))}
    changes: dict[str, dict[str, Any]] = {}
    for job in jobs:
        source = models[job.takes[0]]
        if isinstance(job.settings, Prune):
            models[job.name] = _cut(job.settings, source)
        elif job.stage.gives_pipeline:
            models[job.name] = source
        if isinstance(job.settings, Distill):
            pair = Pair(source.config, models[job.teacher].config, source.origin, condition_tokens(teacher))
            changes[job.name] = fit(job.settings, pair, limit_mb, partial(_say, talk, job.name)).changes
        elif isinstance(job.settings, Training):
            _say(talk, job.name, "left as it is: --fit knows stages of distill alone")
    return recipe.model_copy(update={"stages": tuple(_changed(recipe.stages, jobs, changes))})


def _say(talk: Callable[[str], None], name: str, line: str) -> None:
    talk(f"{name}: {line}")


def _changed(steps: Sequence[Any], jobs: Sequence[Job], changes: Mapping[str, dict[str, Any]]) -> list[Any]:
    return [
        step.model_copy(update={"settings": {**step.settings, **changes.get(job.name, {})}})
        for step, job in zip(steps, jobs, strict=True)
    ]


def _cut(settings: Prune, source: _Model) -> _Model:
    keep, damage = settings.description(source.config), damage_of(settings.importance)
    found = cut(source.config, skeleton(source.config).state_dict(), keep, damage=damage)
    origin = found.surgery_map if source.origin is None else found.surgery_map.after(source.origin, {})
    return _Model(dict(found.config), origin)
