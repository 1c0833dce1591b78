"""Settings of which each is allowed, but not together: place, value, what is allowed and how to mend it."""

from typing import Any

import pytest

from decant.errors import UserError
from decant.stages.distill_settings import Distill
from decant.stages.prune import Prune
from decant.stages.stage import Settings, validate

TEACHERS = [{"teacher": "a", "at": 0.6}, {"teacher": "b", "at": 0.3}]


@pytest.mark.parametrize(
    ("model", "values", "place", "mended"),
    [
        (Prune, {"student": "bk-tiny", "keep": {}}, "stage.keep: given beside student bk-tiny", {"keep": None}),
        (Distill, {"warmup": 9, "steps": 8}, "stage.warmup: 9 steps of 8", {"warmup": 0}),
        (Distill, {"crops": 3, "aspect": "stretch"}, "stage.crops: 3 of aspect stretch", {"crops": 0}),
        (Distill, {"teacher_guidance_scale": [8, 2]}, "stage.teacher_guidance_scale: [8.0, 2.0]",
         {"teacher_guidance_scale": [2, 8]}),
        (Distill, {"next_teachers": TEACHERS}, "stage.next_teachers: at 0.6, 0.3", {"next_teachers": TEACHERS[::-1]}),
        (Distill, {"caption_dropout": 1.5}, "stage.caption_dropout: 1.5", {"caption_dropout": 0.1}),
        (Distill, {"output": {"from": 1}}, "stage.output.from: from given", {"output": {"from": 1, "to": 0.5}}),
        (Distill, {"output": {"table": [[1, 0], [0, 1]]}}, "stage.output.table: places 1, 0",
         {"output": {"table": [[0, 1], [1, 0]]}}),
    ],
)  # fmt: skip
def test_the_refusal_says_which_setting_and_how_to_mend_it(
    model: type[Settings], values: dict[str, Any], place: str, mended: dict[str, Any]
) -> None:
    """And what it asks for is taken."""
    with pytest.raises(UserError) as refused:
        validate(model, values, "stage")
    where, allowed, hint = str(refused.value).splitlines()
    assert where == place
    assert allowed.startswith("  allowed: ") and "Value error" not in allowed
    assert hint.startswith("  hint: ") and hint != "  hint: change this value"
    validate(model, values | mended, "stage")
