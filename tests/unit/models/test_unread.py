"""The end of a prompt for which a text encoder has no room, told in the prompt's own words."""

from collections.abc import Callable

import pytest
from diffusers import StableDiffusionPipeline

from decant.models.families.of import family_of


@pytest.mark.parametrize("kind", ["make_pipeline", "make_sdxl"])
def test_what_is_left_is_exactly_what_fits(kind: str, request: pytest.FixtureRequest) -> None:
    make: Callable[[], StableDiffusionPipeline] = request.getfixturevalue(kind)
    family = family_of(make())
    short, long = "a cat", "One Prompt of single letters: " + "x Y z " * 40  # no word is cut in two
    rest = family.unread([short, long])
    assert rest[0] == "" and rest[1] and long.endswith(rest[1])
    read = long.removesuffix(rest[1])
    assert family.lengths([read])[0] <= family.tokens < family.lengths([read + rest[1].strip()[0]])[0]
    assert family.unread([read]) == [""]
    one, other = (family.condition([text])["encoder_hidden_states"] for text in (long, read))
    assert one.equal(other), "the network is told the same"
