"""Per-sample loss weights that follow the signal-to-noise ratio."""

from typing import assert_never

from torch import Tensor

from decant.maths.prediction import Prediction


def min_snr(prediction: Prediction, snr: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma: the weight that counts every error as one of x_0, weighted by min(SNR, gamma).

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4. ``snr``
    ``(B,)`` -> ``(B,)``. For flow, the error in x_0 is sigma times that of the velocity and sigma = 1 / (1 +
    sqrt(SNR)).
    """
    clipped = snr.clamp(max=gamma)
    match prediction:
        case "epsilon":
            return (gamma / snr).clamp(max=1.0)  # = clipped / snr, and 1, its limit, at zero terminal SNR
        case "v_prediction":
            return clipped / (snr + 1)
        case "sample":
            return clipped
        case "flow":
            return clipped / (1 + snr.sqrt()) ** 2
        case _:
            assert_never(prediction)
