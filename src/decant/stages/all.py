"""The stages a recipe can name. A new stage is one file and one line here."""

from decant.stages import adopt, consistency, decoder, distill, dmd, evaluate, prune, quantize, sparsify
from decant.stages.stage import Stage

STAGES: dict[str, Stage] = {
    "prune": prune.STAGE,
    "adopt": adopt.STAGE,
    "distill": distill.STAGE,
    "consistency": consistency.STAGE,
    "dmd": dmd.STAGE,
    "decoder": decoder.STAGE,
    "sparsify": sparsify.STAGE,
    "quantize": quantize.STAGE,
    "evaluate": evaluate.STAGE,
}
