"""What differs between kinds of model, as one protocol; each family is one file beside this one."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from decant.data.picture import Frame
from decant.maths.prediction import Prediction
from decant.maths.schedules import Schedule

Name = Literal["sd1", "sd2", "sdxl"]


class Family(Protocol):
    """Conditioning, latents, schedule and one forward of a kind of model.

    No method gives gradients to the text encoder or the VAE; `denoise` alone is differentiable.
    """

    @property
    def name(self) -> Name:
        """What people call this kind of model."""
        ...

    @property
    def prediction(self) -> Prediction:
        """What the network's output means."""
        ...

    @property
    def schedule(self) -> Schedule:
        """x_t = alpha_t x_0 + sigma_t noise."""
        ...

    @property
    def tokens(self) -> int:
        """Length of what the network is told: how many keys its cross-attention reads."""
        ...

    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What the network is told about B captions, each value with B as its first axis; cacheable."""
        ...

    def framing(self, frames: Sequence[Frame]) -> dict[str, Tensor]:
        """What the network is told about how B pictures were framed, on the CPU; `{}` for kinds that are not told.

        It belongs to the picture and not to its caption: a condition is both, and the unconditional twin has the same.
        """
        ...

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, start and end included; `condition` reads the first `tokens` of them."""
        ...

    def unread(self, captions: Sequence[str]) -> list[str]:
        """The end of each caption that `condition` leaves out, in its own words; "" where it reads all."""
        ...

    def null(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The unconditional twin of what `condition` gave: the same keys, shapes, dtypes and devices."""
        ...

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] -> mean and standard deviation (B, C, h, w) of the scaled latents."""
        ...

    def encoders(self) -> dict[str, tuple[nn.Module, ...]]:
        """``{"pictures", "captions"}``: the networks that `encode`, and `condition` and `null`, run."""
        ...

    def made_by(self) -> dict[str, str]:
        """``{"pictures", "captions"}``: digests of all that `encode` and `framing`, and `condition` and `null`, depend
        on.
        """
        ...

    def corrupt(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t (B, C, h, w) from clean latents, noise of their shape and timesteps t (B,)."""
        ...

    def denoise(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Mapping[str, Tensor]) -> Any:
        """One forward: the raw prediction (B, C, h, w), or (prediction, features) of a tapped network."""
        ...
