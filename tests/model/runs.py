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


# Every fault alone and every two; with any one of them, any one word late or twice.
QUICK: Final = (
    Run(Budget(2), 1_300_000),
    Run(Budget(1, late=1), 250_000),
    Run(Budget(2, where="qemu"), 1_200_000),
    Run(Budget(1, where="localhost"), 85_000),
    Run(Budget(1), 190_000, livelocks=True),
)

DEEP: Final = (
    Run(Budget(3), 7_800_000),
    Run(Budget(2, late=1), 2_500_000),
    Run(Budget(1, late=FOREVER), 700_000),
    Run(Budget(1, late=1, where="qemu"), 200_000),
    Run(Budget(2, where="localhost"), 900_000),
    Run(Budget(1, late=1), 400_000, livelocks=True),
)
