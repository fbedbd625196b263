"""The moments of a hand-over at which something goes wrong, each reached exactly and held, not hit by the clock.

Whoever takes the next step is held before it, and where the step is a word between the relays, the way that this word
takes is stalled before the one who makes it necessary goes on. The steps are those of tests/standins/xl.py; those that
a real xl can be held at bear the same names.
"""

from dataclasses import dataclass
from typing import Final

from tests.attacks.wire import Way


@dataclass(frozen=True)
class Moment:
    """One of them.

    Args:
        name: for tests.
        stands: where the two journals stand then, the source's first.
        source, destination: the step at which that side's xl is held on the way there.
        stall: this way carries nothing any more once xl is held; then xl goes on, up to what the stalled word makes
            possible. None: xl stays held.
        facts: what the destination has to say first passes, which the source states and signs; what follows is stalled.
    """

    name: str
    stands: tuple[str, str]
    source: str = ""
    destination: str = ""
    stall: Way | None = None
    facts: bool = False

    @property
    def committed(self) -> bool:
        """Whether the destination's copy is the one from here on."""
        return self.stands[0] in {"committed", "done"}


MOMENTS: Final = (
    Moment("stream", ("open", "open"), source="migrate:stream"),
    Moment("prepared there", ("open", "prepared"), destination="receive:ready", stall=Way.BACKWARD, facts=True),
    Moment("prepared", ("prepared", "prepared"), source="migrate:renamed"),
    Moment("voted", ("voted", "prepared"), source="migrate:renamed", stall=Way.FORWARD),
    Moment("go passed", ("voted", "prepared"), destination="receive:go"),
    Moment("voted there", ("voted", "voted"), destination="receive:report", stall=Way.BACKWARD),
    Moment("committed", ("committed", "voted"), destination="receive:report", stall=Way.FORWARD),
    Moment("committed there", ("committed", "committed"), destination="unpause"),
    Moment("done there", ("committed", "done"), destination="unpause", stall=Way.BACKWARD),
    Moment("done", ("done", "done"), source="migrate:report"),
)
