"""Stands in for the progress line in tests."""


class Told:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.warnings: list[str] = []

    def step(self, what: str) -> None:
        self.steps.append(what)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
