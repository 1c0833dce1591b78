"""Latents and what a teacher's decoder makes of them, once and for all steps, through the cache."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from decant.data.batch import Batch
from decant.data.captioned import Captioned, Skipped
from decant.data.latents import Cache, OfCaptions, OfPictures, Table, gather, rows_of_captions, rows_of_pictures
from decant.data.picture import CROP, Frame, View
from decant.data.prompts import Prompt
from decant.maths.seeds import generator, seed_of
from decant.methods.decoder import LATENT, PICTURE, REAL, TAUGHT
from decant.models.digest import module_digest
from decant.models.families.latents import decoded, moments
from decant.models.layout import Pipeline, networks
from decant.stages.progress import progress
from decant.stages.samples import Sampling, drawer
from decant.stages.scan import tell_failures
from decant.stages.stage import Inputs

_MEAN = "mean"


@dataclass(frozen=True)
class Decodings:
    """Rows of latents with the pictures of each: those of ``pictures`` in ``views``, then those that a sampler drew.

    Both hold `LATENT`, `TAUGHT`; the pictures' also their own `PICTURE` and the mean that the latent was drawn around.
    """

    n_pictures: int
    pictures: Mapping[str, Table]
    drawn: Mapping[str, Table] = field(default_factory=dict)
    n_drawn: int = 0
    views: int = 1
    seed: int = 0
    replaced: tuple[Skipped, ...] = ()

    @property
    def n(self) -> int:
        """How many latents there are; of a picture's views an epoch sees one."""
        return self.n_pictures + self.n_drawn

    def batch(self, positions: tuple[int, ...]) -> Batch:
        """The latents at these positions of the endless stream; position % n is the index of one."""
        index = torch.tensor([position % self.n for position in positions])
        real = index < self.n_pictures
        rows = torch.tensor([self._row(position) for position in positions])

        def table(name: str, drawn: str) -> Tensor:
            parts = [(self.pictures[name], real)] + ([(self.drawn[drawn], ~real)] if self.n_drawn else [])
            found = [(gather(whole, rows[here]), here) for whole, here in parts if here.any()]
            joined = found[0][0].new_empty(len(rows), *found[0][0].shape[1:])
            for values, here in found:
                joined[here] = values
            return joined

        mean = table(_MEAN, LATENT)
        beside = {LATENT: table(LATENT, LATENT), TAUGHT: table(TAUGHT, TAUGHT), PICTURE: table(PICTURE, TAUGHT)}
        return Batch(tuple(positions), mean, torch.zeros_like(mean), {}, {}, {**beside, REAL: real.float()})

    def _row(self, position: int) -> int:
        index = position % self.n
        if index >= self.n_pictures:
            return index - self.n_pictures
        return seed_of(self.seed, "view", position) % self.views * self.n_pictures + index


@dataclass(frozen=True)
class Decoding:
    """How latents come about: ``teacher`` encodes pictures at ``size`` pixels, and draws some as ``sampling`` says."""

    teacher: Pipeline
    size: int
    sampling: Sampling
    device: torch.device

    def of(
        self, part: Captioned, inputs: Inputs, name: str, views: Sequence[View] = (View(),), n: int = 0
    ) -> Decodings:
        """The latents of a part's pictures, one for each view, and of its first ``n`` captions, drawn.

        Several ranks may ask for the same at once: they share the work.
        """
        cache = Cache(inputs.kept, inputs.work / "cache", inputs.talk)
        nn.Module.to(self.teacher.vae, self.device)
        captions = tuple(dict.fromkeys(part.captions))[:n]
        with progress(f"decoding {name} pictures", len(part.files), inputs.talk) as tick:
            made = rows_of_pictures(part, self._pictures(inputs.seed), cache, tick, inputs.seed, views)
        tell_failures(inputs)
        drawn: Mapping[str, Table] = {}
        if captions:
            digests = [hashlib.sha256(caption.encode()).digest() for caption in captions]
            told = Captioned(tuple(map(Prompt, captions)), captions, (), digests=digests, alone=True)
            with progress(f"drawing {name} latents", len(captions), inputs.talk) as tick:
                drawn = rows_of_captions(told, self._captions(), cache, tick)
        for network in networks(self.teacher).values():
            nn.Module.to(network, "cpu")
        return Decodings(len(part.files), made.tables, drawn, len(captions), len(views), inputs.seed, made.replaced)

    def _pictures(self, seed: int) -> OfPictures:
        """A latent of each picture, drawn from its posterior once, by the seed and the picture."""
        vae = self.teacher.vae

        def rows(keys: Sequence[bytes], pictures: Tensor, frames: Sequence[Frame]) -> dict[str, Tensor]:
            mean, std = (moment.float() for moment in moments(vae, pictures))
            noise = [torch.randn(mean.shape[1:], generator=generator(seed, "posterior", key.hex())) for key in keys]
            latent = mean + std * torch.stack(noise).to(mean)
            return {_MEAN: mean, LATENT: latent, PICTURE: in_bytes(pictures), TAUGHT: in_bytes(decoded(vae, latent))}

        made_by = {**self._made_by("decoded pictures"), "seed": str(seed), "crop": CROP}
        return OfPictures(self.size, made_by, rows)

    def _captions(self) -> OfCaptions:
        vae, draws = self.teacher.vae, drawer(self.teacher, self.size, self.sampling, self.device)

        def rows(captions: Sequence[str]) -> dict[str, Tensor]:
            latent, _ = draws.draw(captions)
            return {LATENT: latent, TAUGHT: in_bytes(decoded(vae, latent))}

        return OfCaptions({**draws.made_by, **self._made_by("decoded samples")}, rows)

    def _made_by(self, what: str) -> dict[str, str]:
        return {"what": what, "vae": module_digest(self.teacher.vae), "size": str(self.size), "on": self.device.type}


def in_bytes(pictures: Tensor) -> Tensor:
    """Pictures about -1 to 1 as uint8, as they are served."""
    return ((pictures.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
