"""What is wrong with the input, as data, and the exceptions that are meant for a user."""

from dataclasses import dataclass

_SHOWN = 8


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        where: the tensor, file or option.
        what: what is wrong with it, with the value.
        remedy: what the user can do about it.
    """

    where: str
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.where or repr('')}: {self.what}; {self.remedy}"


class BismoothError(Exception):
    """Bad input. The CLI prints the message and exits with 2.

    Attributes:
        elsewhere: where the problems that its text does not show can be seen.

    Args:
        problems: one or more. The text of the exception shows the first eight.
    """

    elsewhere = ""

    def __init__(self, *problems: Problem):
        super().__init__(*problems)
        self.problems = problems

    @classmethod
    def of(cls, where: object, what: str, remedy: str) -> "BismoothError":
        """The error of a single problem; ``where`` may be a path."""
        return cls(Problem(str(where), what, remedy))

    def __str__(self) -> str:
        first, *others = map(str, self.problems[:_SHOWN])
        left = len(self.problems) - _SHOWN
        more = [f"and {left} more{self.elsewhere}"] if left > 0 else []
        return "\n  ".join([first, *(f"also: {problem}" for problem in others), *more])


def refuse_empty(argument: str, value: object, remedy: str = "give a path, or . for the current folder") -> None:
    """Raises :class:`BismoothError` for an empty text in the place of a path, as from a variable that is not set.

    It would mean the current folder.
    """
    if value == "":
        raise BismoothError.of(argument, "is empty", remedy)


class BadSource(BismoothError):
    """A checkpoint that cannot be converted."""

    elsewhere = "; bismooth inspect lists them"


class Unproven(BismoothError):
    """Nothing was found out of how a model computes: only methods without smoothing can convert it."""


class UnknownModel(Unproven):
    """A type of model that transformers does not have, or only with code that may not run."""


class Interrupted(BismoothError):
    """The machine stood in the way (a full disk, a lost permission). What was done is kept; the next run resumes."""
