"""The YAML front matter of a model card, which is not trusted."""

import re
from pathlib import Path
from typing import Any

from vllm_w8a8_bismooth.report import licence

_LIMIT = 2**16  # bytes of the source's card that are looked at
_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_INHERITED = {
    "language": r"[A-Za-z][\w-]{0,31}",
    "license": r"[\w.+-]{1,64}",
    "license_name": r"[\w.+() -]{1,128}",
    "license_link": r"https?://[^\s<>\"'`\\]{1,500}|[\w][\w./-]{0,127}",
}
"""Keys of the source's front matter that go into ours, and what their values must look like to be believed."""


def inherited(card: Path) -> dict[str, Any]:
    """Licence and languages from the YAML front matter of a model card: key -> string, or list of strings.

    The card is not trusted: see :func:`read`; values that do not look like what they should be are left out.
    """
    stored = read(card)
    found: dict[str, Any] = {}
    for key, pattern in _INHERITED.items():
        value = stored.get(key)
        values = value if key == "language" and isinstance(value, list) else [value]
        if 0 < len(values) <= 100 and all(isinstance(v, str) and re.fullmatch(pattern, v, re.ASCII) for v in values):
            found[key] = value
    if "license" in found:
        found["license"] = licence.hub_id(found["license"]) or found["license"]
    return found


def read(card: Path) -> dict[str, Any]:
    """The YAML front matter of a card, of whose first 64 KiB count, with strings in place of numbers and the like.

    No card, or one that cannot be parsed, gives nothing.
    """
    import yaml

    try:
        with open(card, "rb") as file:
            text = file.read(_LIMIT).decode("utf-8-sig", errors="replace")
        match = _BLOCK.match(text)
        # BaseLoader makes strings of everything ("no" is Norwegian) and ignores tags and merge keys, which can explode.
        stored = yaml.load(match[1], yaml.BaseLoader) if match else None
    except Exception:  # whatever a foreign file does to the parser, it must not stop a conversion
        return {}
    return stored if isinstance(stored, dict) else {}
