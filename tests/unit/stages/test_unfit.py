"""Settings of which each is allowed, but not together: place, value, what is allowed and how to mend it."""

from typing import Any

import pytest

from decant.errors import UserError
from decant.stages.consistency import ConsistencySettings
from decant.stages.decoder import SmallDecoder
from decant.stages.distill_settings import Distill
from decant.stages.dmd import DmdSettings
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
        (ConsistencySettings, {"phases": 60}, "stage.phases: 60", {"solver_steps": 600}),
        (ConsistencySettings, {"guidance_embedding": True, "lora": {"rank": 4}}, "stage.guidance_embedding: True",
         {"lora": None}),
        (DmdSettings, {"roles": "shared"}, "stage.roles: shared", {"lora": {"rank": 64}}),
        (DmdSettings, {"roles": "shared", "lora": {"rank": 4}, "critic": 1}, "stage.critic: 1.0", {"critic": 0}),
        (SmallDecoder, {"picture": 0, "taught": 0}, "stage.taught: 0, and picture too", {"taught": 1}),
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


def test_phases_are_drawn_in_as_many_steps_of_ddim() -> None:
    """Unless another sampler is asked for."""
    one, two = (validate(ConsistencySettings, {"phases": n, "solver_steps": 40}, "stage") for n in (1, 2))
    other = validate(ConsistencySettings, {"phases": 2, "solver_steps": 40, "sampler": "euler-trailing"}, "stage")
    assert [(each.sampler, each.sample_steps) for each in (one, two, other)] == [
        ("lcm", 4), ("ddim-trailing", 2), ("euler-trailing", 2)
    ]  # fmt: skip
