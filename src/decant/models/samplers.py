"""How pictures are drawn, in words."""

from dataclasses import dataclass
from typing import Literal

Sampler = Literal["ddim", "ddim-trailing", "ddpm", "lcm", "lcm-trailing", "euler", "euler-trailing", "dpm++", "as-is"]


@dataclass(frozen=True)
class Drawing:
    """The steps, the guidance (1 and below: none) and the sampler of a picture; by default a teacher's."""

    steps: int = 25
    guidance_scale: float = 7.5
    sampler: Sampler = "ddim"

    def to_json(self) -> dict[str, int | float | str]:
        """As a record holds it: how a student wants to be drawn."""
        return {"steps": self.steps, "guidance_scale": self.guidance_scale, "sampler": self.sampler}

    @property
    def told(self) -> str:
        """In a line, for people."""
        guidance = f"guidance {self.guidance_scale:g}" if self.guidance_scale > 1 else "no guidance"
        return f"{self.steps} {'step' if self.steps == 1 else 'steps'}, {guidance}, sampler {self.sampler}"
