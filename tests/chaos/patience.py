"""What a pair that loses connections is to do, by the patience it was given."""

from dataclasses import dataclass
from typing import Final

import pytest

from tests.chaos.load import Ends
from tests.chaos.relays import Standing

EXIT_LOST: Final = 6


@dataclass(frozen=True, slots=True)
class Patience:
    """`--resume-timeout`, and whether a loss that is over within it is survived."""

    seconds: int

    def __str__(self) -> str:
        return f"resume-timeout {self.seconds}"

    def check(self, ends: list[Ends], codes: tuple[int, int], told: str = "") -> None:
        """Whether a session that lost a connection, and could have had it back, ended as it must."""
        if self.seconds:
            assert codes == (0, 0), f"{told}: {codes}"
            assert all(end.whole for end in ends), f"{told}: {[str(end) for end in ends]}"
        else:
            assert codes == (EXIT_LOST, EXIT_LOST), f"{told}: {codes}"
            assert all(end.cut or end.whole for end in ends), f"{told}: {[str(end) for end in ends]}"
            assert not all(end.whole for end in ends), f"{told}: nothing was lost"

    def check_reports(self, pair: Standing, *, control: bool) -> None:
        """Whether the last session's reports agree with that; `control` says whether that connection was lost too."""
        source, destination = pair.reports()
        assert source["session_id"] == destination["session_id"]
        if self.seconds:
            assert source["digest_blake3"] == destination["digest_blake3"]
            assert (source["resumes"] > 0) == (destination["resumes"] > 0) == control
        else:
            assert (source["outcome"], destination["outcome"]) == ("lost", "lost")


LOSS_IS_FINAL: Final = Patience(0)
RESUMES: Final = Patience(30)
PATIENCES: Final = (LOSS_IS_FINAL, RESUMES)

each_patience = pytest.mark.parametrize("patience", PATIENCES, ids=str)
