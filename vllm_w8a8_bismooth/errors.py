"""The exceptions that are meant for a user."""


class BismoothError(Exception):
    """Bad input. The message names the tensor or file, the value and the remedy; the CLI prints it and exits with 2."""


class Interrupted(BismoothError):
    """The machine stood in the way (a full disk, a lost permission). What was done is kept; the next run resumes."""
