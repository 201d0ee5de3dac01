"""Words of commands that are printed, as a shell takes them."""

import shlex


def word(path: object) -> str:
    """A path as one word of a command; one that begins with a dash must not be taken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)
