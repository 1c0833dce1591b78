"""A LoRA put on a model for good: as diffusers and peft merge it; where it does not fit, nothing changes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from decant.errors import UserError
from decant.models.move.lora_file import merge_lora

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]
TEXT_TARGETS = ["q_proj", "fc1"]
Make = Callable[..., StableDiffusionPipeline]


def lora_of(pipeline: StableDiffusionPipeline, rank: int = 3, alpha: float = 6.0) -> dict[str, Tensor]:
    """A random LoRA of UNet and text encoder, with keys of peft; the pipeline keeps it."""
    found: dict[str, Tensor] = {}
    torch.manual_seed(5)
    for part, targets in (("unet", UNET_TARGETS), ("text_encoder", TEXT_TARGETS)):
        network = getattr(pipeline, part)
        network.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
        state = get_peft_model_state_dict(network, adapter_name="default")
        found |= {f"{part}.{name}": tensor.detach().clone() for name, tensor in state.items()}
    return found


def weights(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor.clone()
        for part in ("unet", "text_encoder")
        for name, tensor in getattr(pipeline, part).state_dict().items()
    }


@pytest.mark.parametrize("keys", ["peft", "kohya"])
def test_merged_is_what_peft_merges(make_pipeline: Make, tmp_path: Path, keys: str) -> None:
    plain, other = make_pipeline(), make_pipeline()
    tensors = lora_of(other)
    if keys == "kohya":
        kohya = convert_state_dict_to_kohya(tensors)
        tensors = {name: torch.tensor(6.0) if name.endswith(".alpha") else value for name, value in kohya.items()}
    else:
        downs = [name for name in tensors if ".lora_A." in name]
        tensors |= {name.replace(".lora_A.weight", ".alpha"): torch.tensor(6.0) for name in downs}
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "lora.safetensors")
    before = weights(plain)
    merge_lora(plain, tmp_path / "lora.safetensors")
    for part in ("unet", "text_encoder"):
        network = getattr(other, part)
        network.fuse_lora() if part == "unet" else [
            layer.merge() for layer in network.modules() if hasattr(layer, "merge")
        ]
    expected = {
        name.replace(".base_layer", ""): value for name, value in weights(other).items() if ".lora_" not in name
    }
    after = weights(plain)
    assert after.keys() == expected.keys()
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert len(changed) == len([name for name in tensors if name.endswith(("lora_A.weight", "lora_down.weight"))])
    for name, value in after.items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_a_lora_of_another_width_names_the_parameter_and_both_shapes(make_pipeline: Make, tmp_path: Path) -> None:
    plain, wide = make_pipeline(), make_pipeline(block_out_channels=(64, 64, 64, 64))
    save_file(lora_of(wide), tmp_path / "lora.safetensors")
    before = weights(plain)
    with pytest.raises(UserError) as refused:
        merge_lora(plain, tmp_path / "lora.safetensors")
    told = str(refused.value)
    assert "unet.down_blocks.0.attentions.0." in told and ".weight" in told
    assert "64 x" in told and "allowed: 32 x" in told and "hint:" in told
    assert all(torch.equal(value, before[name]) for name, value in weights(plain).items())


def test_a_teachers_lora_on_a_cut_student_is_sent_to_move(make_pipeline: Make, tmp_path: Path) -> None:
    deep, shallow = make_pipeline(layers_per_block=2), make_pipeline(layers_per_block=1)
    save_file(lora_of(deep), tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=r"attentions\.1[\s\S]*no such module[\s\S]*decant move"):
        merge_lora(shallow, tmp_path / "lora.safetensors")


def test_what_is_no_lora_is_refused(make_pipeline: Make, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    with pytest.raises(UserError, match="missing"):
        merge_lora(pipeline, tmp_path / "absent.safetensors")
    (tmp_path / "lora.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match="pickle"):
        merge_lora(pipeline, tmp_path / "lora.bin")
    save_file({"conv_in.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no key of a LoRA"):
        merge_lora(pipeline, tmp_path / "model.safetensors")
