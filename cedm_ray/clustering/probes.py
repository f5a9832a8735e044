"""What the searches for C_max ask and answer."""

from dataclasses import dataclass
from typing import Literal, Protocol

Fidelity = Literal["low", "full"]
Outcome = Literal["searching", "found", "out_of_probes", "capped", "empty"]


@dataclass(frozen=True, order=True)
class Probe:
    """A clustering to train for the sake of its r_C."""

    num_clusters: int
    """Clusters C."""
    repeat: int = 0
    """Which training of this C, from 0: each has a seed of its own."""
    fidelity: Fidelity = "full"
    """``low``: with fewer heads, cheaper."""


@dataclass(frozen=True)
class Reading:
    """What a probe found."""

    probe: Probe
    ratio: float
    """Utilization ratio r_C, in ``(0, 1]``."""


class BoundSearch(Protocol):
    """A search for C_max by asking and telling; it trains nothing itself."""

    cutoff: float

    @property
    def readings(self) -> list[Reading]:
        """All readings in the order in which they were told."""
        ...

    @property
    def outcome(self) -> Outcome:
        """How the search stands."""
        ...

    @property
    def done(self) -> bool:
        """Whether no further probe is needed."""
        ...

    @property
    def c_max(self) -> int | None:
        """C_max once the search is done, 2 where there is no C to train below it; None before."""
        ...

    @property
    def interval(self) -> tuple[int, int | None]:
        """Ends of the range in which C_max lies; None while there is no upper one."""
        ...

    def ask(self, k: int = 1) -> list[Probe]:
        """Up to ``k`` probes to run now, beside those handed out and not told yet."""
        ...

    def tell(self, probe: Probe, ratio: float) -> None:
        """Take the reading of a probe, in any order, asked for or not."""
        ...
