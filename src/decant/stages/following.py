"""Settings that may follow the run: a number, or how it changes from the first step to the last."""

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from decant.errors import UnfitError
from decant.maths.ramp import Ramp, Shape


class Following(BaseModel):
    """Either ``from`` and ``to``, or a ``table`` of places; a place is 0 at the first step and 1 at the last."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    begin: float | None = Field(None, alias="from", ge=0, description="at the first step")
    end: float | None = Field(None, alias="to", ge=0, description="at the last step")
    table: tuple[tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0)]], ...] = Field(
        (), description="pairs of place and value, in order"
    )
    shape: Shape = Field("linear", description="between two places; steps: the earlier value")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ends = self.begin is not None and self.end is not None
        if ends == bool(self.table) or (not ends and (self.begin is not None or self.end is not None)):
            allowed = "either `from` and `to`, or a `table` of [place, value] pairs"
            given = ("from", self.begin is not None), ("to", self.end is not None), ("table", bool(self.table))
            named = ", ".join(name for name, there in given if there) or "nothing"
            hint = "for example {from: 1.0, to: 0.5}"
            raise UnfitError("table" if self.table else "from", f"{named} given", allowed=allowed, hint=hint)
        places = [place for place, _ in self.table]
        if places != sorted(places):
            hint = f"write them as {', '.join(f'{place:g}' for place in sorted(places))}"
            told = ", ".join(f"{place:g}" for place in places)
            raise UnfitError("table", f"places {told}", allowed="places in order, each with its value", hint=hint)
        return self

    def ramp(self) -> Ramp:
        """As the maths takes it."""
        if self.begin is not None and self.end is not None:
            return Ramp(((0.0, self.begin), (1.0, self.end)), self.shape)
        return Ramp(self.table, self.shape)


def followed(number: float | Following) -> float | Ramp:
    """A setting as the maths takes it."""
    return number.ramp() if isinstance(number, Following) else number
