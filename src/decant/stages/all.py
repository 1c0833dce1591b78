"""The stages a recipe can name. A new stage is one file and one line here."""

from decant.stages import adopt, decoder, distill, evaluate, prune, quantize, sparsify
from decant.stages.stage import Stage

STAGES: dict[str, Stage] = {
    "prune": prune.STAGE,
    "adopt": adopt.STAGE,
    "distill": distill.STAGE,
    "decoder": decoder.STAGE,
    "sparsify": sparsify.STAGE,
    "quantize": quantize.STAGE,
    "evaluate": evaluate.STAGE,
}
