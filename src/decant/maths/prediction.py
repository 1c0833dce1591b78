"""What a network predicts, and the way between the kinds, where x_t = alpha x_0 + sigma noise.

epsilon: Ho et al. 2020. v_prediction: Salimans and Ho 2022, "Progressive Distillation", appendix D. flow:
Lipman et al. 2023. Every tensor is ``(B, C, h, w)``; alpha and sigma broadcast to it (see ``Schedule.at``).
"""

from typing import Literal, assert_never

from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


def target(prediction: Prediction, x_0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a perfect network answers: the regression target, ``(B, C, h, w)``."""
    match prediction:
        case "epsilon":
            return noise
        case "v_prediction":
            return alpha * noise - sigma * x_0
        case "sample":
            return x_0
        case "flow":
            return noise - x_0
        case _:
            assert_never(prediction)


def converted(
    given: Prediction, wanted: Prediction, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """A network's ``output`` at ``x_t`` as a network of the ``wanted`` kind would have said it, ``(B, C, h, w)``."""
    if given == wanted:
        return output
    x_0, noise = (way(given, output, x_t, alpha, sigma) for way in (to_x_0, to_epsilon))
    return target(wanted, x_0, noise, alpha, sigma)


def to_x_0(prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean latent that a network's ``output`` at ``x_t`` stands for, ``(B, C, h, w)``."""
    match prediction:
        case "epsilon":
            return (x_t - sigma * output) / alpha
        case "v_prediction":
            return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)
        case "sample":
            return output
        case "flow":
            return (x_t - sigma * output) / (alpha + sigma)
        case _:
            assert_never(prediction)


def to_epsilon(prediction: Prediction, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The noise that a network's ``output`` at ``x_t`` stands for, ``(B, C, h, w)``."""
    match prediction:
        case "epsilon":
            return output
        case "v_prediction":
            return (sigma * x_t + alpha * output) / (alpha**2 + sigma**2)
        case "sample":
            return (x_t - alpha * output) / sigma
        case "flow":
            return (x_t + alpha * output) / (alpha + sigma)
        case _:
            assert_never(prediction)
