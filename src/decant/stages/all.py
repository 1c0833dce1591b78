"""The stages a recipe can name. A new stage is one file and one line here."""

from decant.stages import distill, evaluate, prune
from decant.stages.stage import Stage

STAGES: dict[str, Stage] = {
    "prune": prune.STAGE,
    "distill": distill.STAGE,
    "evaluate": evaluate.STAGE,
}
