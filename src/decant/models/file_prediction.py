"""What the network of one file predicts, where the file does not carry decant's own layout.

Nothing in the shapes tells epsilon from v-prediction. In this order it is said by: a `.yaml` of the same name beside
the file (`model.params.parameterization`, as the published configs of SD 2.x have it and other tools read it); marker
tensors `v_pred` and `ztsnr`; `modelspec.prediction_type` in the metadata. Of SD 2.x files that say nothing, one bias
tells.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import safe_open

from decant.errors import refuse
from decant.models.families.family import Name
from decant.models.families.keys import ema_name
from decant.models.guard import Header

_MOST_YAML_BYTES = 10**6
_SPEC = "modelspec.prediction_type"
# Its spread in the published 768 px models is larger than in the 512 px ones; ComfyUI has gone by this since 2023.
_TELLING = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SPREAD_OF_V = 0.09

Said = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class FilePrediction:
    """What a file's network predicts, whether its last noise level keeps nothing of the picture, and who says so."""

    prediction: Said
    zero_snr: bool
    by: str


def prediction_of(header: Header, kind: Name) -> FilePrediction:
    """What the network of a file predicts.

    Raises:
        UserError: the `.yaml` beside it, or its metadata, says what cannot be understood.
    """
    marks = header.shapes.keys()
    zero_snr = "ztsnr" in marks
    beside = header.file.with_suffix(".yaml")
    if beside.is_file():
        return FilePrediction(_from_yaml(beside), zero_snr, beside.name)
    if zero_snr or "v_pred" in marks:
        return FilePrediction("v_prediction", zero_snr, "the tensor v_pred")
    if _SPEC in header.metadata:
        return FilePrediction(_named(header.metadata[_SPEC], f"model {header.file}, {_SPEC}"), False, _SPEC)
    if kind == "sd2":
        return FilePrediction("v_prediction" if _spread(header) > _SPREAD_OF_V else "epsilon", False, _TELLING)
    return FilePrediction("epsilon", False, "nothing, so it is taken for the usual")


def _spread(header: Header) -> float:
    """Standard deviation of the telling bias; 0 where the file has none."""
    name = next((name for name in (_TELLING, ema_name(_TELLING)) if name in header.shapes), None)
    if name is None:
        return 0.0
    with safe_open(header.file, framework="pt") as weights:
        return float(weights.get_tensor(name).float().std(unbiased=False))


def _from_yaml(file: Path) -> Said:
    place = f"model {file}, model.params.parameterization"
    try:
        text = file.read_text(encoding="utf-8") if file.stat().st_size <= _MOST_YAML_BYTES else ""
        document: Any = yaml.safe_load(text)
        said = str(document["model"]["params"].get("parameterization", "eps"))
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError, RecursionError) as error:
        hint = f"remove {file.name}, or write: model: {{params: {{parameterization: v}}}}"
        raise refuse(place, "cannot be read", allowed="eps or v", hint=hint) from error
    return _named(said, place)


def _named(said: str, place: str) -> Said:
    match said.strip().lower():
        case "eps" | "epsilon":
            return "epsilon"
        case "v" | "v_prediction" | "v-prediction":
            return "v_prediction"
        case other:
            raise refuse(place, other[:80], allowed="eps or v", hint="eps for the 512 px models, v for the 768 px ones")
