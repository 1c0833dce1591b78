"""How the scenes teacher is trained: a tiny recipe of every kind of part ends in the same bits whenever it is run."""

from pathlib import Path

import pytest
import torch

from decant.stages.teacher import train_teacher

RECIPE = """
seed: 3
parts:
  - {name: 1-vae, kind: vae, pictures: 16, steps: 2, batch_size: 2, learning_rate: 1.0e-3, crop: 32, l1_weight: 0.1}
  - {name: 2-unet, kind: denoiser, pictures: 16, steps: 4, stop_at: 2, batch_size: 2, learning_rate: 1.0e-3}
  - {name: 3-decoder, kind: decoder, pictures: 16, steps: 2, batch_size: 2, learning_rate: 1.0e-3}
"""


@pytest.mark.slow
def test_a_teacher_is_a_function_of_its_recipe(tmp_path: Path) -> None:
    """The weights and the pictures of every part, whatever random numbers were drawn before."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    made = []
    for attempt in ("a", "b"):
        torch.rand(7)
        train_teacher(tmp_path / attempt, recipe, [], lambda line: None)
        files = [*(tmp_path / attempt).rglob("*.safetensors"), *(tmp_path / attempt).rglob("*.png")]
        made.append({file.relative_to(tmp_path / attempt): file.read_bytes() for file in files})
    assert len(made[0]) > 8 and made[0] == made[1]
