"""A student that is its teacher with a LoRA: only that is trained, and it is shipped alone as well as merged."""

from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from peft import LoraConfig
from peft.utils.save_and_load import get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from decant.errors import refuse
from decant.models.layout import Pipeline
from decant.models.load import load, with_unet
from decant.models.move.lora_keys import read_lora, to_kohya, to_peft

FILE = "pytorch_lora_weights.safetensors"
_ADAPTER = "default"


class LoraSettings(BaseModel):
    """Which matrices get a product of two small ones beside them. Hu et al. 2021, "LoRA"."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rank: int = Field(4, ge=1, description="of the product")
    alpha: float | None = Field(None, gt=0, description="scale times rank; null: the rank")
    targets: tuple[str, ...] = Field(
        ("to_q", "to_k", "to_v", "to_out.0"), min_length=1, description="ends of the modules' names"
    )

    @property
    def numerator(self) -> float:
        """Alpha, where it is not set the rank: the product is added times this, divided by the rank."""
        return float(self.rank if self.alpha is None else self.alpha)


def add_lora(student: UNet2DConditionModel, settings: LoraSettings, seed: int, name: str = _ADAPTER) -> None:
    """Put the small matrices in; the student answers as before, since one of each pair begins at zero.

    Raises:
        UserError: a target that no module's name ends in.
    """
    names = [name for name, _ in student.named_modules()]
    for target in settings.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            allowed = "ends of the names of the UNet's modules"
            raise refuse("lora.targets", target, allowed=allowed, hint="such as to_q, to_k, to_v, to_out.0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        alpha: Any = settings.numerator  # typed as a whole number there; fractions work
        config = LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=list(settings.targets))
        student.add_adapter(config, adapter_name=name)


def is_lora(name: str) -> bool:
    """Whether a parameter of a student with a LoRA belongs to that."""
    return ".lora_A." in name or ".lora_B." in name


def write_lora(student: UNet2DConditionModel, settings: LoraSettings, out: Path) -> dict[str, Any]:
    """Write the LoRA alone, with diffusers' keys and with kohya's; says which files."""
    alpha = settings.numerator
    state = get_peft_model_state_dict(student, adapter_name=_ADAPTER)
    tensors: dict[str, Tensor] = {f"unet.{name}": value.detach().float().contiguous() for name, value in state.items()}
    downs = [name for name in tensors if ".lora_A." in name]
    tensors |= {name.replace(".lora_A.weight", ".alpha"): torch.tensor(alpha) for name in downs}
    lora = read_lora(tensors, layers=_layers(student))
    out.mkdir(parents=True, exist_ok=True)
    peft, metadata = to_peft(lora)
    save_file(peft, out / FILE, metadata)
    kohya, metadata = to_kohya(lora, {})
    save_file(kohya, out / "kohya_lora.safetensors", metadata)
    return {"rank": settings.rank, "alpha": alpha, "parameters": sum(value.numel() for value in state.values())}


def merged(teacher: Pipeline, source: str | Path, out: Path) -> UNet2DConditionModel:
    """The student's own weights with the written LoRA added into them."""
    unet = load(source).unet
    pipeline: Any = with_unet(teacher, unet)
    pipeline.load_lora_weights(load_file(out / FILE))
    pipeline.fuse_lora(components=["unet"])
    pipeline.unload_lora_weights()
    return unet


def _layers(student: UNet2DConditionModel) -> int:
    layers = student.config["layers_per_block"]
    return max(layers) if isinstance(layers, list | tuple) else layers
