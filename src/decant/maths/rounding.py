"""Float32 to bfloat16 without losing small updates on average."""

import torch
from torch import Tensor

_LOW = 1 << 16


def stochastic_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """Round float32 numbers to one of the two nearest bfloat16, the nearer the likelier, so that the mean is ``x``.

    A bfloat16 is the upper half of a float32: a random number added to the lower half carries over into the upper
    with exactly the probability that the lower half says. What bfloat16 holds stays as it is, and so does what is not
    finite. Connolly, Higham and Mary 2021, "Stochastic Rounding and Its Probabilistic Backward Error Analysis",
    definition 1.1, mode 1.

    Args:
        x: float32, any shape.
        noise: int32, uniform in [0, 2 ** 16), the same shape.
    """
    assert (x.dtype, noise.dtype) == (torch.float32, torch.int32), f"float32 and int32, not {x.dtype}, {noise.dtype}"
    rounded = (x.view(torch.int32) + noise).bitwise_and_(-_LOW).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()


def rounding_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Noise for ``stochastic_bfloat16``, on the generator's device."""
    return torch.randint(_LOW, shape, generator=generator, device=generator.device, dtype=torch.int32)
