"""A sample's randomness depends on itself alone, and the data's order on its arguments alone."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decant.data.batch import Batch
from decant.data.order import permutation, stream
from decant.train.draw import Draw

POSITIONS = st.lists(st.integers(0, 2**40), min_size=1, max_size=5, unique=True)


@given(POSITIONS, st.integers(0, 2**62), st.integers(0, 10**7), st.data())
@settings(max_examples=50)
def test_a_sample_draws_the_same_in_every_batch(
    samples: Sequence[int], seed: int, step: int, data: st.DataObject
) -> None:
    whole = Draw(seed, step, tuple(samples))
    chosen = data.draw(st.permutations(range(len(samples))))[: data.draw(st.integers(1, len(samples)))]
    part = Draw(seed, step, tuple(samples[i] for i in chosen))
    assert torch.equal(part.normal("noise", (4, 3, 3)), whole.normal("noise", (4, 3, 3))[chosen])
    assert torch.equal(part.uniform("timestep"), whole.uniform("timestep")[chosen])
    assert torch.equal(part.integers("steps", 1000), whole.integers("steps", 1000)[chosen])


def test_what_was_drawn_before_changes_nothing() -> None:
    torch.manual_seed(0)
    first = Draw(1, 2, (3, 4)).normal("noise", (8,))
    torch.manual_seed(9)
    draw = Draw(1, 2, (3, 4))
    draw.uniform("timestep")
    assert torch.equal(draw.normal("noise", (8,)), first)


def test_seed_step_sample_and_purpose_each_change_the_draw() -> None:
    base = Draw(0, 1, (2,)).normal("noise", (16,))
    others = [
        Draw(5, 1, (2,)).normal("noise", (16,)),
        Draw(0, 5, (2,)).normal("noise", (16,)),
        Draw(0, 1, (5,)).normal("noise", (16,)),
        Draw(0, 1, (2,)).normal("latent", (16,)),
    ]
    assert all(not torch.equal(base, other) for other in others)


def test_seeds_are_the_same_on_every_machine() -> None:
    """A value written down once: a changed hash or separator would break every run that is resumed."""
    from decant.maths.seeds import seed_of

    assert seed_of(0, 1, 2, "noise") == 4979368678506446714


def test_draws_have_the_distributions_they_name() -> None:
    draw = Draw(0, 0, tuple(range(4000)))
    normal, uniform, integers = draw.normal("n", (2,)), draw.uniform("u"), draw.integers("i", 10)
    assert normal.dtype == torch.float32 and normal.shape == (4000, 2)
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.02
    assert integers.dtype == torch.int64 and integers.bincount().min() > 300 and len(integers.bincount()) == 10


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**40))
def test_every_epoch_is_a_permutation_whatever_the_batch(n: int, batch_size: int, seed: int) -> None:
    epochs = 3
    steps = -(-n * epochs // batch_size)
    positions = [p for step in range(steps) for p in stream(seed, step, batch_size, n)]
    for epoch in range(epochs):
        part = positions[epoch * n : (epoch + 1) * n]
        assert sorted(part) == list(range(epoch * n, (epoch + 1) * n))


def test_epochs_and_seeds_shuffle_differently() -> None:
    orders = [tuple(permutation(seed, epoch, 50).tolist()) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4 and tuple(range(50)) not in orders


def test_a_step_is_found_without_the_steps_before_it() -> None:
    in_turn = [stream(3, step, 7, 20) for step in range(30)]
    permutation.cache_clear()
    assert stream(3, 29, 7, 20) == in_turn[29]
    assert [p for step in range(15) for p in stream(3, step, 14, 20)] == [p for part in in_turn for p in part]


def test_a_batch_samples_its_posterior_and_moves_whole() -> None:
    mean, std, noise = torch.ones(2, 4, 3, 3), torch.full((2, 4, 3, 3), 0.5), torch.randn(2, 4, 3, 3)
    tokens = {"encoder_hidden_states": torch.zeros(2, 7, 8)}
    batch = Batch((0, 1), mean, std, tokens, tokens).to("meta")
    assert {
        batch.mean.device.type,
        batch.std.device.type,
        batch.condition["encoder_hidden_states"].device.type,
    } == {"meta"}
    assert torch.equal(Batch((0, 1), mean, std, tokens, tokens).latents(noise), 1 + 0.5 * noise)
    with pytest.raises(AssertionError):
        Batch((0, 1), mean, std, tokens, {})
