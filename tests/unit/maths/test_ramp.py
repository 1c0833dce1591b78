"""Numbers that follow the run."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decant.maths.ramp import Ramp, Shape, ever, value_at

PROGRESS = st.floats(0, 1)
FALLING = ((0.0, 1.0), (1.0, 0.5))  # V-2.2's alpha


def test_linear_is_the_straight_line_of_the_source_document() -> None:
    ramp = Ramp(FALLING)
    assert [ramp.at(p) for p in (0, 0.25, 0.5, 1)] == [1.0, 0.875, 0.75, 0.5]


def test_cosine_is_flat_at_its_ends_and_half_way_in_the_middle() -> None:
    ramp = Ramp(FALLING, "cosine")
    assert ramp.at(0.5) == pytest.approx(0.75) and ramp.at(0) == 1.0 and ramp.at(1) == 0.5
    assert 1 - ramp.at(0.01) < 1e-3 and ramp.at(0.99) - 0.5 < 1e-3


def test_steps_keep_a_value_until_the_next_place() -> None:
    chain = Ramp(((0, 1000), (0.25, 500), (0.5, 250)), "steps")
    assert [chain.at(p) for p in (0, 0.2499, 0.25, 0.49, 0.5, 1)] == [1000, 1000, 500, 500, 250, 250]


@given(st.lists(st.tuples(PROGRESS, st.floats(-5, 5)), min_size=1, max_size=5), st.sampled_from(["linear", "cosine"]))
def test_a_table_is_met_and_never_left(points: list[tuple[float, float]], shape: Shape) -> None:
    table = tuple(sorted(dict(points).items()))
    ramp = Ramp(table, shape)
    assert all(ramp.at(place) == pytest.approx(value, abs=1e-9) for place, value in table)
    for (a, x), (b, y) in pairwise(table):
        assert min(x, y) - 1e-9 <= ramp.at((a + b) / 2) <= max(x, y) + 1e-9


def test_a_plain_number_is_itself_and_a_zero_is_never_there() -> None:
    assert value_at(0.3, 0.9) == 0.3 and value_at(Ramp(((0, 0.3),)), 0.9) == 0.3
    assert ever(Ramp(((0, 0.0), (1, 1.0)))) and not ever(Ramp(((0, 0.0),))) and not ever(0.0)


def test_points_out_of_order_are_stopped() -> None:
    with pytest.raises(AssertionError, match="order"):
        Ramp(((1.0, 0.0), (0.0, 1.0)))
