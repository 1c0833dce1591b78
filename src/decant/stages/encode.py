"""Captioned pictures as latents and text embeddings, through the cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from decant.data.captioned import Captioned
from decant.data.latents import Cache, Drawer, Latents, encode_all
from decant.data.picture import Frame, View
from decant.errors import refuse
from decant.models.families.family import Family
from decant.stages.progress import progress
from decant.stages.scan import tell_failures
from decant.stages.stage import Inputs


@dataclass
class _OnDevice:
    """A family's encoders, brought to the device when they are first needed: from a full cache never."""

    family: Family
    device: torch.device

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        self._bring("pictures")
        return self.family.encode(pictures)

    def condition(self, captions: Sequence[str]) -> dict[str, Tensor]:
        self._bring("captions")
        return self.family.condition(captions)

    def null(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.family.null(condition)

    def framing(self, frames: Sequence[Frame]) -> dict[str, Tensor]:
        return self.family.framing(frames)

    def made_by(self) -> dict[str, str]:
        """Kinds of devices round differently."""
        return {what: f"{digest} {self.device.type}" for what, digest in self._digests.items()}

    def _bring(self, what: str) -> None:
        for encoder in self.family.encoders()[what]:
            nn.Module.to(encoder, self.device)

    @cached_property
    def _digests(self) -> dict[str, str]:
        return self.family.made_by()


def encode_data(
    family: Family,
    part: Captioned,
    size: int,
    inputs: Inputs,
    device: torch.device,
    name: str = "",
    drawer: Drawer | None = None,
    views: Sequence[View] = (View(),),
) -> Latents:
    """Latents at ``size`` pixels and text embeddings of a part; VAE and text encoders then leave the device.

    What the run's cache has is not encoded; what it has not, it keeps. Prompts alone get the latents of ``drawer``. Of
    several ranks each encodes its part.

    Raises:
        UserError: prompts alone, where there must be pictures.
    """
    if part.alone and drawer is None:
        value = f"{part.place} holds prompts alone"
        raise refuse("data", value, allowed="pictures with captions to measure on", hint="name a folder of pictures")
    cache = Cache(inputs.kept, inputs.work / "cache", inputs.talk)
    both, ranks = _OnDevice(family, device), inputs.ranks
    what = ("drawing {} prompts" if part.alone else "encoding {} pictures").format(name).replace("  ", " ")
    if ranks.count > 1:
        mine = part.at(ranks.part(range(len(part.files))))
        if mine.files:
            with progress(f"{what} on the first of {ranks.count} ranks", len(mine.files), inputs.talk) as tick:
                encode_all(mine, size, both, cache, tick, inputs.seed, drawer, views)
        ranks.meet()  # all files are written before any rank looks for them
    with progress(what, len(part.files), inputs.talk) as tick:
        latents = encode_all(part, size, both, cache, tick, inputs.seed, drawer, views)
    tell_failures(inputs)
    for item in latents.replaced:
        inputs.talk(f"{item.name} has changed since it was looked at, another picture stands in for it: {item.reason}")
    for encoder in sum(family.encoders().values(), ()):
        nn.Module.to(encoder, "cpu")
    return latents
