"""Scores of pictures beside the teacher's, on renders whose scenes are known."""

import numpy as np
import pytest

from decant.metrics.interval import mcnemar_p, paired_difference, paired_ratio
from decant.scenes.captions import caption
from decant.scenes.render import render
from decant.scenes.world import scenes
from decant.stages.asked import Asked
from decant.stages.scoring import Drawn, scores

N = 24
SCENES = list(scenes(N + 1, "held-out", first_seed=9_000))
ASKED = Asked(tuple(caption(s, k) for k, s in SCENES[:N]), tuple(k for k, _ in SCENES[:N]), scenes=True)
RIGHT = [render(s, k) for k, s in SCENES[:N]]
OTHER = [render(s, k) for k, s in SCENES[1:]]


def test_scores_are_paired_by_caption() -> None:
    teacher = Drawn.of(OTHER[:3] + RIGHT[3:], ASKED)
    student = Drawn.of(RIGHT[:1] + OTHER[1:9] + RIGHT[9:], ASKED)
    figure = scores(student, teacher)["scene_accuracy"]
    own, theirs = [k < 1 or k >= 9 for k in range(N)], [k >= 3 for k in range(N)]
    assert (figure["value"], figure["n"]) == (16 / 24, N)
    ratio, gap = paired_ratio(own, theirs), paired_difference(own, theirs)
    assert figure["relative_to_teacher"] == ratio.value == 16 / 21
    assert (figure["relative_low"], figure["relative_high"]) == (ratio.low, ratio.high)
    assert (figure["difference"], figure["difference_low"], figure["difference_high"]) == (gap.value, gap.low, gap.high)
    assert figure["mcnemar_p"] == mcnemar_p(own, theirs)


def test_the_teacher_is_all_of_itself_without_doubt() -> None:
    teacher = Drawn.of(RIGHT, ASKED)
    found = scores(teacher, teacher)
    assert found["scene_accuracy"]["relative_to_teacher"] == 1
    assert "relative_low" not in found["scene_accuracy"] and "difference" not in found["scene_accuracy"]
    assert found["distance_to_teacher"]["value"] == 0


def test_each_attribute_is_scored() -> None:
    """All right but one thing: a recoloured thing costs colour and nothing else."""
    swapped = [np.ascontiguousarray(picture[..., ::-1]) for picture in RIGHT]  # red for blue
    found = scores(Drawn.of(swapped, ASKED), Drawn.of(RIGHT, ASKED))
    names = {name.partition("/")[2] for name in found if "/" in name}
    assert names == {"count", "background", "shape", "colour", "size", "relation"}
    assert found["scene_accuracy/colour"]["value"] < 0.5 < found["scene_accuracy/shape"]["value"]


def test_a_student_that_is_never_right_still_has_an_interval() -> None:
    black = [np.zeros((64, 64, 3), np.uint8)] * N
    figure = scores(Drawn.of(black, ASKED), Drawn.of(RIGHT, ASKED))["scene_accuracy"]
    assert figure["relative_to_teacher"] == 0 == figure["relative_low"]
    assert 0 < figure["relative_high"] < 0.3
    assert figure["difference_high"] < 0 and figure["mcnemar_p"] < 1e-6


@pytest.mark.parametrize("side", [32, 256])
def test_captions_of_scenes_beside_pictures_of_another_size_are_scored_without_the_checker(side: int) -> None:
    large = [np.zeros((side, side, 3), np.uint8)] * N
    found = scores(Drawn.of(large, ASKED), Drawn.of(large, ASKED))
    assert found.keys() == {"distance_to_teacher"}
