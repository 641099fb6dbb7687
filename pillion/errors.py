"""What the operator sees when something is wrong: one line what, one line what to do."""

from __future__ import annotations

FAILED = 1  # the mesh or the machine said no
USAGE = 2  # the command makes no sense


class CliError(Exception):
    """`what` happened, the `remedy`, and the exit code."""

    def __init__(self, what: str, remedy: str, code: int = FAILED) -> None:
        super().__init__(what)
        self.what, self.remedy, self.code = what, remedy, code
