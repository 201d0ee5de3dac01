"""Words of commands that are printed, as a shell takes them."""

import os
import shlex

from vllm_w8a8_bismooth.errors import BismoothError


def word(path: object) -> str:
    """A path as one word of a command; one that begins with a dash must not be taken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def refuse_tilde(text: str) -> None:
    """Raises :class:`BismoothError` for a path that begins with a ``~`` that no shell has expanded."""
    if (expanded := os.path.expanduser(text)) != text:
        remedy = f"give {word(expanded)}, or {word(os.path.abspath(text))} if it is really called so"
        raise BismoothError.of(text, "~ stands for your home folder only where a shell reads it", remedy)
