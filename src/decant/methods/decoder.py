"""A small autoencoder learns from a large one: its decoder what that makes of latents, its encoder the latents.

The networks are those of TAESD (Bohan 2023, github.com/madebyollin/taesd; diffusers' AutoencoderTiny). The decoder's
goals are the picture that a latent was encoded from, as an autoencoder's (Rombach et al. 2022, section 3.1), and the
teacher's own picture of it, as a student's (Hinton et al. 2015). Latents that a sampler drew have the second alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

from torch import Tensor, nn

from decant.data.batch import Batch
from decant.losses.edges import edges
from decant.losses.output import huber, mse
from decant.losses.term import Term
from decant.train.draw import Draw
from decant.train.method import Player

Distance = Literal["mixed", "mse", "huber"]
_ABSOLUTE = 0.3  # of the absolute error, beside the squared one: small things with weak colours count too
LATENT, PICTURE, TAUGHT, REAL = "latent", "picture", "taught", "real"
"""What a batch holds beside: the latent to decode ``(B, C, h, w)``, the picture that it was encoded from and the
teacher's picture of it, both ``(B, 3, H, W)`` uint8, and 1 where there is such a first picture, else 0: ``(B,)``."""


@dataclass(frozen=True)
class Weights:
    """Of the terms; one that is 0 is not computed. picture: to the real picture. taught: to the teacher's.

    edges: of the edges to those of the teacher's. perceptual: LPIPS to the teacher's. encoder: of the encoder's latents
    to the means of the teacher's.
    """

    picture: float = 1.0
    taught: float = 1.0
    edges: float = 0.0
    perceptual: float = 0.0
    encoder: float = 1.0


@dataclass(frozen=True, eq=False)
class Decoder:
    """The method; make it with ``Decoder.of``."""

    players: Mapping[str, Player]
    frozen: Mapping[str, nn.Module]
    weights: Weights = Weights()
    distance: Distance = "mixed"

    @classmethod
    def of(
        cls,
        student: nn.Module,
        weights: Weights,
        distance: Distance = "mixed",
        perceptual: nn.Module | None = None,
        ema: float | None = None,
    ) -> "Decoder":
        """``student``: `models.small_vae.Halves`. ``perceptual``: `metrics.lpips.lpips`, where it has a weight."""
        assert (perceptual is not None) == (weights.perceptual > 0), "LPIPS where it has a weight, and only there"
        trained = [n for n, _ in student.named_parameters() if weights.encoder or not n.startswith("encoder.")]
        frozen = {"perceptual": perceptual} if perceptual is not None else {}
        return cls({"student": Player(student, frozenset(trained), ema)}, frozen, weights, distance)

    def turn(self, step: int) -> str:
        """Always the student's."""
        return "student"

    def terms(self, player: str, nets: Mapping[str, nn.Module], batch: Batch, draw: Draw, step: int) -> Sequence[Term]:
        """``picture``, ``taught``, ``edges``, ``perceptual`` and ``encoder``, as far as they have a weight."""
        weights, real = self.weights, batch.beside[REAL]
        picture, taught = (in_range(batch.beside[name]) for name in (PICTURE, TAUGHT))
        drawn, encoded = nets["student"](batch.beside[LATENT], picture if weights.encoder else None)
        terms = []
        if weights.picture:
            terms.append(Term("picture", self._apart(drawn, picture), weights.picture * real))
        if weights.taught:
            terms.append(Term("taught", self._apart(drawn, taught), weights.taught))
        if weights.edges:
            terms.append(Term("edges", edges(drawn, taught), weights.edges))
        if weights.perceptual:
            far = nets["perceptual"](drawn.clamp(-1, 1), taught).flatten()
            terms.append(Term("perceptual", far, weights.perceptual))
        if encoded is not None:
            terms.append(Term("encoder", mse(encoded, batch.mean), weights.encoder * real))
        return terms

    def _apart(self, drawn: Tensor, goal: Tensor) -> Tensor:
        match self.distance:
            case "mixed":
                return mse(drawn, goal) + _ABSOLUTE * huber(drawn, goal)
            case "mse":
                return mse(drawn, goal)
            case "huber":
                return huber(drawn, goal, c=0.01)
            case _:
                assert_never(self.distance)


def in_range(picture: Tensor) -> Tensor:
    """uint8 -> float in [-1, 1]."""
    return picture.float() / 127.5 - 1
