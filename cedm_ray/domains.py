"""What may be searched over beside C: domains of single settings, as a search-space file states them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Choice(BaseModel):
    """One of the given values."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["choice"]
    values: tuple[int | float | str | bool, ...] = Field(min_length=1)


class Range(BaseModel):
    """A number in [low, high], on a linear or a logarithmic scale."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["uniform", "loguniform", "randint", "lograndint"]
    low: float
    high: float

    def ends(self) -> tuple[float, float] | tuple[int, int]:
        """Low and high, as integers where the domain is of integers."""
        return (int(self.low), int(self.high)) if self.kind.endswith("randint") else (self.low, self.high)


Domain = Annotated[Choice | Range, Field(discriminator="kind")]
