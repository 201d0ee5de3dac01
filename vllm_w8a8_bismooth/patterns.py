"""Patterns that name linears, as ``--ignore`` and ``--group-layers`` take them.

A pattern is a regular expression that is looked for in a module's full name. One that begins with ``re:``, as
llm-compressor and compressed-tensors write them, must match from the beginning of the name; one that is a module's full
name means that module alone. None of them takes a number apart: ``layers.1`` does not mean ``layers.10``.
"""

import re
from collections.abc import Collection, Iterable

_CLOSING = {"(": ")", "{": "}"}
_FLAGS = re.compile(r"\(\?[aiLmsux]+\)")
_WHOLE_NUMBER = r"(?:(?<!\d)|(?!\d))"
"""Not between two digits."""


def split(given: str | Iterable[str]) -> tuple[str, ...]:
    """Patterns one by one: a text is cut at its commas, but not at those inside brackets or behind a backslash.

    ``"q_proj, layers.1{1,2}"`` gives ``("q_proj", "layers.1{1,2}")``. Of several texts each is cut; what has been cut
    stays as it is.
    """
    texts = [given] if isinstance(given, str) else list(given)
    return tuple(part for text in texts for part in _cut(text))


def _cut(text: str) -> list[str]:
    parts, inside, escaped = [""], "", False  # the brackets that are open
    for letter in text:
        if letter == "," and not inside and not escaped:
            parts.append("")
            continue
        parts[-1] += letter
        if escaped or letter == "\\":
            escaped = not escaped
        elif inside.endswith("]"):
            inside = inside[:-1] if letter == "]" else inside
        elif letter == "[":
            inside += "]"
        elif letter in _CLOSING:
            inside += _CLOSING[letter]
        elif inside.endswith(letter):
            inside = inside[:-1]
    return [part.strip() for part in parts]


def found_by(pattern: str, names: Collection[str]) -> set[str]:
    """The full names of modules that a pattern means.

    Raises:
        re.error: it is no regular expression.
    """
    if pattern in names:
        return {pattern}
    expression = pattern.removeprefix("re:")
    flags = re.compile(expression).flags  # also says what is wrong with it, in its own words
    if leading := _FLAGS.match(expression):  # they count for the whole, and may only stand at its beginning
        expression = expression[leading.end() :]
    end = "\n" if flags & re.VERBOSE else ""  # a comment would go on
    whole = re.compile(f"{_WHOLE_NUMBER}(?:{expression}{end}){_WHOLE_NUMBER}", flags)
    look = whole.match if pattern.startswith("re:") else whole.search
    return {name for name in names if look(name)}
