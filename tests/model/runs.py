"""What is searched: in every test run, and when somebody has time (`python -m tests.model`, `make model`)."""

from dataclasses import dataclass
from typing import Final

from tests.model.spin import FOREVER, Budget


@dataclass(frozen=True, slots=True)
class Run:
    """One search of the table as it is, which must find nothing.

    Attributes:
        budget: what may go wrong.
        states_min: fewer would mean that it has lost its way; about a tenth below what was met.
        livelocks: look for a run that never ends, and not for what becomes of it.
    """

    budget: Budget
    states_min: int
    livelocks: bool = False

    def __str__(self) -> str:
        return f"{self.budget}{', every run ends' if self.livelocks else ''}"


# Every fault alone and every two; with any one of them, any words late or twice.
QUICK: Final = (
    Run(Budget(2), 1_970_000),
    Run(Budget(1, late=FOREVER), 880_000),
    Run(Budget(2, where="qemu"), 1_500_000),
    Run(Budget(2, where="localhost"), 1_560_000),
    Run(Budget(1), 250_000, livelocks=True),
)

DEEP: Final = (
    Run(Budget(2, late=1), 4_840_000),
    Run(Budget(2, late=1, where="qemu"), 3_500_000),
    Run(Budget(1, late=1), 660_000, livelocks=True),
    Run(Budget(2, late=FOREVER), 8_090_000),
    Run(Budget(3), 13_600_000),
)
