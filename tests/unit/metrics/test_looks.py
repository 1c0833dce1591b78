"""LPIPS and CLIPScore where weights are: random ones of the true layouts, beside torchmetrics' own figures."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
from torchvision.models import alexnet
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from decant.errors import UserError
from decant.metrics import clip_score as clip_module
from decant.metrics.clip_score import clip, clip_scores
from decant.metrics.lpips import lpips, lpips_distances
from decant.models.shipped import shipped_folder
from decant.scenes.captions import caption
from decant.scenes.render import render
from decant.scenes.world import draw_scene
from decant.stages.looks import looks
from decant.stages.scoring import Drawn

N = 5
CAPTIONS = [caption(draw_scene(seed, "train"), seed) for seed in range(N)]


def pictures(first: int = 0) -> list[NDArray[np.uint8]]:
    return [render(draw_scene(seed, "train"), seed) for seed in range(first, first + N)]


def tensor(given: list[NDArray[np.uint8]]) -> Tensor:
    return torch.from_numpy(np.stack(given)).movedim(3, 1)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of torch's hub with AlexNet's file, of random weights."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(0)
    file = tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth"
    torch.save(alexnet().state_dict(), file)
    return file


@pytest.fixture
def small_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small CLIP of random weights in the place of the published one."""
    tokenizer = CLIPTokenizer.from_pretrained(shipped_folder("scenes") / "tokenizer")
    text = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "max_position_embeddings": 32}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"image_size": 32, "patch_size": 8}
    torch.manual_seed(1)
    config = CLIPConfig(text_config={**sizes, **text}, vision_config={**sizes, **vision}, projection_dim=16)
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    seen = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(seen, tokenizer).save_pretrained(tmp_path / "clip")
    monkeypatch.setattr(clip_module, "MODEL", str(tmp_path / "clip"))
    return str(tmp_path / "clip")


def test_lpips_is_torchmetrics_own_by_picture(hub: Path) -> None:
    ours, theirs = tensor(pictures()), tensor(pictures(100))
    found = lpips_distances(lpips(), ours, theirs, chunk=2)
    whole = learned_perceptual_image_patch_similarity(ours / 127.5 - 1, theirs / 127.5 - 1, net_type="alex")
    assert found.shape == (N,) and found.min() > 0
    torch.testing.assert_close(found.mean(), whole)
    assert lpips_distances(lpips(), ours, ours).abs().max() == 0


def test_clip_score_is_a_hundred_times_the_cosine_but_never_below_nothing(small_clip: str) -> None:
    model, processor = CLIPModel.from_pretrained(small_clip), CLIPProcessor.from_pretrained(small_clip)
    given = [*pictures(), *pictures()]
    words = [*CAPTIONS, *reversed(CAPTIONS)]
    found = clip_scores(clip(), given, words, chunk=3)
    alone = []
    for picture, text in zip(given, words, strict=True):
        pixels, tokens = processor(images=picture, return_tensors="pt"), processor(text=text, return_tensors="pt")
        with torch.no_grad():
            seen = model.get_image_features(**pixels).pooler_output
            said = model.get_text_features(**tokens).pooler_output
        alone.append(100 * float(torch.cosine_similarity(seen, said)))
    assert min(alone) < 0 < max(alone), "both sides of nothing"
    assert found == pytest.approx([max(0.0, score) for score in alone], abs=1e-3)


def test_both_are_figures_of_a_model_beside_its_teacher(hub: Path, small_clip: str) -> None:
    teacher, student = Drawn(pictures(), [], []), Drawn(pictures(50), [], [])
    seen = looks(CAPTIONS, teacher)
    assert not seen.left_out
    own, theirs = seen.figures(student, teacher=False), seen.figures(teacher, teacher=True)
    assert set(own) == {"lpips_to_teacher", "clip_score"} and set(theirs) == {"clip_score"}
    assert own["lpips_to_teacher"]["better"] == "lower" and own["clip_score"]["better"] == "higher"
    gap = own["clip_score"]["value"] - theirs["clip_score"]["value"]
    assert own["clip_score"]["difference"] == pytest.approx(gap)
    assert seen.figures(teacher, teacher=False)["lpips_to_teacher"]["value"] == 0


def test_what_is_not_here_is_left_out_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(clip_module, "MODEL", "nobody/no-such-model")
    seen = looks(CAPTIONS, Drawn(pictures(), [], []))
    told = {key: str(error) for key, error in seen.left_out}
    assert "alexnet-owt-7be5be79.pth" in told["lpips_to_teacher"] and "hf download" in told["clip_score"]
    assert seen.figures(Drawn(pictures(), [], []), teacher=False) == {}


def test_a_file_that_is_more_than_weights_is_not_opened(hub: Path) -> None:
    torch.save({"run": Path}, hub)
    with pytest.raises(UserError, match="damaged, or more than weights"):
        lpips()
