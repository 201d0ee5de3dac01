"""The exceptions that are meant for a user."""

_SHOWN = 8


class BismoothError(Exception):
    """Bad input. The CLI prints the message and exits with 2.

    Args:
        problems: one or more messages; each names the tensor or file, the value and the remedy. ``args`` holds them
            all, the text of the exception the first eight.
    """

    def __init__(self, *problems: str):
        super().__init__(*problems)

    def __str__(self) -> str:
        more = [f"and {len(self.args) - _SHOWN} more; bismooth inspect lists them"] if len(self.args) > _SHOWN else []
        return "\n  ".join([*self.args[:1], *(f"also: {problem}" for problem in self.args[1:_SHOWN]), *more])


class Interrupted(BismoothError):
    """The machine stood in the way (a full disk, a lost permission). What was done is kept; the next run resumes."""
