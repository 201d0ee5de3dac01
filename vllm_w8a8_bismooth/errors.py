"""The one exception that is meant for a user."""


class BismoothError(Exception):
    """Bad input. The message names the tensor or file, the value and the remedy; the CLI prints it and exits with 2."""
